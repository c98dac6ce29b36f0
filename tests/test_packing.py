from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

from scalesweep_hf import NVFP4Linear, ScaleSweepConfig, packing
from scalesweep_hf.modules.linear import quantize_group
from tests.models import DECODER, load, random_tokens

Folders = Callable[[str], Path]
WAYS: dict[str, dict[str, Any]] = {
    "on the fly": {"scheme": "W", "objective": "mse", "dataset": None},
    "calibrated": {"scheme": "WA", "objective": "wmse", "dataset": random_tokens(4, 32)},
}


def packed(folder: Path, way: str, **changes: Any) -> dict[str, Tensor]:
    """Quantize with all weights on the CPU; return the bytes of all parameters."""
    config = ScaleSweepConfig(**(WAYS[way] | changes))
    model = load(folder, quantization_config=config, device_map="cpu")
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    return {n: t.reshape(-1).view(torch.uint8) for n, t in model.state_dict().items()}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert [name for name in actual if not torch.equal(actual[name], expected[name])] == []


@pytest.fixture
def full_accelerator(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let an accelerator appear that has no memory; return the devices that were tried."""
    tried: list[str] = []

    def attempt(
        modules: Sequence[NVFP4Linear], weights: Sequence[Tensor], **options: Any
    ) -> list[dict[str, Tensor]]:
        tried.append(weights[0].device.type)
        if weights[0].is_meta:
            raise torch.OutOfMemoryError("full")
        return quantize_group(modules, weights, **options)

    monkeypatch.setattr(packing, "quantize_group", attempt)
    monkeypatch.setattr(packing, "sweep_device", lambda: torch.device("meta"))
    return tried


@pytest.mark.parametrize("way", WAYS)
def test_where_the_accelerator_is_full_the_cpu_quantizes_with_a_warning(
    way: str,
    random_model: Folders,
    full_accelerator: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(packing.logger, "warning_once", warnings.append)
    actual = packed(random_model("llama"), way)
    groups = 2 * 4
    assert full_accelerator == ["meta", "cpu"] * groups
    assert "too little free memory: weights that are on the CPU" in warnings[0]
    monkeypatch.undo()
    assert_same(actual, packed(random_model("llama"), way))


def test_who_asks_for_the_loops_of_the_cpu_gets_them(
    random_model: Folders, full_accelerator: list[str]
) -> None:
    pytest.importorskip("numba")
    packed(random_model("llama"), "on the fly", backend="numba")
    assert set(full_accelerator) == {"cpu"}


def test_there_is_no_accelerator_to_quantize_on_but_cuda_and_xpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = dict.fromkeys(("cuda", "xpu", "mps"), False)
    for kind in found:
        monkeypatch.setattr(
            torch.accelerator,
            "current_accelerator",
            lambda check_available, k=kind: torch.device(k),
        )
        monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
        found[kind] = packing.sweep_device() == torch.device(kind, 0)
    assert found == {"cuda": True, "xpu": True, "mps": False}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("way", WAYS)
def test_weights_on_the_cpu_are_quantized_on_the_accelerator_group_by_group(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = DECODER | {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4}
    tf.LlamaForCausalLM(tf.LlamaConfig(**shape)).to(torch.bfloat16).save_pretrained(tmp_path)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    actual = packed(tmp_path, way)
    group = 2 * 2 * 512 * 1024  # bytes of gate_proj and up_proj
    assert group < torch.cuda.max_memory_allocated() - before < 2 * group
    monkeypatch.setattr(packing, "sweep_device", lambda: None)
    assert_same(actual, packed(tmp_path, way))
