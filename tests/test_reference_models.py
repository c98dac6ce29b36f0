"""Claims about accuracy, on real trained models; skipped by name where they are not here."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from scalesweep_hf import ScaleSweepConfig
from scalesweep_hf.evaluate import measure_fidelity, weight_error
from scalesweep_hf.ops.objectives import OBJECTIVES
from scalesweep_hf.targets import linears
from tests.conftest import REFERENCE

pytestmark = pytest.mark.slow


def tokens(name: str, rows: int, length: int) -> torch.Tensor:
    file: dict[str, torch.Tensor] = load_file(REFERENCE / "data" / "tokens.safetensors")
    return file[name][:rows, :length]


def quantize(folder: Path, **settings: Any) -> Any:
    config = ScaleSweepConfig(dataset=tokens("calibration", 8, 512), **settings)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)


def test_better_objectives_keep_more_of_the_model(reference_model: Path) -> None:
    reference = AutoModelForCausalLM.from_pretrained(reference_model)
    models = {name: quantize(reference_model, scheme="W", objective=name) for name in OBJECTIVES}
    kl = {
        name: result.kl
        for name, result in measure_fidelity(models, reference, tokens("heldout", 4, 512)).items()
    }
    assert kl["hessian"] < kl["wmse"] <= kl["mse"] < kl["four_over_six"] < kl["absmax"], kl


def test_quantized_activations_cost_more_and_reload_the_same(
    reference_model: Path, tmp_path: Path
) -> None:
    reference = AutoModelForCausalLM.from_pretrained(reference_model)
    models = {scheme: quantize(reference_model, scheme=scheme) for scheme in ("W", "WA")}
    rows = tokens("heldout", 1, 128).long()
    fidelity = measure_fidelity(models, reference, rows)
    assert fidelity["W"].kl < fidelity["WA"].kl < 5 * fidelity["W"].kl
    models["WA"].save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        expected = models["WA"](input_ids=rows).logits
        assert torch.equal(again(input_ids=rows).logits, expected)
    stored = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    plain = sum(p.nbytes for n, p in reference.named_parameters() if "_proj" not in n)
    weights = sum(p.numel() for n, p in reference.named_parameters() if "_proj" in n)
    scalars_and_header = 200 * len(linears(again)) * 4
    assert stored <= plain + weights * 0.5625 + scalars_and_header


def test_weight_error_falls_in_the_published_order(reference_model: Path) -> None:
    reference = AutoModelForCausalLM.from_pretrained(reference_model)
    expected = {"absmax": 0.00905, "four_over_six": 0.00757, "mse": 0.00660}
    for objective, published in expected.items():
        config = ScaleSweepConfig(scheme="W", objective=objective, dataset=None)
        model = AutoModelForCausalLM.from_pretrained(reference_model, quantization_config=config)
        assert weight_error(model, reference) == pytest.approx(published, rel=0.005)
