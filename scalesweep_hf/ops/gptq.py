"""GPTQ in its LDLQ form: round the columns of a weight one by one, each for what the others lost.

With H = X^T X of a Linear's inputs X, the squared error of its output is ``tr(E H E^T)`` for the
weight error E. Columns are taken in descending order of the diagonal of H; H = U D U^T with U unit
upper triangular in that order, and the column k of the quantized weight is the rounding of ``w_k +
sum_{j before k} (w_j - q_j) U_jk`` (arXiv 2210.17323; the equivalent LDLQ form: arXiv 2307.13304).
Block scales are chosen before and stay fixed.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from scalesweep_hf.ops import e2m1, e4m3
from scalesweep_hf.ops.blocks import pack
from scalesweep_hf.ops.nvfp4 import NVFP4Tensor
from scalesweep_hf.ops.sweep import BLOCK

# Columns whose corrections are applied to each other at once and to all others by one product.
COLUMNS = 128
# Rows of a Hessian that are permuted at a time.
ROWS = 1024
# Elements of the weight worked on at a time, six bytes each (ten in float64) beside the weight.
ELEMENTS = 1 << 26


@dataclass(frozen=True)
class Factor:
    """A factorized Hessian: ``H[order][:, order] + damping * mean(diag H) = M D M^T``.

    Attributes:
        order: [K] int64 channels by ascending diagonal of H; columns are quantized from the last.
        lower: [K, K] unit lower triangular M.
        pivots: [K] diagonal of D, in this order.
        damping: what it took to make H positive definite, in units of its mean diagonal.
    """

    order: Tensor
    lower: Tensor
    pivots: Tensor
    damping: float


def factorize(
    hessian: Tensor,
    *,
    damping: float = 0.01,
    dtype: torch.dtype = torch.float32,
    order: Tensor | None = None,
) -> Factor:
    """Factorize a Hessian once for all the weights that read one input.

    Channels that were always zero get a diagonal of 1, which couples them to nothing. Where the
    factorization fails, damping is raised tenfold, up to 1.

    Args:
        hessian: [K, K] floating, symmetric and positive semidefinite, X^T X in any unit.
        damping: added to the diagonal, in units of its mean; 0 < damping <= 1.
        dtype: torch.float32 or torch.float64, of the factorization and what follows from it.
        order: [K] another order of the channels; None is by ascending diagonal.

    Returns:
        The factor, on the device of hessian.

    Raises:
        ValueError: a shape or the damping is not as above, or the Hessian is zero, not finite, or
            not positive definite even with damping 1.
    """
    if hessian.ndim != 2 or hessian.shape[0] != hessian.shape[1]:
        raise ValueError(f"hessian has shape {list(hessian.shape)}; expected [K, K]")
    if not 0 < damping <= 1:
        raise ValueError(f"damping is {damping!r}; it must be > 0 and <= 1")
    diagonal = hessian.diagonal().to(dtype)
    mean = diagonal.mean()
    if not torch.isfinite(torch.stack(hessian.aminmax())).all():
        raise ValueError("Hessian is not finite: the layer's inputs overflowed in calibration")
    if not mean > 0:
        raise ValueError(
            "Hessian is zero: the layer's inputs were all zero in calibration; add it to "
            "modules_to_not_convert, or use other text"
        )
    alive = torch.where(diagonal == 0, torch.ones_like(diagonal), diagonal)
    order = diagonal.argsort(stable=True) if order is None else order
    failed = torch.empty((), dtype=torch.int32, device=hessian.device)
    while True:
        # Transposed, it has the strides that LAPACK wants: the factor takes its place.
        lower = _permute(hessian, order, dtype).T
        lower.diagonal().copy_(alive[order] + damping * mean)
        torch.linalg.cholesky_ex(lower, out=(lower, failed))
        if not failed:
            break
        if damping >= 1:
            raise ValueError(
                "Hessian not positive definite after damping 1: add calibration text, or use "
                "algorithm 'rtn' for this layer"
            )
        damping = min(damping * 10, 1.0)
    roots = lower.diagonal().clone()
    lower /= roots
    return Factor(order, lower, roots * roots, damping)


def _permute(matrix: Tensor, order: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``matrix[order][:, order]``, some rows at a time.

    (Indexing both dimensions at once makes two int64 matrices of this size on CUDA.)
    """
    result = torch.empty(matrix.shape, dtype=dtype, device=matrix.device)
    for rows, part in zip(result.split(ROWS), order.split(ROWS), strict=True):
        rows.copy_(matrix[part].index_select(1, order))
    return result


def quantize_gptq(weight: Tensor, start: NVFP4Tensor, factor: Factor) -> NVFP4Tensor:
    """Round a weight to the scales of a quantized one, minimising the output error.

    With H = I this gives the codes of rounding to nearest, to the bit.

    Args:
        weight: [N, K] floating, finite; not changed.
        start: [N, K] on the same device: block scales and tensor scale are taken from it.
        factor: of the Hessian of the Linear's inputs, on the same device.

    Returns:
        New codes with start's scales.

    Raises:
        ValueError: a shape does not fit.
    """
    if weight.shape != start.shape or weight.shape[-1:] != factor.order.shape:
        raise ValueError(
            f"weight {list(weight.shape)}, its quantized start {list(start.shape)} and the Hessian "
            f"of {factor.order.numel()} channels do not fit"
        )
    packed = torch.empty_like(start.packed)
    step = max(ELEMENTS // weight.shape[-1], 1)
    for first in range(0, weight.shape[0], step):
        rows = slice(first, first + step)
        codes = _ldlq(weight[rows], start.tensor_scale, start.block_scale[rows], factor)
        packed[rows] = pack(codes)
    return NVFP4Tensor(packed, start.block_scale, start.tensor_scale)


def _ldlq(weight: Tensor, tensor_scale: Tensor, block_scale: Tensor, factor: Factor) -> Tensor:
    """Return the codes [N, K] uint8 of a weight [N, K]."""
    order, lower = factor.order, factor.lower
    # [K, N]: the scaled weight, from which each column takes its rounding.
    error = (weight.T[order].to(torch.float32) / tensor_scale).to(lower.dtype)
    codes = torch.empty_like(error, dtype=torch.uint8)
    scale = block_scale.T.view(torch.uint8)  # [G, N]
    for stop in range(order.numel(), 0, -COLUMNS):
        part = slice(max(stop - COLUMNS, 0), stop)
        target = torch.addmm(error[part], lower[stop:, part].T, error[stop:])  # [C, N]
        scales = e4m3.decode(scale[order[part] // BLOCK]).to(lower.dtype)  # [C, N]
        coupled = lower[part, part]
        values = torch.empty_like(target)
        for k in reversed(range(len(target))):
            values[k] = e2m1.round_to_e2m1(target[k] / scales[k])
            error[part][k] -= values[k] * scales[k]
            target[:k].addr_(coupled[k, :k], error[part][k])
        codes[order[part]] = e2m1.encode(values)
    return codes.T
