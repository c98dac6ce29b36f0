"""Checks of a packed checkpoint: nothing missing, nothing extra, nothing that decodes to NaN."""

import json
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import align_module_device
from torch import nn

from scalesweep_hf.modules.linear import SCALES, NVFP4Linear
from scalesweep_hf.names import canonical_name

DTYPES = {"weight": "U8", "weight_scale": "F8_E4M3", "weight_scale_2": "F32", "input_scale": "F32"}


@dataclass(frozen=True)
class Entry:
    """What the header of a safetensors file says of one tensor.

    Attributes:
        dtype: as safetensors spells it, "U8" or "F8_E4M3".
        shape: of the tensor.
        start: first byte of its data in the file.
        end: the byte behind its data.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def check_files(files: Iterable[str], quantized: Iterable[str], model: nn.Module) -> None:
    """Check the headers of safetensors files against the modules listed in config.json.

    Args:
        files: paths of all shards.
        quantized: module names without the base model's prefix.
        model: that is being loaded; files may spell names with its base model's prefix.

    Raises:
        ValueError: names the first tensor that is cut off, missing, not announced or of a wrong
            dtype.
    """
    stored: dict[str, str] = {}
    for file in files:
        for name, kind in read_header(Path(file)).items():
            stored[canonical_name(model, name)] = kind
    listed = set(quantized)
    packed = {
        name.removesuffix(".weight_scale") for name in stored if name.endswith(".weight_scale")
    }
    missing, extra = sorted(listed - packed), sorted(packed - listed)
    if missing and len(missing) == len(extra):
        # The architecture renames its weights on loading; `check_arrived` sees what is missing.
        return
    if extra:
        raise ValueError(
            f"tensor {extra[0]}.weight_scale is stored, but quantized_modules in "
            f"config.json does not list {extra[0]}: they are of different checkpoints"
        )
    for name in sorted(listed):
        for part, expected in DTYPES.items():
            if (dtype := stored.get(f"{name}.{part}")) is None:
                if part == "input_scale":  # absent where inputs stay unquantized
                    continue
                raise ValueError(
                    f"tensor {name}.{part} is missing from the checkpoint: save it again"
                )
            if dtype != expected:
                raise ValueError(
                    f"tensor {name}.{part} has dtype {dtype}, expected {expected}: save it again"
                )


def read_header(path: Path) -> dict[str, str]:
    """Read tensor names and dtypes of one safetensors file, as `read_entries`."""
    return {name: entry.dtype for name, entry in read_entries(path).items()}


def read_entries(path: Path) -> dict[str, Entry]:
    """Read the header of one safetensors file, without its data.

    Returns:
        What it says, by tensor name, in the order of the data.

    Raises:
        ValueError: the file is shorter than its header says; names the first tensor that is cut
            off.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size:
            raise ValueError(f"{path} is truncated inside its header: download or save it again")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise ValueError(f"{path} is not a safetensors file: {error}") from error
    header.pop("__metadata__", None)
    entries = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        first, end = (8 + length + offset for offset in entry["data_offsets"])
        if end > size:
            raise ValueError(
                f"{path} is truncated: tensor {name} ends at byte {end}, the file at {size}; "
                "download or save it again"
            )
        entries[name] = Entry(entry["dtype"], tuple(entry["shape"]), first, end)
    return entries


def accept_loaded(name: str, module: nn.Module, scales: Sequence[str] = SCALES) -> None:
    """Check a module that Transformers has loaded, and freeze its scales.

    Args:
        name: of the module, for the errors.
        module: may be offloaded.
        scales: names of its parameters that are scales or importances.

    Raises:
        ValueError: names a tensor that is missing, of a wrong shape or damaged.
    """
    check_arrived(name, module)
    with align_module_device(module):
        check_scales(name, module, scales)
    for part in scales:
        if (parameter := getattr(module, part)) is not None:
            parameter.requires_grad_(False)


def check_arrived(name: str, module: nn.Module) -> None:
    """Raise ValueError, naming the tensor, unless loading filled every parameter of a module.

    Transformers leaves what a checkpoint lacks uninitialised; it marks what it has loaded.
    Offloaded parameters carry no mark; `check_files` has seen them.
    """
    layout = module.packed_layout() if isinstance(module, NVFP4Linear) else {}
    for part, parameter in module.named_parameters(recurse=False):
        if parameter.device.type == "meta":
            continue
        if not getattr(parameter, "_is_hf_initialized", False):
            raise ValueError(f"tensor {name}.{part} is missing from the checkpoint")
        shape, dtype = layout.get(part, (parameter.shape, parameter.dtype))
        if tuple(parameter.shape) != tuple(shape) or parameter.dtype != dtype:
            raise ValueError(
                f"tensor {name}.{part} is {parameter.dtype} {list(parameter.shape)}, expected "
                f"{dtype} {list(shape)}: config.json and weights are of different checkpoints"
            )


def check_scales(name: str, module: nn.Module, parts: Iterable[str]) -> None:
    """Raise ValueError, naming the tensor, unless all scales are finite and positive.

    Args:
        name: of the module.
        module: on a real device.
        parts: names of its scales; those that are None are left out. Importances may be zero.
    """
    for part in parts:
        scale = getattr(module, part)
        if scale is None:
            continue
        value = scale.to(torch.float32)
        allowed = value >= 0 if part.endswith("importance") else value > 0
        bad = ~(torch.isfinite(value) & allowed)
        if bad.any():
            raise ValueError(
                f"tensor {name}.{part} has {int(bad.sum())} scales that are NaN, infinite or not "
                f"positive, the first {value[bad].flatten()[0].item()}: the checkpoint is damaged"
            )
