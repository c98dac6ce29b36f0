"""Count the codes that a window fixed by the largest two magnitudes alone would have to hold.

    python -m tests.proofs.two_largest

For largest magnitudes over an octave and ratios of the second to the first, a code is out if
halving excludes it or some weighted mean of rivals is better for every block (a linear program with
those two magnitudes given, see `exact`). Needs scipy.
"""

import sys
from fractions import Fraction

import numpy as np
from scipy.optimize import linprog

from tests.proofs.exact import breakpoints, halving_excludes, value
from tests.proofs.search import differences

BASE = 40  # any normal code, far from both ends
RIVALS = range(BASE - 16, BASE + 24)
STEPS = 12
RATIOS = (1.0, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)


def may_win(code: int, largest: Fraction, second: Fraction, size: int = 16) -> bool:
    """Tell whether no mean of rivals is better for all blocks with these two magnitudes."""
    rivals = [j for j in RIVALS if j != code]
    points = sorted({x for x in breakpoints(rivals) if x < second} | {Fraction(0), second})
    f = differences(code, rivals, points)  # [points, rivals]
    given = differences(code, rivals, [largest, second]).sum(0)
    result = linprog(
        [*-given, 2.0 - size],
        A_ub=np.hstack((-f, np.ones((len(f), 1)))),
        b_ub=np.zeros(len(f)),
        A_eq=[[1.0] * len(rivals) + [0.0]],
        b_eq=[1.0],
        bounds=[(0, None)] * len(rivals) + [(None, None)],
        method="highs",
    )
    return bool(-result.fun <= 1e-7)


def main() -> None:
    """Print the mean count for every ratio."""
    for ratio in RATIOS:
        counts = []
        for step in range(STEPS):
            largest = Fraction(6 * value(BASE) * 2 ** ((step + 0.05) / STEPS)).limit_denominator(64)
            second = (largest * Fraction(ratio)).limit_denominator(64)
            left = [
                code for code in range(BASE - 6, BASE + 17) if not halving_excludes(code, largest)
            ]
            counts.append(sum(may_win(code, largest, second) for code in left))
        sys.stdout.write(f"second / largest = {ratio}: {np.mean(counts):.1f} codes\n")


if __name__ == "__main__":
    main()
