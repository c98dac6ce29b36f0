"""Reciprocals of tensor scales: which bits of a weight they keep."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scalesweep_hf.export.compressed_tensors import NEIGHBOURS, find_divisor
from scalesweep_hf.ops import e4m3

CODES = torch.tensor([0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]).unsqueeze(-1)
SCALES = e4m3.decode(torch.arange(1, 127, dtype=torch.uint8))


def ours(scale: torch.Tensor) -> torch.Tensor:
    return (CODES * SCALES * scale).bfloat16()


def theirs(divisor: torch.Tensor) -> torch.Tensor:
    return (CODES * (SCALES / divisor)).bfloat16()


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int16).int()


@pytest.mark.parametrize(
    ("scale_range", "exact_at_once", "exact"), [(256.0, 102, 116), (448.0, 124, 126)]
)
def test_all_tensor_scales_of_one_binade(
    scale_range: float, exact_at_once: int, exact: int
) -> None:
    scales = (1 + torch.arange(128) / 128) / (scale_range * 6)
    at_once = found = 0
    for scale in scales:
        nearest = (1 / scale.double()).float()
        at_once += torch.equal(theirs(nearest), ours(scale))
        divisor, wrong = find_divisor(scale)
        off = (bits(theirs(divisor)) - bits(ours(scale))).abs()
        assert int((off > 0).sum()) == wrong <= 104
        assert int(off.max()) <= 1  # one unit in the last place of bfloat16
        assert (divisor.view(torch.int32) - nearest.view(torch.int32)).abs() <= NEIGHBOURS
        found += wrong == 0
    assert (at_once, found) == (exact_at_once, exact)


@given(st.integers(-20, 20))
def test_a_power_of_two_has_its_exact_reciprocal(exponent: int) -> None:
    divisor, wrong = find_divisor(torch.tensor(2.0**exponent))
    assert divisor.shape == (1,)
    assert (divisor.item(), wrong) == (2.0**-exponent, 0)


@given(st.floats(1e-6, 1e-2), st.integers(-12, 12))
def test_powers_of_two_move_the_divisor_and_nothing_else(value: float, exponent: int) -> None:
    scale = torch.tensor(value)
    divisor, wrong = find_divisor(scale)
    moved, again = find_divisor(scale * 2.0**exponent)
    assert torch.equal(moved * 2.0**exponent, divisor)
    assert wrong == again


@pytest.mark.parametrize("scale", [0.0, 1e-40, 1e39, float("nan"), 3e38])
def test_a_scale_without_reciprocal_is_refused(scale: float) -> None:
    with pytest.raises(ValueError, match=r"has no reciprocal in float32.*export to modelopt"):
        find_divisor(torch.tensor(scale))
