"""Which modules of a checkpoint are not quantized, as engines need to be told."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import transformers
from torch import nn

from scalesweep_hf.export.layout import Checkpoint
from scalesweep_hf.names import canonical_name

EXPERT = re.compile(r"(.*\.experts)\.\d+\..*")


@dataclass(frozen=True)
class Unquantized:
    """What stays in full precision.

    Attributes:
        modules: names of Linears, as the files and as Transformers spell them.
        experts: names of modules all of whose numbered experts stay; these are not in ``modules``.
        embeddings: names of embeddings, which ModelOpt lists and compressed-tensors does not.
    """

    modules: list[str]
    experts: list[str]
    embeddings: list[str]


def find_unquantized(checkpoint: Checkpoint, model: nn.Module) -> Unquantized:
    """Name every Linear that is not packed, tied heads and fused experts included.

    Args:
        checkpoint: of this package.
        model: its architecture, see `empty_model`.
    """
    recorded = set(checkpoint.recipe.get("quantized_modules") or ())
    embeddings = {name for name, m in model.named_modules() if isinstance(m, nn.Embedding)}
    names = {name for name in checkpoint.unquantized() if name not in embeddings}
    names |= {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and canonical_name(model, name) not in recorded
        and name not in checkpoint.layers
    }
    return Unquantized(*_collapse(names, checkpoint.layers), sorted(embeddings))


def empty_model(checkpoint: Checkpoint) -> nn.Module:
    """Build the checkpoint's architecture on the meta device.

    Raises:
        ValueError: Transformers has no such architecture.
    """
    architecture = (checkpoint.config.get("architectures") or ["none"])[0]
    cls = getattr(transformers, architecture, None)
    if cls is None:
        raise ValueError(
            f"architecture {architecture!r} of {checkpoint.folder} is not part of transformers "
            f"{transformers.__version__}, so that its unquantized Linears are unknown: models "
            "with code of their own cannot be exported"
        )
    config = transformers.AutoConfig.from_pretrained(checkpoint.folder)
    with torch.device("meta"):
        model: nn.Module = cls(config)
    return model


def _collapse(names: Iterable[str], layers: Iterable[str]) -> tuple[list[str], list[str]]:
    layers = list(layers)
    modules, experts = [], dict[str, bool]()
    for name in sorted(names):
        found = EXPERT.fullmatch(name)
        parent = found[1] if found else ""
        if found and parent not in experts:
            experts[parent] = not any(layer.startswith(f"{parent}.") for layer in layers)
        if not (found and experts[parent]):
            modules.append(name)
    return modules, [parent for parent, alone in experts.items() if alone]
