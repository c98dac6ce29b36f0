"""The product of one token by a packed weight, on the tensor cores.

They multiply 16 rows by eight columns, and one token would be one of these. Here each column is the
part of x that belongs to one of eight blocks, with zeros elsewhere: the sums of blocks come out
apart, each in a thread that then multiplies it by its scale, in float32. So weights are decoded
but not scaled (`decoding.pairs`), which is what most instructions are spent on.

A warp takes strips of 16 rows by 256 columns. Of 8 blocks, thread (g, t) loads blocks 2 t and
2 t + 1 of rows g and g + 8 (see `fragments`). Products of the former leave the sums of blocks 2 t
in columns 2 t, those of the latter the sums of blocks 2 t + 1 in columns 2 t + 1; their other
columns are not used.

Decoded bfloat16 codes are times 2**-126, so that x is first multiplied by 2**96: products below
2**-96 may lose bits. Rows where that overflows, because x reaches 2**32 or so, take x as it is, and
products below one may lose bits.
"""

import triton
import triton.language as tl

from scalesweep_hf.kernels.decoding import pairs, scale_of, scaled
from scalesweep_hf.kernels.fragments import eight, four, multiply_add
from scalesweep_hf.kernels.overlap import start

# Rows of a program, and times eight blocks of a warp's strip.
ROWS = tl.constexpr(16)
EIGHTS = tl.constexpr(2)
POWER = tl.constexpr(0x6F806F80)  # 2**96 twice, in bfloat16


@triton.jit
def _load_weights(
    packed_ptr, scale_ptr, tile, strip, lane, N, G, PAIRED: tl.constexpr, EVEN: tl.constexpr
):
    """Load a thread's part of a strip: 16 words of eight codes, and 4 times two scales.

    Past the end of a row, its last blocks come again: `_load_x` has zeros there.
    """
    words = ()
    codes = ()
    two = tl.arange(0, 2)[None, :]
    for half in tl.static_range(2):
        row = tl.minimum(tile * ROWS + half * 8 + lane % 32 // 4, N - 1).to(tl.int64)
        for part in tl.static_range(EIGHTS):
            pair = (strip * EIGHTS + part) * 4 + lane % 4
            if PAIRED:
                at = row * (G // 2) + (pair if EVEN else tl.minimum(pair, G // 2 - 1))
                where = packed_ptr + (at[:, None] * 2 + two)
                code = tl.load(scale_ptr.to(tl.pointer_type(tl.int16)) + at)
            else:
                block = row[:, None] * G + tl.minimum(pair[:, None] * 2 + two, G - 1)
                where = packed_ptr + block
                even, odd = tl.split(tl.load(scale_ptr + block))
                code = even.to(tl.int16) | (odd.to(tl.int16) << 8)
            words = words + four(tl.load(where, eviction_policy="evict_first"))
            codes = codes + (code,)
    return words, codes


@triton.jit
def _load_x(x_ptr, strip, lane, G, EVEN: tl.constexpr):
    """Load x of a strip, 16 words of two: block g of eight, where thread (g, t) has its weights."""
    x = ()
    two = tl.arange(0, 2)[None, :]
    for part in tl.static_range(EIGHTS):
        g = lane % 32 // 4
        block = (strip * EIGHTS + part) * 8 + g
        mask = g // 2 == lane % 4
        if not EVEN:
            mask = mask & (block < G)
        where = x_ptr.to(tl.pointer_type(tl.int64)) + (block[:, None] * 4 + two)
        x = x + four(tl.load(where, mask=mask[:, None], other=0))
        x = x + four(tl.load(where + 2, mask=mask[:, None], other=0))
    return x


@triton.jit
def _zero_after(words, codes, x, N):
    """Return zeros [T] float32 that are known when these loads have ended.

    Sums start with it. Otherwise ptxas puts each load where its result is needed, so that a strip
    waits for memory not once but several times.
    """
    bits = words[0]
    for i in tl.static_range(4, len(words), 4):  # a load has four words
        bits = bits ^ words[i]
    for i in tl.static_range(0, len(x), 4):
        bits = bits ^ x[i]
    for i in tl.static_range(len(codes)):
        bits = bits ^ codes[i].to(tl.int32)
    return (bits & (N >> 31)).to(tl.float32, bitcast=True)  # N is not negative


@triton.jit
def _two_scales(codes, CONVERTS: tl.constexpr):
    """Return two E4M3 scales [T] int16 in float32; NaN stays."""
    codes = codes.to(tl.int32)
    if CONVERTS:
        return tl.inline_asm_elementwise(
            """{
            .reg .b16 c, l, h;
            .reg .b32 both;
            cvt.u16.u32 c, $2;
            cvt.rn.f16x2.e4m3x2 both, c;
            mov.b32 {l, h}, both;
            cvt.f32.f16 $0, l;
            cvt.f32.f16 $1, h;
            }""",
            "=f,=f,r",
            [codes],
            dtype=(tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    else:  # see `scale_of`
        return scale_of((codes << 24) >> 4), scale_of(codes << 12)


@triton.jit
def _add_word(u, v, columns, i: tl.constexpr, sums, BFLOAT16: tl.constexpr):
    """Add products of word i of a block, as pairs of rows g and g + 8, to sums."""
    x0, x1, x2, x3 = columns[4 * i], columns[4 * i + 1], columns[4 * i + 2], columns[4 * i + 3]
    sums = multiply_add(u[0], v[0], u[1], v[1], x0, x1, sums, BFLOAT16)
    return multiply_add(u[2], v[2], u[3], v[3], x2, x3, sums, BFLOAT16)


@triton.jit
def _add_strip(
    upper,
    lower,
    words,
    codes,
    x,
    zero,
    BFLOAT16: tl.constexpr,
    RAISED: tl.constexpr,
    CONVERTS: tl.constexpr,
):
    """Add a strip's products to the sums of rows g and g + 8, each [T] float32."""
    for part in tl.static_range(EIGHTS):
        b = ()
        for i in tl.static_range(8 * part, 8 * part + 8, 4):
            b = b + eight((x[i], x[i + 1], x[i + 2], x[i + 3]))
        power = tl.full(words[0].shape, POWER, tl.int32)
        columns = ()
        for i in tl.static_range(8):
            columns = columns + (scaled(b[i], power, BFLOAT16) if RAISED else b[i],)
        first = (zero, zero, zero, zero)
        second = first
        for i in tl.static_range(2):  # words of a block
            u = pairs(words[4 * part + i], BFLOAT16)
            v = pairs(words[4 * (EIGHTS + part) + i], BFLOAT16)
            first = _add_word(u, v, columns, i, first, BFLOAT16)
        for i in tl.static_range(2):
            u = pairs(words[4 * part + 2 + i], BFLOAT16)
            v = pairs(words[4 * (EIGHTS + part) + 2 + i], BFLOAT16)
            second = _add_word(u, v, columns, i, second, BFLOAT16)
        even, odd = _two_scales(codes[part], CONVERTS)
        upper = tl.fma(second[1], odd, tl.fma(first[0], even, upper))
        even, odd = _two_scales(codes[EIGHTS + part], CONVERTS)
        lower = tl.fma(second[3], odd, tl.fma(first[2], even, lower))
    return upper, lower


@triton.jit
def _sums(
    x_ptr,
    packed_ptr,
    scale_ptr,
    N,
    G,
    STEPS,
    RAISED: tl.constexpr,
    W: tl.constexpr,
    AHEAD: tl.constexpr,
    PAIRED: tl.constexpr,
    EVEN: tl.constexpr,
    CONVERTS: tl.constexpr,
):
    """Return a thread's part of the sums of rows g and g + 8, each [T] float32.

    They are times 2**-14 in float16, and 2**-126 in bfloat16, or 2**-30 where x is RAISED.
    """
    BFLOAT16: tl.constexpr = x_ptr.dtype.element_ty == tl.bfloat16
    lane = tl.arange(0, 32 * W)
    tile = tl.program_id(0)
    strip = lane // 32
    upper = tl.zeros((32 * W,), tl.float32)
    lower = upper
    last = STEPS
    if AHEAD:
        last = STEPS - 1
        words, codes = _load_weights(packed_ptr, scale_ptr, tile, strip, lane, N, G, PAIRED, EVEN)
    for _ in range(last):
        x = _load_x(x_ptr, strip, lane, G, EVEN)
        more, more_codes = _load_weights(
            packed_ptr, scale_ptr, tile, strip + W if AHEAD else strip, lane, N, G, PAIRED, EVEN
        )
        if not AHEAD:
            words, codes = more, more_codes
        zero = _zero_after(words, codes, x, N)
        upper, lower = _add_strip(upper, lower, words, codes, x, zero, BFLOAT16, RAISED, CONVERTS)
        words, codes = more, more_codes
        strip += W
    if AHEAD:
        x = _load_x(x_ptr, strip, lane, G, EVEN)
        zero = _zero_after(words, codes, x, N)
        upper, lower = _add_strip(upper, lower, words, codes, x, zero, BFLOAT16, RAISED, CONVERTS)
    return upper, lower


@triton.jit
def vector_kernel(
    x_ptr,  # [16 G]
    packed_ptr,  # [N, G] int64
    block_scale_ptr,  # [N, G] uint8
    tensor_scale_ptr,  # [] float32
    input_scale_ptr,  # [] float32, unused without SCALES_INPUT
    bias_ptr,  # [N], unused without BIAS
    y_ptr,  # [N]
    N,
    G,
    STEPS,  # strips of a warp
    W: tl.constexpr,  # warps
    AHEAD: tl.constexpr,  # whether the next strip is loaded before one is used
    PAIRED: tl.constexpr,  # whether G is even
    EVEN: tl.constexpr,  # whether no strip goes beyond G
    CONVERTS: tl.constexpr,  # whether the device converts from E4M3
    SCALES_INPUT: tl.constexpr,
    BIAS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Multiply ROWS rows by x; see `scalesweep_hf.ops.blocks.multiply_blocks`."""
    BFLOAT16: tl.constexpr = x_ptr.dtype.element_ty == tl.bfloat16
    tile = tl.program_id(0)
    start(OVERLAPS)
    scale = tl.load(tensor_scale_ptr)
    if SCALES_INPUT:
        input_scale = tl.load(input_scale_ptr)
    upper, lower = _sums(
        x_ptr, packed_ptr, block_scale_ptr, N, G, STEPS, BFLOAT16, W, AHEAD, PAIRED, EVEN, CONVERTS
    )
    y = _of_rows(upper, lower, W) * (1073741824.0 if BFLOAT16 else 16384.0)  # 2**30
    if BFLOAT16:
        finite = tl.min(tl.min((tl.abs(y) < float("inf")).to(tl.int32), axis=1), axis=0)
        if finite == 0:  # once more, with x as it is
            upper, lower = _sums(
                x_ptr,
                packed_ptr,
                block_scale_ptr,
                N,
                G,
                STEPS,
                False,
                W,
                False,
                PAIRED,
                EVEN,
                CONVERTS,
            )
            again = _of_rows(upper, lower, W) * 8.507059173023462e37  # 2**126
            y = tl.where(tl.abs(y) < float("inf"), y, again)
    y *= input_scale * scale if SCALES_INPUT else scale
    row = tile * ROWS + tl.arange(0, 8)[:, None] + 8 * tl.arange(0, 2)[None, :]
    if BIAS:
        y += tl.load(bias_ptr + tl.minimum(row, N - 1)).to(tl.float32)
    tl.store(y_ptr + row, y.to(y_ptr.dtype.element_ty), mask=row < N)


@triton.jit
def _of_rows(upper, lower, W: tl.constexpr):
    """Add up the sums [T] of all threads: [8, 2], row g and row g + 8."""
    both = tl.reshape(tl.join(upper, lower), (W, 8, 4, 2))
    return tl.sum(tl.sum(both, axis=2), axis=0)
