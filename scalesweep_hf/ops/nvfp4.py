"""NVFP4 tensors: two codes a byte, an E4M3 scale per 16 elements, a float32 scale per tensor."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from scalesweep_hf.ops import e2m1, e4m3
from scalesweep_hf.ops.blocks import BACKENDS, chunk_size, row_slices
from scalesweep_hf.ops.objectives import OBJECTIVES, check_objective
from scalesweep_hf.ops.sweep import BLOCK, Window, check_window


@dataclass(frozen=True)
class NVFP4Tensor:
    """A tensor x = decode(codes) * block_scale * tensor_scale.

    Blocks are 16 elements of the last dimension.

    Attributes:
        packed: [..., K/2] uint8, two E2M1 codes a byte, the even element in the low nibble.
        block_scale: [..., K/16] float8_e4m3fn, multiplies towards the value.
        tensor_scale: [] float32, multiplies towards the value.
    """

    packed: Tensor
    block_scale: Tensor
    tensor_scale: Tensor

    @property
    def shape(self) -> torch.Size:
        """Shape [..., K] of the tensor that this represents."""
        return torch.Size((*self.packed.shape[:-1], 2 * self.packed.shape[-1]))

    @property
    def nbytes(self) -> int:
        """Bytes of all three parts."""
        return self.packed.nbytes + self.block_scale.nbytes + self.tensor_scale.nbytes

    def row_chunks(self, size: int | None = None) -> Iterator[tuple[slice, "NVFP4Tensor"]]:
        """Yield which rows of [R, K], and those rows, about size elements at a time.

        Args:
            size: elements; None takes what a sweep takes at a time.
        """
        packed = self.packed.reshape(-1, self.packed.shape[-1])
        scale = self.block_scale.reshape(-1, self.block_scale.shape[-1])
        size = size or chunk_size(packed.device)
        for part in row_slices(packed.shape[0], self.shape[-1], size):
            yield part, NVFP4Tensor(packed[part], scale[part], self.tensor_scale)

    def values(self, dtype: torch.dtype = torch.bfloat16, backend: str = "torch") -> Tensor:
        """Multiply codes by block scales only (`decode_blocks`).

        Returns:
            [..., K] dtype, in units of the tensor scale.
        """
        return BACKENDS[backend].decode_blocks(self.packed, self.block_scale, dtype)


def quantize(
    x: Tensor,
    *,
    objective: str = "mse",
    importance: Tensor | None = None,
    window: Window = "bounded",
    tensor_scale: Tensor | None = None,
    backend: str = "torch",
) -> NVFP4Tensor:
    """Quantize a tensor to NVFP4, choosing every block scale by the objective.

    The tensor scale S by `compute_tensor_scale`, everything else as `encode_blocks` does it. Works
    in chunks: beyond x and the result it needs a few MB on a CPU, under 200 MB on an accelerator.

    Args:
        x: [..., K] floating, finite, K divisible by 16; not changed.
        objective: "absmax", "four_over_six", "mse", "wmse" or "hessian".
        importance: required by "wmse": broadcastable to x, >= 0; only ratios inside a block matter.
            Required by "hessian": [K/16, 16, 16], the diagonal blocks of X^T X. Refused by the
            others.
        window: "bounded", "exact" or code offsets (low, high); see `sweep_scales`.
        tensor_scale: [] floating, > 0 in float32; None computes it from max|x|
            (`compute_tensor_scale`).
        backend: name of an implementation; all give the same bits.

    Returns:
        The packed tensor, on x's device.

    Raises:
        ValueError: shape, objective, importance or tensor scale is not as above, or x or importance
            has a NaN or an infinity.
    """
    check_objective(objective)
    if window not in ("bounded", "exact"):
        check_window(window)
    _check_blocks(x)
    amax = _checked_amax(x)
    importance = _check_importance(x, objective, importance)
    if tensor_scale is None:
        tensor_scale = compute_tensor_scale(amax, objective)
    tensor_scale = _check_tensor_scale(tensor_scale).to(x.device)
    packed, codes = BACKENDS[backend].encode_blocks(
        x, tensor_scale, objective=objective, importance=importance, window=window
    )
    return NVFP4Tensor(packed, codes.view(torch.float8_e4m3fn), tensor_scale)


def dequantize(tensor: NVFP4Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return decode(codes) * block_scale * tensor_scale (eq. 5).

    The product of the first two is exact; it is multiplied by the tensor scale in float32 and
    rounded once to dtype. Works in chunks, as `quantize`.

    Returns:
        [..., K] dtype.
    """
    result = torch.empty(tensor.shape, dtype=dtype, device=tensor.packed.device)
    rows = result.view(-1, tensor.shape[-1])
    for part, chunk in tensor.row_chunks():
        rows[part] = (chunk.values(torch.float32) * tensor.tensor_scale).to(dtype)
    return result


def compute_tensor_scale(amax: Tensor, objective: str) -> Tensor:
    """Compute S = max|x| / (range * 6), range 256 for the sweeps and 448 for AbsMax (eq. 14).

    Args:
        amax: [] the largest magnitude of the tensor, or of all tensors that share S.
        objective: as in `quantize`.

    Returns:
        [] float32; 1 where the tensor is zero or so small that S would underflow.
    """
    scale = e4m3.divide(amax.to(torch.float32), OBJECTIVES[objective].scale_range * e2m1.MAX)
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def largest_magnitude(x: Tensor) -> Tensor:
    """Return max|x| as [] float32 on x's device; 0 of nothing, NaN where x has one."""
    if not x.numel():
        return x.new_zeros((), dtype=torch.float32)
    low, high = x.detach().aminmax()  # one pass, no temporary
    return torch.maximum(-low, high).to(torch.float32)


def _check_blocks(x: Tensor) -> None:
    if not x.is_floating_point():
        raise ValueError(f"x has dtype {x.dtype}; expected a floating dtype")
    if x.ndim == 0 or x.shape[-1] == 0 or x.shape[-1] % BLOCK:
        raise ValueError(
            f"x has shape {list(x.shape)}; the last dimension must be a positive multiple of "
            f"{BLOCK}: pad it"
        )


def _checked_amax(x: Tensor) -> Tensor:
    amax = largest_magnitude(x)
    if not torch.isfinite(amax):
        raise ValueError(
            f"x has max|x| = {amax.item()} in float32; NVFP4 has no NaN or infinity: clean x first"
        )
    return amax


def _check_tensor_scale(tensor_scale: Tensor) -> Tensor:
    scale = tensor_scale.detach().to(torch.float32)
    if scale.numel() != 1 or not (torch.isfinite(scale) & (scale > 0)).all():
        raise ValueError(
            f"tensor_scale is {tensor_scale}; expected one finite number > 0 in float32"
        )
    return scale.reshape(())


def _check_importance(x: Tensor, objective: str, importance: Tensor | None) -> Tensor | None:
    """Check importance; return it as float32 [K], [R, K] or [K/16, 16, 16] on x's device."""
    kind = OBJECTIVES[objective]
    if importance is None:
        if kind.weighted or kind.coupled:
            raise ValueError(f"objective {objective!r} needs importance: pass it, or use 'mse'")
        return None
    if not (kind.weighted or kind.coupled):
        raise ValueError(f"objective {objective!r} does not use importance: drop it, or use 'wmse'")
    if kind.coupled:
        return _check_couplings(x, importance)
    try:
        shape = torch.broadcast_shapes(importance.shape, x.shape)
    except RuntimeError:
        shape = torch.Size()
    if shape != x.shape:
        raise ValueError(
            f"importance of shape {list(importance.shape)} does not broadcast to x {list(x.shape)}"
        )
    importance = importance.to(device=x.device, dtype=torch.float32)
    if not (torch.isfinite(importance) & (importance >= 0)).all():
        raise ValueError(
            "importance has a negative, NaN or infinite entry: it must be finite and >= 0"
        )
    if importance.shape[-1:] == (importance.numel(),) == x.shape[-1:]:
        return importance.reshape(-1)
    return importance.expand(x.shape).reshape(-1, x.shape[-1])


def _check_couplings(x: Tensor, importance: Tensor) -> Tensor:
    expected = (x.shape[-1] // BLOCK, BLOCK, BLOCK)
    if importance.shape != expected:
        raise ValueError(
            f"importance has shape {list(importance.shape)}; objective 'hessian' needs "
            f"{list(expected)}, the diagonal blocks of X^T X"
        )
    importance = importance.to(device=x.device, dtype=torch.float32)
    diagonal = importance.diagonal(dim1=-2, dim2=-1)
    if not (torch.isfinite(importance).all() and (diagonal >= 0).all()):
        raise ValueError("importance is not finite, or negative on its diagonal: X^T X is neither")
    return importance
