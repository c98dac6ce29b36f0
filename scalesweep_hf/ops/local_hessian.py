"""The local-Hessian sweep: block scales by the error they cause in a layer's output.

The output error of a Linear with inputs X is ``tr(E H E^T)`` with ``H = X^T X`` and E the weight
error. "wmse" keeps the diagonal of H; this keeps the couplings inside each block of 16 channels.
"""

import torch
from torch import Tensor

from scalesweep_hf.ops import e2m1, e4m3
from scalesweep_hf.ops.sweep import (
    BLOCK,
    SweepResult,
    Window,
    absmax_codes,
    check_window,
    divide_by_exponent,
    sum_left_to_right,
    sweep_window,
    to_rows,
)

# The window bounds of the squared error do not hold for coupled errors; these offsets from q0 lost
# nothing on real layers against all codes.
BOUNDED = (-16, 9)


def sweep_local_hessian(
    x: Tensor, local_hessian: Tensor, *, window: Window = "bounded"
) -> SweepResult:
    """Choose, for every block, the E4M3 scale of least output error ``e^T H_b e``.

    With e = x - s * round_e2m1(x / s). The loss is summed in float32 without fused multiply-add:
    first ``H_ii * (e_i * e_i)`` left to right, as "wmse" does, then for i = 1...15
    ``e_i * (sum_{j<i} (2 H_ij) * e_j)``, both sums left to right. So a diagonal H gives the result
    of "wmse" to the bit. Ties go to the smaller scale.

    Args:
        x: [..., G, 16] float32, finite, already divided by the tensor scale.
        local_hessian: [G, 16, 16] float32, finite, symmetric and positive semidefinite: the
            diagonal blocks of X^T X. A block of zeros counts as the identity.
        window: "bounded" tries offsets -16...9 from q0, "exact" all 126 codes, ``(low, high)``
            these offsets.

    Returns:
        The winning codes, and their losses in units of (x / tensor_scale)**2 times the rescaled H
        (`normalize_local_hessian`).

    Raises:
        ValueError: a shape or the window is not as above.
    """
    if x.ndim < 2 or x.shape[-1] != BLOCK:
        raise ValueError(
            f"x has shape {list(x.shape)}; expected [..., G, {BLOCK}]: reshape it into blocks"
        )
    if local_hessian.shape != (x.shape[-2], BLOCK, BLOCK):
        raise ValueError(
            f"local_hessian has shape {list(local_hessian.shape)}; expected "
            f"{[x.shape[-2], BLOCK, BLOCK]} for x of shape {list(x.shape)}"
        )
    rows = to_rows(x, x.ndim)  # [16, ..., G]
    couplings = normalize_local_hessian(local_hessian).movedim(0, -1)  # [16, 16, G]
    code = absmax_codes(x).to(torch.int16)  # [..., G]
    low, high = BOUNDED
    if window == "exact":
        code, low, high = torch.zeros_like(code), e4m3.MIN_CODE, e4m3.MAX_CODE
    elif window != "bounded":
        low, high = check_window(window)
    return sweep_window(
        lambda scale: _coupled_loss(rows, couplings, scale), code + low, code + high, high - low
    )


def normalize_local_hessian(local_hessian: Tensor) -> Tensor:
    """Scale every block by a power of two, exactly, to a largest diagonal entry in [0.5, 1).

    Args:
        local_hessian: [G, 16, 16] float32.

    Returns:
        [G, 16, 16] float32; the identity in place of a block whose diagonal is zero.
    """
    largest = local_hessian.diagonal(dim1=-2, dim2=-1).amax(-1)[:, None, None]  # [G, 1, 1]
    scaled = divide_by_exponent(local_hessian, largest)
    return torch.where(largest > 0, scaled, torch.eye(BLOCK, device=scaled.device))


def _coupled_loss(rows: Tensor, couplings: Tensor, scale: Tensor) -> Tensor:
    """Return e^T H_b e for every block, [..., G]; see `sweep_local_hessian` for the order."""
    error = rows - e2m1.round_to_e2m1(rows / scale) * scale  # [16, ..., G]
    own = couplings.diagonal().movedim(-1, 0)  # [16, G]
    own = own.reshape(BLOCK, *(1,) * (rows.ndim - 2), -1)
    total = sum_left_to_right(own * (error * error))
    for i in range(1, BLOCK):
        double = 2.0 * couplings[i]
        total += error[i] * sum_left_to_right([double[j] * error[j] for j in range(i)])
    return total
