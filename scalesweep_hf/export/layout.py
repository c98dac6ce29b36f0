"""What an NVFP4 checkpoint folder holds, whichever tool wrote it, read from headers and scalars.

Two spellings exist. For a Linear ``P`` of weight [N, K]:

| | ModelOpt, and this package | compressed-tensors |
|---|---|---|
| two codes a byte, uint8 [N, K/2] | P.weight | P.weight_packed |
| block scales, float8_e4m3fn [N, K/16] | P.weight_scale | P.weight_scale |
| tensor scale S, float32 | P.weight_scale_2 = S, [] | P.weight_global_scale = 1/S, [1] |
| static scale of the input, float32 | P.input_scale = S, [] | P.input_global_scale = 1/S, [1] |
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open

from scalesweep_hf.checkpoint import Entry, read_entries

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass(frozen=True)
class Spelling:
    """How a tool names the four tensors of a packed Linear.

    Attributes:
        packed: suffix of the codes.
        tensor_scale: suffix of the tensor scale.
        input_scale: suffix of the input's tensor scale.
        inverse: whether both are stored as reciprocals.
    """

    packed: str
    tensor_scale: str
    input_scale: str
    inverse: bool


MODELOPT = Spelling("weight", "weight_scale_2", "input_scale", inverse=False)
COMPRESSED_TENSORS = Spelling(
    "weight_packed", "weight_global_scale", "input_global_scale", inverse=True
)
BLOCK_SCALE = "weight_scale"


@dataclass(frozen=True)
class Layer:
    """One packed Linear.

    Attributes:
        name: of the module, as the files spell it.
        spelling: of its tensors.
        tensor_scale: what multiplies towards the weight; NaN where it is missing.
        input_scale: what multiplies towards the input; None where it is not stored.
    """

    name: str
    spelling: Spelling
    tensor_scale: float
    input_scale: float | None

    def tensor(self, suffix: str) -> str:
        """Return the full name of one of its tensors."""
        return f"{self.name}.{suffix}"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder.

    Attributes:
        folder: where it is.
        config: of config.json.
        recipe: ``quantization_config`` of config.json, or else hf_quant_config.json; may be empty.
        files: its safetensors files.
        entries: header entries by tensor name.
        file_of: the file by tensor name.
        scalars: values of scales that are one number, by tensor name.
        layers: packed Linears by module name.
    """

    folder: Path
    config: dict[str, Any]
    recipe: dict[str, Any]
    files: list[Path]
    entries: dict[str, Entry] = field(repr=False)
    file_of: dict[str, Path] = field(repr=False)
    scalars: dict[str, float] = field(repr=False)
    layers: dict[str, Layer] = field(repr=False)

    def unquantized(self) -> list[str]:
        """Name the modules that store a two-dimensional weight that is not packed."""
        names = [
            name.removesuffix(".weight")
            for name, entry in self.entries.items()
            if name.endswith(".weight") and len(entry.shape) == 2
        ]
        return [name for name in names if name not in self.layers]

    def with_suffix(self, suffix: str) -> list[str]:
        """Name the modules that store a tensor of this name."""
        ending = f".{suffix}"
        return [name.removesuffix(ending) for name in self.entries if name.endswith(ending)]


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read headers, scalars and configuration of a checkpoint; no large tensor is read.

    Raises:
        FileNotFoundError: there is no config.json, or no safetensors file.
        ValueError: a file is damaged, or a tensor is stored twice.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} has no config.json: name the folder of a checkpoint")
    config = json.loads(file.read_text(encoding="utf-8"))
    recipe = config.get("quantization_config") or read_json(folder / "hf_quant_config.json")
    files = weight_files(folder)
    entries: dict[str, Entry] = {}
    file_of: dict[str, Path] = {}
    for shard in files:
        for name, entry in read_entries(shard).items():
            if name in entries:
                raise ValueError(f"{shard} and {file_of[name]} both store {name}: remove one")
            entries[name], file_of[name] = entry, shard
    scalars = _read_scalars(entries, file_of)
    layers = _find_layers(entries, scalars)
    return Checkpoint(folder, config, recipe, files, entries, file_of, scalars, layers)


def read_json(file: Path) -> dict[str, Any]:
    """Return what a JSON file holds; nothing where there is none."""
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def weight_files(folder: Path) -> list[Path]:
    """List the safetensors files of a checkpoint: those of its index, or the only one.

    Raises:
        FileNotFoundError: there is none, or one that the index names is missing.
    """
    index = read_json(folder / INDEX)
    if index:
        files = [folder / name for name in sorted(set(index["weight_map"].values()))]
    elif (folder / SINGLE).is_file():
        files = [folder / SINGLE]
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} has no safetensors file")
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing, which {INDEX} names: download it again")
    return files


def _read_scalars(entries: dict[str, Entry], file_of: dict[str, Path]) -> dict[str, float]:
    wanted: dict[Path, list[str]] = {}
    for name, entry in entries.items():
        if "scale" in name.rpartition(".")[2] and entry.shape in ((), (1,)):
            wanted.setdefault(file_of[name], []).append(name)
    scalars = {}
    for file, names in wanted.items():
        with safe_open(file, framework="pt") as opened:
            scalars.update({name: float(opened.get_tensor(name)) for name in names})
    return scalars


def _find_layers(entries: dict[str, Entry], scalars: dict[str, float]) -> dict[str, Layer]:
    layers = {}
    for name, entry in entries.items():
        if not name.endswith(f".{BLOCK_SCALE}") or entry.dtype != "F8_E4M3":
            continue
        module = name.removesuffix(f".{BLOCK_SCALE}")
        for spelling in (COMPRESSED_TENSORS, MODELOPT):
            packed = entries.get(f"{module}.{spelling.packed}")
            if packed is not None and packed.dtype == "U8":
                scale = scalars.get(f"{module}.{spelling.tensor_scale}", float("nan"))
                inputs = scalars.get(f"{module}.{spelling.input_scale}")
                if spelling.inverse:
                    scale = _inverse(scale)
                    inputs = None if inputs is None else _inverse(inputs)
                layers[module] = Layer(module, spelling, scale, inputs)
                break
    return layers


def _inverse(value: float) -> float:
    return 1 / value if value else float("inf")
