"""Quantize the Linears of a model group by group: as their weights arrive, or all at once."""

import functools
import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from accelerate import dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from accelerate.utils import align_module_device
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.utils import logging

from scalesweep_hf.calibration import InputStatistics, Statistics
from scalesweep_hf.modules.linear import quantize_group, share_input_importance
from scalesweep_hf.modules.rounding import HessianRounding, shift_weights
from scalesweep_hf.names import canonical_name
from scalesweep_hf.ops.gptq import factorize
from scalesweep_hf.ops.gptq_plus import block_order
from scalesweep_hf.staging import carry
from scalesweep_hf.targets import linears

logger = logging.get_logger(__name__)


# Where weights are swept, if not on the CPU. (MPS has no float8_e4m3fn.)
ACCELERATORS = ("cuda", "xpu")


def sweep_device() -> torch.device | None:
    """Return the accelerator on which weights are quantized; None where there is none."""
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None or device.type not in ACCELERATORS:
        return None
    return torch.device(device.type, torch.accelerator.current_device_index())


@dataclass(frozen=True)
class GPTQ:
    """How weights are rounded by Hessians.

    Attributes:
        damping: see `scalesweep_hf.ops.gptq.factorize`.
        dtype: likewise.
        plus: whether scales are swept on the way (`scalesweep_hf.ops.gptq_plus`).
    """

    damping: float
    dtype: torch.dtype
    plus: bool = False


class GroupPacker:
    """Quantizes groups of Linears that read one input and share scales.

    Attributes:
        groups: names of the modules of each group.
        statistics: of their inputs, where a recipe needs them.
    """

    def __init__(self, gptq: GPTQ | None = None) -> None:
        """Start without groups; gptq None rounds weights to nearest."""
        self.groups: list[list[str]] = []
        self.statistics: Statistics | None = None
        self._gptq = gptq
        self._waiting: dict[str, Tensor] = {}

    def pack_as_read(self, model: PreTrainedModel, name: str, weight: Tensor) -> dict[str, Tensor]:
        """Quantize a weight once all weights of its group are there; until then, keep it.

        Returns:
            Packed parameters by full name, of the whole group; empty while the group is incomplete.
        """
        self._waiting[name] = weight
        group = next(group for group in self.groups if name in group)
        if not all(member in self._waiting for member in group):
            return {}
        weights = [self._waiting.pop(member) for member in group]
        packed = self._quantize(model, group, weights)
        return {
            f"{member}.{part}": nn.Parameter(tensor, requires_grad=False)
            for member, tensors in zip(group, packed, strict=True)
            for part, tensor in tensors.items()
        }

    def pack_remaining(self, model: PreTrainedModel) -> None:
        """Quantize, group by group, what was not quantized before."""
        modules = linears(model)
        groups = [g for g in self.groups if not all(modules[name].is_packed for name in g)]
        if not groups:
            return
        with without_hooks(model):
            for group in tqdm(groups, desc="Quantizing", unit="group", disable=None):
                self.pack(model, group)
        gc.collect()
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()

    def pack(self, model: PreTrainedModel, group: Sequence[str]) -> None:
        """Quantize one group, whose weights are there."""
        modules = [model.get_submodule(name) for name in group]
        weights = [self._waiting.pop(n, m.weight) for n, m in zip(group, modules, strict=True)]
        for module, tensors in zip(modules, self._quantize(model, group, weights), strict=True):
            module.set_packed(tensors)

    def share_importance(self, model: PreTrainedModel) -> None:
        """Give every module the importance of its input, wherever its weight is."""
        modules = linears(model)
        for group in self.groups:
            members = [modules[name] for name in group]
            if not any(module.weighs_input for module in members):
                continue
            with ExitStack() as stack:
                for module in members:
                    stack.enter_context(align_module_device(module))
                share_input_importance(members)

    def _quantize(
        self, model: PreTrainedModel, group: Sequence[str], weights: Sequence[Tensor]
    ) -> list[dict[str, Tensor]]:
        """Return packed tensors per member, each where its weight is."""
        name = canonical_name(model, group[0])
        seen = None if self.statistics is None else self.statistics[name]
        homes = [weight.device for weight in weights]
        try:
            rounding = None
            if self._gptq is not None:
                assert seen is not None
                assert seen.hessian is not None
                weights = [weight.to(seen.hessian.device) for weight in weights]
                rounding, weights = self._rounding(", ".join(group), seen, weights)
                seen = self._forget_hessian(model, group)
            quantize = functools.partial(
                quantize_group,
                [model.get_submodule(member) for member in group],
                input_absmax=None if seen is None else seen.absmax,
                input_square=None if seen is None else seen.square,
                local_hessian=None if seen is None else seen.local_hessian,
                rounding=rounding,
            )
            results = None
            if rounding is None and all(home.type == "cpu" for home in homes):
                results = self._quantize_elsewhere(model, group, weights, quantize)
            results = results or quantize(weights)
        except ValueError as error:
            raise ValueError(f"{', '.join(group)}: {error}") from error
        return [
            {part: tensor.to(home) for part, tensor in tensors.items()}
            for home, tensors in zip(homes, results, strict=True)
        ]

    def _quantize_elsewhere(
        self,
        model: PreTrainedModel,
        group: Sequence[str],
        weights: Sequence[Tensor],
        quantize: Callable[[list[Tensor]], list[dict[str, Tensor]]],
    ) -> list[dict[str, Tensor]] | None:
        """Quantize weights of the CPU on the accelerator, to the same bits.

        Returns:
            The packed tensors, on the CPU; None where there is no accelerator, where it fails (for
            want of memory, most often), or where the user has asked for the CPU's own loops.
        """
        device, home = sweep_device(), torch.device("cpu")
        loops = any(model.get_submodule(name).recipe.backend == "numba" for name in group)
        if device is None or loops:
            return None
        try:
            results = quantize([carry(weight, device) for weight in weights])
            return [{part: carry(t, home) for part, t in tensors.items()} for tensors in results]
        except RuntimeError as error:  # page-locked memory and contexts have errors of their own
            short = isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)
            why = "has too little free memory" if short else f"fails ({type(error).__name__})"
            logger.warning_once(
                f"{device} {why}: weights that are on the CPU are quantized there, to the same "
                "bits, but slower."
            )
            return None

    def _rounding(
        self, names: str, seen: InputStatistics, weights: list[Tensor]
    ) -> tuple[HessianRounding, list[Tensor]]:
        """Return how a group is rounded, and what is rounded instead of its weights."""
        assert self._gptq is not None
        assert seen.hessian is not None
        damping, dtype, plus = self._gptq.damping, self._gptq.dtype, self._gptq.plus
        if seen.cross is not None:
            weights = shift_weights(weights, seen.hessian, seen.cross, dtype)
        order = block_order(seen.hessian) if plus else None
        factor = factorize(seen.hessian, damping=damping, dtype=dtype, order=order)
        if factor.damping > damping:
            logger.warning(
                f"{names}: the Hessian needed damping {factor.damping:g} instead of {damping:g}; "
                "more calibration text would make it better conditioned."
            )
        return HessianRounding(factor, plus), weights

    def _forget_hessian(self, model: PreTrainedModel, group: Sequence[str]) -> InputStatistics:
        """Drop the group's Hessian, which is large and was needed once."""
        assert self.statistics is not None
        for key in (canonical_name(model, member) for member in group):
            if key in self.statistics:
                self.statistics[key] = replace(self.statistics[key], hessian=None, cross=None)
        return self.statistics[canonical_name(model, group[0])]


@contextmanager
def without_hooks(model: PreTrainedModel) -> Iterator[None]:
    """Take accelerate's hooks off, which brings offloaded weights to the CPU, for a while."""
    device_map = getattr(model, "hf_device_map", None)
    hooked = any(hasattr(module, "_hf_hook") for module in model.modules())
    if hooked:
        remove_hook_from_submodules(model)
    try:
        yield
    finally:
        if hooked:
            dispatch_model(model, device_map, skip_keys=model._skip_keys_device_placement)
