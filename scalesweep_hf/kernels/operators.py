"""What every backend shares: a fallback to another one, and operators for graphs to hold."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scalesweep_hf.ops.blocks import Backend, multiply_blocks
from scalesweep_hf.ops.objectives import OBJECTIVES
from scalesweep_hf.ops.sweep import BLOCK, Window, check_window

Quantize = Callable[
    [Tensor, Tensor, Tensor | None, str, str, int, int, Tensor, Tensor | None], None
]
Decode = Callable[[Tensor, Tensor, Tensor], None]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Products(NamedTuple):
    """A twin of `ops.blocks.multiply_blocks` and its gradient, for 16-bit x.

    Attributes:
        forward: (x, packed, block scale, tensor scale, input scale, bias, dtype of y) to y.
        backward: (gradient of y, the same four, dtype of x) to the gradient of x.
    """

    forward: Callable[
        [Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, torch.dtype], Tensor
    ]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, torch.dtype], Tensor]


class Kernels:
    """The functions of a `Backend`, from those that do the work.

    Args:
        name: prefix of the operators.
        quantize: (x, tensor scale, importance, objective, window, low, high, result, scale), the
            first four as in `ops.blocks.encode_blocks`, x of one of `DTYPES`; window is "bounded",
            "exact", or "fixed", with the offsets low and high. Where scale is [..., K/16] uint8,
            result is [..., K/2] uint8, both as `encode_blocks` returns them; where it is None,
            result is [..., K] bfloat16, as `round_blocks` returns it.
        decode: (packed, block scale, result), as in `ops.blocks.decode_blocks`.
        products: None leaves them to the definition, with this decode.
        runs_on: whether a tensor is where they run.
        fallback: for tensors elsewhere, other dtypes and couplings.
    """

    def __init__(
        self,
        name: str,
        quantize: Quantize,
        decode: Decode,
        *,
        products: Products | None = None,
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
        self._products = products
        if products is not None:
            self._multiply_operator = product_operator(prefix, products)

    def backend(self) -> Backend:
        """Return the four functions."""
        return Backend(
            self.encode_blocks, self.round_blocks, self.decode_blocks, self.multiply_blocks
        )

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
        if not self._takes(x, objective, importance):
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
        if not self._takes(x, objective, importance):
            return self._fallback.round_blocks(
                x, tensor_scale, objective=objective, importance=importance, window=window
            )
        run = self._round_operator if torch.compiler.is_compiling() else self._round_now
        values: Tensor = run(x, tensor_scale, importance, objective, *_window(window))
        return values

    def decode_blocks(self, packed: Tensor, block_scale: Tensor, dtype: torch.dtype) -> Tensor:
        """Twin of `scalesweep_hf.ops.blocks.decode_blocks`."""
        fits = packed.numel() == block_scale.numel() * BLOCK // 2
        if not (fits and self._sees(packed) and dtype in DTYPES):
            return self._fallback.decode_blocks(packed, block_scale, dtype)
        run = self._decode_operator if torch.compiler.is_compiling() else self._decode_now
        values: Tensor = run(packed, block_scale, dtype)
        return values

    def multiply_blocks(
        self,
        x: Tensor,
        packed: Tensor,
        block_scale: Tensor,
        tensor_scale: Tensor,
        *,
        input_scale: Tensor | None = None,
        bias: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Twin of `scalesweep_hf.ops.blocks.multiply_blocks`, but for the order of its sums."""
        operands = x, packed, block_scale, tensor_scale
        scales, train = (tensor_scale, input_scale), torch.is_grad_enabled()
        halves = x.dtype in (torch.bfloat16, torch.float16)
        # Mixed devices and shapes are errors that the definition makes plain.
        fits = all(t is None or t.device == x.device for t in (*operands, input_scale, bias))
        fits = fits and _shapes_fit(x, packed, block_scale, bias)
        learned = train and any(t is not None and t.requires_grad for t in scales)
        takes = halves and fits and not learned and self._sees(x)
        if self._products is None or not takes:
            options: dict[str, Any] = {"input_scale": input_scale, "bias": bias, "dtype": dtype}
            return multiply_blocks(*operands, **options, decode=self.decode_blocks)
        run: Callable[..., Tensor] = self._products.forward
        train = train and any(t is not None and t.requires_grad for t in (x, bias))
        if torch.compiler.is_compiling() or train:
            run = self._multiply_operator
        return run(*operands, input_scale, bias, dtype or x.dtype)

    def _takes(self, x: Tensor, objective: str, importance: Tensor | None) -> bool:
        if OBJECTIVES[objective].coupled or x.dtype not in DTYPES or x.shape[-1] % BLOCK:
            return False
        if importance is not None and not (
            importance.shape[-1] == x.shape[-1] and importance.numel() in (x.shape[-1], x.numel())
        ):
            return False
        return self._sees(x)

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


def product_operator(prefix: str, products: Products) -> Callable[..., Tensor]:
    """Define the operators prefix_multiply and prefix_multiply_back and return the first."""
    define = torch.library.custom_op

    @define(f"{prefix}_multiply", mutates_args=())
    def multiply(
        x: Tensor,
        packed: Tensor,
        block_scale: Tensor,
        tensor_scale: Tensor,
        input_scale: Tensor | None,
        bias: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        return products.forward(x, packed, block_scale, tensor_scale, input_scale, bias, dtype)

    @define(f"{prefix}_multiply_back", mutates_args=())
    def multiply_back(
        gradient: Tensor,
        packed: Tensor,
        block_scale: Tensor,
        tensor_scale: Tensor,
        input_scale: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        return products.backward(gradient, packed, block_scale, tensor_scale, input_scale, dtype)

    @multiply.register_fake
    def _(x: Tensor, packed: Tensor, *args: Any) -> Tensor:
        return x.new_empty((*x.shape[:-1], packed.shape[0]), dtype=args[-1])

    @multiply_back.register_fake
    def _(gradient: Tensor, packed: Tensor, *args: Any) -> Tensor:
        return gradient.new_empty((*gradient.shape[:-1], 2 * packed.shape[1]), dtype=args[-1])

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, *matrix, bias, _ = inputs
        ctx.save_for_backward(*matrix)
        ctx.dtypes = x.dtype, None if bias is None else bias.dtype

    def back(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        of_x = of_bias = None
        x_dtype, bias_dtype = ctx.dtypes
        if ctx.needs_input_grad[0]:
            of_x = multiply_back(gradient, *ctx.saved_tensors, x_dtype)
        if ctx.needs_input_grad[5]:
            rows = gradient.unsqueeze(0).flatten(0, -2)
            of_bias = rows.sum(0, dtype=torch.float32).to(bias_dtype)
        return of_x, None, None, None, None, of_bias, None

    multiply.register_autograd(back, setup_context=keep)
    return multiply


def _shapes_fit(x: Tensor, packed: Tensor, block_scale: Tensor, bias: Tensor | None) -> bool:
    n, half = packed.shape
    if x.shape[-1] != 2 * half or block_scale.shape != (n, half * 2 // BLOCK):
        return False
    return bias is None or bias.shape == (n,)


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
