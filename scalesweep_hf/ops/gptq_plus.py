"""GPTQ with the block scales swept on the way, and a shifted target.

Two additions to `scalesweep_hf.ops.gptq`. The scale of a block is chosen when its turn comes, on
the weights as the columns before have changed them, by the loss that rounding the block column by
column then makes (`quantize_gptq_plus`). And before, the weight is moved towards the one that gives
the full-precision output from the inputs of the quantized model (`shift_weight`; in the spirit of
arXiv 2504.02692, which folds it into the rounding).
"""

import torch
from torch import Tensor

from scalesweep_hf.ops import e2m1, e4m3
from scalesweep_hf.ops.blocks import pack
from scalesweep_hf.ops.gptq import COLUMNS, ELEMENTS, Factor, factorize
from scalesweep_hf.ops.nvfp4 import NVFP4Tensor
from scalesweep_hf.ops.sweep import BLOCK, absmax_codes

# E4M3 code offsets tried from the AbsMax code of the changed block.
LOW, HIGH = -2, 6
# Share of the way to the full-precision output that the target moves, and the damping of that
# move: the whole way, or less damping, costs more on other text than it gains on this.
STRENGTH = 0.5
SHIFT_DAMPING = 0.1


def block_order(hessian: Tensor) -> Tensor:
    """Return channels [K] by ascending sum of the diagonal of H over their block, then by it."""
    diagonal = hessian.diagonal().unflatten(0, (-1, BLOCK))  # [G, 16]
    inside = diagonal.argsort(dim=1, stable=True)
    blocks = diagonal.sum(1).argsort(stable=True)
    order: Tensor = blocks[:, None] * BLOCK + inside[blocks]
    return order.flatten()


def shift_weight(
    weight: Tensor, hessian: Tensor, cross: Tensor, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Move a weight towards the one whose output on X is that of ``weight`` on the inputs X_0.

    ``W + STRENGTH * W (X_0 - X)^T X (X^T X + damping)^-1``, the ridge regression of the difference
    of the outputs.

    Args:
        weight: [N, K] floating.
        hessian: [K, K] X^T X, inputs of the quantized model.
        cross: [K, K] X_0^T X, with X_0 the inputs of the full-precision model on the same tokens.
        dtype: torch.float32 or torch.float64, of the regression.

    Returns:
        [N, K] float32.

    Raises:
        ValueError: as `factorize`.
    """
    factor = factorize(hessian, damping=SHIFT_DAMPING, dtype=dtype)
    w = weight.to(dtype)
    moved = w @ cross.to(dtype) - w @ hessian.to(dtype)  # [N, K]
    solved = torch.linalg.solve_triangular(factor.lower, moved.T[factor.order], upper=False)
    solved = solved / factor.pivots[:, None]
    solved = torch.linalg.solve_triangular(factor.lower.T, solved, upper=True, unitriangular=True)
    shift = torch.empty_like(moved)
    shift[:, factor.order] = solved.T
    return weight.to(torch.float32) + STRENGTH * shift.to(torch.float32)


def quantize_gptq_plus(weight: Tensor, tensor_scale: Tensor, factor: Factor) -> NVFP4Tensor:
    """Round a weight and choose its block scales, minimising the output error.

    Args:
        weight: [N, K] floating, finite; not changed.
        tensor_scale: [] float32 > 0.
        factor: of the Hessian [K, K] of the Linear's inputs, in the order of `block_order`.

    Returns:
        The packed weight.

    Raises:
        ValueError: a shape does not fit.
    """
    n, k = weight.shape
    if factor.order.shape != (k,):
        raise ValueError(f"weight {[n, k]} and {factor.order.numel()} channels do not fit")
    packed = weight.new_empty((n, k // 2), dtype=torch.uint8)
    block_scale = weight.new_empty((n, k // BLOCK), dtype=torch.uint8)
    step = max(ELEMENTS // k, 1)
    for first in range(0, n, step):
        rows = slice(first, first + step)
        x = (weight[rows].to(torch.float32) / tensor_scale).T.to(factor.lower.dtype)  # [K, n]
        values, scale = _sweeping_ldlq(x, factor)
        packed[rows] = pack(e2m1.encode(values).T)
        block_scale[rows] = scale.T
    return NVFP4Tensor(packed, block_scale.view(torch.float8_e4m3fn), tensor_scale)


def _sweeping_ldlq(x: Tensor, factor: Factor) -> tuple[Tensor, Tensor]:
    """Return E2M1 values [K, N] and scale codes [G, N] of x [K, N], in units of tensor_scale."""
    order, lower = factor.order, factor.lower
    error = x[order]  # [K, N]: x, from which each block takes its rounding
    values = torch.empty_like(x)
    codes = torch.empty(len(x) // BLOCK, x.shape[1], dtype=torch.uint8, device=x.device)
    for stop in range(len(x), 0, -COLUMNS):
        part = slice(max(stop - COLUMNS, 0), stop)
        target = torch.addmm(error[part], lower[stop:, part].T, error[stop:])  # [C, N]
        coupled = lower[part, part]
        for last in range(len(target), 0, -BLOCK):
            block = slice(last - BLOCK, last)
            where = order[part][block]
            x_block, pivots = error[part][block], factor.pivots[part][block]
            found, code = _sweep_block(x_block, target[block], coupled[block, block], pivots)
            values[where] = found
            codes[where[0] // BLOCK] = code
            error[part][block] -= found * e4m3.decode(code).to(x.dtype)
            target[: block.start].addmm_(coupled[block, : block.start].T, error[part][block])
    return values, codes


def _sweep_block(
    x: Tensor, target: Tensor, coupled: Tensor, pivots: Tensor
) -> tuple[Tensor, Tensor]:
    """Round one block with every candidate scale; return the best one's values and its code.

    The cost of a candidate is its part of tr(E H E^T), which is ``sum_k pivot_k (corrected_k -
    rounded_k)**2``.

    Args:
        x: [16, N] in the factor's order, what is rounded.
        target: [16, N] x with the corrections of the blocks before.
        coupled: [16, 16] the block of the unit lower triangle.
        pivots: [16].

    Returns:
        [16, N] E2M1 values and [N] uint8 codes.
    """
    base = absmax_codes(target.T[:, None].to(torch.float32)).T.to(torch.int16)  # [1, N]
    offsets = torch.arange(LOW, HIGH + 1, dtype=torch.int16, device=base.device)[:, None]
    codes = (base + offsets).clamp(e4m3.MIN_CODE, e4m3.MAX_CODE).to(torch.uint8)  # [S, N]
    scales = e4m3.decode(codes).to(target.dtype)
    corrected = target[:, None].repeat(1, len(codes), 1)  # [16, S, N]
    values = torch.empty_like(corrected)
    cost = torch.zeros_like(scales)
    for k in reversed(range(BLOCK)):
        values[k] = e2m1.round_to_e2m1(corrected[k] / scales)
        rounded = values[k] * scales
        cost += pivots[k] * (corrected[k] - rounded).square()
        corrected[:k] += coupled[k, :k, None, None] * (x[k] - rounded)
    best = cost.argmin(0, keepdim=True)  # [1, N]; the smaller scale of equals
    chosen = values.gather(1, best.expand(BLOCK, -1, -1))[:, 0]
    return chosen, codes.gather(0, best)[0]
