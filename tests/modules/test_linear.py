import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scalesweep_hf import NVFP4Linear, dequantize, quantize
from scalesweep_hf.modules.linear import LinearRecipe, quantize_group, share_input_importance

RECIPES = {
    "W": LinearRecipe("mse", None, "bounded"),
    "WA mse": LinearRecipe("mse", "mse", "bounded"),
    "WA wmse": LinearRecipe("wmse", "wmse", "bounded"),
    "WA exact": LinearRecipe("wmse", "wmse", "exact"),
    "WA absmax": LinearRecipe("absmax", "absmax", "bounded"),
    "WA 4/6": LinearRecipe("four_over_six", "four_over_six", "bounded"),
}


def packed_linear(
    recipe: LinearRecipe,
    *,
    bias: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
) -> tuple[NVFP4Linear, nn.Linear, Tensor]:
    torch.manual_seed(0)
    source = nn.Linear(64, 48, bias=bias).to(device=device, dtype=dtype)
    x = torch.randn(2, 5, 64).to(device=device, dtype=dtype)
    module = NVFP4Linear.from_linear(source, recipe)
    rows = x.flatten(0, 1).float()
    (tensors,) = quantize_group(
        [module],
        [module.weight.detach()],
        input_absmax=rows.abs().amax(),
        input_square=rows.square().sum(0),
    )
    module.set_packed(tensors)
    share_input_importance([module])
    return module, source, x


def expected_output(module: NVFP4Linear, x: Tensor) -> Tensor:
    """Compute x W^T + b in float64 from dequantized operands."""
    operand = x.double()
    if module.recipe.activations is not None:
        weighted = module.recipe.activations == "wmse"
        operand = dequantize(
            quantize(
                x,
                objective=module.recipe.activations,
                importance=module.input_importance if weighted else None,
                window=module.recipe.window,
                tensor_scale=module.input_scale,
            )
        ).double()
    y = operand @ dequantize(module.quantized_weight()).double().T
    return y if module.bias is None else y + module.bias.double()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", RECIPES)
def test_forward_is_the_product_of_the_quantized_operands(
    name: str, dtype: torch.dtype, bias: bool, device: str
) -> None:
    module, _, x = packed_linear(RECIPES[name], bias=bias, dtype=dtype, device=device)
    with torch.no_grad():
        actual = module(x)
    assert actual.dtype == dtype
    expected = expected_output(module, x).detach()
    # One rounding to dtype, and the float32 sum before it.
    tolerance = torch.finfo(dtype).eps
    torch.testing.assert_close(
        actual.double(), expected, rtol=tolerance, atol=4e-6 * expected.abs().max().item()
    )


def test_until_packed_it_computes_as_the_linear_it_replaces() -> None:
    torch.manual_seed(0)
    source = nn.Linear(32, 8)
    module = NVFP4Linear.from_linear(source, RECIPES["W"])
    x = torch.randn(3, 32)
    assert torch.equal(module(x), source(x))
    assert module.weight is source.weight
    assert not module.is_packed


def test_in_features_must_be_a_multiple_of_16() -> None:
    with pytest.raises(ValueError, match="in_features is 40, not a multiple of 16"):
        NVFP4Linear.from_linear(nn.Linear(40, 8), RECIPES["W"])


MOVES: dict[str, Any] = {
    "half": lambda m: m.half(),
    "float": lambda m: m.float(),
    "double": lambda m: m.double(),
    "to(float16)": lambda m: m.to(torch.float16),
    "to(cpu, bfloat16)": lambda m: m.to("cpu", torch.bfloat16),
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("move", MOVES)
def test_no_cast_touches_packed_tensors(move: str) -> None:
    module, _, _ = packed_linear(RECIPES["WA wmse"])
    names = ("weight", "weight_scale", "weight_scale_2", "input_scale", "input_importance")
    before = {name: getattr(module, name).clone() for name in names}
    moved = MOVES[move](module)
    for name, tensor in before.items():
        after = getattr(moved, name)
        assert after.dtype == tensor.dtype
        assert after.shape == tensor.shape
        assert torch.equal(
            after.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)
        )
    assert isinstance(moved.weight_scale, nn.Parameter)
    assert not moved.weight_scale.requires_grad


def test_the_bias_is_cast() -> None:
    module, _, _ = packed_linear(RECIPES["W"])
    assert module.half().bias.dtype == torch.float16


def test_meta_and_back_keeps_shapes_and_dtypes() -> None:
    module, _, _ = packed_linear(RECIPES["WA mse"])
    empty = copy.deepcopy(module).to("meta").to_empty(device="cpu")
    for (name, a), (_, b) in zip(module.named_parameters(), empty.named_parameters(), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), name


def test_state_dict_round_trip() -> None:
    module, _, x = packed_linear(RECIPES["WA wmse"])
    state = module.state_dict()
    assert set(state) == {"weight", "weight_scale", "weight_scale_2", "input_scale", "bias"}
    other = NVFP4Linear.from_linear(nn.Linear(64, 48).bfloat16(), RECIPES["WA wmse"])
    other.allocate_packed()
    other.load_state_dict(state)
    share_input_importance([other])
    with torch.no_grad():
        assert torch.equal(other(x), module(x))


def test_an_unpacked_module_refuses_packed_tensors() -> None:
    module, _, _ = packed_linear(RECIPES["W"])
    other = NVFP4Linear.from_linear(nn.Linear(64, 48).bfloat16(), RECIPES["W"])
    with pytest.raises(RuntimeError, match="weight_scale"):
        other.load_state_dict(module.state_dict())


@pytest.mark.parametrize("name", RECIPES)
def test_compiles_as_one_graph_to_the_same_bits(name: str, device: str) -> None:
    module, _, x = packed_linear(RECIPES[name], device=device)
    torch.compiler.reset()  # every module compiled so far counts against one recompilation limit
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), module(x))


def test_nan_in_one_token_stays_in_that_token() -> None:
    module, _, x = packed_linear(RECIPES["WA mse"])
    x[0, 1, 3] = torch.nan
    with torch.no_grad():
        y = module(x)
    assert y[0, 1].isnan().all()
    y[0, 1] = 0.0
    assert y.isfinite().all()


def test_values_beyond_calibration_saturate() -> None:
    module, _, x = packed_linear(RECIPES["WA mse"], bias=False)
    with torch.no_grad():
        far = module(torch.where(x > 0, torch.inf, x).to(x.dtype))
        assert far.isfinite().all()


def test_headroom_carries_values_beyond_calibration() -> None:
    """The sweeps' tensor scale leaves 1.75 times the calibrated maximum before saturation."""
    module, _, x = packed_linear(RECIPES["WA mse"], bias=False, dtype=torch.float32)
    with torch.no_grad():
        ratio = module(x * 1.5) / 1.5
        error = (ratio - module(x)).norm() / module(x).norm()
    assert error < 0.1


def test_a_group_shares_the_scales_of_its_largest_members() -> None:
    recipe = RECIPES["WA mse"]
    modules = [NVFP4Linear.from_linear(nn.Linear(32, 16), recipe) for _ in range(2)]
    weights = [torch.randn(16, 32), 3 * torch.randn(16, 32)]
    first, second = quantize_group(modules, weights, input_absmax=torch.tensor(7.0))
    amax = torch.stack([weight.abs().amax() for weight in weights]).amax()
    assert torch.equal(first["weight_scale_2"], amax / (256 * 6))
    assert torch.equal(first["weight_scale_2"], second["weight_scale_2"])
    assert torch.equal(first["input_scale"], torch.tensor(7.0) / (256 * 6))
    assert first["input_scale"].data_ptr() != second["input_scale"].data_ptr()


def test_mixed_objectives_share_the_range_that_leaves_headroom() -> None:
    modules = [
        NVFP4Linear.from_linear(nn.Linear(32, 16), LinearRecipe(objective, None, "bounded"))
        for objective in ("absmax", "mse")
    ]
    weights = [torch.ones(16, 32), torch.ones(16, 32)]
    for tensors in quantize_group(modules, weights):
        assert torch.equal(tensors["weight_scale_2"], torch.tensor(1 / (256 * 6)))


def test_activations_without_statistics_are_an_error() -> None:
    module = NVFP4Linear.from_linear(nn.Linear(32, 16), RECIPES["WA mse"])
    with pytest.raises(ValueError, match="quantized activations need finite calibration"):
        quantize_group([module], [torch.ones(16, 32)])


def test_to_linear_dequantizes() -> None:
    module, source, _ = packed_linear(RECIPES["W"])
    plain = module.to_linear(torch.float32)
    assert type(plain) is nn.Linear
    assert torch.equal(plain.weight, dequantize(module.quantized_weight()))
    assert torch.equal(plain.bias, source.bias.float())
    assert "packed=True" in repr(module)


def test_offload_hooks_bring_packed_weights_in_and_take_them_out() -> None:
    from accelerate import cpu_offload

    module, _, x = packed_linear(RECIPES["WA wmse"])
    with torch.no_grad():
        expected = module(x)
        cpu_offload(module, execution_device="cpu")
        assert module.weight.device.type == "meta"
        assert torch.equal(module(x), expected)
    assert module.weight.device.type == "meta"
