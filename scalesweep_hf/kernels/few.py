"""The product of few tokens by a packed weight, which is read once.

A warp takes strips of 128 columns of R times 16 rows; each of its threads loads 16 bytes, a quarter
of a strip's row, and decodes them in registers to what the tensor cores take (see
`scalesweep_hf.kernels.fragments`): thread and quarter agree, because k is permuted alike in both
operands. Warps of a program share out the strips, and add up at the end.

Sums are of products over 256 (`decoding.REST`), so products below 2**-118 lose bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from scalesweep_hf.kernels.decoding import REST, in_words
from scalesweep_hf.kernels.fragments import (
    converts_e4m3,
    eight,
    factors,
    four,
    multiply_add,
    weights,
)
from scalesweep_hf.kernels.overlap import NOT_OVERLAPPING, overlapping, start

FEW = 32  # tokens that this kernel takes
TILE = tl.constexpr(8)  # tokens of a product of the tensor cores
MANY_ROWS = 8192  # from which on programs are several to a processor


@triton.jit
def _sixteen_bytes(ptr, at, mask, MASKED: tl.constexpr, POLICY: tl.constexpr):
    """Load 16 bytes at 16 * at, [T] int64: four [T] int32."""
    where = ptr.to(tl.pointer_type(tl.int64)) + (at[:, None] * 2 + tl.arange(0, 2)[None, :])
    if MASKED:
        both = tl.load(where, mask=mask[:, None], other=0, eviction_policy=POLICY)
    else:
        both = tl.load(where, eviction_policy=POLICY)
    return four(both)


@triton.jit
def _load_weights(packed_ptr, scale_ptr, rows, quarter, K):
    """Load a quarter of each row's strip: four words, and two scales; zeros beyond K."""
    mask = quarter < K // 32
    words = ()
    scales = ()
    for i in tl.static_range(len(rows)):
        at = rows[i] + quarter
        words = words + (_sixteen_bytes(packed_ptr, at, mask, True, "evict_first"),)
    for i in tl.static_range(len(rows)):
        pair = tl.load(scale_ptr + (rows[i] + quarter), mask=mask, other=0)
        scales = scales + (pair.to(tl.uint16, bitcast=True).to(tl.int32),)
    return words, scales


@triton.jit
def _load_x(x_ptr, tokens, quarter, K, MASKED: tl.constexpr):
    """Load the same quarter of each token, eight columns at a time, as `fragments.eight` does."""
    mask = quarter < K // 32
    x = ()
    for i in tl.static_range(len(tokens)):
        for q in tl.static_range(4):
            at = (tokens[i] + quarter) * 4 + q
            x = x + (eight(_sixteen_bytes(x_ptr, at, mask, MASKED, "evict_last")),)
    return x


@triton.jit
def _add(
    sums, words, scales, x, TILES: tl.constexpr, BFLOAT16: tl.constexpr, CONVERTS: tl.constexpr
):
    """Add products to sums, a tuple of four [T] for each 16 rows and tile of tokens."""
    result = ()
    for r in tl.static_range(len(words) // 2):
        upper, lower = words[2 * r], words[2 * r + 1]
        of_upper = factors(scales[2 * r], BFLOAT16, CONVERTS)
        of_lower = factors(scales[2 * r + 1], BFLOAT16, CONVERTS)
        mine = ()
        for tile in tl.static_range(TILES):
            mine = mine + (sums[r * TILES + tile],)
        for q in tl.static_range(4):
            a = weights(upper[q], of_upper[q // 2], BFLOAT16)
            b = weights(lower[q], of_lower[q // 2], BFLOAT16)
            added = ()
            for tile in tl.static_range(TILES):
                c = x[tile * 4 + q]
                total = multiply_add(a[0], b[0], a[1], b[1], c[0], c[1], mine[tile], BFLOAT16)
                total = multiply_add(a[2], b[2], a[3], b[3], c[2], c[3], total, BFLOAT16)
                added = added + (total,)
            mine = added
        result = result + mine
    return result


@triton.jit
def _over_warps(sums, W: tl.constexpr):
    """Add up what the warps have: [8 of a row, 8 tokens, 2 of eight rows, sums].

    Halves of the warps are added until one is left, which costs one round through shared memory:
    `tl.sum` takes two, and threads' shuffles.
    """
    COUNT: tl.constexpr = len(sums)
    parts = ()
    for i in tl.static_range(COUNT):
        s0, s1, s2, s3 = sums[i]
        parts = parts + (tl.join(tl.join(s0, s1), tl.join(s2, s3)),)  # [T, 2 tokens, 2 of 8 rows]
    for _ in tl.static_range(4):
        joined = ()
        for i in tl.static_range(len(parts) // 2):
            joined = joined + (tl.join(parts[i], parts[i + len(parts) // 2]),)
        if len(parts) > 1:
            parts = joined
    y = tl.reshape(parts[0], (W, 8, 4, 2, 2, COUNT))
    y = tl.permute(y, (1, 2, 3, 4, 5, 0))
    if W == 4:
        y = tl.reshape(y, (8, 4, 2, 2, COUNT, 2, 2))
        a, b = tl.split(y)
        a, b = tl.split(a + b)
    elif W == 8:
        y = tl.reshape(y, (8, 4, 2, 2, COUNT, 2, 2, 2))
        a, b = tl.split(y)
        a, b = tl.split(a + b)
        a, b = tl.split(a + b)
    else:
        y = tl.reshape(y, (8, 4, 2, 2, COUNT, 2, 2, 2, 2))
        a, b = tl.split(y)
        a, b = tl.split(a + b)
        a, b = tl.split(a + b)
        a, b = tl.split(a + b)
    return tl.reshape(a + b, (8, 8, 2, COUNT))


@triton.jit(do_not_specialize=["tokens"])
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
    R: tl.constexpr,  # times 16 rows
    W: tl.constexpr,  # warps
    EVEN: tl.constexpr,  # whether K is a multiple of 128 * W
    CONVERTS: tl.constexpr,  # see `fragments.factors`
    SCALES_INPUT: tl.constexpr,
    BIAS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    BFLOAT16: tl.constexpr = x_ptr.dtype.element_ty == tl.bfloat16
    thread = tl.arange(0, 32 * W)
    warp, g, t = thread // 32, thread // 4 % 8, thread % 4
    first = tl.program_id(0) * (16 * R)
    quarters = K // 32
    rows = ()
    for i in tl.static_range(2 * R):
        rows = rows + (tl.minimum(first + 8 * i + g, N - 1).to(tl.int64) * quarters,)
    of_x = ()
    for i in tl.static_range(TILES):
        of_x = of_x + (tl.minimum(g + TILE * i, tokens - 1).to(tl.int64) * quarters,)
    zeros = tl.zeros((32 * W,), tl.float32)
    sums = ()
    for _ in tl.static_range(R * TILES):
        sums = sums + ((zeros, zeros, zeros, zeros),)
    quarter = warp * 4 + t
    start(OVERLAPS)
    words, scales = _load_weights(packed_ptr, block_scale_ptr, rows, quarter, K)
    for _ in range(0, K, 128 * W):
        x = _load_x(x_ptr, of_x, quarter, K, not EVEN)
        sums = _add(sums, words, scales, x, TILES, BFLOAT16, CONVERTS)
        quarter += 4 * W
        # ptxas issues these as the registers that they fill are used for the last time.
        words, scales = _load_weights(packed_ptr, block_scale_ptr, rows, quarter, K)
    scale = tl.load(tensor_scale_ptr)
    if SCALES_INPUT:
        scale = tl.load(input_scale_ptr) * scale
    y = _over_warps(sums, W) * REST * scale
    i = tl.arange(0, R * TILES)[None, None, None, :]
    row = tl.arange(0, 8)[:, None, None, None] + 8 * tl.arange(0, 2)[None, None, :, None]
    row += first + 16 * (i // TILES)
    token = tl.arange(0, 8)[None, :, None, None] + i % TILES * TILE
    if BIAS:
        y += tl.load(bias_ptr + row, mask=row < N, other=0.0).to(tl.float32)
    where = y_ptr + (token.to(tl.int64) * N + row)
    tl.store(where, y.to(y_ptr.dtype.element_ty), mask=(row < N) & (token < tokens))


def _shape_of_programs(tiles: int, n: int) -> tuple[int, int]:
    """Return rows over 16 and warps of a program: the best of those timed on an H200.

    Few programs want many warps, to have enough loads under way. More tiles want more rows, since
    every program reads all of x, and lines of the first cache that loads touch are the limit then.
    """
    few = n <= MANY_ROWS
    if tiles == 1:
        return (1, 16) if few else (1, 4)
    if few:
        return (2, 16) if tiles == 2 else (2, 8)
    return (4, 4)


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
    tiles = triton.next_power_of_2(triton.cdiv(tokens, TILE.value))
    r, warps = _shape_of_programs(tiles, n)
    # Programs of the next kernel that find room early crowd some processors and not others.
    overlap = overlapping(rows.device) if n <= MANY_ROWS else NOT_OVERLAPPING
    with torch.cuda.device_of(rows):
        _few_kernel[(triton.cdiv(n, 16 * r),)](
            in_words(rows, torch.int64).view(rows.dtype),
            in_words(packed, torch.int64).view(torch.int32),
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
            EVEN=k % (128 * warps) == 0,
            CONVERTS=converts_e4m3(rows.device),
            SCALES_INPUT=input_scale is not None,
            BIAS=bias is not None,
            num_warps=warps,
            enable_fp_fusion=False,
            **overlap,
        )
    return y
