import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from scalesweep_hf.ops import e4m3
from scalesweep_hf.ops.oracle import nearest_codes, optimal_scales
from scalesweep_hf.ops.sweep import block_loss, sweep_scales


def random_blocks(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randn(n, 16, generator=generator).exp()
    x = torch.randn(n, 16, generator=generator) * spread * 100
    return x, torch.rand(n, 16, generator=generator)


@pytest.mark.parametrize("weighted", [False, True])
def test_no_scale_on_a_fine_grid_beats_the_optimum(weighted: bool) -> None:
    x, weight = random_blocks(200)
    w = weight if weighted else None
    optimum = optimal_scales(x, w)
    best = torch.full((200,), torch.inf)
    for factor in torch.linspace(0.02, 2.0, 2000).tolist():
        scale = x.abs().amax(-1) / 6 * factor
        best = torch.minimum(best, block_loss(x, scale, w))
    assert (optimum.loss <= best * (1 + 1e-5)).all()
    assert (best <= optimum.loss * 1.01).float().mean() > 0.95  # and the grid comes close


@pytest.mark.parametrize("weighted", [False, True])
def test_the_loss_is_the_loss_of_the_scale(weighted: bool) -> None:
    x, weight = random_blocks(500)
    w = weight if weighted else None
    optimum = optimal_scales(x, w)
    torch.testing.assert_close(block_loss(x, optimum.scale, w), optimum.loss, rtol=1e-4, atol=0)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_sweep_lies_between_the_oracle_and_its_neighbours(weighted: bool) -> None:
    x, weight = random_blocks(500)
    w = weight if weighted else None
    optimum = optimal_scales(x, w)
    swept = block_loss(x, e4m3.decode(sweep_scales(x, w, window="exact").codes), w)
    rounded = nearest_codes(x, optimum.scale, w)
    assert (optimum.loss <= swept * (1 + 1e-5)).all()
    assert (swept <= rounded.loss).all()
    assert torch.equal(rounded.loss, block_loss(x, e4m3.decode(rounded.codes), w))


def test_neighbours_enclose_the_scale() -> None:
    x, _ = random_blocks(500)
    scale = optimal_scales(x).scale
    chosen = e4m3.decode(nearest_codes(x, scale).codes)
    inside = (scale > 2**-6) & (scale < e4m3.MAX)
    assert ((chosen / scale - 1).abs() <= 0.125)[inside].all()


def test_a_block_on_a_scaled_grid_has_no_loss() -> None:
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6] * 2)
    signs = torch.tensor([1.0, -1.0]).repeat(8)
    result = optimal_scales((grid * signs * 0.37).unsqueeze(0))
    torch.testing.assert_close(result.scale, torch.tensor([0.37]))
    assert result.loss.item() < 1e-12


def test_a_zero_block_costs_nothing() -> None:
    result = optimal_scales(torch.zeros(2, 16))
    assert torch.equal(result.loss, torch.zeros(2))
    assert (nearest_codes(torch.zeros(2, 16), result.scale).codes == 1).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(-8, 8), st.integers(0, 1000))
def test_doubling_the_block_doubles_the_scale(power: int, seed: int) -> None:
    x, weight = random_blocks(4, seed)
    base = optimal_scales(x, weight)
    moved = optimal_scales(x * 2.0**power, weight)
    assert torch.equal(moved.scale, base.scale * 2.0**power)


def test_other_block_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \[2, 8\]; expected \[..., G, 16\]"):
        optimal_scales(torch.ones(2, 8))
