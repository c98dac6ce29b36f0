"""The sweep over real numbers, in exact rational arithmetic, with nothing taken from the package.

The unit of every scale and magnitude is 2**-9, the least E4M3 scale, which makes all 126 scales
integers. For a block x of n magnitudes the loss of a scale s is the sum of squared distances from
x_i to the nearest point of s * GRID. The *winner* is the smallest scale of least loss.

A certificate says that code c wins no block whose largest magnitude M lies in [low, high]. Its
weights (a convex combination over other codes j, sum 1) make
``f(x) = error(x, c)**2 - sum_j weight_j * error(x, j)**2``,
in which x**2 cancels: f is continuous and linear between midpoints of the grids. The excess of c's
loss over the weighted mean of the others is f(M) + the sum of f(x_i) over n - 1 elements in [0, M],
so at least ``g(M) = f(M) + (n - 1) * min of f over [0, M]``. The running minimum of f is attained
at a breakpoint or at M, and where f falls below it, g's slope drops: g has its minimum over
[low, high] at a breakpoint of f or at an end. If g > 0 there, some code j has less loss than c. If
g >= 0 and all codes j are smaller than c, one of them has no more loss, and wins the tie.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cache

CODES = range(1, 127)
GRID = tuple(Fraction(g, 2) for g in (0, 1, 2, 3, 4, 6, 8, 12))
MIDPOINTS = tuple((a + b) / 2 for a, b in itertools.pairwise(GRID))


@dataclass(frozen=True)
class Certificate:
    """Proof that a code wins no block of a size whose largest magnitude lies in [low, high].

    Attributes:
        size: elements of a block.
        code: the code that never wins.
        low: least largest magnitude.
        high: greatest; None is infinity.
        weights: positive integers by code, in proportion to the convex combination.
    """

    size: int
    code: int
    low: Fraction
    high: Fraction | None
    weights: Mapping[int, int]


@cache
def value(code: int) -> int:
    """Return the scale of an E4M3 code, in units of 2**-9."""
    exponent, field = divmod(code, 8)
    return field if exponent == 0 else (8 + field) << (exponent - 1)


def squared_error(x: Fraction, code: int) -> Fraction:
    """Return the squared distance from x >= 0 to the nearest point of the code's grid."""
    scale = value(code)
    index = sum(x > scale * midpoint for midpoint in MIDPOINTS)
    error = x - scale * GRID[index]
    return error * error


def loss(block: list[Fraction], code: int, weights: list[Fraction] | None = None) -> Fraction:
    """Return the weighted squared error of a block of magnitudes."""
    errors = [squared_error(x, code) for x in block]
    if weights is not None:
        errors = [w * error for w, error in zip(weights, errors, strict=True)]
    return sum(errors, Fraction(0))


def winner(block: list[Fraction]) -> int:
    """Return the smallest code of least loss among all 126."""
    return min(CODES, key=lambda code: (loss(block, code), code))


def base(largest: Fraction, *, floored: bool = False) -> int:
    """Return q0: the code nearest to (ties to even), or the last at most, largest / 6."""
    if floored:
        return max([code for code in CODES if 6 * value(code) <= largest], default=1)
    return min(CODES, key=lambda code: (abs(6 * value(code) - largest), code % 2))


def cell(code: int, *, floored: bool = False) -> tuple[Fraction, Fraction | None]:
    """Return the closure of the largest magnitudes that have q0 = code; None is infinity."""
    low = Fraction(0)
    if code > 1:
        low = Fraction(6 * value(code) if floored else 3 * (value(code - 1) + value(code)))
    if code == 126:
        return low, None
    return low, Fraction(6 * value(code + 1) if floored else 3 * (value(code) + value(code + 1)))


def breakpoints(codes: list[int]) -> set[Fraction]:
    """Return where the nearest grid point of one of the codes changes."""
    return {value(code) * midpoint for code in codes for midpoint in MIDPOINTS}


def excess(certificate: Certificate, x: Fraction) -> Fraction:
    """Return f(x) times the sum of the weights."""
    weights = certificate.weights
    others = sum(weight * squared_error(x, code) for code, weight in weights.items())
    return sum(weights.values()) * squared_error(x, certificate.code) - others


def holds(certificate: Certificate) -> bool:
    """Check a certificate, exactly; see the module's docstring."""
    c, low, high = certificate.code, certificate.low, certificate.high
    weights = certificate.weights
    if c in weights or not weights or min(weights.values()) <= 0:
        return False
    if not {c, *weights} <= set(CODES) or low < 0 or (high is not None and low > high):
        return False
    points = breakpoints([c, *weights]) | {Fraction(0), low}
    if high is None:
        # Beyond the last breakpoint all clip; f has slope 12 (mean of the others' scales - s).
        mean = sum(weight * (value(code) - value(c)) for code, weight in weights.items())
        if mean < 0:
            return False
    else:
        points = {x for x in points if x <= high} | {high}
    least = Fraction(0)  # f(0) = 0
    tie_is_enough = max(weights) < c
    for x in sorted(points):
        f = excess(certificate, x)
        least = min(least, f)
        g = f + (certificate.size - 1) * least
        if x >= low and not (g > 0 or (tie_is_enough and g == 0)):
            return False
    return True


def half_cells() -> list[tuple[Fraction, Fraction | None]]:
    """Cut all largest magnitudes where the rounded or the floored base scale changes."""
    cuts = {Fraction(6 * value(code)) for code in CODES}
    cuts |= {Fraction(3 * (value(code) + value(code + 1))) for code in CODES if code < 126}
    low = [Fraction(0), *sorted(cuts)]
    return list(zip(low, [*low[1:], None], strict=True))


def halving_excludes(code: int, high: Fraction | None) -> bool:
    """Tell whether half the scale is as good wherever the largest magnitude is at most high.

    The grid of s / 2 holds every point of the grid of s up to 3 s, and up to 3.5 s one of these is
    nearest: no element, whatever its weight, errs less with s. (s / 2 has a code if s is even.)
    """
    return value(code) % 2 == 0 and high is not None and 2 * high <= 7 * value(code)


def doubling_excludes(code: int, low: Fraction, size: int) -> bool:
    """Tell whether twice the scale is better wherever the largest magnitude is at least low.

    With M = t s, doubling gains ``(t - 6)**2 - (t - 8)**2 = 4 t - 28`` on the largest element for t
    in [7, 10], and more beyond. On another element it loses s**2 / 4 at most, at 0.5 s and 1.5 s.
    So t > 7 + (size - 1) / 16 is enough, if 2 s <= 448; for 16 elements s < (96 / 127) M / 6.
    """
    limit = 7 + Fraction(size - 1, 16)
    return size <= 49 and 2 * value(code) <= value(126) and low > limit * value(code)


def code_of(scale: int) -> int:
    """Return the code of a scale.

    Raises:
        KeyError: there is none.
    """
    return {value(code): code for code in CODES}[scale]


def candidates(q0: int, proved: set[tuple[int, int]], size: int, *, floored: bool) -> list[int]:
    """Return the codes that may win a block with base q0.

    Args:
        q0: of the block.
        proved: code and number of the half cell, wherever certificates exclude it.
        size: of the block.
        floored: how q0 is rounded.
    """
    low, high = cell(q0, floored=floored)
    inside = [
        (i, a, b)
        for i, (a, b) in enumerate(half_cells())
        if a >= low and (high is None or (b is not None and b <= high))
    ]
    return [
        code
        for code in CODES
        if not all(
            halving_excludes(code, b) or doubling_excludes(code, a, size) or (code, i) in proved
            for i, a, b in inside
        )
    ]
