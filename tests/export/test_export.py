"""What an export writes: names, bytes, links, configuration; and what it refuses."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from scalesweep_hf.export import export_checkpoint, shards
from scalesweep_hf.export import run as run_module
from scalesweep_hf.export.compressed_tensors import find_divisor
from scalesweep_hf.export.layout import read_checkpoint
from scalesweep_hf.export.unquantized import _collapse
from tests.models import load

Quantized = Callable[..., Path]


def tensors(folder: Path) -> dict[str, Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def config_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text()))


@pytest.mark.parametrize("scheme", ["W", "WA"])
def test_compressed_tensors_renames_weights_and_inverts_scales(
    quantized: Quantized, tmp_path: Path, scheme: str
) -> None:
    source = quantized("llama-tied-biased", scheme)
    result = export_checkpoint(source, tmp_path / "out", "compressed-tensors")
    before, after = tensors(source), tensors(tmp_path / "out")
    assert result["linears"] == 14
    for name in read_checkpoint(source).layers:
        assert torch.equal(after.pop(f"{name}.weight_packed"), before.pop(f"{name}.weight"))
        scale, kept = before.pop(f"{name}.weight_scale"), after.pop(f"{name}.weight_scale")
        assert kept.dtype == torch.float8_e4m3fn
        assert torch.equal(kept.view(torch.uint8), scale.view(torch.uint8))
        expected, _ = find_divisor(before.pop(f"{name}.weight_scale_2"))
        assert torch.equal(after.pop(f"{name}.weight_global_scale"), expected)
        if scheme == "WA":
            expected, _ = find_divisor(before.pop(f"{name}.input_scale"))
            assert torch.equal(after.pop(f"{name}.input_global_scale"), expected)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("scheme", ["W", "WA"])
def test_modelopt_changes_no_tensor_and_copies_no_weight(
    quantized: Quantized, tmp_path: Path, scheme: str
) -> None:
    source = quantized("qwen3", scheme)
    result = export_checkpoint(source, tmp_path / "out", "modelopt")
    assert (result["files_written"], result["files_linked"]) == (0, 1)
    assert (tmp_path / "out" / "model.safetensors").samefile(source / "model.safetensors")
    facts = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"]
    assert facts == {
        "quant_algo": "NVFP4" if scheme == "WA" else "W4A16_NVFP4",
        "kv_cache_quant_algo": None,
        "group_size": 16,
        "exclude_modules": ["lm_head", "model.embed_tokens"],
    }
    config = config_of(tmp_path / "out")
    group = config["quantization_config"]["config_groups"]["group_0"]
    assert ("input_activations" in group) == (scheme == "WA")
    assert config["quantization_config"]["quant_method"] == "modelopt"
    rest = config_of(source)
    del rest["quantization_config"], config["quantization_config"]
    assert config == rest


@pytest.mark.parametrize(
    ("architecture", "unquantized"),
    [("llama-tied-biased", ["lm_head"]), ("bert", ["classifier"]), ("llama", ["lm_head"])],
)
def test_everything_unquantized_is_named_tied_heads_too(
    quantized: Quantized, tmp_path: Path, architecture: str, unquantized: list[str]
) -> None:
    export_checkpoint(quantized(architecture), tmp_path / "out", "compressed-tensors")
    assert config_of(tmp_path / "out")["quantization_config"]["ignore"] == unquantized


def test_experts_of_which_none_is_packed_become_one_pattern() -> None:
    names = ["a.experts.0.up", "a.experts.1.up", "b.experts.0.up", "b.experts.1.up", "head"]
    assert _collapse(names, ["b.experts.2.up"]) == (
        ["b.experts.0.up", "b.experts.1.up", "head"],
        ["a.experts"],
    )


def test_shards_are_written_one_by_one_and_untouched_ones_linked(
    quantized: Quantized, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(quantized("llama", "WA")).save_pretrained(tmp_path / "in", max_shard_size="8KB")
    (tmp_path / "in" / "tokenizer.json").write_text("{}")
    (tmp_path / "in" / "weights.bin").write_bytes(b"not copied")
    monkeypatch.setattr(shards, "PIECE", 100)  # many pieces to a tensor, and a rest
    result = export_checkpoint(tmp_path / "in", tmp_path / "out", "compressed-tensors")
    assert result["files_linked"] >= 1
    assert result["files_written"] >= 3
    whole = tmp_path / "whole"
    export_checkpoint(quantized("llama", "WA"), whole, "compressed-tensors")
    expected, found = tensors(whole), tensors(tmp_path / "out")
    assert expected.keys() == found.keys()
    assert all(
        torch.equal(expected[n].view(torch.uint8), found[n].view(torch.uint8)) for n in found
    )
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == found.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "out" / file, framework="pt") as opened:
            assert name in opened.keys()  # noqa: SIM118
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert (tmp_path / "out" / "generation_config.json").is_file()
    assert not (tmp_path / "out" / "weights.bin").exists()


def test_inputs_of_only_some_modules_make_two_groups_of_names(
    quantized: Quantized, tmp_path: Path
) -> None:
    source = quantized("llama", "WA", overrides={"*.down_proj": {"activations": None}})
    export_checkpoint(source, tmp_path / "out", "compressed-tensors")
    first, second = config_of(tmp_path / "out")["quantization_config"]["config_groups"].values()
    assert first["input_activations"]["dynamic"] == "local"
    assert second["input_activations"] is None
    assert second["targets"] == [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]
    assert len(first["targets"]) == 12
    with pytest.raises(ValueError, match=r"down_proj is not quantized.*export to compressed-tens"):
        export_checkpoint(source, tmp_path / "other", "modelopt")


def test_scales_of_states_are_inverted_and_importances_dropped(
    quantized: Quantized, tmp_path: Path
) -> None:
    source = quantized("llama", "WAKVQ", "wmse")
    export_checkpoint(source, tmp_path / "out", "compressed-tensors")
    before, after = tensors(source), tensors(tmp_path / "out")
    for letter in "qkv":
        name = f"model.layers.1.self_attn.{letter}"
        expected, _ = find_divisor(before[f"{name}_scale"])
        assert torch.equal(after[f"{name}_global_scale"], expected)
    assert any("importance" in name for name in before)
    assert not any("importance" in name or name.endswith("k_scale") for name in after)
    recipe = config_of(tmp_path / "out")["quantization_config"]
    assert recipe["kv_cache_scheme"]["num_bits"] == 4
    assert recipe["config_groups"]["group_1"]["targets"] == [
        f"re:model.layers.{i}.self_attn$".replace(".", "\\.") for i in (0, 1)
    ]


@pytest.mark.parametrize("target", ["compressed-tensors", "modelopt"])
def test_without_states_nothing_speaks_of_them(
    quantized: Quantized, tmp_path: Path, target: str
) -> None:
    export_checkpoint(quantized("llama", "WAKVQ"), tmp_path / "with", target, states=False)
    export_checkpoint(quantized("llama", "WA"), tmp_path / "wa", target)
    assert config_of(tmp_path / "with") == config_of(tmp_path / "wa")
    assert tensors(tmp_path / "with").keys() == tensors(tmp_path / "wa").keys()


@pytest.mark.parametrize(
    ("scheme", "overrides", "target", "message"),
    [
        ("WAKV", {}, "modelopt", r"k_scale: readers .* do not agree .* --without-states"),
        ("WAKV", {"keys": None}, "compressed-tensors", r"values are quantized; .*--without-states"),
        ("WA", {}, "gguf", r"format is 'gguf'; use one of compressed-tensors, modelopt"),
    ],
)
def test_what_a_target_cannot_express_is_refused_with_the_remedy(
    quantized: Quantized,
    tmp_path: Path,
    scheme: str,
    overrides: dict[str, Any],
    target: str,
    message: str,
) -> None:
    source = quantized("llama", scheme, overrides=overrides) if overrides else None
    with pytest.raises(ValueError, match=message):
        export_checkpoint(source or quantized("llama", scheme), tmp_path / "out", target)
    assert not list(tmp_path.iterdir())


def test_a_wrong_source_is_refused_by_name(
    quantized: Quantized, random_model: Callable[[str], Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="is not quantized by 'scalesweep': its quant_method is N"):
        export_checkpoint(random_model("llama"), out, "modelopt")
    with pytest.raises(FileNotFoundError, match="is no folder, nor an id of the Hub"):
        export_checkpoint(tmp_path / "nothing", out, "modelopt")
    folder = Path(shutil.copytree(quantized("llama"), tmp_path / "own-code"))
    config = config_of(folder) | {"architectures": ["OwnModel"]}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"'OwnModel' .* is not part of transformers"):
        export_checkpoint(folder, out, "modelopt")
    config["quantization_config"]["quantized_modules"].pop()
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"stores 14 packed Linears, but config.json lists 13"):
        export_checkpoint(folder, out, "modelopt")
    out.mkdir()
    (out / "precious").write_text("x")
    with pytest.raises(FileExistsError, match="exists: name a new folder"):
        export_checkpoint(quantized("llama"), out, "modelopt")
    assert (out / "precious").read_text() == "x"


@pytest.mark.parametrize("at", [-1, -40_000])
def test_a_byte_that_reads_back_wrong_leaves_no_folder(
    quantized: Quantized, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    write = shards.write_shard

    def damage(source: Path, target: Path, changes: Any) -> Any:
        sizes = write(source, target, changes)
        data = bytearray(target.read_bytes())
        data[at] ^= 1
        target.write_bytes(data)
        return sizes

    monkeypatch.setattr(run_module, "write_shard", damage)
    with pytest.raises(ValueError, match="reads back other bytes than were written"):
        export_checkpoint(quantized("llama"), tmp_path / "out", "compressed-tensors")
    assert not list(tmp_path.iterdir())


def test_a_file_system_without_links_gets_copies(
    quantized: Quantized, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any) -> None:
        raise OSError("no links here")

    monkeypatch.setattr("os.link", refuse)
    result = export_checkpoint(quantized("llama"), tmp_path / "out", "modelopt")
    assert result["files_linked"] == 0
    source = quantized("llama") / "model.safetensors"
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == source.read_bytes()
