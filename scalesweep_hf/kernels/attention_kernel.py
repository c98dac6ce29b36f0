"""Decode attention in Triton: packed keys and values are decoded in registers.

A program takes one key-value head and a part of its tokens, TOKENS at a time, for all ROWS, which
are the query heads and query tokens that read this head. Tokens and head_dim are the long sides of
both matrix products, rows the short one. A second launch joins the parts of a head.

Codes times block scales are exact in float16, and a power of two brings queries to its range: of
all numbers only the weights of the softmax are rounded, to 11 bits. Sums are float32.

Decoding is most of the work: of the 3.2 instructions per element that a Hopper GPU executes at
head_dim 128, 1.9. So the layouts matter: a thread decodes whole blocks, two codes to a register.
"""

import math

import triton
import triton.language as tl

from scalesweep_hf.kernels.numbers import INTERPRETED

# Parts that a program joins at a time, and elements.
JOINED = tl.constexpr(64)
JOINED_WIDTH = tl.constexpr(32)
ON_GPU = tl.constexpr(not INTERPRETED)
LOG2E = tl.constexpr(math.log2(math.e))
INFINITY = tl.constexpr(float("inf"))
LOWEST = tl.constexpr(-3e38)
SIGNS = tl.constexpr(-0x7F7F7F80)  # 0x80808080
MAGNITUDES = tl.constexpr(0x0E0E0E0E)
CODE_UNIT = tl.constexpr(2.0**14)  # codes come out of `_pair` as 2**-14 times their values
WEIGHT_BITS = tl.constexpr(15.0)  # weights are held times 2**15: float16 loses bits below 2**-14
# Shapes change with every token, and none of them makes faster code.
VARYING = (
    *("tokens", "splits", "heads", "query_b", "query_h", "query_t", "key_b", "key_h"),
    *("value_b", "value_h", "mask_b", "mask_h", "mask_t", "mask_s"),
)


@triton.jit
def _pair(word, FIRST: tl.constexpr):
    """Spread bytes FIRST and FIRST + 1 of words int32 to two float16, as their upper bytes."""
    if ON_GPU:
        order: tl.constexpr = "0x3424" if FIRST else "0x1404"
        word = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, 0, " + order + ";", "=r,r", [word], tl.int32, True, 1
        )
    else:
        byte = word >> (8 * FIRST)
        word = ((byte & 0xFF) << 8) | ((byte & 0xFF00) << 16)
    low = word.to(tl.int16).to(tl.float16, bitcast=True)
    high = (word >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return low, high


@triton.jit
def _codes(word):
    """Return the codes of words int32 as two tuples of four float16, in the order of `_element`.

    The upper byte of a float16 holds a code, times 2**-14: bit 3, its sign, as bit 7; bits 0...2 as
    bits 1...3, the top of the mantissa and the low end of the exponent, which takes subnormals to
    subnormals.
    """
    even = ((word << 1) & MAGNITUDES) | ((word << 4) & SIGNS)
    odd = ((word >> 3) & MAGNITUDES) | (word & SIGNS)
    a0, b0 = _pair(even, 0)
    a1, b1 = _pair(even, 2)
    a2, b2 = _pair(odd, 0)
    a3, b3 = _pair(odd, 2)
    return (a0, a1, a2, a3), (b0, b1, b2, b3)


@triton.jit
def _four(x):
    """Join four [...] to [..., 2, 2]."""
    return tl.join(tl.join(x[0], x[2]), tl.join(x[1], x[3]))


@triton.jit
def _values(low, high, code, TOKENS: tl.constexpr, DIM: tl.constexpr, UNIT: tl.constexpr, KEYS: tl.constexpr):  # fmt: skip  # noqa: E501
    """Decode what `_load` loads to [TOKENS, DIM] float16, exact, times 2**-14.

    KEYS are multiplied from the registers that they are decoded in: Triton finds the layout if all
    from the loads on is pure. Values have to pass through shared memory, since their tokens are
    summed over; the layout that Triton would then choose by the width of the loads costs a move per
    code, and something impure keeps it from looking so far.
    """
    scale = ((code.to(tl.int16) << 7).to(tl.float16, bitcast=True) * 256.0).to(tl.float16)
    x = _codes(low)
    if UNIT == 4:
        scale = tl.broadcast_to(scale[:, :, None], (TOKENS, DIM // 16, 16))
        values = tl.join(_four(x[0]), _four(x[1]))
    else:
        scale = tl.broadcast_to(scale[:, None, :, None], (TOKENS, 2, DIM // 16, 8))
        y = _codes(high)
        a = tl.join(_four(x[0]), _four(y[0]))
        b = tl.join(_four(x[1]), _four(y[1]))
        # Threads beside each other then store 16 bytes beside each other, which is free of bank
        # conflicts: [TOKENS, G, place >> 1, place & 1, word, half] to words before G.
        values = tl.permute(tl.join(a, b), (0, 4, 1, 2, 3, 5))
    scale = tl.reshape(scale, (TOKENS, DIM))
    values = tl.reshape(values, (TOKENS, DIM))
    if ON_GPU:  # where plain products of float16 come out one by one
        return tl.inline_asm_elementwise(
            "mul.rn.f16x2 $0, $1, $2;", "=r,r,r", [values, scale], tl.float16, KEYS, 2
        )
    return values * scale


@triton.jit
def _half(weight):
    """Round to float16, out of sight: a mask of bytes would change the layout, as in `_values`."""
    if ON_GPU:
        return tl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [weight], tl.float16, False, 2
        )
    return weight.to(tl.float16)


@triton.jit
def _element(place, DIM: tl.constexpr, UNIT: tl.constexpr):
    """Return which element of a row is at places 0...DIM - 1 of `_values`."""
    word = place // 8
    if UNIT != 4:
        word = (word % (DIM // 16)) * 2 + word // (DIM // 16)
    return word * 8 + (((place >> 2) & 1) | ((place & 1) << 1) | ((place & 2) << 1))


@triton.jit
def _load(ptr, limit, FIRST: tl.constexpr, WIDTH: tl.constexpr, STRIDE: tl.constexpr, DIM: tl.constexpr, TOKENS: tl.constexpr, UNIT: tl.constexpr):  # fmt: skip  # noqa: E501
    """Load elements FIRST ... FIRST + WIDTH - 1 of TOKENS rows, UNIT bytes at a time.

    Rows from limit on are zeros; where it is TOKENS, the compiler drops all conditions.

    Returns:
        The words of blocks [TOKENS, WIDTH / 16] int32, first and second, and their scale codes;
        where UNIT is 4, twice the words [TOKENS, WIDTH / 8].
    """
    g = FIRST // 16 + tl.arange(0, WIDTH // 16)[None, :]
    row = tl.arange(0, TOKENS)[:, None].to(tl.int64)  # so that a row is a constant away
    inside = (row < limit) & (g < DIM // 16)
    code = tl.load(ptr + (row * STRIDE + (DIM // 2 + g)), mask=inside, other=0)
    if UNIT == 8:
        block = ptr.to(tl.pointer_type(tl.int64)) + (row * (STRIDE // 8) + g)
        both = tl.load(block, mask=inside, other=0)
        low = both.to(tl.int32)
        high = (both >> 32).to(tl.int32)
    elif UNIT == 4:
        w = FIRST // 8 + tl.arange(0, WIDTH // 8)[None, :]
        word = ptr.to(tl.pointer_type(tl.int32)) + (row * (STRIDE // 4) + w)
        low = tl.load(word, mask=(row < limit) & (w < DIM // 8), other=0)
        high = low
    else:
        byte = ptr + (row * STRIDE + 8 * g)
        low = tl.zeros(inside.shape, tl.int32)
        high = low
        for i in tl.static_range(4):
            low |= tl.load(byte + i, mask=inside, other=0).to(tl.int32) << (8 * i)
            high |= tl.load(byte + (4 + i), mask=inside, other=0).to(tl.int32) << (8 * i)
    return low, high, code


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
    d = FIRST + _element(tl.arange(0, WIDTH), WIDTH, UNIT)[:, None]
    q = tl.load(ptr[None, :] + d, mask=real[None, :] & (d < DIM), other=0).to(tl.float32)
    return ((q * inverse[None, :]) * CODE_UNIT).to(tl.float16)


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
            k = _load(here, limit, part * WIDTH, WIDTH, KEY_STRIDE, DIM, TOKENS, UNIT)
            blocks = blocks + (k,)
        v0, v1, vc = _load(
            value_ptr + far * VALUE_STRIDE, limit, 0, PAD, VALUE_STRIDE, DIM, TOKENS, UNIT
        )
        score = tl.zeros((TOKENS, ROWS), tl.float32)
        for part in tl.static_range(PAD // WIDTH):
            k0, k1, kc = blocks[part]
            score = tl.dot(_values(k0, k1, kc, TOKENS, WIDTH, UNIT, True), queries[part], score)
        score = score * factor[None, :]
        if MASK != 0 and SHARED:
            seen = tl.load(mask_ptr + (far + n) * mask_s, mask=valid, other=0)[:, None]
        elif MASK != 0:
            at_row = (far + n)[:, None] * mask_s + (head * mask_h + t * mask_t)[None, :]
            seen = tl.load(mask_ptr + at_row, mask=valid[:, None] & real[None, :], other=0)
        if MASK == 1:
            score = tl.where(seen != 0, score, -INFINITY)
        elif MASK == 2:
            seen = seen.to(tl.float32)
            score += tl.where(seen < LOWEST * 1.1, seen, tl.maximum(seen * LOG2E, LOWEST))
        score = tl.where(valid[:, None], score, -INFINITY)
        higher = tl.maximum(best, tl.max(score, axis=0))
        base = tl.where(higher == -INFINITY, 0.0, higher)
        weight = tl.exp2(score - (base - WEIGHT_BITS)[None, :])
        shrink = tl.exp2(best - base)
        total = total * shrink + tl.sum(weight, axis=0)
        best = higher
        if LENGTH:
            vc = vc & 127  # no NaN where a length is shorter than a tile
        values = _values(v0, v1, vc, TOKENS, PAD, UNIT, False)
        acc = tl.dot(tl.trans(values), _half(weight), acc * shrink[None, :])

    d = _element(tl.arange(0, PAD), PAD, UNIT)
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
