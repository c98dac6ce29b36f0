"""Round the weights of Linears that share their input and tensor scale by the Hessian of the input.

Row under row they are one weight: the columns of all are rounded in one go.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scalesweep_hf.ops.gptq import Factor, quantize_gptq
from scalesweep_hf.ops.gptq_plus import quantize_gptq_plus, shift_weight
from scalesweep_hf.ops.nvfp4 import NVFP4Tensor


@dataclass(frozen=True)
class HessianRounding:
    """GPTQ, or GPTQ with its scales swept on the way.

    Attributes:
        factor: of the input's Hessian, for "gptq-plus" in the order of its blocks.
        plus: whether this is "gptq-plus".
    """

    factor: Factor
    plus: bool = False

    def round(
        self,
        weights: Sequence[Tensor],
        tensor_scale: Tensor,
        to_nearest: Callable[[], list[NVFP4Tensor]],
    ) -> list[NVFP4Tensor]:
        """Round weights [N, K] each.

        Args:
            weights: as they are, or as `shift_weights` moved them.
            tensor_scale: [] float32, of all of them.
            to_nearest: quantizes the weights in the plain way, whose block scales GPTQ keeps.
        """
        whole = torch.cat(list(weights))
        if self.plus:
            scale = tensor_scale.to(whole.device)
            rounded = quantize_gptq_plus(whole, scale, self.factor)
        else:
            rounded = quantize_gptq(whole, _stack(to_nearest()), self.factor)
        sizes = [len(weight) for weight in weights]
        packed = rounded.packed.split(sizes)
        scales = rounded.block_scale.view(torch.uint8).split(sizes)
        return [
            NVFP4Tensor(codes, scale.view(torch.float8_e4m3fn), rounded.tensor_scale)
            for codes, scale in zip(packed, scales, strict=True)
        ]


def _stack(parts: Sequence[NVFP4Tensor]) -> NVFP4Tensor:
    scales = torch.cat([part.block_scale.view(torch.uint8) for part in parts])
    return NVFP4Tensor(
        torch.cat([part.packed for part in parts]),
        scales.view(torch.float8_e4m3fn),
        parts[0].tensor_scale,
    )


def shift_weights(
    weights: Sequence[Tensor], hessian: Tensor, cross: Tensor, dtype: torch.dtype
) -> list[Tensor]:
    """Move weights [N, K] each as one; see `scalesweep_hf.ops.gptq_plus.shift_weight`."""
    whole = shift_weight(torch.cat(list(weights)), hessian, cross, dtype=dtype)
    return list(whole.split([len(weight) for weight in weights]))
