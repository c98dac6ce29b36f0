"""Keys and values as a packed cache hands them to attention: rows of bytes, decoded on demand."""

import weakref
from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from scalesweep_hf.ops.kv import StateCodec

ARITHMETIC = ("add", "sub", "mul", "truediv", "matmul")
OPERATORS = (*ARITHMETIC, *(f"r{name}" for name in ARITHMETIC), "pow", "neg", "abs")
OPERATORS += ("lt", "le", "gt", "ge", "getitem", "len")

# By tensor that a layer has decoded: the layer, and the tensor's version then. (An attribute of the
# tensor would be copied and saved with it.)
_origins: MutableMapping[Tensor, tuple[weakref.ref[Any], int | None]] = WeakTensorKeyDictionary()


def mark(tensor: Tensor, layer: Any) -> None:
    """Remember that a cache layer has decoded a tensor."""
    _origins[tensor] = weakref.ref(layer), _version(tensor)


def origin(tensor: Any) -> Any:
    """Return the layer that has decoded what this is; None if it is anything else by now."""
    if not isinstance(tensor, Tensor) or tensor not in _origins:
        return None
    layer, version = _origins[tensor]
    return layer() if version == _version(tensor) else None


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


class PackedStates:
    """Stands in for a tensor [B, H, S, D] of keys or values.

    For attributes, torch's functions, arithmetic and indexing it decodes itself first; only
    attention that reads rows takes them as they are. It refuses to be changed in place.

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
        self._tensor: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """Of the tensor that this stands for."""
        return torch.Size((*self.rows.shape[:-1], self.rows.shape[-1] * 16 // 9))

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self.rows.device

    def decoded(self) -> Tensor:
        """Return the tensor [B, H, S, D], decoded once."""
        if self._tensor is None:
            self._tensor = self.codec.unpack(self.rows, self.dtype)
        return self._tensor

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Return what `Tensor.to` would, this itself where nothing is to be done."""
        mine = {torch.device: self.device, torch.dtype: self.dtype}
        stays = all(x == mine.get(type(x), object()) for x in (*args, *kwargs.values()))
        return self if stays else self.decoded().to(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Ask the tensor for everything else, but for what copying and pickling look for."""
        if name.endswith("_") or "_tensor" not in self.__dict__:
            raise AttributeError(f"{name}: packed states cannot be changed in place")
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
