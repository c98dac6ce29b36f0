"""Write a checkpoint of this package for other engines."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scalesweep_hf.config import METHOD
from scalesweep_hf.export import compressed_tensors, modelopt
from scalesweep_hf.export.layout import INDEX, Checkpoint, read_checkpoint, read_json
from scalesweep_hf.export.shards import Change, check_shard, write_shard
from scalesweep_hf.export.unquantized import empty_model, find_unquantized
from scalesweep_hf.files import check_free, whole_folder

TARGETS = ("compressed-tensors", "modelopt")
# What stands beside the weights: tokenizer, templates, generation settings, licences.
BESIDE = (".json", ".jsonl", ".txt", ".model", ".jinja", ".tiktoken")
REWRITTEN = ("config.json", "hf_quant_config.json", INDEX)


def export_checkpoint(
    source: str | Path, out: Path, target: str, *, states: bool = True
) -> dict[str, Any]:
    """Write a saved checkpoint in the form that other engines read.

    Weights keep their bytes; files are copied in pieces, one after the other, so that memory does
    not depend on their size, and files in which nothing changes become hard links (copies where
    the file system has none). The result is read back before the folder gets its name.

    Args:
        source: folder, or id on the Hub.
        out: folder to make.
        target: "compressed-tensors" or "modelopt".
        states: whether scales of keys, values and queries are exported; False leaves them out, so
            that an engine keeps its cache in full precision.

    Returns:
        JSON types: the target, the number of packed Linears and of files that were written and
        linked, and the Linears whose weights a reader's arithmetic does not reproduce to the bit.

    Raises:
        FileExistsError: ``out`` exists and is not empty.
        FileNotFoundError: ``source`` has no config.json or no weights.
        ValueError: the checkpoint is not of this package or is damaged, or the target cannot
            express it; says what and what to do.
    """
    if target not in TARGETS:
        raise ValueError(f"format is {target!r}; use one of {', '.join(TARGETS)}")
    check_free(out)
    checkpoint = _read_own(find_folder(source))
    model = empty_model(checkpoint)
    unquantized = find_unquantized(checkpoint, model)
    inexact: list[str] = []
    extra: dict[str, Any] = {}
    if target == "compressed-tensors":
        recipe = compressed_tensors.configure(checkpoint, unquantized, model, states=states)
        changes, inexact = compressed_tensors.rename(checkpoint, states=states)
    else:
        changes = modelopt.drop_states(checkpoint, states=states)
        extra["hf_quant_config.json"] = modelopt.describe(checkpoint, unquantized)
        recipe = modelopt.configure(extra["hf_quant_config.json"])
    extra["config.json"] = checkpoint.config | {"quantization_config": recipe}
    with whole_folder(out) as part:
        linked = _write(checkpoint, part, changes, extra)
        _check(checkpoint, part)
    return {
        "format": target,
        "linears": len(checkpoint.layers),
        "files_written": len(checkpoint.files) - linked,
        "files_linked": linked,
        "inexact": inexact,
    }


def find_folder(source: str | Path) -> Path:
    """Return a local folder, or download a repository of the Hub.

    Raises:
        FileNotFoundError: it is neither.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder
    if folder.is_absolute() or str(source).count("/") != 1:
        raise FileNotFoundError(f"{source} is no folder, nor an id of the Hub as owner/name")
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(source)))


def _read_own(folder: Path) -> Checkpoint:
    checkpoint = read_checkpoint(folder)
    method = checkpoint.recipe.get("quant_method")
    if method != METHOD:
        raise ValueError(
            f"{folder} is not quantized by {METHOD!r}: its quant_method is {method!r}; only "
            "checkpoints of this package are exported"
        )
    if len(checkpoint.layers) != len(checkpoint.recipe.get("quantized_modules") or ()):
        raise ValueError(
            f"{folder} stores {len(checkpoint.layers)} packed Linears, but config.json lists "
            f"{len(checkpoint.recipe.get('quantized_modules') or ())}: save it again"
        )
    return checkpoint


def _write(
    checkpoint: Checkpoint, part: Path, changes: Mapping[str, Change], extra: Mapping[str, Any]
) -> int:
    """Fill a folder; return how many weight files are links."""
    places: dict[str, str] = {}
    total = linked = 0
    for file in checkpoint.files:
        target = part / file.name
        sizes = write_shard(file, target, changes)
        check_shard(file, target, changes)
        places |= dict.fromkeys(sizes, file.name)
        total += sum(sizes.values())
        linked += target.stat().st_nlink > 1
    if index := read_json(checkpoint.folder / INDEX):
        metadata = index.get("metadata", {}) | {"total_size": total}
        _write_json(part / INDEX, {"metadata": metadata, "weight_map": places})
    for name, value in extra.items():
        _write_json(part / name, value)
    for file in sorted(checkpoint.folder.iterdir()):
        beside = file.suffix in BESIDE or file.stem.startswith(("LICENSE", "NOTICE"))
        if file.is_file() and beside and file.name not in REWRITTEN:
            shutil.copyfile(file, part / file.name)
    return linked


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _check(checkpoint: Checkpoint, part: Path) -> None:
    """Raise ValueError unless the folder reads back with the same packed Linears."""
    written = read_checkpoint(part)
    if written.layers.keys() != checkpoint.layers.keys():
        lost = sorted(checkpoint.layers.keys() ^ written.layers.keys())
        raise ValueError(f"{lost[0]} does not read back as a packed Linear: export again")
    for name, layer in checkpoint.layers.items():
        found = written.layers[name]
        for scale, again in (
            (layer.tensor_scale, found.tensor_scale),
            (layer.input_scale, found.input_scale),
        ):
            same = scale == again or (
                scale is not None and again is not None and abs(again / scale - 1) < 1e-6
            )
            if not same:
                raise ValueError(f"{name} reads back with scale {again}, expected {scale}")
