"""E2M1 by the conversion instructions that Blackwell GPUs have, in place of float32 arithmetic.

Compiled ahead of time in tests/kernels/test_blackwell.py, but never run and never timed: we had no
such GPU. Kernels take these functions only after `scalesweep_hf.kernels.blocks` has compared them
with the emulated ones on the device itself.

Why the bits are the same: both are given `numbers.quotient`, which equals a midpoint of E2M1 where
x / scale does and lies on its side elsewhere. The instruction rounds to nearest, ties to even codes
(PTX ISA, cvt.rn), as `ops.e2m1` does, and saturates at 6. It keeps the sign of a zero and makes NaN
6, so callers clear and restore these.
"""

import triton
import triton.language as tl


@triton.jit
def round_eight(a, b, c, d, e, f, g, h):
    """Return eight [ROWS] float32 as E2M1 codes, a in the lowest four bits of [ROWS] uint32."""
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b8 first, second, third, last;
        cvt.rn.satfinite.e2m1x2.f32 first, $2, $1;
        cvt.rn.satfinite.e2m1x2.f32 second, $4, $3;
        cvt.rn.satfinite.e2m1x2.f32 third, $6, $5;
        cvt.rn.satfinite.e2m1x2.f32 last, $8, $7;
        mov.b32 $0, {first, second, third, last};
        }
        """,
        "=r,f,f,f,f,f,f,f,f",
        [a, b, c, d, e, f, g, h],
        dtype=tl.uint32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def round_two(a, b):
    """Return two [ROWS] float32 rounded to E2M1, as float32."""
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b8 codes;
        .reg .b16 low, high;
        .reg .b32 both;
        cvt.rn.satfinite.e2m1x2.f32 codes, $3, $2;
        cvt.rn.f16x2.e2m1x2 both, codes;
        mov.b32 {low, high}, both;
        cvt.f32.f16 $0, low;
        cvt.f32.f16 $1, high;
        }
        """,
        "=f,=f,f,f",
        [a, b],
        dtype=(tl.float32, tl.float32),
        is_pure=True,
        pack=1,
    )
