"""The ModelOpt description of a checkpoint, whose tensors are in that layout already.

``quant_algo`` is NVFP4 with quantized inputs and W4A16_NVFP4 without. Scales of keys, values and
queries cannot be handed over: Model-Optimizer 0.47 stores max|K| / 448 as ``k_proj.k_scale`` for a
4-bit cache, other tools max|K| / 2688, and of two published versions of TensorRT-LLM one
multiplies what it reads by 6. Ours, max|K| / 1536 for a sweep, would be wrong by a factor in at
least one of them.
"""

from typing import Any

from scalesweep_hf.export.layout import Checkpoint
from scalesweep_hf.export.shards import Change
from scalesweep_hf.export.unquantized import Unquantized
from scalesweep_hf.ops.sweep import BLOCK
from scalesweep_hf.version import __version__

STATE_SUFFIXES = ("q_scale", "k_scale", "v_scale", "q_importance", "k_importance")
ARGS = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": BLOCK}


def drop_states(checkpoint: Checkpoint, *, states: bool) -> dict[str, Change]:
    """Say how the tensors of a checkpoint change: scales of states go, the rest stays.

    Args:
        checkpoint: of this package.
        states: whether scales of keys, values and queries are to be kept.

    Raises:
        ValueError: there are such scales to be kept.
    """
    names = [
        f"{module}.{suffix}"
        for suffix in STATE_SUFFIXES
        for module in checkpoint.with_suffix(suffix)
    ]
    if names and states:
        raise ValueError(
            f"{names[0]}: readers of ModelOpt checkpoints do not agree on what a scale of keys, "
            "values or queries multiplies: export with --without-states, or to compressed-tensors"
        )
    return {name: Change(None) for name in names}


def describe(checkpoint: Checkpoint, unquantized: Unquantized) -> dict[str, Any]:
    """Write hf_quant_config.json.

    Raises:
        ValueError: only some inputs are quantized.
    """
    plain = [name for name, layer in checkpoint.layers.items() if layer.input_scale is None]
    if plain and len(plain) < len(checkpoint.layers):
        raise ValueError(
            f"the input of {plain[0]} is not quantized while others are, which ModelOpt's NVFP4 "
            "cannot say: export to compressed-tensors, or quantize without overrides"
        )
    experts = [f"{name}*" for name in unquantized.experts]
    return {
        "producer": {"name": "scalesweep_hf", "version": __version__},
        "quantization": {
            "quant_algo": "W4A16_NVFP4" if plain else "NVFP4",
            "kv_cache_quant_algo": None,
            "group_size": BLOCK,
            "exclude_modules": [*unquantized.modules, *unquantized.embeddings, *experts],
        },
    }


def configure(description: dict[str, Any]) -> dict[str, Any]:
    """Write the same facts as the ``quantization_config`` of config.json."""
    facts = description["quantization"]
    group: dict[str, Any] = {"weights": ARGS, "targets": ["Linear"]}
    if facts["quant_algo"] == "NVFP4":
        group["input_activations"] = ARGS
    return {
        "config_groups": {"group_0": group},
        "ignore": facts["exclude_modules"],
        "quant_algo": facts["quant_algo"],
        "producer": description["producer"],
        "quant_method": "modelopt",
    }
