"""Operands of the tensor cores, one 32-bit register of every thread a tensor [T] int32.

T is 32 times the warps of a program, so that thread i of its warps has element i. With g = i // 4 %
8 and t = i % 4, and counting pairs of columns k, a product of 16 rows by 8 columns takes

- of the left factor the pairs t and t + 4 of rows g and g + 8: (g, t), (g + 8, t), (g, t + 4),
  (g + 8, t + 4);
- of the right factor the pairs t and t + 4 of column g;
- of sums, float32, row g of columns 2 t and 2 t + 1, and row g + 8 of both.

The interpreter has no assembler, and does the same with floats.
"""

import functools

import torch
import triton
import triton.language as tl

from scalesweep_hf.kernels.decoding import INTERPRETER, factor, pairs, scaled, widened

_PRODUCT = (
    "mma.sync.aligned.m16n8k16.row.col.f32.{0}.{0}.f32 "
    "{{$0, $1, $2, $3}}, {{$4, $5, $6, $7}}, {{$8, $9}}, {{$10, $11, $12, $13}};"
)
_PRODUCT_BFLOAT16 = tl.constexpr(_PRODUCT.format("bf16"))
_PRODUCT_FLOAT16 = tl.constexpr(_PRODUCT.format("f16"))
# What `factors` returns, of two codes in the lower half of $2: scales times 2**118, or 2**6.
_FACTORS_BFLOAT16 = tl.constexpr(
    """{
    .reg .b16 c, l, h;
    .reg .b32 both;
    .reg .f32 x, y;
    cvt.u16.u32 c, $2;
    cvt.rn.f16x2.e4m3x2 both, c;
    mov.b32 {l, h}, both;
    cvt.f32.f16 x, l;
    cvt.f32.f16 y, h;
    mul.rn.f32 x, x, 0f7A800000;
    mul.rn.f32 y, y, 0f7A800000;
    cvt.rn.bf16x2.f32 $0, x, x;
    cvt.rn.bf16x2.f32 $1, y, y;
    }"""
)
_FACTORS_FLOAT16 = tl.constexpr(
    """{
    .reg .b16 c;
    .reg .b32 both, p;
    cvt.u16.u32 c, $2;
    cvt.rn.f16x2.e4m3x2 both, c;
    mov.b32 p, 0x54005400;
    mul.rn.f16x2 both, both, p;
    prmt.b32 $0, both, both, 0x1010;
    prmt.b32 $1, both, both, 0x3232;
    }"""
)


@functools.cache
def converts_e4m3(device: torch.device) -> bool:
    """Whether a device converts from E4M3: from the generation after Ampere on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


@triton.jit
def weights(word, factor, BFLOAT16: tl.constexpr):
    """Return eight codes [T] int32 times `decoding.factor`, as `decoding.pairs`."""
    p0, p1, p2, p3 = pairs(word, BFLOAT16)
    first = scaled(p0, factor, BFLOAT16), scaled(p1, factor, BFLOAT16)
    return first + (scaled(p2, factor, BFLOAT16), scaled(p3, factor, BFLOAT16))


@triton.jit
def four(two):
    """Split [T, 2] int64, which are loaded as 16 bytes a thread, into four words [T] int32."""
    a, b = tl.split(two)
    return a.to(tl.int32), (a >> 32).to(tl.int32), b.to(tl.int32), (b >> 32).to(tl.int32)


@triton.jit
def eight(words):
    """Rearrange eight halves, four [T] int32, as `decoding.pairs`: (0, 4) (1, 5) (2, 6) (3, 7)."""
    a, b, c, d = words
    return _lower(a, c), _upper(a, c), _lower(b, d), _upper(b, d)


@triton.jit
def factors(codes, BFLOAT16: tl.constexpr, CONVERTS: tl.constexpr):
    """Return `decoding.factor` of two blocks.

    Args:
        codes: [T] int32, two E4M3 codes in the lower half; others may be anything.
        BFLOAT16: the format, else float16.
        CONVERTS: whether the device converts from E4M3.
    """
    if not CONVERTS:
        return factor((codes << 24) >> 4, BFLOAT16), factor((codes << 16) >> 4, BFLOAT16)
    else:
        ASSEMBLER: tl.constexpr = _FACTORS_BFLOAT16 if BFLOAT16 else _FACTORS_FLOAT16
        return tl.inline_asm_elementwise(
            ASSEMBLER,
            "=&r,=&r,r",
            [codes],
            dtype=(tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )


@triton.jit
def multiply_add(w0, w1, w2, w3, x0, x1, sums, BFLOAT16: tl.constexpr):
    """Return sums, four [T] float32, plus a product of 16 x 16 by 16 x 8 halves in every warp."""
    s0, s1, s2, s3 = sums
    if INTERPRETER:
        u0, u1 = _dot(w0, x0, w2, x1, BFLOAT16)
        u2, u3 = _dot(w1, x0, w3, x1, BFLOAT16)
        return s0 + u0, s1 + u1, s2 + u2, s3 + u3
    else:
        ASSEMBLER: tl.constexpr = _PRODUCT_BFLOAT16 if BFLOAT16 else _PRODUCT_FLOAT16
        return tl.inline_asm_elementwise(
            ASSEMBLER,
            "=f,=f,=f,=f,r,r,r,r,r,r,0,1,2,3",
            [w0, w1, w2, w3, x0, x1, s0, s1, s2, s3],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )


@triton.jit
def _lower(a, b):
    """Return the lower halves of a and, above them, of b."""
    if INTERPRETER:
        return (a & 0xFFFF) | (b << 16)
    else:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, 0x5410;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def _upper(a, b):
    """Return the upper halves of a and, above them, of b."""
    if INTERPRETER:
        return ((a >> 16) & 0xFFFF) | (b & -65536)
    else:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, 0x7632;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def _dot(w0, x0, w1, x1, BFLOAT16: tl.constexpr):
    """Return, interpreted, the sums over t of eight rows, for columns 2 t and 2 t + 1."""
    W: tl.constexpr = w0.shape[0] // 32
    total = tl.zeros((W, 8, 8, 4), tl.float32)
    for pair in tl.static_range(2):
        w, x = (w1, x1) if pair else (w0, x0)
        for half in tl.static_range(2):
            a = tl.reshape(widened(w >> (16 * half), BFLOAT16), (W, 8, 1, 4))
            b = tl.reshape(widened(x >> (16 * half), BFLOAT16), (W, 1, 8, 4))
            total += a * b
    even, odd = tl.split(tl.reshape(tl.sum(total, axis=3), (W, 8, 4, 2)))
    return tl.reshape(even, (32 * W,)), tl.reshape(odd, (32 * W,))
