"""ScaleSweepHfQuantizer: what from_pretrained calls to swap, quantize, save and reload Linears.

On the fly: nothing to calibrate, or statistics given as a file; each weight is quantized as it is
read. Calibrated: load, run calibration text, then quantize module by module; with GPTQ, block by
block.
"""

import copy
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer
from transformers.quantizers import auto as registry
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils import logging

from scalesweep_hf.blockwise import quantize_blockwise
from scalesweep_hf.calibration import Statistics
from scalesweep_hf.calibration.blocks import NotBlockwiseError
from scalesweep_hf.calibration.data import check_source
from scalesweep_hf.card import Cards, forget_cards
from scalesweep_hf.checkpoint import accept_loaded, check_files
from scalesweep_hf.config import METHOD, ScaleSweepConfig
from scalesweep_hf.modelopt import forget_converters, packed_modules, state_converters
from scalesweep_hf.modules import LinearRecipe, NVFP4Linear
from scalesweep_hf.names import canonical_name, hub_id, matches
from scalesweep_hf.packing import GPTQ, GroupPacker, sweep_device
from scalesweep_hf.states import (
    accept_states,
    check_state_statistics,
    fill_states,
    finish_states,
    hook_states,
    unhook_states,
)
from scalesweep_hf.statistics import check_calibration, observed_by, run
from scalesweep_hf.targets import (
    check_patterns,
    find_modules,
    group_by_input,
    linears,
    select_linears,
)
from scalesweep_hf.version import __version__

logger = logging.get_logger(__name__)


class ScaleSweepHfQuantizer(HfQuantizer):  # type: ignore[misc]
    """Quantizes a model to NVFP4 while Transformers loads it, and reloads what was saved.

    Supports Transformers 5.17 to 5.23.
    """

    requires_calibration = False
    quantization_config: ScaleSweepConfig

    def __init__(self, quantization_config: ScaleSweepConfig, **kwargs: Any) -> None:
        """Keep a copy of the config, which loading completes; the caller's stays as it is."""
        super().__init__(copy.deepcopy(quantization_config), **kwargs)
        config = self.quantization_config
        dtype = getattr(torch, config.gptq_dtype)
        gptq = GPTQ(config.damping, dtype, plus=config.algorithm == "gptq-plus")
        self.packer = GroupPacker(gptq if config.uses_hessians else None)
        self._from_modelopt = False

    @property
    def on_the_fly(self) -> bool:
        """Whether weights are quantized as they are read."""
        return not self.pre_quantized and not self.quantization_config.needs_calibration

    # Before loading

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse, before any weight is read, what would fail after minutes.

        Raises:
            FileNotFoundError: the calibration data or the statistics are a local file that is
                absent.
            ValueError: the calibration data cannot be read, or a model that is to be quantized is
                partly on disk.
        """
        config = self.quantization_config
        if self.pre_quantized:
            return
        if config.dequantize:
            raise ValueError(
                "dequantize=True is for loading a quantized checkpoint; this one is not: drop it"
            )
        # (Transformers asks again once "auto" has become a map: the file is read once.)
        if config.statistics is not None and self.packer.statistics is None:
            if not Path(config.statistics).is_file():
                raise FileNotFoundError(f"statistics {config.statistics!r} does not exist")
            self.packer.statistics = Statistics.load(config.statistics)
        data = config.dataset
        if isinstance(data, str) and data != "self" and config.needs_calibration:
            check_source(data)
        device_map = kwargs.get("device_map")
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError(
                "device_map puts modules on disk, where they cannot be quantized: quantize with "
                "CPU offload and save; the saved checkpoint can be loaded with disk offload"
            )

    def update_device_map(self, device_map: Any) -> Any:
        """Default to the accelerator, where there is one: sweeps on a CPU are slow."""
        if device_map is not None or self.pre_quantized or (device := sweep_device()) is None:
            return device_map
        logger.info(
            f"No device_map was given: quantizing on {device}. Pass one to choose otherwise."
        )
        return {"": device}

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        config = self.quantization_config
        if self.pre_quantized:
            files = checkpoint_files or []
            known = all(Path(file).suffix == ".safetensors" for file in files)
            if config.quantized_modules is None:
                self._from_modelopt = True
                ignored = config.modules_to_not_convert
                config.quantized_modules = packed_modules(model, ignored, files if known else [])
            recorded = config.quantized_modules
            if files and known:
                check_files(files, recorded, model)
            names = find_modules(model, recorded)
        else:
            names = select_linears(model, config.modules_to_not_convert)
            config.quantized_modules = [canonical_name(model, name) for name in names]
            check_patterns(model, "overrides", config.override_patterns)
            if config.needs_calibration:
                check_calibration(model)
            self._check_statistics(model, names)
            tied = set(getattr(model, "all_tied_weights_keys", None) or ())
            names = [name for name in names if f"{name}.weight" not in tied]
        for name in names:
            module = self._swap(model, name)
            if self.pre_quantized:
                module.allocate_packed()
                # Weight initialisation of Transformers must not touch packed tensors.
                module._is_hf_initialized = True  # type: ignore[assignment]
            elif self.on_the_fly:
                module.allocate_packed(keep_weight=True)
        self._group(model)
        hook_states(model, config, placeholders=self.pre_quantized)
        if self.packer.statistics is not None:
            check_state_statistics(model, self.packer.statistics)

    def _check_statistics(self, model: PreTrainedModel, names: Sequence[str]) -> None:
        if self.packer.statistics is None:
            return
        path = self.quantization_config.statistics
        for name in names:
            seen = self.packer.statistics.get(canonical_name(model, name))
            if seen is None:
                raise ValueError(
                    f"{path} has no statistics of {canonical_name(model, name)}: calibrate this "
                    "model, or add the name to modules_to_not_convert"
                )
            if self.quantization_config.needs_local_hessian and seen.local_hessian is None:
                raise ValueError(
                    f"{path} has no local Hessians, which objective 'hessian' needs: make it with "
                    "calibrate(model, local_hessian=True)"
                )
            width = model.get_submodule(name).in_features
            if seen.square.numel() != width:
                raise ValueError(
                    f"{path} has {seen.square.numel()} channels of {name}, which has {width}: they "
                    "are of another model"
                )

    def _swap(self, model: PreTrainedModel, name: str) -> NVFP4Linear:
        config = self.quantization_config
        applies = functools.partial(matches, model, name)
        weights = config.objective_for("weights", applies)
        assert weights is not None
        activations = config.objective_for("activations", applies)
        recipe = LinearRecipe(weights, activations, config.window, config.backend)
        module = NVFP4Linear.from_linear(model.get_submodule(name), recipe)
        model.set_submodule(name, module)
        return module

    def _group(self, model: PreTrainedModel) -> None:
        """Decide which modules share scales: as recorded, as calibration saw it, or by name."""
        names = {canonical_name(model, name): name for name in linears(model)}
        config = self.quantization_config
        if self.pre_quantized:
            shared = [[n for n in group if n in names] for group in config.shared_inputs or []]
            grouped = {name for group in shared for name in group}
            groups = [*filter(None, shared), *([name] for name in names if name not in grouped)]
        else:
            seen = None if self.packer.statistics is None else self.packer.statistics.shared_inputs
            groups = group_by_input(names, seen)
            config.shared_inputs = [group for group in groups if len(group) > 1]
        self.packer.groups = [[names[name] for name in group] for group in groups]

    # While loading

    def param_needs_quantization(
        self, model: PreTrainedModel, param_name: str, **kwargs: Any
    ) -> bool:
        """Whether this checkpoint tensor is a weight to quantize as it is read."""
        if not self.on_the_fly or not param_name.endswith(".weight"):
            return False
        return isinstance(get_module_from_name(model, param_name)[0], NVFP4Linear)

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        """Return bytes per element for device_map="auto": half a byte for weights to be packed."""
        if self.param_needs_quantization(model, param_name):
            return 0.5
        return param.element_size()

    def update_weight_conversions(
        self, weight_conversions: list[Any], model: PreTrainedModel | None = None
    ) -> list[Any]:
        """Rename the scales of keys and values in a checkpoint of ModelOpt."""
        return [*weight_conversions, *(state_converters() if self._from_modelopt else ())]

    def get_quantize_ops(self) -> ConversionOps:
        """Return the operation that turns a weight into packed tensors."""
        return QuantizeOnTheFly(self)

    # After loading

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        config = self.quantization_config
        with torch.no_grad():
            if self.pre_quantized:
                if self._from_modelopt:
                    forget_converters(model)
                for name, module in linears(model).items():
                    accept_loaded(name, module)
                accept_states(model)
            else:
                self._swap_tied_head(model)
                if config.needs_calibration:
                    self._calibrate(model)
                self._group(model)
                self.packer.pack_remaining(model)
                statistics = self.packer.statistics
                if statistics is not None:
                    fill_states(model, statistics)
                    config.calibration = statistics.provenance
                config.version = __version__
                config.base_model = hub_id(model.name_or_path)
            if self.pre_quantized and config.dequantize:
                self._dequantize(model)
                return
            self.packer.share_importance(model)
            finish_states(model, config)
        model.add_model_tags(["nvfp4", METHOD])
        reloaded = self.pre_quantized and not self._from_modelopt and model.name_or_path
        Cards(model, Path(model.name_or_path) if reloaded else None)

    def _swap_tied_head(self, model: PreTrainedModel) -> None:
        """Give a tied head that the user wants quantized a weight of its own."""
        for name in find_modules(model, self.quantization_config.quantized_modules or []):
            module = model.get_submodule(name)
            if isinstance(module, NVFP4Linear):
                continue
            for part, parameter in list(module.named_parameters(recurse=False)):
                own = nn.Parameter(parameter.detach().clone(), requires_grad=False)
                module.register_parameter(part, own)
            model.config.get_text_config().tie_word_embeddings = False
            model.config.tie_word_embeddings = False
            model.all_tied_weights_keys = {
                key: source
                for key, source in model.all_tied_weights_keys.items()
                if not key.startswith(f"{name}.")
            }
            self._swap(model, name)

    def _calibrate(self, model: PreTrainedModel) -> None:
        """Observe what the recipe needs; block by block, quantize the blocks on the way."""
        config = self.quantization_config
        if config.block_by_block:
            try:
                return quantize_blockwise(model, config, self.packer)
            except NotBlockwiseError as error:
                if config.pipeline == "block" or config.resume_dir is not None:
                    raise
                lost = ", and neither shifts targets nor quantizes in order"
                logger.warning(
                    f"{type(model).__name__} is not quantized block by block: {error}. The whole "
                    "full-precision model is calibrated at once, which needs memory for all its "
                    f"Hessians{lost if config.in_order else ''}."
                )
        self.packer.statistics = run(model, list(linears(model)), config, observed_by(config))
        return None

    def _dequantize(
        self, model: PreTrainedModel, dtype: torch.dtype | str | None = None
    ) -> PreTrainedModel:
        target: torch.dtype = dtype or model.dtype  # type: ignore[assignment]
        if isinstance(dtype, str):  # as config.json spells it, once the model has been saved
            target = getattr(torch, dtype)
        for name, module in linears(model).items():
            with align_module_device(module):
                model.set_submodule(name, module.to_linear(target))
        unhook_states(model)
        forget_cards(model)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Say that quantized models can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Packed weights have no gradient."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Forward passes are torch operations and operators that graphs hold."""
        return True


class QuantizeOnTheFly(ConversionOps):  # type: ignore[misc]
    """Loading operation: a full-precision weight in, packed tensors of its complete group out."""

    def __init__(self, hf_quantizer: ScaleSweepHfQuantizer) -> None:
        """Keep the quantizer, which knows the groups."""
        self.hf_quantizer = hf_quantizer

    def convert(
        self,
        input_dict: dict[str, Any],
        model: PreTrainedModel | None = None,
        full_layer_name: str | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Quantize the weight that was read as ``full_layer_name``."""
        assert model is not None
        assert full_layer_name is not None
        (value,) = input_dict.values()
        weight = value[0] if isinstance(value, list) else value
        name = full_layer_name.removesuffix(".weight")
        return self.hf_quantizer.packer.pack_as_read(model, name, weight)


def register() -> None:
    """Make Transformers know the method; safe to repeat."""
    registry.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = ScaleSweepConfig
    registry.AUTO_QUANTIZER_MAPPING[METHOD] = ScaleSweepHfQuantizer
    if ScaleSweepConfig not in registry.LOADING_ATTRIBUTES_CONFIG_TYPES:
        # Without this, a config passed when loading a saved checkpoint is ignored as a whole.
        registry.LOADING_ATTRIBUTES_CONFIG_TYPES += (ScaleSweepConfig,)


register()
