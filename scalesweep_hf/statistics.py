"""Calibrate a model once, for any number of quantizations."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from scalesweep_hf.calibration import Statistics, calibration_tokens, run_calibration
from scalesweep_hf.calibration.collect import Observed
from scalesweep_hf.config import ScaleSweepConfig
from scalesweep_hf.modules import NVFP4Linear, attention
from scalesweep_hf.states import hooked
from scalesweep_hf.targets import find_attention, select_linears

CALIBRATION_BATCH = 8


def calibrate(
    model: PreTrainedModel,
    dataset: str | Sequence[str] | Tensor = "self",
    *,
    num_samples: int = 128,
    sequence_length: int = 2048,
    seed: int = 0,
    batch_size: int | None = None,
    states: bool = False,
    local_hessian: bool = False,
    modules_to_not_convert: Sequence[str] | None = None,
) -> Statistics:
    """Run calibration text through a full-precision model and collect statistics.

    Args:
        model: not quantized, in evaluation mode; left as it was.
        dataset: with num_samples, sequence_length and seed, as in `ScaleSweepConfig`.
        num_samples: rows at the most.
        sequence_length: tokens a row, clipped to what the model takes.
        seed: of the sampling or the shuffling.
        batch_size: rows per forward pass; None picks 8, and 32 for writing text.
        states: also of keys, values and queries, which the schemes "WAKV" and "WAKVQ" need.
        local_hessian: also the couplings inside blocks, which the objective "hessian" needs.
        modules_to_not_convert: as in `ScaleSweepConfig`: modules that need no statistics.

    Returns:
        The statistics of every Linear that would be quantized, with their provenance.

    Raises:
        ValueError: the model is quantized or cannot be calibrated, or the dataset does not suit.
        FileNotFoundError: a local file is absent.
    """
    if any(isinstance(module, NVFP4Linear) for module in model.modules()):
        raise ValueError("the model is quantized already: calibrate the full-precision model")
    names = select_linears(model, modules_to_not_convert)
    check_calibration(model)
    recipe = attention.StateRecipe(None, None, None, "bounded")
    for name in find_attention(model) if states else ():
        attention.attach(model.get_submodule(name), recipe)
    try:
        config = ScaleSweepConfig(
            dataset=dataset,
            num_samples=num_samples,
            sequence_length=sequence_length,
            seed=seed,
            batch_size=batch_size,
        )
        return run(model, names, config, Observed(local_hessian=local_hessian))
    finally:
        for module in hooked(model).values():
            attention.detach(module)


def run(
    model: PreTrainedModel, names: Sequence[str], config: ScaleSweepConfig, observed: Observed
) -> Statistics:
    """Make the tokens and run them, observing the named Linears and hooked attention modules."""
    tokens, provenance = make_tokens(model, config)
    batch = config.batch_size or CALIBRATION_BATCH
    statistics = run_calibration(
        model,
        tokens,
        names=names,
        attention=hooked(model),
        batch_size=batch,
        observed=observed,
    )
    statistics.provenance = provenance
    return statistics


def make_tokens(model: PreTrainedModel, config: ScaleSweepConfig) -> tuple[Tensor, dict[str, Any]]:
    """Make the calibration tokens [rows, length] that a config asks for, and their provenance."""
    assert config.dataset is not None
    return calibration_tokens(
        config.dataset,
        model,
        num_samples=config.num_samples,
        sequence_length=config.sequence_length,
        seed=config.seed,
        batch_size=config.batch_size,
    )


def observed_by(config: ScaleSweepConfig) -> Observed:
    """Return what a recipe needs to know of the inputs of Linears."""
    hessian = getattr(torch, config.gptq_dtype) if config.uses_hessians else None
    return Observed(config.needs_local_hessian, hessian)


def check_calibration(model: PreTrainedModel) -> None:
    """Refuse, before any weight is read, models that token rows alone do not run.

    Raises:
        ValueError: says why, and what works instead.
    """
    reason = None
    if model.config.is_encoder_decoder:
        reason = "is an encoder-decoder model"
    elif model.main_input_name != "input_ids":
        reason = f"takes {model.main_input_name}, not token ids"
    if reason is not None:
        raise ValueError(
            f"{type(model).__name__} {reason}, which calibration does not run: use scheme 'W' with "
            "objective 'mse', which needs none"
        )
