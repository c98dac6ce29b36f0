"""Observers: running statistics of a tensor that arrives batch by batch."""

import torch
from torch import Tensor

from scalesweep_hf.ops.sweep import BLOCK

# Elements of inputs that are cast at a time, and rows of a Hessian computed at a time.
ELEMENTS = 1 << 22
CHANNELS = 1024


class AbsMax:
    """The largest magnitude seen; NaN or infinity, once seen, stays."""

    def __init__(self) -> None:
        """Start with nothing seen."""
        self._value: Tensor | None = None

    def update(self, x: Tensor) -> None:
        """Take in a batch [..., K]."""
        low, high = x.detach().aminmax()
        largest = torch.maximum(-low, high).to(torch.float32)
        self._value = largest if self._value is None else torch.maximum(self._value, largest)

    @property
    def value(self) -> Tensor:
        """[] float32 on the CPU; zero before the first batch."""
        return torch.zeros(()) if self._value is None else self._value.cpu()


class _Sum:
    """A sum over tokens: a part of each batch in float32, the parts in float64."""

    def __init__(self) -> None:
        """Start with nothing seen."""
        self._value: Tensor | None = None

    def update(self, x: Tensor) -> None:
        """Take in a batch [..., K]."""
        k = x.shape[-1]
        for rows in x.detach().reshape(-1, k).split(max(ELEMENTS // k, 1)):
            total = self._add_up(rows.to(torch.float32)).to(torch.float64)
            self._value = total if self._value is None else self._value + total

    @staticmethod
    def _add_up(rows: Tensor) -> Tensor:
        """Sum what is observed over rows [T, K] float32."""
        raise NotImplementedError

    @property
    def value(self) -> Tensor:
        """The sum so far, float32 on the CPU.

        Raises:
            RuntimeError: before the first batch, when K is not known.
        """
        if self._value is None:
            raise RuntimeError("no batch was observed: run the model before reading statistics")
        return self._value.to(torch.float32).cpu()


class ChannelSquare(_Sum):
    """The sum over tokens of the squares of every channel, [K]: the diagonal of X^T X (eq. 11)."""

    @staticmethod
    def _add_up(rows: Tensor) -> Tensor:
        return rows.square().sum(0)


class Hessian:
    """The Gram matrix X^T X of a tensor's rows, [K, K], summed and kept on the tensor's device.

    Also X_0^T X, where each batch comes with another one X_0 of the same shape. Products of 16-bit
    rows are exact; sums are float32 at least.
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        """Start with nothing seen; dtype is that of products and sums."""
        self._dtype = dtype
        self._value: Tensor | None = None

    def update(self, x: Tensor, other: Tensor | None = None) -> None:
        """Take in a batch X [..., K], and X_0 unless it is X itself."""
        k = x.shape[-1]
        if self._value is None:
            self._value = torch.zeros(k, k, dtype=self._dtype, device=x.device)
        size = max(ELEMENTS // k, 1)
        right = x.detach().reshape(-1, k).split(size)  # [T, K] each
        left = right if other is None else other.detach().reshape(-1, k).split(size)
        for a, b in zip(left, right, strict=True):
            self._add(a, b)

    def _add(self, a: Tensor, b: Tensor) -> None:
        assert self._value is not None
        if self._dtype == torch.float32 and a.is_cuda and a.dtype == b.dtype != torch.float32:
            for value, left in zip(self._value.split(CHANNELS), a.T.split(CHANNELS), strict=True):
                value += torch.mm(left, b, out_dtype=torch.float32)
        else:
            self._value.addmm_(a.T.to(self._dtype), b.to(self._dtype))

    @property
    def value(self) -> Tensor:
        """[K, K] in the dtype given, on the device of the first batch; not a copy.

        Raises:
            RuntimeError: before the first batch, when K is not known.
        """
        if self._value is None:
            raise RuntimeError("no batch was observed: run the model before reading statistics")
        return self._value


class LocalHessian(_Sum):
    """The diagonal blocks of X^T X, [K/16, 16, 16]; K is divisible by 16."""

    @staticmethod
    def _add_up(rows: Tensor) -> Tensor:
        blocks = rows.unflatten(-1, (-1, BLOCK)).movedim(1, 0)  # [G, T, 16]
        return torch.bmm(blocks.mT, blocks)
