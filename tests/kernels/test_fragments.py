"""Registers hold what the tensor cores take, interpreted or on a GPU."""

import pytest
import torch
from torch import Tensor

from scalesweep_hf.ops import e2m1

pytest.importorskip("triton", reason="triton is not installed")

import triton
import triton.language as tl

from scalesweep_hf.kernels import fragments

# Interpreted kernels are numpy, which warns of NaN and overflow.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

THREADS = 64
HALVES = {torch.bfloat16: 118, torch.float16: 6}  # the power of two in a factor


@triton.jit  # type: ignore[untyped-decorator]
def products(  # type: ignore[no-untyped-def]
    w_ptr, x_ptr, sums_ptr, threads: tl.constexpr, bfloat16: tl.constexpr
):
    at = tl.arange(0, threads)
    w0, w1 = tl.load(w_ptr + at), tl.load(w_ptr + threads + at)
    w2, w3 = tl.load(w_ptr + 2 * threads + at), tl.load(w_ptr + 3 * threads + at)
    x0, x1 = tl.load(x_ptr + at), tl.load(x_ptr + threads + at)
    s0, s1 = tl.load(sums_ptr + at), tl.load(sums_ptr + threads + at)
    s2, s3 = tl.load(sums_ptr + 2 * threads + at), tl.load(sums_ptr + 3 * threads + at)
    sums = fragments.multiply_add(w0, w1, w2, w3, x0, x1, (s0, s1, s2, s3), bfloat16)
    for i in tl.static_range(4):
        tl.store(sums_ptr + i * threads + at, sums[i])


@triton.jit  # type: ignore[untyped-decorator]
def decoded(  # type: ignore[no-untyped-def]
    word_ptr,
    codes_ptr,
    x_ptr,
    result_ptr,
    threads: tl.constexpr,
    bfloat16: tl.constexpr,
    converts: tl.constexpr,
):
    at = tl.program_id(0) * threads + tl.arange(0, threads)
    lower, upper = fragments.factors(tl.load(codes_ptr + at), bfloat16, converts)
    first = fragments.weights(tl.load(word_ptr + at), lower, bfloat16)
    second = fragments.weights(tl.load(word_ptr + at), upper, bfloat16)
    x0, x1 = tl.load(x_ptr + 4 * at), tl.load(x_ptr + 4 * at + 1)
    x2, x3 = tl.load(x_ptr + 4 * at + 2), tl.load(x_ptr + 4 * at + 3)
    x = fragments.eight((x0, x1, x2, x3))
    for i in tl.static_range(4):
        tl.store(result_ptr + 12 * at + i, first[i])
        tl.store(result_ptr + 12 * at + 4 + i, second[i])
        tl.store(result_ptr + 12 * at + 8 + i, x[i])


def in_pairs(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32)


@pytest.mark.parametrize("dtype", HALVES)
def test_a_product_is_that_of_the_rows_and_tokens_that_threads_hold(
    dtype: torch.dtype, device: str
) -> None:
    w = torch.randint(-8, 9, (THREADS // 32, 16, 16)).to(dtype)  # [warps, rows, k]
    x = torch.randint(-8, 9, (THREADS // 32, 8, 16)).to(dtype)  # [warps, tokens, k]
    start = torch.randint(-8, 9, (THREADS // 32, 16, 8)).float()  # [warps, rows, tokens]
    a = in_pairs(w).reshape(-1, 2, 8, 2, 4).permute(3, 1, 0, 2, 4)  # [pairs, rows, warp, g, t]
    b = in_pairs(x).reshape(-1, 8, 2, 4).permute(2, 0, 1, 3)
    sums = start.reshape(-1, 2, 8, 4, 2).permute(1, 4, 0, 2, 3).contiguous().to(device)
    arguments = a.contiguous().to(device), b.contiguous().to(device), sums
    products[(1,)](*arguments, THREADS, dtype == torch.bfloat16, num_warps=THREADS // 32)
    found = sums.cpu().permute(2, 0, 3, 4, 1).reshape(-1, 16, 8)
    assert torch.equal(found, start + w.float() @ x.float().mT)


@pytest.mark.parametrize("dtype", HALVES)
def test_all_codes_in_all_places_times_all_scales(dtype: torch.dtype, device: str) -> None:
    count = 1 << 13
    word = torch.randint(-(2**31), 2**31, (count,)).int()
    scale = torch.arange(count).remainder(256) | torch.randint(0, 256, (count,)) << 8
    junk = torch.randint(0, 1 << 15, (count,)) << 16
    x = torch.randn(count, 8).to(dtype)
    result = torch.empty(count, 12, dtype=torch.int32, device=device)
    converts = device == "cuda" and torch.cuda.get_device_capability() >= (8, 9)
    arguments = word.to(device), (scale | junk).int().to(device), in_pairs(x).to(device), result
    decoded[(4,)](*arguments, count // 4, dtype == torch.bfloat16, converts)
    found = result.cpu().view(dtype).reshape(count, 3, 4, 2).mT  # [.., lower or upper half, 4]
    values = e2m1.decode((word[:, None] >> (4 * torch.arange(8)) & 15).to(torch.uint8))  # [.., 8]
    for block in range(2):
        code = (scale >> (8 * block) & 255).to(torch.uint8)
        expected = values * code.view(torch.float8_e4m3fn).float()[:, None] / 256
        expected = expected.to(dtype).reshape(count, 2, 4)
        assert torch.equal(found[:, block].nan_to_num(9999.0), expected.nan_to_num(9999.0))
    assert torch.equal(found[:, 2], x.reshape(count, 2, 4))
