"""The product of few tokens by a packed weight, which is read once.

A warp takes strips of 8 rows by 128 columns; each of its threads loads 16 bytes, a quarter of a
strip's row, and decodes them in registers to what the tensor cores take: thread and quarter agree,
because k is permuted alike in both operands. Warps of a program share out k, and add up at the end.

Sums are of products over 256 (`decoding.REST`), so products below 2**-118 lose bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from scalesweep_hf.kernels.decoding import REST, factor, halves, in_words, pairs

# What Triton makes of layouts has changed: from 3.7 on, threads go first to the last dimension, no
# longer to the first, among those without contiguous elements; from 3.8 on, an operand has two
# columns of a thread in a row, no longer four. A wrong guess only costs speed: operands then move
# through shared memory (tests/kernels/test_linear.py looks for that).
_VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
LAST_FIRST = tl.constexpr(_VERSION >= (3, 7))
IN_PAIRS = tl.constexpr(_VERSION >= (3, 8))
# Tokens that this kernel takes, and tokens a tile; before 3.5, Triton has no tiles so narrow.
FEW = 32 if _VERSION >= (3, 5) else 0
TILE = tl.constexpr(8)


@triton.jit
def _load_strip(packed_ptr, scale_ptr, first, strip, N, K, R: tl.constexpr, EVEN: tl.constexpr):
    """Load a strip [W] of R times eight rows: words [8, W, 16] int32, scales [8, W, 4] int16."""
    groups = K // 32  # of a thread's columns
    eight = tl.arange(0, 8)
    word = strip[:, None] * 16 + tl.arange(0, 16)[None, :]
    pair = strip[:, None] * 4 + tl.arange(0, 4)[None, :]
    words = ()
    scales = ()
    for r in tl.static_range(R):
        row = tl.minimum(first + r * 8 + eight, N - 1).to(tl.int64)
        words = words + (_rows(packed_ptr, row, word, groups * 4, EVEN),)
        scales = scales + (_rows(scale_ptr, row, pair, groups, EVEN),)
    return words, scales


@triton.jit
def _load_x(x_ptr, strip, K, tokens, TILES: tl.constexpr, EVEN: tl.constexpr):
    """Load x at a strip [W], eight tokens and eight columns at a time: four [4, 8, W, 8] a tile."""
    eight = tl.arange(0, 8)
    x = ()
    k = tl.arange(0, 4)[:, None, None, None] * 32 + eight[None, None, None, :]
    strip = strip[None, None, :, None]
    if LAST_FIRST:
        k = tl.permute(k, (2, 1, 0, 3))
        strip = tl.permute(strip, (2, 1, 0, 3))
    k += strip * 128
    for tile in tl.static_range(TILES):
        token = tl.minimum(tile * TILE + eight, tokens - 1)[None, :, None, None]
        for q in tl.static_range(4):
            at = x_ptr + (token * K + k + 8 * q)
            part = tl.load(at) if EVEN else tl.load(at, mask=k + 8 * q < K, other=0.0)
            x = x + (tl.permute(part, (2, 1, 0, 3)) if LAST_FIRST else part,)
    return x


@triton.jit
def _rows(ptr, row, at, width, EVEN: tl.constexpr):
    """Load places [W, n] of rows [8], width long: [8, W, n]."""
    if LAST_FIRST:
        row, at = row[None, :, None], at[:, None, :]
    else:
        row, at = row[:, None, None], at[None, :, :]
    where = ptr + (row * width + at)
    result = tl.load(where) if EVEN else tl.load(where, mask=at < width, other=0)
    return tl.permute(result, (1, 0, 2)) if LAST_FIRST else result


@triton.jit
def _quarters(words, W: tl.constexpr):
    """Split words [8, W, 16] into the four [8, W, 4] of every thread."""
    even, odd = tl.split(tl.reshape(words, (8, W, 4, 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return (first, second, third, fourth)


@triton.jit
def _weights(upper, lower, upper_scale, lower_scale, W: tl.constexpr, BFLOAT16: tl.constexpr):
    """Decode a word of two times eight rows, each [8, W, 4], to an operand [W, 16, 32].

    Columns come as the tensor cores' threads hold them: four of every thread, four more.
    """
    a = pairs(upper, BFLOAT16)
    b = pairs(lower, BFLOAT16)
    columns = ()
    for i in tl.static_range(4):
        a0, a4 = halves(a[i], upper_scale, BFLOAT16)
        b0, b4 = halves(b[i], lower_scale, BFLOAT16)
        columns = columns + (tl.join(tl.join(a0, a4), tl.join(b0, b4)),)  # [8, W, 4, half, rows]
    tile = tl.join(tl.join(columns[0], columns[2]), tl.join(columns[1], columns[3]))
    if IN_PAIRS:
        tile = tl.permute(tile, (1, 4, 0, 5, 6, 2, 3))
    else:
        tile = tl.permute(tile, (1, 4, 0, 5, 2, 6, 3))
    return tl.reshape(tile, (W, 16, 32))


@triton.jit
def _add(
    sums,
    words,
    scales,
    x,
    TILES: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
    BFLOAT16: tl.constexpr,
):
    """Add a strip's products to sums, a [W, 16, TILE] for each 16 rows and tile of tokens."""
    operands = ()
    for i in tl.static_range(4 * TILES):
        columns = tl.reshape(x[i], (4, 8, W, 2, 2, 2))
        if IN_PAIRS:
            columns = tl.permute(columns, (2, 4, 5, 0, 3, 1))
        else:
            columns = tl.permute(columns, (2, 4, 0, 5, 3, 1))
        operands = operands + (tl.reshape(columns, (W, 32, TILE)),)
    result = ()
    for m in tl.static_range(R // 2):
        upper, lower = _quarters(words[2 * m], W), _quarters(words[2 * m + 1], W)
        of_upper, of_lower = scales[2 * m].to(tl.int32), scales[2 * m + 1].to(tl.int32)
        mine = ()
        for tile in tl.static_range(TILES):
            mine = mine + (sums[m * TILES + tile],)
        for q in tl.static_range(4):
            if q < 2:  # the lower of the two scales, then the upper; see `factor`
                a, b = (of_upper << 24) >> 4, (of_lower << 24) >> 4
            else:
                a, b = of_upper << 12, of_lower << 12
            a, b = factor(a, BFLOAT16), factor(b, BFLOAT16)
            w = _weights(upper[q], lower[q], a, b, W, BFLOAT16)
            added = ()
            for tile in tl.static_range(TILES):
                operand = operands[tile * 4 + q].to(w.dtype)
                added = added + (tl.dot(w, operand, acc=mine[tile]),)
            mine = added
        result = result + mine
    return result


@triton.jit
def _few_kernel(
    x_ptr,  # [tokens, K]
    packed_ptr,  # [N, K / 8] int32
    block_scale_ptr,  # [N, K / 32] int16
    tensor_scale_ptr,  # [] float32
    input_scale_ptr,  # [] float32, unused without SCALES_INPUT
    bias_ptr,  # [N], unused without BIAS
    y_ptr,  # [tokens, N]
    N,
    K,
    tokens,
    TILES: tl.constexpr,  # of TILE tokens
    R: tl.constexpr,  # times eight rows, even
    W: tl.constexpr,  # warps
    STEPS: tl.constexpr,  # strips of a warp
    EVEN: tl.constexpr,
    SCALES_INPUT: tl.constexpr,
    BIAS: tl.constexpr,
):
    BFLOAT16: tl.constexpr = x_ptr.dtype.element_ty == tl.bfloat16
    first = tl.program_id(0) * (8 * R)
    strip = tl.arange(0, W) * STEPS
    sums = ()
    for _ in tl.static_range(R // 2 * TILES):
        sums = sums + (tl.zeros((W, 16, TILE), tl.float32),)
    words, scales = _load_strip(packed_ptr, block_scale_ptr, first, strip, N, K, R, EVEN)
    x = _load_x(x_ptr, strip, K, tokens, TILES, EVEN)
    for step in range(STEPS):
        ahead = strip + tl.minimum(step + 1, STEPS - 1)
        more, more_scales = _load_strip(packed_ptr, block_scale_ptr, first, ahead, N, K, R, EVEN)
        more_x = _load_x(x_ptr, ahead, K, tokens, TILES, EVEN)
        sums = _add(sums, words, scales, x, TILES, R, W, BFLOAT16)
        words, scales, x = more, more_scales, more_x
    scale = tl.load(tensor_scale_ptr)
    if SCALES_INPUT:
        scale = tl.load(input_scale_ptr) * scale
    for m in tl.static_range(R // 2):
        row = first + m * 16 + tl.arange(0, 16)
        for tile in tl.static_range(TILES):
            y = tl.sum(sums[m * TILES + tile], axis=0) * REST * scale  # [16, TILE]
            if BIAS:
                bias = tl.load(bias_ptr + row, mask=row < N, other=0.0).to(tl.float32)
                y = y + bias[:, None]
            token = tile * TILE + tl.arange(0, 8)
            where = token[None, :].to(tl.int64) * N + row[:, None]
            inside = (token < tokens)[None, :] & (row < N)[:, None]
            tl.store(y_ptr + where, y.to(y_ptr.dtype.element_ty), mask=inside)


def _shape_of_programs(tiles: int, n: int, k: int) -> tuple[int, int]:
    """Return rows over eight and warps of a program: the best of those timed on an H200.

    Few programs want many warps, to have enough loads under way; more tiles want more rows, since
    every program reads all of x.
    """
    short = n <= 8192
    if tiles == 1:
        return (2, 8) if short else (4, 4)
    if tiles == 2:
        return (4, 8) if short else (8, 4)
    return (4, 8) if k > 8192 else (4, 4)


def multiply_few(
    rows: Tensor,
    packed: Tensor,
    block_scale: Tensor,
    tensor_scale: Tensor,
    input_scale: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Twin of `multiply_blocks` for at most `FEW` rows, at least one, of K divisible by 32."""
    (tokens, k), n = rows.shape, packed.shape[0]
    y = rows.new_empty((tokens, n), dtype=dtype)
    tiles = triton.cdiv(tokens, TILE.value)
    tiles += tiles == 3  # one program less to compile
    r, warps = _shape_of_programs(tiles, n, k)
    steps = triton.cdiv(k, 128 * warps)
    with torch.cuda.device_of(rows):
        _few_kernel[(triton.cdiv(n, 8 * r),)](
            in_words(rows, rows.dtype),
            in_words(packed, torch.int32),
            in_words(block_scale, torch.int16),
            tensor_scale,
            tensor_scale if input_scale is None else input_scale,
            y if bias is None else bias.contiguous(),
            y,
            n,
            k,
            tokens,
            TILES=tiles,
            R=r,
            W=warps,
            STEPS=steps,
            EVEN=k == 128 * warps * steps,
            SCALES_INPUT=input_scale is not None,
            BIAS=bias is not None,
            num_warps=warps,
            enable_fp_fusion=False,
        )
    return y
