"""Triton's attention follows the definition, interpreted or on a GPU."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from scalesweep_hf.ops.attention import ATTENTION, attend_packed
from scalesweep_hf.ops.kv import StateCodec

pytest.importorskip("triton", reason="triton is not installed")
from scalesweep_hf.kernels import attention

# Interpreted kernels are numpy, which warns of NaN and overflow.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

SCALING = 0.2
needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def packed(batch: int, heads: int, tokens: int, dim: int, device: str) -> tuple[Tensor, ...]:
    """Return packed keys and values and their tensor scales."""
    keys, values = torch.randn(2, batch, heads, tokens, dim)
    scales = torch.tensor(0.0123), torch.tensor(0.003)
    rows = (StateCodec(s, "mse").pack(x) for s, x in zip(scales, (keys * 2, values), strict=True))
    return *(x.to(device) for x in rows), *(s.to(device) for s in scales)


def check(query: Tensor, rows: tuple[Tensor, ...], **options: Any) -> None:
    """Compare with the definition in float32.

    Each weight is rounded to float16, by 2**-11 of itself at most: so the error is at most 2**-11
    of the weighted mean of |v|, plus what rounding the result takes.
    """
    actual = attend_packed(query, *rows, scaling=SCALING, backend="triton", **options)
    assert actual.dtype == query.dtype
    exact = attend_packed(query.float(), *rows, scaling=SCALING, **options)
    magnitudes = rows[1].clone()
    magnitudes[..., : query.shape[-1] // 2] &= 0x77  # without signs
    size = attend_packed(query.float(), rows[0], magnitudes, *rows[2:], scaling=SCALING, **options)
    # Triton's interpreter truncates to bfloat16.
    rounding = 2.0**-11 if query.dtype == torch.float16 else 2.0**-7
    bound = (2.0**-11 + 1e-5) * size + rounding * exact.abs() + 1e-7
    assert ((actual.float() - exact).abs() <= bound).all()
    assert torch.isfinite(actual).all()


def queries(batch: int, heads: int, t: int, dim: int, device: str) -> Tensor:
    return torch.randn(batch, heads, t, dim).to(device, torch.float16)


@pytest.mark.parametrize("group", [1, 4, 8])
@pytest.mark.parametrize("tokens", [1, 15, 63, 64, 65, 1000])
def test_any_number_of_tokens_and_heads(tokens: int, group: int, device: str) -> None:
    rows = packed(2, 2, tokens, 128, device)
    check(queries(2, 2 * group, 1, 128, device), rows)


def test_rows_are_padded_to_what_triton_multiplies(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "LEAST_ROWS", 16)
    rows = packed(2, 2, 300, 64, device)
    check(queries(2, 2, 1, 64, device), rows)
    check(queries(2, 8, 3, 64, device), rows, mask=left_padding(300, device))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [64, 80, 96, 112, 256])
def test_any_head_dim(dim: int, dtype: torch.dtype, device: str) -> None:
    check(queries(1, 4, 1, dim, device).to(dtype), packed(1, 2, 70, dim, device))


def left_padding(tokens: int, device: str) -> Tensor:
    """Return a mask [2, 1, 1, S] that hides the first tokens of the second row, a tile and more."""
    mask = torch.ones(2, 1, 1, tokens, dtype=torch.bool, device=device)
    mask[1, ..., : tokens // 2 + 3] = False
    return mask


@pytest.mark.parametrize("t", [1, 3])
@pytest.mark.parametrize("kind", ["padding", "added", "per head", "lowest"])
def test_masks(kind: str, t: int, device: str) -> None:
    mask: Tensor = left_padding(100, device)
    if kind == "added":
        mask = torch.randn(2, 1, t, 100, device=device)
    elif kind == "per head":
        mask = torch.rand(2, 4, t, 100, device=device) > 0.3
    elif kind == "lowest":
        lowest = torch.finfo(torch.float16).min
        mask = torch.where(mask, 0.0, lowest).to(torch.float16)
    check(queries(2, 4, t, 64, device), packed(2, 2, 100, 64, device), mask=mask)


def test_queries_that_see_nothing_get_zeros(device: str) -> None:
    mask = torch.zeros(2, 1, 1, 300, dtype=torch.bool, device=device)
    mask[0] = True
    query, rows = queries(2, 4, 1, 64, device), packed(2, 1, 300, 64, device)
    check(query, rows, mask=mask)
    result = attend_packed(query, *rows, scaling=SCALING, mask=mask, backend="triton")
    assert not result[1].any()


@pytest.mark.parametrize("length", [1, 31, 32, 33, 299])
def test_nothing_beyond_the_length_is_read(length: int, device: str) -> None:
    rows = packed(1, 2, 300, 128, device)
    for x in rows[:2]:
        x[:, :, length:] = 255
    query = queries(1, 8, 1, 128, device)
    check(query, rows, length=torch.tensor(length, device=device))
    mask = torch.ones(1, 1, 1, 300, dtype=torch.bool, device=device)
    mask[..., length:] = False
    check(query, rows, length=torch.tensor(length, device=device), mask=mask)


@pytest.mark.parametrize("dim", [64, 128])
def test_strided_and_unaligned_rows_are_read_as_they_are_seen(dim: int, device: str) -> None:
    keys, values, *scales = packed(2, 2, 40, dim, device)
    by_token = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (keys, values))
    padded = (torch.cat((x, x), dim=-1)[..., : x.shape[-1]] for x in (keys, values))
    sliced = (torch.cat((x, x), dim=2)[:, :, 7:47] for x in (keys, values))
    shifted = (torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape) for x in (keys, values))
    query = queries(2, 4, 1, dim, device)
    transposed = query.transpose(2, 3).contiguous().transpose(2, 3)
    for x in (by_token, padded, sliced, shifted):
        check(transposed, (*x, *scales))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("factor", [0.0, 2.0**-20, 2.0**12])
def test_small_and_large_queries_and_scores(factor: float, dtype: torch.dtype, device: str) -> None:
    query = (queries(1, 2, 1, 64, device) * factor).to(dtype)
    check(query, packed(1, 1, 65, 64, device))


def test_every_code_with_every_scale_is_decoded(device: str) -> None:
    """A single token has all the weight: the result is its value, which float16 holds."""
    scales = torch.arange(1, 127, 1 if device == "cuda" else 5, dtype=torch.uint8)
    codes = torch.arange(256, dtype=torch.uint8).reshape(1, 2, 128).expand(len(scales), 2, 128)
    scale = scales.reshape(-1, 1, 1).expand(-1, 2, 16)
    rows = torch.cat((codes, scale), dim=-1).reshape(1, -1, 1, 144).to(device)
    one = torch.ones((), device=device)
    query = torch.zeros(1, rows.shape[1], 1, 256, dtype=torch.float16, device=device)
    expected = attend_packed(query, rows, rows, one, one, scaling=1.0)
    assert len(expected.unique()) > len(scales)
    actual = attend_packed(query, rows, rows, one, one, scaling=1.0, backend="triton")
    assert torch.equal(actual, expected)


def test_what_the_kernel_does_not_take_follows_the_definition(device: str) -> None:
    rows = packed(1, 1, 20, 64, device)
    query = torch.randn(1, 2, 1, 64, device=device)
    assert not ATTENTION["triton"].pays(query, rows[0])
    expected = attend_packed(query, *rows, scaling=SCALING)
    assert torch.equal(attend_packed(query, *rows, scaling=SCALING, backend="triton"), expected)
    many = queries(1, 8, 5, 64, device)
    assert not ATTENTION["triton"].pays(many, rows[0])
    narrow = queries(1, 2, 1, 32, device)
    assert not ATTENTION["triton"].pays(narrow, packed(1, 1, 20, 32, device)[0])
    learning = queries(1, 2, 1, 64, device).requires_grad_()
    assert not ATTENTION["triton"].pays(learning, rows[0])
    attend_packed(learning, *rows, scaling=SCALING, backend="triton").sum().backward()
    assert learning.grad is not None
    assert ATTENTION["triton"].pays(learning.detach(), rows[0])
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = torch.empty(1, 2, 1, 64, dtype=torch.float16, device=device)
        assert not ATTENTION["triton"].pays(fake, rows[0])


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
def test_graphs_hold_the_kernel_as_an_operator(device: str) -> None:
    rows = packed(2, 2, 100, 64, device)
    query = queries(2, 4, 1, 64, device)
    length = torch.tensor(70, device=device)
    arguments = (query, *rows, SCALING, left_padding(100, device), length)
    torch.library.opcheck(attention._operator, arguments)

    def step(q: Tensor, length: Tensor) -> Tensor:
        return attend_packed(q, *rows, scaling=SCALING, length=length, backend="triton") * 2

    torch.compiler.reset()
    compiled: Any = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(query, length), step(query, length))


def test_splits_fill_the_device_and_follow_from_shapes() -> None:
    programs = attention.PROGRAMS * 132
    assert attention.count_splits(64, 32768, 132) == programs // 64
    assert attention.count_splits(8, 1 << 20, 132) == programs // 8
    assert attention.count_splits(8, 32768, 132) == 32768 // attention.LEAST_OF_MANY
    assert attention.count_splits(8, 1025, 132) == -(-1025 // attention.LEAST)
    assert attention.count_splits(4096, 32768, 132) == 1
    assert attention.count_splits(1, 1, 132) == 1


class TestOnGPU:
    pytestmark = needs_gpu

    def test_cuda_graphs_replay_with_another_length(self) -> None:
        rows = packed(2, 2, 3000, 128, "cuda")
        query = queries(2, 8, 1, 128, "cuda")
        length = torch.tensor(1, device="cuda")
        options: dict[str, Any] = {"scaling": SCALING, "length": length, "backend": "triton"}
        attend_packed(query, *rows, **options)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = attend_packed(query, *rows, **options)
        for n in (1, 17, 1000, 3000):
            length.fill_(n)
            graph.replay()
            assert torch.equal(result, attend_packed(query, *rows, **options))
            exact = attend_packed(query.float(), *rows, scaling=SCALING, length=length)
            torch.testing.assert_close(result.float(), exact, rtol=0, atol=5e-3)

    @pytest.mark.filterwarnings("ignore:Synchronization debug mode")
    def test_it_does_not_wait_for_the_device(self) -> None:
        rows = packed(2, 2, 300, 128, "cuda")
        query = queries(2, 8, 1, 128, "cuda")
        options: dict[str, Any] = {"scaling": SCALING, "length": torch.tensor(9, device="cuda")}
        attend_packed(query, *rows, **options, backend="triton")
        torch.cuda.set_sync_debug_mode("error")
        try:
            attend_packed(query, *rows, **options, backend="triton")
        finally:
            torch.cuda.set_sync_debug_mode("default")
