"""What every backend shares: a fallback to another one, and operators for graphs to hold."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from scalesweep_hf.ops.blocks import Backend
from scalesweep_hf.ops.objectives import OBJECTIVES
from scalesweep_hf.ops.sweep import BLOCK, Window, check_window

Quantize = Callable[
    [Tensor, Tensor, Tensor | None, str, str, int, int, Tensor, Tensor | None], None
]
Decode = Callable[[Tensor, Tensor, Tensor], None]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Kernels:
    """The functions of a `Backend`, from two that write their results into given tensors.

    Args:
        name: prefix of the operators.
        quantize: (x, tensor scale, importance, objective, window, low, high, result, scale), the
            first four as in `ops.blocks.encode_blocks`, x of one of `DTYPES`; window is "bounded",
            "exact", or "fixed", with the offsets low and high. Where scale is [..., K/16] uint8,
            result is [..., K/2] uint8, both as `encode_blocks` returns them; where it is None,
            result is [..., K] bfloat16, as `round_blocks` returns it.
        decode: (packed, block scale, result), as in `ops.blocks.decode_blocks`.
        runs_on: whether a tensor is where they run.
        fallback: for tensors elsewhere, other dtypes and couplings.
    """

    def __init__(
        self,
        name: str,
        quantize: Quantize,
        decode: Decode,
        *,
        runs_on: Callable[[Tensor], bool],
        fallback: Backend,
    ) -> None:
        """Define the operators."""
        self._quantize, self._decode = quantize, decode
        self._runs_on, self._fallback = runs_on, fallback
        # Graphs see operators; a direct call spares what dispatching them takes.
        define, prefix = torch.library.custom_op, f"scalesweep_hf::{name}"
        self._encode_operator = define(f"{prefix}_encode", self._encode_now, mutates_args=())
        self._round_operator = define(f"{prefix}_round", self._round_now, mutates_args=())
        self._decode_operator = define(f"{prefix}_decode", self._decode_now, mutates_args=())
        self._encode_operator.register_fake(_empty_parts)
        self._round_operator.register_fake(_empty_values)
        self._decode_operator.register_fake(_empty_decoded)
        # Rounding has a gradient of zero, in training as in graphs.
        self._encode_operator.register_autograd(_no_gradient)
        self._round_operator.register_autograd(_no_gradient)

    def backend(self) -> Backend:
        """Return the three functions."""
        return Backend(self.encode_blocks, self.round_blocks, self.decode_blocks)

    def encode_blocks(
        self,
        x: Tensor,
        tensor_scale: Tensor,
        *,
        objective: str,
        importance: Tensor | None = None,
        window: Window = "bounded",
    ) -> tuple[Tensor, Tensor]:
        """Twin of `scalesweep_hf.ops.blocks.encode_blocks`."""
        if not self._takes(x, objective):
            return self._fallback.encode_blocks(
                x, tensor_scale, objective=objective, importance=importance, window=window
            )
        run = self._encode_operator if torch.compiler.is_compiling() else self._encode_now
        packed, scale = run(x, tensor_scale, importance, objective, *_window(window))
        return packed, scale

    def round_blocks(
        self,
        x: Tensor,
        tensor_scale: Tensor,
        *,
        objective: str,
        importance: Tensor | None = None,
        window: Window = "bounded",
    ) -> Tensor:
        """Twin of `scalesweep_hf.ops.blocks.round_blocks`."""
        if not self._takes(x, objective):
            return self._fallback.round_blocks(
                x, tensor_scale, objective=objective, importance=importance, window=window
            )
        run = self._round_operator if torch.compiler.is_compiling() else self._round_now
        values: Tensor = run(x, tensor_scale, importance, objective, *_window(window))
        return values

    def decode_blocks(self, packed: Tensor, block_scale: Tensor, dtype: torch.dtype) -> Tensor:
        """Twin of `scalesweep_hf.ops.blocks.decode_blocks`."""
        if not self._sees(packed) or dtype not in DTYPES:
            return self._fallback.decode_blocks(packed, block_scale, dtype)
        run = self._decode_operator if torch.compiler.is_compiling() else self._decode_now
        values: Tensor = run(packed, block_scale, dtype)
        return values

    def _takes(self, x: Tensor, objective: str) -> bool:
        return self._sees(x) and x.dtype in DTYPES and not OBJECTIVES[objective].coupled

    def _sees(self, x: Tensor) -> bool:
        """Whether x is here and has memory; traces and fake tensors follow the definition."""
        if torch.compiler.is_compiling():
            return self._runs_on(x)
        real = type(x) in (Tensor, torch.nn.Parameter) and not torch._C._get_tracing_state()
        return real and self._runs_on(x)

    def _encode_now(
        self,
        x: Tensor,
        tensor_scale: Tensor,
        importance: Tensor | None,
        objective: str,
        window: str,
        low: int,
        high: int,
    ) -> tuple[Tensor, Tensor]:
        packed, scale = _empty_parts(x)
        self._fill(x, tensor_scale, importance, objective, window, low, high, packed, scale)
        return packed, scale

    def _round_now(
        self,
        x: Tensor,
        tensor_scale: Tensor,
        importance: Tensor | None,
        objective: str,
        window: str,
        low: int,
        high: int,
    ) -> Tensor:
        values = _empty_values(x)
        self._fill(x, tensor_scale, importance, objective, window, low, high, values, None)
        return values

    def _fill(self, x: Tensor, tensor_scale: Tensor, importance: Tensor | None, *rest: Any) -> None:
        if x.numel():
            weight = None if importance is None else _beside(x, importance)
            self._quantize(x, _beside(x, tensor_scale), weight, *rest)

    def _decode_now(self, packed: Tensor, block_scale: Tensor, dtype: torch.dtype) -> Tensor:
        values = _empty_decoded(packed, block_scale, dtype)
        if packed.numel():
            self._decode(packed, block_scale, values)
        return values


def _beside(x: Tensor, other: Tensor) -> Tensor:
    return other.detach().to(device=x.device, dtype=torch.float32)


def _no_gradient(context: object, *gradients: Tensor) -> tuple[None, ...]:
    return (None,) * 7


def _empty_parts(x: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    shape = x.shape[:-1]
    packed = x.new_empty((*shape, x.shape[-1] // 2), dtype=torch.uint8)
    return packed, x.new_empty((*shape, x.shape[-1] // BLOCK), dtype=torch.uint8)


def _empty_values(x: Tensor, *args: object) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.bfloat16)


def _empty_decoded(packed: Tensor, block_scale: Tensor, dtype: torch.dtype) -> Tensor:
    return packed.new_empty((*packed.shape[:-1], 2 * packed.shape[-1]), dtype=dtype)


def _window(window: Window) -> tuple[str, int, int]:
    """Return a window as the types that an operator can have."""
    if isinstance(window, str):
        return window, 0, 0
    return "fixed", *check_window(window)
