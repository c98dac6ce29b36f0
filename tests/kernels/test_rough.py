"""The walk with rough losses: how rough they are, and that it settles nothing they cannot."""

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from scalesweep_hf.ops import blocks as definition
from scalesweep_hf.ops import e2m1, e4m3
from scalesweep_hf.ops.blocks import BACKENDS
from scalesweep_hf.ops.sweep import (
    DOWN_WEIGHTED,
    absmax_codes,
    block_loss,
    normalize_importance,
    sweep_scales,
)
from tests.kernels.test_blocks import ONE, same
from tests.ops.test_sweep import KINDS, RANGES, blocks, importances
from tests.proofs.exact import CODES, value

pytest.importorskip("triton", reason="triton is not installed")

import triton
import triton.language as tl

from scalesweep_hf.kernels import blocks as kernels
from scalesweep_hf.kernels.descent import FLOOR, clipping_cost, stopping_element
from scalesweep_hf.kernels.memory import load_blocks
from scalesweep_hf.kernels.numbers import INTERPRETED, MAGNITUDE, SCALE, code_scale, scale_below
from scalesweep_hf.kernels.rough import (
    CLIPPING,
    SURE,
    SURE_WEIGHTED,
    TOLERANCE,
    _loss_roughly,
)

# Interpreted kernels are numpy, which warns of NaN and overflow.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

ROUGH = 2.0**-17  # what a rough loss may differ by, relatively
UNIT = float(MAGNITUDE.value) ** 2


@triton.jit  # type: ignore[untyped-decorator]
def probe(  # type: ignore[no-untyped-def]
    x_ptr,
    w_ptr,
    base_ptr,
    code_ptr,
    loss_ptr,
    cost_ptr,
    weighted: tl.constexpr,
    rows: tl.constexpr,
):
    block = tl.program_id(0) * rows + tl.arange(0, rows)
    a = load_blocks(x_ptr, block, block >= 0)
    w = load_blocks(w_ptr, block, block >= 0)
    largest, heaviest = a[0], w[0]
    for i in tl.static_range(1, 16):
        largest = tl.maximum(largest, a[i])
        heaviest = tl.maximum(heaviest, w[i])
    floor = FLOOR * heaviest if weighted else tl.full(largest.shape, FLOOR, tl.float32)
    scale = code_scale(tl.load(code_ptr + block))
    loss = _loss_roughly(a, w, scale, weighted, True)
    tl.store(loss_ptr + block, loss.to(tl.float32, bitcast=True))
    base = tl.load(base_ptr + block)
    clipped, weight = stopping_element(a, w, largest, base, floor, weighted)
    tl.store(cost_ptr + block, clipping_cost(clipped, weight, scale, floor, weighted))


@triton.jit  # type: ignore[untyped-decorator]
def below(code_ptr, scale_ptr, below_ptr, count: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, count)
    scale = code_scale(tl.load(code_ptr + at))
    tl.store(scale_ptr + at, scale)
    tl.store(below_ptr + at, scale_below(scale))


def probed(x: Tensor, w: Tensor | None, code: Tensor, device: str) -> tuple[Tensor, Tensor]:
    """Return rough losses and costs of clipping [B], in units of the tensor scale."""
    rows = 64
    pad = -len(x) % rows
    filled = torch.nn.functional.pad(x.abs(), (0, 0, 0, pad), value=1.0)
    weight = torch.ones_like(filled)
    if w is not None:
        weight[: len(x)] = w
    base = absmax_codes(filled).int()
    every = torch.full((len(filled),), 56, dtype=torch.int32)
    every[: len(x)] = code.int()
    found = torch.empty(2, len(filled), device=device)
    a = filled * float(MAGNITUDE.value)
    operands = [t.contiguous().to(device) for t in (a, weight, base, every)]
    weighted = w is not None
    probe[(len(filled) // rows,)](*operands, *found, weighted, rows, enable_fp_fusion=False)
    loss, cost = found.cpu()[:, : len(x)].double() / UNIT
    return loss, cost


def near_midpoints() -> tuple[Tensor, Tensor]:
    """Return blocks [B, 16] of floats around midpoints, and the codes [B] whose grids these are."""
    code = torch.arange(1, 127).repeat_interleave(8)
    scale = e4m3.decode(code.to(torch.uint8))[:, None]
    generator = torch.Generator().manual_seed(8)
    midpoint = torch.tensor(e2m1.MIDPOINTS)[torch.randint(0, 7, (len(code), 16))]
    steps = torch.randint(-4, 5, midpoint.shape, generator=generator)
    x = midpoint * scale
    return (x.view(torch.int32) + steps.int()).view(torch.float32), code


@pytest.mark.parametrize("weighted", [False, True])
def test_rough_losses_are_near_those_of_the_definition(weighted: bool, device: str) -> None:
    x, code = near_midpoints()
    some = blocks("uniform", 25, 104, n=200)
    offsets = torch.arange(len(some)) % 11 - 4
    x, code = torch.cat([x, some]), torch.cat([code, absmax_codes(some).int() + offsets])
    w = torch.rand(x.shape, generator=torch.Generator().manual_seed(9)) ** 8 if weighted else None
    scale = e4m3.decode(code.to(torch.uint8))
    loss, _ = probed(x, w, code, device)
    expected = block_loss(x, scale, w).double()
    assert (expected > 0).all()
    assert ((loss - expected).abs() <= ROUGH * expected).all()


def test_rough_losses_bear_any_inverse_that_the_instruction_may_give() -> None:
    """Every midpoint, every mantissa of a scale, inverses 2**-23 off; quotients in their unit."""
    worst = 0.0
    midpoints = np.array(e2m1.MIDPOINTS, dtype=np.float32)
    grid = np.array(e2m1.MAGNITUDES)
    for mantissa in range(8, 16):
        scale = np.float32(mantissa * 2.0**113)
        tie = midpoints * np.float32(mantissa * 2.0**-13)  # of magnitudes, in their unit
        x = (tie.view(np.int32)[:, None] + np.arange(-40, 41)).astype(np.int32).view(np.float32)
        exact = x.astype(np.float64) / float(scale) * 2.0**126
        nearest = np.abs(exact[..., None] - grid).min(-1)
        for off in (-2, -1, 0, 1, 2):
            inverse = ((np.float32(1.0) / scale).view(np.int32) + np.int32(off)).view(np.float32)
            if abs(float(inverse) * float(scale) - 1) > 2.0**-23:
                continue
            bits = (x * inverse).view(np.int32)
            chosen = ((bits + 0x200000) & -0x400000).view(np.float32).astype(np.float64) * 2.0**126
            worst = max(worst, float((np.abs(exact - chosen) / nearest).max()))
    assert worst > 1
    assert worst**2 - 1 + 38 * 2.0**-24 < ROUGH
    assert float(TOLERANCE.value) > (1 + ROUGH) ** 2 * (1 + 31 * 2.0**-23) ** 2


def test_eight_steps_clip_nothing_and_ten_end_at_scales_within_any_window() -> None:
    scales = {code: value(code) for code in CODES} | {127: Fraction(480)}
    for first in range(15, 127):
        # A walk starts at the last scale up to max / 3.5, or at 15 where that is larger.
        most = Fraction(7, 2) * scales[first + 1]
        assert most <= 7 * scales[first - CLIPPING.value + 1]
        assert max(SURE.value, SURE_WEIGHTED.value) <= first
    # tests/kernels/test_descent.py: walks start at least five codes above AbsMax
    assert SURE_WEIGHTED.value - 1 - 5 <= DOWN_WEIGHTED


def test_the_code_below_is_the_next_scale(device: str) -> None:
    codes = torch.arange(1, 128, dtype=torch.int32)
    found = torch.empty(2, 128, device=device)
    below[(1,)](torch.nn.functional.pad(codes, (0, 1)).to(device), *found, 128)
    scales = found.cpu()[:, :126].double() / SCALE.value
    expected = e4m3.decode(torch.arange(0, 127, dtype=torch.uint8)).double()
    expected[0] = 0.0
    assert torch.equal(scales[0], expected[1:])
    assert torch.equal(scales[1], expected[:-1])


@pytest.mark.parametrize("weighted", [False, True])
def test_the_stopping_element_costs_less_than_the_block(weighted: bool, device: str) -> None:
    x = torch.cat([blocks(kind, *codes, n=12) for kind in KINDS for codes in RANGES[1:4]])
    w = importances(len(x))[torch.randperm(len(x), generator=torch.Generator().manual_seed(1))]
    w[::3] = 1.0
    w[(w == 0).all(1)] = 1.0  # what nothing weighs has no stopping element
    base = absmax_codes(x).int()
    tight = 0
    for down in range(10):
        code = (base - down).clamp(min=1)
        _, cost = probed(x, w if weighted else None, code, device)
        limit = 6 * e4m3.decode(code.to(torch.uint8))[:, None].double()
        beyond = (x.abs().double() - limit).clamp(min=0.0)
        clipping = (beyond**2 * (w.double() if weighted else 1.0)).sum(1)
        assert (cost <= clipping * (1 - 2.0**-13)).all()
        tight += int((cost > 0.98 * clipping).sum())
    assert tight > len(x)


def least_two(x: Tensor, w: Tensor | None) -> Tensor:
    """Return the least two losses [2, B] over all codes."""
    weight = None if w is None else normalize_importance(w)
    losses = [
        block_loss(x, e4m3.decode(torch.full((len(x),), code, dtype=torch.uint8)), weight)
        for code in range(1, 127)
    ]
    return torch.stack(losses).sort(0).values[:2]


def clear_blocks(weighted: bool) -> tuple[Tensor, Tensor | None]:
    """Return blocks whose best scale is much better than all others, zeros, and importances."""
    x = torch.cat([blocks(kind, 25, 104, n=80) for kind in ("normal", "uniform", "heavy")])
    w = None
    if weighted:
        w = (torch.rand(x.shape, generator=torch.Generator().manual_seed(2)) + 0.1) * 1e6
    best, second = least_two(x, w)
    clear = second > best * (1 + 2.0**-14)
    assert clear.float().mean() > 0.9
    x = x[clear]
    x[::9] = 0.0
    x[4, 7] = 2.0**-70  # smaller than what plain loops are for
    return x, None if w is None else w[clear]


def alone(x: Tensor) -> Tensor:
    """Repeat every block until programs have one kind: doubts about another hide what it gets."""
    return x.repeat_interleave(kernels.ROWS[False][0], 0)


def encoded(x: Tensor, w: Tensor | None, window: str, device: str) -> list[tuple[Tensor, ...]]:
    """Return codes and scales, from the kernels and from the definition."""
    options: dict[str, Any] = {"objective": "mse" if w is None else "wmse", "window": window}
    options["importance"] = None if w is None else w.to(device)
    arguments = x.to(device), ONE.to(device)
    return [m.encode_blocks(*arguments, **options) for m in (BACKENDS["triton"], definition)]


def agree(x: Tensor, w: Tensor | None, window: str, device: str) -> bool:
    found, expected = encoded(x, w, window, device)
    return same(found[0], expected[0]) and same(found[1], expected[1])


def counted(monkeypatch: pytest.MonkeyPatch, *names: str) -> list[str]:
    """Count calls from interpreted kernels in a list of names."""
    calls: list[str] = []

    def count(name: str) -> Callable[..., Any]:
        function = getattr(kernels, name)

        def call(*arguments: Any) -> Any:
            calls.append(name)
            return function(*arguments)

        return call

    for name in names:
        monkeypatch.setattr(kernels, name, count(name))
    return calls


@pytest.mark.parametrize("window", ["bounded", "exact"])
@pytest.mark.parametrize("weighted", [False, True])
def test_clear_blocks_need_no_second_walk(
    weighted: bool, window: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = counted(monkeypatch, "choose_near", "choose") if INTERPRETED else []
    assert agree(*clear_blocks(weighted), window, device)
    assert not calls


@pytest.mark.parametrize(
    ("x", "walk"),
    [
        (torch.full((1, 16), 96.0), ["choose_near"]),  # no loss at several scales
        (torch.tensor([[96.0, *[2.0**-70] * 15]]), ["choose"]),
    ],
)
def test_ties_are_left_to_walks_with_care(
    x: Tensor, walk: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not INTERPRETED:
        pytest.skip("calls of compiled kernels cannot be counted")
    calls = counted(monkeypatch, "choose_near", "choose")
    assert agree(x, None, "bounded", "cpu")
    assert calls == walk


def near_ties(weighted: bool, count: int) -> tuple[Tensor, Tensor | None]:
    """Return blocks [2 * count, 16] between which one float of an element decides on the scale."""
    generator = torch.Generator().manual_seed(10)
    x = torch.randn(count, 16, generator=generator).abs() * 40
    w = torch.rand(count, 16, generator=generator) if weighted else None
    own = None if w is None else w.unsqueeze(1)

    def best(x: Tensor) -> Tensor:
        return sweep_scales(x.unsqueeze(1), own).codes.squeeze(1)

    low, high = x.clone(), x.clone()
    low[:, 3], high[:, 3] = 1.0, 60.0
    at_low = best(low)
    for _ in range(32):
        middle = low.clone()
        bits = low[:, 3].view(torch.int32)
        bits = bits + (high[:, 3].view(torch.int32) - bits) // 2
        middle[:, 3] = bits.view(torch.float32)
        like_low = best(middle) == at_low
        low[like_low, 3] = middle[like_low, 3]
        high[~like_low, 3] = middle[~like_low, 3]
    assert (best(low) != best(high)).float().mean() > 0.5
    return torch.cat([low, high]), None if w is None else torch.cat([w, w])


@pytest.mark.parametrize("weighted", [False, True])
def test_near_ties_have_the_bits_of_the_definition(weighted: bool, device: str) -> None:
    x, w = near_ties(weighted, 200)
    best, second = least_two(x, w)
    near = (second <= best * (1 + 2.0**-20)) & (second > best)
    assert near.float().mean() > 0.3
    chosen = near.nonzero().flatten()[: None if device == "cuda" else 5]
    assert agree(alone(x[chosen]), None if w is None else alone(w[chosen]), "bounded", device)


@pytest.mark.parametrize("unit", [0.0, 1e-44, 1.0, 1e38])
def test_importances_of_any_unit_and_long_walks(unit: float, device: str) -> None:
    """One element counts, and the others hardly keep it from a scale far below theirs."""
    x, _ = clear_blocks(False)
    x = x[1 :: 1 if device == "cuda" else 110]
    x[:, 2] = x.abs().amax(1) / torch.linspace(20, 60, len(x))
    w = torch.full(x.shape, 1e-9)
    w[:, 2] = 1.0
    w[::3] = torch.rand(x[::3].shape, generator=torch.Generator().manual_seed(3))
    for window in ("bounded", "exact"):
        assert agree(alone(x), alone(w * unit), window, device)


@pytest.mark.parametrize("times", [8, 100])
def test_walks_end_with_the_window_or_at_the_optimum(times: int, device: str) -> None:
    """The largest element weighs nothing: the best scale is 24 codes down, or 50, more than 32."""
    x = blocks("normal", 25, 60, n=400 if device == "cuda" else 1)
    x[:, 0] = times * x.abs().amax(1)
    w = torch.ones_like(x)
    w[:, 0] = 0.0
    for window in ("bounded", "exact"):
        assert agree(alone(x), alone(w), window, device)
