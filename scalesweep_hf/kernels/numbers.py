"""E4M3 and E2M1 in Triton: the arithmetic of `scalesweep_hf.ops.e4m3` and `ops.e2m1`, bit for bit.

Float32 throughout, on every GPU from Ampere on: conversions that only newer hardware has are done
with integers. Kernels that use these are launched with ``enable_fp_fusion=False``.

Losses are compared with magnitudes in units of 2**10 tensor scales, and quotients in units of
2**126: one is then the smallest normal float32, and the E2M1 numbers are those with one bit after
the leading one, subnormal 0.5 included; their bits >> 22 are 0...7. With these units every factor
below is a normal float32. A power of two changes no rounding but that of subnormal numbers, which
`descent.has_no_specks` keeps away, or `kernels.rough` may ignore.
"""

import triton
import triton.language as tl
from triton import knobs

from scalesweep_hf.ops import blocks

# Triton's interpreter runs kernels on a CPU; its fused multiply-add rounds twice.
INTERPRETED = knobs.runtime.interpret
FUSED = tl.constexpr(not INTERPRETED)
NAN = tl.constexpr(tl.PropagateNan.ALL)
FAR = tl.constexpr(blocks.FAR)
MAGNITUDE = tl.constexpr(2.0**-10)  # the unit of magnitudes
SCALE = tl.constexpr(2.0**116)  # of scales beside them: a quotient is a product of 2**-126 of both
SIXTH = tl.constexpr(1 / 6)


@triton.jit
def encode_nearest(x):
    """Return the E4M3 code nearest to x >= 0, ties to even, 1...126, as int32; x is no NaN."""
    x = tl.minimum(tl.maximum(x, 0.001953125), 448.0)  # from 2**-9
    bits = x.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960  # exponent bias 127 to 7
    # Adding 1.5 * 2**23 rounds to an integer, which is then the low bits.
    subnormal = (x * 512.0 + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
    return tl.where(x < 0.015625, subnormal, normal)


@triton.jit
def decode(code):
    """Return the value of an E4M3 code 0...126, int32 to float32."""
    normal = ((code + 960) << 20).to(tl.float32, bitcast=True)
    return tl.where(code < 8, code.to(tl.float32) * 0.001953125, normal)


@triton.jit
def to_unit(scale):
    """Return the power of two that brings scale > 0 to [1, 2), or 2**126 where it is subnormal."""
    exponent = tl.maximum(scale.to(tl.int32, bitcast=True) >> 23, 1)
    return ((254 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def magnitude_over(x, unit, scale, inverse):
    """Return min(|x| / S, FAR), the division as IEEE does it; NaN stays.

    Args:
        x: float32.
        unit: `to_unit` of S.
        scale: S times unit.
        inverse: 1 / scale, correctly rounded.

    Two corrections by exact remainders round correctly where none of them underflows. That is below
    |x| / S = 2**-100, where x rounds to zero and its square is zero.
    """
    x = tl.minimum(tl.abs(x) * unit, scale * (2.0 * FAR), propagate_nan=NAN)
    if FUSED:
        y = x * inverse
        y = tl.fma(tl.fma(y, -scale, x), inverse, y)
        y = tl.fma(tl.fma(y, -scale, x), inverse, y)
    else:
        y = tl.div_rn(x, scale + x * 0.0)
    return tl.minimum(y, FAR, propagate_nan=NAN)


@triton.jit
def invert(scale):
    """Return 1 / scale for an E4M3 scale, correctly rounded."""
    inverse = 1.0 / scale  # within two units; one exact remainder mends it
    if FUSED:
        return tl.fma(tl.fma(inverse, -scale, 1.0), inverse, inverse)
    return inverse


@triton.jit
def rounding_error(x, scale, inverse):
    """Return x - scale * round_e2m1(x / scale), but for its sign where x / scale is a midpoint.

    x * inverse, fused with the addition that rounds it, is on the same side of every midpoint of
    E2M1 as x / scale is, for all float32 x and E4M3 scales: tests/kernels enumerates the
    neighbours of all midpoints. On a midpoint the errors on both sides are equal.

    Args:
        x: float32, >= 0.
        scale: an E4M3 number.
        inverse: from `invert`.
    """
    y = x * (inverse * 4194304.0)  # times 2**22
    # 2**22 * 2**e: adding and subtracting it rounds to multiples of 2**(e - 1).
    bits = tl.maximum(y, 4194304.0).to(tl.int32, bitcast=True) & 0x7F800000
    shift = bits.to(tl.float32, bitcast=True)
    if FUSED:
        rounded = tl.fma(x, inverse, shift) - shift
    else:
        rounded = (tl.div_rn(x, scale + x * 0.0) + shift) - shift
    return tl.fma(tl.minimum(rounded, 6.0), -scale, x)  # the product is exact: nothing is fused


@triton.jit
def code_scale(code):
    """Return the scale of a code 0...126 in units of 1 / SCALE: a normal float32."""
    normal = ((code + 1888) << 20).to(tl.float32, bitcast=True)  # exponent bias 7 to 127 + 116
    return tl.where(code < 8, code.to(tl.float32) * (SCALE * 2.0**-9), normal)


@triton.jit
def code_scale_normal(code):
    """Return `code_scale` of a code from 8 on."""
    return ((code + 1888) << 20).to(tl.float32, bitcast=True)


@triton.jit
def scale_below(scale):
    """Return `code_scale` of the next code down, 0 below that of code 1; nothing below 0."""
    # Both are right for codes 9 to 16; above, the first is less, and below, the second.
    normal = scale.to(tl.int32, bitcast=True) - 0x100000
    subnormal = (scale - SCALE * 2.0**-9).to(tl.int32, bitcast=True)
    return tl.minimum(normal, subnormal).to(tl.float32, bitcast=True)


@triton.jit
def magnitude_near(x, scale, inverse, TWICE: tl.constexpr):
    """Return x / scale, correctly rounded, where no remainder underflows; infinity gives NaN.

    One correction by an exact remainder is enough where x has at most 11 significant bits:
    tests/kernels divides all such x by all significands of scale. Two are for any x.

    Args:
        x: float32, >= 0.
        scale: float32.
        inverse: 1 / scale, correctly rounded.
        TWICE: whether x may have more than 11 significant bits.
    """
    if not FUSED:
        return tl.div_rn(x, scale + x * 0.0)
    y = x * inverse
    y = tl.fma(tl.fma(y, -scale, x), inverse, y)
    if TWICE:
        y = tl.fma(tl.fma(y, -scale, x), inverse, y)
    return y


@triton.jit
def sixth_near(x):
    """Return x / 6, correctly rounded (tests/kernels tries all significands), if it is normal."""
    if not FUSED:
        return tl.div_rn(x, 6.0)
    y = x * SIXTH
    return tl.fma(tl.fma(y, -6.0, x), SIXTH, y)


@triton.jit
def invert_near(scale):
    """Return 1 / scale, correctly rounded, for an E4M3 number times a power of two, normal both."""
    inverse = invert_rough(scale)
    if not FUSED:
        return inverse
    return tl.fma(tl.fma(inverse, -scale, 1.0), inverse, inverse)


@triton.jit
def invert_rough(x):
    """Return 1 / x within 2**-23 of it (PTX ISA, rcp.approx.ftz), where both are normal."""
    if not FUSED:
        return tl.div_rn(1.0, x)
    return tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def multiply_down(x, y):
    """Return x * y rounded toward zero, for x and y >= 0; the product may be subnormal."""
    if FUSED:
        return tl.inline_asm_elementwise(
            "mul.rz.f32 $0, $1, $2;", "=f,f,f", [x, y], dtype=tl.float32, is_pure=True, pack=1
        )
    product = x.to(tl.float64) * y.to(tl.float64)
    nearest = product.to(tl.float32)
    below = (nearest.to(tl.int32, bitcast=True) - 1).to(tl.float32, bitcast=True)
    return tl.where(nearest.to(tl.float64) > product, below, nearest)


@triton.jit
def add_half_step(bits, one):
    """Return bits + 2**21 as one multiply-add, which the busier of two pipes does not run.

    Additions and the bitwise AND that follows share a pipe of half the rate of floating point;
    multiply-adds have another. On an H200 sweeps are 5% faster for it.
    """
    if FUSED:
        return tl.inline_asm_elementwise(
            "mad.lo.s32 $0, $1, $2, 0x200000;",
            "=r,r,r",
            [bits, one],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    return bits * one + 0x200000


@triton.jit
def error_near(x, scale, inverse, one, CLIPS: tl.constexpr):
    """Return `rounding_error` in units of MAGNITUDE.

    A product rounded toward zero never reaches a midpoint from below, whatever its precision, and
    never falls below one from above; that x * inverse lies on the side of x / scale is what
    `rounding_error` rests on.

    Args:
        x: float32, >= 0, in units of MAGNITUDE.
        scale: from `code_scale`.
        inverse: from `invert_near`.
        one: int32, 1, but the compiler must not know it: see `add_half_step`.
        CLIPS: whether x / scale may be 7 or more.
    """
    return _error(x, scale, multiply_down(x, inverse), one, CLIPS)


@triton.jit
def error_rough(x, scale, inverse, one, CLIPS: tl.constexpr):
    """Return `error_near`, or close to a midpoint the error of the neighbour on its other side.

    Args:
        x: as in `error_near`.
        scale: likewise.
        inverse: from `invert_rough`.
        one: likewise.
        CLIPS: likewise.
    """
    return _error(x, scale, x * inverse, one, CLIPS)


@triton.jit
def _error(x, scale, quotient, one, CLIPS: tl.constexpr):
    """Return x - scale * quotient rounded to E2M1: half a step is added, and the rest cut off."""
    bits = quotient.to(tl.int32, bitcast=True)
    bits = tl.minimum(bits + 0x200000, 0x1FFFFFF) if CLIPS else add_half_step(bits, one)
    rounded = (bits & -0x400000).to(tl.float32, bitcast=True)
    return tl.fma(rounded, -scale, x)


@triton.jit
def quotient(x, scale, inverse, rest):
    """Return a number that lies to all midpoints of E2M1 as x / scale does; NaN stays.

    It equals a midpoint where x / scale does: tests/kernels enumerates their neighbours. Its error,
    2**-46 of it, is far less than the distance of the others.

    Args:
        x: float32, >= 0.
        scale: an E4M3 number times a power of two.
        inverse: 1 / scale, correctly rounded.
        rest: 1 / scale - inverse, rounded.
    """
    if FUSED:
        return tl.fma(x, inverse, x * rest)
    return tl.div_rn(x, scale + x * 0.0)


@triton.jit
def add_power(y, multiple):
    """Return p and y + p * multiple for p the power of two that is at most y, at least 1.

    With a multiple of 2**22 or a little more, the sum is rounded to a multiple of p / 2, ties to
    even: to E2M1, if y is at most 6.
    """
    power = tl.maximum(y, 1.0).to(tl.int32, bitcast=True) & 0x7F800000
    power = power.to(tl.float32, bitcast=True)
    return power, tl.fma(power, multiple, y)
