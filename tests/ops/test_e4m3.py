import pytest
import torch
from torch import Tensor

from scalesweep_hf.ops import e4m3

# Code, value: typed by hand from sign 0, four exponent bits with bias 7, three mantissa bits.
GOLDEN = [
    (1, 2.0**-9),
    (2, 2.0**-8),
    (7, 7 * 2.0**-9),
    (8, 2.0**-6),
    (9, 9 * 2.0**-9),
    (0x30, 0.5),
    (0x38, 1.0),
    (0x39, 1.125),
    (0x3C, 1.5),
    (0x40, 2.0),
    (0x78, 256.0),
    (0x7D, 416.0),
    (126, 448.0),
]


def every_code() -> Tensor:
    return torch.arange(1, 127, dtype=torch.uint8)


def formula(code: int) -> float:
    exponent, mantissa = code >> 3, code & 7
    if exponent == 0:
        return mantissa * 2.0**-9
    return float((1 + mantissa / 8) * 2.0 ** (exponent - 7))


def midpoints() -> Tensor:
    """Between neighbouring codes n and n + 1, n = 1...125; exact in float32."""
    values = torch.tensor([formula(code) for code in range(1, 127)])
    return (values[:-1] + values[1:]) / 2


@pytest.mark.parametrize(("code", "value"), GOLDEN)
def test_values_typed_by_hand(code: int, value: float) -> None:
    assert e4m3.decode(torch.tensor([code], dtype=torch.uint8)).tolist() == [value]
    assert e4m3.encode_nearest(torch.tensor([value])).tolist() == [code]


def test_every_code_has_the_value_of_the_formula() -> None:
    assert e4m3.decode(every_code()).tolist() == [formula(code) for code in range(1, 127)]


def test_every_code_round_trips() -> None:
    codes = e4m3.encode_nearest(e4m3.decode(every_code()))
    assert codes.dtype == torch.uint8
    assert torch.equal(codes, every_code())


def test_order_of_codes_is_order_of_values() -> None:
    assert (e4m3.decode(every_code()).diff() > 0).all()


def test_constants_are_the_ends() -> None:
    ends = e4m3.decode(torch.tensor([e4m3.MIN_CODE, e4m3.MAX_CODE], dtype=torch.uint8))
    assert ends.tolist() == [e4m3.MIN, e4m3.MAX] == [0.001953125, 448.0]


def test_every_midpoint_goes_to_the_even_code() -> None:
    even = [n + n % 2 for n in range(1, 126)]
    assert e4m3.encode_nearest(midpoints()).tolist() == even


def test_one_ulp_beside_every_midpoint_goes_to_the_nearer_code() -> None:
    below = torch.nextafter(midpoints(), torch.tensor(0.0))
    above = torch.nextafter(midpoints(), torch.tensor(1000.0))
    assert e4m3.encode_nearest(below).tolist() == list(range(1, 126))
    assert e4m3.encode_nearest(above).tolist() == list(range(2, 127))


@pytest.mark.parametrize("x", [0.0, 1e-45, 1e-30, 2.0**-11, 2.0**-10, 2.0**-9])
def test_small_values_clamp_to_code_1_and_never_to_zero(x: float) -> None:
    assert e4m3.encode_nearest(torch.tensor([x])).tolist() == [1]


@pytest.mark.parametrize("x", [448.0, 449.0, 464.0, 465.0, 480.0, 1e30, float("inf")])
def test_large_values_clamp_to_code_126(x: float) -> None:
    assert e4m3.encode_nearest(torch.tensor([x])).tolist() == [126]


@pytest.mark.parametrize("nan", [float("nan"), -float("nan")])
def test_nan_gives_code_126(nan: float) -> None:
    assert e4m3.encode_nearest(torch.tensor([nan])).tolist() == [126]


def test_decode_takes_bytes_and_float8_alike() -> None:
    codes = every_code().reshape(6, 21)
    decoded = e4m3.decode(codes)
    assert decoded.dtype == torch.float32
    assert decoded.shape == codes.shape
    assert torch.equal(e4m3.decode(codes.view(torch.float8_e4m3fn)), decoded)


def test_codes_127_and_255_are_nan() -> None:
    assert e4m3.decode(torch.tensor([127, 255], dtype=torch.uint8)).isnan().all()
    assert not e4m3.decode(every_code()).isnan().any()


@pytest.mark.parametrize("divisor", [4.0, 6.0, 1536.0, 2688.0])
def test_division_is_rounded_once(divisor: float) -> None:
    x = torch.rand(10_000, generator=torch.Generator().manual_seed(0)) * 1000
    once = (x.double() / divisor).float()  # float64 is wide enough that rounding twice is harmless
    assert torch.equal(e4m3.divide(x, divisor), once)
