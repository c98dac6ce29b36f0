"""The quantized product x W^T, with the arithmetic of an FP4 tensor core."""

import torch
from torch import Tensor

from scalesweep_hf.ops.blocks import BACKENDS
from scalesweep_hf.ops.nvfp4 import NVFP4Tensor
from scalesweep_hf.ops.sweep import Window

# Weight elements decoded at a time: a few hundred MB of temporaries at the most.
DECODED = 1 << 24


def linear(
    x: Tensor, weight: NVFP4Tensor, bias: Tensor | None = None, *, backend: str = "torch"
) -> Tensor:
    """Multiply unquantized x by a quantized weight: y = (x (codes * block_scale)^T) * S_w + bias.

    Products are exact for 16-bit x, sums and everything after them float32, rounded once to x's
    dtype.

    Args:
        x: [..., K] floating.
        weight: [N, K].
        bias: [N] floating or None.
        backend: name of an implementation; all give the same bits.

    Returns:
        [..., N] in x's dtype.
    """
    return _finish(_matmul(x, weight, backend), weight.tensor_scale, bias, x.dtype)


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
        backend: name of an implementation; all give the same bits.

    Returns:
        [..., N] in x's dtype.
    """
    values = BACKENDS[backend].round_blocks(
        x, input_scale, objective=objective, importance=importance, window=window
    )
    product = _matmul(values, weight, backend)
    return _finish(product, input_scale * weight.tensor_scale, bias, x.dtype)


def _matmul(x: Tensor, weight: NVFP4Tensor, backend: str) -> Tensor:
    """Return x (codes * block_scale)^T in float32, [..., N], decoding a part of W at a time."""
    rows = x.reshape(-1, x.shape[-1])  # [T, K]
    parts = []
    for _, chunk in weight.row_chunks(DECODED):
        w = chunk.values(x.dtype, backend)  # [n, K]
        if rows.device.type == "cuda" and rows.dtype != torch.float32:
            parts.append(torch.mm(rows, w.T, out_dtype=torch.float32))
        else:
            parts.append(torch.mm(rows.to(torch.float32), w.to(torch.float32).T))
    product = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
    return product.reshape(*x.shape[:-1], weight.shape[0])


def _finish(product: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    y = product * scale
    return (y if bias is None else y + bias).to(dtype)
