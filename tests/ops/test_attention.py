import math
from typing import Any

import pytest
import torch
from torch import Tensor

from scalesweep_hf.ops.attention import attend_packed
from scalesweep_hf.ops.kv import StateCodec

KEY, VALUE = StateCodec(torch.tensor(0.0123), "mse"), StateCodec(torch.tensor(0.003), "mse")


def packed(batch: int = 2, heads: int = 2, tokens: int = 33, dim: int = 32) -> tuple[Tensor, ...]:
    keys, values = torch.randn(2, batch, heads, tokens, dim)
    rows = KEY.pack(keys * 2), VALUE.pack(values)
    return rows[0], rows[1], KEY.tensor_scale, VALUE.tensor_scale


def decoded(rows: tuple[Tensor, ...], groups: int) -> list[Tensor]:
    states = KEY.unpack(rows[0], torch.float64), VALUE.unpack(rows[1], torch.float64)
    return [x.repeat_interleave(groups, 1) for x in states]


MASKS: dict[str, Any] = {
    "none": lambda: None,
    "bool": lambda: torch.rand(2, 1, 3, 33) > 0.5,
    "added": lambda: torch.randn(2, 1, 3, 33),
    "per head": lambda: torch.randn(1, 6, 3, 33),
    "of one row": lambda: torch.rand(33) > 0.5,
}


@pytest.mark.parametrize("mask", MASKS)
def test_it_is_attention_to_decoded_states(mask: str) -> None:
    query, rows, bias = torch.randn(2, 6, 3, 32), packed(), MASKS[mask]()
    k, v = decoded(rows, 3)
    score = query.double() @ k.mT * 0.2
    if bias is not None:
        score = score.masked_fill(~bias, -math.inf) if bias.dtype == torch.bool else score + bias
    expected = (score.softmax(-1) @ v).float()
    actual = attend_packed(query, *rows, scaling=0.2, mask=bias)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    half = attend_packed(query.bfloat16(), *rows, scaling=0.2, mask=bias)
    exact = attend_packed(query.bfloat16().float(), *rows, scaling=0.2, mask=bias)
    assert torch.equal(half, exact.bfloat16())


def test_tokens_from_the_length_on_may_be_anything() -> None:
    rows = packed()
    query = torch.randn(2, 4, 1, 32)
    short = rows[0][:, :, :9], rows[1][:, :, :9], *rows[2:]
    expected = attend_packed(query, *short, scaling=0.2)
    for x in rows[:2]:
        x[:, :, 9:] = 255  # NaN scales
    actual = attend_packed(query, *rows, scaling=0.2, length=torch.tensor(9))
    torch.testing.assert_close(actual, expected)


def test_what_may_attend_to_nothing_is_zero() -> None:
    mask = torch.ones(2, 1, 2, 33, dtype=torch.bool)
    mask[0, 0, 1] = False
    result = attend_packed(torch.randn(2, 4, 2, 32), *packed(), scaling=0.2, mask=mask)
    assert not result[0, :, 1].any()
    assert result[0, :, 0].all()
    assert result[1].all()


def test_shapes_that_do_not_fit_are_named() -> None:
    rows = packed()
    with pytest.raises(ValueError, match=r"queries \[2, 3, 1, 32\], packed keys \[2, 2, 33, 18\]"):
        attend_packed(torch.randn(2, 3, 1, 32), *rows, scaling=0.2)
    with pytest.raises(ValueError, match="do not fit"):
        attend_packed(torch.randn(2, 4, 1, 48), *rows, scaling=0.2)
    mask = torch.ones(2, 1, 1, 32, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"a mask \[2, 1, 1, 32\] cannot be broadcast"):
        attend_packed(torch.randn(2, 4, 1, 32), *rows, scaling=0.2, mask=mask)
