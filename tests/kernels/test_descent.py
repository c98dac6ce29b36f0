"""The walk down over scales that ordinary blocks take has the bits of the definition."""

from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from scalesweep_hf.ops import blocks as definition
from scalesweep_hf.ops import e2m1, e4m3
from scalesweep_hf.ops.blocks import BACKENDS
from scalesweep_hf.ops.sweep import block_loss
from tests.kernels.test_blocks import DTYPES, ONE, same
from tests.ops.test_sweep import KINDS, RANGES, blocks
from tests.proofs.exact import CODES, value

pytest.importorskip("triton", reason="triton is not installed")

from scalesweep_hf.kernels import blocks as kernels

# Interpreted kernels are numpy, which warns of NaN and overflow.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

MOST, LEAST = 1632.0, 2.0**-53  # of `kernels.descent`


def ordinary_blocks(rows: int, dtype: torch.dtype) -> Tensor:
    """Return ordinary blocks [B, 16]: normal, midpoints of E2M1 and their neighbours, zeros."""
    generator = torch.Generator().manual_seed(5)
    size = 2.0 ** torch.randint(-16, 9, (rows, 1), generator=generator).float()
    normal = torch.randn(rows, 16, generator=generator) * size
    codes = torch.randint(1, 110, (rows, 1), generator=generator)
    midpoints = torch.tensor(e2m1.MIDPOINTS)[torch.randint(0, 7, (rows, 16), generator=generator)]
    ties = midpoints * e4m3.decode(codes.to(torch.uint8))
    near = [torch.nextafter(ties, torch.tensor(end)) for end in (0.0, float("inf"))]
    x = torch.cat([normal, ties, -near[0], near[1], normal.sign() * size])
    x[::7, 3:] = 0.0
    x[::11] = 0.0
    x[:, 5] *= 2.0**-12
    x = x.to(dtype)
    magnitude = x.float().abs()
    return x[((magnitude < 1400) & ((magnitude == 0) | (magnitude > 2 * LEAST))).all(1)]


@pytest.mark.parametrize("window", ["bounded", "exact"])
@pytest.mark.parametrize("objective", ["absmax", "four_over_six", "mse", "wmse"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ordinary_blocks_have_the_bits_of_the_definition(
    dtype: torch.dtype, objective: str, window: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if window == "exact" and objective not in ("mse", "wmse"):
        pytest.skip("only sweeps have windows")
    if window == "exact" and device == "cpu" and dtype != torch.float32:
        pytest.skip("interpreted, exact windows take float32 alone")
    if device == "cpu":  # what other blocks take is not there: nothing may ask for it
        monkeypatch.setattr(kernels, "choose", None)
    x = ordinary_blocks(100 if device == "cuda" else 30, dtype)
    if objective in ("absmax", "four_over_six"):
        largest = x.float().abs().amax(1)
        x = x[(largest > 0.11) | (largest == 0)]
    x = x.to(device)
    importance = None
    if objective == "wmse":
        generator = torch.Generator().manual_seed(6)
        importance = torch.rand(x.shape, generator=generator) ** 8
        importance[::3, :6] = 0.0
        importance[1::5] *= 1e-30
        importance = importance.to(device)
    options: dict[str, Any] = {"importance": importance, "window": window}
    scales = ONE, torch.tensor(0.9371), torch.tensor(1.125)
    for tensor_scale in scales if device == "cuda" else scales[:2]:
        arguments = x, tensor_scale.to(device)
        found, expected = (
            module.encode_blocks(*arguments, objective=objective, **options)
            for module in (BACKENDS["triton"], definition)
        )
        assert same(found[1], expected[1])
        assert same(found[0], expected[0])
        values = BACKENDS["triton"].round_blocks(*arguments, objective=objective, **options)
        assert same(values, definition.round_blocks(*arguments, objective=objective, **options))


@pytest.mark.parametrize("objective", ["mse", "wmse"])
def test_the_first_blocks_that_are_not_ordinary_have_them_too(objective: str, device: str) -> None:
    generator = torch.Generator().manual_seed(7)
    x = torch.rand(12, 16, generator=generator)
    most, least = torch.tensor(MOST), torch.tensor(LEAST)
    beyond = torch.nextafter(most, torch.tensor(torch.inf))
    below = torch.nextafter(least, torch.tensor(0.0))
    for row, edge in enumerate((most, beyond, least, below, most * 8, least * 2.0**-60)):
        x[2 * row, row] = x[2 * row + 1, 15] = edge
    x[5:8, :8] *= 2.0**-40
    x = x.to(device)
    importance = torch.rand(x.shape, generator=generator).to(device)
    options: dict[str, Any] = {"objective": objective, "window": "bounded"}
    options["importance"] = importance if objective == "wmse" else None
    for row in range(len(x)):  # a program takes one row
        for exponent in (0, -60, -61, 60, 61) if device == "cuda" else (0, -61, 61):
            block, scale = x[row : row + 1], torch.tensor(2.0**exponent, device=device)
            if options["importance"] is not None:
                options["importance"] = importance[row : row + 1]
            found = BACKENDS["triton"].round_blocks(block * scale, scale, **options)
            assert same(found, definition.round_blocks(block * scale, scale, **options))


def test_walks_start_five_to_seven_codes_above_absmax() -> None:
    """So the first six losses of `descent._descend` clip nothing, and no code passes 126."""
    for base in range(11, 121):  # below, walks start at 15
        low, middle, high = (value(code) for code in (base - 1, base, base + 1))
        for sixth in ((low + middle) / Fraction(2), (middle + high) / Fraction(2)):
            first = max(code for code in CODES if 7 * value(code) <= 12 * sixth)
            assert base + 5 <= first <= base + 7
            assert sixth * 6 < 7 * middle


def test_no_smaller_scale_costs_less_than_clipping_the_largest_element() -> None:
    """Computed as `descent._descend` does it, in either unit."""
    x = torch.cat([blocks(kind, *codes, n=20) for kind in KINDS for codes in RANGES])
    largest = x.abs().amax(1)
    least = torch.full((len(x),), torch.inf)  # over the codes up to this one
    for code in range(1, 127):
        scale = e4m3.decode(torch.full((len(x), 1), code, dtype=torch.uint8)).squeeze(1)
        least = torch.minimum(least, block_loss(x, scale))
        beyond = (largest - 6 * scale).clamp(min=0.0)
        assert (least >= beyond * beyond).all()
