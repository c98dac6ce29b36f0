"""The E4M3 scale format: the 126 positive finite codes that a block scale can have.

Codes are bit patterns of float8_e4m3fn, so neighbours differ by one and order is value order: code
1 is 2**-9, code 126 is 448. Code 127 is NaN and is never used; code 0 is zero and would erase its
block.
"""

import torch
from torch import Tensor

MIN_CODE = 1
MAX_CODE = 126
MIN = 2.0**-9
MAX = 448.0


def encode_nearest(x: Tensor) -> Tensor:
    """Encode to the nearest positive E4M3 code, ties to the even code, clamped to 1...126.

    Args:
        x: [...] float32, >= 0. NaN gives 126, so that a scale is always finite and positive.

    Returns:
        [...] uint8 codes.
    """
    codes = x.clamp(MIN, MAX).to(torch.float8_e4m3fn).view(torch.uint8)
    return codes.clamp(max=MAX_CODE)


def divide(x: Tensor, divisor: float) -> Tensor:
    """Divide by a number with one IEEE rounding on every device.

    CUDA turns ``x / 6.0`` into a multiplication by the rounded 1/6, which moves ties; a divisor
    that is a tensor it leaves alone.

    Args:
        x: [...] float32.
        divisor: not zero.

    Returns:
        [...] float32.
    """
    return x / torch.full_like(x, divisor)


def decode(codes: Tensor) -> Tensor:
    """Decode E4M3 bit patterns to float32, exactly.

    Args:
        codes: [...] uint8 bit patterns, or float8_e4m3fn; 127 and 255 give NaN.

    Returns:
        [...] float32.
    """
    return codes.view(torch.float8_e4m3fn).to(torch.float32)
