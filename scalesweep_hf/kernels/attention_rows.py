"""Packed rows of keys and values to registers, for `attention_kernel`.

Decoding is most of its work: of the 3.2 instructions per element that a Hopper GPU executes at
head_dim 128, 1.9. So the layouts matter: a thread decodes whole blocks, two codes to a register.
Codes times block scales are exact in float16.
"""

import triton
import triton.language as tl

from scalesweep_hf.kernels.numbers import INTERPRETED

ON_GPU = tl.constexpr(not INTERPRETED)
SIGNS = tl.constexpr(-0x7F7F7F80)  # 0x80808080
MAGNITUDES = tl.constexpr(0x0E0E0E0E)
CODE_UNIT = tl.constexpr(2.0**14)  # codes come out of `_pair` as 2**-14 times their values


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
    """Return the codes of words int32 as two tuples of four float16, in the order of `element`.

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
def values(low, high, code, TOKENS: tl.constexpr, DIM: tl.constexpr, UNIT: tl.constexpr, KEYS: tl.constexpr):  # fmt: skip  # noqa: E501
    """Decode what `load` loads to [TOKENS, DIM] float16, exact, times 2**-14.

    KEYS are multiplied from the registers that they are decoded in: Triton finds the layout if all
    from the loads on is pure. Values have to pass through shared memory, since their tokens are
    summed over; the layout that Triton would then choose by the width of the loads costs a move per
    code, and something impure keeps it from looking so far.
    """
    scale = ((code.to(tl.int16) << 7).to(tl.float16, bitcast=True) * 256.0).to(tl.float16)
    x = _codes(low)
    if UNIT == 4:
        scale = tl.broadcast_to(scale[:, :, None], (TOKENS, DIM // 16, 16))
        result = tl.join(_four(x[0]), _four(x[1]))
    else:
        scale = tl.broadcast_to(scale[:, None, :, None], (TOKENS, 2, DIM // 16, 8))
        y = _codes(high)
        a = tl.join(_four(x[0]), _four(y[0]))
        b = tl.join(_four(x[1]), _four(y[1]))
        # Threads beside each other then store 16 bytes beside each other, which is free of bank
        # conflicts: [TOKENS, G, place >> 1, place & 1, word, half] to words before G.
        result = tl.permute(tl.join(a, b), (0, 4, 1, 2, 3, 5))
    scale = tl.reshape(scale, (TOKENS, DIM))
    result = tl.reshape(result, (TOKENS, DIM))
    if ON_GPU:  # where plain products of float16 come out one by one
        return tl.inline_asm_elementwise(
            "mul.rn.f16x2 $0, $1, $2;", "=r,r,r", [result, scale], tl.float16, KEYS, 2
        )
    return result * scale


@triton.jit
def element(place, DIM: tl.constexpr, UNIT: tl.constexpr):
    """Return which element of a row is at places 0...DIM - 1 of `values`."""
    word = place // 8
    if UNIT != 4:
        word = (word % (DIM // 16)) * 2 + word // (DIM // 16)
    return word * 8 + (((place >> 2) & 1) | ((place & 1) << 1) | ((place & 2) << 1))


@triton.jit
def load(ptr, limit, FIRST: tl.constexpr, WIDTH: tl.constexpr, STRIDE: tl.constexpr, DIM: tl.constexpr, TOKENS: tl.constexpr, UNIT: tl.constexpr):  # fmt: skip  # noqa: E501
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
