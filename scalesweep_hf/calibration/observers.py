"""Observers: running statistics of a tensor that arrives batch by batch."""

import torch
from torch import Tensor


class AbsMax:
    """The largest magnitude seen; NaN or infinity, once seen, stays."""

    def __init__(self) -> None:
        """Start with nothing seen."""
        self._value: Tensor | None = None

    def update(self, x: Tensor) -> None:
        """Take in a batch [..., K]."""
        largest = x.detach().abs().amax().to(torch.float32)
        self._value = largest if self._value is None else torch.maximum(self._value, largest)

    @property
    def value(self) -> Tensor:
        """[] float32 on the CPU; zero before the first batch."""
        return torch.zeros(()) if self._value is None else self._value.cpu()


class ChannelSquare:
    """The sum over tokens of the squares of every channel: the diagonal of X^T X (eq. 11).

    Each batch is summed in float32, the batches in float64.
    """

    def __init__(self) -> None:
        """Start with nothing seen."""
        self._value: Tensor | None = None

    def update(self, x: Tensor) -> None:
        """Take in a batch [..., K]."""
        rows = x.detach().reshape(-1, x.shape[-1]).to(torch.float32)  # [T, K]
        total = rows.square().sum(0).to(torch.float64)
        self._value = total if self._value is None else self._value + total

    @property
    def value(self) -> Tensor:
        """[K] float32 on the CPU.

        Raises:
            RuntimeError: before the first batch, when K is not known.
        """
        if self._value is None:
            raise RuntimeError("no batch was observed: run the model before reading statistics")
        return self._value.to(torch.float32).cpu()
