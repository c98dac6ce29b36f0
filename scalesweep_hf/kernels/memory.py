"""Blocks of 16 from and to memory: each is 16 columns [ROWS], in the registers of one thread."""

import triton
import triton.language as tl

from scalesweep_hf.kernels.fp4 import round_eight, round_two
from scalesweep_hf.kernels.numbers import NAN, add_power, invert_near, quotient


@triton.jit
def load_blocks(ptr, block, mask, AGAIN=False):
    """Load blocks [ROWS] of 16 floats, 16 bytes at a time, as a tuple of 16 [ROWS] float32.

    Args:
        ptr: to blocks of 16 floats.
        block: [ROWS].
        mask: [ROWS].
        AGAIN: whether to load what was loaded before: the same load would be dropped, and what it
            brought kept in registers.
    """
    CACHE: tl.constexpr = ".ca" if AGAIN else ""
    LOADS: tl.constexpr = ptr.dtype.element_ty.primitive_bitwidth // 8
    pairs = ptr.to(tl.pointer_type(tl.int64)) + tl.arange(0, 2)
    pairs += block[:, None].to(tl.int64) * (2 * LOADS)
    words = ()
    for i in tl.static_range(LOADS):
        a, b = tl.split(tl.load(pairs + 2 * i, mask=mask[:, None], other=0, cache_modifier=CACHE))
        words = words + (a.to(tl.int32), (a >> 32).to(tl.int32))
        words = words + (b.to(tl.int32), (b >> 32).to(tl.int32))
    result = ()
    for i in tl.static_range(4 * LOADS):
        if ptr.dtype.element_ty == tl.float32:
            result = result + (words[i].to(tl.float32, bitcast=True),)
        elif ptr.dtype.element_ty == tl.bfloat16:
            low = (words[i] << 16).to(tl.float32, bitcast=True)
            high = (words[i] & -65536).to(tl.float32, bitcast=True)
            result = result + (low, high)
        else:
            low = words[i].to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            high = (words[i] >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            result = result + (low, high)
    return result


@triton.jit
def store_codes(ptr, x, a, scale, block, mask, CLIPS: tl.constexpr, FP4: tl.constexpr):
    """Store blocks of 16 codes as eight bytes each, one zero among the codes.

    Args:
        ptr: to [blocks, 8] uint8.
        x: tuple of 16 [ROWS], of which only signs count.
        a: likewise the magnitudes, no NaN.
        scale: [ROWS] in their unit.
        block: [ROWS].
        mask: [ROWS].
        CLIPS: whether a / scale may be 7 or more.
        FP4: whether the device converts to E2M1.
    """
    inverse = invert_near(scale)
    rest = tl.fma(inverse, -scale, 1.0) * inverse
    words = ()
    for half in tl.static_range(2):
        y = ()
        for i in tl.static_range(8 * half, 8 * half + 8):
            y = y + (quotient(a[i], scale, inverse, rest),)
        if FP4:
            signed = ()
            for i in tl.static_range(8):
                signed = signed + (_with_sign(y[i], x[8 * half + i]),)
            word = round_eight(signed)
        else:
            word = tl.zeros(scale.shape, tl.uint32)
            for i in tl.static_range(7, -1, -1):
                word = (word << 4) | (_code(y[i], x[8 * half + i], CLIPS) >> 28)
        # A sign stays where its index, the lower three bits, is not zero.
        index = word & 0x77777777
        words = words + (index | (word & (index + 0x77777777) & 0x88888888),)
    both = (words[1].to(tl.uint64) << 32) | words[0].to(tl.uint64)
    tl.store(ptr.to(tl.pointer_type(tl.uint64)) + block, both, mask=mask)


@triton.jit
def _with_sign(y, x):
    """Return y >= 0 with the sign of x."""
    bits = y.to(tl.int32, bitcast=True) | (x.to(tl.int32, bitcast=True) & -0x80000000)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _code(y, x, CLIPS: tl.constexpr):
    """Return the code of E2M1 nearest to y >= 0, with the sign of x, in the upper four bits."""
    if CLIPS:
        y = tl.minimum(y, 6.0)
    # y + 2**e (2**22 + 3) has exponent 149 + e and lower bits 6 + 2 y / 2**e. The index is
    # 2 e + 2 y / 2**e: this product has it in its upper four bits, modulo 16.
    _, shifted = add_power(y, 4194307.0)
    index = shifted.to(tl.uint32, bitcast=True) * 0x10000040
    return index | (x.to(tl.uint32, bitcast=True) & 0x80000000)


@triton.jit
def store_values(ptr, x, a, scale, value, block, mask, CLIPS: tl.constexpr, FP4: tl.constexpr):
    """Store blocks of 16 values in bfloat16, without negative zeros.

    Args:
        ptr: to [blocks, 16] bfloat16.
        x: as in `store_codes`.
        a: likewise; NaN stays.
        scale: likewise.
        value: [ROWS], what one is to become.
        block: likewise.
        mask: likewise.
        CLIPS: likewise.
        FP4: likewise.
    """
    inverse = invert_near(scale)
    rest = tl.fma(inverse, -scale, 1.0) * inverse
    pairs = ptr.to(tl.pointer_type(tl.int64)) + block[:, None].to(tl.int64) * 4 + tl.arange(0, 2)
    for half in tl.static_range(2):
        words = ()
        for i in tl.static_range(8 * half, 8 * half + 8, 2):
            y = quotient(a[i], scale, inverse, rest)
            z = quotient(a[i + 1], scale, inverse, rest)
            if FP4:
                first, second = round_two(y, z)
            else:
                first, second = _round(y, CLIPS), _round(z, CLIPS)
            # -0 + 0 is 0, NaN * 0 is NaN, and all else exact.
            first = tl.fma(first, _with_sign(value, x[i]), y * 0.0 if FP4 else 0.0)
            second = tl.fma(second, _with_sign(value, x[i + 1]), z * 0.0 if FP4 else 0.0)
            words = words + (_upper_halves(first, second).to(tl.int64),)
        low = (words[0] & 0xFFFFFFFF) | (words[1] << 32)
        high = (words[2] & 0xFFFFFFFF) | (words[3] << 32)
        tl.store(pairs + 2 * half, tl.join(low, high), mask=mask[:, None])


@triton.jit
def _round(y, CLIPS: tl.constexpr):
    """Return round_e2m1(y) for y >= 0; NaN stays."""
    if CLIPS:
        y = tl.minimum(y, 6.0, propagate_nan=NAN)
    power, shifted = add_power(y, 4194304.0)
    return tl.fma(power, -4194304.0, shifted)


@triton.jit
def _upper_halves(a, b):
    """Return the upper halves of two float32 as one int32, a in the lower half."""
    return ((a.to(tl.int32, bitcast=True) >> 16) & 0xFFFF) | (b.to(tl.int32, bitcast=True) & -65536)
