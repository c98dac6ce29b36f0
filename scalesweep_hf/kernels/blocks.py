"""Triton twins of `scalesweep_hf.ops.blocks`, for CUDA tensors; others go to the definition.

A program takes ROWS blocks of 16. For the sweep, a thread holds all 16 elements of a block, so that
sums go left to right; candidates come one by one, and nothing but x and the result touches memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from scalesweep_hf.kernels.numbers import (
    INTERPRETED,
    decode,
    encode,
    encode_nearest,
    magnitude_over,
    round_quotient,
    to_unit,
)
from scalesweep_hf.ops import blocks as definition
from scalesweep_hf.ops.blocks import Backend
from scalesweep_hf.ops.objectives import OBJECTIVES
from scalesweep_hf.ops.sweep import (
    BLOCK,
    DOWN_MAX,
    DOWN_NORMAL,
    DOWN_SUBNORMAL,
    DOWN_WEIGHTED,
    LAST_ODD,
    UP_MAX,
    UP_NORMAL,
    UP_SUBNORMAL,
    Window,
    check_window,
)

# Blocks per program and warps: one block per thread.
ROWS = 128
WARPS = 4
MODES = {"absmax": 0, "four_over_six": 1, "mse": 2, "wmse": 2}
ABSMAX = tl.constexpr(0)
FOUR_OVER_SIX = tl.constexpr(1)
EXACT = tl.constexpr(1)
FIXED = tl.constexpr(2)


def _nibbles(values: tuple[int, ...]) -> tl.constexpr:
    """Pack a table of eight small numbers into one integer."""
    return tl.constexpr(sum(value << (4 * i) for i, value in enumerate(values)))


UP = _nibbles(UP_NORMAL)
UP_LOW = _nibbles(UP_SUBNORMAL)
DOWN = _nibbles(DOWN_NORMAL)
DOWN_LOW = _nibbles(DOWN_SUBNORMAL)
WEIGHTED_DOWN = tl.constexpr(DOWN_WEIGHTED)
HIGHEST = tl.constexpr(UP_MAX)
ODD = tl.constexpr(LAST_ODD)
STEPS = tl.constexpr(UP_MAX + DOWN_MAX)
STEPS_WEIGHTED = tl.constexpr(UP_MAX + DOWN_WEIGHTED)
NAN = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def _pair(word, BFLOAT16: tl.constexpr):
    """Return the two 16-bit floats in an int32, as float32."""
    if BFLOAT16:
        return (word << 16).to(tl.float32, bitcast=True), (word & -65536).to(
            tl.float32, bitcast=True
        )
    low = word.to(tl.int16).to(tl.float16, bitcast=True)
    high = (word >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return low.to(tl.float32), high.to(tl.float32)


@triton.jit
def _four(ptr, mask, FLOAT32: tl.constexpr, BFLOAT16: tl.constexpr):
    """Load four consecutive floats from each of [ROWS] pointers to int64."""
    word = tl.load(ptr, mask=mask, other=0)
    if FLOAT32:
        more = tl.load(ptr + 1, mask=mask, other=0)
        return (
            word.to(tl.int32).to(tl.float32, bitcast=True),
            (word >> 32).to(tl.int32).to(tl.float32, bitcast=True),
            more.to(tl.int32).to(tl.float32, bitcast=True),
            (more >> 32).to(tl.int32).to(tl.float32, bitcast=True),
        )
    a, b = _pair(word.to(tl.int32), BFLOAT16)
    c, d = _pair((word >> 32).to(tl.int32), BFLOAT16)
    return a, b, c, d


@triton.jit
def _columns(ptr, block, mask):
    """Load blocks [ROWS] of 16 floats, eight bytes at a time, as a tuple of 16 [ROWS] float32."""
    FLOAT32: tl.constexpr = ptr.dtype.element_ty == tl.float32
    BFLOAT16: tl.constexpr = ptr.dtype.element_ty == tl.bfloat16
    STEP: tl.constexpr = 2 if FLOAT32 else 1
    word = ptr.to(tl.pointer_type(tl.int64)) + block * (4 * STEP)
    a0, a1, a2, a3 = _four(word, mask, FLOAT32, BFLOAT16)
    b0, b1, b2, b3 = _four(word + STEP, mask, FLOAT32, BFLOAT16)
    c0, c1, c2, c3 = _four(word + 2 * STEP, mask, FLOAT32, BFLOAT16)
    d0, d1, d2, d3 = _four(word + 3 * STEP, mask, FLOAT32, BFLOAT16)
    return (a0, a1, a2, a3, b0, b1, b2, b3, c0, c1, c2, c3, d0, d1, d2, d3)


@triton.jit
def _power(exponent):
    """Return 2**exponent for -126...127."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _largest(columns):
    """Return the largest of 16 [ROWS]; NaN stays."""
    largest = columns[0]
    for i in tl.static_range(1, 16):
        largest = tl.maximum(largest, columns[i], propagate_nan=NAN)
    return largest


@triton.jit
def _rescaling(largest):
    """Return the two powers of two by which `ops.sweep.normalize_importance` multiplies a block."""
    # frexp: subnormals are first brought to normal numbers.
    small = largest < 1.1754943508222875e-38
    bits = tl.where(small, largest * 16777216.0, largest).to(tl.int32, bitcast=True)
    exponent = (bits >> 23) - 126 - tl.where(small, 24, 0)
    half = (0 - exponent) >> 1  # floor
    return _power(half), _power(0 - exponent - half)


@triton.jit
def _weight(w, first, second, largest):
    """Rescale importance; a block of zeros becomes one of ones."""
    return tl.where(largest > 0.0, (w * first) * second, 1.0)


@triton.jit
def _loss(a, w, code, WEIGHTED: tl.constexpr):
    """Twin of `ops.sweep._loss`: a and w are tuples of 16 [ROWS], code is [ROWS] int32."""
    scale = decode(code)
    inverse = 1.0 / scale
    minus = 0.0 - scale
    total = scale
    for i in tl.static_range(16):
        # The product is exact, so that fusing it changes nothing.
        error = tl.fma(round_quotient(a[i], scale, inverse), minus, a[i])
        term = error * error
        if WEIGHTED:
            term = w[i] * term
        total = term if i == 0 else total + term
    return total


@triton.jit
def _clipping_cost(a, w, code, WEIGHTED: tl.constexpr):
    """Return what clipping alone costs at a scale, as `ops.sweep._sweep_exact` computes it."""
    limit = 6.0 * decode(code)
    total = limit * 0.0
    for i in tl.static_range(16):
        clipped = tl.maximum(a[i] - limit, 0.0)
        term = clipped * clipped
        if WEIGHTED:
            term = w[i] * term
        total = total + term
    return total


@triton.jit
def _sweep(a, w, low, high, last, steps, WEIGHTED: tl.constexpr):
    """Twin of `ops.sweep.sweep_window`."""
    low = tl.minimum(tl.maximum(low, 1), 126)
    high = tl.minimum(tl.maximum(high, 1), 126)
    largest = tl.maximum(high, last)
    odd = (high - 1) | 1
    best = low
    best_loss = _loss(a, w, low, WEIGHTED)
    for step in range(1, steps + 1):
        code = low + step
        code = tl.minimum(tl.where(code > high, odd + 2 * (code - high), code), largest)
        loss = _loss(a, w, code, WEIGHTED)
        better = loss < best_loss
        best_loss = tl.where(better, loss, best_loss)
        best = tl.where(better, code, best)
    return best


@triton.jit
def _sweep_exact(a, w, base, WEIGHTED: tl.constexpr):
    """Twin of `ops.sweep._sweep_exact`."""
    code = tl.minimum(tl.maximum(base + HIGHEST, ODD), 126)
    best = code
    best_loss = tl.full(code.shape, float("inf"), tl.float32)
    alive = code > 0
    while tl.max(alive.to(tl.int32), axis=0) > 0:
        loss = _loss(a, w, code, WEIGHTED)
        better = alive & (loss <= best_loss)
        best_loss = tl.where(better, loss, best_loss)
        best = tl.where(better, code, best)
        alive = alive & (code > 1) & (_clipping_cost(a, w, code, WEIGHTED) <= best_loss)
        code = tl.maximum(code - 1, 1)
    return best


@triton.jit
def _choose(
    a, w, largest, low, high, MODE: tl.constexpr, WINDOW: tl.constexpr, WEIGHTED: tl.constexpr
):
    """Return the code of every block's scale, [ROWS] int32, from its columns a and w."""
    broken = largest != largest  # a NaN somewhere: nothing beats the first candidate
    base = tl.where(broken, 126, encode_nearest(tl.div_rn(largest, 6.0)))
    first = base
    best = base
    if MODE == FOUR_OVER_SIX:
        four = encode_nearest(tl.div_rn(largest, 4.0))
        better = _loss(a, w, four, False) < _loss(a, w, base, False)
        best = tl.where(better, four, base)
    elif WINDOW == EXACT:
        best = _sweep_exact(a, w, base, WEIGHTED)
    elif WINDOW == FIXED:
        first = tl.maximum(base + low, 1)
        best = _sweep(a, w, base + low, base + high, 0, high - low, WEIGHTED)
    else:
        field = (base & 7) * 4
        up = (tl.where(base < 8, UP_LOW, UP) >> field) & 15
        down = (tl.where(base < 8, DOWN_LOW, DOWN) >> field) & 15
        if WEIGHTED:
            down = tl.full(down.shape, WEIGHTED_DOWN, tl.int32)
        # Where the window ends below ODD, odd codes follow; the definition has steps for them.
        steps = tl.where(base + up < ODD, STEPS_WEIGHTED if WEIGHTED else STEPS, up + down)
        first = tl.maximum(base - down, 1)
        best = _sweep(a, w, base - down, base + up, ODD, tl.max(steps, axis=0), WEIGHTED)
    return tl.where(broken, first, best)


@triton.jit
def _swept(
    x_ptr,
    weight_ptr,
    block,
    mask,
    period,
    tensor_scale,
    low,
    high,
    MODE: tl.constexpr,
    WINDOW: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    """Return the code of the scale of blocks [ROWS], int32; a thread holds a block."""
    unit = to_unit(tensor_scale)
    scale = tensor_scale * unit
    inverse = tl.div_rn(1.0, scale)
    x = _columns(x_ptr, block, mask)
    a = (
        magnitude_over(x[0], unit, scale, inverse),
        magnitude_over(x[1], unit, scale, inverse),
        magnitude_over(x[2], unit, scale, inverse),
        magnitude_over(x[3], unit, scale, inverse),
        magnitude_over(x[4], unit, scale, inverse),
        magnitude_over(x[5], unit, scale, inverse),
        magnitude_over(x[6], unit, scale, inverse),
        magnitude_over(x[7], unit, scale, inverse),
        magnitude_over(x[8], unit, scale, inverse),
        magnitude_over(x[9], unit, scale, inverse),
        magnitude_over(x[10], unit, scale, inverse),
        magnitude_over(x[11], unit, scale, inverse),
        magnitude_over(x[12], unit, scale, inverse),
        magnitude_over(x[13], unit, scale, inverse),
        magnitude_over(x[14], unit, scale, inverse),
        magnitude_over(x[15], unit, scale, inverse),
    )
    w = a
    if WEIGHTED:
        w = _columns(weight_ptr, block % period, mask)
        top = _largest(w)
        first, second = _rescaling(top)
        w = (
            _weight(w[0], first, second, top),
            _weight(w[1], first, second, top),
            _weight(w[2], first, second, top),
            _weight(w[3], first, second, top),
            _weight(w[4], first, second, top),
            _weight(w[5], first, second, top),
            _weight(w[6], first, second, top),
            _weight(w[7], first, second, top),
            _weight(w[8], first, second, top),
            _weight(w[9], first, second, top),
            _weight(w[10], first, second, top),
            _weight(w[11], first, second, top),
            _weight(w[12], first, second, top),
            _weight(w[13], first, second, top),
            _weight(w[14], first, second, top),
            _weight(w[15], first, second, top),
        )
    return _choose(a, w, _largest(a), low, high, MODE, WINDOW, WEIGHTED)


@triton.jit
def _kernel(
    x_ptr,  # [blocks, 16]
    tensor_scale_ptr,  # [] float32
    weight_ptr,  # [period, 16] float32
    result_ptr,  # ENCODE: [blocks, 8] uint8, else [blocks, 16] bfloat16
    scale_ptr,  # ENCODE: [blocks] uint8
    blocks,
    period,
    low,
    high,
    MODE: tl.constexpr,
    WINDOW: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ENCODE: tl.constexpr,
    ROWS: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mask = block < blocks
    inside = mask[:, None]
    tensor_scale = tl.load(tensor_scale_ptr)
    where = block[:, None] * 16 + tl.arange(0, 16)[None, :]  # [ROWS, 16]
    x = tl.load(x_ptr + where, mask=inside, other=0.0).to(tl.float32)
    unit = to_unit(tensor_scale)
    unit_scale = tensor_scale * unit
    a = magnitude_over(x, unit, unit_scale, tl.div_rn(1.0, unit_scale))
    if MODE == ABSMAX:
        broken = tl.max((x != x).to(tl.int32), axis=1) > 0
        code = encode_nearest(tl.div_rn(tl.max(a, axis=1), 6.0))
        code = tl.where(broken, 126, code)
    else:
        code = _swept(
            x_ptr, weight_ptr, block, mask, period, tensor_scale, low, high, MODE, WINDOW, WEIGHTED
        )
    scale = decode(code)[:, None]
    value = round_quotient(a, scale, 1.0 / scale)
    if ENCODE:
        even, odd = tl.split(tl.reshape(encode(value, x), (ROWS, 8, 2)))
        there = block[:, None] * 8 + tl.arange(0, 8)[None, :]
        tl.store(result_ptr + there, (even | (odd << 4)).to(tl.uint8), mask=inside)
        tl.store(scale_ptr + block, code.to(tl.uint8), mask=mask)
    else:
        value = value * scale
        value = tl.where(x < 0.0, 0.0 - value, value) + 0.0  # no negative zero
        value = tl.where(x == x, value, x)
        tl.store(result_ptr + where, value.to(tl.bfloat16), mask=inside)


@triton.jit
def _decode_kernel(packed_ptr, scale_ptr, result_ptr, blocks, ROWS: tl.constexpr):
    """[blocks, 8] uint8 and [blocks] uint8 to [blocks, 16]."""
    block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = (block < blocks)[:, None]
    there = block[:, None] * 8 + tl.arange(0, 8)[None, :]
    packed = tl.load(packed_ptr + there, mask=inside, other=0).to(tl.int32)
    code = tl.load(scale_ptr + block, mask=block < blocks, other=1).to(tl.int32)
    scale = tl.where((code & 127) == 127, float("nan"), decode(code & 127))
    scale = (scale * tl.where(code > 127, -1.0, 1.0))[:, None]  # 0 - 0 would lose the sign
    codes = tl.reshape(tl.join(packed & 15, packed >> 4), (ROWS, 16))
    index = codes & 7
    value = tl.where(index < 2, index * 0.5, ((index + 252) << 22).to(tl.float32, bitcast=True))
    value = value * tl.where(codes > 7, -1.0, 1.0) * scale
    where = block[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(result_ptr + where, value.to(result_ptr.dtype.element_ty), mask=inside)


def _launch(
    x: Tensor,
    tensor_scale: Tensor,
    importance: Tensor | None,
    objective: str,
    window: str,
    low: int,
    high: int,
    out: tuple[Tensor, Tensor],
    encode: bool,
) -> None:
    blocks = x.numel() // BLOCK
    if not blocks:
        return
    weight = x if importance is None else _aligned(importance)
    _kernel[(triton.cdiv(blocks, ROWS),)](
        _aligned(x),
        tensor_scale,
        weight,
        *out,
        blocks,
        weight.numel() // BLOCK,
        low,
        high,
        MODE=MODES[objective],
        WINDOW={"bounded": 0, "exact": 1, "fixed": 2}[window],
        WEIGHTED=importance is not None,
        ENCODE=encode,
        ROWS=ROWS,
        num_warps=WARPS,
        enable_fp_fusion=False,
    )


def _aligned(x: Tensor) -> Tensor:
    """Return x contiguous, where words of eight bytes can be loaded."""
    x = x.contiguous()
    return x if x.data_ptr() % 8 == 0 else x.clone()


def _empty_parts(x: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    shape = x.shape[:-1]
    packed = x.new_empty((*shape, x.shape[-1] // 2), dtype=torch.uint8)
    return packed, x.new_empty((*shape, x.shape[-1] // BLOCK), dtype=torch.uint8)


def _empty_values(x: Tensor, *args: object) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.bfloat16)


def _empty_decoded(packed: Tensor, block_scale: Tensor, dtype: torch.dtype) -> Tensor:
    return packed.new_empty((*packed.shape[:-1], 2 * packed.shape[-1]), dtype=dtype)


@torch.library.custom_op("scalesweep_hf::encode_blocks", mutates_args=())
def _encode(
    x: Tensor,
    tensor_scale: Tensor,
    importance: Tensor | None,
    objective: str,
    window: str,
    low: int,
    high: int,
) -> tuple[Tensor, Tensor]:
    packed, scale = _empty_parts(x)
    _launch(x, tensor_scale, importance, objective, window, low, high, (packed, scale), encode=True)
    return packed, scale


@torch.library.custom_op("scalesweep_hf::round_blocks", mutates_args=())
def _round(
    x: Tensor,
    tensor_scale: Tensor,
    importance: Tensor | None,
    objective: str,
    window: str,
    low: int,
    high: int,
) -> Tensor:
    values = _empty_values(x)
    _launch(
        x, tensor_scale, importance, objective, window, low, high, (values, values), encode=False
    )
    return values


@torch.library.custom_op("scalesweep_hf::decode_blocks", mutates_args=())
def _decode(packed: Tensor, block_scale: Tensor, dtype: torch.dtype) -> Tensor:
    values = _empty_decoded(packed, block_scale, dtype)
    if blocks := block_scale.numel():
        scale = block_scale.contiguous().view(torch.uint8)
        grid = (triton.cdiv(blocks, ROWS),)
        _decode_kernel[grid](packed.contiguous(), scale, values, blocks, ROWS=ROWS, num_warps=WARPS)
    return values


_encode.register_fake(_empty_parts)
_round.register_fake(_empty_values)
_decode.register_fake(_empty_decoded)


def encode_blocks(
    x: Tensor,
    tensor_scale: Tensor,
    *,
    objective: str,
    importance: Tensor | None = None,
    window: Window = "bounded",
) -> tuple[Tensor, Tensor]:
    """Twin of `scalesweep_hf.ops.blocks.encode_blocks`."""
    if not _takes(x, objective):
        return definition.encode_blocks(
            x, tensor_scale, objective=objective, importance=importance, window=window
        )
    packed, scale = _encode(x, tensor_scale, importance, objective, *_window(window))
    return packed, scale


def round_blocks(
    x: Tensor,
    tensor_scale: Tensor,
    *,
    objective: str,
    importance: Tensor | None = None,
    window: Window = "bounded",
) -> Tensor:
    """Twin of `scalesweep_hf.ops.blocks.round_blocks`."""
    if not _takes(x, objective):
        return definition.round_blocks(
            x, tensor_scale, objective=objective, importance=importance, window=window
        )
    values: Tensor = _round(x, tensor_scale, importance, objective, *_window(window))
    return values


def decode_blocks(packed: Tensor, block_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Twin of `scalesweep_hf.ops.blocks.decode_blocks`."""
    if not _runs_on(packed) or dtype == torch.float64:
        return definition.decode_blocks(packed, block_scale, dtype)
    values: Tensor = _decode(packed, block_scale, dtype)
    return values


TRITON = Backend(encode_blocks, round_blocks, decode_blocks)


def _takes(x: Tensor, objective: str) -> bool:
    return _runs_on(x) and x.dtype != torch.float64 and not OBJECTIVES[objective].coupled


def _runs_on(x: Tensor) -> bool:
    return x.is_cuda or INTERPRETED


def _window(window: Window) -> tuple[str, int, int]:
    """Return a window as the types that an operator can have."""
    if isinstance(window, str):
        return window, 0, 0
    return "fixed", *check_window(window)
