"""Step in where Transformers looks up its attention function, whichever implementation is chosen.

Two things happen between a model and its attention function: modules that quantize queries do so,
and where a cache hands over packed keys and values, decoding steps read them as they are.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from scalesweep_hf.modules.packed import PackedStates, origin
from scalesweep_hf.ops.attention import ATTENTION, attend_packed

# What `sdpa_attention_forward` heeds and `attend_packed` does not do, with the values that ask for
# nothing.
UNSUPPORTED = {
    "dropout": 0.0,
    "position_bias": None,
    "softcap": None,
    "cache": None,
    "output_attentions": False,
}


def wrap_lookup() -> None:
    """Make Transformers' attention functions go through `_attend`; safe to repeat.

    This stays for the rest of the process. The function that is looked up stays the one that the
    model's ``_attn_implementation`` names.
    """
    original = AttentionInterface.get_interface
    if getattr(original, "reads_packed", False):
        return

    @functools.wraps(original)
    def get_interface(self: Any, name: str, default: Callable[..., Any]) -> Callable[..., Any]:
        return functools.partial(_attend, original(self, name, default))

    get_interface.reads_packed = True  # type: ignore[attr-defined]
    AttentionInterface.get_interface = get_interface


def _attend(
    attention: Callable[..., Any],
    module: nn.Module,
    query: Tensor,
    key: Any,
    value: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    states = getattr(module, "nvfp4_states", None)
    if states is not None:
        query = states.take_query(module, query)
    if isinstance(key, PackedStates) and isinstance(value, PackedStates):
        plain = attention is sdpa_attention_forward and key.shape == value.shape
        if plain and _is_plain(module, query, key, *args, **kwargs):
            return _attend_packed(query, key, value, *args, **kwargs), None
    elif not torch.compiler.is_compiling():
        layer = origin(key)
        if layer is not None and layer is origin(value):
            runs_on = ATTENTION[layer.key_codec.backend].runs_on
            layer.reaches_attention = runs_on(query.device)
    key, value = (s.decoded() if isinstance(s, PackedStates) else s for s in (key, value))
    return attention(module, query, key, value, *args, **kwargs)


def _is_plain(
    module: nn.Module,
    query: Tensor,
    key: PackedStates,
    attention_mask: Any = None,
    *args: Any,
    **kwargs: Any,
) -> bool:
    """Whether `attend_packed` computes what sdpa would, and faster."""
    batch, query_heads, t, dim = query.shape
    _, heads, tokens, _ = key.shape
    if args or any(kwargs.get(name, nothing) != nothing for name, nothing in UNSUPPORTED.items()):
        return False
    if (batch, dim) != (key.shape[0], key.shape[3]) or query_heads != heads * getattr(
        module, "num_key_value_groups", 1
    ):
        return False
    if attention_mask is None:
        fits = t == 1  # more are causal
    else:
        shape = attention_mask.shape
        fits = len(shape) == 4 and shape[0] in (1, batch) and shape[1] in (1, query_heads)
        fits = fits and tuple(shape[2:]) == (t, tokens)
        fits = fits and (attention_mask.dtype == torch.bool or attention_mask.is_floating_point())
    return bool(fits) and ATTENTION[key.codec.backend].pays(query, key.rows)


def _attend_packed(
    query: Tensor,
    key: PackedStates,
    value: PackedStates,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    **kwargs: Any,
) -> Tensor:
    """Return [B, T, Hq, D], as Transformers' attention functions do."""
    result = attend_packed(
        query,
        key.rows,
        value.rows,
        key.codec.tensor_scale,
        value.codec.tensor_scale,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        mask=attention_mask,
        length=key.length,
        backend=key.codec.backend,
    )
    return result.transpose(1, 2).contiguous()
