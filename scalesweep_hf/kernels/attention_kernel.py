"""Decode attention in Triton: packed keys and values are decoded in registers.

A program takes one key-value head and a part of its tokens, TOKENS at a time, for all ROWS, which
are the query heads and query tokens that read this head. Tokens and head_dim are the long sides of
both matrix products, rows the short one. A second launch joins the parts of a head.

Codes times block scales are exact in float16 (`attention_rows`), and a power of two brings queries
to its range: of all numbers only the weights of the softmax are rounded, to 11 bits. Sums are
float32.
"""

import math

import triton
import triton.language as tl

from scalesweep_hf.kernels.attention_rows import CODE_UNIT, ON_GPU, element, load, values

# Parts that a program joins at a time, and elements.
JOINED = tl.constexpr(64)
JOINED_WIDTH = tl.constexpr(32)
LOG2E = tl.constexpr(math.log2(math.e))
INFINITY = tl.constexpr(float("inf"))
LOWEST = tl.constexpr(-3e38)
WEIGHT_BITS = tl.constexpr(15.0)  # weights are held times 2**15: float16 loses bits below 2**-14
# Shapes change with every token, and none of them makes faster code.
VARYING = (
    *("tokens", "splits", "heads", "query_b", "query_h", "query_t", "key_b", "key_h"),
    *("value_b", "value_h", "mask_b", "mask_h", "mask_t", "mask_s"),
)


@triton.jit
def _half(weight):
    """Round to float16, out of sight of the compiler: a mask of bytes would change the layout."""
    if ON_GPU:
        return tl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [weight], tl.float16, False, 2
        )
    return weight.to(tl.float16)


@triton.jit
def _query_unit(ptr, real, DIM: tl.constexpr, PAD: tl.constexpr):
    """Return powers of two [ROWS] not above the largest of queries [ROWS], and their inverses."""
    d = tl.arange(0, PAD)[:, None]
    q = tl.load(ptr[None, :] + d, mask=real[None, :] & (d < DIM), other=0).to(tl.float32)
    largest = tl.max(tl.abs(q), axis=0)
    exponent = tl.minimum(tl.maximum(largest.to(tl.int32, bitcast=True) >> 23, 15), 253)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    return (exponent << 23).to(tl.float32, bitcast=True), inverse


@triton.jit
def _query(ptr, real, inverse, FIRST: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr, UNIT: tl.constexpr):  # fmt: skip  # noqa: E501
    """Load elements FIRST ... of queries as [WIDTH, ROWS] float16 times 2**14 / unit."""
    d = FIRST + element(tl.arange(0, WIDTH), WIDTH, UNIT)[:, None]
    q = tl.load(ptr[None, :] + d, mask=real[None, :] & (d < DIM), other=0).to(tl.float32)
    return ((q * inverse[None, :]) * CODE_UNIT).to(tl.float16)


@triton.jit
def _masked(score, ptr, of_tokens, of_rows, valid, real, MASK: tl.constexpr, SHARED: tl.constexpr):
    """Apply a mask to scores [TOKENS, ROWS] in bits, and drop tokens that are not valid.

    Args:
        score: float32.
        ptr: to a mask as `kernel` has it.
        of_tokens: offsets [TOKENS].
        of_rows: offsets [ROWS].
        valid: [TOKENS] int1.
        real: [ROWS] int1, which rows there are.
        MASK: as in `kernel`.
        SHARED: likewise.
    """
    if MASK != 0 and SHARED:
        seen = tl.load(ptr + of_tokens, mask=valid, other=0)[:, None]
    elif MASK != 0:
        at = of_tokens[:, None] + of_rows[None, :]
        seen = tl.load(ptr + at, mask=valid[:, None] & real[None, :], other=0)
    if MASK == 1:
        score = tl.where(seen != 0, score, -INFINITY)
    elif MASK == 2:
        seen = seen.to(tl.float32)
        score += tl.where(seen < LOWEST * 1.1, seen, tl.maximum(seen * LOG2E, LOWEST))
    return tl.where(valid[:, None], score, -INFINITY)


@triton.jit(do_not_specialize=VARYING)
def kernel(
    query_ptr,  # [B, Hq, T, D]
    key_ptr,  # [B, H, S, 9 D / 16] uint8
    value_ptr,  # [B, H, S, 9 D / 16] uint8
    key_scale_ptr,  # [] float32
    value_scale_ptr,  # [] float32
    length_ptr,  # [] integer
    mask_ptr,  # [B, Hq, T, S] uint8 or floating
    part_ptr,  # [B H, splits, ROWS, D] float32; ONE: the result [B, T, Hq, D]
    state_ptr,  # [B H, splits, ROWS, 2] float32: largest score in bits, sum of weights
    tokens,
    splits,
    heads,
    scaling,
    query_b,
    query_h,
    query_t,
    key_b,
    key_h,
    value_b,
    value_h,
    mask_b,
    mask_h,
    mask_t,
    mask_s,
    KEY_STRIDE: tl.constexpr,
    VALUE_STRIDE: tl.constexpr,
    GROUP: tl.constexpr,  # query heads per key-value head
    T: tl.constexpr,
    DIM: tl.constexpr,
    PAD: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    UNIT: tl.constexpr,
    WIDTH: tl.constexpr,  # of a part of the keys
    SHORT: tl.constexpr,  # fewer than TOKENS in storage
    LENGTH: tl.constexpr,
    MASK: tl.constexpr,  # 0: none, 1: bytes, 2: added
    SHARED: tl.constexpr,  # one mask for all rows
    ONE: tl.constexpr,  # one part: no `join_kernel` follows
):
    """Attend to a part of the tokens of one key-value head."""
    pair = tl.program_id(0)
    split = tl.program_id(1)
    b = (pair // heads).to(tl.int64)
    h = (pair % heads).to(tl.int64)
    if LENGTH:
        tokens = tl.minimum(tokens, tl.load(length_ptr).to(tl.int32))
    chunk = tl.cdiv(tl.cdiv(tokens, splits), TOKENS) * TOKENS
    start = split * chunk
    end = tl.minimum(start + chunk, tokens)

    row = tl.arange(0, ROWS)
    head = h * GROUP + row // T
    t = row % T
    real = row < GROUP * T
    query_ptr += b * query_b + head * query_h + t * query_t
    unit, inverse = _query_unit(query_ptr, real, DIM, PAD)
    queries = ()
    for part in tl.static_range(PAD // WIDTH):
        q = _query(query_ptr, real, inverse, part * WIDTH, WIDTH, DIM, UNIT)
        queries = queries + (q,)
    factor = unit * (tl.load(key_scale_ptr) * (scaling * LOG2E))  # scores are in bits

    key_ptr += b * key_b + h * key_h
    value_ptr += b * value_b + h * value_h
    mask_ptr += b * mask_b
    n = tl.arange(0, TOKENS)
    best = tl.full((ROWS,), -INFINITY, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((PAD, ROWS), tl.float32)
    last = tl.maximum(tokens - TOKENS, 0)
    limit = tokens if SHORT else TOKENS
    for at in range(start, end, TOKENS):
        # The last tile of all begins early enough to be a whole one, and skips what was before.
        far = tl.cast(at if SHORT else tl.minimum(at, last), tl.int64)
        valid = (far + n >= at) & (far + n < end)
        here = key_ptr + far * KEY_STRIDE
        blocks = ()
        for part in tl.static_range(PAD // WIDTH):
            k = load(here, limit, part * WIDTH, WIDTH, KEY_STRIDE, DIM, TOKENS, UNIT)
            blocks = blocks + (k,)
        v0, v1, vc = load(
            value_ptr + far * VALUE_STRIDE, limit, 0, PAD, VALUE_STRIDE, DIM, TOKENS, UNIT
        )
        score = tl.zeros((TOKENS, ROWS), tl.float32)
        for part in tl.static_range(PAD // WIDTH):
            k0, k1, kc = blocks[part]
            score = tl.dot(values(k0, k1, kc, TOKENS, WIDTH, UNIT, True), queries[part], score)
        score = score * factor[None, :]
        score = _masked(
            score,
            mask_ptr,
            (far + n) * mask_s,
            head * mask_h + t * mask_t,
            valid,
            real,
            MASK,
            SHARED,
        )
        higher = tl.maximum(best, tl.max(score, axis=0))
        base = tl.where(higher == -INFINITY, 0.0, higher)
        weight = tl.exp2(score - (base - WEIGHT_BITS)[None, :])
        shrink = tl.exp2(best - base)
        total = total * shrink + tl.sum(weight, axis=0)
        best = higher
        if LENGTH:
            vc = vc & 127  # no NaN where a length is shorter than a tile
        v = values(v0, v1, vc, TOKENS, PAD, UNIT, False)
        acc = tl.dot(tl.trans(v), _half(weight), acc * shrink[None, :])

    d = element(tl.arange(0, PAD), PAD, UNIT)
    inside = real[None, :] & (d < DIM)[:, None]
    if ONE:
        scale = tl.load(value_scale_ptr) * CODE_UNIT / tl.where(total > 0.0, total, 1.0)
        out = acc * scale[None, :]
        to = ((b * T + t) * (heads * GROUP) + head) * DIM
        tl.store(part_ptr + to[None, :] + d[:, None], out.to(part_ptr.dtype.element_ty), inside)
    else:
        to = (pair * splits + split).to(tl.int64) * ROWS + row
        tl.store(part_ptr + to[None, :] * DIM + d[:, None], acc, mask=inside)
        tl.store(state_ptr + 2 * to, best)
        tl.store(state_ptr + 2 * to + 1, total)


@triton.jit(do_not_specialize=["splits", "heads"])
def join_kernel(
    part_ptr,  # [B H, splits, ROWS, D] float32
    state_ptr,  # [B H, splits, ROWS, 2] float32
    value_scale_ptr,  # [] float32
    result_ptr,  # [B, T, Hq, D]
    splits,
    heads,
    GROUP: tl.constexpr,
    T: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Join the parts of one row, JOINED_WIDTH elements of it."""
    pair = tl.program_id(0)
    row = tl.program_id(1)
    d = tl.program_id(2) * JOINED_WIDTH + tl.arange(0, JOINED_WIDTH)
    first = (pair * splits).to(tl.int64) * ROWS + row
    s = tl.arange(0, SPLITS)
    state = state_ptr + 2 * (first + s * ROWS)
    best = tl.load(state, mask=s < splits, other=-INFINITY)
    sums = tl.load(state + 1, mask=s < splits, other=0.0)
    largest = tl.max(best, axis=0)
    largest = tl.where(largest == -INFINITY, 0.0, largest)
    total = tl.sum(sums * tl.exp2(best - largest), axis=0)
    acc = tl.zeros((JOINED, JOINED_WIDTH), tl.float32)
    for at in range(0, splits, JOINED):
        i = at + tl.arange(0, JOINED)
        part = first + i * ROWS
        score = tl.load(state_ptr + 2 * part, mask=i < splits, other=-INFINITY)
        x = tl.load(
            part_ptr + part[:, None] * DIM + d[None, :],
            mask=(i < splits)[:, None] & (d < DIM)[None, :],
            other=0.0,
        )
        acc += x * tl.exp2(score - largest)[:, None]
    scale = tl.load(value_scale_ptr) * CODE_UNIT / tl.where(total > 0.0, total, 1.0)
    out = tl.sum(acc, axis=0) * scale
    b = (pair // heads).to(tl.int64)
    head = (pair % heads) * GROUP + row // T
    to = ((b * T + row % T) * (heads * GROUP) + head) * DIM
    tl.store(result_ptr + to + d, out.to(result_ptr.dtype.element_ty), mask=d < DIM)
