"""Codes and scales to 16-bit floats in Triton, two codes at a time: the twin of `decode_blocks`.

A code s e e m, put where a 16-bit float has its sign and the lowest bits of its exponent, is the
value of the code times a power of two, the subnormal 0.5 included. One word of eight codes so
becomes four words of two halves with masks and shifts, and a product with the block scale, which
undoes most of the power, is exact: it has at most 6 significant bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from scalesweep_hf.kernels.numbers import INTERPRETED

# Words of eight codes per program and step, and steps. (Interpreted, every program costs the same.)
WORDS = 4096 if INTERPRETED else 128
STEPS = 4
WARPS = 4

INTERPRETER = tl.constexpr(INTERPRETED)
SIGNS = tl.constexpr(-0x7FFF8000)  # 0x80008000
IN_BFLOAT16 = tl.constexpr(-0x7E3F7E40)  # 0x81C081C0: where `pairs` has its codes
SCALE_BITS = tl.constexpr(-0x78100000)  # 0x87F00000
# Ampere has no product of two bfloat16 at once, but adds -0 to one.
_TIMES_BFLOAT16 = tl.constexpr(
    "{ .reg .b32 z; mov.b32 z, 0x80008000; fma.rn.bf16x2 $0, $1, $2, z; }"
)
_TIMES_FLOAT16 = tl.constexpr("mul.rn.f16x2 $0, $1, $2;")
# What `halves` returns are values times 1 / REST, in both formats.
REST = tl.constexpr(256.0)


@triton.jit
def pairs(word, BFLOAT16: tl.constexpr):
    """Split eight codes [..] int32 into four [..] int32: code i and, above it, code i + 4.

    Both are halves of the format, times 2**-126 in bfloat16 and 2**-14 in float16.
    """
    if BFLOAT16:  # a product by two powers of two moves sign and rest at once
        upper = word >> 8
        return (
            ((word & 0x000F000F) * 0x1040) & IN_BFLOAT16,
            ((word & 0x00F000F0) * 0x0104) & IN_BFLOAT16,
            ((upper & 0x000F000F) * 0x1040) & IN_BFLOAT16,
            ((upper & 0x00F000F0) * 0x0104) & IN_BFLOAT16,
        )
    else:
        return (
            ((word << 12) & SIGNS) | ((word << 9) & 0x0E000E00),
            ((word << 8) & SIGNS) | ((word << 5) & 0x0E000E00),
            ((word << 4) & SIGNS) | ((word << 1) & 0x0E000E00),
            (word & SIGNS) | ((word >> 3) & 0x0E000E00),
        )


@triton.jit
def scale_of(bits):
    """Return the value of an E4M3 scale, [..] float32; NaN stays.

    Args:
        bits: [..] int32 with the code shifted left by 20, its sign in bit 31 too; others may be
            anything.
    """
    scale = (bits & SCALE_BITS).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2**120
    return tl.where(tl.abs(scale) > 448.0, float("nan"), scale)


@triton.jit
def factor(bits, BFLOAT16: tl.constexpr):
    """Return an E4M3 scale as two equal halves in int32, which bring `pairs` to values / REST.

    They are the scale times 2**118 in bfloat16, times 2**6 in float16; NaN stays.

    Args:
        bits: as of `scale_of`.
        BFLOAT16: the format, else float16.
    """
    scale = scale_of(bits)
    if BFLOAT16:
        half = (scale * 3.3230699894622897e35).to(tl.int32, bitcast=True)  # 2**118; exact, so
        return half | ((half >> 16) & 0xFFFF)  # the lower bits were zero
    else:
        half = (scale * 64.0).to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        return half | (half << 16)


@triton.jit
def scaled(pair, factor, BFLOAT16: tl.constexpr):
    """Return two halves [..] int32 times those of factor, as int32; products must be exact."""
    if INTERPRETER:  # which has no assembler, nor arithmetic for bfloat16
        lower = widened(pair, BFLOAT16) * widened(factor, BFLOAT16)
        upper = widened(pair >> 16, BFLOAT16) * widened(factor >> 16, BFLOAT16)
        if BFLOAT16:
            lower, upper = lower.to(tl.int32, bitcast=True), upper.to(tl.int32, bitcast=True)
            return ((lower >> 16) & 0xFFFF) | (upper & -65536)
        else:
            lower = lower.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
            upper = upper.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
            return (lower & 0xFFFF) | (upper << 16)
    else:  # as two products, this costs up to three instructions more, to move halves about
        ASSEMBLER: tl.constexpr = _TIMES_BFLOAT16 if BFLOAT16 else _TIMES_FLOAT16
        return tl.inline_asm_elementwise(
            ASSEMBLER, "=r,r,r", [pair, factor], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def halves(pair, factor, BFLOAT16: tl.constexpr):
    """Return the lower and the upper half of `scaled`."""
    both = scaled(pair, factor, BFLOAT16)
    if INTERPRETER:
        return widened(both, BFLOAT16), widened(both >> 16, BFLOAT16)
    else:
        FORMAT: tl.constexpr = tl.bfloat16 if BFLOAT16 else tl.float16
        upper = (both >> 16).to(tl.int16).to(FORMAT, bitcast=True)
        return both.to(tl.int16).to(FORMAT, bitcast=True), upper


@triton.jit
def widened(bits, BFLOAT16: tl.constexpr):
    """Return the lower halves of int32 as float32."""
    if BFLOAT16:
        return (bits << 16).to(tl.float32, bitcast=True)
    else:
        return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _kernel(
    packed_ptr,  # [words] of eight codes
    scale_ptr,  # [words / 2] uint8
    tensor_scale_ptr,  # EXACT: unused, else [] float32
    input_scale_ptr,  # SCALES_INPUT: [] float32, else unused
    result_ptr,  # [words, 8]
    words,
    trusted,
    EXACT: tl.constexpr,  # whether nothing is trusted
    SCALES_INPUT: tl.constexpr,
    WORDS: tl.constexpr,
    STEPS: tl.constexpr,
):
    BFLOAT16: tl.constexpr = result_ptr.dtype.element_ty != tl.float16
    first = tl.program_id(0).to(tl.int64) * (WORDS * STEPS) + tl.arange(0, WORDS)
    rest = REST
    if not EXACT:
        scale = tl.load(tensor_scale_ptr)
        if SCALES_INPUT:
            scale = tl.load(input_scale_ptr) * scale
        rest = tl.where(scale == trusted, REST, REST * (scale / trusted))
    packed = ()
    codes = ()
    for step in tl.static_range(STEPS):
        word = first + step * WORDS
        packed = packed + (tl.load(packed_ptr + word, mask=word < words, other=0),)
        codes = codes + (tl.load(scale_ptr + (word >> 1), mask=word < words, other=0),)
    for step in tl.static_range(STEPS):
        p0, p1, p2, p3 = pairs(packed[step], BFLOAT16)
        scale = factor(codes[step].to(tl.int8, bitcast=True).to(tl.int32) << 20, BFLOAT16)
        v0, v4 = halves(p0, scale, BFLOAT16)
        v1, v5 = halves(p1, scale, BFLOAT16)
        v2, v6 = halves(p2, scale, BFLOAT16)
        v3, v7 = halves(p3, scale, BFLOAT16)
        even = tl.join(tl.join(v0, v4), tl.join(v2, v6))
        odd = tl.join(tl.join(v1, v5), tl.join(v3, v7))
        values = tl.reshape(tl.join(even, odd), (WORDS, 8)).to(tl.float32) * rest
        word = first + step * WORDS
        where = word[:, None] * 8 + tl.arange(0, 8)[None, :]
        values = values.to(result_ptr.dtype.element_ty)
        tl.store(result_ptr + where, values, mask=(word < words)[:, None])


def decode(
    packed: Tensor,
    block_scale: Tensor,
    result: Tensor,
    *,
    trusted: float | None = None,
    tensor_scale: Tensor | None = None,
    input_scale: Tensor | None = None,
) -> None:
    """Write codes * block scales into result, as `scalesweep_hf.ops.blocks.decode_blocks`.

    Args:
        packed: [..., K/2] uint8.
        block_scale: [..., K/16] float8_e4m3fn.
        result: [..., K] float32, bfloat16 or float16, contiguous.
        trusted: what a later step multiplies by on trust. Where that is not the product of the two
            scales, values are multiplied by what is missing, and no longer exact (nor finite in
            float16, where that is 24 or more).
        tensor_scale: [] float32, with trusted.
        input_scale: [] float32 or None, with trusted.
    """
    words = packed.numel() // 4
    scale = block_scale.contiguous().view(torch.uint8)
    tensor_scale = scale if tensor_scale is None else tensor_scale
    with torch.cuda.device_of(packed):  # Triton launches where the current device is
        _kernel[(triton.cdiv(words, WORDS * STEPS),)](
            in_words(packed, torch.int32),
            scale,
            tensor_scale,
            tensor_scale if input_scale is None else input_scale,
            result,
            words,
            1.0 if trusted is None else trusted,
            EXACT=trusted is None,
            SCALES_INPUT=input_scale is not None,
            WORDS=WORDS,
            STEPS=STEPS,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )


def in_words(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the bytes of x as [..] dtype, contiguous, where words of it can be loaded."""
    x = x.contiguous().reshape(-1)  # one row may have any stride
    aligned = x if x.data_ptr() % dtype.itemsize == 0 else x.clone()
    return aligned.view(dtype)
