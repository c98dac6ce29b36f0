"""Triton twin of `scalesweep_hf.ops.blocks.multiply_blocks`.

One token has a kernel that reads the packed weight (`scalesweep_hf.kernels.vector`), a few have
another (`scalesweep_hf.kernels.few`). For many, the weight is decoded
(`scalesweep_hf.kernels.decoding`) and cuBLAS multiplies; where it can, it applies the scales too.
"""

import ctypes
import math
from collections.abc import MutableMapping

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from scalesweep_hf.kernels.decoding import decode
from scalesweep_hf.kernels.few import FEW, multiply_few
from scalesweep_hf.kernels.vector import multiply_one
from scalesweep_hf.ops.blocks import row_slices, without_autocast

# Weight elements decoded at a time: half a GB. A launch more costs less than a smaller product.
DECODED = 1 << 28
# Tokens, and elements of the result, from which on cuBLAS applies the tensor scale: a result that
# fills the device gives it no reason to split the sum, whose parts it may then round to 16 bits.
TRUSTING = 1024
FILLING = 1 << 22
# Elements of the result that a program of `_finish_kernel` takes.
FINISHED = 2048


@triton.jit
def _finish_kernel(
    product_ptr,  # [tokens, N] float32
    tensor_scale_ptr,  # [] float32
    input_scale_ptr,  # [] float32, unused without SCALES_INPUT
    bias_ptr,  # [N], unused without BIAS
    y_ptr,  # [tokens, N]
    size,
    N,
    SCALES_INPUT: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    scale = tl.load(tensor_scale_ptr)
    if SCALES_INPUT:
        scale = tl.load(input_scale_ptr) * scale
    y = tl.load(product_ptr + at, mask=at < size, other=0.0) * scale
    if BIAS:
        y = y + tl.load(bias_ptr + at % N, mask=at < size, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=at < size)


@without_autocast
def multiply(
    x: Tensor,
    packed: Tensor,
    block_scale: Tensor,
    tensor_scale: Tensor,
    input_scale: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Twin of `multiply_blocks` for x [..., K] bfloat16 or float16."""
    n = packed.shape[0]
    rows = x.reshape(-1, x.shape[-1])  # [T, K]
    scales = (tensor_scale, input_scale)
    arguments = (rows, packed, block_scale, *scales, bias, dtype)
    if not (len(rows) and n):
        y = x.new_empty((len(rows), n), dtype=dtype)
    elif len(rows) == 1:
        y = multiply_one(*arguments)
    elif len(rows) <= FEW and rows.shape[1] % 32 == 0:
        y = multiply_few(*arguments)
    else:
        y = _multiply_many(rows, packed, block_scale, scales, bias, dtype)
    return y.reshape(*x.shape[:-1], n)


Scales = tuple[Tensor, Tensor | None]


def _multiply_many(
    rows: Tensor,
    packed: Tensor,
    block_scale: Tensor,
    scales: Scales,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    value = None
    fits = rows.is_cuda and rows.dtype == dtype and (bias is None or bias.dtype == dtype)
    if fits and len(rows) >= TRUSTING and len(rows) * packed.shape[0] >= FILLING:
        value = _trusted(scales)
    parts = []
    for part in row_slices(packed.shape[0], rows.shape[1], DECODED):
        b = None if bias is None else bias[part]
        w = rows.new_empty((len(packed[part]), rows.shape[1]))  # [n, K]
        if value is None:
            decode(packed[part], block_scale[part], w)
            parts.append(_finish(_product(rows, w.T), scales, b, dtype))
            continue
        tensor_scale, input_scale = scales
        decode(
            packed[part],
            block_scale[part],
            w,
            trusted=value,
            tensor_scale=tensor_scale,
            input_scale=input_scale,
        )
        start = rows.new_empty(1) if b is None else b
        parts.append(torch.addmm(start, rows, w.T, beta=int(b is not None), alpha=value))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


@without_autocast
def multiply_back(
    gradient: Tensor,
    packed: Tensor,
    block_scale: Tensor,
    tensor_scale: Tensor,
    input_scale: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Return the gradient of x [..., K] dtype from that of y [..., N]: (g (codes * scale)) * S."""
    n, k = packed.shape[0], 2 * packed.shape[1]
    rows = gradient.unsqueeze(0).flatten(0, -2)  # [T, N]
    total = rows.new_zeros((len(rows), k), dtype=torch.float32)
    for part in row_slices(n, k, DECODED):
        w = rows.new_empty((len(packed[part]), k))
        decode(packed[part], block_scale[part], w)
        total += _product(rows[:, part], w)
    x = _finish(total, (tensor_scale, input_scale), None, dtype)
    return x.reshape(*gradient.shape[:-1], k)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Multiply matrices, sums and result in float32."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.to(torch.float32), b.to(torch.float32))


def _finish(product: Tensor, scales: Scales, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return product [T, N] * S + bias, rounded to dtype."""
    y = product.new_empty(product.shape, dtype=dtype)
    tensor_scale, input_scale = scales
    if product.numel():
        with torch.cuda.device_of(product):
            _finish_kernel[(triton.cdiv(product.numel(), FINISHED),)](
                product,
                tensor_scale,
                tensor_scale if input_scale is None else input_scale,
                product if bias is None else bias.contiguous(),
                y,
                product.numel(),
                product.shape[1],
                SCALES_INPUT=input_scale is not None,
                BIAS=bias is not None,
                BLOCK=FINISHED,
                num_warps=4,
                enable_fp_fusion=False,
            )
    return y


def _trusted(scales: Scales) -> float | None:
    """Return the product of scales as `_finish` would have it, None where it is not known."""
    value = 1.0
    for scale in scales:
        known = 1.0 if scale is None else _value_of(scale)
        if known is None:
            return None
        value *= known
    # float64 holds the product of two float32; ctypes rounds it to float32.
    value = ctypes.c_float(value).value
    return value if 2.0**-126 <= value < math.inf else None


# By scale: the state that it was read in, and its value.
_values: MutableMapping[Tensor, tuple[tuple[int, int], float]] = WeakTensorKeyDictionary()


def _value_of(scale: Tensor) -> float | None:
    """Return a tensor's value, waiting for the device the first time; None if that cannot be.

    A change behind the tensor's version, through ``.data``, goes unnoticed here; `decode` makes
    up for it.
    """
    if scale.is_inference():
        return None
    state = (scale._version, scale.data_ptr())
    known = _values.get(scale)
    if known is None or known[0] != state:
        if torch.cuda.is_current_stream_capturing():
            return None
        known = (state, scale.item())
        _values[scale] = known
    return known[1]
