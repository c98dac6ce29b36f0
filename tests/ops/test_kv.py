import pytest
import torch
from torch import Tensor

from scalesweep_hf import dequantize, quantize
from scalesweep_hf.ops.kv import StateCodec, packed_size


def states(heads: int = 2, head_dim: int = 32, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, heads, 5, head_dim, generator=generator).to(dtype)


def codecs(heads: int = 2, head_dim: int = 32) -> dict[str, StateCodec]:
    generator = torch.Generator().manual_seed(1)
    importance = torch.rand(heads, head_dim, generator=generator)
    scale = torch.tensor(0.003)
    return {
        "absmax": StateCodec(scale, "absmax"),
        "mse": StateCodec(scale, "mse"),
        "wmse": StateCodec(scale, "wmse", importance),
        "exact": StateCodec(scale, "wmse", importance, "exact"),
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("head_dim", [16, 32, 80])
@pytest.mark.parametrize("name", codecs())
def test_packed_equals_fake_quantized_to_the_bit(
    name: str, head_dim: int, dtype: torch.dtype
) -> None:
    x = states(head_dim=head_dim, dtype=dtype)
    codec = codecs(head_dim=head_dim)[name]
    rows = codec.pack(x)
    assert rows.dtype == torch.uint8
    assert rows.shape == (3, 2, 5, head_dim * 9 // 16)
    unpacked = codec.unpack(rows, dtype)
    assert unpacked.dtype == dtype
    assert torch.equal(unpacked, codec.round(x))


def test_every_head_has_its_own_importance() -> None:
    x = states()
    codec = codecs()["wmse"]
    rounded = codec.round(x)
    for head in range(2):
        assert codec.importance is not None
        expected = quantize(
            x[:, head],
            objective="wmse",
            importance=codec.importance[head],
            tensor_scale=codec.tensor_scale,
        )
        assert torch.equal(rounded[:, head], dequantize(expected, torch.bfloat16))


def test_queries_use_the_importance_of_the_head_that_they_read() -> None:
    codec = codecs()["wmse"]
    assert codec.importance is not None
    x = states(heads=6)
    rounded = codec.round(x)
    for head in range(6):
        own = StateCodec(codec.tensor_scale, "wmse", codec.importance[head // 3 : head // 3 + 1])
        assert torch.equal(rounded[:, head : head + 1], own.round(x[:, head : head + 1]))


def test_tokens_do_not_influence_each_other() -> None:
    x = states()
    codec = codecs()["wmse"]
    one_by_one = [codec.pack(x[:, :, t : t + 1]) for t in range(x.shape[2])]
    assert torch.equal(torch.cat(one_by_one, dim=2), codec.pack(x))


def test_a_codec_without_calibration_leaves_room_for_larger_states() -> None:
    x = states()
    codec = StateCodec.for_states(x)
    error = {}
    for factor in (0.01, 1.0, 16.0):
        y = x.float() * factor
        error[factor] = ((codec.round(y) - y).norm() / y.norm()).item()
    assert max(error.values()) < 1.05 * min(error.values())
    assert codec.round(torch.zeros_like(x)).abs().max() == 0


def test_head_dims_must_be_multiples_of_16() -> None:
    assert packed_size(64) == 36
    with pytest.raises(ValueError, match="head_dim is 24, not a multiple of 16"):
        packed_size(24)
