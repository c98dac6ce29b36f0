"""Which scale a block gets, for ordinary blocks: with less arithmetic than `kernels.sweeps` needs.

The scale of least loss is searched for from above. No scale above the bounded window has less, so
the walk may start anywhere above it; nor has one below, so it may also go on (with importances it
ends where the window does). It stops where clipping one element alone, with importances one that
stands for several, costs more than the best scale so far: docs/proof.md, "Walking down". So
"bounded" and "exact" are the same walk, but for importances.

Magnitudes and losses have units of 2**10 tensor scales and their square: see `kernels.numbers`.
"""

import triton
import triton.language as tl

from scalesweep_hf.kernels.numbers import (
    MAGNITUDE,
    SCALE,
    code_scale,
    code_scale_normal,
    encode_nearest,
    error_near,
    invert_near,
    invert_rough,
    sixth_near,
)
from scalesweep_hf.kernels.sweeps import ABSMAX, EXACT, FOUR_OVER_SIX, ODD, SWEEP, WEIGHTED_DOWN

# Largest magnitudes of ordinary blocks, in tensor scales: six times code 126 and some, which
# nothing clips; and what rounds to code 120, because 126 is the last that the walk may start at.
MOST_ABSMAX = tl.constexpr(2800.0)
MOST = tl.constexpr(1632.0)
# What has a normal scale. Subnormal ones are so far apart that the nearest may clip.
LEAST_LARGEST = tl.constexpr(0.09)
LEAST = tl.constexpr(2.0**-53)  # squares of the smallest are normal numbers, in both units
# Losses far above what underflow takes: for importances up to one, and for those times
# MAGNITUDE**-2. SHORT covers roundings.
FLOOR = tl.constexpr(2.0**-60)
FLOOR_NORMALIZED = tl.constexpr(2.0**-40)
SHORT = tl.constexpr(1 - 2.0**-13)
SIX = tl.constexpr(6.0 * MAGNITUDE.value / SCALE.value)  # takes `code_scale` to its clipping limit


@triton.jit
def is_ordinary(largest, tensor_scale, MODE: tl.constexpr):
    """Whether blocks may be chosen for with magnitudes in units of MAGNITUDE, for a whole program.

    Args:
        largest: [ROWS], largest magnitudes over the tensor scale, in units of MAGNITUDE.
        tensor_scale: float32.
        MODE: of `sweeps.MODES`.
    """
    most: tl.constexpr = MOST_ABSMAX if MODE == ABSMAX else MOST
    ordinary = largest <= most * MAGNITUDE  # not so if NaN
    if MODE != SWEEP:
        ordinary = ordinary & ((largest >= LEAST_LARGEST * MAGNITUDE) | (largest == 0.0))
    usual = (tensor_scale >= 2.0**-60) & (tensor_scale <= 2.0**60)
    return usual & (tl.min(ordinary.to(tl.int32), axis=0) > 0)


@triton.jit
def has_no_specks(x, tensor_scale):
    """Whether no element of a program is so small that squares lose bits, but for zeros.

    Args:
        x: tuple of 16 [ROWS] float32, >= 0.
        tensor_scale: float32.
    """
    least = (tensor_scale * LEAST).to(tl.uint32, bitcast=True) - 1
    smallest = x[0].to(tl.uint32, bitcast=True) - 1  # zero becomes the largest integer
    for i in tl.static_range(1, 16):
        smallest = tl.minimum(smallest, x[i].to(tl.uint32, bitcast=True) - 1)
    return tl.min((smallest >= least).to(tl.int32), axis=0) > 0


@triton.jit
def choose_near(a, w, largest, MODE: tl.constexpr, WINDOW: tl.constexpr, WEIGHTED: tl.constexpr):
    """Return the code of every block's scale, [ROWS] int32.

    Args:
        a: magnitudes, tuple of 16 [ROWS].
        w: likewise the normalized importances, times MAGNITUDE**-2.
        largest: [ROWS], of a.
        MODE: of `sweeps.MODES`.
        WINDOW: of `sweeps.WINDOWS`, but FIXED.
        WEIGHTED: whether w counts.
    """
    code = encode_nearest(sixth_near(largest) * (1.0 / MAGNITUDE))
    if MODE == FOUR_OVER_SIX:
        four = encode_nearest(largest * (0.25 / MAGNITUDE))
        loss = _loss_near(a, a, code_scale(code), False, False)
        better = _loss_near(a, a, code_scale(four), False, False) < loss
        code = tl.where(better, four, code)
    elif MODE == SWEEP:
        lowest = lowest_code(code, WINDOW, WEIGHTED)
        floor = tl.full(largest.shape, FLOOR_NORMALIZED if WEIGHTED else FLOOR, tl.float32)
        clipped, weight = stopping_element(a, w, largest, code, floor, WEIGHTED)
        best = _descend(a, w, largest, clipped, weight, floor, lowest, WEIGHTED)
        code = tl.where(largest > 0.0, best, 1)  # all scales are alike for zeros
    return code


@triton.jit
def lowest_code(base, WINDOW: tl.constexpr, WEIGHTED: tl.constexpr):
    """Return the code that a walk ends at, [ROWS]: without importances, windows do not matter."""
    lowest = tl.full(base.shape, 1, tl.int32)
    if WEIGHTED and WINDOW != EXACT:
        lowest = tl.maximum(base - WEIGHTED_DOWN, 1)
    return lowest


@triton.jit
def _loss_near(a, w, scale, WEIGHTED: tl.constexpr, CLIPS: tl.constexpr):
    """Twin of `ops.sweep._loss`."""
    inverse = invert_near(scale)
    # The compiler does not know that scales are positive.
    one = 1 + (scale.to(tl.uint32, bitcast=True) >> 31).to(tl.int32)
    total = scale
    for i in tl.static_range(16):
        error = error_near(a[i], scale, inverse, one, CLIPS)
        term = error * error
        if WEIGHTED:
            term = w[i] * term
        total = term if i == 0 else total + term
    return total


@triton.jit
def stopping_element(a, w, largest, base, floor, WEIGHTED: tl.constexpr):
    """Return magnitude and weight of an element that costs less to clip than the block, [ROWS].

    That is the largest. With importances it is one that stands for all which the scale five codes
    below base clips: docs/proof.md, "Walking down". Its magnitude is SHORT, by more than rounding.

    Args:
        a: as in `choose_near`.
        w: likewise, of any unit.
        largest: likewise.
        base: codes, [ROWS].
        floor: what costs less than that does not count, [ROWS].
        WEIGHTED: as in `choose_near`.
    """
    if not WEIGHTED:
        return largest * SHORT, largest
    limit = code_scale(tl.maximum(base - 5, 1)) * SIX
    linear = tl.zeros(limit.shape, tl.float32)
    square = linear
    for i in tl.static_range(16):
        excess = tl.maximum(a[i] - limit, 0.0)
        term = w[i] * excess
        linear += term
        square = tl.fma(term, excess, square)
    counts = square >= floor
    clipped = tl.where(counts, limit + square * invert_rough(linear), limit)
    weight = tl.where(counts, linear * (linear * invert_rough(square)), 0.0)
    return clipped * SHORT, weight


@triton.jit
def clipping_cost(clipped, weight, scale, floor, WEIGHTED: tl.constexpr):
    """Return what clipping one element costs, less floor; no smaller scale costs less in all."""
    beyond = tl.maximum(tl.fma(scale, -SIX, clipped), 0.0)
    return tl.fma(weight * beyond if WEIGHTED else beyond, beyond, -floor)


@triton.jit
def first_code(largest):
    """Return the code that a walk starts at, [ROWS] int32, 15 or more.

    Scales s with max <= 3.5 s are not needed, but odd ones up to ODD, where s / 2 is none. The
    constant is a little more than 1 / 3.5: one scale too many does no harm.
    """
    first = (largest * (1.000001 / (3.5 * MAGNITUDE))).to(tl.int32, bitcast=True)
    return tl.maximum((first >> 20) - 960, ODD)


@triton.jit
def _descend(a, w, largest, clipped, weight, floor, lowest, WEIGHTED: tl.constexpr):
    """Return the smallest code of least loss from lowest on, of blocks that are not zero.

    Args:
        a: as in `choose_near`.
        w: likewise.
        largest: likewise.
        clipped: of `stopping_element`.
        weight: likewise.
        floor: likewise.
        lowest: the code to end at, [ROWS].
        WEIGHTED: as in `choose_near`.
    """
    code = first_code(largest)
    best = code
    best_loss = tl.full(code.shape, float("inf"), tl.float32)
    for _ in tl.static_range(6):  # none is below max / 6 rounded, so nothing clips, or below 8
        loss = _loss_near(a, w, code_scale_normal(code), WEIGHTED, False)
        better = loss <= best_loss  # the smaller scale takes a tie
        best_loss = tl.where(better, loss, best_loss)
        best = tl.where(better, code, best)
        code = code - 1
    scale = code_scale(code)
    alive = (largest > 0.0) & (code >= lowest)
    alive = alive & (clipping_cost(clipped, weight, scale, floor, WEIGHTED) <= best_loss)
    while tl.max(alive.to(tl.int32), axis=0) > 0:
        loss = _loss_near(a, w, scale, WEIGHTED, True)
        better = alive & (loss <= best_loss)
        best_loss = tl.where(better, loss, best_loss)
        best = tl.where(better, code, best)
        code = code - 1
        scale = code_scale(code)
        alive = alive & (code >= lowest)
        alive = alive & (clipping_cost(clipped, weight, scale, floor, WEIGHTED) <= best_loss)
    return best
