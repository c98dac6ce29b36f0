"""Everything that a report shows of a model, from its name."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from scalesweep_hf.calibration import calibration_tokens
from scalesweep_hf.evaluate.gaps import Gap, measure_gaps, measure_sensitivity
from scalesweep_hf.evaluate.table import load_language_model, versions
from scalesweep_hf.evaluate.text import heldout_tokens
from scalesweep_hf.modules import NVFP4Linear
from scalesweep_hf.ops.sweep import BLOCK
from scalesweep_hf.targets import check_patterns, select_linears


def study(
    name: str,
    text: str,
    *,
    rows: int,
    length: int,
    skips: Sequence[str] | None = None,
    device_map: str | None = None,
) -> tuple[list[Gap], dict[str, float], dict[str, int], dict[str, str]]:
    """Load a full-precision model and measure it.

    Args:
        name: folder or Hub id of a causal language model.
        text: "self" (the model writes it), or as `heldout_tokens`.
        rows: of text.
        length: tokens a row.
        skips: name patterns of Linears to leave out, as modules_to_not_convert.
        device_map: as in from_pretrained.

    Returns:
        Gaps, sensitivity, bytes and a description, as `write_report` takes them.

    Raises:
        ValueError: the model is quantized already, or the text does not suit.
        FileNotFoundError: the text is absent.
    """
    model = load_language_model(name, None, device_map)
    if any(isinstance(module, NVFP4Linear) for module in model.modules()):
        raise ValueError(f"{name} is quantized already: name the full-precision model")
    check_patterns(model, "modules_to_not_convert", [s.removeprefix("!") for s in skips or ()])
    names = select_linears(model, skips)
    if text == "self":
        tokens, _ = calibration_tokens(text, model, num_samples=rows, sequence_length=length)
    else:
        tokens = heldout_tokens(text, model, rows=rows, length=length)[:, :length]
    about = {"model": name, "text": f"{text}, {tokens.shape[0]} x {tokens.shape[1]} tokens"}
    about |= versions()
    gaps = measure_gaps(model, names, tokens)
    return gaps, measure_sensitivity(model, names, tokens), count_bytes(model, names), about


def count_bytes(model: Any, names: Sequence[str]) -> dict[str, int]:
    """Return the bytes of all parameters before and after, and of those that are quantized."""
    before = sum(parameter.nbytes for parameter in model.parameters())
    weights: list[nn.Parameter] = [model.get_submodule(name).weight for name in names]
    quantized = sum(weight.nbytes for weight in weights)
    packed = sum(weight.numel() // 2 + weight.numel() // BLOCK + 4 for weight in weights)
    return {"before": before, "after": before - quantized + packed, "quantized": quantized}
