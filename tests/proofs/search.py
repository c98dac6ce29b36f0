"""Find the certificates and the witnesses; needs scipy (``pip install -e .[proofs]``).

    python -m tests.proofs.search

Nothing here has to be trusted: what it writes is checked by `exact.holds` and `exact.loss`.
"""

import sys
from fractions import Fraction

import numpy as np
import numpy.typing as npt
from scipy.optimize import Bounds, LinearConstraint, linprog, milp

from tests.proofs.exact import (
    CODES,
    GRID,
    Certificate,
    base,
    breakpoints,
    candidates,
    cell,
    doubling_excludes,
    half_cells,
    halving_excludes,
    holds,
    loss,
    value,
)
from tests.proofs.files import SIZES, covered, write_certificates, write_witnesses

Array = npt.NDArray[np.float64]
DENOMINATOR = 4096
REACH = 12  # codes above the excluded one that a certificate may use
DEPTH = 5
WITNESS_GRID = 64
# Witnesses: of all codes, and of the lowest ones for other sizes.
BASES = (*range(1, 24), *range(119, 127))
ENDS = (*range(16, 24), *range(120, 127))


def main() -> None:
    """Write both files, and say what was found and what was not."""
    found = {size: all_certificates(size) for size in SIZES}
    write_certificates(found)
    for size in SIZES:
        sys.stderr.write(f"size {size}: {len(found[size])} certificates\n")
    witnesses: list[tuple[int, int, list[Fraction]]] = []
    for size in SIZES:
        proved = covered(found[size])
        for q0 in BASES if size == 16 else ENDS:
            codes = candidates(q0, proved, size, floored=False)
            for code in codes if size == 16 else codes[:1]:
                block = witness(q0, code, size)
                if block is None:
                    sys.stderr.write(f"no witness: size {size}, q0 {q0}, code {code}\n")
                else:
                    witnesses.append((q0, code, block))
    write_witnesses(witnesses)
    sys.stderr.write(f"{len(witnesses)} witnesses\n")


def all_certificates(size: int) -> list[Certificate]:
    """Try every code in every half cell where neither halving nor doubling excludes it."""
    found = []
    for code in CODES:
        for low, high in half_cells():
            if halving_excludes(code, high) or doubling_excludes(code, low, size):
                continue
            below = high is not None and 2 * high <= 7 * value(code)
            if below or low >= 6 * value(code):
                found += certify(size, code, low, high, DEPTH) or []
    return found


def certify(
    size: int, code: int, low: Fraction, high: Fraction | None, depth: int
) -> list[Certificate] | None:
    """Cover [low, high] with certificates, bisecting it at most depth times; None if it fails."""
    below = high is not None and high < 6 * value(code)
    first = max(1, code - REACH) if below else code + 1
    others = [j for j in range(first, min(code + REACH, 126) + 1) if j != code]
    if not others:
        return None
    if below:  # a tie goes to the smaller scale
        for other in CODES[: code - 1]:
            alone = Certificate(size, code, low, high, {other: 1})
            if holds(alone):
                return [alone]
    gain, weights = best_weights(size, code, low, high, others)
    certificate = Certificate(size, code, low, high, weights)
    if gain > 0 and holds(certificate):
        return [certificate]
    if depth == 0 or high is None:
        return None
    if any(best_weights(size, code, end, end, others)[0] <= 0 for end in (low, high)):
        return None
    middle = (low + high) / 2
    left = certify(size, code, low, middle, depth - 1)
    right = certify(size, code, middle, high, depth - 1) if left else None
    return left + right if left and right else None


def best_weights(
    size: int, code: int, low: Fraction, high: Fraction | None, others: list[int]
) -> tuple[float, dict[int, int]]:
    """Maximise the least of f(M) + (size - 1) min f[0, high] over weights that sum to 1."""
    points = breakpoints([code, *others]) | {Fraction(0), low}
    if high is not None:
        points = {x for x in points if x <= high} | {high}
    ordered = sorted(points)
    f = differences(code, others, ordered)  # [points, others]
    count = len(others)
    # Unknowns: the weights, the least f, the least g.
    f_bound = np.hstack((-f, np.ones((len(f), 1)), np.zeros((len(f), 1))))
    top = f[[x >= low for x in ordered]]
    g_bound = np.hstack((-top, np.full((len(top), 1), 1.0 - size), np.ones((len(top), 1))))
    constraints = np.vstack((f_bound, g_bound))
    slope = [12.0 * (value(code) - value(j)) / value(code) for j in others] + [0.0, 0.0]
    if high is None:
        constraints = np.vstack((constraints, slope))
    result = linprog(
        [0.0] * (count + 1) + [-1.0],
        A_ub=constraints,
        b_ub=np.zeros(len(constraints)),
        A_eq=[[1.0] * count + [0.0, 0.0]],
        b_eq=[1.0],
        bounds=[(0, None)] * count + [(None, None)] * 2,
        method="highs",
    )
    if result.x is None:  # beyond the last breakpoint no weights have a rising f
        return -1.0, {}
    weights = {j: round(w * DENOMINATOR) for j, w in zip(others, result.x, strict=False)}
    return -result.fun - 1e-9, {j: w for j, w in weights.items() if w > 0}


def differences(code: int, others: list[int], points: list[Fraction]) -> Array:
    """Return error(x, code)**2 - error(x, j)**2 in units of the scale squared, [points, others]."""
    x = np.array([float(point) for point in points]) / value(code)  # [points]
    scale = np.array([value(j) / value(code) for j in (code, *others)])  # [1 + others]
    grid = scale[:, None] * np.array([float(g) for g in GRID])  # [1 + others, 8]
    squared = np.abs(x[:, None, None] - grid).min(-1) ** 2  # [points, 1 + others]
    result: Array = squared[:, :1] - squared[:, 1:]
    return result


def witness(q0: int, code: int, size: int = 16) -> list[Fraction] | None:
    """Find a block with base q0 that code wins alone: integer programs over a few largest ones."""
    low, high = cell(q0)
    if high is None:
        high = low + 6 * value(q0)
    # The loss of code hurts least where it clips least, or just above 3.5 scales.
    starts = [max(low, Fraction(7 * value(code), 2)), low, (low + high) / 2, high]
    starts += [x for x in (value(code) * g for g in GRID) if low <= x <= high]
    step = Fraction(max(1, (high - low).numerator // (high - low).denominator), WITNESS_GRID)
    for start in starts:
        for shift in (1, 4, 0, -1, -4):
            largest = Fraction(int((start + shift * step) * 64), 64)
            if largest <= 0 or base(largest) != q0:
                continue
            block = solve(code, largest, size)
            if block is not None:
                return block
    return None


def solve(code: int, largest: Fraction, size: int) -> list[Fraction] | None:
    """Choose how often every midpoint of a rival's grid occurs, so that code wins by most."""
    rivals = [j for j in CODES if j != code and abs(j - code) <= 2 * REACH]
    points = breakpoints(rivals) | {value(code) * g for g in GRID}
    ordered = sorted(x for x in points if x <= largest)
    lead = -differences(code, rivals, [largest, *ordered])  # [1 + points, rivals]
    count = len(ordered)
    result = milp(
        [0.0] * count + [-1.0],
        constraints=[
            LinearConstraint(np.hstack((-lead[1:].T, np.ones((len(rivals), 1)))), ub=lead[0]),
            LinearConstraint(np.array([[1.0] * count + [0.0]]), size - 1, size - 1),
        ],
        integrality=[1] * count + [0],
        bounds=Bounds([0.0] * count + [-np.inf], [size - 1.0] * count + [np.inf]),
        options={"time_limit": 3.0, "mip_rel_gap": 0.5},
    )
    if result.x is None or -result.fun <= 1e-9:
        return None
    block = [largest]
    for x, times in zip(ordered, result.x, strict=False):
        block += [x] * round(times)
    own = loss(block, code)
    if all(loss(block, j) > own for j in CODES if j != code):
        return block
    return None


if __name__ == "__main__":
    main()
