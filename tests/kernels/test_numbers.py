"""The short divisions of `kernels.numbers` are right for every operand that they may get."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from scalesweep_hf.ops import e2m1

numba = pytest.importorskip("numba", reason="numba is not installed")
cpu_loops: Any = pytest.importorskip("scalesweep_hf.kernels.cpu_loops", exc_type=ImportError)
fma, f32 = cpu_loops.fma, np.float32


@numba.njit  # type: ignore[untyped-decorator]
def wrong_quotients(significands: Any, error: float) -> int:
    """Count where `magnitude_near` is wrong, all significands of scale; error is the inverse's."""
    wrong = 0
    for bits in range(1 << 23):
        scale = f32(1.0) + f32(bits) * f32(2.0**-23)
        inverse = f32(1.0) / scale + f32(error)
        for x in significands:
            y = x * inverse
            y = fma(fma(y, -scale, x), inverse, y)
            if y != x / scale:
                wrong += 1
    return wrong


@numba.njit  # type: ignore[untyped-decorator]
def wrong_sixths() -> int:
    """Count where `sixth_near` is wrong, for all significands."""
    wrong = 0
    sixth = f32(1.0 / 6.0)
    for bits in range(1 << 23):
        x = f32(1.0) + f32(bits) * f32(2.0**-23)
        y = x * sixth
        if fma(fma(y, f32(-6.0), x), sixth, y) != x / f32(6.0):
            wrong += 1
    return wrong


@pytest.mark.parametrize("bits", [8, 11])
def test_one_correction_divides_what_bfloat16_and_float16_hold(bits: int) -> None:
    assert wrong_quotients(significands(bits), 0.0) == 0


def test_the_inverse_has_to_be_rounded_correctly() -> None:
    assert wrong_quotients(significands(8), 2.0**-24) > 0


def test_one_correction_divides_by_six() -> None:
    assert wrong_sixths() == 0


def significands(bits: int) -> Any:
    half = 1 << (bits - 1)
    return (np.arange(half, 2 * half) / half).astype(f32)


def rounded(x: Fraction) -> Fraction:
    """Round to 24 bits, ties to even: float32 without its ends."""
    if x == 0:
        return x
    exponent = x.numerator.bit_length() - x.denominator.bit_length()
    while Fraction(2) ** exponent > abs(x):
        exponent -= 1
    ulp = Fraction(2) ** (exponent - 23)
    return round(x / ulp) * ulp


def test_quotients_lie_to_every_midpoint_as_they_should() -> None:
    """What `numbers.quotient` rests on, for all mantissas of a scale."""
    for mantissa in range(8, 16):
        scale = Fraction(mantissa, 8)
        inverse = rounded(1 / scale)
        rest = rounded(rounded(1 - inverse * scale) * inverse)
        for midpoint in map(Fraction, e2m1.MIDPOINTS):
            tie = torch.tensor(float(midpoint * scale))
            for end, side in ((0.0, -1), (float(tie), 0), (float("inf"), 1)):
                x = Fraction(float(torch.nextafter(tie, torch.tensor(end))))
                y = rounded(x * inverse + rounded(x * rest))
                assert (y > midpoint) - (y < midpoint) == side
