"""The sweep against brute force over all 126 codes, in float32, written here in numpy."""

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from scalesweep_hf.ops import e4m3
from scalesweep_hf.ops.sweep import (
    SweepResult,
    Window,
    absmax_codes,
    block_loss,
    normalize_importance,
    sweep_scales,
)

Array = npt.NDArray[np.float32]

# Even codes first, so that the first least distance is the even one of a tie.
EVEN_FIRST = np.array([0.0, 1.0, 2.0, 4.0, 0.5, 1.5, 3.0, 6.0])
SCALES = np.array(
    [n * 2.0**-9 if n < 8 else (8 + n % 8) * 2.0 ** (n // 8 - 10) for n in range(127)],
    dtype=np.float32,
)


def rounded(x: Array) -> Array:
    distance = np.abs(np.minimum(x, 100.0).astype(np.float64)[..., None] - EVEN_FIRST)
    result: Array = EVEN_FIRST[distance.argmin(-1)].astype(np.float32)
    return result


def loss_of(x: Array, scale: Array, weight: Array | None = None) -> Array:
    """Eq. 2 in float32, term by term, left to right. x [B, 16], scale [B] or [1]."""
    total = np.zeros(len(x), dtype=np.float32)
    for i in range(16):
        magnitude = np.abs(x[:, i])
        error = magnitude - rounded(np.divide(magnitude, scale, dtype=np.float32)) * scale
        term = error * error
        total = total + (term if weight is None else weight[:, i] * term)
    return total


def brute_force(x: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the code of least loss among 1...126, the smaller code of a tie, and its loss."""
    w = None if weight is None else normalized(weight.numpy())
    losses = np.stack([loss_of(x.numpy(), SCALES[code : code + 1], w) for code in range(1, 127)])
    best = losses.argmin(0)  # the first of equals
    return torch.from_numpy(best + 1), torch.from_numpy(losses.min(0))


def normalized(weight: Array) -> Array:
    """Divide every block by a power of two; all zeros become ones."""
    largest = weight.max(-1, keepdims=True)
    _, exponent = np.frexp(largest.astype(np.float64))
    scaled = np.ldexp(weight.astype(np.float64), -exponent).astype(np.float32)
    result: Array = np.where(largest > 0, scaled, np.float32(1.0))
    return result


def swept(x: Tensor, weight: Tensor | None = None, window: Window = "bounded") -> SweepResult:
    importance = None if weight is None else weight.unsqueeze(1)
    result = sweep_scales(x.unsqueeze(1), importance, window=window)  # [B, 1, 16]
    return SweepResult(result.codes.squeeze(1), result.loss.squeeze(1))


def assert_optimal(result: SweepResult, x: Tensor, weight: Tensor | None = None) -> None:
    codes, loss = brute_force(x, weight)
    torch.testing.assert_close(result.codes.long(), codes, rtol=0, atol=0)
    torch.testing.assert_close(result.loss, loss, rtol=0, atol=0)


def shapes_of_blocks(n: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Blocks [n, 16] of several kinds, among them many zeros, near ties and exact grid points."""

    def uniform(*size: int) -> Tensor:
        return torch.rand(size, generator=generator)

    normal = torch.randn(n, 16, generator=generator)
    grid = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    points = grid[(8 * uniform(n, 16)).long().clamp(max=7)]
    return {
        "normal": normal,
        "uniform": uniform(n, 16),
        "heavy": normal * torch.exp(2 * torch.randn(n, 16, generator=generator)),
        "alike": 1 + 0.2 * uniform(n, 16),
        "two_values": torch.where(uniform(n, 16) < 0.5, uniform(n, 1), uniform(n, 1)),
        "few": torch.where(uniform(n, 16) < 0.2, normal, 0.0),
        "grid": points,
        "near_ties": points + 0.25 + (uniform(n, 16) - 0.5) * 1e-6,
    }


KINDS = ["normal", "uniform", "heavy", "alike", "two_values", "few", "grid", "near_ties"]


def blocks(kind: str, low: int, high: int, n: int = 1500) -> Tensor:
    """Blocks [n, 16] whose AbsMax code is uniform in low...high."""
    generator = torch.Generator().manual_seed(low + 1000 * KINDS.index(kind))
    x = shapes_of_blocks(n, generator)[kind]
    codes = torch.randint(low, high + 1, (n,), generator=generator)
    # Anywhere among the maxima that round to the code.
    target = torch.from_numpy(SCALES)[codes] * (1 + (torch.rand(n, generator=generator) - 0.5) / 9)
    x = x / x.abs().amax(-1, keepdim=True).clamp(min=1e-6) * (6 * target).unsqueeze(-1)
    q0 = absmax_codes(x)
    return x[(q0 >= low) & (q0 <= high)]


def importances(n: int) -> Tensor:
    """[n, 16], from even to extreme, with zeros; some blocks all zero."""
    generator = torch.Generator().manual_seed(3)
    spread = torch.linspace(0, 5, n).unsqueeze(-1)
    weight = torch.exp(spread * torch.randn(n, 16, generator=generator))
    weight = weight * (torch.rand(n, 16, generator=generator) < 0.8)
    weight[::17] = 0.0
    return weight


# Codes of the AbsMax scale: the bottom, where s / 2 of an odd s < 16 * 2**-9 is no E4M3 value and
# Lemma 4.1 says nothing about s; subnormal and normal ones; the top.
RANGES = [(1, 8), (9, 24), (25, 104), (105, 118), (119, 126)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("low", "high"), RANGES)
def test_bounded_mse_window_holds_the_optimum(low: int, high: int, kind: str) -> None:
    x = blocks(kind, low, high)
    assert len(x) > 500
    assert_optimal(swept(x), x)


@pytest.mark.parametrize(("low", "high"), RANGES)
@pytest.mark.parametrize("weighted", [False, True])
def test_exact_is_the_optimum_over_all_codes(low: int, high: int, weighted: bool) -> None:
    x = torch.cat([blocks(kind, low, high, 100) for kind in KINDS])
    weight = importances(len(x)) if weighted else None
    assert_optimal(swept(x, weight, "exact"), x, weight)


def test_bounded_mse_window_holds_the_optimum_of_small_blocks() -> None:
    x = torch.cat([blocks(kind, 1, 8) for kind in KINDS])
    assert_optimal(swept(x), x)


@pytest.mark.parametrize("window", ["bounded", "exact"])
def test_a_block_that_only_an_odd_small_scale_represents(window: Window) -> None:
    x = torch.full((1, 16), 5.5 * 2.0**-9)  # = 0.5 * (11 * 2**-9), and 5.5 * 2**-9 is not in E4M3
    result = swept(x, window=window)
    assert result.codes.tolist() == [11]
    assert result.loss.tolist() == [0.0]


def test_bounded_with_importance_is_eight_down_and_seven_up() -> None:
    x = torch.cat([blocks(kind, 9, 126, 200) for kind in KINDS])
    weight = importances(len(x))
    bounded, explicit = swept(x, weight), swept(x, weight, (-8, 7))
    assert torch.equal(bounded.codes, explicit.codes)
    assert torch.equal(bounded.loss, explicit.loss)


@pytest.mark.parametrize("weighted", [False, True])
def test_compiled_exact_has_the_codes_of_the_walk(
    weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.cat([blocks(kind, 9, 126, 100) for kind in KINDS])
    weight = importances(len(x)) if weighted else None
    walked = swept(x, weight, "exact")
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    tried_all = swept(x, weight, "exact")
    assert torch.equal(tried_all.codes, walked.codes)
    assert torch.equal(tried_all.loss, walked.loss)


def test_compiled_exact_has_the_codes_of_the_walk_for_small_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = torch.cat([blocks(kind, 1, 8, 100) for kind in KINDS])
    walked = swept(x, window="exact")
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert torch.equal(swept(x, window="exact").codes, walked.codes)


@pytest.mark.parametrize("window", [(0, 0), (-3, 7), (0, 7), (-16, 9), (-1, 0)])
@pytest.mark.parametrize("weighted", [False, True])
def test_explicit_window_holds_the_best_of_its_codes(
    window: tuple[int, int], weighted: bool
) -> None:
    x = torch.cat([blocks(kind, 1, 126, 40) for kind in KINDS])
    weight = importances(len(x)) if weighted else None
    w = None if weight is None else normalized(weight.numpy())
    q0 = absmax_codes(x).long()
    best = torch.zeros(len(x), dtype=torch.int64)
    least = torch.full((len(x),), torch.inf)
    for offset in range(window[0], window[1] + 1):
        code = (q0 + offset).clamp(1, 126)
        loss = torch.from_numpy(loss_of(x.numpy(), SCALES[code.numpy()], w))
        best, least = torch.where(loss < least, code, best), torch.minimum(loss, least)
    result = swept(x, weight, window)
    assert torch.equal(result.codes.long(), best)
    assert torch.equal(result.loss, least)


@pytest.mark.parametrize("window", ["bounded", "exact", (-8, 7)])
@pytest.mark.parametrize("weighted", [False, True])
def test_loss_is_that_of_the_chosen_code(window: Window, weighted: bool) -> None:
    x = torch.cat([blocks(kind, 1, 126, 40) for kind in KINDS])
    weight = importances(len(x)) if weighted else None
    result = swept(x, weight, window)
    importance = None if weight is None else normalize_importance(weight)
    # block_loss takes [..., G, 16]: here all blocks are one row.
    assert torch.equal(result.loss, block_loss(x, e4m3.decode(result.codes), importance))


@pytest.mark.parametrize("weighted", [False, True])
def test_block_loss_is_the_float32_sum_from_left_to_right(weighted: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([blocks(kind, 1, 126, 200) for kind in KINDS])
    code = torch.randint(1, 127, (len(x),), generator=generator)
    scale = SCALES[code.numpy()]
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    beside = (
        ties[torch.randint(0, 7, x.shape, generator=generator)] * torch.from_numpy(scale)[:, None]
    )
    for _ in range(3):  # up to three ulps off the tie, where x * (1 / s) rounds the other way
        beside = torch.nextafter(beside, beside + torch.randn(x.shape, generator=generator))
    x = torch.where(torch.rand(len(x), 1, generator=generator) < 0.5, x, beside)
    weight = importances(len(x)) if weighted else None
    expected = loss_of(x.numpy(), scale, None if weight is None else weight.numpy())
    loss = block_loss(x, torch.from_numpy(scale), weight)
    torch.testing.assert_close(loss, torch.from_numpy(expected), rtol=0, atol=0)
