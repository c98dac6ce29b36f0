"""E4M3 and E2M1 in Triton: the arithmetic of `scalesweep_hf.ops.e4m3` and `ops.e2m1`, bit for bit.

Float32 throughout, on every GPU from Ampere on: conversions that only newer hardware has are done
with integers. Kernels that use these are launched with ``enable_fp_fusion=False``.
"""

import triton
import triton.language as tl
from triton import knobs

# Triton's interpreter runs kernels on a CPU; its fused multiply-add rounds twice.
INTERPRETED = knobs.runtime.interpret
FUSED = tl.constexpr(not INTERPRETED)
ALL = tl.constexpr(tl.PropagateNan.ALL)
FAR = tl.constexpr(2.0**20)  # scalesweep_hf.ops.blocks.FAR


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
    x = tl.minimum(tl.abs(x) * unit, scale * (2.0 * FAR), propagate_nan=ALL)
    if FUSED:
        y = x * inverse
        y = tl.fma(tl.fma(y, -scale, x), inverse, y)
        y = tl.fma(tl.fma(y, -scale, x), inverse, y)
    else:
        y = tl.div_rn(x, scale + x * 0.0)
    return tl.minimum(y, FAR, propagate_nan=ALL)


@triton.jit
def round_quotient(x, scale, inverse):
    """Return round_e2m1(x / scale) for x >= 0 and an E4M3 scale; inverse is about 1 / scale.

    The quotient gets one correction by its exact remainder. It then lies on the same side of every
    midpoint of E2M1 as the IEEE quotient, or on it, because x / scale is on a midpoint or at least
    2**-24 of its size away: scale has four significant bits, x 24. NaN gives any value.
    """
    if FUSED:
        y = x * inverse
        y = tl.fma(tl.fma(y, -scale, x), inverse, y)
    else:
        y = tl.div_rn(x, scale + x * 0.0)
    y = tl.minimum(y, 6.0)
    # Adding and subtracting 1.5 * 2**22 * 2**e rounds to multiples of 2**(e - 1), ties to even.
    power = (y.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    shift = tl.maximum(power, 1.0) * 6291456.0
    return (y + shift) - shift


@triton.jit
def encode(value, x):
    """Return the code 0...15 of an E2M1 magnitude with the sign of x; one zero; int32.

    Args:
        value: from `round_quotient`; any where x is NaN, which gives 0.
        x: what was rounded, float32.
    """
    large = (value.to(tl.int32, bitcast=True) >> 22) - 252
    index = tl.where(value < 1.0, (value * 2.0).to(tl.int32), large)
    code = tl.where((x < 0.0) & (index > 0), index + 8, index)
    return tl.where(x == x, code, 0)
