"""Triton twins of `scalesweep_hf.ops.blocks`, for CUDA tensors; others go to the next backend.

A program takes ROWS blocks of 16, each in the registers of one thread, as 16 columns [ROWS]: sums
go left to right, candidates come one by one, and only x and the result touch memory. Where all its
blocks are ordinary, it chooses scales by `kernels.rough`, and where that leaves a doubt, by
`kernels.descent`; else by `kernels.sweeps`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from scalesweep_hf.kernels import decoding, linear
from scalesweep_hf.kernels.descent import choose_near, has_no_specks, is_ordinary
from scalesweep_hf.kernels.fp4 import converts
from scalesweep_hf.kernels.memory import load_blocks, store_codes, store_values
from scalesweep_hf.kernels.numbers import (
    INTERPRETED,
    MAGNITUDE,
    decode,
    magnitude_near,
    magnitude_over,
    to_unit,
)
from scalesweep_hf.kernels.operators import Kernels, Products
from scalesweep_hf.kernels.rough import choose_roughly
from scalesweep_hf.kernels.sweeps import (
    ABSMAX,
    FIXED,
    FOUR_OVER_SIX,
    MODES,
    SWEEP,
    WINDOWS,
    choose,
)
from scalesweep_hf.ops.blocks import BACKENDS
from scalesweep_hf.ops.sweep import BLOCK

# Blocks per program and warps, by whether AbsMax chooses the scale: one block per thread. Walks end
# together in a warp, and need not wait for others. (Interpreted, every program costs the same.)
ROWS = {False: (32, 1), True: (64, 2)}
if INTERPRETED:
    ROWS = {False: (256, 1), True: (256, 1)}
# The compiler would take 64 and keep 8 warps of each scheduler of an H200 waiting for results; 6
# with more independent instructions were 2% to 5% faster. It takes 96 for importances by itself.
REGISTERS = {"mse": 80}


@triton.jit
def _power(exponent):
    """Return 2**exponent for -126...127."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _largest(columns):
    """Return the largest of 16 [ROWS] float32, none of them negative; NaN stays."""
    largest = tl.full(columns[0].shape, 0, tl.int32)
    for i in tl.static_range(16):
        largest = tl.maximum(largest, columns[i].to(tl.int32, bitcast=True))
    return largest.to(tl.float32, bitcast=True)


@triton.jit
def _absolute(x):
    """Return |x| of 16 [ROWS]."""
    result = ()
    for i in tl.static_range(16):
        result = result + (tl.abs(x[i]),)
    return result


@triton.jit
def _near(x, unit, inverse, TWICE: tl.constexpr):
    """Return x / unit of 16 [ROWS], as `magnitude_near` does it."""
    result = ()
    for i in tl.static_range(16):
        result = result + (magnitude_near(x[i], unit, inverse, TWICE),)
    return result


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
    one = tl.where(largest > 0.0, 0.0, 1.0)  # instead of zeros
    result = ()
    for i in tl.static_range(16):
        result = result + (tl.fma(w[i] * first, second, one),)
    return result


@triton.jit
def _importance(ptr, block, mask, period, unit):
    """Load the importance of blocks [ROWS], normalized, times unit, a power of two; 16 [ROWS]."""
    w = _normalized(load_blocks(ptr, block % period, mask))
    result = ()
    for i in tl.static_range(16):
        result = result + (w[i] * unit,)
    return result


@triton.jit
def _clipped(a, most, ENCODE: tl.constexpr):
    """Return 16 [ROWS] in units of MAGNITUDE, at most `most`; NaN, which has no code, as zero."""
    result = ()
    for i in tl.static_range(16):
        magnitude = tl.minimum(a[i], most, propagate_nan=tl.PropagateNan.ALL)
        if ENCODE:
            magnitude = tl.where(magnitude == magnitude, magnitude, 0.0)
        result = result + (magnitude * MAGNITUDE,)
    return result


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
    MANY: tl.constexpr,  # 2**30 blocks or more
    FP4: tl.constexpr,  # whether the device converts to E2M1
    ROWS: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64 if MANY else tl.int32) * ROWS + tl.arange(0, ROWS)
    mask = block < blocks
    x = load_blocks(x_ptr, block, mask)
    w = x
    if WEIGHTED:
        w = load_blocks(weight_ptr, block % period, mask)
    tensor_scale = tl.load(tensor_scale_ptr)
    unit = tensor_scale * (1.0 / MAGNITUDE)
    inverse = tl.div_rn(1.0, unit)
    twice: tl.constexpr = x_ptr.dtype.element_ty.primitive_bitwidth > 16
    a = _absolute(x)
    largest = magnitude_near(_largest(a), unit, inverse, twice)
    code = tl.zeros(largest.shape, tl.int32)
    # Windows of one's own may leave out the best scale, and with it what the descent rests on.
    chosen = WINDOW != FIXED and is_ordinary(largest, tensor_scale, MODE)
    if MODE == FOUR_OVER_SIX:
        chosen = chosen & has_no_specks(a, tensor_scale)
    if chosen:
        a = _near(a, unit, inverse, twice)
        if MODE == SWEEP:
            code, chosen = choose_roughly(a, w, largest, WINDOW, WEIGHTED)
            if chosen == 0:  # anew, as both walks would take the registers of twice as many
                a = _absolute(load_blocks(x_ptr, block, mask, True))
                chosen = has_no_specks(a, tensor_scale)
                if chosen:
                    a = _near(a, unit, inverse, twice)
                    own = a
                    if WEIGHTED:
                        own = _importance(weight_ptr, block, mask, period, 1 / MAGNITUDE**2)
                    code = choose_near(a, own, largest, MODE, WINDOW, WEIGHTED)
        else:
            code = choose_near(a, w, largest, MODE, WINDOW, WEIGHTED)
    if chosen == 0:
        far = _magnitudes(load_blocks(x_ptr, block, mask, True), tensor_scale)
        own = far
        if WEIGHTED:
            own = _importance(weight_ptr, block, mask, period, 1.0)
        code = choose(far, own, low, high, MODE, WINDOW, WEIGHTED)
        a = _clipped(far, 6.0 * decode(code), ENCODE)
    value = decode(code)
    clips: tl.constexpr = MODE != ABSMAX
    if ENCODE:
        store_codes(result_ptr, x, a, value * MAGNITUDE, block, mask, clips, FP4)
        tl.store(scale_ptr + block, code.to(tl.uint8), mask=mask)
    else:
        store_values(result_ptr, x, a, value * MAGNITUDE, value, block, mask, clips, FP4)


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
    fp4 = converts(x.device, _launch)
    _launch(x, tensor_scale, importance, objective, window, low, high, result, scale, fp4)


def _launch(
    x: Tensor,
    tensor_scale: Tensor,
    importance: Tensor | None,
    objective: str,
    window: str,
    low: int,
    high: int,
    result: Tensor,
    scale: Tensor | None,
    fp4: bool,
) -> None:
    blocks = x.numel() // BLOCK
    weight = x if importance is None else _aligned(importance)
    rows, warps = ROWS[objective == "absmax"]
    with torch.cuda.device_of(x):  # Triton launches where the current device is
        _kernel[(triton.cdiv(blocks, rows),)](
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
            WINDOW=WINDOWS[window],
            WEIGHTED=importance is not None,
            ENCODE=scale is not None,
            MANY=blocks >= 1 << 30,
            FP4=fp4,
            ROWS=rows,
            num_warps=warps,
            maxnreg=REGISTERS.get(objective),
            enable_fp_fusion=False,
        )


def _aligned(x: Tensor) -> Tensor:
    """Return x contiguous, where words of 16 bytes can be loaded."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


BACKENDS["triton"] = Kernels(
    "triton",
    _quantize,
    decoding.decode,
    products=Products(linear.multiply, linear.multiply_back),
    runs_on=lambda x: x.is_cuda or INTERPRETED,
    fallback=BACKENDS.get("numba", BACKENDS["torch"]),
).backend()
