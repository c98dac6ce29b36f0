"""Oracles: the best scale that a block could have if scales were float32, and its E4M3 neighbours.

They bound from below what any choice of an E4M3 scale can reach, for reports and tests.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from scalesweep_hf.ops import e2m1, e4m3
from scalesweep_hf.ops.sweep import BLOCK, SweepResult, block_loss

# Blocks solved at a time: 113 pieces of 16 float64 elements each, a few arrays of that.
CHUNK = 1 << 12


@dataclass(frozen=True)
class OracleResult:
    """The optimal real scale of every block.

    Attributes:
        scale: [..., G] float32, >= 0; zero for a zero block.
        loss: [..., G] float32, eq. 2 at the optimum, computed in float64.
    """

    scale: Tensor
    loss: Tensor


def optimal_scales(x: Tensor, importance: Tensor | None = None) -> OracleResult:
    """Find the real scale of least weighted squared error, exactly.

    As s grows, an element's code changes where |x_i| / s crosses a midpoint of the grid, at most 7
    times; between these breakpoints the codes q are constant and the loss is a quadratic in s with
    its minimum at ``sum w x q / sum w q**2``. Each of the at most 7 * 16 + 1 pieces is solved in
    float64, its minimum clamped to the piece, and the best piece wins; ties go to the smaller
    scale.

    Args:
        x: [..., G, 16] float32, finite.
        importance: [16], [G, 16] or [..., G, 16] float32, finite and >= 0; None means 1.

    Returns:
        Scales and losses.

    Raises:
        ValueError: the last dimension is not 16.
    """
    if x.ndim < 1 or x.shape[-1] != BLOCK:
        raise ValueError(f"x has shape {list(x.shape)}; expected [..., G, {BLOCK}]")
    blocks = x.abs().to(torch.float64).reshape(-1, BLOCK)  # [B, 16]
    weight = torch.ones_like(x) if importance is None else importance.expand(x.shape)
    weights = weight.to(torch.float64).reshape(-1, BLOCK)
    parts = [
        _solve(block, w) for block, w in zip(blocks.split(CHUNK), weights.split(CHUNK), strict=True)
    ]
    scale, loss = (torch.cat(part).to(torch.float32) for part in zip(*parts, strict=True))
    return OracleResult(scale.reshape(x.shape[:-1]), loss.reshape(x.shape[:-1]))


def nearest_codes(x: Tensor, scale: Tensor, importance: Tensor | None = None) -> SweepResult:
    """Round optimal scales to the better of their two E4M3 neighbours.

    Args:
        x: [..., G, 16] float32.
        scale: [..., G] float32, from `optimal_scales`.
        importance: as in `optimal_scales`.

    Returns:
        [..., G] codes and losses; ties go to the smaller scale.
    """
    nearest = e4m3.encode_nearest(scale).to(torch.int16)
    below = torch.where(e4m3.decode(nearest.to(torch.uint8)) > scale, nearest - 1, nearest)
    low = below.clamp(min=e4m3.MIN_CODE).to(torch.uint8)
    high = (below + 1).clamp(e4m3.MIN_CODE, e4m3.MAX_CODE).to(torch.uint8)
    low_loss = block_loss(x, e4m3.decode(low), importance)
    high_loss = block_loss(x, e4m3.decode(high), importance)
    better = high_loss < low_loss
    return SweepResult(torch.where(better, high, low), torch.where(better, high_loss, low_loss))


def _solve(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Solve blocks x, w [B, 16] float64 piece by piece; return scales and losses [B]."""
    midpoints = torch.tensor(e2m1.MIDPOINTS, dtype=x.dtype, device=x.device)
    cuts = (x.unsqueeze(-1) / midpoints).flatten(1).sort(dim=-1).values  # [B, 112]
    first = torch.zeros_like(cuts[:, :1])
    low = torch.cat((first, cuts), dim=1)  # [B, P]
    high = torch.cat((cuts, 2 * cuts[:, -1:] + 1), dim=1)
    inside = ((low + high) / 2).unsqueeze(-1)  # [B, P, 1]
    # An empty piece at zero has no codes of its own; any positive divisor will do.
    codes = e2m1.round_magnitude(
        x.unsqueeze(1) / torch.where(inside > 0, inside, 1.0)
    )  # [B, P, 16]
    numerator = (w * x).unsqueeze(1).mul(codes).sum(-1)
    denominator = w.unsqueeze(1).mul(codes * codes).sum(-1)
    scale = torch.where(denominator > 0, numerator / denominator.clamp(min=1e-300), low)
    scale = scale.clamp(low, high)  # [B, P]
    error = x.unsqueeze(1) - scale.unsqueeze(-1) * codes  # [B, P, 16]
    loss, piece = (
        (w.unsqueeze(1) * error * error).sum(-1).min(dim=1)
    )  # the first, smallest, of equals
    return scale.gather(1, piece.unsqueeze(1)).squeeze(1), loss
