import pytest
import torch
from torch import Tensor

from scalesweep_hf.ops import e2m1, e4m3
from scalesweep_hf.ops.local_hessian import normalize_local_hessian, sweep_local_hessian
from scalesweep_hf.ops.sweep import Window, sweep_scales


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gram(blocks: int, seed: int = 1) -> Tensor:
    mix = torch.eye(16) + 0.3 * normal(blocks, 16, 16, seed=seed)
    rows = normal(blocks, 64, 16, seed=seed + 1) @ mix  # [G, T, 16], channels coupled
    return rows.mT @ rows


def exact_loss(x: Tensor, hessian: Tensor, scale: Tensor) -> Tensor:
    error = x.double() - (e2m1.round_to_e2m1(x / scale[..., None]) * scale[..., None]).double()
    return torch.einsum("...gi,gij,...gj->...g", error, hessian.double(), error)


@pytest.mark.parametrize("window", ["bounded", "exact", (-2, 3)])
def test_no_code_of_the_window_has_less_output_error(window: Window) -> None:
    x, hessian = 300 * normal(50, 4, 16), gram(4)
    result = sweep_local_hessian(x, hessian, window=window)
    chosen = exact_loss(x, hessian, e4m3.decode(result.codes))
    base = sweep_local_hessian(x, hessian, window=(0, 0)).codes.int()
    low, high = {"bounded": (-16, 9), "exact": (-126, 126)}.get(str(window), (-2, 3))
    for offset in range(low, high + 1):
        code = (base + offset).clamp(1, 126).to(torch.uint8)
        other = exact_loss(x, hessian, e4m3.decode(code))
        assert (chosen <= other * (1 + 1e-5)).all()
    unit = hessian[:, 0, 0] / normalize_local_hessian(hessian)[:, 0, 0]
    torch.testing.assert_close(result.loss, (chosen / unit).float(), rtol=1e-4, atol=0)


def test_couplings_change_the_choice() -> None:
    x, hessian = 300 * normal(500, 4, 16), gram(4)
    diagonal = torch.diag_embed(hessian.diagonal(dim1=1, dim2=2))
    coupled = sweep_local_hessian(x, hessian).codes
    plain = sweep_local_hessian(x, diagonal).codes
    assert (coupled != plain).float().mean() > 0.2
    better = exact_loss(x, hessian, e4m3.decode(coupled)).sum()
    assert better < 0.99 * exact_loss(x, hessian, e4m3.decode(plain)).sum()


@pytest.mark.parametrize("window", ["exact", (-8, 7), (-16, 9)])
def test_a_diagonal_hessian_gives_the_bits_of_wmse(window: Window) -> None:
    x, importance = 300 * normal(400, 4, 16), normal(4, 16, seed=3).square()
    hessian = torch.diag_embed(importance)
    hessian[2] = 0.0  # both count a block without importance as one of ones
    importance[2] = 0.0
    coupled = sweep_local_hessian(x, hessian, window=window)
    plain = sweep_scales(x, importance, window=window)
    assert torch.equal(coupled.codes, plain.codes)
    assert torch.equal(coupled.loss, plain.loss)


@pytest.mark.parametrize("k", [-140, -3, 90])
def test_the_unit_of_the_hessian_does_not_matter(k: int) -> None:
    x, hessian = 300 * normal(50, 4, 16), gram(4)
    hessian = torch.ldexp(hessian, torch.tensor(-8))
    moved = torch.ldexp(torch.ldexp(hessian, torch.tensor(k // 2)), torch.tensor(k - k // 2))
    if k > -100:  # below, float32 loses bits of the entries themselves
        assert torch.equal(normalize_local_hessian(moved), normalize_local_hessian(hessian))
    assert torch.isfinite(sweep_local_hessian(x, moved).loss).all()


def test_a_tie_goes_to_the_smaller_scale() -> None:
    x = torch.zeros(1, 1, 16)
    x[0, 0, 0] = 6.0  # without error at 1, 1.5, 2 and 3
    for window in ("bounded", "exact"):
        assert sweep_local_hessian(x, gram(1), window=window).codes.tolist() == [[0x38]]


def test_wrong_shapes_raise() -> None:
    with pytest.raises(ValueError, match=r"x has shape \[2, 8\]; expected \[..., G, 16\]"):
        sweep_local_hessian(torch.zeros(2, 8), gram(1))
    with pytest.raises(ValueError, match=r"local_hessian has shape \[3, 16, 16\]; expected \[2, 1"):
        sweep_local_hessian(torch.zeros(5, 2, 16), gram(3))
