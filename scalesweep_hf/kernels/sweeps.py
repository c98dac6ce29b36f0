"""Which scale a block gets, for any blocks: the loops of `scalesweep_hf.ops.sweep` in Triton.

a and w are tuples of 16 [ROWS] float32, one for each element of a block; codes and losses are
[ROWS]. `kernels.descent` is faster where it holds.
"""

import triton
import triton.language as tl

from scalesweep_hf.kernels.numbers import NAN, decode, encode_nearest, invert, rounding_error
from scalesweep_hf.ops.sweep import (
    DOWN_MAX,
    DOWN_NORMAL,
    DOWN_SUBNORMAL,
    DOWN_TOP,
    DOWN_WEIGHTED,
    LAST_ODD,
    TOP,
    UP_MAX,
    UP_NORMAL,
    UP_SUBNORMAL,
)

MODES = {"absmax": 0, "four_over_six": 1, "mse": 2, "wmse": 2}
WINDOWS = {"bounded": 0, "exact": 1, "fixed": 2}
ABSMAX = tl.constexpr(0)
FOUR_OVER_SIX = tl.constexpr(1)
SWEEP = tl.constexpr(2)
EXACT = tl.constexpr(1)
FIXED = tl.constexpr(2)


def _nibbles(values: tuple[int, ...]) -> tl.constexpr:
    """Pack a table of eight small numbers into one integer."""
    return tl.constexpr(sum(value << (4 * i) for i, value in enumerate(values)))


UP = _nibbles(UP_NORMAL)
UP_LOW = _nibbles(UP_SUBNORMAL)
DOWN = _nibbles(DOWN_NORMAL)
DOWN_LOW = _nibbles(DOWN_SUBNORMAL)
DOWN_HIGH = _nibbles(DOWN_TOP)
FIRST_HIGH = tl.constexpr(TOP)
WEIGHTED_DOWN = tl.constexpr(DOWN_WEIGHTED)
HIGHEST = tl.constexpr(UP_MAX)
ODD = tl.constexpr(LAST_ODD)
STEPS = tl.constexpr(UP_MAX + DOWN_MAX)
STEPS_WEIGHTED = tl.constexpr(UP_MAX + DOWN_WEIGHTED)


@triton.jit
def choose(a, w, low, high, MODE: tl.constexpr, WINDOW: tl.constexpr, WEIGHTED: tl.constexpr):
    """Return the code of every block's scale, [ROWS] int32, from its magnitudes and weights."""
    largest = a[0]
    for i in tl.static_range(1, 16):
        largest = tl.maximum(largest, a[i], propagate_nan=NAN)
    broken = largest != largest  # a NaN somewhere: nothing beats the first candidate
    base = tl.where(broken, 126, encode_nearest(tl.div_rn(largest, 6.0)))
    first = base
    best = base
    if MODE == FOUR_OVER_SIX:
        four = encode_nearest(tl.div_rn(largest, 4.0))
        best = tl.where(_loss(a, w, four, False) < _loss(a, w, base, False), four, base)
    elif MODE == SWEEP:
        if WINDOW == EXACT:
            best = _sweep_exact(a, w, base, WEIGHTED)
        elif WINDOW == FIXED:
            first = tl.maximum(base + low, 1)
            best = _sweep(a, w, base + low, base + high, 0, high - low, WEIGHTED)
        else:
            first, best = _sweep_bounded(a, w, base, WEIGHTED)
    return tl.where(broken, first, best)


@triton.jit
def _loss(a, w, code, WEIGHTED: tl.constexpr):
    """Twin of `ops.sweep._loss`."""
    scale = decode(code)
    inverse = invert(scale)
    total = scale
    for i in tl.static_range(16):
        error = rounding_error(a[i], scale, inverse)
        term = error * error
        if WEIGHTED:
            term = w[i] * term
        total = term if i == 0 else total + term
    return total


@triton.jit
def _clipping_cost(a, w, code, WEIGHTED: tl.constexpr):
    """Return what clipping alone costs at a scale, as `ops.sweep._sweep_exact` computes it."""
    limit = 6.0 * decode(code)
    total = limit
    for i in tl.static_range(16):
        clipped = tl.maximum(a[i] - limit, 0.0)
        term = clipped * clipped
        if WEIGHTED:
            term = w[i] * term
        total = term if i == 0 else total + term
    return total


@triton.jit
def _sweep(a, w, low, high, last, steps, WEIGHTED: tl.constexpr):
    """Twin of `ops.sweep.sweep_window`."""
    low = tl.minimum(tl.maximum(low, 1), 126)
    high = tl.minimum(tl.maximum(high, 1), 126)
    largest = tl.maximum(high, last)
    odd = (high - 1) | 1
    best = low
    best_loss = _loss(a, w, low, WEIGHTED)
    for step in range(1, steps + 1):
        code = low + step
        code = tl.minimum(tl.where(code > high, odd + 2 * (code - high), code), largest)
        loss = _loss(a, w, code, WEIGHTED)
        better = loss < best_loss
        best_loss = tl.where(better, loss, best_loss)
        best = tl.where(better, code, best)
    return best


@triton.jit
def _sweep_exact(a, w, base, WEIGHTED: tl.constexpr):
    """Twin of `ops.sweep._sweep_exact`."""
    code = tl.minimum(tl.maximum(base + HIGHEST, ODD), 126)
    best = code
    best_loss = tl.full(code.shape, float("inf"), tl.float32)
    alive = code > 0
    while tl.max(alive.to(tl.int32), axis=0) > 0:
        loss = _loss(a, w, code, WEIGHTED)
        better = alive & (loss <= best_loss)
        best_loss = tl.where(better, loss, best_loss)
        best = tl.where(better, code, best)
        alive = alive & (code > 1) & (_clipping_cost(a, w, code, WEIGHTED) <= best_loss)
        code = tl.maximum(code - 1, 1)
    return best


@triton.jit
def _sweep_bounded(a, w, base, WEIGHTED: tl.constexpr):
    """Twin of `ops.sweep.sweep_scales` for its bounded window; return the first candidate too."""
    field = (base & 7) * 4
    up = (tl.where(base < 8, UP_LOW, UP) >> field) & 15
    rows = tl.where(base < 8, DOWN_LOW, tl.where(base < FIRST_HIGH, DOWN, DOWN_HIGH))
    down = (rows >> field) & 15
    if WEIGHTED:
        down = tl.full(down.shape, WEIGHTED_DOWN, tl.int32)
    low = base - down
    best = _sweep(a, w, low, base + up, ODD, STEPS_WEIGHTED if WEIGHTED else STEPS, WEIGHTED)
    return tl.maximum(low, 1), best
