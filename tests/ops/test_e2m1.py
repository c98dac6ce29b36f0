import pytest
import torch
from torch import Tensor

from scalesweep_hf.ops import e2m1

VALUE_OF_CODE = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
VALUE_OF_CODE += [-0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
NAN = float("nan")
INF = float("inf")

# x, code: values, ties, and the float32 neighbours of ties, typed by hand.
GOLDEN = [
    (0.0, 0),
    (0.5, 1),
    (1.0, 2),
    (1.5, 3),
    (2.0, 4),
    (3.0, 5),
    (4.0, 6),
    (6.0, 7),
    (-0.5, 9),
    (-1.0, 10),
    (-1.5, 11),
    (-2.0, 12),
    (-3.0, 13),
    (-4.0, 14),
    (-6.0, 15),
    (0.3, 1),
    (0.7, 1),
    (0.8, 2),
    (2.2, 4),
    (2.6, 5),
    (4.9, 6),
    (5.1, 7),
    (-2.6, 13),
    (-5.1, 15),
]
TIES = [(0.25, 0), (0.75, 2), (1.25, 2), (1.75, 4), (2.5, 4), (3.5, 6), (5.0, 6)]


def every_bfloat16() -> Tensor:
    patterns = torch.arange(65_536, dtype=torch.int32).to(torch.uint16)
    return patterns.view(torch.bfloat16).to(torch.float32)


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32)


def nearest_codes(x: Tensor) -> Tensor:
    """Brute force in float64: least distance to any of the 15 values, even codes first."""
    codes = torch.tensor([0, 2, 4, 6, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15], dtype=torch.uint8)
    values = torch.tensor(VALUE_OF_CODE, dtype=torch.float64)[codes.int()]
    distance = (x.double().clamp(-100, 100).unsqueeze(-1) - values).abs()
    first = distance == distance.amin(-1, keepdim=True)
    return codes[first.int().argmax(-1)]


@pytest.mark.parametrize(("x", "code"), GOLDEN)
def test_codes_typed_by_hand(x: float, code: int) -> None:
    assert e2m1.encode(torch.tensor([x])).tolist() == [code]


@pytest.mark.parametrize(("tie", "code"), TIES)
def test_ties_go_to_the_even_code(tie: float, code: int) -> None:
    x = torch.tensor([tie, -tie])
    assert e2m1.encode(x).tolist() == [code, code + 8 if code else 0]
    assert e2m1.round_to_e2m1(x).abs().tolist() == [VALUE_OF_CODE[code]] * 2
    assert e2m1.round_magnitude(x[:1]).tolist() == [VALUE_OF_CODE[code]]


@pytest.mark.parametrize(("tie", "code"), TIES)
def test_one_ulp_beside_a_tie_goes_to_the_nearer_value(tie: float, code: int) -> None:
    low = (torch.tensor(VALUE_OF_CODE[:8]) < tie).sum().item() - 1
    x = torch.tensor([tie])
    below, above = torch.nextafter(x, torch.tensor(0.0)), torch.nextafter(x, torch.tensor(9.0))
    for side, expected in ((below, low), (above, low + 1)):
        assert e2m1.encode(side).tolist() == [expected]
        assert e2m1.round_magnitude(side).tolist() == [VALUE_OF_CODE[int(expected)]]


@pytest.mark.parametrize("x", [6.0, 6.5, 8.0, 1e30, INF])
def test_magnitudes_above_six_saturate(x: float) -> None:
    both = torch.tensor([x, -x])
    assert e2m1.encode(both).tolist() == [7, 15]
    assert e2m1.round_to_e2m1(both).tolist() == [6.0, -6.0]
    assert e2m1.round_magnitude(both[:1]).tolist() == [6.0]


@pytest.mark.parametrize("x", [0.0, -0.0, -1e-45, -1e-10, -0.2, -0.25])
def test_there_is_one_zero(x: float) -> None:
    tensor = torch.tensor([x])
    assert e2m1.encode(tensor).tolist() == [0]
    assert bits(e2m1.round_to_e2m1(tensor)).tolist() == [0]


def test_every_bfloat16_goes_to_the_nearest_value() -> None:
    x = every_bfloat16()
    x = x[~x.isnan()]
    codes = e2m1.encode(x)
    assert codes.dtype == torch.uint8
    torch.testing.assert_close(codes, nearest_codes(x), rtol=0, atol=0)


def test_rounding_is_decode_of_encode_bit_for_bit() -> None:
    x = every_bfloat16()
    x = x[~x.isnan()]
    rounded, decoded = e2m1.round_to_e2m1(x), e2m1.decode(e2m1.encode(x))
    torch.testing.assert_close(bits(rounded), bits(decoded), rtol=0, atol=0)


def test_magnitude_rounding_agrees_with_signed_rounding() -> None:
    x = every_bfloat16()
    x = x[x >= 0]
    torch.testing.assert_close(e2m1.round_magnitude(x), e2m1.round_to_e2m1(x), rtol=0, atol=0)


def test_rounding_is_idempotent_and_odd() -> None:
    x = every_bfloat16()
    x = x[~x.isnan()]
    once = e2m1.round_to_e2m1(x)
    torch.testing.assert_close(bits(e2m1.round_to_e2m1(once)), bits(once), rtol=0, atol=0)
    assert torch.equal(e2m1.round_to_e2m1(-x), -once)


def test_encode_never_gives_the_code_of_minus_zero() -> None:
    assert sorted(set(e2m1.encode(every_bfloat16()).tolist())) == [*range(8), *range(9, 16)]


def test_nan_stays_nan_in_rounding_and_has_no_sign_code() -> None:
    x = every_bfloat16()
    x = x[x.isnan()]
    assert len(x) == 254
    assert e2m1.round_to_e2m1(x).isnan().all()
    assert e2m1.round_magnitude(x.abs()).isnan().all()
    assert int(e2m1.encode(x).max()) <= 7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_decode_is_exact_in_every_dtype(dtype: torch.dtype) -> None:
    decoded = e2m1.decode(torch.arange(16, dtype=torch.uint8), dtype)
    assert decoded.dtype == dtype
    expected = torch.tensor(VALUE_OF_CODE)
    torch.testing.assert_close(bits(decoded.float()), bits(expected), rtol=0, atol=0)


def test_codes_round_trip() -> None:
    codes = torch.tensor([*range(8), *range(9, 16)], dtype=torch.uint8)
    assert torch.equal(e2m1.encode(e2m1.decode(codes)), codes)
    assert torch.equal(e2m1.encode(e2m1.decode(torch.tensor([8], dtype=torch.uint8))), codes[:1])


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (2, 3, 5)])
def test_shapes_are_kept_and_the_input_is_not_changed(shape: tuple[int, ...]) -> None:
    x = torch.full(shape, -2.6)
    before = x.clone()
    assert e2m1.encode(x).shape == e2m1.round_to_e2m1(x).shape == x.shape
    assert e2m1.decode(e2m1.encode(x)).shape == x.shape
    assert torch.equal(x, before)
