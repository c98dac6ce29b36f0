"""The lower bound, without importance: clipping the largest element costs more than others gain."""

from dataclasses import replace
from fractions import Fraction

import pytest

from scalesweep_hf.ops.window import FLOORED, ROUNDED, WindowTable
from tests.proofs.exact import (
    CODES,
    Certificate,
    breakpoints,
    candidates,
    code_of,
    doubling_excludes,
    excess,
    holds,
    value,
)
from tests.proofs.files import CERTIFICATES, SIZES, covered, read_certificates


@pytest.mark.parametrize("size", SIZES)
def test_every_certificate_holds(size: int) -> None:
    certificates = read_certificates(size)
    assert len(certificates) > 100
    for certificate in certificates:
        assert holds(certificate), certificate


@pytest.mark.parametrize("size", SIZES)
def test_doubling_pays_beyond_the_limit_and_not_before(size: int) -> None:
    for code in CODES:
        if 2 * value(code) > value(126):
            assert not doubling_excludes(code, Fraction(10**9), size)
            continue
        double = code_of(2 * value(code))
        limit = value(code) * (7 + Fraction(size - 1, 16))
        plain = Certificate(size, code, limit, None, {double: 1})
        least = min(excess(plain, x) for x in breakpoints([code, double]))
        assert least == -Fraction(value(code) ** 2, 4)
        # At the limit gain and loss are equal, just before it the loss is more ...
        assert excess(plain, limit) + (size - 1) * least == 0
        assert not holds(plain)
        assert not holds(replace(plain, low=limit - Fraction(1, 8), high=limit))
        # ... and beyond it the gain, everywhere: from here to any greater magnitude.
        assert holds(replace(plain, low=limit + Fraction(1, 10**6)))
        assert doubling_excludes(code, limit + Fraction(1, 10**6), size)
        assert not doubling_excludes(code, limit, size)


def test_doubling_of_16_elements_starts_at_96_over_127() -> None:
    assert doubling_excludes(56, Fraction(127 * 512 + 1, 16), 16)
    assert not doubling_excludes(56, Fraction(127 * 512, 16), 16)
    assert Fraction(16 * 6, 127) == Fraction(96, 127)


@pytest.mark.parametrize(("table", "floored"), [(ROUNDED, False), (FLOORED, True)])
def test_every_code_outside_the_window_is_excluded(table: WindowTable, floored: bool) -> None:
    proved = covered(read_certificates(16))
    for q0 in CODES:
        assert {*candidates(q0, proved, 16, floored=floored)} <= {*table.codes(q0)}


# Codes down from q0 by mantissa field; then of the last binade, 120...126.
DOWN = {
    (8, False): ([3, 2, 2, 2, 2, 2, 2, 2], [3, 2, 2, 2, 2, 3, 3]),
    (8, True): ([2, 1, 1, 1, 2, 2, 2, 2], [2, 2, 2, 2, 2, 2, 3]),
    (16, False): ([3, 3, 2, 2, 2, 3, 3, 3], [3, 3, 3, 3, 3, 3, 4]),
    (16, True): ([3, 2, 2, 2, 2, 2, 2, 3], [3, 2, 2, 2, 2, 3, 3]),
    (32, False): ([4, 4, 3, 3, 3, 3, 3, 4], [4, 4, 3, 4, 4, 4, 4]),
    (32, True): ([4, 3, 3, 2, 3, 3, 3, 3], [4, 3, 3, 3, 3, 4, 4]),
}


@pytest.mark.parametrize(("size", "floored"), DOWN)
def test_certificates_leave_these_offsets_down(size: int, floored: bool) -> None:
    proved = covered(read_certificates(size))
    fields, top = DOWN[size, floored]
    left = [q0 - candidates(q0, proved, size, floored=floored)[0] for q0 in range(16, 127)]
    assert left == fields * 13 + top


def test_certificates_are_small() -> None:
    assert CERTIFICATES.stat().st_size < 300_000


SOME = read_certificates(16)[::8]


@pytest.mark.parametrize("certificate", SOME, ids=lambda c: str(c.code))
def test_a_certificate_for_more_than_is_true_does_not_hold(certificate: Certificate) -> None:
    # Any block of one value 6 s is free of error at s, whatever other scales do.
    own = Fraction(6 * value(certificate.code))
    assert not holds(replace(certificate, low=own, high=own))
    assert not holds(replace(certificate, weights={}))
    assert not holds(replace(certificate, weights={certificate.code: 1}))
    assert not holds(replace(certificate, weights={**certificate.weights, 127: 1}))
    if max(certificate.weights) > certificate.code:  # others hold element by element
        assert not holds(replace(certificate, size=10**6))


def test_certificates_with_a_gap_cover_nothing() -> None:
    whole = Certificate(16, 32, Fraction(6 * 120), Fraction(6 * 128), {})
    low, high = whole.low, Fraction(6 * 128)
    cells = covered([whole])
    middle = (low + high) / 2
    both = [replace(whole, high=middle), replace(whole, low=middle)]
    assert covered(both) == cells
    assert len(cells) == 2
    assert len(covered([replace(whole, high=middle - 1), replace(whole, low=middle + 1)])) < 2
