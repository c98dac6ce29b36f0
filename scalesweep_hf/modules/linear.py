"""NVFP4Linear, an nn.Linear whose weight is packed, and how a group of them is quantized."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from scalesweep_hf.kernels import resolve
from scalesweep_hf.modules.rounding import HessianRounding
from scalesweep_hf.ops.linear import linear, quantized_linear
from scalesweep_hf.ops.nvfp4 import (
    NVFP4Tensor,
    compute_tensor_scale,
    dequantize,
    largest_magnitude,
    quantize,
)
from scalesweep_hf.ops.objectives import OBJECTIVES
from scalesweep_hf.ops.sweep import BLOCK, Window

SCALES = ("weight_scale", "weight_scale_2", "input_scale")


@dataclass(frozen=True)
class LinearRecipe:
    """How one Linear is quantized.

    Attributes:
        weights: objective of the weight's block scales.
        activations: objective of the input's block scales, chosen at every call; None leaves the
            input unquantized.
        window: of both sweeps, see `scalesweep_hf.ops.sweep.sweep_scales`.
        backend: what computes them, see `scalesweep_hf.kernels.resolve`.
    """

    weights: str
    activations: str | None
    window: Window
    backend: str = "auto"


class NVFP4Linear(nn.Linear):
    """A Linear in the ModelOpt NVFP4 layout.

    Until `set_packed` it computes as the nn.Linear that it replaces.

    Parameters once packed (none requires grad; no cast ever touches the scales):
        weight: [N, K/2] uint8, two codes a byte.
        weight_scale: [N, K/16] float8_e4m3fn.
        weight_scale_2: [] float32, tensor scale of the weight.
        input_scale: [] float32, static tensor scale of the input; None where it stays unquantized.
        bias: [N], as it was.

    Buffer, not saved, since it follows from the packed weights:
        input_importance: [K] float32, importance of the input's channels for a "wmse" sweep.
    """

    weight_scale: nn.Parameter | None
    weight_scale_2: nn.Parameter | None
    input_scale: nn.Parameter | None
    input_importance: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        recipe: LinearRecipe,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make an unquantized module.

        Raises:
            ValueError: in_features is not a multiple of 16.
        """
        if in_features % BLOCK:
            raise ValueError(
                f"in_features is {in_features}, not a multiple of {BLOCK}: leave this module out "
                "with modules_to_not_convert"
            )
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.recipe = recipe
        self.backend = resolve(recipe.backend)
        for name in SCALES:
            self.register_parameter(name, None)
        self.register_buffer("input_importance", None, persistent=False)

    @classmethod
    def from_linear(cls, source: nn.Linear, recipe: LinearRecipe) -> "NVFP4Linear":
        """Wrap a Linear: same weight and bias objects, not yet quantized.

        Raises:
            ValueError: its in_features is not a multiple of 16.
        """
        has_bias = source.bias is not None
        module = cls(
            source.in_features, source.out_features, has_bias, recipe=recipe, device="meta"
        )
        module.weight, module.bias = source.weight, source.bias
        return module.train(source.training)

    @property
    def is_packed(self) -> bool:
        """Whether the weight is quantized."""
        return self.weight.dtype == torch.uint8

    @property
    def weighs_input(self) -> bool:
        """Whether the input is swept by importance."""
        name = self.recipe.activations
        return name is not None and OBJECTIVES[name].weighted

    def allocate_packed(self, *, keep_weight: bool = False) -> None:
        """Make uninitialised parameters of the packed shapes, for a loader to fill.

        Args:
            keep_weight: keep the full-precision weight in place of the packed one, for a loader
                that quantizes it as it arrives.
        """
        for name, (shape, dtype) in self.packed_layout().items():
            if not (keep_weight and name == "weight"):
                empty = torch.empty(shape, dtype=dtype, device=self.weight.device)
                self.set_packed({name: empty})

    def packed_layout(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return shape and dtype of every packed parameter by name."""
        n, k = self.out_features, self.in_features
        layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "weight": ((n, k // 2), torch.uint8),
            "weight_scale": ((n, k // BLOCK), torch.float8_e4m3fn),
            "weight_scale_2": ((), torch.float32),
        }
        if self.recipe.activations is not None:
            layout["input_scale"] = ((), torch.float32)
        return layout

    def set_packed(self, tensors: Mapping[str, Tensor]) -> None:
        """Install parameters by name, as `quantize_group` returns them."""
        for name, tensor in tensors.items():
            setattr(self, name, nn.Parameter(tensor, requires_grad=False))

    def quantized_weight(self) -> NVFP4Tensor:
        """Return the packed weight [N, K]; shares memory with the parameters."""
        assert self.is_packed
        assert self.weight_scale is not None
        assert self.weight_scale_2 is not None
        return NVFP4Tensor(self.weight, self.weight_scale, self.weight_scale_2)

    def forward(self, x: Tensor) -> Tensor:
        """Compute x W^T + b, [..., K] to [..., N], quantizing x first where the recipe says so."""
        if not self.is_packed:
            return super().forward(x)
        if self.recipe.activations is None:
            return linear(x, self.quantized_weight(), self.bias, backend=self.backend)
        assert self.input_scale is not None
        return quantized_linear(
            x,
            self.quantized_weight(),
            self.bias,
            input_scale=self.input_scale,
            objective=self.recipe.activations,
            importance=self.input_importance,
            window=self.recipe.window,
            backend=self.backend,
        )

    def to_linear(self, dtype: torch.dtype) -> nn.Linear:
        """Return a plain nn.Linear with the dequantized weight, on the same device."""
        result = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, device="meta", dtype=dtype
        )
        result.weight = nn.Parameter(dequantize(self.quantized_weight(), dtype))
        if self.bias is not None:
            result.bias = nn.Parameter(self.bias.to(dtype))
        return result.train(self.training)

    def extra_repr(self) -> str:
        """Describe shapes and recipe."""
        recipe = f"weights={self.recipe.weights}, activations={self.recipe.activations}"
        return f"{super().extra_repr()}, packed={self.is_packed}, {recipe}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "NVFP4Linear":
        """Move the scales, never cast them: fn sees bytes, which no dtype conversion touches."""
        kept = [self._parameters[name] for name in SCALES] + [self.input_importance]
        super()._apply(keep_bits(fn, kept), recurse)  # type: ignore[no-untyped-call]
        return self


def keep_bits(
    fn: Callable[[Tensor], Tensor], kept: Iterable[Tensor | None]
) -> Callable[[Tensor], Tensor]:
    """Wrap what ``nn.Module._apply`` applies, so that some tensors are moved but never cast.

    Args:
        fn: moves or casts a tensor.
        kept: tensors that fn sees as bytes.

    Returns:
        A function for ``_apply``.
    """
    identities = {id(tensor) for tensor in kept}

    def apply(tensor: Tensor) -> Tensor:
        if id(tensor) not in identities:
            return fn(tensor)
        moved = fn(tensor.detach().reshape(-1).view(torch.uint8))
        return moved.view(tensor.dtype).reshape(tensor.shape)

    return apply


def quantize_group(
    modules: Sequence[NVFP4Linear],
    weights: Sequence[Tensor],
    *,
    input_absmax: Tensor | None = None,
    input_square: Tensor | None = None,
    local_hessian: Tensor | None = None,
    rounding: HessianRounding | None = None,
) -> list[dict[str, Tensor]]:
    """Quantize Linears that read the same input, with one tensor scale for it and one for them.

    Args:
        modules: whose recipes to follow; not changed.
        weights: [N, K] floating each, one per module.
        input_absmax: [] largest magnitude of the input, where activations are quantized.
        input_square: [K] sum over tokens of the squared input, where a recipe's weights are "wmse".
        local_hessian: [K/16, 16, 16] diagonal blocks of the input's Gram matrix, where a recipe's
            weights are "hessian".
        rounding: by the Hessian of the input; None rounds to nearest.

    Returns:
        Per module the tensors for `NVFP4Linear.set_packed`, on the device of its weight.

    Raises:
        ValueError: a weight is not finite, or the statistics that a recipe needs are missing.
    """
    # The smallest range of the group leaves every member the headroom that its objective needs.
    widest = min((m.recipe.weights for m in modules), key=lambda name: OBJECTIVES[name].scale_range)
    amax = torch.stack([largest_magnitude(weight).cpu() for weight in weights]).amax()
    if not torch.isfinite(amax):
        raise ValueError(f"max|weight| is {amax.item()}: NVFP4 has no NaN or infinity")
    weight_scale_2 = compute_tensor_scale(amax, widest)
    input_scale = _input_scale(modules, input_absmax)

    def to_nearest() -> list[NVFP4Tensor]:
        importance = (input_square, local_hessian)
        pairs = zip(modules, weights, strict=True)
        return [_quantize_weight(m, weight, weight_scale_2, *importance) for m, weight in pairs]

    if rounding is None:
        packed = to_nearest()
    else:
        packed = rounding.round(weights, weight_scale_2, to_nearest)
    results = []
    for module, tensor in zip(modules, packed, strict=True):
        tensors = {
            "weight": tensor.packed,
            "weight_scale": tensor.block_scale,
            "weight_scale_2": tensor.tensor_scale.clone(),
        }
        if module.recipe.activations is not None:
            assert input_scale is not None
            tensors["input_scale"] = input_scale.to(tensor.packed.device, copy=True)
        results.append(tensors)
    return results


def _quantize_weight(
    module: NVFP4Linear,
    weight: Tensor,
    tensor_scale: Tensor,
    input_square: Tensor | None,
    local_hessian: Tensor | None,
) -> NVFP4Tensor:
    objective = OBJECTIVES[module.recipe.weights]
    coupled = local_hessian if objective.coupled else None
    return quantize(
        weight,
        objective=module.recipe.weights,
        importance=input_square if objective.weighted else coupled,
        window=module.recipe.window,
        tensor_scale=tensor_scale,
        backend=module.backend,
    )


def _input_scale(modules: Sequence[NVFP4Linear], absmax: Tensor | None) -> Tensor | None:
    objectives = [m.recipe.activations for m in modules if m.recipe.activations is not None]
    if not objectives:
        return None
    if absmax is None or not torch.isfinite(absmax):
        raise ValueError(
            f"max|input| is {absmax}: quantized activations need finite calibration statistics; "
            "calibrate with a dataset, or use scheme 'W'"
        )
    widest = min(objectives, key=lambda name: OBJECTIVES[name].scale_range)
    return compute_tensor_scale(absmax.float(), widest)


def share_input_importance(modules: Sequence[NVFP4Linear]) -> None:
    """Give packed Linears that read one input its channels' importance (eq. 12).

    The importance of a channel is the sum of the squares of its weight columns.

    From the packed weights, so that a reloaded model has the same bits. In units of the squared
    tensor scale, which the group shares and a sweep does not notice. Sums are float64 over products
    that are exact in it, so that neither device nor thread count shows. Does nothing unless a
    member's recipe sweeps its input by importance.
    """
    if not any(module.weighs_input for module in modules):
        return
    columns: Any = 0
    for module in modules:
        columns = columns + column_squares(module.quantized_weight(), module.backend)  # [K]
    for module in modules:
        module.input_importance = columns.to(torch.float32)


def column_squares(weight: NVFP4Tensor, backend: str = "torch") -> Tensor:
    """Sum the squares of every column of a packed weight [N, K], in units of S squared.

    Args:
        weight: on any device.
        backend: decodes it.

    Returns:
        [K] float64; the products and nearly always the sums are exact.
    """
    total: Any = 0
    for _, rows in weight.row_chunks():
        total = total + rows.values(torch.float32, backend).square().double().sum(0)
    return torch.as_tensor(total)
