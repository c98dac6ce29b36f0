import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from scalesweep_hf import ScaleSweepConfig
from scalesweep_hf.checkpoint import read_header
from tests.models import load, random_tokens

NAME = "model.layers.1.mlp.up_proj"


@pytest.fixture
def packed(random_model: Callable[[str], Path], tmp_path: Path) -> Path:
    config = ScaleSweepConfig(dataset=random_tokens(2, 16))
    load(random_model("llama"), quantization_config=config).save_pretrained(tmp_path)
    return tmp_path


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize("part", ["weight", "weight_scale", "weight_scale_2", "input_scale"])
def test_a_missing_tensor_is_named(part: str, packed: Path) -> None:
    edit(packed, lambda tensors: tensors.pop(f"{NAME}.{part}"))
    short = NAME.removeprefix("model.")
    with pytest.raises(ValueError, match=rf"{short}\.{part} is missing from the checkpoint"):
        load(packed)


def test_a_tensor_missing_under_another_name_is_named(packed: Path) -> None:
    def rename(tensors: dict[str, Any]) -> None:
        tensors["other.weight_scale"] = tensors.pop(f"{NAME}.weight_scale")

    edit(packed, rename)
    with pytest.raises(ValueError, match=rf"{NAME}\.weight_scale is missing"):
        load(packed)


def test_an_extra_packed_tensor_is_named(packed: Path) -> None:
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"]["quantized_modules"].remove("layers.1.mlp.up_proj")
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight_scale is stored, but"):
        load(packed)


def test_a_wrong_dtype_is_named(packed: Path) -> None:
    def cast(tensors: dict[str, Any]) -> None:
        tensors[f"{NAME}.weight_scale"] = tensors[f"{NAME}.weight_scale"].to(torch.bfloat16)

    edit(packed, cast)
    with pytest.raises(ValueError, match=r"up_proj\.weight_scale has dtype BF16, expected F8_E4M3"):
        load(packed)


@pytest.mark.parametrize(
    ("part", "value"),
    [("weight_scale", 127), ("weight_scale", 255), ("weight_scale", 0), ("weight_scale", 130)],
)
def test_a_block_scale_that_is_not_positive_is_named(part: str, value: int, packed: Path) -> None:
    def damage(tensors: dict[str, Any]) -> None:
        tensors[f"{NAME}.{part}"].view(torch.uint8)[3, 2] = value

    edit(packed, damage)
    with pytest.raises(ValueError, match=rf"{NAME}\.{part} has 1 scales that are NaN"):
        load(packed)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
@pytest.mark.parametrize("part", ["weight_scale_2", "input_scale"])
def test_a_tensor_scale_that_is_not_positive_is_named(
    part: str, value: float, packed: Path
) -> None:
    edit(packed, lambda tensors: tensors[f"{NAME}.{part}"].fill_(value))
    with pytest.raises(ValueError, match=rf"{NAME}\.{part} has 1 scales that are NaN"):
        load(packed)


@pytest.mark.parametrize("part", ["weight", "weight_scale", "weight_scale_2", "input_scale"])
def test_a_wrong_shape_is_an_error(part: str, packed: Path) -> None:
    def cut(tensors: dict[str, Any]) -> None:
        tensor = tensors[f"{NAME}.{part}"]
        tensors[f"{NAME}.{part}"] = tensor[:32].clone() if tensor.ndim else tensor.repeat(96)

    edit(packed, cut)
    with pytest.raises((ValueError, RuntimeError), match=r"up_proj|size mismatch|mismatched"):
        load(packed)


def test_junk_instead_of_a_header_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "junk.safetensors"
    path.write_bytes((8).to_bytes(8, "little") + b"not json")
    with pytest.raises(ValueError, match=r"junk\.safetensors is not a safetensors file"):
        read_header(path)


@pytest.mark.parametrize("lost", [1, 5000])
def test_a_truncated_shard_names_the_first_tensor_cut_off(lost: int, packed: Path) -> None:
    file = packed / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-lost])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated: tensor \S+ ends at"):
        load(packed)


def test_a_shard_cut_inside_its_header_is_an_error(packed: Path) -> None:
    file = packed / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="truncated inside its header"):
        load(packed)


@pytest.mark.slow
def test_without_the_plug_in_loading_fails_hard(packed: Path) -> None:
    script = (
        "import sys, transformers; transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    )
    command = [sys.executable, "-c", script, str(packed)]
    env = os.environ | {"SCALESWEEP_NO_AUTOLOAD": "1"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert result.returncode != 0
    assert "size mismatch" in result.stderr.lower() or "mismatch" in result.stderr.lower()
    plugged = [sys.executable, "-c", f"import scalesweep_hf; {script}", str(packed)]
    assert subprocess.run(plugged, capture_output=True, check=False).returncode == 0
