"""The upper bound, for any importance: a scale that needs no point above 3 s can be halved."""

from fractions import Fraction

import pytest

from scalesweep_hf.ops.window import FLOORED, LAST_ODD, ROUNDED, WindowTable
from tests.proofs.exact import (
    CODES,
    base,
    breakpoints,
    cell,
    code_of,
    halving_excludes,
    loss,
    squared_error,
    value,
    winner,
)

TABLES = [(ROUNDED, False), (FLOORED, True)]


def test_codes_are_the_126_positive_e4m3_values() -> None:
    assert [value(code) for code in (1, 7, 8, 16, 56, 126)] == [1, 7, 8, 16, 512, 448 * 512]
    assert all(value(code) < value(code + 1) for code in CODES[:-1])


@pytest.mark.parametrize("code", CODES)
def test_halving_never_costs_an_element_up_to_three_and_a_half_scales(code: int) -> None:
    if value(code) % 2:
        assert code <= LAST_ODD
        return
    half, limit = code_of(value(code) // 2), Fraction(7 * value(code), 2)
    # Between breakpoints the difference of squared errors is linear.
    points = {x for x in breakpoints([code, half]) if x < limit} | {Fraction(0), limit}
    for x in points:
        assert squared_error(x, half) <= squared_error(x, code)
    assert halving_excludes(code, limit)
    beyond = limit + Fraction(1, 1000)
    assert squared_error(beyond, half) > squared_error(beyond, code)
    assert not halving_excludes(code, beyond)


@pytest.mark.parametrize("q0", CODES)
@pytest.mark.parametrize(("table", "floored"), TABLES)
def test_every_code_above_the_window_can_be_halved(
    table: WindowTable, floored: bool, q0: int
) -> None:
    _, high = cell(q0, floored=floored)
    allowed = table.codes(q0)
    for code in range(max(allowed[0], q0), 127):
        assert code in allowed or halving_excludes(code, high)


@pytest.mark.parametrize("q0", CODES)
@pytest.mark.parametrize(("table", "floored"), TABLES)
def test_no_offset_up_is_more_than_the_bound_asks_for(
    table: WindowTable, floored: bool, q0: int
) -> None:
    _, high = cell(q0, floored=floored)
    needed = [code for code in CODES if high is None or 2 * high > 7 * value(code)]
    up = (table.up_normal if q0 >= 8 else table.up_subnormal)[q0 % 8]
    assert min(126, q0 + up) == needed[-1]


@pytest.mark.parametrize("q0", CODES)
@pytest.mark.parametrize("floored", [False, True])
def test_cells_are_the_largest_magnitudes_of_a_base(floored: bool, q0: int) -> None:
    low, high = cell(q0, floored=floored)
    inside = low + 1 if high is None else (low + high) / 2
    assert base(inside, floored=floored) == q0
    assert q0 == 1 or base(low - Fraction(1, 10**6), floored=floored) == q0 - 1
    assert high is None or base(high + Fraction(1, 10**6), floored=floored) == q0 + 1


def test_the_published_subnormal_row_misses_an_odd_code() -> None:
    block = [Fraction(11, 2)] * 16
    assert (base(max(block)), winner(block)) == (1, 11)
    assert loss(block, 11) == 0
    assert 11 in ROUNDED.codes(1)
