"""What the theorem says about computed losses: up to M = 2**20 a bounded sweep has all 126's bits.

Let u = 2**-24 and M = t s. All products q * s are exact; a quotient, a subtraction, a square and
every addition round once. Let y be the rounded quotient, from which the element's code q comes.

- Up. For M <= 3.5 s the quotients at s and s / 2 are y and 2 y exactly. Ties go to even codes, and
  the points that only the half grid has, 0.25 s and 0.75 s, have odd codes: where the choices
  differ, y is strictly nearer to one of these, and so is x / s, as the tie is a float32 number and
  rounding is monotone. Hence every computed error, term and sum is at most that at s, whatever the
  weights.
- Down. y is within u y of x / s, so a wrong neighbour adds at most 2 u x <= 10 u s to an error (no
  midpoint passes 5 s). The rest is a factor within (1 + u)**18 and (1 - u)**18:
  ``L (1 - 18.1 u) <= computed L <= (L + 16 * 20.1 u s**2) (1 + 18.1 u)``.
  So a mean of rivals' losses that is less than L by ``37 u L + 324 u r**2``, r the largest rival,
  is less as computed too; L <= 16 s**2 max(t - 6, 1)**2. Certificates have that margin up to M =
  2**20, doubling up to t = 2**18.
- Beyond t = 2**18 (and so s <= 4, M > 512) a scale r is taken with M / r in [5, 8], or 448 if M >
  2688: clipping alone costs more at s than everything at r.

Far beyond M = 2**20 every computed loss is M**2, and the first candidate wins.
"""

from fractions import Fraction

import pytest
import torch

from scalesweep_hf.ops import e2m1, e4m3
from scalesweep_hf.ops.sweep import block_loss, sweep_scales
from scalesweep_hf.ops.window import ROUNDED
from tests.proofs.exact import (
    CODES,
    MIDPOINTS,
    breakpoints,
    doubling_excludes,
    excess,
    half_cells,
    squared_error,
    value,
)
from tests.proofs.files import read_certificates

U = Fraction(1, 2**24)
MOST = 2**20  # greatest magnitude, in units of the tensor scale
LONGEST = 2**18  # greatest t for which doubling is used


def rounding(t: Fraction, rival: Fraction) -> Fraction:
    """Bound what rounding does to a comparison of losses, in units of s**2; rival is r / s."""
    return 37 * U * 16 * max(t - 6, Fraction(1)) ** 2 + 324 * U * rival**2


@pytest.mark.parametrize("code", [code for code in CODES if value(code) % 2 == 0])
def test_no_computed_error_is_less_at_a_scale_that_can_be_halved(code: int) -> None:
    scale = float(e4m3.decode(torch.tensor([code], dtype=torch.uint8)))
    # Whatever is a tie of either grid, and three neighbours on both sides.
    x = torch.arange(1, 8 * 7 + 1) * (scale / 16)
    below = above = x
    near = [x]
    for _ in range(3):
        below = torch.nextafter(below, torch.zeros(()))
        above = torch.nextafter(above, torch.full((), torch.inf))
        near += [below, above]
    x = torch.cat([*near, 3.5 * scale * torch.rand(10_000)]).clamp(max=3.5 * scale)
    errors = [(x - e2m1.round_magnitude(x / s) * s).abs() for s in (scale / 2, scale)]
    assert (errors[0] <= errors[1]).all()
    assert (errors[0] < errors[1]).any()


def test_certificates_leave_more_than_rounding_can_take() -> None:
    for certificate in read_certificates(16):
        scale = value(certificate.code)
        if certificate.low < 6 * scale:  # odd codes below 16, all of which are tried
            continue
        total = sum(certificate.weights.values())
        rival = Fraction(max(value(code) for code in certificate.weights), scale)
        high = min(certificate.high or Fraction(512 * MOST), Fraction(512 * MOST))
        inside = breakpoints([certificate.code, *certificate.weights]) | {certificate.low, high}
        least = Fraction(0)
        for x in sorted(x for x in inside if x <= high):
            f = excess(certificate, x) / (total * scale**2)
            least = min(least, f)
            if x >= certificate.low:  # f + 15 least - rounding is concave between breakpoints
                assert f + 15 * least > rounding(x / scale, rival) + Fraction(11, 100)


def test_doubling_leaves_more_than_rounding_can_take() -> None:
    def margin(t: Fraction) -> Fraction:
        """What doubling gains less what it may lose, for t > 7; 32 stands for any even code."""
        x, scale = t * value(32), value(32)
        gain = squared_error(x, 32) - squared_error(x, 40)
        return gain / scale**2 - Fraction(15, 4) - rounding(t, Fraction(2))

    first = [
        min(low / value(code) for low, _ in half_cells() if doubling_excludes(code, low, 16))
        for code in CODES
        if 2 * value(code) <= value(126)
    ]
    points = [min(first), *(2 * m for m in MIDPOINTS if 2 * m > min(first)), Fraction(LONGEST)]
    assert all(margin(Fraction(t)) > 0 for t in points)
    assert not margin(Fraction(2 * LONGEST)) > 0


def test_far_smaller_scales_cost_more_by_clipping_alone() -> None:
    # In units of r = 448; s <= 4 there, and s / r is less where M <= 2688.
    assert MOST / LONGEST == 4
    small = 6 * Fraction(4, 448)

    def loses(x: Fraction) -> Fraction:
        return (
            squared_error(448 * 512 * x, 126) / (448 * 512) ** 2 - max(x - small, Fraction(0)) ** 2
        )

    most = max(loses(x) for x in [small, *MIDPOINTS, Fraction(6)])
    for t in (Fraction(5), Fraction(6), Fraction(8), Fraction(MOST, 448)):
        assert -loses(t) - 15 * most > 37 * U * 16 * t**2 + 324 * U


def test_far_beyond_the_limit_computed_losses_are_all_alike() -> None:
    x = torch.tensor([[2.0**40] + [1.0] * 15])
    losses = {
        float(block_loss(x, e4m3.decode(torch.tensor([c], dtype=torch.uint8)))) for c in CODES
    }
    assert losses == {2.0**80}
    assert sweep_scales(x).codes.tolist() == [ROUNDED.codes(126)[0]]
    assert sweep_scales(x, window="exact").codes.tolist() == [1]
