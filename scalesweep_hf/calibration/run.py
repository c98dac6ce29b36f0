"""Run calibration text through a model."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from scalesweep_hf.calibration.collect import Observed, Statistics, collect
from scalesweep_hf.calibration.states import collect_states
from scalesweep_hf.names import canonical_name


def run_calibration(
    model: nn.Module,
    tokens: Tensor,
    *,
    names: Iterable[str] | None = None,
    attention: Iterable[str] = (),
    batch_size: int = 8,
    observed: Observed | None = None,
) -> Statistics:
    """Run token rows through a model and collect the statistics of its Linears' inputs.

    Args:
        model: takes ``input_ids``; in evaluation mode.
        tokens: [rows, length] integer token ids.
        names: as in `collect`.
        attention: names of attention modules whose keys, values and queries are observed; they are
            hooked already (`scalesweep_hf.modules.attention.attach`).
        batch_size: rows per forward pass.
        observed: as in `collect`.

    Returns:
        The statistics.

    Raises:
        ValueError: a named Linear never ran or saw NaN or infinity.
    """
    names = None if names is None else list(names)
    run = make_runner(model, names)
    with (
        torch.no_grad(),
        collect_states(model, attention) as states,
        collect(model, names, observed) as statistics,
    ):
        for batch in tqdm(tokens.split(batch_size), desc="Calibrating", unit="batch", disable=None):
            run(batch)
    statistics.states = {canonical_name(model, name): states[name] for name in states}
    check_statistics(model, statistics, names or ())
    return statistics


def make_runner(model: nn.Module, names: Iterable[str] | None) -> Callable[[Tensor], Any]:
    """Return what runs token ids [B, T] through a model, or the part of it that has these modules.

    Args:
        model: takes ``input_ids``.
        names: of modules that must run; None means all.
    """
    runner = _smallest_runner(model, None if names is None else list(names))
    device = next(iter(model.parameters())).device
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    if embeddings is not None and embeddings.weight.device.type != "meta":
        device = embeddings.weight.device
    # A cache would be thrown away after every batch. (Multimodal models have the field in the
    # config of their text model.)
    config = getattr(model, "config", None)
    text = getattr(config, "get_text_config", lambda: config)()
    options = {"use_cache": False} if hasattr(text, "use_cache") else {}
    return lambda batch: runner(input_ids=batch.to(device=device, dtype=torch.int64), **options)


def check_statistics(model: nn.Module, statistics: Statistics, names: Iterable[str]) -> None:
    """Check that calibration reached these Linears and that their inputs were finite.

    Raises:
        ValueError: naming those that it did not reach, or the first that was not finite.
    """
    chosen = {name: statistics.get(canonical_name(model, name)) for name in names}
    if unreached := [name for name, seen in chosen.items() if seen is None]:
        raise ValueError(
            f"no calibration text reached {', '.join(unreached)}: add them to "
            "modules_to_not_convert"
        )
    for name, seen in chosen.items():
        if seen is not None and not torch.isfinite(seen.absmax):
            raise ValueError(f"{name}: its input has max|x| = {seen.absmax.item()} in calibration")


def _smallest_runner(model: nn.Module, names: list[str] | None) -> nn.Module:
    """Return the base model, which spares the logits, unless a module outside it is observed."""
    base = getattr(model, "base_model", model)
    inside = {id(module) for module in base.modules()}
    if names is None or any(id(model.get_submodule(name)) not in inside for name in names):
        return model
    return base if isinstance(base, nn.Module) else model
