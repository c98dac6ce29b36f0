"""The stop rule of the exact sweep: clipping alone costs C(s), which only grows as s falls.

Proof, for real numbers: an element with x > 6 s is nearest to 6 s, so its error is x - 6 s; for any
s' <= s it is at least as far above 6 s' and errs by x - 6 s' >= x - 6 s. Other elements err by at
least 0, which is their term of C(s). Weights are >= 0, so L(s') >= C(s') >= C(s) for every s' <= s,
and once C(s) > the best loss so far no smaller scale can win or tie.

For the computed numbers: 6 s is exact in float32 (s has four significant bits) and so is the
product of a code and s, so a clipped element's computed error is fl(x - 6 s') in both expressions.
Rounding is monotone: fl(x - 6 s') >= fl(x - 6 s), squares and products with the same weight
likewise, and a sum of non-negative terms in a fixed order does not fall when a term grows. An
element that is not clipped has term 0 in C and a computed term >= 0 in L. Hence the computed L(s')
is at least the computed C(s), without any tolerance.
"""

import pytest
import torch
from torch import Tensor

from scalesweep_hf.ops import e4m3
from scalesweep_hf.ops.sweep import (
    block_loss,
    normalize_importance,
    sum_left_to_right,
    sweep_scales,
    sweep_window,
)
from tests.ops.test_sweep import KINDS, RANGES, blocks, importances
from tests.proofs.exact import CODES, GRID, value


def clipping(x: Tensor, code: int, weight: Tensor) -> Tensor:
    """C(s) as the walk computes it. x, weight [B, 16] float32; returns [B]."""
    limit = 6 * e4m3.decode(torch.tensor([code], dtype=torch.uint8))
    beyond = (x.abs() - limit).clamp(min=0.0)
    return sum_left_to_right((weight * (beyond * beyond)).T.contiguous())


def many_blocks(n: int) -> tuple[Tensor, Tensor]:
    """Blocks of every kind and range with importances from even to extreme; [B, 16] each."""
    x = torch.cat([blocks(kind, *codes, n=n) for kind in KINDS for codes in RANGES])
    weight = importances(len(x))[torch.randperm(len(x), generator=torch.Generator().manual_seed(1))]
    return x, weight


@pytest.mark.parametrize("code", CODES)
def test_an_element_above_six_scales_errs_by_the_rest_and_no_smaller_scale_errs_less(
    code: int,
) -> None:
    top = value(code) * GRID[-1]
    for x in (top, top + 1, top * 3):
        for smaller in range(1, code + 1):
            nearest = min(abs(x - value(smaller) * g) for g in GRID)
            assert nearest == x - 6 * value(smaller) >= x - top


def test_the_computed_cost_of_clipping_only_grows_as_the_scale_falls() -> None:
    x, weight = many_blocks(40)
    larger = torch.zeros(len(x))
    for code in reversed(CODES):
        cost = clipping(x, code, weight)
        assert (cost >= larger).all()
        larger = cost
    assert (larger > 0).any()


def test_no_smaller_scale_has_a_computed_loss_below_the_cost_of_clipping() -> None:
    x, weight = many_blocks(40)
    least = torch.full((len(x),), torch.inf)  # over the codes up to this one
    for code in CODES:
        scale = e4m3.decode(torch.full((len(x), 1), code, dtype=torch.uint8)).squeeze(1)
        least = torch.minimum(least, block_loss(x, scale, weight))
        cost = clipping(x, code, weight)
        assert (least >= cost).all()


@pytest.mark.parametrize("weighted", [False, True])
def test_the_walk_has_the_bits_of_a_sweep_over_all_codes(weighted: bool) -> None:
    x, weight = many_blocks(200)
    importance = weight.unsqueeze(1) if weighted else None
    walked = sweep_scales(x.unsqueeze(1), importance, window="exact")

    def loss(scale: Tensor) -> Tensor:
        return block_loss(x, scale, normalize_importance(weight) if weighted else None)

    first = torch.ones(len(x), dtype=torch.int16)
    every = sweep_window(loss, first, first + 125, 125)
    assert torch.equal(walked.codes.squeeze(1), every.codes)
    assert torch.equal(walked.loss.squeeze(1), every.loss)


def test_the_walk_goes_on_while_clipping_costs_nothing() -> None:
    # q0 = 56. Code 48 has no loss either, and code 40 wins the tie: what it clips weighs nothing.
    x = torch.tensor([[6.0, 1.0] + [0.0] * 14])
    weight = torch.tensor([[0.0, 1.0] + [0.0] * 14])
    assert sweep_scales(x, weight, window="exact").codes.tolist() == [40]
    assert clipping(x, 40, weight).tolist() == [0.0]
    assert clipping(x, 40, torch.ones(1, 16)).tolist() == [4.5**2]
