"""Golden ties and windows typed by hand, and laws that hold for every block."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from scalesweep_hf.ops import e4m3
from scalesweep_hf.ops.nvfp4 import quantize
from scalesweep_hf.ops.objectives import OBJECTIVES
from scalesweep_hf.ops.sweep import (
    Window,
    absmax_codes,
    block_loss,
    check_window,
    four_over_six_codes,
    normalize_importance,
    sweep_scales,
)

WINDOWS: list[Window] = ["bounded", "exact", (-3, 7), (-16, 9)]
law = settings(derandomize=True, deadline=None, database=None, max_examples=150)


def block(*values: float) -> Tensor:
    return torch.tensor([list(values) + [0.0] * (16 - len(values))])


def sixteen(element: st.SearchStrategy[float]) -> st.SearchStrategy[Tensor]:
    return st.lists(element, min_size=16, max_size=16).map(lambda v: torch.tensor([v]))


def floats(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, width=32)


any_block = sixteen(floats(-4096, 4096) | floats(-1, 1) | st.sampled_from([0.0, -0.0, 0.75, 2.5]))
# Largest in 1...64, so that scales stay normal and unclamped when it moves by 2**-3...2**4.
middle_block = sixteen(floats(-64, 64)).filter(lambda x: float(x.abs().max()) >= 1)
# Losses of these are exact in float32, whatever the order of the sum.
whole_block = sixteen(st.integers(-64, 64).map(float))
any_importance = sixteen(floats(2**-20, 1) | st.sampled_from([0.0, 0.5, 1.0]))
any_window = st.sampled_from(WINDOWS)


def test_a_tie_without_error_goes_to_the_smaller_scale() -> None:
    # 6 = 6 * 1 = 4 * 1.5 = 3 * 2 = 2 * 3; the code of 1 is 0x38 = 56.
    for window in WINDOWS:
        result = sweep_scales(block(6.0), window=window)
        assert (result.codes.tolist(), result.loss.tolist()) == ([56], [0.0])
    assert four_over_six_codes(block(6.0)).tolist() == [56]


def test_a_tie_with_error_goes_to_the_smaller_scale() -> None:
    # s = 1: 2.75 -> 3, .75 -> 1. s = 1.5 (code 60): .5 -> .75, 2.75 -> 3. Both err by .25 twice.
    x = block(6.0, 0.5, 2.75, 0.75)
    assert block_loss(x, torch.tensor([1.0])).tolist() == [0.125]
    assert block_loss(x, torch.tensor([1.5])).tolist() == [0.125]
    for window in WINDOWS:
        for importance in (None, torch.ones(16)):
            assert sweep_scales(x, importance, window=window).codes.tolist() == [56]
    assert four_over_six_codes(x).tolist() == [56]


def test_four_over_six_takes_four_only_where_it_is_better() -> None:
    assert four_over_six_codes(block(6.0, 4.5)).tolist() == [60]  # 4.5 = 3 * 1.5; with 1, 4.5 -> 4
    assert four_over_six_codes(block(6.0, 4.0)).tolist() == [56]


def test_an_element_without_weight_may_be_clipped() -> None:
    # 1 = 2 * .5 = 4 * .25; 1 / 6 is no E4M3 value. q0 = 56; .5 is code 48, .25 is code 40.
    x, importance = block(6.0, 1.0), block(0.0, 1.0)
    assert sweep_scales(x, importance).codes.tolist() == [48]
    assert sweep_scales(x, importance, window="exact").codes.tolist() == [40]
    assert sweep_scales(x, importance, window=(-16, 0)).codes.tolist() == [40]
    assert sweep_scales(x, importance, window=(-7, 0)).codes.tolist() == [56]


# By mantissa field of q0: the lowest offset that wins, then what fills the block, as value and
# number of times, and its largest element, in units of the winning scale.
LOWEST = [
    (0, -3, {0.5: 4, 1.5: 2, 4.0: 2, 6.0: 7}, 7.15625),
    (1, -3, {0.5: 7, 6.0: 8}, 7.296875),
    (2, -2, {0.5: 8, 4.0: 3, 6.125: 4}, 7.125),
    (3, -2, {0.5: 7, 4.0: 5, 6.0: 3}, 7.015625),
    (4, -2, {0.5: 5, 1.5: 1, 4.0: 5, 6.0: 4}, 6.90625),
    (5, -3, {0.5: 9, 6.0625: 6}, 7.5078125),
    (6, -3, {0.5: 9, 6.0: 6}, 7.375),
    (7, -3, {0.5: 5, 1.5: 2, 4.0: 2, 6.0: 6}, 7.265625),
]


@pytest.mark.parametrize(("field", "offset", "counts", "largest"), LOWEST)
@pytest.mark.parametrize("base", [16, 56, 104])
def test_the_lowest_code_of_the_bounded_window_can_win(
    base: int, field: int, offset: int, counts: dict[float, int], largest: float
) -> None:
    winner = base + field + offset
    scale = e4m3.decode(torch.tensor([winner], dtype=torch.uint8))
    x = scale * block(largest, *(value for value, n in counts.items() for _ in range(n)))
    assert absmax_codes(x).tolist() == [base + field]
    for window in ("bounded", "exact", (-125, 125)):
        assert sweep_scales(x, window=window).codes.tolist() == [winner]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("importance", [None, torch.ones(16)])
def test_a_zero_block_has_code_1(window: Window, importance: Tensor | None) -> None:
    result = sweep_scales(torch.zeros(2, 3, 16), importance, window=window)
    assert result.codes.tolist() == [[1] * 3] * 2
    assert not result.loss.any()
    assert absmax_codes(torch.zeros(1, 16)).tolist() == [1]
    assert four_over_six_codes(torch.zeros(1, 16)).tolist() == [1]


@law
@given(any_block)
def test_mse_is_never_worse_than_absmax_and_four_over_six(x: Tensor) -> None:
    for window in WINDOWS:
        best = sweep_scales(x, window=window).loss
        assert best <= block_loss(x, e4m3.decode(absmax_codes(x)))
        assert best <= block_loss(x, e4m3.decode(four_over_six_codes(x)))


@law
@given(any_block, any_importance)
def test_exact_is_never_worse_than_any_window(x: Tensor, importance: Tensor) -> None:
    q0 = absmax_codes(x)
    absmax = block_loss(x, e4m3.decode(q0), normalize_importance(importance))
    exact = sweep_scales(x, importance, window="exact").loss
    assert sweep_scales(x, importance).loss <= absmax
    if int(q0) > 8:  # see BOTTOM in test_sweep.py
        assert exact <= sweep_scales(x, importance).loss
        assert exact <= sweep_scales(x, importance, window=(-16, 9)).loss


@law
@given(middle_block, st.integers(-3, 4), any_window)
def test_a_power_of_two_moves_the_scale_by_itself(x: Tensor, k: int, window: Window) -> None:
    plain, moved = sweep_scales(x, window=window), sweep_scales(x * 2.0**k, window=window)
    assert moved.codes.int().tolist() == (plain.codes.int() + 8 * k).tolist()
    assert torch.equal(moved.loss, plain.loss * 4.0**k)
    assert torch.equal(e4m3.decode(moved.codes), e4m3.decode(plain.codes) * 2.0**k)


@law
@given(middle_block, st.integers(-100, 100), st.sampled_from(sorted(OBJECTIVES)))
def test_a_power_of_two_moves_only_the_tensor_scale(x: Tensor, k: int, objective: str) -> None:
    importance = torch.arange(16.0) if OBJECTIVES[objective].weighted else None
    if OBJECTIVES[objective].coupled:
        importance = (torch.eye(16) + 0.25)[None]
    plain = quantize(x, objective=objective, importance=importance)
    moved = quantize(x * 2.0**k, objective=objective, importance=importance)
    assert torch.equal(moved.packed, plain.packed)
    assert torch.equal(moved.block_scale.float(), plain.block_scale.float())
    assert torch.equal(moved.tensor_scale, plain.tensor_scale * 2.0**k)


@law
@given(any_block, any_importance, st.integers(-100, 100), any_window)
def test_the_unit_of_importance_does_not_matter(
    x: Tensor, importance: Tensor, k: int, window: Window
) -> None:
    plain = sweep_scales(x, importance, window=window)
    moved = sweep_scales(x, importance * 2.0**k, window=window)
    assert torch.equal(moved.codes, plain.codes)
    assert torch.equal(moved.loss, plain.loss)


@law
@given(any_block, st.sampled_from(["exact", (-3, 7), (-8, 7), (0, 0)]))
def test_importance_of_ones_and_of_zeros_is_no_importance(x: Tensor, window: Window) -> None:
    plain = sweep_scales(x, window=window).codes
    assert torch.equal(sweep_scales(x, torch.ones(16), window=window).codes, plain)
    assert torch.equal(sweep_scales(x, torch.zeros(16), window=window).codes, plain)


@law
@given(any_block, any_importance, st.lists(st.sampled_from([-1.0, 1.0]), min_size=16, max_size=16))
def test_signs_do_not_move_the_scale(x: Tensor, importance: Tensor, signs: list[float]) -> None:
    flipped = x * torch.tensor(signs)
    for choose in (absmax_codes, four_over_six_codes):
        assert torch.equal(choose(flipped), choose(x))
    for window in WINDOWS:
        for w in (None, importance):
            plain, other = (
                sweep_scales(x, w, window=window),
                sweep_scales(flipped, w, window=window),
            )
            assert torch.equal(other.codes, plain.codes)
            assert torch.equal(other.loss, plain.loss)


@law
@given(whole_block, st.permutations(range(16)), any_window)
def test_order_does_not_move_the_scale(x: Tensor, order: list[int], window: Window) -> None:
    importance = torch.tensor([[1.0, 2.0, 4.0, 0.0] * 4])
    for w, permuted in ((None, None), (importance, importance[:, order])):
        plain = sweep_scales(x, w, window=window)
        other = sweep_scales(x[:, order], permuted, window=window)
        assert torch.equal(other.codes, plain.codes)
        assert torch.equal(other.loss, plain.loss)


@law
@given(st.lists(any_block, min_size=2, max_size=6), any_importance, any_window)
def test_blocks_do_not_see_each_other(
    rows: list[Tensor], importance: Tensor, window: Window
) -> None:
    x = torch.stack(rows)  # [N, 1, 16]
    for w in (None, importance):
        together = sweep_scales(x, w, window=window)
        alone = [sweep_scales(row, w, window=window) for row in rows]
        assert torch.equal(together.codes, torch.stack([result.codes for result in alone]))
        assert torch.equal(together.loss, torch.stack([result.loss for result in alone]))


@law
@given(any_importance, st.integers(-100, 100))
def test_normal_importance_has_its_largest_in_half_to_one(importance: Tensor, k: int) -> None:
    scaled = normalize_importance(importance * 2.0**k)
    largest = float(importance.max())
    if largest == 0:
        assert torch.equal(scaled, torch.ones(1, 16))
    else:
        assert 0.5 <= float(scaled.max()) < 1
        assert torch.equal(scaled, importance * (float(scaled.max()) / largest))


@pytest.mark.parametrize("value", [2.0**-149, 2.0**-126, 1.0, 2.0**127, 3e38])
def test_importance_at_the_ends_of_float32_is_normalized(value: float) -> None:
    scaled = normalize_importance(torch.full((1, 16), value))
    assert 0.5 <= float(scaled.min()) == float(scaled.max()) < 1


@pytest.mark.parametrize("window", WINDOWS)
def test_importance_broadcasts_from_the_last_dimensions(window: Window) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 16, generator=generator)
    for shape in ((16,), (5, 16), (1, 5, 16), (3, 5, 16)):
        importance = torch.rand(shape, generator=generator)
        kept, before = x.clone(), importance.clone()
        short = sweep_scales(x, importance, window=window)
        full = sweep_scales(x, importance.expand(x.shape).contiguous(), window=window)
        assert torch.equal(short.codes, full.codes)
        assert torch.equal(short.loss, full.loss)
        assert torch.equal(x, kept)
        assert torch.equal(importance, before)


@pytest.mark.parametrize("shape", [(16,), (2, 15), (2, 32), (0,)])
def test_blocks_of_another_size_raise(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected \[..., G, 16\]: reshape"):
        sweep_scales(torch.zeros(shape))


def test_windows_are_checked() -> None:
    assert check_window((-3, 7)) == (-3, 7)
    assert check_window((0, 0)) == (0, 0)
    wrong: list[object] = ["all", (1, 2), (-2, -1), (0,), (-1, 0, 1), (-1.0, 2), (True, 2)]
    for window in wrong:
        call: Callable[..., object] = sweep_scales
        with pytest.raises(ValueError, match="low <= 0 <= high"):
            call(torch.zeros(1, 16), window=window)
