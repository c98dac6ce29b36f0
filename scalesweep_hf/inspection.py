"""Say what a saved checkpoint holds, from its headers and block scales, without loading it."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from scalesweep_hf.checkpoint import read_header
from scalesweep_hf.config import METHOD
from scalesweep_hf.ops import e4m3
from scalesweep_hf.ops.sweep import BLOCK

MB = 1e6
SUBNORMAL = 8  # codes below it


def summarise(path: Path) -> dict[str, Any]:
    """Summarise a checkpoint of this package.

    Args:
        path: its folder.

    Returns:
        JSON types: recipe, size in MB, quantized Linears, bits per quantized weight, the range of
        tensor scales, and the percentages of block scales that are subnormal or the largest E4M3
        value.

    Raises:
        FileNotFoundError: there is no config.json, or no safetensors file.
        ValueError: the checkpoint is not of this package, or a file is damaged.
    """
    file = path / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{path} has no config.json: name the folder of a checkpoint")
    recipe = json.loads(file.read_text(encoding="utf-8")).get("quantization_config") or {}
    if recipe.get("quant_method") != METHOD:
        raise ValueError(
            f"{path} is not quantized by {METHOD!r}: its quant_method is "
            f"{recipe.get('quant_method')!r}"
        )
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{path} has no safetensors file")
    counts = {"weights": 0, "bits": 0, "scales": 0, "subnormal": 0, "largest": 0}
    tensor_scales: list[float] = []
    for shard in files:
        _add_shard(shard, counts, tensor_scales)
    calibration = recipe.get("calibration") or {}
    result = {key: recipe.get(key) for key in ("scheme", "algorithm", "objective", "version")}
    if calibration:
        rows, length = calibration.get("num_samples"), calibration.get("sequence_length")
        size = f", {rows} x {length} tokens" if rows else ""
        result["calibration"] = f"{calibration.get('source')}{size}"
    result["size_mb"] = round(sum(shard.stat().st_size for shard in files) / MB, 1)
    result["linears"] = len(recipe.get("quantized_modules") or [])
    if counts["weights"]:
        result["weights"] = counts["weights"]
        result["bits_per_weight"] = counts["bits"] / counts["weights"]
        result["tensor_scale_min"], result["tensor_scale_max"] = (
            min(tensor_scales),
            max(tensor_scales),
        )
        for kind in ("subnormal", "largest"):
            result[f"{kind}_scales_percent"] = 100 * counts[kind] / counts["scales"]
    return result


def _add_shard(shard: Path, counts: dict[str, int], tensor_scales: list[float]) -> None:
    read_header(shard)  # says which tensor is cut off, if one is
    with safe_open(shard, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118 (not a mapping)
            if name.endswith(".weight_scale_2"):
                tensor_scales.append(float(opened.get_tensor(name)))
                counts["bits"] += 32
            elif name.endswith(".weight_scale"):
                codes: Tensor = opened.get_tensor(name).view(torch.uint8)
                counts["weights"] += codes.numel() * BLOCK
                counts["bits"] += codes.numel() * (BLOCK * 4 + 8)
                counts["scales"] += codes.numel()
                counts["subnormal"] += int((codes < SUBNORMAL).sum())
                counts["largest"] += int((codes == e4m3.MAX_CODE).sum())
