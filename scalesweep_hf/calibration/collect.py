"""Collect statistics of the inputs of a model's Linears while it runs."""

import functools
import json
import os
from collections import UserDict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from scalesweep_hf.calibration.observers import AbsMax, ChannelSquare
from scalesweep_hf.calibration.states import StateStatistics
from scalesweep_hf.names import canonical_name

FORMAT = "scalesweep-statistics-1"


@dataclass(frozen=True)
class InputStatistics:
    """What calibration knows of one Linear's input.

    Attributes:
        absmax: [] float32, largest magnitude.
        square: [K] float32, sum over tokens of the squares of every channel (eq. 11).
    """

    absmax: Tensor
    square: Tensor


class Statistics(UserDict[str, InputStatistics]):
    """Input statistics by module name (without the base model's prefix), with where they came from.

    Attributes:
        states: statistics of keys, values and queries by attention module, where they were
            observed.
        provenance: JSON types only: source, samples, length, seed of the calibration data.
        shared_inputs: module name to a number, equal for modules of one parent that received one
            tensor.
    """

    def __init__(self, provenance: dict[str, Any] | None = None) -> None:
        """Start empty."""
        super().__init__()
        self.provenance = provenance or {}
        self.shared_inputs: dict[str, int] = {}
        self.states: dict[str, StateStatistics] = {}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file; it appears under its name only when whole."""
        tensors = {}
        for name, statistics in self.items():
            tensors[f"{name}.absmax"] = statistics.absmax
            tensors[f"{name}.square"] = statistics.square
        for name, states in self.states.items():
            tensors[f"{name}.state_absmax"] = states.absmax
            tensors[f"{name}.key_square"] = states.key_square
            tensors[f"{name}.query_square"] = states.query_square
        metadata = {
            "format": FORMAT,
            "provenance": json.dumps(self.provenance),
            "shared_inputs": json.dumps(self.shared_inputs),
        }
        path = Path(path)
        part = path.with_name(path.name + ".part")
        save_file(tensors, part, metadata)
        part.replace(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Statistics":
        """Read a file that `save` wrote.

        Raises:
            ValueError: the file is something else, or damaged.
        """
        try:
            opened = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{path} is not a statistics file, or damaged: {error}") from error
        with opened as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(
                    f"{path} is not a statistics file: format is {metadata.get('format')!r}, "
                    f"expected {FORMAT!r}; write one with Statistics.save"
                )
            result = cls(json.loads(metadata["provenance"]))
            result.shared_inputs = json.loads(metadata["shared_inputs"])
            for key in file.keys():  # noqa: SIM118 (not a mapping)
                name, _, kind = key.rpartition(".")
                parts = ("state_absmax", "key_square", "query_square")
                if kind == "absmax":
                    result[name] = InputStatistics(
                        file.get_tensor(key), file.get_tensor(f"{name}.square")
                    )
                elif kind == "state_absmax":
                    tensors = [file.get_tensor(f"{name}.{part}") for part in parts]
                    result.states[name] = StateStatistics(*tensors)
        return result


@contextmanager
def collect(model: nn.Module, names: Iterable[str] | None = None) -> Iterator[Statistics]:
    """Observe the inputs of Linears inside the block; the statistics are complete when it ends.

    Hooks come off when the block ends, however it ends.

    Args:
        model: run it yourself inside the block.
        names: of the nn.Linear modules to observe; None means all.

    Yields:
        Statistics, empty until the block ends. Modules that never ran are absent.

    Raises:
        ValueError: a name is not an nn.Linear of the model.
    """
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    chosen = list(linears) if names is None else list(names)
    for name in chosen:
        if name not in linears:
            raise ValueError(f"{name!r} is not an nn.Linear of {type(model).__name__}")
    statistics = Statistics()
    observers = {name: (AbsMax(), ChannelSquare()) for name in chosen}
    inputs: dict[str, tuple[Any, ...]] = {}

    def observe(
        name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        x = args[0] if args else kwargs["input"]
        inputs[name] = (x.data_ptr(), x.shape, x.stride(), x.device)
        for observer in observers[name]:
            observer.update(x)

    with ExitStack() as stack:
        for name in chosen:
            hook = functools.partial(observe, name)
            handle = linears[name].register_forward_pre_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        yield statistics
    distinct: dict[str, list[Any]] = {}
    for name in chosen:
        if name not in inputs:
            continue
        key = canonical_name(model, name)
        absmax, square = observers[name]
        statistics[key] = InputStatistics(absmax.value, square.value)
        siblings = distinct.setdefault(name.rpartition(".")[0], [])
        if inputs[name] not in siblings:
            siblings.append(inputs[name])
        statistics.shared_inputs[key] = siblings.index(inputs[name])
