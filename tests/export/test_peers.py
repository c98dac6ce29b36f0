"""Our exports beside what llm-compressor and Model-Optimizer write and read."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from scalesweep_hf import NVFP4Linear, ScaleSweepConfig
from scalesweep_hf.export import export_checkpoint
from scalesweep_hf.export.layout import read_checkpoint
from scalesweep_hf.export.serving import check_serving
from scalesweep_hf.ops.nvfp4 import dequantize
from tests.export.readers import need, read
from tests.models import load, random_tokens

pytestmark = pytest.mark.slow

# llm-compressor quantizes the model in `folder` to `out`.
LLM_COMPRESSOR = """
import datasets
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(folder)
scheme = sys.argv[3]
rows = torch.randint(3, 40, (4, 32), generator=torch.Generator().manual_seed(0)).tolist()
rows = {"input_ids": rows, "attention_mask": [[1] * 32] * 4}
data = None if scheme == "NVFP4A16" else datasets.Dataset.from_dict(rows)
recipe = QuantizationModifier(targets="Linear", scheme=scheme, ignore=["lm_head"])
oneshot(
    model=model, processor=AutoTokenizer.from_pretrained(folder), dataset=data, recipe=recipe,
    num_calibration_samples=4, max_seq_length=32,
)
model.save_pretrained(sys.argv[4], save_compressed=True)
"""

# Model-Optimizer quantizes the model in `folder`.
MODEL_OPTIMIZER_WRITES = """
import modelopt.torch.quantization as mtq
from modelopt.torch.export import export_hf_checkpoint
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(folder)
ids = torch.randint(3, 256, (4, 32), generator=torch.Generator().manual_seed(0))
model = mtq.quantize(model, mtq.NVFP4_DEFAULT_CFG, lambda model: model(input_ids=ids))
with torch.inference_mode():
    export_hf_checkpoint(model, export_dir=sys.argv[3])
"""

# Model-Optimizer converts our description and decodes our tensors.
MODEL_OPTIMIZER = """
import json
from pathlib import Path
from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format
from modelopt.torch.quantization.qtensor import NVFP4QTensor
description = json.loads((Path(folder) / "hf_quant_config.json").read_text())
converted = convert_hf_quant_config_format(description)
Path(sys.argv[3]).write_text(json.dumps(converted))
stored = load_file(Path(folder) / "model.safetensors")
for key in [key for key in stored if key.endswith(".weight_scale_2")]:
    name = key.removesuffix(".weight_scale_2")
    packed = stored[name + ".weight"]
    shape = torch.Size((packed.shape[0], 2 * packed.shape[1]))
    tensor = NVFP4QTensor(shape, torch.float32, packed)
    result[name] = tensor.dequantize(
        torch.float32, scale=stored[name + ".weight_scale"], double_scale=stored[key],
        block_sizes={-1: 16},
    )
"""


@pytest.mark.parametrize(("scheme", "theirs"), [("W", "NVFP4A16"), ("WA", "NVFP4")])
def test_llm_compressor_writes_the_same_tensors_and_configuration(
    trained_model: Path, tmp_path: Path, scheme: str, theirs: str
) -> None:
    need("llmcompressor")
    read(LLM_COMPRESSOR, trained_model, tmp_path, Path(theirs), tmp_path / "theirs")
    dataset = None if scheme == "W" else random_tokens(4, 32) % 40
    config = ScaleSweepConfig(scheme=scheme, objective="mse", dataset=dataset)
    model = load(trained_model, quantization_config=config, device_map="cpu")
    model.save_pretrained(tmp_path / "quantized")
    export_checkpoint(tmp_path / "quantized", tmp_path / "ours", "compressed-tensors")
    ours, other = read_checkpoint(tmp_path / "ours"), read_checkpoint(tmp_path / "theirs")
    assert {name: (e.dtype, e.shape) for name, e in ours.entries.items()} == {
        name: (e.dtype, e.shape) for name, e in other.entries.items()
    }
    for key in ("quant_method", "format", "quantization_status", "ignore", "kv_cache_scheme"):
        assert ours.recipe[key] == other.recipe[key], key
    (mine,), (yours,) = (c.recipe["config_groups"].values() for c in (ours, other))
    assert mine["targets"] == yours["targets"]
    for kind in ("weights", "input_activations"):
        assert (mine[kind] is None) == (yours[kind] is None)
        for key, value in (mine[kind] or {}).items():
            if key == "zp_dtype":  # of zero points, which a symmetric scheme does not have
                continue
            assert yours[kind][key] == value, (kind, key)
    assert check_serving(other, "vllm") == check_serving(ours, "vllm") == []


@pytest.mark.parametrize("scheme", ["W", "WA"])
def test_model_optimizer_reads_our_description_and_our_bits(
    quantized: Callable[..., Path], tmp_path: Path, scheme: str
) -> None:
    need("modelopt")
    source = quantized("llama", scheme)
    export_checkpoint(source, tmp_path / "out", "modelopt")
    found = read(MODEL_OPTIMIZER, tmp_path / "out", tmp_path, tmp_path / "converted.json")
    converted = json.loads((tmp_path / "converted.json").read_text())
    recipe = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert recipe == converted | {"quant_method": "modelopt"}
    modules = {n: m for n, m in load(source).named_modules() if isinstance(m, NVFP4Linear)}
    assert found.keys() == modules.keys()
    for name, module in modules.items():
        expected = dequantize(module.quantized_weight())
        torch.testing.assert_close(found[name], expected, rtol=2**-23, atol=0)
    assert len(load_file(tmp_path / "out" / "model.safetensors")) > 14


def test_model_optimizer_writes_the_same_tensors_and_description(
    quantized: Callable[..., Path], random_model: Callable[[str], Path], tmp_path: Path
) -> None:
    need("modelopt")
    read(MODEL_OPTIMIZER_WRITES, random_model("llama"), tmp_path, tmp_path / "theirs")
    export_checkpoint(quantized("llama", "WA"), tmp_path / "ours", "modelopt")
    ours, other = read_checkpoint(tmp_path / "ours"), read_checkpoint(tmp_path / "theirs")
    assert {name: (e.dtype, e.shape) for name, e in ours.entries.items()} == {
        name: (e.dtype, e.shape) for name, e in other.entries.items()
    }
    descriptions = [
        json.loads((folder / "hf_quant_config.json").read_text()) | {"producer": None}
        for folder in (ours.folder, other.folder)
    ]
    assert descriptions[0] == descriptions[1]
    assert ours.recipe | {"producer": None} == other.recipe | {"producer": None}
    assert check_serving(other, "sglang") == check_serving(other, "vllm") == []
