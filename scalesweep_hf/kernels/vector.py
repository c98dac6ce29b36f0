"""The product of one token by a packed weight, on the cores that add and multiply float32.

A program is one warp, and every thread takes a block of 16 at a time: its codes become float16 in
pairs, then float32, and the sum of their products is multiplied by the block's scale. Those are
products times 2**-14, so that products below 2**-112 lose bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from scalesweep_hf.kernels.decoding import INTERPRETER, in_words, pairs, scale_of, widened
from scalesweep_hf.kernels.numbers import INTERPRETED
from scalesweep_hf.ops.sweep import BLOCK

# Rows and threads of a program, and steps to unroll: the best of those timed on an H200.
ROWS = 2
THREADS = 128 if INTERPRETED else 32
UNROLLED = 4


@triton.jit
def _both(pair):
    """Return the lower and the upper float16 of int32 as float32."""
    if INTERPRETER:
        return widened(pair, False), widened(pair >> 16, False)
    else:  # otherwise the upper one takes an instruction more
        return tl.inline_asm_elementwise(
            "{ .reg .b16 l, h; mov.b32 {l, h}, $2; cvt.f32.f16 $0, l; cvt.f32.f16 $1, h; }",
            "=f,=f,r",
            [pair],
            dtype=(tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )


@triton.jit
def _add_eight(total, word, x, FIRST: tl.constexpr):
    """Add eight codes, times 2**-14, times x[FIRST...] to total."""
    split = pairs(word, False)
    for i in tl.static_range(4):
        lower, upper = _both(split[i])
        total = tl.fma(lower, x[FIRST + i], total)
        total = tl.fma(upper, x[FIRST + 4 + i], total)
    return total


@triton.jit
def _sixteen(x_ptr, block, mask):
    """Load blocks of x, [..] each, as 16 columns [..] float32."""
    BFLOAT16: tl.constexpr = x_ptr.dtype.element_ty == tl.bfloat16
    x = ()
    for i in tl.static_range(4):
        word = tl.load(x_ptr.to(tl.pointer_type(tl.int64)) + block * 4 + i, mask=mask, other=0)
        low, high = word.to(tl.int32), (word >> 32).to(tl.int32)
        x = x + (widened(low, BFLOAT16), widened(low >> 16, BFLOAT16))
        x = x + (widened(high, BFLOAT16), widened(high >> 16, BFLOAT16))
    return x


@triton.jit
def _kernel(
    x_ptr,  # [16 G]
    packed_ptr,  # [N, G] int64
    block_scale_ptr,  # [N, G] uint8
    tensor_scale_ptr,  # [] float32
    input_scale_ptr,  # [] float32, unused without SCALES_INPUT
    bias_ptr,  # [N], unused without BIAS
    y_ptr,  # [N]
    N,
    G,
    ROWS: tl.constexpr,
    THREADS: tl.constexpr,
    UNROLLED: tl.constexpr,
    EVEN: tl.constexpr,
    SCALES_INPUT: tl.constexpr,
    BIAS: tl.constexpr,
):
    first = tl.program_id(0) * ROWS
    sums = ()
    for _ in tl.static_range(ROWS):
        sums = sums + (tl.zeros((THREADS,), tl.float32),)
    for start in tl.range(0, G, THREADS, loop_unroll_factor=UNROLLED):
        block = start + tl.arange(0, THREADS)
        mask = block >= 0 if EVEN else block < G
        words = ()
        codes = ()
        for r in tl.static_range(ROWS):
            at = tl.minimum(first + r, N - 1).to(tl.int64) * G + block
            words = words + (tl.load(packed_ptr + at, mask=mask, other=0),)
            codes = codes + (tl.load(block_scale_ptr + at, mask=mask, other=0),)
        x = _sixteen(x_ptr, block, mask)
        added = ()
        for r in tl.static_range(ROWS):
            total = tl.zeros((THREADS,), tl.float32)
            total = _add_eight(total, words[r].to(tl.int32), x, 0)
            total = _add_eight(total, (words[r] >> 32).to(tl.int32), x, 8)
            scale = scale_of(codes[r].to(tl.int8, bitcast=True).to(tl.int32) << 20)
            added = added + (tl.fma(total, scale, sums[r]),)
        sums = added
    scale = tl.load(tensor_scale_ptr)
    if SCALES_INPUT:
        scale = tl.load(input_scale_ptr) * scale
    for r in tl.static_range(ROWS):
        y = tl.sum(sums[r], axis=0) * 16384.0 * scale
        if BIAS:
            y = y + tl.load(bias_ptr + tl.minimum(first + r, N - 1)).to(tl.float32)
        tl.store(y_ptr + first + r, y.to(y_ptr.dtype.element_ty), mask=first + r < N)


def multiply_one(
    row: Tensor,
    packed: Tensor,
    block_scale: Tensor,
    tensor_scale: Tensor,
    input_scale: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Twin of `multiply_blocks` for x [1, K] and N > 0."""
    n, blocks = packed.shape[0], row.shape[1] // BLOCK
    y = row.new_empty((1, n), dtype=dtype)
    with torch.cuda.device_of(row):
        _kernel[(triton.cdiv(n, ROWS),)](
            in_words(row, torch.int64).view(row.dtype),
            in_words(packed, torch.int64),
            block_scale.contiguous().view(torch.uint8),
            tensor_scale,
            tensor_scale if input_scale is None else input_scale,
            y if bias is None else bias.contiguous(),
            y,
            n,
            blocks,
            ROWS=ROWS,
            THREADS=THREADS,
            UNROLLED=UNROLLED,
            EVEN=blocks % THREADS == 0,
            SCALES_INPUT=input_scale is not None,
            BIAS=bias is not None,
            num_warps=1,
            enable_fp_fusion=False,
        )
    return y
