"""The contract of vLLM and SGLang: exports keep it, and every breach is named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from scalesweep_hf.export import export_checkpoint
from scalesweep_hf.export.layout import read_checkpoint
from scalesweep_hf.export.serving import check_serving
from scalesweep_hf.inspection import explain

Quantized = Callable[..., Path]
Q = "model.layers.0.self_attn.q_proj"


class Broken:
    """A copy of an export to break."""

    def __init__(self, source: Path, folder: Path) -> None:
        self.folder = Path(shutil.copytree(source, folder))
        self.file = self.folder / "model.safetensors"
        self.tensors = load_file(self.file)
        self.config = json.loads((self.folder / "config.json").read_text())
        self.recipe: dict[str, Any] = self.config["quantization_config"]

    def problems(self, engine: str) -> list[str]:
        self.file.unlink()
        save_file(self.tensors, self.file, {"format": "pt"})
        (self.folder / "config.json").write_text(json.dumps(self.config))
        return check_serving(read_checkpoint(self.folder), engine)


@pytest.fixture
def export(quantized: Quantized, tmp_path: Path) -> Callable[[str], Broken]:
    def make(target: str) -> Broken:
        export_checkpoint(quantized("llama", "WA"), tmp_path / "out", target)
        return Broken(tmp_path / "out", tmp_path / "broken")

    return make


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize("target", ["compressed-tensors", "modelopt"])
@pytest.mark.parametrize("architecture", ["llama", "llama-tied-biased", "gemma2"])
def test_exports_keep_the_contract(
    quantized: Quantized, tmp_path: Path, architecture: str, target: str, engine: str
) -> None:
    export_checkpoint(quantized(architecture, "WA"), tmp_path / "out", target)
    assert check_serving(read_checkpoint(tmp_path / "out"), engine) == []


def test_weight_only_modelopt_is_for_vllm_alone(quantized: Quantized, tmp_path: Path) -> None:
    export_checkpoint(quantized("llama"), tmp_path / "out", "modelopt")
    checkpoint = read_checkpoint(tmp_path / "out")
    assert check_serving(checkpoint, "vllm") == []
    (problem,) = check_serving(checkpoint, "sglang")
    assert "quant_algo 'W4A16_NVFP4' is none that sglang reads (NVFP4)" in problem


def test_our_own_method_is_unknown_to_engines(
    quantized: Quantized, random_model: Callable[[str], Path]
) -> None:
    (problem,) = check_serving(read_checkpoint(quantized("llama")), "vllm")
    assert "'scalesweep' is unknown to vllm" in problem
    (problem,) = check_serving(read_checkpoint(random_model("llama")), "vllm")
    assert "None is unknown to vllm" in problem
    with pytest.raises(ValueError, match="engine is 'tgi'; use one of vllm, sglang"):
        check_serving(read_checkpoint(quantized("llama")), "tgi")


def test_four_bit_states_are_read_by_no_engine(quantized: Quantized, tmp_path: Path) -> None:
    export_checkpoint(quantized("llama", "WAKVQ"), tmp_path / "out", "compressed-tensors")
    problems = check_serving(read_checkpoint(tmp_path / "out"), "vllm")
    assert len(problems) == 2
    assert "kv_cache_scheme has 4 bits and strategy 'tensor_group'" in problems[0]
    assert "config group 'group_1' has no weights" in problems[1]


def set_to(value: Any) -> Callable[[Tensor], Tensor]:
    return lambda old: torch.full_like(old, value)


@pytest.mark.parametrize(
    ("part", "change", "expected"),
    [
        ("weight_global_scale", lambda x: x * 2, "fused projections differ in tensor_scale: "),
        ("input_global_scale", lambda x: x * 2, "fused projections differ in input_scale: "),
        ("input_global_scale", set_to(0.0), "stands for the scale inf, which is not positive"),
        ("weight_global_scale", set_to(float("nan")), "stands for the scale nan"),
        ("weight_global_scale", Tensor.bfloat16, "is BF16 [1], expected F32 of one element"),
        ("weight_global_scale", lambda x: x.expand(3).clone(), "is F32 [3], expected F32 of one"),
        ("weight_global_scale", None, f"{Q}.weight_global_scale is missing"),
        ("input_global_scale", None, f"{Q} has quantized inputs by its config group, but none is"),
        ("weight_scale", lambda x: x.reshape(16, 16), "row by row"),
    ],
)
def test_a_broken_tensor_is_named(
    export: Callable[[str], Broken],
    part: str,
    change: Callable[[Tensor], Tensor] | None,
    expected: str,
) -> None:
    broken = export("compressed-tensors")
    old = broken.tensors.pop(f"{Q}.{part}")
    if change is not None:
        broken.tensors[f"{Q}.{part}"] = change(old)
    problems = broken.problems("vllm")
    assert any(expected in problem and Q in problem for problem in problems), problems


def test_a_fused_projection_that_is_not_quantized_is_named(
    export: Callable[[str], Broken],
) -> None:
    broken = export("compressed-tensors")
    for part in ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale"):
        del broken.tensors[f"{Q}.{part}"]
    broken.tensors[f"{Q}.weight"] = torch.zeros(64, 64, dtype=torch.bfloat16)
    problems = broken.problems("vllm")
    assert any("fused with it, is not: do both" in problem for problem in problems)
    assert any("no entry of the ignore list matches it" in problem for problem in problems)


@pytest.mark.parametrize(
    ("target", "engine", "key", "value", "expected"),
    [
        ("compressed-tensors", "vllm", "ignore", [], "lm_head is not packed, but no entry"),
        ("compressed-tensors", "vllm", "ignore", ["lm_head", f"re:.*{Q}"], f"{Q} is packed, but"),
        ("compressed-tensors", "sglang", "format", "pack-quantized", "format is 'pack-quantized'"),
        ("compressed-tensors", "vllm", "quant_method", "modelopt", "expected weight"),
        ("modelopt", "vllm", "quant_algo", "FP8", "quant_algo 'FP8' is none that vllm reads"),
        ("modelopt", "vllm", "ignore", ["lm_head", "mlp.gate"], "gate_proj is packed, but vllm"),
        (
            "modelopt",
            "vllm",
            "ignore",
            ["lm_head", "gate_up_proj"],
            "gate_proj is packed, but vllm",
        ),
        ("modelopt", "sglang", "ignore", ["lm_head", "*.qkv_proj"], f"{Q} is packed, but sglang"),
        ("modelopt", "vllm", "ignore", ["lm_head", "*.mlp*"], "gate_proj is packed, but vllm"),
        ("modelopt", "sglang", "ignore", ["other"], "lm_head is not packed, but no entry"),
    ],
)
def test_a_wrong_configuration_is_named(
    export: Callable[[str], Broken],
    target: str,
    engine: str,
    key: str,
    value: Any,
    expected: str,
) -> None:
    broken = export(target)
    broken.recipe[key] = value
    problems = broken.problems(engine)
    assert any(expected in problem for problem in problems), problems


def test_part_of_a_name_excludes_in_vllm_and_not_in_sglang(
    export: Callable[[str], Broken],
) -> None:
    broken = export("modelopt")
    broken.recipe["ignore"] = ["lm_head", "mlp.gate"]
    assert broken.problems("sglang") == []


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_wildcards_are_held_against_fused_names(
    export: Callable[[str], Broken], engine: str
) -> None:
    broken = export("modelopt")
    broken.recipe["ignore"] = ["lm_head", "*.q_proj"]  # which no engine builds
    assert broken.problems(engine) == []


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_a_modelopt_folder_needs_its_own_file(export: Callable[[str], Broken], engine: str) -> None:
    broken = export("modelopt")
    file = broken.folder / "hf_quant_config.json"
    facts = json.loads(file.read_text())
    del facts["quantization"]["group_size"]
    facts["quantization"]["exclude_modules"] = []
    file.write_text(json.dumps(facts))
    problems = broken.problems(engine)
    assert any("hf_quant_config.json has no group_size" in problem for problem in problems)
    assert any("which sglang refuses" in problem for problem in problems) == (engine == "sglang")
    file.unlink()
    assert any("is missing or has no" in problem for problem in broken.problems(engine))


def test_a_description_in_its_own_file_alone_is_understood(
    export: Callable[[str], Broken],
) -> None:
    broken = export("modelopt")
    del broken.config["quantization_config"]
    assert broken.problems("vllm") == []
    assert explain(broken.folder)["quant_algo"] == "NVFP4"


def test_every_spelling_is_explained_alike(quantized: Quantized, tmp_path: Path) -> None:
    source = quantized("llama", "WA")
    found = [explain(source)]
    for target in ("compressed-tensors", "modelopt"):
        export_checkpoint(source, tmp_path / target, target)
        found.append(explain(tmp_path / target))
    layers = [{layer.pop("name"): layer for layer in one["layers"]} for one in found]
    assert layers[0] == layers[2]
    for name, layer in layers[0].items():
        other = layers[1][name]
        for key in ("tensor_scale", "input_scale"):
            assert other.pop(key) == pytest.approx(layer.pop(key), rel=1e-6)
        assert other == layer
    assert {one["linears_with_quantized_input"] for one in found} == {14}


def test_shares_of_block_scales_are_counted(quantized: Quantized, tmp_path: Path) -> None:
    broken = Broken(quantized("llama"), tmp_path / "broken")
    scale = broken.tensors[f"{Q}.weight_scale"]
    codes = torch.full(scale.shape, 56, dtype=torch.uint8)
    codes[:, 0], codes[:, 1] = 126, 7
    broken.tensors[f"{Q}.weight_scale"] = codes.view(torch.float8_e4m3fn)
    broken.problems("vllm")
    (layer,) = (one for one in explain(broken.folder)["layers"] if one["name"] == Q)
    assert layer["shape"] == [64, 64]
    assert (layer["largest_scales_percent"], layer["subnormal_scales_percent"]) == (25, 25)
    assert layer["bits_per_weight"] == 4.5 + 32 / 4096
