"""Quantize the Linears of a model group by group: as their weights arrive, or all at once."""

import gc
from collections.abc import Sequence
from contextlib import ExitStack

import torch
from accelerate import dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from accelerate.utils import align_module_device
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from scalesweep_hf.calibration import Statistics
from scalesweep_hf.modules.linear import quantize_group, share_input_importance
from scalesweep_hf.names import canonical_name
from scalesweep_hf.targets import linears


class GroupPacker:
    """Quantizes groups of Linears that read one input and share scales.

    Attributes:
        groups: names of the modules of each group.
        statistics: of their inputs, where a recipe needs them.
    """

    def __init__(self) -> None:
        """Start without groups."""
        self.groups: list[list[str]] = []
        self.statistics: Statistics | None = None
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
        """Quantize, group by group, what was not quantized as it was read."""
        modules = linears(model)
        groups = [g for g in self.groups if not all(modules[name].is_packed for name in g)]
        if not groups:
            return
        device_map = getattr(model, "hf_device_map", None)
        hooked = any(hasattr(module, "_hf_hook") for module in model.modules())
        if hooked:  # offloaded weights come back to the CPU
            remove_hook_from_submodules(model)
        for group in tqdm(groups, desc="Quantizing", unit="group", disable=None):
            weights = [self._waiting.pop(name, modules[name].weight) for name in group]
            for name, tensors in zip(group, self._quantize(model, group, weights), strict=True):
                modules[name].set_packed(tensors)
            del weights
        if hooked:
            dispatch_model(model, device_map, skip_keys=model._skip_keys_device_placement)
        gc.collect()
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()

    def share_importance(self, model: PreTrainedModel) -> None:
        """Give every module the importance of its input, wherever its weight is."""
        modules = linears(model)
        for group in self.groups:
            members = [modules[name] for name in group]
            with ExitStack() as stack:
                for module in members:
                    stack.enter_context(align_module_device(module))
                share_input_importance(members)

    def _quantize(
        self, model: PreTrainedModel, group: Sequence[str], weights: Sequence[Tensor]
    ) -> list[dict[str, Tensor]]:
        name = canonical_name(model, group[0])
        seen = None if self.statistics is None else self.statistics[name]
        try:
            return quantize_group(
                [model.get_submodule(member) for member in group],
                weights,
                input_absmax=None if seen is None else seen.absmax,
                input_square=None if seen is None else seen.square,
            )
        except ValueError as error:
            raise ValueError(f"{', '.join(group)}: {error}") from error
