"""Blocks of 16 to codes and scales, to values, to products: what NVFP4 spends its time on.

These functions check nothing and wait for no device, for states and activations at run time. They
are the definition; `scalesweep_hf.kernels` has faster ones, and whatever calls them takes the name
of a `Backend`.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scalesweep_hf.ops import e2m1, e4m3
from scalesweep_hf.ops.objectives import OBJECTIVES
from scalesweep_hf.ops.sweep import BLOCK, Window

# Elements swept at a time. The sweep keeps about ten float32 temporaries of this size: a few MB on
# a CPU, so that they stay in cache, and under 200 MB elsewhere, where launches are what costs.
CHUNK_CPU = 1 << 17
CHUNK_DEVICE = 1 << 22

# Weight elements decoded at a time: a few hundred MB of temporaries at the most.
DECODED = 1 << 24

# Beyond this, in units of the tensor scale, magnitudes are equal: 390 times the largest value of
# the format. Infinity would make all losses equal, and the smallest scale would win.
FAR = 2.0**20


def encode_blocks(
    x: Tensor,
    tensor_scale: Tensor,
    *,
    objective: str,
    importance: Tensor | None = None,
    window: Window = "bounded",
) -> tuple[Tensor, Tensor]:
    """Quantize: the two large parts of ``quantize(x, ...)``.

    With S the tensor scale, each block of x / S gets its scale s (`scalesweep_hf.ops.sweep`) and
    the codes of round_e2m1((x / S) / s); both divisions are IEEE float32. Beyond the range of the
    tensor scale, infinity included, values saturate.

    Args:
        x: [..., K] floating, K divisible by 16.
        tensor_scale: [] float32 > 0, on x's device.
        objective: as in `quantize`.
        importance: float32, finite: for "wmse" [K], or [R, K] for R rows of x, >= 0; for "hessian"
            [K/16, 16, 16].
        window: as in `quantize`.

    Returns:
        Packed codes [..., K/2] uint8 and block scale codes [..., K/16] uint8.
    """
    leading, k = x.shape[:-1], x.shape[-1]
    rows = x.numel() // k
    packed = x.new_empty((rows, k // 2), dtype=torch.uint8)
    scale = x.new_empty((rows, k // BLOCK), dtype=torch.uint8)
    for part, blocks, weight in _chunks(x, tensor_scale, importance):
        codes = OBJECTIVES[objective].choose(blocks, weight, window)  # [r, G]
        packed[part] = pack(e2m1.encode(blocks / e4m3.decode(codes).unsqueeze(-1)).flatten(-2))
        scale[part] = codes
    return packed.reshape(*leading, k // 2), scale.reshape(*leading, k // BLOCK)


def round_blocks(
    x: Tensor,
    tensor_scale: Tensor,
    *,
    objective: str,
    importance: Tensor | None = None,
    window: Window = "bounded",
) -> Tensor:
    """Quantize and decode in one go: ``quantize(x, ...).values()`` without packing or checks.

    For activations, at run time, as `encode_blocks`; NaN stays NaN.

    Args:
        x: [..., K] floating, K divisible by 16.
        tensor_scale: [] float32 > 0, on x's device.
        objective: as in `quantize`.
        importance: as in `encode_blocks`.
        window: as in `quantize`.

    Returns:
        [..., K] bfloat16, exact, in units of the tensor scale.
    """
    choose = OBJECTIVES[objective].choose
    parts = []
    for _, blocks, weight in _chunks(x, tensor_scale, importance):
        scale = e4m3.decode(choose(blocks, weight, window)).unsqueeze(-1)
        parts.append((e2m1.round_to_e2m1(blocks / scale) * scale).flatten(-2).to(torch.bfloat16))
    return torch.cat(parts).reshape(x.shape)


def decode_blocks(packed: Tensor, block_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply codes by block scales.

    Exact in bfloat16 and float16: a product has at most 6 significant bits.

    Args:
        packed: [..., K/2] uint8.
        block_scale: [..., K/16] float8_e4m3fn.
        dtype: of the result.

    Returns:
        [..., K] dtype, in units of the tensor scale.
    """
    codes = e2m1.decode(unpack(packed), dtype)  # [..., K]
    scale = block_scale.to(dtype).unsqueeze(-1)  # [..., G, 1]
    blocks: Tensor = codes.unflatten(-1, (-1, BLOCK)) * scale
    return blocks.flatten(-2)


def without_autocast(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Let a function of a tensor choose its dtypes itself, also under torch.autocast."""

    @functools.wraps(function)
    def run(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        kind = x.device.type
        if kind == "meta" or not torch.is_autocast_enabled(kind):
            return function(x, *args, **kwargs)
        with torch.autocast(kind, enabled=False):
            return function(x, *args, **kwargs)

    return run


@without_autocast
def multiply_blocks(
    x: Tensor,
    packed: Tensor,
    block_scale: Tensor,
    tensor_scale: Tensor,
    *,
    input_scale: Tensor | None = None,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
    decode: Callable[[Tensor, Tensor, torch.dtype], Tensor] = decode_blocks,
) -> Tensor:
    """Multiply by a quantized matrix: y = (x (codes * block_scale)^T) * S + bias.

    S is the tensor scale, times the input's where there is one, in float32. Products are exact for
    16-bit x. The sum over k is float32 in no particular order, so that implementations differ by
    the rounding of float32 sums. What comes after it is float32, rounded once to dtype.

    Args:
        x: [..., K] floating.
        packed: [N, K/2] uint8.
        block_scale: [N, K/16] float8_e4m3fn.
        tensor_scale: [] float32 > 0, of the matrix.
        input_scale: [] float32 > 0, in whose units x is; None where x is as it is.
        bias: [N] floating or None.
        dtype: of the result; None takes x's.
        decode: `decode_blocks` or a twin.

    Returns:
        [..., N] dtype.
    """
    rows = x.reshape(-1, x.shape[-1])  # [T, K]
    # A product of halves to float32 exists on CUDA alone, and has no derivative.
    of_halves = rows.is_cuda and rows.dtype in (torch.bfloat16, torch.float16)
    of_halves = of_halves and not (rows.requires_grad and torch.is_grad_enabled())
    parts = []
    for part in row_slices(packed.shape[0], x.shape[-1], DECODED):
        w = decode(packed[part], block_scale[part], x.dtype)  # [n, K]
        if of_halves:
            parts.append(torch.mm(rows, w.T, out_dtype=torch.float32))
        else:
            parts.append(torch.mm(rows.to(torch.float32), w.to(torch.float32).T))
    product = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)  # [T, N]
    scale = tensor_scale if input_scale is None else input_scale * tensor_scale
    y = product.reshape(*x.shape[:-1], packed.shape[0]) * scale
    return (y if bias is None else y + bias).to(dtype or x.dtype)


@dataclass(frozen=True)
class Backend:
    """One implementation of each function; see those of this module.

    The first three have the same bits in every backend; products differ by the order of their sums.
    """

    encode_blocks: Callable[..., tuple[Tensor, Tensor]]
    round_blocks: Callable[..., Tensor]
    decode_blocks: Callable[[Tensor, Tensor, torch.dtype], Tensor]
    multiply_blocks: Callable[..., Tensor]


# By name; `scalesweep_hf.kernels` adds its own. (Passed by name, since graphs hold names better
# than functions.)
BACKENDS = {"torch": Backend(encode_blocks, round_blocks, decode_blocks, multiply_blocks)}


def pack(codes: Tensor) -> Tensor:
    """Pack two four-bit codes per byte, the even index in the low nibble.

    Args:
        codes: [..., K] uint8 in 0...15, K even.

    Returns:
        [..., K/2] uint8.
    """
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: Tensor) -> Tensor:
    """Undo `pack`.

    Args:
        packed: [..., K/2] uint8.

    Returns:
        [..., K] uint8 codes in 0...15.
    """
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def _chunks(
    x: Tensor, tensor_scale: Tensor, importance: Tensor | None
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Yield chunks of rows: which they are, x / S in blocks [r, G, 16] float32, importance."""
    rows = x.reshape(-1, x.shape[-1])  # [R, K]
    for part in row_slices(rows.shape[0], x.shape[-1], chunk_size(x.device)):
        scaled = (rows[part].to(torch.float32) / tensor_scale).clamp(-FAR, FAR)
        weight = importance
        if weight is not None and weight.ndim < 3:
            weight = (weight if weight.ndim == 1 else weight[part]).unflatten(-1, (-1, BLOCK))
        yield part, scaled.unflatten(-1, (-1, BLOCK)), weight


def chunk_size(device: torch.device) -> int:
    """Return how many elements to work on at a time."""
    return CHUNK_CPU if device.type == "cpu" else CHUNK_DEVICE


def row_slices(rows: int, width: int, size: int) -> Iterator[slice]:
    """Yield slices of rows of this width, about size elements each; one if there are none."""
    step = max(size // width, 1)
    for start in range(0, max(rows, 1), step):
        yield slice(start, start + step)
