"""E4M3 and E2M1 in Triton: the arithmetic of `scalesweep_hf.ops.e4m3` and `ops.e2m1`, bit for bit.

Float32 throughout, on every GPU from Ampere on: conversions that only newer hardware has are done
with integers. Kernels that use these are launched with ``enable_fp_fusion=False``.
"""

import triton
import triton.language as tl
from triton import knobs

from scalesweep_hf.ops import blocks

# Triton's interpreter runs kernels on a CPU; its fused multiply-add rounds twice.
INTERPRETED = knobs.runtime.interpret
FUSED = tl.constexpr(not INTERPRETED)
ALL = tl.constexpr(tl.PropagateNan.ALL)
FAR = tl.constexpr(blocks.FAR)


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
def invert(scale):
    """Return 1 / scale for an E4M3 scale, correctly rounded."""
    inverse = 1.0 / scale  # within two units; one exact remainder mends it
    if FUSED:
        return tl.fma(tl.fma(inverse, -scale, 1.0), inverse, inverse)
    return inverse


@triton.jit
def rounding_error(x, scale, inverse, CLIPS: tl.constexpr):
    """Return x - scale * round_e2m1(x / scale), but for its sign where x / scale is a midpoint.

    x * inverse, fused with the addition that rounds it, is on the same side of every midpoint of
    E2M1 as x / scale is, for all float32 x and E4M3 scales: tests/kernels enumerates the
    neighbours of all midpoints. On a midpoint the errors on both sides are equal.

    Args:
        x: float32, >= 0.
        scale: an E4M3 number.
        inverse: from `invert`.
        CLIPS: whether x / scale may be 7 or more.
    """
    y = x * (inverse * 4194304.0)  # times 2**22
    # 2**22 * 2**e: adding and subtracting it rounds to multiples of 2**(e - 1).
    bits = tl.maximum(y, 4194304.0).to(tl.int32, bitcast=True) & 0x7F800000
    shift = bits.to(tl.float32, bitcast=True)
    if FUSED:
        rounded = tl.fma(x, inverse, shift) - shift
    else:
        rounded = (tl.div_rn(x, scale + x * 0.0) + shift) - shift
    if CLIPS:
        rounded = tl.minimum(rounded, 6.0)
    return tl.fma(rounded, -scale, x)  # the product is exact: fusing changes nothing


@triton.jit
def round_to_index(x, scale, inverse):
    """Return the index 0...7 of round_e2m1(x / scale), ties to even, int32; 0 where x is NaN.

    The quotient gets one correction by its exact remainder. It then lies on the same side of every
    midpoint as the IEEE quotient, or on it, because x / scale is on a midpoint or at least 2**-24
    of its size away: scale has four significant bits, x 24.

    Args:
        x: float32, >= 0.
        scale: an E4M3 number.
        inverse: from `invert`.
    """
    if FUSED:
        y = x * inverse
        y = tl.fma(tl.fma(y, -scale, x), inverse, y)
    else:
        y = tl.div_rn(x, scale + x * 0.0)
    y = tl.minimum(tl.maximum(y, 0.0), 6.0)  # takes NaN to 0
    power = tl.maximum(y, 1.0).to(tl.int32, bitcast=True) & 0x7F800000
    shift = power + 0x0B000000  # times 2**22
    rounded = (y + shift.to(tl.float32, bitcast=True)).to(tl.int32, bitcast=True)
    return (rounded - shift) + ((power >> 22) - 254)  # multiples of the step, and steps before


@triton.jit
def value_of(index):
    """Return the E2M1 magnitude of an index 0...7, float32."""
    large = ((index + 252) << 22).to(tl.float32, bitcast=True)
    return tl.where(index < 2, index.to(tl.float32) * 0.5, large)
