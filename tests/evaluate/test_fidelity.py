from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from scalesweep_hf import ScaleSweepConfig
from scalesweep_hf.evaluate import measure_fidelity
from tests.conftest import load_example


def test_the_reference_diverges_from_itself_by_zero(trained_model: Path) -> None:
    reference = AutoModelForCausalLM.from_pretrained(trained_model)
    tokens = load_example("tiny_model").heldout_tokens(trained_model, 4, 64)
    result = measure_fidelity({"same": reference}, reference, tokens, batch_size=3)["same"]
    assert result.kl == 0.0
    assert result.rows == 4
    with torch.no_grad():
        logits = reference(input_ids=tokens).logits.float()
    nll = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert result.perplexity == pytest.approx(nll.exp().item(), rel=1e-5)


def test_kl_is_what_its_definition_says(trained_model: Path) -> None:
    reference = AutoModelForCausalLM.from_pretrained(trained_model)
    config = ScaleSweepConfig(scheme="W", objective="absmax", dataset=None)
    model = AutoModelForCausalLM.from_pretrained(trained_model, quantization_config=config)
    tokens = load_example("tiny_model").heldout_tokens(trained_model, 2, 32)
    with torch.no_grad():
        p = reference(input_ids=tokens).logits.double().log_softmax(-1)
        q = model(input_ids=tokens).logits.double().log_softmax(-1)
    expected = (p.exp() * (p - q)).sum(-1).mean().item()
    measured = measure_fidelity({"absmax": model}, reference, tokens)["absmax"].kl
    assert measured == pytest.approx(expected, rel=1e-3)
    assert measured > 1e-4


def test_too_short_rows_are_an_error(trained_model: Path) -> None:
    with pytest.raises(ValueError, match=r"shape \[3, 1\]"):
        measure_fidelity({}, None, torch.zeros(3, 1, dtype=torch.int64))
