"""What only a CUDA device can show: the same bits as on the CPU, and models split over devices."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from scalesweep_hf import ScaleSweepConfig, packing, quantize
from scalesweep_hf.modules.linear import NVFP4Linear
from scalesweep_hf.ops.blocks import round_blocks
from scalesweep_hf.ops.objectives import OBJECTIVES
from scalesweep_hf.targets import linears
from tests.models import load, random_tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
TOKENS = random_tokens(4, 32)
SPLIT = {
    "model.embed_tokens": 0,
    "model.layers.0": 0,
    "model.layers.1": "cpu",
    "model.norm": 0,
    "model.rotary_emb": 0,
    "lm_head": 0,
}


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    a, b = (t.detach().cpu().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(a, b)


@pytest.mark.parametrize("window", ["bounded", "exact", (-2, 5)])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cuda_quantizes_to_the_bits_of_the_cpu(
    dtype: torch.dtype, objective: str, window: Any
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(515, 1040, generator=generator) * torch.logspace(-6, 2, 515)[:, None]
    x = x.to(dtype)
    x[0] = 0.0
    importance = torch.rand(1040, generator=generator) if OBJECTIVES[objective].weighted else None
    if OBJECTIVES[objective].coupled:
        rows = torch.randn(65, 40, 16, generator=generator)
        importance = rows.mT @ rows
    here = quantize(x, objective=objective, importance=importance, window=window)
    there = quantize(x.cuda(), objective=objective, importance=importance, window=window)
    assert same_bytes(here.packed, there.packed)
    assert same_bytes(here.block_scale, there.block_scale)
    assert same_bytes(here.tensor_scale, there.tensor_scale)
    weight = None if importance is None else importance.cuda()
    values = round_blocks(
        x.cuda(), there.tensor_scale, objective=objective, importance=weight, window=window
    )
    assert torch.equal(values, there.values())


@pytest.mark.parametrize("scheme", ["W", "WA"])
def test_a_model_split_over_gpu_and_cpu_is_quantized_and_reloaded(
    scheme: str,
    random_model: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    objective, dataset = ("mse", None) if scheme == "W" else ("wmse", TOKENS)
    config = ScaleSweepConfig(scheme=scheme, objective=objective, dataset=dataset)
    model = load(random_model("llama"), quantization_config=config, device_map=dict(SPLIT))
    assert model.model.layers[1].mlp.up_proj.weight.device.type == "meta"
    ids = random_tokens(2, 16, seed=1).cuda()
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        assert torch.isfinite(expected).all()
        model.save_pretrained(tmp_path)
        again = load(tmp_path, device_map=dict(SPLIT))
        assert torch.equal(again(input_ids=ids).logits, expected)
        whole = load(tmp_path, device_map="cuda")
        assert torch.equal(whole(input_ids=ids).logits, expected)
    if scheme == "W":  # no calibration run, whose sums depend on the device
        monkeypatch.setattr(packing, "sweep_device", lambda: None)
        on_cpu = load(random_model("llama"), quantization_config=config, device_map="cpu")
        for name, module in linears(whole).items():
            twin = linears(on_cpu)[name]
            assert isinstance(twin, NVFP4Linear)
            assert same_bytes(module.weight, twin.weight)


@pytest.mark.parametrize("split", [False, True])
def test_quantized_states_reload_and_generate_packed(
    split: bool, random_model: Callable[[str], Path], tmp_path: Path
) -> None:
    where: Any = dict(SPLIT) if split else "cuda"
    config = ScaleSweepConfig(scheme="WAKVQ", dataset=TOKENS)
    model = load(random_model("llama"), quantization_config=config, device_map=where)
    ids = random_tokens(2, 16, seed=1).cuda()
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        model.save_pretrained(tmp_path)
        again = load(tmp_path, device_map=where)
        assert torch.equal(again(input_ids=ids).logits, expected)
    out = again.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=8,
        return_dict_in_generate=True,
    )
    assert out.past_key_values.layers[0].keys.dtype == torch.uint8


@pytest.mark.parametrize("implementation", ["static", "offloaded"])
def test_other_caches_are_packed_too(
    implementation: str, random_model: Callable[[str], Path]
) -> None:
    config = ScaleSweepConfig(scheme="WAKV", dataset=TOKENS)
    model = load(random_model("qwen3"), quantization_config=config, device_map="cuda")
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8, "disable_compile": True}
    ids = TOKENS.cuda()
    mask = torch.ones_like(ids)
    expected = model.generate(input_ids=ids, attention_mask=mask, **settings)
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        cache_implementation=implementation,
        return_dict_in_generate=True,
        **settings,
    )
    assert out.past_key_values.layers[0].keys.dtype == torch.uint8
    assert torch.equal(out.sequences, expected)


def test_without_a_device_map_the_accelerator_quantizes(
    random_model: Callable[[str], Path],
) -> None:
    config = ScaleSweepConfig(dataset=TOKENS)
    model = load(random_model("qwen3"), quantization_config=config)
    assert model.device.type == "cuda"
    generated = model.generate(
        input_ids=TOKENS.cuda(), attention_mask=torch.ones_like(TOKENS).cuda(), max_new_tokens=8
    )
    assert generated.device.type == "cuda"


def test_a_model_writes_the_same_text_twice(random_model: Callable[[str], Path]) -> None:
    from scalesweep_hf.calibration import calibration_tokens

    model = load(random_model("llama"), device_map="cuda")
    state = torch.cuda.get_rng_state()
    first, _ = calibration_tokens("self", model, num_samples=4, sequence_length=32)
    assert torch.equal(torch.cuda.get_rng_state(), state)
    again, _ = calibration_tokens("self", model, num_samples=4, sequence_length=32)
    assert torch.equal(first, again)
