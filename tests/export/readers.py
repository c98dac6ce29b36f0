"""Scripts that read exports with other software, without this package in the process."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

END = """
assert "scalesweep_hf" not in sys.modules
save_file({k: v.contiguous().clone() for k, v in result.items()}, out)
"""

START = """
import sys, warnings
warnings.simplefilter("ignore")
import torch
from safetensors.torch import load_file, save_file
folder, out, result = sys.argv[1], sys.argv[2], {}
def tokens():
    return load_file(sys.argv[3])["tokens"].long()
"""

# Stock Transformers: logits, and input and output of every Linear.
TRANSFORMERS = """
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(folder)
ids = tokens()
def keep(name):
    def hook(module, args, output):
        result["in " + name], result["out " + name] = args[0], output
    return hook
for name, module in model.named_modules():
    if isinstance(module, torch.nn.Linear):
        module.register_forward_hook(keep(name))
with torch.no_grad():
    result["new"] = model.generate(ids[:1], max_new_tokens=4, min_new_tokens=4, do_sample=False)
    result["logits"] = model(input_ids=ids, use_cache=False).logits
for name, module in model.named_modules():
    if isinstance(module, torch.nn.Linear):
        result["weight " + name] = module.weight.detach().clone()
"""

# compressed-tensors alone: decompressed weights, and inputs quantized in float32.
DECOMPRESSOR = """
import json
from pathlib import Path
from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus
from compressed_tensors.quantization.lifecycle.forward import forward_quantize
recipe = json.loads((Path(folder) / "config.json").read_text())["quantization_config"]
scheme = QuantizationConfig.model_validate(recipe).config_groups["group_0"]
stored = load_file(Path(folder) / "model.safetensors")
x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
for key in [key for key in stored if key.endswith(".weight_packed")]:
    name = key.removesuffix(".weight_packed")
    state = {k[len(name) + 1:]: v for k, v in stored.items() if k.startswith(name + ".")}
    result[name] = NVFP4PackedCompressor.decompress(state, scheme)["weight"]
    if scheme.input_activations is not None:
        module = torch.nn.Module()
        module.input_global_scale = state["input_global_scale"]
        module.quantization_status = QuantizationStatus.COMPRESSED
        result["input " + name] = forward_quantize(module, x, "input", scheme.input_activations)
"""


def need(package: str) -> None:
    """Skip a test, by name, where a package is not installed."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")


def read(script: str, folder: Path, work: Path, *arguments: Path) -> dict[str, Tensor]:
    """Run a script in a clean process and return the tensors that it leaves."""
    out = work / "result.safetensors"
    environment = os.environ | {"SCALESWEEP_NO_AUTOLOAD": "1", "TQDM_DISABLE": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-c", START + script + END, folder, out, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        cwd=work,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(load_file(out))
