"""Quantize K, V and Q inside attention modules, whatever attention implementation they call.

A forward pre-hook hands the module a proxy for its cache: it sees K and V after RoPE, once, when
they enter the cache, also where there is none. Q is caught where Transformers looks up the
attention function, so that every implementation, chosen now or later, gets quantized queries.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from scalesweep_hf.kernels import resolve
from scalesweep_hf.modules.cache import PackedLayer
from scalesweep_hf.modules.linear import NVFP4Linear, column_squares, keep_bits
from scalesweep_hf.modules.lookup import wrap_lookup
from scalesweep_hf.ops.kv import StateCodec
from scalesweep_hf.ops.objectives import OBJECTIVES
from scalesweep_hf.ops.sweep import Window

STATES = {"keys": "k", "values": "v", "queries": "q"}
PARAMETERS = ("q_scale", "k_scale", "v_scale", "q_importance", "k_importance")
STATE_TENSORS = (*PARAMETERS, "v_importance")


@dataclass(frozen=True)
class StateRecipe:
    """How one attention module quantizes its states; None leaves a kind as it is.

    Attributes:
        keys: objective of the keys' block scales.
        values: objective of the values' block scales.
        queries: objective of the queries' block scales.
        window: of all sweeps.
        backend: what computes them, see `scalesweep_hf.kernels.resolve`.
    """

    keys: str | None
    values: str | None
    queries: str | None
    window: Window
    backend: str = "auto"

    def weighs(self, kind: str) -> bool:
        """Whether a kind is swept by importance."""
        objective = getattr(self, kind)
        return objective is not None and OBJECTIVES[objective].weighted


class StateObserver(Protocol):
    """Takes in states while calibrating."""

    def observe(self, kind: str, states: Tensor) -> None:
        """Take in states [B, H, T, D] of "keys", "values" or "queries"."""


@dataclass
class AttentionStates:
    """What this package adds to an attention module, as its attribute ``nvfp4_states``."""

    recipe: StateRecipe
    handle: Any
    backend: str
    observer: StateObserver | None = None

    def take_query(self, module: nn.Module, query: Tensor) -> Tensor:
        """Observe and quantize queries [B, Hq, T, D] of the module that this belongs to."""
        if self.observer is not None:
            self.observer.observe("queries", query)
        query_codec = codec(module, "queries")
        return query_codec.round(query) if query_codec else query


class CacheProxy:
    """Stands in for a module's cache, or for its absence, during one forward pass."""

    def __init__(self, module: nn.Module, cache: Any) -> None:
        """Wrap a cache or None."""
        self._module = module
        self._cache = cache

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Quantize new keys and values, then do what the cache does."""
        states: AttentionStates = self._module.nvfp4_states  # type: ignore[assignment]
        if states.observer is not None:
            states.observer.observe("keys", keys)
            states.observer.observe("values", values)
        key_codec, value_codec = codec(self._module, "keys"), codec(self._module, "values")
        layer = self._layer(layer_idx)
        if isinstance(layer, PackedLayer) and states.observer is None:
            if key_codec is None or value_codec is None:
                raise ValueError(
                    f"layer {layer_idx} quantizes only one of keys and values, but its cache packs "
                    "both: use DynamicCache"
                )
            layer.use(key_codec, value_codec)
        else:
            keys = key_codec.round(keys) if key_codec else keys
            values = value_codec.round(values) if value_codec else values
        if self._cache is None:
            return keys, values
        result: tuple[Tensor, Tensor] = self._cache.update(keys, values, layer_idx, *args, **kwargs)
        return result

    def _layer(self, layer_idx: int) -> Any:
        layers = getattr(self._cache, "layers", ())
        return layers[layer_idx] if layer_idx < len(layers) else None

    def __getattr__(self, name: str) -> Any:
        """Look everything else up in the cache."""
        return getattr(self._cache, name)


def attach(module: nn.Module, recipe: StateRecipe) -> None:
    """Hook an attention module; it computes as before until its scales are set (`set_states`)."""
    wrap_lookup()
    handle = module.register_forward_pre_hook(_wrap_cache, with_kwargs=True)
    module.nvfp4_states = AttentionStates(recipe, handle, resolve(recipe.backend))  # type: ignore[assignment]
    for name in PARAMETERS:
        module.register_parameter(name, None)
    module.register_buffer("v_importance", None, persistent=False)
    # Casting a model must leave these float32, as it leaves packed Linears alone.
    # (A partial, unlike a bound method, can be pickled.)
    module._apply = functools.partial(_apply_without_casting, module)  # type: ignore[method-assign]


def detach(module: nn.Module) -> None:
    """Undo `attach`."""
    states: AttentionStates = module.nvfp4_states  # type: ignore[assignment]
    states.handle.remove()
    for name in (*STATE_TENSORS, "nvfp4_states", "_apply"):
        delattr(module, name)


def expected_states(module: nn.Module, heads: int, head_dim: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the float32 parameters that a module's recipe needs, by name."""
    states: AttentionStates = module.nvfp4_states  # type: ignore[assignment]
    shapes: dict[str, tuple[int, ...]] = {}
    for kind, letter in STATES.items():
        if getattr(states.recipe, kind) is None:
            continue
        shapes[f"{letter}_scale"] = ()
        if kind != "values" and states.recipe.weighs(kind):
            shapes[f"{letter}_importance"] = (heads, head_dim)
    return shapes


def set_states(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Install float32 parameters by name, as `expected_states` lists them."""
    for name, tensor in tensors.items():
        setattr(module, name, nn.Parameter(tensor.to(torch.float32), requires_grad=False))


def share_value_importance(module: nn.Module, heads: int) -> None:
    """Weigh every channel of V by the squares of its columns in o_proj (eq. 13).

    Summed over the query heads that read a key-value head; in float64 over exact products, from
    packed weights, so that a reloaded model has the same bits. Does nothing unless V is swept by
    importance.

    Args:
        module: an attention module with an ``o_proj`` [N, Hq D].
        heads: key-value heads.
    """
    states: AttentionStates = module.nvfp4_states  # type: ignore[assignment]
    if not states.recipe.weighs("values"):
        return
    projection = module.get_submodule("o_proj")
    assert isinstance(projection, nn.Linear)
    if isinstance(projection, NVFP4Linear) and projection.is_packed:
        columns = column_squares(projection.quantized_weight())  # [Hq D]
    else:
        columns = projection.weight.detach().double().square().sum(0)
    head_dim = int(module.head_dim)  # type: ignore[arg-type]
    total = columns.reshape(heads, -1, head_dim).sum(1)  # [H, D]
    module.v_importance = total.to(torch.float32)


def codec(module: nn.Module, kind: str) -> StateCodec | None:
    """Return the codec of "keys", "values" or "queries"; None where they stay as they are."""
    states: AttentionStates = module.nvfp4_states  # type: ignore[assignment]
    letter = STATES[kind]
    scale = getattr(module, f"{letter}_scale")
    if scale is None:
        return None
    importance = getattr(module, f"{letter}_importance") if states.recipe.weighs(kind) else None
    recipe = states.recipe
    return StateCodec(scale, getattr(recipe, kind), importance, recipe.window, states.backend)


def _wrap_cache(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, kwargs | {"past_key_values": CacheProxy(module, kwargs.get("past_key_values"))}


def _apply_without_casting(
    module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True
) -> nn.Module:
    kept = [module._parameters[name] for name in PARAMETERS]
    kept.append(module._buffers["v_importance"])  # type: ignore[arg-type]
    return type(module)._apply(module, keep_bits(fn, kept), recurse)  # type: ignore[no-any-return]
