"""The loops of `scalesweep_hf.kernels.cpu`, compiled by numba on first use and cached on disk.

LANES blocks at a time are transposed to 16 columns [16 * LANES] in the first-level cache, so that
every lane of a vector is one block: sums go left to right, candidates come one by one. All that is
compiled is in this file, because numba's cache looks for changes in one file alone. Float32
throughout; nothing is fused but by `fma`.
"""

import zlib

import numba
import numpy as np
from llvmlite import ir
from numba.extending import intrinsic

from scalesweep_hf.ops.blocks import FAR as FAR_FLOAT
from scalesweep_hf.ops.sweep import (
    BLOCK,
    DOWN_MAX,
    DOWN_NORMAL,
    DOWN_SUBNORMAL,
    DOWN_TOP,
    DOWN_WEIGHTED,
    LAST_ODD,
    UP_MAX,
    UP_NORMAL,
    UP_SUBNORMAL,
)

LANES = 64
ABSMAX, FOUR_OVER_SIX, BOUNDED, EXACT, FIXED = range(5)
MODES = {"absmax": ABSMAX, "four_over_six": FOUR_OVER_SIX}  # by objective; else by window:
WINDOWS = {"bounded": BOUNDED, "exact": EXACT, "fixed": FIXED}
FLOAT32, BFLOAT16, FLOAT16 = range(3)

f32, i32 = np.float32, np.int32
FAR = f32(FAR_FLOAT)
SMALLEST_SCALE = f32(2.0**-9)
UP = np.array(UP_SUBNORMAL + UP_NORMAL * 15, i32)  # by code
DOWN = np.array(DOWN_SUBNORMAL + DOWN_NORMAL * 14 + DOWN_TOP, i32)
# numba's cache notices changes of this file alone; what it compiles from others has this checksum.
CHECKSUM = 3817993531
_IMPORTED = (
    UP.tolist(),
    DOWN.tolist(),
    UP_MAX,
    DOWN_MAX,
    DOWN_WEIGHTED,
    LAST_ODD,
    BLOCK,
    FAR_FLOAT,
)
if zlib.crc32(repr(_IMPORTED).encode()) != CHECKSUM:
    raise RuntimeError("window tables have changed: update CHECKSUM, or numba runs the old ones")


def _compiled(function):
    """Compile without the GIL, with IEEE division, and cached where a folder can be written."""
    try:
        return numba.njit(cache=True, nogil=True, error_model="numpy")(function)
    except RuntimeError:  # numba found no folder for its cache
        return numba.njit(nogil=True, error_model="numpy")(function)


@intrinsic
def fma(context, x, y, z):
    """Return x * y + z, rounded once."""
    return x(x, y, z), lambda context, builder, signature, args: builder.fma(*args)


@intrinsic
def bits_of(context, x):
    """Return the bits of a float32 as int32."""
    signature = numba.int32(numba.float32)
    return signature, lambda context, builder, _, args: builder.bitcast(args[0], ir.IntType(32))


@intrinsic
def float_of(context, bits):
    """Return the float32 that has the bits of an int32."""
    signature = numba.float32(numba.int32)
    return signature, lambda context, builder, _, args: builder.bitcast(args[0], ir.FloatType())


@_compiled
def e4m3_value(code):
    """Return the value of an E4M3 code 0...126."""
    normal = float_of(i32((code + 960) << 20))  # exponent bias 7 to 127
    return f32(code) * SMALLEST_SCALE if code < 8 else normal


@_compiled
def e4m3_nearest(x):
    """Return the E4M3 code nearest to x >= 0, ties to even, in 1...126; NaN gives 126."""
    x = x if x > SMALLEST_SCALE else (SMALLEST_SCALE if x == x else f32(448.0))
    x = x if x < f32(448.0) else f32(448.0)
    bits = bits_of(x)
    normal = i32(((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960)
    # Adding 1.5 * 2**23 rounds to an integer, which is then the low bits.
    subnormal = i32(bits_of(x * f32(512.0) + f32(12582912.0)) - 0x4B400000)
    return subnormal if x < f32(0.015625) else normal


@_compiled
def e2m1_index(y):
    """Return the index 0...7 of round_e2m1(y) for y >= 0, ties to even; 0 for NaN."""
    y = y if y >= f32(0.0) else f32(0.0)
    y = y if y < f32(6.0) else f32(6.0)
    power = i32(bits_of(y if y > f32(1.0) else f32(1.0)) & 0x7F800000)
    shift = i32(power + 0x0B000000)  # times 2**22: adding it rounds to multiples of the step
    return i32(bits_of(y + float_of(shift)) - shift + (power >> 22) - 254)


@_compiled
def e2m1_value(index):
    """Return the magnitude of an index 0...7."""
    return f32(index) * f32(0.5) if index < 2 else float_of(i32((index + 252) << 22))


@_compiled
def half_value(bits):
    """Return the float32 value of the float16 with these bits, an int16."""
    magnitude = i32((bits & 0x7FFF) << 13)
    value = float_of(magnitude) * f32(2.0**112)  # exponent bias 15 to 127; exact
    special = float_of(i32(magnitude | 0x7F800000))
    value = special if magnitude >= 0x0F800000 else value
    return -value if bits < 0 else value


@_compiled
def load(x, kind, start, count, columns):
    """Transpose count blocks of x, given as bytes, to the first lanes of columns."""
    first = start * BLOCK
    if kind == FLOAT32:
        floats = x.view(np.float32)[first : first + count * BLOCK]
        for b in range(count):
            for i in range(BLOCK):
                columns[i * LANES + b] = floats[b * BLOCK + i]
        return
    words = x.view(np.int16)[first : first + count * BLOCK]
    if kind == BFLOAT16:
        for b in range(count):
            for i in range(BLOCK):
                columns[i * LANES + b] = float_of(i32(i32(words[b * BLOCK + i]) << 16))
        return
    for b in range(count):
        for i in range(BLOCK):
            columns[i * LANES + b] = half_value(i32(words[b * BLOCK + i]))


@_compiled
def largest_of(columns, result):
    """Write the largest of every block to result [LANES]; NaN stays."""
    for b in range(LANES):
        result[b] = f32(0.0)
    for i in range(BLOCK):
        for b in range(LANES):
            value, found = columns[i * LANES + b], result[b]
            result[b] = value if value > found or value != value else found


@_compiled
def normalize(weight, largest):
    """Twin of `ops.sweep.normalize_importance`, in place."""
    largest_of(weight, largest)
    for b in range(LANES):
        # frexp: subnormals are first brought to normal numbers.
        small = largest[b] < f32(2.0**-126)
        bits = bits_of(largest[b] * f32(2.0**24) if small else largest[b])
        exponent = i32((bits >> 23) - (150 if small else 126))
        half = i32(-exponent >> 1)  # floor
        first = float_of(i32((half + 127) << 23))
        second = float_of(i32((127 - exponent - half) << 23))
        for i in range(BLOCK):
            scaled = (weight[i * LANES + b] * first) * second
            weight[i * LANES + b] = scaled if largest[b] > f32(0.0) else f32(1.0)


@_compiled
def losses(columns, code, result):
    """Twin of `ops.sweep._loss`, from code [LANES] to result [LANES].

    x * inverse, fused with the addition that rounds it to a multiple of the step, is on the same
    side of every midpoint of E2M1 as x / scale is, for all float32 x and E4M3 scales: tests/kernels
    enumerates the neighbours of all midpoints. On a midpoint the errors on both sides are equal.
    """
    for b in range(LANES):
        scale = e4m3_value(code[b])
        inverse = f32(1.0) / scale
        total = f32(0.0)
        for i in range(BLOCK):
            x = columns[i * LANES + b]
            # 2**22 * 2**e: adding and subtracting it rounds to multiples of 2**(e - 1).
            y = x * (inverse * f32(4194304.0))
            y = y if y > f32(4194304.0) else f32(4194304.0)
            shift = float_of(i32(bits_of(y) & 0x7F800000))
            rounded = fma(x, inverse, shift) - shift
            rounded = rounded if rounded < f32(6.0) else f32(6.0)
            error = fma(rounded, -scale, x)  # the product is exact: fusing changes nothing
            total += columns[(BLOCK + i) * LANES + b] * (error * error)
        result[b] = total


@_compiled
def keep_better(code, loss, best, best_loss):
    """Take codes of less loss; a tie stays."""
    for b in range(LANES):
        better = loss[b] < best_loss[b]
        best[b] = code[b] if better else best[b]
        best_loss[b] = loss[b] if better else best_loss[b]


@_compiled
def sweep(columns, low, high, steps, last, best):
    """Twin of `ops.sweep.sweep_window`, from low and high [LANES] to best [LANES]."""
    code, loss, best_loss = np.empty(LANES, i32), np.empty(LANES, f32), np.empty(LANES, f32)
    for b in range(LANES):
        low[b] = min(max(low[b], i32(1)), i32(126))
        high[b] = min(max(high[b], i32(1)), i32(126))
        best[b] = low[b]
        best_loss[b] = f32(np.inf)
    for step in range(steps + 1):
        for b in range(LANES):
            here, top = i32(low[b] + step), high[b]
            here = i32(((top - 1) | 1) + 2 * (here - top)) if here > top else here
            code[b] = min(here, max(top, i32(last)))
        losses(columns, code, loss)
        keep_better(code, loss, best, best_loss)


@_compiled
def sweep_exact(columns, best):
    """Twin of `ops.sweep._sweep_exact`; best [LANES] holds the AbsMax codes at first."""
    code, loss, best_loss = np.empty(LANES, i32), np.empty(LANES, f32), np.empty(LANES, f32)
    alive, count = np.empty(LANES, i32), LANES
    for b in range(LANES):
        code[b] = best[b] = min(max(i32(best[b] + UP_MAX), i32(LAST_ODD)), i32(126))
        best_loss[b] = f32(np.inf)
        alive[b] = 1
    while count > 0:
        losses(columns, code, loss)
        count = 0
        for b in range(LANES):
            better = alive[b] != 0 and loss[b] <= best_loss[b]
            best[b] = code[b] if better else best[b]
            best_loss[b] = loss[b] if better else best_loss[b]
            limit = f32(6.0) * e4m3_value(code[b])
            cost = f32(0.0)
            for i in range(BLOCK):
                clipped = columns[i * LANES + b] - limit
                clipped = f32(0.0) if clipped < f32(0.0) else clipped
                cost += columns[(BLOCK + i) * LANES + b] * (clipped * clipped)
            alive[b] = alive[b] if code[b] > 1 and cost <= best_loss[b] else i32(0)
            count += alive[b]
            code[b] = max(i32(code[b] - 1), i32(1))


@_compiled
def choose(columns, mode, low, high, weighted, best):
    """Write the code of every block's scale to best [LANES]."""
    largest = np.empty(LANES, f32)
    largest_of(columns, largest)
    for b in range(LANES):
        best[b] = e4m3_nearest(largest[b] / f32(6.0))
    if mode == FOUR_OVER_SIX:
        four, loss, best_loss = np.empty(LANES, i32), np.empty(LANES, f32), np.empty(LANES, f32)
        for b in range(LANES):
            four[b] = e4m3_nearest(largest[b] / f32(4.0))
        losses(columns, best, best_loss)
        losses(columns, four, loss)
        keep_better(four, loss, best, best_loss)
    elif mode == EXACT:
        sweep_exact(columns, best)
    elif mode in (BOUNDED, FIXED):
        lowest, highest, steps = np.empty(LANES, i32), np.empty(LANES, i32), high - low
        last = 0 if mode == FIXED else LAST_ODD
        for b in range(LANES):
            if mode == BOUNDED:
                low, high = -DOWN_WEIGHTED if weighted else -DOWN[best[b]], UP[best[b]]
                # Where the window ends below LAST_ODD, odd codes follow.
                most = UP_MAX + (DOWN_WEIGHTED if weighted else DOWN_MAX)
                steps = max(steps, most if best[b] + high < LAST_ODD else high - low)
            lowest[b], highest[b] = best[b] + low, best[b] + high
        sweep(columns, lowest, highest, steps, last, best)


@_compiled
def write_codes(raw, magnitude, code, words):
    """Write blocks of 16 codes, each as two uint32, to words [2 * LANES]; one zero."""
    for half in range(2):
        for b in range(LANES):
            scale = e4m3_value(code[b])
            word = np.uint32(0)
            for i in range(8):
                at = (8 * half + i) * LANES + b
                index = np.uint32(e2m1_index(magnitude[at] / scale))
                sign = np.uint32(bits_of(raw[at])) >> np.uint32(31)
                sign = sign if index > 0 else np.uint32(0)
                word |= (index | (sign << np.uint32(3))) << np.uint32(4 * i)
            words[2 * b + half] = word


@_compiled
def write_values(raw, magnitude, code, values):
    """Write blocks of 16 values in bfloat16 to values [LANES * 16] uint16; no negative zero."""
    for b in range(LANES):
        scale = e4m3_value(code[b])
        for i in range(BLOCK):
            x = raw[i * LANES + b]
            value = e2m1_value(e2m1_index(magnitude[i * LANES + b] / scale)) * scale
            value = (-value if x < f32(0.0) else value) + f32(0.0)
            value = value if x == x else f32(np.nan)
            values[b * BLOCK + i] = np.uint16(bits_of(value) >> 16)


@_compiled
def quantize(x, kind, tensor_scale, importance, mode, low, high, encode, result, scale, begin, end):
    """Quantize some of the blocks.

    Args:
        x: [blocks * 16] floats of this kind, as bytes.
        kind: FLOAT32, BFLOAT16 or FLOAT16.
        tensor_scale: float32.
        importance: [period * 16] float32, as bytes; none means 1.
        mode: ABSMAX, FOUR_OVER_SIX, BOUNDED, EXACT or FIXED.
        low: of the window, where mode is FIXED.
        high: likewise.
        encode: whether to write codes and scales, not values.
        result: [blocks * 8] bytes of codes, or [blocks * 16] bfloat16 as bytes.
        scale: [blocks] bytes; not used for values.
        begin: the first block.
        end: the last block + 1.
    """
    raw, columns = np.empty(BLOCK * LANES, f32), np.empty(2 * BLOCK * LANES, f32)
    for j in range(BLOCK * LANES):
        raw[j], columns[BLOCK * LANES + j] = f32(0.0), f32(1.0)
    magnitude, weight = columns[: BLOCK * LANES], columns[BLOCK * LANES :]
    largest = np.empty(LANES, f32)
    words, values = np.empty(2 * LANES, np.uint32), np.empty(BLOCK * LANES, np.uint16)
    code = np.empty(LANES, i32)
    packed, rounded = result.view(np.uint32), result.view(np.uint16)
    period = importance.size // (4 * BLOCK)
    for start in range(begin, end, LANES):
        count = min(LANES, end - start)
        load(x, kind, start, count, raw)
        for j in range(BLOCK * LANES):
            ratio = abs(raw[j]) / tensor_scale
            magnitude[j] = FAR if ratio > FAR else ratio
        done = 0
        while period and done < count:
            first = (start + done) % period
            some = min(count - done, period - first)
            load(importance, FLOAT32, first, some, weight[done:])
            done += some
        if period:
            normalize(weight, largest)
        choose(columns, mode, low, high, period > 0, code)
        if encode:
            write_codes(raw, magnitude, code, words)
            for b in range(count):
                scale[start + b] = code[b]
            for j in range(2 * count):
                packed[2 * start + j] = words[j]
        else:
            write_values(raw, magnitude, code, values)
            for j in range(BLOCK * count):
                rounded[BLOCK * start + j] = values[j]


@_compiled
def look_up(packed, scale, table, result, begin, end):
    """Write the values of blocks begin...end - 1, of [blocks * 8] bytes of codes, to result.

    table [256 * 16] has the value of every code at every scale, of the type of result.
    """
    for block in range(begin, end):
        row = BLOCK * np.int64(scale[block])
        for j in range(8):
            pair = np.int64(packed[8 * block + j])
            result[BLOCK * block + 2 * j] = table[row + (pair & 15)]
            result[BLOCK * block + 2 * j + 1] = table[row + (pair >> 4)]
