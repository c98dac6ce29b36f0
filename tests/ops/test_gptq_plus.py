from typing import Any

import pytest
import torch
from torch import Tensor

from scalesweep_hf.ops import e4m3, gptq_plus
from scalesweep_hf.ops.gptq import factorize, quantize_gptq
from scalesweep_hf.ops.gptq_plus import (
    SHIFT_DAMPING,
    STRENGTH,
    block_order,
    quantize_gptq_plus,
    shift_weight,
)
from scalesweep_hf.ops.nvfp4 import NVFP4Tensor, compute_tensor_scale, dequantize, quantize
from scalesweep_hf.ops.sweep import block_loss, sweep_scales
from tests.ops.test_gptq import inputs, normal, output_error, start_of


def scale_of(weight: Tensor) -> Tensor:
    return compute_tensor_scale(weight.abs().amax(), "mse")


def plus(weight: Tensor, hessian: Tensor, dtype: torch.dtype = torch.float32) -> NVFP4Tensor:
    factor = factorize(hessian, order=block_order(hessian), dtype=dtype)
    return quantize_gptq_plus(weight, scale_of(weight), factor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_less_output_error_than_gptq_on_the_best_scales(dtype: torch.dtype) -> None:
    weight, x = normal(96, 256), inputs(256, spread=0.3)
    hessian = x.T @ x
    rounded = {
        objective: quantize_gptq(weight, start_of(weight, objective, hessian), factorize(hessian))
        for objective in ("mse", "wmse", "hessian")
    }
    best = min(output_error(x, weight, result) for result in rounded.values())
    assert output_error(x, weight, plus(weight, hessian, dtype)) < best


def test_sweeping_on_the_way_lowers_the_output_error(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = normal(96, 256), inputs(256)
    hessian = x.T @ x
    swept = output_error(x, weight, plus(weight, hessian))
    # AbsMax scales alone, in the same order of columns.
    monkeypatch.setattr(gptq_plus, "LOW", 0)
    monkeypatch.setattr(gptq_plus, "HIGH", 0)
    assert swept < 0.9 * output_error(x, weight, plus(weight, hessian))


@pytest.mark.parametrize("strength", [0.0, 2.0, 5.0])
def test_the_costs_of_all_blocks_are_the_damped_output_error(
    strength: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = normal(512, 128).double()
    x = x + strength * normal(512, 8, seed=4).double() @ normal(8, 128, seed=5).double()
    hessian, weight = x.T @ x, normal(40, 128)
    factor = factorize(hessian, order=block_order(hessian), dtype=torch.float64)
    costs: list[Tensor] = []
    original = gptq_plus._sweep_block

    def counted(block: Tensor, target: Tensor, coupled: Tensor, pivots: Tensor) -> Any:
        values, code = original(block, target, coupled, pivots)
        rounded, corrected = values * e4m3.decode(code).double(), target.clone()
        for k in reversed(range(16)):
            costs.append((pivots[k] * (corrected[k] - rounded[k]).square()).sum())
            corrected[:k] += coupled[k, :k, None] * (block[k] - rounded[k])
        return values, code

    monkeypatch.setattr(gptq_plus, "_sweep_block", counted)
    result = quantize_gptq_plus(weight, scale_of(weight), factor)
    error = (weight - dequantize(result)).double() / scale_of(weight).double()
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(128).double()
    expected = torch.einsum("nk,kl,nl->", error, damped, error)
    torch.testing.assert_close(torch.stack(costs).sum(), expected, rtol=1e-5, atol=0)
    plain = quantize_gptq(weight, quantize(weight), factorize(hessian, dtype=torch.float64))
    other = (weight - dequantize(plain)).double() / scale_of(weight).double()
    assert expected < torch.einsum("nk,kl,nl->", other, damped, other)


def test_without_couplings_it_is_the_sweep_of_the_squared_error() -> None:
    weight = normal(64, 96)
    result = plus(weight, torch.eye(96))
    blocks = (weight / scale_of(weight)).unflatten(-1, (-1, 16))
    best = sweep_scales(blocks, window=(-2, 6))
    found = block_loss(blocks, result.block_scale.float())
    torch.testing.assert_close(found, best.loss, rtol=1e-5, atol=0)
    same = result.block_scale.view(torch.uint8) == best.codes
    assert same.float().mean() > 0.99  # but for ties within rounding
    plain = quantize(weight, objective="mse", window=(-2, 6))
    assert (result.packed == plain.packed).float().mean() > 0.98


def test_blocks_stay_together_in_ascending_order() -> None:
    hessian = torch.diag(normal(64).square())
    order = block_order(hessian)
    assert order.sort().values.tolist() == list(range(64))
    blocks = order.reshape(4, 16)
    assert (blocks // 16 == blocks[:, :1] // 16).all()
    diagonal = hessian.diagonal()[blocks]
    assert diagonal.diff(dim=1).ge(0).all()
    assert diagonal.sum(1).diff().ge(0).all()


def test_columns_and_rows_at_a_time_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = normal(37, 160), inputs(160)
    hessian = (x.T @ x).double()
    whole = plus(weight, hessian, torch.float64)
    monkeypatch.setattr(gptq_plus, "ELEMENTS", 160 * 5)
    assert torch.equal(plus(weight, hessian, torch.float64).packed, whole.packed)
    monkeypatch.setattr(gptq_plus, "COLUMNS", 48)
    again = plus(weight, hessian, torch.float64)
    assert torch.equal(again.packed, whole.packed)
    assert torch.equal(again.block_scale.view(torch.uint8), whole.block_scale.view(torch.uint8))


def test_channels_that_were_always_zero_do_no_harm() -> None:
    weight, x = normal(24, 96), inputs(96)
    x[:, 10:48] = 0.0
    result = plus(weight, x.T @ x)
    assert torch.isfinite(dequantize(result)).all()
    assert output_error(x, weight, result) < output_error(x, weight, quantize(weight))


def test_scales_stay_in_range_for_tiny_and_zero_weights() -> None:
    weight, x = normal(24, 96), inputs(96)
    weight[3] = 0.0
    weight[:, 16:32] *= 1e-9
    codes = plus(weight, x.T @ x).block_scale.view(torch.uint8)
    assert int(codes.min()) >= e4m3.MIN_CODE
    assert int(codes.max()) <= e4m3.MAX_CODE
    assert not dequantize(plus(weight, x.T @ x))[3].any()


def test_a_ridge_regression_moves_the_target() -> None:
    weight, x = normal(8, 48).double(), inputs(48).double()
    exact = x + 0.1 * normal(*x.shape, seed=9)
    hessian, cross = x.T @ x, exact.T @ x
    moved = shift_weight(weight, hessian, cross, dtype=torch.float64)
    damped = hessian + SHIFT_DAMPING * hessian.diagonal().mean() * torch.eye(48).double()
    expected = weight + STRENGTH * weight @ (exact - x).T @ x @ torch.linalg.inv(damped)
    torch.testing.assert_close(moved, expected.float())
    before = (exact @ weight.T - x @ weight.T).norm()
    assert (exact @ weight.T - x @ moved.double().T).norm() < before


def test_equal_inputs_move_nothing() -> None:
    weight, x = normal(8, 48), inputs(48)
    assert torch.equal(shift_weight(weight, x.T @ x, x.T @ x), weight)


def test_shapes_that_do_not_fit_raise() -> None:
    with pytest.raises(ValueError, match=r"weight \[4, 32\] and 16 channels do not fit"):
        quantize_gptq_plus(normal(4, 32), torch.tensor(1.0), factorize(torch.eye(16)))
