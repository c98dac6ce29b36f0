"""E2M1 by the conversion instructions that Blackwell GPUs have, in place of float32 arithmetic.

Compiled ahead of time in tests/kernels/test_blackwell.py, but never run and never timed: we had no
such GPU. So kernels take these functions only where `agrees` has found, on the device itself, that
they give what emulation gives.

Why the bits are the same: both are given `numbers.quotient`, which equals a midpoint of E2M1 where
x / scale does and lies on its side elsewhere. The instruction rounds to nearest, ties to even codes
(PTX ISA, cvt.rn), as `ops.e2m1` does, and saturates at 6. It keeps the sign of a zero and makes NaN
6, so callers clear and restore these.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from scalesweep_hf.ops import e2m1
from scalesweep_hf.ops.sweep import BLOCK

Launch = Callable[..., Any]
_CONVERTS: dict[torch.device, bool] = {}  # by device, once known


@triton.jit
def round_eight(y):
    """Return a tuple of 8 [ROWS] float32 as E2M1 codes in [ROWS] uint32, the first lowest."""
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
        [y[0], y[1], y[2], y[3], y[4], y[5], y[6], y[7]],
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


def converts(device: torch.device, launch: Launch) -> bool:
    """Whether to round to E2M1 by a device's instructions: it has them, and they agree.

    Args:
        device: where kernels are to run.
        launch: as `agrees` takes it.
    """
    if device not in _CONVERTS:
        if device.type == "cpu" or torch.cuda.get_device_capability(device)[0] not in (10, 12):
            _CONVERTS[device] = False
        elif torch.cuda.is_current_stream_capturing():
            return False  # nothing can be compared now
        else:
            _CONVERTS[device] = agrees(device, launch)
    return _CONVERTS[device]


def agrees(device: torch.device, launch: Launch) -> bool:
    """Compare both roundings on every midpoint of E2M1, its neighbours and all scales' mantissas.

    Args:
        device: one that has the instructions.
        launch: quantizes; see `scalesweep_hf.kernels.operators.Kernels`, with one more argument,
            whether to use them.

    Returns:
        Whether codes and values are the same; if not, or if the kernel fails, after a warning.
    """
    probes = neighbours_of_midpoints().to(device)
    one = torch.ones((), device=device)
    results = []
    try:
        for fp4 in (False, True):
            packed = probes.new_empty((len(probes), BLOCK // 2), dtype=torch.uint8)
            codes = probes.new_empty(len(probes), dtype=torch.uint8)
            values = torch.empty_like(probes, dtype=torch.bfloat16)
            launch(probes, one, None, "absmax", "bounded", 0, 0, packed, codes, fp4)
            launch(probes, one, None, "absmax", "bounded", 0, 0, values, None, fp4)
            results.append((packed, codes, values.view(torch.uint8)))
        same = all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        problem = "gave other codes"
    except Exception as error:  # noqa: BLE001 - compilers and drivers raise what they like
        same, problem = False, f"failed ({error})"
    if not same:
        warnings.warn(
            f"the E2M1 conversion of {device} {problem}: quantizing goes on with emulated rounding "
            "and the same bits, slower; please report the device and the versions of its driver "
            "and of triton",
            stacklevel=2,
        )
    return same


def neighbours_of_midpoints() -> Tensor:
    """Return blocks [B, 16] float32: 6 s, midpoints of E2M1 times s, and their neighbours.

    Scales s have all eight mantissas and are chosen by AbsMax with a tensor scale of one.
    """
    scales = torch.arange(8, 16) / 8.0
    ties = torch.tensor(e2m1.MIDPOINTS) * scales[:, None]  # [8, 7]
    below, above = (torch.nextafter(ties, torch.tensor(end)) for end in (0.0, torch.inf))
    near = torch.stack([below, ties, above])  # [3, 8, 7]
    blocks = torch.zeros(3, 8, BLOCK)
    blocks[..., 0] = 6.0 * scales
    blocks[..., 1:8] = near
    blocks[..., 8:15] = -near
    return blocks.flatten(0, 1)
