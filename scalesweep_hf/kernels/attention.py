"""Triton twin of `scalesweep_hf.ops.attention`: see `attention_kernel` for how."""

import functools
from typing import Any

import torch
import triton
from packaging.version import Version
from torch import Tensor

from scalesweep_hf.kernels.attention_kernel import JOINED_WIDTH, join_kernel, kernel
from scalesweep_hf.kernels.devices import processors
from scalesweep_hf.kernels.numbers import INTERPRETED
from scalesweep_hf.ops.attention import ATTENTION, Attention

# Tokens at a time; half as many where the accumulator [head_dim, rows] is larger than this, so that
# all stays in registers. One warp per program needs no barriers.
TOKENS, LARGE = 32, 2048
OPTIONS: dict[str, Any] = {"num_warps": 1, "num_stages": 1}
# Parts are made until this many programs run on a multiprocessor (as many fit its registers), or
# until parts have the first number of tokens; beyond that many parts, the second.
PROGRAMS = 12
LEAST, LEAST_OF_MANY, MANY = 64, 256, 64
# How many elements of keys are multiplied at a time, for each unit of loading: as many as four
# threads hold, so that loading has the layout of the product.
WIDTHS = {8: 64, 4: 32}
MOST_ROWS, MOST_DIM, MOST_SPLITS = 32, 256, 512
# Columns of the smallest product that Triton makes.
LEAST_ROWS = 8 if Version(triton.__version__) >= Version("3.5") else 16
# At head_dim 16 products came out wrong on an H200 with Triton 3.6; up to 64 nothing was tried.
LEAST_DIM = 64
DTYPES = (torch.bfloat16, torch.float16)


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
    """Twin of `scalesweep_hf.ops.attention.attend`, to rounding.

    Beside float32 sums in another order, each weight of the softmax is rounded by at most 2**-11 of
    itself or 2**-40 of the largest.
    """
    if not takes(query, key_rows):
        return ATTENTION["torch"].attend(
            query, key_rows, value_rows, key_scale, value_scale, scaling, mask, length
        )
    run = _operator if torch.compiler.is_compiling() else _attend
    result: Tensor = run(query, key_rows, value_rows, key_scale, value_scale, scaling, mask, length)
    return result


def takes(query: Tensor, key_rows: Tensor) -> bool:
    """Whether the kernel computes this: on a GPU, 16-bit queries, few rows, no gradient."""
    rows = query.shape[1] // key_rows.shape[1] * query.shape[2]
    small = rows <= MOST_ROWS and LEAST_DIM <= query.shape[3] <= MOST_DIM
    gradient = torch.is_grad_enabled() and query.requires_grad
    real = torch.compiler.is_compiling() or (
        type(query) is Tensor and not torch._C._get_tracing_state()
    )
    # Graphs are made of caches that have asked `runs_on` before.
    there = INTERPRETED or query.is_cuda
    there = there and (torch.compiler.is_compiling() or runs_on(query.device))
    return real and there and small and not gradient and query.dtype in DTYPES


@functools.cache
def runs_on(device: torch.device) -> bool:
    """Whether the kernel runs on a device: it has PTX of Ampere."""
    if INTERPRETED or device.type != "cuda":
        return bool(INTERPRETED)
    major: int = torch.cuda.get_device_capability(device)[0]
    return torch.version.hip is None and major >= 8


def _attend(
    query: Tensor,
    key_rows: Tensor,
    value_rows: Tensor,
    key_scale: Tensor,
    value_scale: Tensor,
    scaling: float,
    mask: Tensor | None,
    length: Tensor | None,
) -> Tensor:
    batch, query_heads, t, dim = query.shape
    heads, tokens = key_rows.shape[1:3]
    query, key_rows, value_rows = map(_contiguous_rows, (query, key_rows, value_rows))
    result = query.new_empty(batch, t, query_heads, dim)
    constants: dict[str, Any] = {"GROUP": query_heads // heads, "T": t, "DIM": dim}
    constants["ROWS"] = rows = max(triton.next_power_of_2(query_heads // heads * t), LEAST_ROWS)
    splits = count_splits(batch * heads, tokens, 1 if INTERPRETED else processors(query.device))
    parts, states = result, result
    if splits > 1:
        parts = result.new_empty((batch * heads, splits, rows, dim), dtype=torch.float32)
        states = parts.new_empty((batch * heads, splits, rows, 2))
    key_scale, value_scale = (
        s.detach().to(device=query.device, dtype=torch.float32) for s in (key_scale, value_scale)
    )
    bias, bias_strides, shared = _mask(mask, query, tokens)
    unit, pad = _unit(key_rows, value_rows), triton.next_power_of_2(dim)
    tile = TOKENS if rows * pad <= LARGE else TOKENS // 2
    strides = *query.stride()[:3], *key_rows.stride()[:2], *value_rows.stride()[:2], *bias_strides
    with torch.cuda.device_of(query):  # Triton launches where the current device is
        kernel[(batch * heads, splits)](
            *(query, key_rows, value_rows, key_scale, value_scale),
            *(query if length is None else length, bias, parts, states),
            *(tokens, splits, heads, scaling),
            *strides,
            KEY_STRIDE=key_rows.stride(2),
            VALUE_STRIDE=value_rows.stride(2),
            PAD=pad,
            TOKENS=tile,
            UNIT=unit,
            WIDTH=min(WIDTHS.get(unit, pad), pad),
            SHORT=tokens < tile,
            LENGTH=length is not None,
            MASK=0 if mask is None else 1 if mask.dtype == torch.bool else 2,
            SHARED=shared,
            ONE=splits == 1,
            **constants,
            **OPTIONS,
        )
        if splits > 1:
            width = triton.cdiv(dim, JOINED_WIDTH.value)
            join_kernel[(batch * heads, constants["GROUP"] * t, width)](
                *(parts, states, value_scale, result, splits, heads),
                SPLITS=triton.next_power_of_2(splits),
                **constants,
            )
    return result.transpose(1, 2)


def _contiguous_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def count_splits(pairs: int, tokens: int, multiprocessors: int) -> int:
    """Return into how many parts the tokens of each of B H heads are divided.

    It follows from shapes alone, since a length on the device is not known here.
    """
    fill = min(PROGRAMS * multiprocessors // max(pairs, 1), MOST_SPLITS)
    parts = max(min(-(-tokens // LEAST), MANY), tokens // LEAST_OF_MANY)
    return max(min(fill, parts), 1)


def _mask(mask: Tensor | None, query: Tensor, tokens: int) -> tuple[Tensor, tuple[int, ...], bool]:
    """Return a mask as the kernel reads it, its strides, and whether all rows have the same."""
    if mask is None:
        return query, (0, 0, 0, 0), True
    mask = mask.expand(*query.shape[:3], tokens)
    strides = mask.stride()
    if mask.dtype == torch.bool:
        mask = mask.view(torch.uint8)
    heads, t = mask.shape[1:3]
    return mask, strides, (strides[1] == 0 or heads == 1) and (strides[2] == 0 or t == 1)


def _unit(*rows: Tensor) -> int:
    """Return how many bytes of rows can be loaded at a time: 8, 4 or 1."""
    places = [n for x in rows for n in (x.data_ptr(), *x.stride()[:3])]
    return next(unit for unit in (8, 4, 1) if all(place % unit == 0 for place in places))


_operator = torch.library.custom_op("scalesweep_hf::attend_packed", _attend, mutates_args=())


@_operator.register_fake
def _empty(query: Tensor, *args: object) -> Tensor:
    batch, heads, t, dim = query.shape
    return query.new_empty(batch, t, heads, dim).transpose(1, 2)


ATTENTION["triton"] = Attention(attend, pays=takes, runs_on=runs_on)
