"""Attention of a few query tokens over packed keys and values: the definition, and its twins."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from scalesweep_hf.ops.blocks import decode_blocks
from scalesweep_hf.ops.kv import packed_size


def attend_packed(
    query: Tensor,
    key_rows: Tensor,
    value_rows: Tensor,
    key_scale: Tensor,
    value_scale: Tensor,
    *,
    scaling: float,
    mask: Tensor | None = None,
    length: Tensor | None = None,
    backend: str = "torch",
) -> Tensor:
    """Attend to states that are packed as `StateCodec.pack` does it.

    ``softmax(q k^T * (S_k * scaling) + mask) v * S_v`` with k and v the codes times their block
    scales, which float32 holds exactly, and S the tensor scales. Products, sums and softmax are
    float32; the result is rounded once. A query that may attend to nothing gets zeros.

    Args:
        query: [B, Hq, T, D] floating, D divisible by 16. Heads h Hq/H ... (h + 1) Hq/H - 1 read
            key-value head h.
        key_rows: [B, H, S, 9 D / 16] uint8.
        value_rows: [B, H, S, 9 D / 16] uint8.
        key_scale: [] float32 > 0, S_k.
        value_scale: [] float32 > 0, S_v.
        scaling: of the scores, usually D**-0.5.
        mask: broadcastable to [B, Hq, T, S]: bool, True where a query attends, or floating, added
            to the scores; None: every query attends to all tokens.
        length: [] integer on the device of the rows: tokens from there on are not attended, and
            may hold anything. None means S.
        backend: a key of `ATTENTION`; all agree but for rounding (see each).

    Returns:
        [B, Hq, T, D] in query's dtype.

    Raises:
        ValueError: shapes do not fit each other.
    """
    check_shapes(query, key_rows, value_rows, mask)
    return ATTENTION[backend].attend(
        query, key_rows, value_rows, key_scale, value_scale, scaling, mask, length
    )


def check_shapes(query: Tensor, key_rows: Tensor, value_rows: Tensor, mask: Tensor | None) -> None:
    """Check the shapes of the arguments of `attend_packed`.

    Raises:
        ValueError: they do not fit each other.
    """
    batch, heads, tokens, row = key_rows.shape
    fits = query.shape[0] == batch and query.shape[1] % heads == 0
    if not fits or row != packed_size(query.shape[-1]) or value_rows.shape != key_rows.shape:
        raise ValueError(
            f"queries {list(query.shape)}, packed keys {list(key_rows.shape)} and packed values "
            f"{list(value_rows.shape)} do not fit: they are [B, Hq, T, D], [B, H, S, 9 D / 16] and "
            "the same, with Hq a multiple of H"
        )
    wanted = (*query.shape[:3], tokens)
    shape = wanted if mask is None else (1,) * (4 - mask.ndim) + tuple(mask.shape)
    if len(shape) != 4 or any(n not in (1, m) for n, m in zip(shape, wanted, strict=True)):
        raise ValueError(f"a mask {list(shape)} cannot be broadcast to {list(wanted)}")


def attend(
    query: Tensor,
    key_rows: Tensor,
    value_rows: Tensor,
    key_scale: Tensor,
    value_scale: Tensor,
    scaling: float,
    mask: Tensor | None,
    length: Tensor | None,
) -> Tensor:
    """Compute what `attend_packed` says, from the same arguments."""
    heads, tokens = key_rows.shape[1:3]
    q = query.to(torch.float32).unflatten(1, (heads, -1)).flatten(2, 3)  # [B, H, Hq/H T, D]
    score = q @ _decode(key_rows).mT * (key_scale * scaling)  # [B, H, Hq/H T, S]
    score = score.reshape(*query.shape[:3], tokens)  # [B, Hq, T, S]
    values = _decode(value_rows)
    if mask is not None and mask.dtype == torch.bool:
        score = score.masked_fill(~mask, float("-inf"))
    elif mask is not None:
        score = score + mask
    if length is not None:
        beyond = torch.arange(tokens, device=query.device) >= length
        score = score.masked_fill(beyond, float("-inf"))
        values = values.masked_fill(beyond[:, None], 0.0)  # whatever is there, NaN included
    weight = score.softmax(-1).masked_fill(score.amax(-1, keepdim=True) == float("-inf"), 0.0)
    weight = weight.unflatten(1, (heads, -1)).flatten(2, 3)  # [B, H, Hq/H T, S]
    result: Tensor = (weight @ values * value_scale).reshape(query.shape)
    return result.to(query.dtype)


def _decode(rows: Tensor) -> Tensor:
    half = rows.shape[-1] * 8 // 9
    scale = rows[..., half:].view(torch.float8_e4m3fn)
    return decode_blocks(rows[..., :half], scale, torch.float32)


@dataclass(frozen=True)
class Attention:
    """One implementation of `attend`.

    Attributes:
        attend: takes what the definition takes.
        pays: whether, for a query and packed rows, this is faster than decoding all rows first.
        runs_on: whether it can be so at all on a device.
    """

    attend: Callable[..., Tensor]
    pays: Callable[[Tensor, Tensor], bool]
    runs_on: Callable[[torch.device], bool] = lambda device: True


# By name; `scalesweep_hf.kernels` adds its own.
ATTENTION = {"torch": Attention(attend, pays=lambda query, rows: False)}
