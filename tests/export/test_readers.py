"""Exports, read by the software that they are for, without this package in the process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from scalesweep_hf import NVFP4Linear, ScaleSweepConfig
from scalesweep_hf.export import export_checkpoint
from scalesweep_hf.ops.blocks import round_blocks
from scalesweep_hf.ops.nvfp4 import dequantize
from tests.export.readers import DECOMPRESSOR, TRANSFORMERS, need, read
from tests.models import load, random_tokens

Quantized = Callable[..., Path]
pytestmark = pytest.mark.slow
IDS = random_tokens(2, 24)


def write_tokens(folder: Path) -> Path:
    save_file({"tokens": IDS}, folder / "tokens.safetensors")
    return folder / "tokens.safetensors"


def read_export(source: Path, work: Path) -> tuple[dict[str, Tensor], list[str]]:
    need("compressed_tensors")
    result = export_checkpoint(source, work / "out", "compressed-tensors")
    return read(TRANSFORMERS, work / "out", work, write_tokens(work)), result["inexact"]


def dequantized(folder: Path) -> Any:
    with pytest.warns(UserWarning, match="quantization_config"):
        return load(folder, quantization_config=ScaleSweepConfig(dequantize=True))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


def distance(x: Tensor, y: Tensor) -> float:
    return float((x.float() - y.float()).norm() / y.float().norm())


@pytest.mark.parametrize(
    ("architecture", "objective"),
    [("llama", "absmax"), ("llama", "mse"), ("llama-tied-biased", "mse"), ("gemma2", "mse")],
)
def test_stock_transformers_computes_the_logits_of_our_dequantized_weights(
    quantized: Quantized, tmp_path: Path, architecture: str, objective: str
) -> None:
    source = quantized(architecture, "W", objective)
    found, inexact = read_export(source, tmp_path)
    ours = dequantized(source)
    for name, module in ours.named_modules():
        if isinstance(module, nn.Linear):
            weight = found[f"weight {name}"]
            assert weight.dtype == module.weight.dtype == torch.bfloat16
            if name not in inexact:
                assert torch.equal(weight, module.weight), name
            steps = (weight.view(torch.int16).int() - module.weight.view(torch.int16)).abs()
            assert int(steps.max()) <= 1
    if inexact:
        assert distance(found["logits"], logits(ours)) < 0.01
    else:
        assert torch.equal(found["logits"], logits(ours))


def test_there_are_models_that_stock_transformers_reads_to_the_bit(
    quantized: Quantized, tmp_path: Path
) -> None:
    source = quantized("llama", "W", "absmax")
    assert export_checkpoint(source, tmp_path / "a", "compressed-tensors")["inexact"] == []


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_stock_transformers_quantizes_inputs_as_absmax_but_for_bfloat16_block_scales(
    quantized: Quantized, tmp_path: Path, architecture: str
) -> None:
    source = quantized(architecture, "WA", "absmax")
    found, _ = read_export(source, tmp_path)
    ours = load(source)
    seen = 0
    for name, module in ours.named_modules():
        if not isinstance(module, NVFP4Linear):
            continue
        x, y = found[f"in {name}"], found[f"out {name}"]
        with torch.no_grad():
            plain = nn.functional.linear(x, found[f"weight {name}"], module.bias)
            near, effect = distance(module(x), y), distance(plain, y)
        # It rounds max/6 to bfloat16, which moves some block scales by one code.
        assert near < 0.04 < 0.07 < effect < 0.13, (name, near, effect)
        seen += 1
    assert seen == 14
    assert distance(found["logits"], logits(ours)) < 0.1


def test_stock_transformers_generates_with_quantized_keys_values_and_queries(
    quantized: Quantized, tmp_path: Path
) -> None:
    source = quantized("llama", "WAKVQ", "absmax", overrides={"activations": None})
    found, _ = read_export(source, tmp_path)
    ours = load(source)
    assert found["new"].shape == (1, IDS.shape[1] + 4)
    near = distance(found["logits"], logits(ours))
    effect = distance(logits(dequantized(source)), logits(ours))
    assert near < 0.6 * effect, (near, effect)


@pytest.mark.parametrize("scheme", ["W", "WA"])
def test_the_decompressor_returns_our_weights_and_inputs(
    quantized: Quantized, tmp_path: Path, scheme: str
) -> None:
    need("compressed_tensors")
    source = quantized("llama", scheme, "absmax")
    result = export_checkpoint(source, tmp_path / "out", "compressed-tensors")
    assert result["inexact"] == []
    found = read(DECOMPRESSOR, tmp_path / "out", tmp_path)
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    modules = {n: m for n, m in load(source).named_modules() if isinstance(m, NVFP4Linear)}
    assert len(modules) == 14
    for name, module in modules.items():
        weight = module.quantized_weight()
        assert torch.equal(found[name], dequantize(weight, torch.bfloat16)), name
        if module.input_scale is not None:
            scale = module.input_scale.detach()
            expected = round_blocks(x, scale, objective="absmax").float() * scale
            torch.testing.assert_close(found[f"input {name}"], expected, rtol=1e-6, atol=0)


def test_a_trained_model_keeps_its_predictions_in_stock_transformers(
    reference_model: Path, tmp_path: Path
) -> None:
    config = ScaleSweepConfig(scheme="W", objective="mse", dataset=None)
    model = load(reference_model, quantization_config=config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "quantized")
    found, inexact = read_export(tmp_path / "quantized", tmp_path)
    assert len(inexact) <= 5
    ours, theirs = (torch.log_softmax(x.float(), -1) for x in (logits(model), found["logits"]))
    assert (ours.exp() * (ours - theirs)).sum(-1).mean() < 1e-3  # quantizing costs .02
