"""Rounding errors by themselves: a sweep hardly sees an element on the wrong side of a midpoint."""

import pytest
import torch

from scalesweep_hf.ops import e2m1, e4m3

pytest.importorskip("triton", reason="triton is not installed")

import triton
import triton.language as tl

from scalesweep_hf.kernels.numbers import (
    MAGNITUDE,
    code_scale,
    decode,
    error_near,
    invert,
    invert_near,
    rounding_error,
)


@triton.jit  # type: ignore[untyped-decorator]
def errors(  # type: ignore[no-untyped-def]
    x_ptr,
    code_ptr,
    result_ptr,
    near: tl.constexpr,
    clips: tl.constexpr,
    count: tl.constexpr,
):
    at = tl.arange(0, count)
    x, code = tl.load(x_ptr + at), tl.load(code_ptr + at)
    if near:
        scale = code_scale(code)
        one = tl.full((count,), 1, tl.int32)
        error = error_near(x * MAGNITUDE, scale, invert_near(scale), one, clips) / MAGNITUDE
    else:
        error = rounding_error(x, decode(code), invert(decode(code)))
    tl.store(result_ptr + at, error)


@pytest.mark.parametrize(("near", "clips"), [(False, True), (True, True), (True, False)])
def test_every_element_errs_as_the_definition_says(near: bool, clips: bool, device: str) -> None:
    codes = torch.arange(1, 127, dtype=torch.uint8)
    scale = e4m3.decode(codes)[:, None]
    ties = torch.tensor([*e2m1.MIDPOINTS, *e2m1.MAGNITUDES[1:], 0.1, 6.999]) * scale  # [126, 16]
    near_ties = [torch.nextafter(ties, torch.tensor(end)) for end in (0.0, torch.inf)]
    x = torch.stack([ties, *near_ties, ties * 1.9 if clips else ties * 0.9])
    x = x.flatten()  # [4 * 126 * 16]
    count = 1 << 13
    filled = torch.zeros(count)
    filled[: len(x)] = x
    every = torch.ones(count, dtype=torch.int32)
    every[: len(x)] = codes.int().repeat_interleave(16).repeat(4)
    found = torch.empty(count, device=device)
    errors[(1,)](
        filled.to(device), every.to(device), found, near, clips, count, enable_fp_fusion=False
    )
    scale = e4m3.decode(every.to(torch.uint8))
    expected = filled - e2m1.round_magnitude(filled / scale) * scale
    assert torch.equal(found.cpu().abs(), expected.abs())
