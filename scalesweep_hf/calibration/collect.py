"""Collect statistics of the inputs of a model's Linears while it runs."""

import functools
import json
import os
from collections import UserDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from scalesweep_hf.calibration.observers import AbsMax, ChannelSquare, Hessian, LocalHessian
from scalesweep_hf.calibration.states import StateStatistics
from scalesweep_hf.files import write_whole
from scalesweep_hf.names import canonical_name

FORMAT = "scalesweep-statistics-1"


@dataclass(frozen=True)
class InputStatistics:
    """What calibration knows of one Linear's input.

    Attributes:
        absmax: [] float32, largest magnitude.
        square: [K] float32, sum over tokens of the squares of every channel (eq. 11).
        local_hessian: [K/16, 16, 16] float32, diagonal blocks of X^T X; None if not observed.
        hessian: [K, K], X^T X, on the device where it was observed; None if not observed. Modules
            that read one tensor share it. Never saved.
        cross: [K, K], X_0^T X with X_0 the inputs of the full-precision model, as hessian.
    """

    absmax: Tensor
    square: Tensor
    local_hessian: Tensor | None = None
    hessian: Tensor | None = None
    cross: Tensor | None = None


@dataclass(frozen=True)
class Observed:
    """What is observed of inputs besides `AbsMax` and `ChannelSquare`.

    Attributes:
        local_hessian: whether to observe the diagonal blocks of X^T X.
        hessian: dtype of the whole X^T X, [K, K] per input; None leaves it out.
        reference: returns the full-precision model's input for the batch that is being observed,
            for X_0^T X; None leaves it out. Needs hessian.
    """

    local_hessian: bool = False
    hessian: torch.dtype | None = None
    reference: Callable[[], Tensor] | None = None


class InputObservers:
    """Observe one input; what `InputStatistics` needs."""

    def __init__(self, observed: Observed) -> None:
        """Start with nothing seen."""
        self.absmax, self.square = AbsMax(), ChannelSquare()
        self.local_hessian = LocalHessian() if observed.local_hessian else None
        self.hessian = Hessian(observed.hessian) if observed.hessian else None
        self.reference = observed.reference
        self.cross = Hessian(observed.hessian) if observed.hessian and self.reference else None

    def update(self, x: Tensor) -> None:
        """Take in a batch [..., K]."""
        for observer in (self.absmax, self.square, self.local_hessian, self.hessian):
            if observer is not None:
                observer.update(x)
        if self.cross is not None and self.reference is not None:
            self.cross.update(x, self.reference())

    @property
    def statistics(self) -> InputStatistics:
        """All that was observed."""
        return InputStatistics(
            self.absmax.value,
            self.square.value,
            None if self.local_hessian is None else self.local_hessian.value,
            None if self.hessian is None else self.hessian.value,
            None if self.cross is None else self.cross.value,
        )


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
            tensors[f"{name}.absmax"] = statistics.absmax.clone()  # siblings may share it
            tensors[f"{name}.square"] = statistics.square
            if statistics.local_hessian is not None:
                tensors[f"{name}.local_hessian"] = statistics.local_hessian
        for name, states in self.states.items():
            tensors[f"{name}.state_absmax"] = states.absmax
            tensors[f"{name}.key_square"] = states.key_square
            tensors[f"{name}.query_square"] = states.query_square
        metadata = {
            "format": FORMAT,
            "provenance": json.dumps(self.provenance),
            "shared_inputs": json.dumps(self.shared_inputs),
        }
        write_whole(Path(path), lambda part: save_file(tensors, part, metadata))

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
            keys = set(file.keys())
            for key in sorted(keys):
                name, _, kind = key.rpartition(".")
                parts = ("state_absmax", "key_square", "query_square")
                if kind == "absmax":
                    local = f"{name}.local_hessian"
                    result[name] = InputStatistics(
                        file.get_tensor(key),
                        file.get_tensor(f"{name}.square"),
                        file.get_tensor(local) if local in keys else None,
                    )
                elif kind == "state_absmax":
                    tensors = [file.get_tensor(f"{name}.{part}") for part in parts]
                    result.states[name] = StateStatistics(*tensors)
        return result


@contextmanager
def collect(
    model: nn.Module, names: Iterable[str] | None = None, observed: Observed | None = None
) -> Iterator[Statistics]:
    """Observe the inputs of Linears inside the block; the statistics are complete when it ends.

    Siblings that receive one tensor are observed once. Hooks come off when the block ends, however
    it ends.

    Args:
        model: run it, or parts of it, yourself inside the block.
        names: of the nn.Linear modules to observe; None means all.
        observed: what to observe; None means the largest magnitude and the squares.

    Yields:
        Statistics, empty until the block ends, in the order in which modules ran. Those that never
        ran are absent.

    Raises:
        ValueError: a name is not an nn.Linear of the model.
    """
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    chosen = list(linears) if names is None else list(names)
    for name in chosen:
        if name not in linears:
            raise ValueError(f"{name!r} is not an nn.Linear of {type(model).__name__}")
    statistics = Statistics()
    wanted = observed or Observed()
    observers: dict[str, InputObservers] = {}
    # Per parent, the inputs of its first run, each with the module that observes it.
    sources: dict[str, dict[tuple[Any, ...], str]] = {}

    def observe(
        name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        x = args[0] if args else kwargs["input"]
        siblings = sources.setdefault(name.rpartition(".")[0], {})
        if name not in observers:
            # The weak reference keeps the storage's identity from being given to a later tensor.
            storage = StorageWeakRef(x.untyped_storage())
            source = (storage, x.storage_offset(), x.shape, x.stride())
            first = siblings.setdefault(source, name)
            observers[name] = observers[first] if first != name else InputObservers(wanted)
        if name in siblings.values():  # the first of those that read one tensor
            observers[name].update(x)

    with ExitStack() as stack:
        for name in chosen:
            hook = functools.partial(observe, name)
            handle = linears[name].register_forward_pre_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        yield statistics
    for name in observers:  # in the order in which they ran
        key = canonical_name(model, name)
        statistics[key] = observers[name].statistics
        leaders = [observers[first] for first in sources[name.rpartition(".")[0]].values()]
        statistics.shared_inputs[key] = leaders.index(observers[name])
