"""The quantized product x W^T, with the arithmetic of an FP4 tensor core."""

from torch import Tensor

from scalesweep_hf.ops.blocks import BACKENDS
from scalesweep_hf.ops.nvfp4 import NVFP4Tensor
from scalesweep_hf.ops.sweep import Window


def linear(
    x: Tensor, weight: NVFP4Tensor, bias: Tensor | None = None, *, backend: str = "torch"
) -> Tensor:
    """Multiply unquantized x by a quantized weight: y = (x (codes * block_scale)^T) * S_w + bias.

    Products are exact for 16-bit x, sums and everything after them float32, rounded once to x's
    dtype (`scalesweep_hf.ops.blocks.multiply_blocks`).

    Args:
        x: [..., K] floating.
        weight: [N, K].
        bias: [N] floating or None.
        backend: name of an implementation; they differ by the rounding of float32 sums.

    Returns:
        [..., N] in x's dtype.
    """
    return BACKENDS[backend].multiply_blocks(
        x, weight.packed, weight.block_scale, weight.tensor_scale, bias=bias
    )


def quantized_linear(
    x: Tensor,
    weight: NVFP4Tensor,
    bias: Tensor | None,
    *,
    input_scale: Tensor,
    objective: str,
    importance: Tensor | None,
    window: Window,
    backend: str = "torch",
) -> Tensor:
    """Quantize x with its static tensor scale, then multiply: y = (x_q w_q^T) * (S_x * S_w) + bias.

    The operands codes * block_scale are exact in bfloat16 and their products exact in float32, so
    this has the products that an FP4 tensor core has; sums are float32, the result is rounded once
    to x's dtype.

    Args:
        x: [..., K] floating; NaN stays NaN, values beyond the static scale saturate.
        weight: [N, K].
        bias: [N] floating or None.
        input_scale: [] float32 > 0, S_x.
        objective: how x's block scales are chosen, as in `quantize`.
        importance: [K] float32 >= 0 for "wmse", else None.
        window: as in `quantize`.
        backend: name of an implementation; x is quantized to the same bits by all, and the
            results differ by the rounding of float32 sums.

    Returns:
        [..., N] in x's dtype.
    """
    chosen = BACKENDS[backend]
    values = chosen.round_blocks(
        x, input_scale, objective=objective, importance=importance, window=window
    )
    return chosen.multiply_blocks(
        values,
        weight.packed,
        weight.block_scale,
        weight.tensor_scale,
        input_scale=input_scale,
        bias=bias,
        dtype=x.dtype,
    )
