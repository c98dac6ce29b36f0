"""Keys and values as a packed cache hands them to attention: rows of bytes, decoded on demand."""

from typing import Any

import torch
from torch import Tensor

from scalesweep_hf.ops.kv import StateCodec

OPERATORS = ("add", "sub", "mul", "truediv", "matmul", "getitem", "neg")


class PackedStates:
    """Stands in for a tensor [B, H, S, D] of keys or values.

    Whatever a tensor can do, this does by decoding itself first; only attention that reads rows
    takes them as they are.

    Attributes:
        rows: [B, H, S, 9 D / 16] uint8.
        codec: what packed them.
        dtype: of the tensor.
        length: [] integer tensor: how many tokens of S are filled; None where all are.
    """

    def __init__(
        self, rows: Tensor, codec: StateCodec, dtype: torch.dtype, length: Tensor | None = None
    ) -> None:
        """Take rows as they are, without a copy."""
        self.rows = rows
        self.codec = codec
        self.dtype = dtype
        self.length = length

    @property
    def shape(self) -> torch.Size:
        """Of the tensor that this stands for."""
        return torch.Size((*self.rows.shape[:-1], self.rows.shape[-1] * 16 // 9))

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self.rows.device

    def decoded(self) -> Tensor:
        """Return the tensor [B, H, S, D]."""
        return self.codec.unpack(self.rows, self.dtype)

    def __getattr__(self, name: str) -> Any:
        """Ask the tensor for everything else."""
        return getattr(self.decoded(), name)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Let torch's functions work on the tensor."""
        return function(*_decoded(args), **_decoded(kwargs or {}))


def _operator(name: str) -> Any:
    def call(self: PackedStates, *args: Any) -> Any:
        return getattr(self.decoded(), name)(*args)

    return call


for _name in OPERATORS:
    setattr(PackedStates, f"__{_name}__", _operator(f"__{_name}__"))


def _decoded(x: Any) -> Any:
    if isinstance(x, PackedStates):
        return x.decoded()
    if isinstance(x, tuple | list):
        return type(x)(_decoded(y) for y in x)
    return {name: _decoded(y) for name, y in x.items()} if isinstance(x, dict) else x
