"""Which Linears of a model are quantized, and which of them read the same input."""

import fnmatch
from collections.abc import Iterable, Mapping

from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from scalesweep_hf.calibration.collect import canonical_name
from scalesweep_hf.modules import NVFP4Linear
from scalesweep_hf.ops.sweep import BLOCK

logger = logging.get_logger(__name__)

# Left alone unless the user says otherwise: heads by their usual names (a biased or tied head has
# no other mark that every architecture shares), routers, and towers that are not text.
DEFAULT_SKIPS = (
    "lm_head",
    "score",
    "classifier",
    "qa_outputs",
    "*.gate",
    "*.router",
    "*.router.*",
    "*vision_tower*",
    "*vision_model*",
    "*visual.*",
    "*audio_tower*",
    "*multi_modal_projector*",
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
        skips: name patterns to leave alone; None means output heads and `DEFAULT_SKIPS`.

    Returns:
        Names as ``model.named_modules()`` gives them.

    Raises:
        ValueError: a pattern matches no module, or nothing is left to quantize.
    """
    patterns = DEFAULT_SKIPS if skips is None else tuple(skips)
    heads = {id(model.get_output_embeddings())} if skips is None else set()
    names = [name for name, module in model.named_modules() if name]
    for pattern in () if skips is None else patterns:
        if not any(_matches(model, name, pattern) for name in names):
            raise ValueError(
                f"modules_to_not_convert pattern {pattern!r} matches no module of "
                f"{type(model).__name__}"
            )
    # Models cast their inputs to the dtype of these modules' weights, which packing would change.
    patterns += tuple(f"*{name}" for name in getattr(model, "_keep_in_fp32_modules", None) or ())
    chosen = []
    for name, module in model.named_modules():
        if type(module) is not nn.Linear or id(module) in heads:
            continue
        if any(_matches(model, name, pattern) for pattern in patterns):
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


def linears(model: nn.Module) -> dict[str, NVFP4Linear]:
    """Return the NVFP4Linear modules of a model by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, NVFP4Linear)}


def _matches(model: PreTrainedModel, name: str, pattern: str) -> bool:
    """Match a name, with or without the base prefix, or anything below it."""
    spellings = (name, canonical_name(model, name))
    return any(
        fnmatch.fnmatchcase(spelling, pattern) or fnmatch.fnmatchcase(spelling, f"{pattern}.*")
        for spelling in spellings
    )


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
