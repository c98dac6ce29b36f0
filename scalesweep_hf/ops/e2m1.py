"""The E2M1 element format: sign, two exponent bits, one mantissa bit; 15 distinct values, one zero.

The four-bit code is ``sign << 3 | index`` with the index into `MAGNITUDES` (method: arXiv
2606.07618, eq. 4).
"""

import torch
from torch import Tensor

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
VALUES = MAGNITUDES + tuple(-magnitude for magnitude in MAGNITUDES)
MAX = MAGNITUDES[-1]


def round_magnitude(magnitude: Tensor) -> Tensor:
    """Round non-negative values to the nearest E2M1 magnitude, ties to the even code.

    The grid is uniform in three stretches (step 0.5 below 2, 1 below 4, 2 above), and inside each
    the even codes are the even multiples of the step, so round-half-to-even decides every tie.

    Args:
        magnitude: [...] float32, >= 0. NaN stays NaN; infinity gives 6.

    Returns:
        [...] float32, elements of `MAGNITUDES`.
    """
    magnitude = magnitude.clamp(max=MAX)
    step = torch.where(magnitude < 2.0, 0.5, torch.where(magnitude < 4.0, 1.0, 2.0))
    return torch.round(magnitude / step) * step


def round_to_e2m1(x: Tensor) -> Tensor:
    """Round to the nearest E2M1 value: ``decode(encode(x))``, without the detour over codes.

    Args:
        x: [...] float32. NaN stays NaN; +-infinity gives +-6; whatever rounds to zero gives +0.0.

    Returns:
        [...] float32, elements of `VALUES`.
    """
    # Adding +0.0 turns -0.0 into +0.0: the format as we write it has one zero.
    return torch.copysign(round_magnitude(x.abs()), x) + 0.0


def encode(x: Tensor) -> Tensor:
    """Encode to the code of the nearest E2M1 value, ties to the even code, saturating at +-6.

    Args:
        x: [...] float32. -0.0 and negative values that round to zero give code 0. NaN has no code:
            it gives 7 or less, so callers check for it.

    Returns:
        [...] uint8 codes, one per byte, in 0...15 and never 8.
    """
    magnitude = x.abs()
    index = torch.zeros_like(x, dtype=torch.uint8)
    for i, midpoint in enumerate(MIDPOINTS):
        index += (magnitude > midpoint) if i % 2 == 0 else (magnitude >= midpoint)
    return index | (((x < 0) & (index > 0)).to(torch.uint8) << 3)


def decode(codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Decode four-bit codes to their values, exact in every floating dtype of 8 bits or more.

    Args:
        codes: [...] uint8, 0...15; code 8 decodes to -0.0.
        dtype: of the result.

    Returns:
        [...] dtype, elements of `VALUES`.
    """
    return torch.tensor(VALUES, dtype=dtype, device=codes.device)[codes.int()]
