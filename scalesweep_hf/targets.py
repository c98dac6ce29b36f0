"""Which Linears of a model are quantized, and which of them read the same input."""

import inspect
import re
from collections.abc import Iterable, Mapping

from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from scalesweep_hf.modules import NVFP4Linear
from scalesweep_hf.modules.attention import STATE_TENSORS
from scalesweep_hf.names import canonical_name, matches
from scalesweep_hf.ops.sweep import BLOCK

logger = logging.get_logger(__name__)

# Left alone unless the user says otherwise: heads by their usual names (a biased or tied head has
# no other mark that every architecture shares), routers, Linears whose weight the model reads
# itself, and what is not text.
DEFAULT_SKIPS = (
    *("lm_head", "score", "classifier", "pre_classifier", "qa_outputs", "cls"),
    *("*.gate", "*.router", "*.shared_expert_gate", "*.dt_proj"),
    *("*vision_tower*", "*vision_model*", "*visual*", "*audio_tower*"),
    *("*projector*", "*connector*", "text_projection"),
)

# Projections that serving engines fuse, so that they must share their scales. Siblings by name;
# whether they do read one tensor is checked where a calibration run has shown it.
FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)


def select_linears(model: PreTrainedModel, skips: Iterable[str] | None) -> list[str]:
    """Name the Linears to quantize, in model order.

    Args:
        model: may be on the meta device.
        skips: name patterns to leave alone, besides output heads and `DEFAULT_SKIPS`; a pattern
            that starts with "!" quantizes what these would leave.

    Returns:
        Names as ``model.named_modules()`` gives them.

    Raises:
        ValueError: a pattern matches no module, or nothing is left to quantize.
    """
    wanted = [pattern[1:] for pattern in skips or () if pattern.startswith("!")]
    own = [pattern for pattern in skips or () if not pattern.startswith("!")]
    check_patterns(model, "modules_to_not_convert", [*wanted, *own])
    # Models cast their inputs to the dtype of these modules' weights, which packing would change.
    own += [f"*{name}" for name in getattr(model, "_keep_in_fp32_modules", None) or ()]
    head = id(model.get_output_embeddings())
    chosen = []
    for name, module in model.named_modules():
        if type(module) is not nn.Linear or any(matches(model, name, p) for p in own):
            continue
        default = id(module) == head or any(matches(model, name, p) for p in DEFAULT_SKIPS)
        if default and not any(matches(model, name, p) for p in wanted):
            continue
        if module.in_features % BLOCK:
            logger.warning(
                f"{name} stays unquantized: in_features={module.in_features} is no multiple of "
                f"{BLOCK}."
            )
            continue
        chosen.append(name)
    if not chosen:
        raise ValueError(f"{type(model).__name__} has no torch.nn.Linear to quantize")
    _warn_of_experts(model)
    return chosen


def check_patterns(model: PreTrainedModel, field: str, patterns: Iterable[str]) -> None:
    """Raise ValueError, naming the field and the pattern, unless every pattern matches a module."""
    names = [name for name, _ in model.named_modules() if name]
    for pattern in patterns:
        if not any(matches(model, name, pattern) for name in names):
            raise ValueError(
                f"{field} pattern {pattern!r} matches no module of {type(model).__name__}"
            )


def find_modules(model: PreTrainedModel, canonical: Iterable[str]) -> list[str]:
    """Find recorded modules in a model that may have gained or lost its head's prefix.

    Args:
        model: may be on the meta device.
        canonical: names without the base model's prefix, as a checkpoint records them.

    Returns:
        The names in this model of those that it has, in model order.
    """
    wanted = set(canonical)
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and canonical_name(model, name) in wanted
    ]


def group_by_input(
    names: Iterable[str], shared_inputs: Mapping[str, int] | None = None
) -> list[list[str]]:
    """Group modules that read the same input, in the order of their first members.

    Args:
        names: module names.
        shared_inputs: from `Statistics`; siblings with unequal entries are kept apart
            (cross-attention projects queries and keys from different tensors).

    Returns:
        Groups of one or more names.
    """
    groups: dict[tuple[str, str, int], list[str]] = {}
    for name in names:
        parent, _, own = name.rpartition(".")
        label = next(("/".join(fused) for fused in FUSED if own in fused), own)
        source = (shared_inputs or {}).get(name, 0)
        groups.setdefault((parent, label, source), []).append(name)
    return list(groups.values())


def find_attention(model: PreTrainedModel) -> list[str]:
    """Name the attention modules whose keys, values and queries can be quantized, in model order.

    Args:
        model: may be on the meta device.

    Returns:
        Names as ``model.named_modules()`` gives them.

    Raises:
        ValueError: there is none, or one of them cannot be hooked; says which and why.
    """
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"{type(model).__name__} is an encoder-decoder model, whose keys and values are not "
            "supported: use scheme 'WA'"
        )
    names = []
    for name, module in model.named_modules():
        if not hasattr(module, "layer_idx") or "Attention" not in type(module).__name__:
            continue
        if reason := _why_not(module):
            raise ValueError(
                f"{name} ({type(module).__name__}) {reason}, so that its keys and values cannot be "
                "quantized: use scheme 'WA'"
            )
        names.append(name)
    if not names:
        raise ValueError(
            f"{type(model).__name__} has no attention module to quantize keys and values in: use "
            "scheme 'WA'"
        )
    return names


def state_shape(module: nn.Module) -> tuple[int, int]:
    """Return the key-value heads and the head_dim of an attention module."""
    head_dim = int(module.head_dim)  # type: ignore[arg-type]
    projection = getattr(module, "k_proj", None)
    if isinstance(projection, nn.Linear):
        return projection.out_features // head_dim, head_dim
    return int(module.config.num_key_value_heads), head_dim  # type: ignore[union-attr, arg-type]


def _why_not(module: nn.Module) -> str | None:
    """Say why an attention module cannot be hooked; None if it can."""
    if hasattr(module, "kv_b_proj") or hasattr(module, "kv_a_proj_with_mqa"):
        return "uses latent attention (MLA)"
    forward = inspect.unwrap(type(module).forward)
    parameters = set(inspect.signature(forward).parameters)
    source = inspect.getsource(forward)
    if "past_key_values" not in parameters:
        return "takes no past_key_values"
    if parameters & {"cross_attention_states", "key_value_states"}:
        return "attends to other states than its own"
    if "get_interface" not in source:
        return "does not look its attention function up in AttentionInterface"
    if re.search(r"past_key_values\.(?!update\b)\w+", source):
        return "uses its cache for more than storing keys and values"
    if getattr(module, "is_kv_shared_layer", False):
        return "shares the keys and values of another layer"
    if taken := [name for name in STATE_TENSORS if hasattr(module, name)]:
        return f"has a {taken[0]} of its own"
    if not isinstance(getattr(module, "o_proj", None), nn.Linear):
        return "has no o_proj"
    if not isinstance(getattr(module, "head_dim", None), int):
        return "has no head_dim"
    if getattr(module, "v_head_dim", module.head_dim) != module.head_dim:
        return "has values of another width than its keys"
    if module.head_dim % BLOCK:  # type: ignore[operator]
        return f"has head_dim {module.head_dim}, not a multiple of {BLOCK}"
    return None


def linears(model: nn.Module) -> dict[str, NVFP4Linear]:
    """Return the NVFP4Linear modules of a model by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, NVFP4Linear)}


def _warn_of_experts(model: PreTrainedModel) -> None:
    experts = sum(
        p.numel()
        for module in model.modules()
        if type(module).__name__.endswith("Experts")
        for p in module.parameters(recurse=False)
        if p.ndim == 3
    )
    if experts:
        total = sum(p.numel() for p in model.parameters())
        logger.warning(
            f"{experts:,} of {total:,} parameters are fused experts, which stay unquantized: only "
            "torch.nn.Linear modules are quantized."
        )
