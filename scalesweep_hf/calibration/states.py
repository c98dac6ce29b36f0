"""Statistics of keys, values and queries, observed in hooked attention modules."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scalesweep_hf.calibration.observers import AbsMax, ChannelSquare
from scalesweep_hf.names import STATES


@dataclass(frozen=True)
class StateStatistics:
    """What calibration knows of one attention module's states, after RoPE.

    Attributes:
        absmax: [3] float32, largest magnitudes of keys, values and queries.
        key_square: [H, D] float32, sum over tokens of squared keys per key-value head.
        query_square: [H, D] float32, the same of all queries that read that head.
    """

    absmax: Tensor
    key_square: Tensor
    query_square: Tensor


class StateObservers:
    """Observe one attention module; what `StateStatistics` needs."""

    def __init__(self) -> None:
        """Start with nothing seen."""
        self.absmax = {kind: AbsMax() for kind in STATES}
        self.square = {kind: ChannelSquare() for kind in STATES}
        self.shape = torch.Size()

    def observe(self, kind: str, states: Tensor) -> None:
        """Take in states [B, H, T, D]."""
        self.absmax[kind].update(states)
        if kind != "values":
            self.square[kind].update(states.transpose(1, 2).flatten(2))  # [B, T, H D]
        if kind == "keys":
            self.shape = states.shape

    @property
    def statistics(self) -> StateStatistics:
        """All that was observed, on the CPU.

        Raises:
            RuntimeError: keys or queries were never seen.
        """
        if len(self.shape) != 4:
            raise RuntimeError("no keys were observed: run the model before reading statistics")
        heads, head_dim = self.shape[1], self.shape[3]
        queries = self.square["queries"].value.reshape(heads, -1, head_dim)
        return StateStatistics(
            absmax=torch.stack([self.absmax[kind].value for kind in STATES]),
            key_square=self.square["keys"].value.reshape(heads, head_dim),
            query_square=queries.sum(1),
        )


@contextmanager
def collect_states(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, StateStatistics]]:
    """Observe attention modules that `attach` has hooked, inside the block.

    Args:
        model: run it yourself inside the block.
        names: of the attention modules.

    Yields:
        Statistics by name, empty until the block ends.

    Raises:
        RuntimeError: when the block ends, a module never saw keys or queries.
    """
    observers = {name: StateObservers() for name in names}
    hooked = {name: model.get_submodule(name).nvfp4_states for name in observers}
    result: dict[str, StateStatistics] = {}
    try:
        for name, observer in observers.items():
            hooked[name].observer = observer  # type: ignore[union-attr]
        yield result
        result |= {name: observer.statistics for name, observer in observers.items()}
    finally:
        for states in hooked.values():
            states.observer = None  # type: ignore[union-attr]
