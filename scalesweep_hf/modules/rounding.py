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
        hessian: [K, K] of the input.
        factor: of hessian, for "gptq-plus" in the order of its blocks.
        plus: whether this is "gptq-plus".
        cross: [K, K] of the full-precision model's input and this one, where "gptq-plus" moves its
            target; None leaves the target.
    """

    hessian: Tensor
    factor: Factor
    plus: bool = False
    cross: Tensor | None = None

    def targets(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """Return what is rounded instead of the weights [N, K] each."""
        if not self.plus or self.cross is None:
            return list(weights)
        dtype = self.factor.lower.dtype
        whole = shift_weight(torch.cat(list(weights)), self.hessian, self.cross, dtype=dtype)
        return list(whole.split([len(weight) for weight in weights]))

    def round(
        self,
        weights: Sequence[Tensor],
        tensor_scale: Tensor,
        to_nearest: Callable[[], list[NVFP4Tensor]],
    ) -> list[NVFP4Tensor]:
        """Round weights [N, K] each.

        Args:
            weights: what `targets` returned.
            tensor_scale: [] float32, of all of them.
            to_nearest: quantizes the weights in the plain way, whose block scales GPTQ keeps.
        """
        whole = torch.cat(list(weights))
        if self.plus:
            scale = tensor_scale.to(whole.device)
            rounded = quantize_gptq_plus(whole, scale, self.hessian, self.factor)
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
