"""The compressed-tensors spelling of a checkpoint, format ``nvfp4-pack-quantized``.

Scales are stored as reciprocals there, and a reader computes
``bfloat16(code * float32(block_scale / G))`` with G = 1/S. Ours is ``bfloat16(code * block_scale *
S)``. Both have two roundings before the last, in other places, so a G that gives the same bits for
every code and block scale is looked for among 1/S and its neighbours (`find_divisor`). Among the
128 tensor scales that follow from a bfloat16 max|W| of one binade, 1/S itself is such a G for 102,
a neighbour for 14 more. For the last 12 (max|W| / 1536 has products that lie half-way between two
bfloat16 numbers) none is: some of the 882 products, 104 at the most, differ by one unit in the
last place of bfloat16, in one of eight elements at the most. Such layers are reported. In float32,
which no reader uses, a fourth of the products differ in the last bit.
"""

import re
import struct
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from scalesweep_hf.export.layout import (
    COMPRESSED_TENSORS,
    MODELOPT,
    Checkpoint,
    Layer,
)
from scalesweep_hf.export.shards import Change
from scalesweep_hf.export.unquantized import Unquantized
from scalesweep_hf.ops import e2m1, e4m3
from scalesweep_hf.ops.sweep import BLOCK

FORMAT = "nvfp4-pack-quantized"
# Version of compressed-tensors whose schema this follows.
SCHEMA = "0.20.0"
NEIGHBOURS = 8
STATES = {"keys": "k", "values": "v", "queries": "q"}

WEIGHTS = {
    "num_bits": 4,
    "type": "float",
    "strategy": "tensor_group",
    "group_size": BLOCK,
    "symmetric": True,
    "dynamic": False,
    "scale_dtype": "torch.float8_e4m3fn",
    "zp_dtype": "torch.float8_e4m3fn",
    "observer": "memoryless_minmax",
}
# The tensor scale is stored, block scales are found at run time.
DYNAMIC = WEIGHTS | {"dynamic": "local", "observer": "static_minmax"}


def find_divisor(scale: Tensor) -> tuple[Tensor, int]:
    """Return the reciprocal of a tensor scale with which a reader makes the most equal weights.

    Args:
        scale: [] float32, S > 0, multiplies towards the value.

    Returns:
        G [1] float32, 1/S or one of the `NEIGHBOURS` float32 numbers above and below it, the
        nearest of the best; and for how many of the 882 pairs of a positive code and a block scale
        ``bfloat16(code * (block_scale / G))`` is not ``bfloat16(code * block_scale * S)``.

    Raises:
        ValueError: S or 1/S is not a normal float32 number.
    """
    tiny = torch.finfo(torch.float32).tiny
    nearest = (1 / scale.double()).float()
    if not all(torch.isfinite(x) and x >= tiny for x in (scale, nearest)):
        raise ValueError(
            f"tensor scale {scale.item()} has no reciprocal in float32, which compressed-tensors "
            "stores: export to modelopt"
        )
    steps = torch.arange(1, NEIGHBOURS + 1, dtype=torch.int32)
    steps = torch.cat((steps.new_zeros(1), torch.stack((steps, -steps), -1).flatten()))
    divisors = (nearest.view(torch.int32) + steps).view(torch.float32)  # [17], nearest first
    codes = e2m1.decode(torch.arange(1, 8, dtype=torch.uint8), torch.float32).unsqueeze(-1)
    blocks = e4m3.decode(torch.arange(e4m3.MIN_CODE, e4m3.MAX_CODE + 1, dtype=torch.uint8))
    ours = (codes * blocks * scale).bfloat16()  # [7, 126]
    theirs = (codes * (blocks / divisors[:, None, None])).bfloat16()  # [17, 7, 126]
    wrong = (theirs != ours).flatten(1).sum(1)
    best = int(wrong.argmin())
    return divisors[best].reshape(1), int(wrong[best])


def rename(checkpoint: Checkpoint, *, states: bool) -> tuple[dict[str, Change], list[str]]:
    """Say how the tensors of a checkpoint change.

    Args:
        checkpoint: of this package.
        states: whether scales of keys, values and queries are kept.

    Returns:
        Changes by tensor name, and the layers whose weights do not read back to the bit.

    Raises:
        ValueError: a scale has no reciprocal.
    """
    changes: dict[str, Change] = {}
    inexact = []
    for name, layer in checkpoint.layers.items():
        ours = (MODELOPT.tensor_scale, MODELOPT.input_scale)
        theirs = (COMPRESSED_TENSORS.tensor_scale, COMPRESSED_TENSORS.input_scale)
        changes[layer.tensor(MODELOPT.packed)] = Change(layer.tensor(COMPRESSED_TENSORS.packed))
        scales = (layer.tensor_scale, layer.input_scale)
        for old, new, scale in zip(ours, theirs, scales, strict=True):
            if scale is not None:
                changes[layer.tensor(old)], wrong = _divisor(layer.tensor(new), scale)
                if wrong and old == MODELOPT.tensor_scale:
                    inexact.append(name)
    for letter in STATES.values():
        for name in checkpoint.with_suffix(f"{letter}_importance"):
            changes[f"{name}.{letter}_importance"] = Change(None)
        for name in checkpoint.with_suffix(f"{letter}_scale"):
            old, new = f"{name}.{letter}_scale", f"{name}.{letter}_global_scale"
            scale = checkpoint.scalars[old]
            changes[old] = _divisor(new, scale)[0] if states else Change(None)
    return changes, inexact


def configure(
    checkpoint: Checkpoint, unquantized: Unquantized, model: nn.Module, *, states: bool
) -> dict[str, Any]:
    """Write the ``quantization_config`` of config.json.

    Raises:
        ValueError: only some of the attention modules, or keys without values, are quantized.
    """
    layers = checkpoint.layers.values()
    inputs = [layer for layer in layers if layer.input_scale is not None]
    plain = [layer for layer in layers if layer.input_scale is None]
    if inputs and plain:
        _check_spelling(checkpoint, model)
        groups = [_group(_targets(some), bool(some is inputs)) for some in (inputs, plain)]
    else:
        groups = [_group(["Linear"], bool(inputs))]
    kinds = _quantized_states(checkpoint, model) if states else ()
    if "queries" in kinds:
        attention = [f"re:{re.escape(name)}$" for name in checkpoint.with_suffix("q_scale")]
        groups.append({"targets": attention, "weights": None, "input_activations": DYNAMIC})
    experts = [f"re:{re.escape(name)}\\..*" for name in unquantized.experts]
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
        "ignore": [*unquantized.modules, *experts],
        "kv_cache_scheme": DYNAMIC if kinds else None,
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
        "version": SCHEMA,
    }


def _divisor(name: str, scale: float) -> tuple[Change, int]:
    try:
        divisor, wrong = find_divisor(torch.tensor(scale, dtype=torch.float32))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return Change(name, (1,), struct.pack("<f", divisor.item())), wrong


def _group(targets: list[str], quantizes_input: bool) -> dict[str, Any]:
    return {
        "targets": targets,
        "format": FORMAT,
        "weights": WEIGHTS,
        "input_activations": DYNAMIC if quantizes_input else None,
        "output_activations": None,
    }


def _targets(layers: Iterable[Layer]) -> list[str]:
    return [layer.name for layer in layers]


def _check_spelling(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Raise ValueError unless config groups can name the modules as the files do."""
    known = {name for name, _ in model.named_modules()}
    for name in checkpoint.layers:
        if name not in known:
            raise ValueError(
                f"{name} is stored under another name than Transformers gives it, and only some "
                "inputs are quantized, which compressed-tensors expresses by names: quantize all "
                "inputs or none"
            )


def _quantized_states(checkpoint: Checkpoint, model: nn.Module) -> tuple[str, ...]:
    """Return which of keys, values and queries are quantized, in every attention module."""
    attention = [
        name
        for name, module in model.named_modules()
        if hasattr(module, "layer_idx") and "Attention" in type(module).__name__
    ]
    found = {kind: checkpoint.with_suffix(f"{x}_scale") for kind, x in STATES.items()}
    for kind, names in found.items():
        if names and len(names) != len(attention):
            raise ValueError(
                f"{kind} are quantized in {len(names)} of {len(attention)} attention modules; "
                "compressed-tensors has one scheme for all: export with --without-states"
            )
    kinds = tuple(kind for kind, names in found.items() if names)
    if kinds not in ((), ("keys", "values"), ("keys", "values", "queries")):
        raise ValueError(
            f"{' and '.join(kinds)} are quantized; compressed-tensors has keys with values, or "
            "these with queries: export with --without-states"
        )
    return kinds
