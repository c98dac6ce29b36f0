"""Read the text on which models are measured."""

from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from scalesweep_hf.calibration import calibration_tokens


def heldout_tokens(
    source: str, model: Any, *, rows: int | None = None, length: int = 1024
) -> Tensor:
    """Read held-out token rows for a model.

    Args:
        source: a safetensors file of token ids, ``FILE[:NAME]``; or what `calibration_tokens` reads
            (a .jsonl, .json, .txt or .parquet file, or a Hub data set).
        model: whose tokenizer is used for text, and whose vocabulary bounds token ids.
        rows: at the most; None takes all token rows, or 128 of text.
        length: tokens a row of text; token ids keep theirs.

    Returns:
        [rows, length] int64 token ids.

    Raises:
        FileNotFoundError: the file is absent.
        ValueError: it has no such tensor, too little text for one row, or ids that are not in the
            model's vocabulary; or it is "self".
    """
    if source == "self":
        raise ValueError("held-out text is 'self', which every model would write anew: name a file")
    file, _, name = source.partition(":")
    if Path(file).suffix != ".safetensors":
        tokens, _ = calibration_tokens(
            source, model, num_samples=rows or 128, sequence_length=length
        )
        return tokens
    if not Path(file).is_file():
        raise FileNotFoundError(f"held-out tokens {file!r} do not exist")
    with safe_open(file, framework="pt") as opened:
        names = list(opened.keys())
        if (name or len(names) > 1) and name not in names:
            raise ValueError(f"{file} has the tensors {', '.join(names)}: name one as {file}:NAME")
        ids: Tensor = opened.get_tensor(name or names[0])
    tokens, _ = calibration_tokens(
        ids, model, num_samples=rows or len(ids), sequence_length=ids.shape[-1]
    )
    return tokens
