"""Which scales can be best: the tables behind ``window="bounded"``, and the theorem about them.

Theorem (arXiv 2606.07618, Lemmas 4.1 and 4.3, with two corrections of ours). Let x be 16 real
numbers with largest magnitude M, L(s) the sum of ``(x_i - s * q_i)**2`` with q_i the nearest E2M1
value to x_i / s, and q0 the E4M3 code nearest to M / 6 (`ROUNDED`) or the largest that is at most
M / 6 (`FLOORED`), clamped to 1...126. Then the smallest of the E4M3 scales of least L has a code in
``codes(q0)``: from q0 - down to q0 + up, and the odd codes up to `LAST_ODD`.

- Up: the grid of s / 2 holds all points of the grid of s that are nearest to anything up to 3.5 s,
  so s is not needed where M <= 3.5 s. This also holds with importances. But s / 2 is no E4M3 value
  for odd codes below 16 (the published subnormal row overlooks this: sixteen times 5.5 * 2**-9 has
  q0 = 1 and no error at code 11), hence the odd codes.
- Down: s below 16 M / 127 is worse than 2 s, as M is clipped by more than fifteen elements can
  gain. For scales in between, a weighted mean over larger scales has less loss than s, whatever the
  other elements are. Scales end at 448, so the last binade, q0 >= 120, has fewer rivals and needs a
  row of its own, which the published tables lack. (No block of a tensor that sets its own tensor
  scale passes code 120; activations beyond the calibrated ones can.)

tests/proofs checks both over all 126 codes in exact arithmetic, and that from code 16 on both ends
of the rounded window are attained. The theorem is about real numbers; what float32 losses change is
in docs/proof.md.
"""

from dataclasses import dataclass

LAST_ODD = 15
TOP = 120  # first code of the last binade
# An element that weighs nothing may be clipped at no cost, so weighted blocks have no universal
# lower bound; eight codes halve the scale, which is what the paper searches.
DOWN_WEIGHTED = 8


@dataclass(frozen=True)
class WindowTable:
    """Offsets from the base code q0 that hold every optimum of 16 unweighted squared errors.

    Rows are indexed by the mantissa field of q0; index 0 of a subnormal row is code 0, which q0
    never is.

    Attributes:
        up_normal: codes above q0, for q0 >= 8.
        up_subnormal: for q0 < 8.
        down_normal: codes below q0, for 8 <= q0 < 120.
        down_subnormal: for q0 < 8.
        down_top: for q0 >= 120; the M of 126 has no bound, and code 127 is no scale.
    """

    up_normal: tuple[int, ...]
    up_subnormal: tuple[int, ...]
    down_normal: tuple[int, ...]
    down_subnormal: tuple[int, ...]
    down_top: tuple[int, ...]

    def codes(self, q0: int) -> list[int]:
        """Return the candidates of a block, ascending, for q0 in 1...126."""
        field, normal = q0 % 8, q0 >= 8
        up = (self.up_normal if normal else self.up_subnormal)[field]
        low = self.down_normal if normal else self.down_subnormal
        down = (self.down_top if q0 >= TOP else low)[field]
        between = range(max(1, q0 - down), min(126, q0 + up) + 1)
        return [*between, *(odd for odd in range(1, LAST_ODD + 1, 2) if odd > between[-1])]


ROUNDED = WindowTable(
    up_normal=(6, 7, 6, 6, 6, 6, 6, 6),
    up_subnormal=(0, 1, 2, 2, 3, 4, 5, 5),
    down_normal=(3, 3, 2, 2, 2, 3, 3, 3),
    down_subnormal=(0, 0, 1, 2, 3, 3, 3, 3),
    down_top=(3, 3, 3, 3, 3, 3, 4, 0),
)
FLOORED = WindowTable(
    up_normal=(7, 7, 7, 7, 7, 6, 6, 6),
    up_subnormal=(0, 2, 3, 3, 4, 5, 5, 6),
    down_normal=(3, 2, 2, 2, 2, 2, 2, 3),
    down_subnormal=(0, 0, 0, 0, 0, 1, 1, 1),
    down_top=(3, 2, 2, 2, 2, 3, 3, 0),
)

# What the sweep uses.
UP_NORMAL = ROUNDED.up_normal
UP_SUBNORMAL = ROUNDED.up_subnormal
DOWN_NORMAL = ROUNDED.down_normal
DOWN_SUBNORMAL = ROUNDED.down_subnormal
DOWN_TOP = ROUNDED.down_top
UP_MAX = max(UP_NORMAL)
DOWN_MAX = max(DOWN_NORMAL)
