"""Triton twins of `scalesweep_hf.ops.blocks`, for CUDA tensors; others go to the next backend.

A program takes ROWS blocks of 16, each in the registers of one thread, as 16 columns [ROWS]: sums
go left to right, candidates come one by one, and only x and the result touch memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from scalesweep_hf.kernels import decoding, linear
from scalesweep_hf.kernels.numbers import (
    INTERPRETED,
    decode,
    encode_nearest,
    invert,
    magnitude_over,
    round_to_index,
    rounding_error,
    to_unit,
    value_of,
)
from scalesweep_hf.kernels.operators import Kernels, Products
from scalesweep_hf.ops.blocks import BACKENDS
from scalesweep_hf.ops.sweep import (
    BLOCK,
    DOWN_MAX,
    DOWN_NORMAL,
    DOWN_SUBNORMAL,
    DOWN_TOP,
    DOWN_WEIGHTED,
    LAST_ODD,
    TOP,
    UP_MAX,
    UP_NORMAL,
    UP_SUBNORMAL,
)

# Blocks per program and warps: one block per thread. (Interpreted, every program costs the same.)
ROWS = 1024 if INTERPRETED else 32
WARPS = 1
MODES = {"absmax": 0, "four_over_six": 1, "mse": 2, "wmse": 2}
FOUR_OVER_SIX = tl.constexpr(1)
SWEEP = tl.constexpr(2)
EXACT = tl.constexpr(1)
FIXED = tl.constexpr(2)


def _nibbles(values: tuple[int, ...]) -> tl.constexpr:
    """Pack a table of eight small numbers into one integer."""
    return tl.constexpr(sum(value << (4 * i) for i, value in enumerate(values)))


UP = _nibbles(UP_NORMAL)
UP_LOW = _nibbles(UP_SUBNORMAL)
DOWN = _nibbles(DOWN_NORMAL)
DOWN_LOW = _nibbles(DOWN_SUBNORMAL)
DOWN_HIGH = _nibbles(DOWN_TOP)
FIRST_HIGH = tl.constexpr(TOP)
DOWN_MOST = tl.constexpr(DOWN_MAX)
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
def _magnitudes(x, tensor_scale):
    """Return min(|x| / S, FAR) of 16 [ROWS]."""
    unit = to_unit(tensor_scale)
    scale = tensor_scale * unit
    inverse = tl.div_rn(1.0, scale)
    result = ()
    for i in tl.static_range(16):
        result = result + (magnitude_over(x[i], unit, scale, inverse),)
    return result


@triton.jit
def _normalized(w):
    """Twin of `ops.sweep.normalize_importance` for 16 [ROWS] float32, finite and >= 0."""
    largest = _largest(w)
    # frexp: subnormals are first brought to normal numbers.
    small = largest < 1.1754943508222875e-38
    bits = tl.where(small, largest * 16777216.0, largest).to(tl.int32, bitcast=True)
    exponent = (bits >> 23) - 126 - tl.where(small, 24, 0)
    half = (0 - exponent) >> 1  # floor
    first, second = _power(half), _power(0 - exponent - half)
    result = ()
    for i in tl.static_range(16):
        result = result + (tl.where(largest > 0.0, (w[i] * first) * second, 1.0),)
    return result


@triton.jit
def _loss(a, w, code, WEIGHTED: tl.constexpr, CLIPS: tl.constexpr):
    """Twin of `ops.sweep._loss`: a and w are tuples of 16 [ROWS], code is [ROWS] int32."""
    scale = decode(code)
    inverse = invert(scale)
    total = scale
    for i in tl.static_range(16):
        error = rounding_error(a[i], scale, inverse, CLIPS)
        term = error * error
        if WEIGHTED:
            term = w[i] * term
        total = term if i == 0 else total + term
    return total


@triton.jit
def _clipping_cost(a, w, code, WEIGHTED: tl.constexpr):
    """Return what clipping alone costs at a scale, as `ops.sweep._sweep_exact` computes it."""
    limit = 6.0 * decode(code)
    total = limit
    for i in tl.static_range(16):
        clipped = tl.maximum(a[i] - limit, 0.0)
        term = clipped * clipped
        if WEIGHTED:
            term = w[i] * term
        total = term if i == 0 else total + term
    return total


@triton.jit
def _try(a, w, code, best, best_loss, WEIGHTED: tl.constexpr, CLIPS: tl.constexpr):
    loss = _loss(a, w, code, WEIGHTED, CLIPS)
    better = loss < best_loss
    return tl.where(better, code, best), tl.where(better, loss, best_loss)


@triton.jit
def _sweep(a, w, low, high, last, steps, clipping, WEIGHTED: tl.constexpr):
    """Twin of `ops.sweep.sweep_window`, whose first steps, as many as clipping, may clip."""
    low = tl.minimum(tl.maximum(low, 1), 126)
    high = tl.minimum(tl.maximum(high, 1), 126)
    largest = tl.maximum(high, last)
    odd = (high - 1) | 1
    best = low
    best_loss = _loss(a, w, low, WEIGHTED, True)
    for step in range(1, clipping):
        code = low + step
        code = tl.minimum(tl.where(code > high, odd + 2 * (code - high), code), largest)
        best, best_loss = _try(a, w, code, best, best_loss, WEIGHTED, True)
    for step in range(clipping, steps + 1):
        code = low + step
        code = tl.minimum(tl.where(code > high, odd + 2 * (code - high), code), largest)
        best, best_loss = _try(a, w, code, best, best_loss, WEIGHTED, False)
    return best


@triton.jit
def _sweep_exact(a, w, base, WEIGHTED: tl.constexpr):
    """Twin of `ops.sweep._sweep_exact`."""
    code = tl.minimum(tl.maximum(base + HIGHEST, ODD), 126)
    best = code
    best_loss = tl.full(code.shape, float("inf"), tl.float32)
    alive = code > 0
    while tl.max(alive.to(tl.int32), axis=0) > 0:
        loss = _loss(a, w, code, WEIGHTED, True)
        better = alive & (loss <= best_loss)
        best_loss = tl.where(better, loss, best_loss)
        best = tl.where(better, code, best)
        alive = alive & (code > 1) & (_clipping_cost(a, w, code, WEIGHTED) <= best_loss)
        code = tl.maximum(code - 1, 1)
    return best


@triton.jit
def _bounded(a, w, base, largest, WEIGHTED: tl.constexpr):
    """Twin of `ops.sweep.sweep_scales` for its bounded window; also return the first candidate."""
    field = (base & 7) * 4
    up = (tl.where(base < 8, UP_LOW, UP) >> field) & 15
    rows = tl.where(base < 8, DOWN_LOW, tl.where(base < FIRST_HIGH, DOWN, DOWN_HIGH))
    down = (rows >> field) & 15
    if WEIGHTED:
        down = tl.full(down.shape, WEIGHTED_DOWN, tl.int32)
    # Where the window ends below ODD, odd codes follow; the definition has steps for them.
    steps = tl.where(base + up < ODD, STEPS_WEIGHTED if WEIGHTED else STEPS, up + down)
    steps = tl.max(steps, axis=0)
    # From base on, which is nearest to max / 6, no quotient passes 6.4, unless base is the last.
    most = WEIGHTED_DOWN if WEIGHTED else DOWN_MOST
    clipping = tl.where(tl.max(largest, axis=0) > 2688.0, steps + 1, most)
    low = base - down
    return _sweep(a, w, low, base + up, ODD, steps, clipping, WEIGHTED), tl.maximum(low, 1)


@triton.jit
def _choose(a, w, low, high, MODE: tl.constexpr, WINDOW: tl.constexpr, WEIGHTED: tl.constexpr):
    """Return the code of every block's scale, [ROWS] int32, from its columns a and w."""
    largest = _largest(a)
    broken = largest != largest  # a NaN somewhere: nothing beats the first candidate
    base = tl.where(broken, 126, encode_nearest(tl.div_rn(largest, 6.0)))
    first = base
    best = base
    if MODE == FOUR_OVER_SIX:
        four = encode_nearest(tl.div_rn(largest, 4.0))
        better = _loss(a, w, four, False, True) < _loss(a, w, base, False, True)
        best = tl.where(better, four, base)
    elif MODE == SWEEP:
        if WINDOW == EXACT:
            best = _sweep_exact(a, w, base, WEIGHTED)
        elif WINDOW == FIXED:
            first = tl.maximum(base + low, 1)
            steps = high - low
            best = _sweep(a, w, base + low, base + high, 0, steps, steps + 1, WEIGHTED)
        else:
            best, first = _bounded(a, w, base, largest, WEIGHTED)
    return tl.where(broken, first, best)


@triton.jit
def _store_codes(ptr, x, a, scale, block, mask):
    """Store blocks of 16 codes as eight bytes each, one zero among the codes."""
    inverse = invert(scale)
    words = ()
    for half in tl.static_range(2):
        word = tl.zeros(scale.shape, tl.uint32)
        for i in tl.static_range(8):
            index = round_to_index(a[8 * half + i], scale, inverse).to(tl.uint32)
            sign = x[8 * half + i].to(tl.uint32, bitcast=True) & 0x80000000
            word = word | (index << (4 * i)) | (sign >> (28 - 4 * i))
        # A sign stays where its index, the lower three bits, is not zero.
        index = word & 0x77777777
        words = words + (index | (word & (index + 0x77777777) & 0x88888888),)
    both = (words[1].to(tl.uint64) << 32) | words[0].to(tl.uint64)
    tl.store(ptr.to(tl.pointer_type(tl.uint64)) + block, both, mask=mask)


@triton.jit
def _store_values(ptr, x, a, scale, block, mask):
    """Store blocks of 16 values in bfloat16, four at a time."""
    inverse = invert(scale)
    ptr = ptr.to(tl.pointer_type(tl.int64)) + block * 4
    for four in tl.static_range(4):
        word = tl.zeros(scale.shape, tl.int64)
        for i in tl.static_range(4):
            raw = x[4 * four + i]
            value = value_of(round_to_index(a[4 * four + i], scale, inverse)) * scale
            value = tl.where(raw < 0.0, 0.0 - value, value) + 0.0  # no negative zero
            value = tl.where(raw == raw, value, float("nan"))  # low payloads would be lost
            bits = value.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int64) & 0xFFFF
            word = word | (bits << (16 * i))
        tl.store(ptr + four, word, mask=mask)


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
    x = _columns(x_ptr, block, mask)
    a = _magnitudes(x, tl.load(tensor_scale_ptr))
    w = a
    if WEIGHTED:
        w = _normalized(_columns(weight_ptr, block % period, mask))
    code = _choose(a, w, low, high, MODE, WINDOW, WEIGHTED)
    if ENCODE:
        _store_codes(result_ptr, x, a, decode(code), block, mask)
        tl.store(scale_ptr + block, code.to(tl.uint8), mask=mask)
    else:
        _store_values(result_ptr, x, a, decode(code), block, mask)


def _quantize(
    x: Tensor,
    tensor_scale: Tensor,
    importance: Tensor | None,
    objective: str,
    window: str,
    low: int,
    high: int,
    result: Tensor,
    scale: Tensor | None,
) -> None:
    blocks = x.numel() // BLOCK
    weight = x if importance is None else _aligned(importance)
    with torch.cuda.device_of(x):  # Triton launches where the current device is
        _kernel[(triton.cdiv(blocks, ROWS),)](
            _aligned(x),
            tensor_scale,
            weight,
            result,
            result if scale is None else scale,
            blocks,
            weight.numel() // BLOCK,
            low,
            high,
            MODE=MODES[objective],
            WINDOW={"bounded": 0, "exact": 1, "fixed": 2}[window],
            WEIGHTED=importance is not None,
            ENCODE=scale is not None,
            ROWS=ROWS,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )


def _aligned(x: Tensor) -> Tensor:
    """Return x contiguous, where words of eight bytes can be loaded."""
    x = x.contiguous()
    return x if x.data_ptr() % 8 == 0 else x.clone()


BACKENDS["triton"] = Kernels(
    "triton",
    _quantize,
    decoding.decode,
    products=Products(linear.multiply, linear.multiply_back),
    runs_on=lambda x: x.is_cuda or INTERPRETED,
    fallback=BACKENDS.get("numba", BACKENDS["torch"]),
).backend()
