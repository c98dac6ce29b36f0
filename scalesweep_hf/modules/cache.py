"""A key-value cache that stores packed NVFP4: Transformers' own cache layers, over rows of bytes.

A packed layer is one of Transformers' layers whose "head_dim" is the bytes of a packed row.
Appending, sliding, cropping, reordering and offloading are inherited; only `update` packs what
enters and unpacks what attention reads.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, StaticCache
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from scalesweep_hf.kernels import resolve
from scalesweep_hf.modules.lookup import wrap_lookup
from scalesweep_hf.modules.packed import PackedStates, mark
from scalesweep_hf.ops.kv import StateCodec, packed_size

# New tokens up to which attention can read packed rows: those of decoding, not of a prompt.
FEW = 8


class PackedLayer:
    """Mixin before a Transformers cache layer: bytes inside, states outside."""

    key_codec: StateCodec | None = None
    value_codec: StateCodec | None = None
    calibrated = False
    reaches_attention = False  # whether what `update` returns was seen to reach attention as it is
    backend: str

    def use(self, key_codec: StateCodec, value_codec: StateCodec) -> None:
        """Take the calibrated codecs of the attention module that this layer serves."""
        self.key_codec, self.value_codec, self.calibrated = key_codec, value_codec, True

    def reset(self) -> None:
        """Forget all states, and codecs that were made from them."""
        super().reset()  # type: ignore[misc]
        self.reaches_attention = False
        if not self.calibrated:
            self.key_codec = self.value_codec = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for rows of bytes, whether given rows or, for early initialisation, states."""
        super().lazy_initialization(_as_rows(key_states), _as_rows(value_states))  # type: ignore[misc]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Quantize new states once, store them, and return all states that attention may see.

        Args:
            key_states: [B, H, T, D] floating.
            value_states: [B, H, T, D] floating.
            args: passed on.
            kwargs: passed on.

        Returns:
            Keys and values [B, H, all tokens, D] in the dtypes given: decoded, or for a few tokens,
            once decoded ones were seen to reach attention, as `PackedStates`.

        Raises:
            ValueError: D is not a multiple of 16, or without calibrated codecs the first states are
                not finite.
        """
        packed_size(key_states.shape[-1])
        packed_size(value_states.shape[-1])
        if self.key_codec is None or self.value_codec is None:
            codecs = (
                StateCodec.for_states(x, backend=self.backend) for x in (key_states, value_states)
            )
            self.key_codec, self.value_codec = codecs
        keys, values = super().update(  # type: ignore[misc]
            self.key_codec.pack(key_states), self.value_codec.pack(value_states), *args, **kwargs
        )
        length = self.filled()
        packed = (
            PackedStates(keys, self.key_codec, key_states.dtype, length),
            PackedStates(values, self.value_codec, value_states.dtype, length),
        )
        if self.reaches_attention and key_states.shape[-2] <= FEW:
            return packed
        decoded = packed[0].decoded(), packed[1].decoded()
        if not torch.compiler.is_compiling():
            for states in decoded:
                mark(states, self)
        return decoded

    def filled(self) -> Tensor | None:
        """Return how many tokens are filled, [] integer, where storage has room for more."""
        return None


class PackedDynamicLayer(PackedLayer, DynamicLayer):  # type: ignore[misc]
    """Grows with every token."""


class PackedSlidingLayer(PackedLayer, DynamicSlidingWindowLayer):  # type: ignore[misc]
    """Grows up to its window."""


class PackedStaticLayer(PackedLayer, StaticLayer):  # type: ignore[misc]
    """Allocated at once, for compilation."""

    def filled(self) -> Tensor | None:
        """Return the tokens so far, on the device."""
        length: Tensor = self.cumulative_length
        return length


class PackedStaticSlidingLayer(PackedLayer, StaticSlidingWindowLayer):  # type: ignore[misc]
    """Allocated at once, as large as its window."""


PACKED: dict[type, type] = {
    DynamicLayer: PackedDynamicLayer,
    DynamicSlidingWindowLayer: PackedSlidingLayer,
    StaticLayer: PackedStaticLayer,
    StaticSlidingWindowLayer: PackedStaticSlidingLayer,
}


def pack_cache(cache: Cache, only: Collection[int] | None = None) -> Cache:
    """Make an empty cache store packed NVFP4 from now on, in place.

    Layers without keys (linear attention) stay. Layers keep their place and settings. Without an
    attention module that brings calibrated codecs, each layer takes its tensor scales from the
    first states it sees.

    Args:
        cache: empty, made with a config (so that its layers exist).
        only: indices of the layers to pack, of those that can be; None means all.

    Returns:
        The same cache.

    Raises:
        ValueError: there are no layers yet, one already holds states, or one that is to be packed
            is of a kind that cannot.
    """
    wrap_lookup()
    if not cache.layers:
        raise ValueError("the cache has no layers yet: make it with config=model.config")
    for index, layer in enumerate(cache.layers):
        if type(layer) not in PACKED:
            # (A DummyLayer stands where a model uses the states of another layer.)
            packs = isinstance(layer, PackedLayer) or type(layer).__name__ == "DummyLayer"
            if only is None and hasattr(layer, "keys") and not packs:
                raise ValueError(
                    f"layer {index} is a {type(layer).__name__}, which cannot be packed"
                )
            continue
        if only is not None and index not in only:
            continue
        if layer.is_initialized:
            raise ValueError("the cache already holds states: pack it before its first use")
        packed: Any = object.__new__(PACKED[type(layer)])
        packed.__dict__.update(layer.__dict__, backend=resolve("auto"))
        cache.layers[index] = packed
    return cache


class NVFP4Cache(DynamicCache):  # type: ignore[misc]
    """A cache at 4.5 bits per element that grows as needed; works with unquantized models too.

    ``model.generate(..., past_key_values=NVFP4Cache(config=model.config))``
    """

    def __init__(self, *, config: Any, **kwargs: Any) -> None:
        """Make packed layers.

        Args:
            config: of the model, which says what kinds of layers there are.
            kwargs: ``offloading`` and others that DynamicCache takes.
        """
        super().__init__(config=config, **kwargs)
        pack_cache(self)


class NVFP4StaticCache(StaticCache):  # type: ignore[misc]
    """A cache at 4.5 bits per element, allocated at once, so that decoding can be compiled."""

    def __init__(self, *, config: Any, max_cache_len: int, **kwargs: Any) -> None:
        """Make packed layers.

        Args:
            config: of the model, which says what kinds of layers there are.
            max_cache_len: tokens.
            kwargs: ``offloading`` and others that StaticCache takes.
        """
        super().__init__(config=config, max_cache_len=max_cache_len, **kwargs)
        pack_cache(self)


def _as_rows(states: Tensor) -> Tensor:
    """Return rows as they are; for states, which are empty here, rows of their packed size."""
    if states.dtype == torch.uint8:
        return states
    shape = (*states.shape[:-1], packed_size(states.shape[-1]))
    return states.new_empty(shape, dtype=torch.uint8)
