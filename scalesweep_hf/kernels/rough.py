"""Which scale a block gets, where roundings do not decide on it: `kernels.descent` with less care.

Losses here are fused sums, and a quotient next to a midpoint of E2M1 may be rounded to the other
side. That moves a loss by less than 2**-17 of itself. So a scale whose loss is less than any other
by more than TOLERANCE is the definition's too. Where some block of a program has two losses closer
than that, the program walks again, with care. docs/proof.md, "A rough walk first", has the bounds.
"""

import triton
import triton.language as tl

from scalesweep_hf.kernels.descent import (
    FLOOR,
    clipping_cost,
    first_code,
    lowest_code,
    stopping_element,
)
from scalesweep_hf.kernels.numbers import (
    MAGNITUDE,
    code_scale,
    code_scale_normal,
    encode_nearest,
    error_rough,
    invert_rough,
    scale_below,
    sixth_near,
)

TOLERANCE = tl.constexpr(1 + 2.0**-15)
# A loss and the step that found it are one integer, the step being its lowest five bits: the least
# two cost three instructions a step.
STEPS = tl.constexpr(32)
NONE = tl.constexpr(0x7FFFFFFF)
# Steps that nearly all warps take. Walks start at code 15 or above, and five codes above AbsMax, so
# these steps end at scales that exist, and above the lowest of a window.
SURE = tl.constexpr(9)
SURE_WEIGHTED = tl.constexpr(10)
# From this step on x / s may pass 7: eight codes down halve a scale, and the first but one above is
# more than largest / 3.5.
CLIPPING = tl.constexpr(8)


@triton.jit
def choose_roughly(a, w, largest, WINDOW: tl.constexpr, WEIGHTED: tl.constexpr):
    """Return the codes of all blocks' scales, [ROWS] int32, and whether they are right.

    Args:
        a: magnitudes, tuple of 16 [ROWS], in units of MAGNITUDE.
        w: likewise the importances, in any unit.
        largest: [ROWS], of a.
        WINDOW: of `sweeps.WINDOWS`, but FIXED.
        WEIGHTED: whether w counts.
    """
    base = encode_nearest(sixth_near(largest) * (1.0 / MAGNITUDE))
    lowest = code_scale(lowest_code(base, WINDOW, WEIGHTED))
    floor = tl.full(largest.shape, FLOOR, tl.float32)
    counts = largest > 0.0  # all scales are alike for zeros
    usual = counts
    if WEIGHTED:
        heaviest = w[0]
        for i in tl.static_range(1, 16):
            heaviest = tl.maximum(heaviest, w[i])
        usual = counts & (heaviest >= 2.0**-60) & (heaviest <= 2.0**60)
        floor = floor * heaviest
    clipped, weight = stopping_element(a, w, largest, base, floor, WEIGHTED)
    best, second, alive = _descend_roughly(
        a, w, first_code(largest), clipped, weight, floor, lowest, usual, WEIGHTED
    )
    loss = best.to(tl.float32, bitcast=True)
    clear = second.to(tl.float32, bitcast=True) > tl.maximum(loss * TOLERANCE, floor)
    doubtful = counts & ((clear & usual & (alive == 0)) == 0)
    code = tl.where(counts, first_code(largest) - (best & (STEPS - 1)), 1)
    return code, tl.max(doubtful.to(tl.int32), axis=0) == 0


@triton.jit
def _descend_roughly(a, w, code, clipped, weight, floor, lowest, alive, WEIGHTED: tl.constexpr):
    """Return the least two losses with their steps, [ROWS] int32, and which walks have not ended.

    Args:
        a: as in `choose_roughly`.
        w: likewise.
        code: where to start, [ROWS].
        clipped: of `stopping_element`.
        weight: likewise.
        floor: likewise.
        lowest: the scale to end at, [ROWS].
        alive: blocks to walk for, [ROWS] int1.
        WEIGHTED: as in `choose_roughly`.
    """
    scale = code_scale_normal(code)
    best = tl.full(code.shape, NONE, tl.int32)
    second = best
    sure: tl.constexpr = SURE_WEIGHTED if WEIGHTED else SURE
    for step in tl.static_range(sure):
        found = (_loss_roughly(a, w, scale, WEIGHTED, step >= CLIPPING) & -STEPS) | step
        second = tl.minimum(second, tl.maximum(best, found))
        best = tl.minimum(best, found)
        scale = scale_below(scale)
    step = sure + 0
    loss = best.to(tl.float32, bitcast=True)
    alive = alive & (scale >= lowest)
    alive = alive & (clipping_cost(clipped, weight, scale, floor, WEIGHTED) <= loss)
    while (tl.max(alive.to(tl.int32), axis=0) > 0) & (step < STEPS):
        found = (_loss_roughly(a, w, scale, WEIGHTED, True) & -STEPS) | step
        found = tl.where(alive, found, NONE)
        second = tl.minimum(second, tl.maximum(best, found))
        best = tl.minimum(best, found)
        scale = scale_below(scale)
        step += 1
        loss = best.to(tl.float32, bitcast=True)
        alive = alive & (scale >= lowest)
        alive = alive & (clipping_cost(clipped, weight, scale, floor, WEIGHTED) <= loss)
    return best, second, alive


@triton.jit
def _loss_roughly(a, w, scale, WEIGHTED: tl.constexpr, CLIPS: tl.constexpr):
    """Return the bits of a loss, [ROWS] int32."""
    inverse = invert_rough(scale)
    # The compiler does not know that scales are positive.
    one = 1 + (scale.to(tl.uint32, bitcast=True) >> 31).to(tl.int32)
    total = scale
    for i in tl.static_range(16):
        error = error_rough(a[i], scale, inverse, one, CLIPS)
        term = w[i] * error if WEIGHTED else error
        total = term * error if i == 0 else tl.fma(term, error, total)
    return total.to(tl.int32, bitcast=True)
