"""Keys, values and queries of a model: hook attention modules, set their scales, pack the cache.

The glue between `quantizer.py` and `modules/attention.py`, as the quantizer is between Transformers
and the Linears.
"""

import functools
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from scalesweep_hf.calibration import Statistics
from scalesweep_hf.calibration.states import StateStatistics
from scalesweep_hf.checkpoint import accept_loaded
from scalesweep_hf.config import LETTERS, ScaleSweepConfig
from scalesweep_hf.modules import attention
from scalesweep_hf.modules.cache import pack_cache
from scalesweep_hf.names import STATES, canonical_name, matches
from scalesweep_hf.ops.nvfp4 import compute_tensor_scale
from scalesweep_hf.targets import find_attention, state_shape


def hook_states(model: PreTrainedModel, config: ScaleSweepConfig, *, placeholders: bool) -> None:
    """Hook the attention modules whose states the scheme quantizes.

    Args:
        model: may be on the meta device.
        config: says which kinds, and how.
        placeholders: whether to add uninitialised parameters, on the meta device, for a loader.

    Raises:
        ValueError: the scheme quantizes states and an attention module cannot be hooked.
    """
    if not any(LETTERS[kind] in config.scheme for kind in STATES):
        return
    for name in find_attention(model):
        applies = functools.partial(matches, model, name)
        objectives = {kind: config.objective_for(kind, applies) for kind in STATES}
        if not any(objectives.values()):
            continue
        module = model.get_submodule(name)
        attention.attach(
            module,
            attention.StateRecipe(**objectives, window=config.window, backend=config.backend),
        )
        if placeholders:
            shapes = attention.expected_states(module, *state_shape(module))
            empty = {n: torch.empty(s, device="meta") for n, s in shapes.items()}
            attention.set_states(module, empty)


def hooked(model: nn.Module) -> dict[str, nn.Module]:
    """Return the attention modules that `hook_states` has hooked, by name."""
    return {name: m for name, m in model.named_modules() if hasattr(m, "nvfp4_states")}


def check_state_statistics(model: PreTrainedModel, statistics: Statistics) -> None:
    """Check, before any weight is read, that statistics suit the hooked attention modules.

    Raises:
        ValueError: statistics of a module are missing, or of another shape.
    """
    for name, module in hooked(model).items():
        seen = statistics.states.get(canonical_name(model, name))
        if seen is None:
            raise ValueError(
                f"the statistics have no keys, values and queries of {name}: make them with "
                "calibrate(model, states=True)"
            )
        if tuple(seen.key_square.shape) != state_shape(module):
            raise ValueError(
                f"the statistics of {name} are of {list(seen.key_square.shape)} heads and "
                f"channels, the module has {list(state_shape(module))}: they are of another model"
            )


def fill_states(model: PreTrainedModel, statistics: Statistics) -> None:
    """Set the scales and importances of the hooked attention modules that calibration observed.

    Raises:
        ValueError: states were not finite in calibration.
    """
    for name, module in hooked(model).items():
        seen = statistics.states.get(canonical_name(model, name))
        if seen is None:
            continue
        if not torch.isfinite(seen.absmax).all():
            raise ValueError(f"{name}: keys, values or queries were not finite in calibration")
        shapes = attention.expected_states(module, *state_shape(module))
        device = next(module.get_submodule("o_proj").parameters()).device
        if device.type == "meta":  # offloaded: codecs follow the states that they meet
            device = torch.device("cpu")
        tensors = _tensors(module, seen)
        attention.set_states(module, {n: tensors[n].to(device) for n in shapes})


def _tensors(module: nn.Module, seen: StateStatistics) -> dict[str, Tensor]:
    """Return every parameter that a recipe may need: queries weigh keys, keys weigh queries."""
    recipe = module.nvfp4_states.recipe  # type: ignore[union-attr]
    tensors = {"k_importance": seen.query_square, "q_importance": seen.key_square}
    for kind, amax in zip(STATES, seen.absmax, strict=True):
        if (objective := getattr(recipe, kind)) is not None:
            tensors[f"{attention.STATES[kind]}_scale"] = compute_tensor_scale(amax, objective)
    return tensors


def accept_states(model: PreTrainedModel) -> None:
    """Check what was loaded of all hooked modules, as `accept_loaded`."""
    for name, module in hooked(model).items():
        accept_loaded(name, module, attention.PARAMETERS)


def finish_states(model: PreTrainedModel, config: ScaleSweepConfig) -> None:
    """Compute the importance of values, and make `generate` store keys and values packed."""
    modules = hooked(model)
    for module in modules.values():
        weigh_values(module)
    layers = frozenset(
        int(module.layer_idx)  # type: ignore[arg-type]
        for module in modules.values()
        if attention.codec(module, "keys") and attention.codec(module, "values")
    )
    if layers and config.packed_cache and model.can_generate():
        prepare = functools.partial(_prepare_packed_cache, model, layers)
        model._prepare_cache_for_generation = prepare


def weigh_values(module: nn.Module) -> None:
    """Compute the importance of the values of a hooked attention module, wherever its o_proj is."""
    with align_module_device(module.get_submodule("o_proj")):
        attention.share_value_importance(module, state_shape(module)[0])


def unhook_states(model: PreTrainedModel) -> None:
    """Undo `hook_states` and `finish_states`."""
    for module in hooked(model).values():
        attention.detach(module)
    vars(model).pop("_prepare_cache_for_generation", None)


def _prepare_packed_cache(
    model: Any,
    layers: frozenset[int],
    generation_config: Any,
    model_kwargs: dict[str, Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Let Transformers make the cache it would make, then pack it; a user's own cache stays."""
    given = model_kwargs.get("past_key_values")
    prepare = type(model)._prepare_cache_for_generation
    result = prepare(model, generation_config, model_kwargs, *args, **kwargs)
    cache = model_kwargs.get("past_key_values")
    if given is None and isinstance(cache, Cache) and not cache.is_initialized:
        pack_cache(cache, only=layers)
    return result
