import pytest
import torch

from scalesweep_hf import staging

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("part", [staging.PART, 700_001, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float8_e4m3fn])
def test_every_byte_arrives_there_and_back(
    dtype: torch.dtype, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "PART", part)
    size = dtype.itemsize
    for shape in ((), (0, 16), (3, 5), (1025, 1024), (3, 700_001), (2048, 513)):
        bits = torch.randint(256, (*shape, size), dtype=torch.uint8)
        tensor = bits.view(dtype).reshape(shape)
        if len(shape) == 2:
            tensor = tensor.T  # not contiguous
        there = staging.carry(tensor, torch.device("cuda", 0))
        assert there.is_cuda
        back = staging.carry(there, torch.device("cpu"))
        assert back.device.type == "cpu"
        assert not back.is_pinned()
        assert back.dtype == dtype
        assert back.shape == tensor.shape
        expected, actual = (t.contiguous().reshape(-1).view(torch.uint8) for t in (tensor, back))
        assert torch.equal(actual, expected)


def test_what_is_there_already_is_not_copied() -> None:
    tensor = torch.zeros(2 << 20, device="cuda")
    assert staging.carry(tensor, tensor.device) is tensor
