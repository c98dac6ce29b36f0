"""Explain any NVFP4 checkpoint from its headers and scales, without loading it."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from scalesweep_hf.export.layout import BLOCK_SCALE, Checkpoint, Layer, read_checkpoint
from scalesweep_hf.ops import e4m3
from scalesweep_hf.ops.sweep import BLOCK

MB = 1e6
SUBNORMAL = 8  # codes below it


def summarise(path: Path) -> dict[str, Any]:
    """Summarise an NVFP4 checkpoint of this package, ModelOpt or compressed-tensors.

    Args:
        path: its folder.

    Returns:
        JSON types: recipe, size in MB, packed Linears, bits per quantized weight, the range of
        tensor scales, and the percentages of block scales that are subnormal or the largest E4M3
        value.

    Raises:
        FileNotFoundError: there is no config.json, or no safetensors file.
        ValueError: nothing in the checkpoint is packed, or a file is damaged.
    """
    result = explain(path)
    del result["layers"]
    return result


def explain(path: Path) -> dict[str, Any]:
    """Return what `summarise` does and, under "layers", the same figures of every packed Linear."""
    checkpoint = read_checkpoint(path)
    if not checkpoint.layers:
        raise ValueError(
            f"{path} has no packed NVFP4 Linear; its quant_method is "
            f"{checkpoint.recipe.get('quant_method')!r}: inspect a checkpoint that is quantized"
        )
    result = _recipe(checkpoint)
    result["size_mb"] = round(sum(file.stat().st_size for file in checkpoint.files) / MB, 1)
    layers = _describe_layers(checkpoint)
    blocks = sum(layer["weights"] for layer in layers) // BLOCK
    result["linears"] = len(layers)
    result["weights"] = blocks * BLOCK
    bits = sum(layer["bits_per_weight"] * layer["weights"] for layer in layers)
    result["bits_per_weight"] = bits / result["weights"]
    scales = [layer["tensor_scale"] for layer in layers]
    result["tensor_scale_min"], result["tensor_scale_max"] = min(scales), max(scales)
    for kind in ("subnormal", "largest"):
        key = f"{kind}_scales_percent"
        result[key] = sum(layer[key] * layer["weights"] for layer in layers) / result["weights"]
    return result | {"layers": layers}


def by_kind(layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sum up what `explain` says of layers over the last part of their names."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for layer in layers:
        kinds.setdefault(layer["name"].rpartition(".")[2], []).append(layer)
    rows = []
    for kind, members in kinds.items():
        weights = sum(layer["weights"] for layer in members)
        scales = [layer["tensor_scale"] for layer in members]
        row = {
            "kind": kind,
            "linears": len(members),
            "weights": weights,
            "tensor scales": f"{min(scales):.3g} to {max(scales):.3g}",
        }
        for name in ("subnormal", "largest"):
            share = sum(m[f"{name}_scales_percent"] * m["weights"] for m in members) / weights
            row[f"{name} scales, %"] = f"{share:.3f}"
        rows.append(row)
    return rows


def _recipe(checkpoint: Checkpoint) -> dict[str, Any]:
    recipe = checkpoint.recipe
    result: dict[str, Any] = {"quant_method": recipe.get("quant_method", "modelopt")}
    if algorithm := (recipe.get("quantization") or recipe).get("quant_algo"):
        result["quant_algo"] = algorithm
    keys = ("scheme", "algorithm", "objective", "version", "format")
    result |= {key: recipe[key] for key in keys if key in recipe}
    if calibration := recipe.get("calibration"):
        rows, length = calibration.get("num_samples"), calibration.get("sequence_length")
        size = f", {rows} x {length} tokens" if rows else ""
        result["calibration"] = f"{calibration.get('source')}{size}"
    quantized = [layer for layer in checkpoint.layers.values() if layer.input_scale is not None]
    result["linears_with_quantized_input"] = len(quantized)
    return result


def _describe_layers(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    layers = []
    for file in checkpoint.files:
        with safe_open(file, framework="pt") as opened:
            for name, layer in checkpoint.layers.items():
                if checkpoint.file_of[layer.tensor(BLOCK_SCALE)] == file:
                    codes = opened.get_tensor(layer.tensor(BLOCK_SCALE)).view(torch.uint8)
                    layers.append({"name": name} | _describe_scales(layer, codes))
    return layers


def _describe_scales(layer: Layer, codes: torch.Tensor) -> dict[str, Any]:
    """Describe a layer from its block scales, [N, K/16] uint8 bit patterns."""
    weights = codes.numel() * BLOCK
    return {
        "shape": [codes.shape[0], codes.shape[1] * BLOCK],
        "weights": weights,
        "bits_per_weight": 4 + 8 / BLOCK + 32 / weights,
        "tensor_scale": layer.tensor_scale,
        "input_scale": layer.input_scale,
        "subnormal_scales_percent": 100 * int((codes < SUBNORMAL).sum()) / codes.numel(),
        "largest_scales_percent": 100 * int((codes == e4m3.MAX_CODE).sum()) / codes.numel(),
    }
