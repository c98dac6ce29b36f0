"""Run calibration text through a model."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from scalesweep_hf.calibration.collect import Statistics, canonical_name, collect
from scalesweep_hf.calibration.data import calibration_tokens


def calibrate(
    model: Any,
    dataset: str | Sequence[str] | Tensor = "self",
    *,
    num_samples: int = 128,
    sequence_length: int = 2048,
    seed: int = 0,
    batch_size: int | None = None,
    names: Iterable[str] | None = None,
) -> Statistics:
    """Run calibration text through a model and collect the statistics of its Linears' inputs.

    Args:
        model: a Transformers model in evaluation mode.
        dataset: with num_samples, sequence_length and seed, as in `calibration_tokens`.
        num_samples: rows at the most.
        sequence_length: tokens a row, clipped to what the model takes.
        seed: of the sampling or the shuffling.
        batch_size: rows per forward pass; None picks 8, and 32 for writing text.
        names: as in `collect`.

    Returns:
        The statistics, with their provenance.

    Raises:
        ValueError: the dataset does not suit, or a named Linear never ran or saw NaN or infinity.
        FileNotFoundError: a local file is absent.
    """
    tokens, provenance = calibration_tokens(
        dataset,
        model,
        num_samples=num_samples,
        sequence_length=sequence_length,
        seed=seed,
        batch_size=batch_size,
    )
    statistics = run_calibration(model, tokens, names=names, batch_size=batch_size or 8)
    statistics.provenance = provenance
    return statistics


def run_calibration(
    model: nn.Module, tokens: Tensor, *, names: Iterable[str] | None = None, batch_size: int = 8
) -> Statistics:
    """Run token rows through a model and collect the statistics of its Linears' inputs.

    Args:
        model: takes ``input_ids``; in evaluation mode.
        tokens: [rows, length] integer token ids.
        names: as in `collect`.
        batch_size: rows per forward pass.

    Returns:
        The statistics.

    Raises:
        ValueError: a named Linear never ran or saw NaN or infinity.
    """
    names = None if names is None else list(names)
    runner = _smallest_runner(model, names)
    device = next(iter(model.parameters())).device
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    if embeddings is not None and embeddings.weight.device.type != "meta":
        device = embeddings.weight.device
    with torch.no_grad(), collect(model, names) as statistics:
        for batch in tqdm(tokens.split(batch_size), desc="Calibrating", unit="batch", disable=None):
            runner(input_ids=batch.to(device=device, dtype=torch.int64))
    for name in names or ():
        seen = statistics.get(canonical_name(model, name))
        if seen is None:
            raise ValueError(
                f"{name}: no calibration text reached this module; add its name to "
                "modules_to_not_convert"
            )
        if not torch.isfinite(seen.absmax):
            raise ValueError(f"{name}: its input has max|x| = {seen.absmax.item()} in calibration")
    return statistics


def _smallest_runner(model: nn.Module, names: list[str] | None) -> nn.Module:
    """Return the base model, which spares the logits, unless a module outside it is observed."""
    base = getattr(model, "base_model", model)
    inside = {id(module) for module in base.modules()}
    if names is None or any(id(model.get_submodule(name)) not in inside for name in names):
        return model
    return base if isinstance(base, nn.Module) else model
