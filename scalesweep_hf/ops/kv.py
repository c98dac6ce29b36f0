"""Quantize keys, values and queries along head_dim, and store them packed.

A packed state is one row of bytes per token and head: head_dim / 2 bytes of codes, then head_dim /
16 bytes of block scales, 4.5 bits per element. Whatever a cache does with tokens (append, slide,
crop, reorder, offload), it does with these rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from scalesweep_hf.ops.blocks import BACKENDS
from scalesweep_hf.ops.nvfp4 import NVFP4Tensor, compute_tensor_scale
from scalesweep_hf.ops.sweep import BLOCK, Window

# Room that a codec without calibration leaves above the first states it sees: later ones may be
# this many times as large before they saturate. It costs precision only below 2**-14 of the
# largest.
UNCALIBRATED_HEADROOM = 16.0


@dataclass(frozen=True)
class StateCodec:
    """How states [B, H, T, D] of one kind in one layer are quantized.

    Attributes:
        tensor_scale: [] float32, static.
        objective: as in `quantize`.
        importance: [H, D] float32, >= 0, for "wmse"; None otherwise.
        window: as in `quantize`.
        backend: name of an implementation; all give the same bits.
    """

    tensor_scale: Tensor
    objective: str
    importance: Tensor | None = None
    window: Window = "bounded"
    backend: str = "torch"

    @classmethod
    def for_states(
        cls, x: Tensor, objective: str = "mse", *, backend: str = "torch"
    ) -> "StateCodec":
        """Make a codec without calibration from the first states [B, H, T, D] that it will see.

        Raises:
            ValueError: a state is NaN or infinite (not looked at while compiling).
        """
        amax = x.detach().abs().amax() if x.numel() else x.new_ones(())
        if not torch.compiler.is_compiling() and not torch.isfinite(amax):
            raise ValueError(
                f"the first states have max|x| = {amax.item()}, from which no scale follows"
            )
        scale = compute_tensor_scale(amax * UNCALIBRATED_HEADROOM, objective)
        return cls(scale, objective, backend=backend)

    def round(self, x: Tensor) -> Tensor:
        """Quantize and decode states: ``unpack(pack(x), x.dtype)`` without the bytes.

        Args:
            x: [B, H, T, D] floating, D divisible by 16. NaN stays NaN, infinity saturates.

        Returns:
            [B, H, T, D] in x's dtype.
        """
        values = BACKENDS[self.backend].round_blocks(
            _rows(x),
            self.tensor_scale.to(x.device),
            objective=self.objective,
            importance=self._channel_importance(x),
            window=self.window,
        )
        return _states(self._scaled(values, x.dtype), x.shape[1])

    def pack(self, x: Tensor) -> Tensor:
        """Quantize states to bytes.

        Args:
            x: [B, H, T, D] floating, D divisible by 16.

        Returns:
            [B, H, T, 9 D / 16] uint8.
        """
        packed, scale = BACKENDS[self.backend].encode_blocks(
            _rows(x),
            self.tensor_scale.to(x.device),
            objective=self.objective,
            importance=self._channel_importance(x),
            window=self.window,
        )
        heads = x.shape[1]
        return torch.cat((_states(packed, heads), _states(scale, heads)), dim=-1)

    def unpack(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Decode bytes to states: codes times block scale, exact, times tensor scale, rounded once.

        Args:
            rows: [B, H, T, 9 D / 16] uint8, from `pack`.
            dtype: of the result.

        Returns:
            [B, H, T, D] dtype.
        """
        half = rows.shape[-1] * 8 // 9  # D / 2
        scale = rows[..., half:].view(torch.float8_e4m3fn)
        tensor = NVFP4Tensor(rows[..., :half], scale, self.tensor_scale)
        return self._scaled(tensor.values(torch.float32, self.backend), dtype)

    def _scaled(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        return (values.to(torch.float32) * self.tensor_scale.to(values.device)).to(dtype)

    def _channel_importance(self, x: Tensor) -> Tensor | None:
        """Return importance as [H D], with key-value heads repeated for the queries they serve."""
        if self.importance is None:
            return None
        groups, rest = divmod(x.shape[1], self.importance.shape[0])
        assert groups
        assert rest == 0
        return self.importance.to(x.device).repeat_interleave(groups, dim=0).flatten()


def packed_size(head_dim: int) -> int:
    """Return the bytes of one packed row.

    Raises:
        ValueError: head_dim is not a multiple of 16.
    """
    if head_dim % BLOCK:
        raise ValueError(
            f"head_dim is {head_dim}, not a multiple of {BLOCK}: leave K, V and Q as they are"
        )
    return head_dim * 9 // 16


def _rows(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)  # [B, T, H D]


def _states(rows: Tensor, heads: int) -> Tensor:
    states: Tensor = rows.unflatten(-1, (heads, -1))  # [B, T, H, *]
    return states.transpose(1, 2)
