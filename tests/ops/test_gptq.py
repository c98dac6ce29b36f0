"""GPTQ against a definition in ten lines of float64, and its laws."""

from typing import Any

import pytest
import torch
from torch import Tensor

from scalesweep_hf.ops import e2m1, gptq
from scalesweep_hf.ops.gptq import factorize, quantize_gptq
from scalesweep_hf.ops.nvfp4 import NVFP4Tensor, dequantize, quantize
from scalesweep_hf.ops.objectives import OBJECTIVES


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(k: int, rows: int = 1024, spread: float = 1.0) -> Tensor:
    """Return [T, K] with channels that are coupled, their sizes 10**-spread...10**spread."""
    mix = torch.eye(k) + 2.0 * normal(k, k, seed=2) / k**0.5
    x: Tensor = (
        normal(rows, k, seed=1) @ mix * torch.logspace(-spread, spread, k)[torch.randperm(k)]
    )
    return x


def start_of(weight: Tensor, objective: str, hessian: Tensor) -> NVFP4Tensor:
    kind, importance = OBJECTIVES[objective], None
    if kind.weighted:
        importance = hessian.diagonal()
    if kind.coupled:
        k = range(0, len(hessian), 16)
        importance = torch.stack([hessian[i : i + 16, i : i + 16] for i in k])
    return quantize(weight, objective=objective, importance=importance)


def output_error(x: Tensor, weight: Tensor, quantized: NVFP4Tensor) -> float:
    return float((x @ (weight - dequantize(quantized)).T).square().sum())


def sequential_gptq(weight: Tensor, start: NVFP4Tensor, hessian: Tensor, damping: float) -> Tensor:
    """The published algorithm: errors over the rows of the Cholesky factor of the inverse."""
    h = hessian.double()
    order = h.diagonal().argsort(descending=True, stable=True)
    h = h + damping * h.diagonal().mean() * torch.eye(len(h)).double()
    inverse = torch.linalg.inv(h[order][:, order])
    factor = torch.linalg.cholesky(inverse, upper=True)
    w = weight.double()[:, order] / start.tensor_scale.double()
    scale = start.block_scale.double().repeat_interleave(16, dim=1)[:, order]
    values = torch.zeros_like(w)
    for k in range(len(h)):
        values[:, k] = e2m1.round_to_e2m1((w[:, k] / scale[:, k]).float())
        error = (w[:, k] - values[:, k] * scale[:, k]) / factor[k, k]
        w[:, k:] -= error[:, None] * factor[k, k:]
    return values[:, order.argsort()] * scale[:, order.argsort()] * start.tensor_scale.double()


@pytest.mark.parametrize("k", [16, 112, 304])
def test_it_is_the_published_algorithm(k: int) -> None:
    weight, x = normal(24, k), inputs(k)
    hessian = x.double().T @ x.double()
    start = start_of(weight, "mse", hessian.float())
    expected = sequential_gptq(weight, start, hessian, 0.01)
    factor = factorize(hessian, dtype=torch.float64)
    actual = dequantize(quantize_gptq(weight, start, factor), torch.float64)
    # A code may differ where a column lies on a tie within rounding; none does here.
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_more_weight_error_less_output_error_than_rounding(
    objective: str, dtype: torch.dtype
) -> None:
    weight, x = normal(96, 256), inputs(256)
    hessian = x.T @ x
    start = start_of(weight, objective, hessian)
    rounded = quantize_gptq(weight, start, factorize(hessian, dtype=dtype))
    assert torch.equal(rounded.block_scale.view(torch.uint8), start.block_scale.view(torch.uint8))
    assert torch.equal(rounded.tensor_scale, start.tensor_scale)
    assert (weight - dequantize(rounded)).norm() > (weight - dequantize(start)).norm()
    assert output_error(x, weight, rounded) < 0.7 * output_error(x, weight, start)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_an_uncoupled_hessian_gives_the_bits_of_rounding(
    objective: str, weight_dtype: torch.dtype
) -> None:
    weight = normal(33, 304).to(weight_dtype)
    diagonal = normal(304, seed=5).square() + 0.01
    for hessian in (torch.eye(304), torch.diag(diagonal)):
        start = start_of(weight, objective, hessian)
        assert torch.equal(quantize_gptq(weight, start, factorize(hessian)).packed, start.packed)


def test_channels_that_were_always_zero_are_rounded() -> None:
    weight, x = normal(24, 96), inputs(96)
    x[:, 16:48] = 0.0
    start = start_of(weight, "mse", x.T @ x)
    rounded = quantize_gptq(weight, start, factorize(x.T @ x))
    assert torch.equal(rounded.packed[:, 8:24], start.packed[:, 8:24])
    assert not torch.equal(rounded.packed[:, 24:], start.packed[:, 24:])
    assert output_error(x, weight, rounded) < output_error(x, weight, start)


def test_columns_and_rows_at_a_time_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = normal(37, 160), inputs(160).double()
    factor = factorize(x.T @ x, dtype=torch.float64)
    start = start_of(weight, "wmse", (x.T @ x).float())
    whole = quantize_gptq(weight, start, factor)
    monkeypatch.setattr(gptq, "COLUMNS", 24)
    monkeypatch.setattr(gptq, "ELEMENTS", 160 * 5)
    assert torch.equal(quantize_gptq(weight, start, factor).packed, whole.packed)


def test_the_arguments_are_not_changed() -> None:
    weight, x = normal(8, 64), inputs(64)
    hessian = x.T @ x
    before = hessian.clone(), weight.clone()
    start = start_of(weight, "mse", hessian)
    codes = start.packed.clone()
    factor = factorize(hessian)
    lower = factor.lower.clone()
    quantize_gptq(weight, start, factor)
    assert torch.equal(hessian, before[0])
    assert torch.equal(weight, before[1])
    assert torch.equal(start.packed, codes)
    assert torch.equal(factor.lower, lower)


def test_the_factor_is_that_of_the_damped_hessian() -> None:
    x = inputs(48)
    hessian = x.double().T @ x.double()
    factor = factorize(hessian, damping=0.05, dtype=torch.float64)
    damped = hessian + 0.05 * hessian.diagonal().mean() * torch.eye(48).double()
    damped = damped[factor.order][:, factor.order]
    diagonal = torch.linalg.solve_triangular(factor.lower, damped, upper=False)
    diagonal = torch.linalg.solve_triangular(factor.lower, diagonal.T, upper=False)
    torch.testing.assert_close(diagonal, torch.diag(diagonal.diagonal()), rtol=0, atol=1e-6)
    assert hessian.diagonal()[factor.order].diff().ge(0).all()
    assert factor.damping == 0.05


def test_damping_is_raised_until_it_is_enough() -> None:
    hessian = torch.eye(32)
    hessian[0, 1] = hessian[1, 0] = 1.05  # an eigenvalue of -.05
    assert factorize(hessian, damping=0.01).damping == pytest.approx(0.1)
    assert factorize(hessian, damping=0.06).damping == 0.06


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("damping", [0.01, 0.3, 1.0])
def test_an_indefinite_hessian_ends_in_an_error(dtype: torch.dtype, damping: float) -> None:
    hessian = torch.eye(32)
    hessian[0, 1] = hessian[1, 0] = 3.0
    with pytest.raises(ValueError, match="not positive definite after damping 1: add calibration"):
        factorize(hessian, damping=damping, dtype=dtype)


@pytest.mark.parametrize(
    ("hessian", "options", "message"),
    [
        (
            torch.zeros(16, 16),
            {},
            "Hessian is zero: the layer.s inputs were all zero in calibration; add it to",
        ),
        (torch.full((16, 16), torch.inf), {}, "Hessian is not finite"),
        (torch.full((16, 16), torch.nan), {}, "Hessian is not finite"),
        (torch.zeros(16, 8), {}, r"hessian has shape \[16, 8\]; expected \[K, K\]"),
        (torch.eye(16), {"damping": 0.0}, "damping is 0.0; it must be > 0 and <= 1"),
        (torch.eye(16), {"damping": 2.0}, "damping is 2.0"),
    ],
)
def test_wrong_hessians_raise(hessian: Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        factorize(hessian, **options)


def test_a_hessian_of_another_width_raises() -> None:
    weight = normal(4, 32)
    with pytest.raises(ValueError, match="the Hessian of 16 channels do not fit"):
        quantize_gptq(weight, quantize(weight), factorize(torch.eye(16)))
