"""How modules, states and calibration data are named in checkpoints, statistics and patterns."""

import fnmatch
import re
from pathlib import Path
from typing import Any

# What attention computes with, after RoPE.
STATES = ("keys", "values", "queries")
# Suffixes of local files that calibration reads, and the `datasets` reader of each.
READERS = {".jsonl": "json", ".json": "json", ".txt": "text", ".parquet": "parquet"}


def canonical_name(model: Any, name: str) -> str:
    """Return a module's name without the base model's prefix, the same with and without a head."""
    prefix = getattr(model, "base_model_prefix", "")
    return name.removeprefix(f"{prefix}.") if prefix else name


def matches(model: Any, name: str, pattern: str) -> bool:
    """Whether a pattern (`fnmatch`) matches a module or one above it, prefixed or not."""
    spellings = {name, canonical_name(model, name)}
    return any(
        fnmatch.fnmatchcase(spelling, pattern) or fnmatch.fnmatchcase(spelling, f"{pattern}.*")
        for spelling in spellings
    )


def hub_id(name: str) -> str | None:
    """Return the name of a model where it is one on the Hub, and not a folder."""
    is_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not Path(name).exists()
    return name if is_id else None


def is_local_file(dataset: str) -> bool:
    """Whether a dataset string names a local file rather than a data set on the Hub."""
    return Path(dataset).suffix.lower() in READERS


def source_name(dataset: str) -> str:
    """Return how a checkpoint records a dataset: a local file by its name alone."""
    return Path(dataset).name if is_local_file(dataset) else dataset
