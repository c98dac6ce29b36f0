import pytest
import torch
from torch import Tensor

from scalesweep_hf.ops import blocks, e2m1
from scalesweep_hf.ops.blocks import pack, round_blocks, unpack
from scalesweep_hf.ops.nvfp4 import NVFP4Tensor, compute_tensor_scale, dequantize, quantize
from scalesweep_hf.ops.objectives import OBJECTIVES
from scalesweep_hf.ops.sweep import Window

ONE = torch.tensor(1.0)
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
GRID = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0, 0.0]
# Codes 0...7, 9...15, 0: the even index in the low nibble.
GRID_BYTES = [0x10, 0x32, 0x54, 0x76, 0xA9, 0xCB, 0xED, 0x0F]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def importance_for(objective: str, x: Tensor) -> Tensor | None:
    k = x.shape[-1]
    if OBJECTIVES[objective].coupled:
        rows = normal(k // 16, 32, 16, seed=7)  # [G, T, 16]
        return rows.mT @ rows
    return normal(k, seed=7).square() if OBJECTIVES[objective].weighted else None


def assert_same(a: NVFP4Tensor, b: NVFP4Tensor) -> None:
    assert torch.equal(a.packed, b.packed)
    assert torch.equal(a.block_scale.view(torch.uint8), b.block_scale.view(torch.uint8))
    assert torch.equal(a.tensor_scale, b.tensor_scale)


def test_packed_bytes_typed_by_hand() -> None:
    codes = torch.tensor([*range(8), *range(9, 16), 0], dtype=torch.uint8)
    assert pack(codes).tolist() == GRID_BYTES
    assert unpack(torch.tensor(GRID_BYTES, dtype=torch.uint8)).tolist() == codes.tolist()


def test_pack_undoes_unpack_for_every_byte() -> None:
    every = torch.arange(256, dtype=torch.uint8).reshape(4, 64)
    codes = unpack(every)
    assert codes.shape == (4, 128)
    assert int(codes.max()) == 15
    assert torch.equal(pack(codes), every)


def test_unpack_undoes_pack() -> None:
    codes = torch.randint(0, 16, (3, 5, 32), dtype=torch.uint8)
    assert torch.equal(unpack(pack(codes)), codes)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_block_on_the_grid_has_the_bytes_typed_by_hand(objective: str) -> None:
    x = torch.tensor([GRID, [2 * v for v in GRID]])
    q = quantize(x, objective=objective, importance=importance_for(objective, x), tensor_scale=ONE)
    assert q.packed.tolist() == [GRID_BYTES, GRID_BYTES]
    assert q.block_scale.view(torch.uint8).tolist() == [[0x38], [0x40]]
    assert torch.equal(dequantize(q), x)


def test_both_scales_multiply_towards_the_value() -> None:
    # S = .25; x / S = (6, 1.4, -.7, 0...): AbsMax scale 1, codes 6, 1.5, -.5 (0.7 is nearer .5).
    x = torch.tensor([1.5, 0.35, -0.175] + [0.0] * 13)
    q = quantize(x, objective="absmax", tensor_scale=torch.tensor(0.25))
    assert q.packed.tolist() == [0x37, 0x09, 0, 0, 0, 0, 0, 0]
    assert q.values().tolist()[:4] == [6.0, 1.5, -0.5, 0.0]
    assert dequantize(q).tolist()[:4] == [1.5, 0.375, -0.125, 0.0]


def test_mse_of_a_block_computed_by_hand() -> None:
    # All 5: scale 1 errs by 1 an element (5 ties to 4), 5 / 6 is not in E4M3, 5 / 4 is: 0x3A.
    q = quantize(torch.full((16,), 5.0), objective="mse", tensor_scale=ONE)
    assert q.block_scale.view(torch.uint8).tolist() == [0x3A]
    assert q.packed.tolist() == [0x66] * 8
    assert dequantize(q).tolist() == [5.0] * 16


@pytest.mark.parametrize("odd", range(3, 256, 12))
def test_both_divisions_are_exact_where_the_quotient_is(odd: int) -> None:
    # 1 / odd and 1 / s are not in float32, so that a multiplication would move some of these ties.
    scales = torch.arange(1, 127, dtype=torch.uint8).unsqueeze(-1)
    ties = torch.tensor([6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    tensor_scale = torch.tensor(float(odd))
    x = torch.cat([ties, -ties]) * scales.view(torch.float8_e4m3fn).float() * tensor_scale
    q = quantize(x, objective="absmax", tensor_scale=tensor_scale)
    assert torch.equal(q.block_scale.view(torch.uint8), scales)
    codes = torch.tensor([7, 0, 2, 2, 4, 4, 6, 6, 15, 0, 10, 10, 12, 12, 14, 14])
    assert torch.equal(unpack(q.packed).long(), codes.expand(126, 16))
    assert torch.equal(round_blocks(x, tensor_scale, objective="absmax"), q.values())


@pytest.mark.parametrize(
    ("objective", "largest"),
    [("absmax", 2688.0), ("four_over_six", 1536.0), ("mse", 1536.0), ("wmse", 1536.0)],
)
def test_tensor_scale_leaves_the_range_of_its_objective(objective: str, largest: float) -> None:
    assert compute_tensor_scale(torch.tensor(largest), objective).item() == 1.0
    assert compute_tensor_scale(torch.tensor(3 * largest), objective).item() == 3.0
    x = torch.zeros(2, 32)
    x[1, 5] = -largest / 2
    q = quantize(x, objective=objective, importance=importance_for(objective, x))
    assert q.tensor_scale.item() == 0.5
    assert q.tensor_scale.shape == ()
    assert q.tensor_scale.dtype == torch.float32


@pytest.mark.parametrize("amax", [0.0, 1e-45])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_tensor_scale_of_zero_or_underflow_is_one(objective: str, amax: float) -> None:
    assert compute_tensor_scale(torch.tensor(amax), objective).item() == 1.0
    x = torch.full((1, 16), amax)
    q = quantize(x, objective=objective, importance=importance_for(objective, x))
    assert q.tensor_scale.item() == 1.0
    assert not q.packed.any()
    assert dequantize(q).tolist() == [[0.0] * 16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_are_exact_for_every_code_and_scale(dtype: torch.dtype) -> None:
    codes = torch.tensor([*range(8), *range(9, 16), 0], dtype=torch.uint8).expand(126, 16)
    scales = torch.arange(1, 127, dtype=torch.uint8).reshape(126, 1).view(torch.float8_e4m3fn)
    values = NVFP4Tensor(pack(codes), scales, ONE).values(dtype)
    assert values.dtype == dtype
    exact = torch.tensor(GRID, dtype=torch.float64) * scales.double()
    assert torch.equal(values.double(), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_quantizing_again_changes_nothing(objective: str, dtype: torch.dtype) -> None:
    # With a power of two as S, x / S is exact, so a quantized block is on the grid again.
    x = normal(64, 64).to(dtype)
    importance = importance_for(objective, x)
    scale = torch.tensor(2.0**-8)
    once = dequantize(quantize(x, objective=objective, importance=importance, tensor_scale=scale))
    twice = quantize(once, objective=objective, importance=importance, tensor_scale=scale)
    assert torch.equal(dequantize(twice), once)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_sixteen_bit_input_is_quantized_as_its_float32_copy(
    objective: str, dtype: torch.dtype
) -> None:
    x = normal(8, 48).to(dtype)
    importance = importance_for(objective, x)
    assert_same(
        quantize(x, objective=objective, importance=importance),
        quantize(x.float(), objective=objective, importance=importance),
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_rounds_once_to_the_dtype(dtype: torch.dtype) -> None:
    q = quantize(normal(8, 32), tensor_scale=torch.tensor(0.0123))
    y = dequantize(q, dtype)
    assert y.dtype == dtype
    expected = e2m1.decode(unpack(q.packed)) * q.block_scale.float().repeat_interleave(16, -1)
    assert torch.equal(y, (expected * 0.0123).to(dtype))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("shape", [(32,), (1, 16), (5, 48), (2, 3, 32), (2, 1, 2, 16)])
def test_shapes(shape: tuple[int, ...], objective: str) -> None:
    x = normal(*shape)
    importance = importance_for(objective, x)
    q = quantize(x, objective=objective, importance=importance)
    assert q.shape == dequantize(q).shape == q.values().shape == x.shape
    assert q.packed.shape == (*shape[:-1], shape[-1] // 2)
    assert q.block_scale.shape == (*shape[:-1], shape[-1] // 16)
    assert q.nbytes == x.numel() // 2 + x.numel() // 16 + 4
    flat = quantize(x.reshape(-1, shape[-1]), objective=objective, importance=importance)
    assert torch.equal(q.packed.flatten(), flat.packed.flatten())


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 32)])
def test_no_rows_give_no_rows(shape: tuple[int, ...], objective: str) -> None:
    x = torch.zeros(shape)
    q = quantize(x, objective=objective, importance=importance_for(objective, x))
    assert q.shape == dequantize(q).shape == x.shape
    assert q.block_scale.shape == (*shape[:-1], shape[-1] // 16)
    assert q.tensor_scale.item() == 1.0


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 32)])
def test_rounding_no_rows_gives_no_rows(shape: tuple[int, ...]) -> None:
    assert round_blocks(torch.zeros(shape), ONE, objective="mse").shape == shape


@pytest.mark.parametrize("window", ["bounded", "exact"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_round_blocks_is_quantize_then_values(objective: str, window: Window) -> None:
    x = normal(3, 7, 32)
    importance = importance_for(objective, x)
    scale = torch.tensor(0.0031)
    q = quantize(
        x,
        objective=objective,
        importance=importance,
        window=window,
        tensor_scale=scale,
    )
    rounded = round_blocks(
        x,
        scale,
        objective=objective,
        importance=importance,
        window=window,
    )
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(rounded.view(torch.int16), q.values().view(torch.int16))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_round_blocks_saturates_beyond_the_static_scale(objective: str) -> None:
    x = torch.full((1, 16), 1e6)
    x[0, 1::2] = -1e6
    importance = importance_for(objective, x)
    rounded = round_blocks(x, ONE, objective=objective, importance=importance)
    assert rounded.tolist() == [[2688.0, -2688.0] * 8]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_round_blocks_keeps_nan_and_only_there(objective: str) -> None:
    x = normal(4, 32)
    x[1, 3] = torch.nan
    rounded = round_blocks(
        x, torch.tensor(0.002), objective=objective, importance=importance_for(objective, x)
    )
    assert torch.equal(rounded.isnan(), x.isnan())
    kept = round_blocks(
        x[2:], torch.tensor(0.002), objective=objective, importance=importance_for(objective, x)
    )
    assert torch.equal(rounded[2:], kept)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("chunk", [1, 100, 257])
def test_chunks_do_not_show(objective: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = normal(13, 32)
    shared = importance_for(objective, x)
    importance = normal(13, 32, seed=1).square() if objective == "wmse" else shared
    whole = quantize(x, objective=objective, importance=importance)
    rounded = round_blocks(x, ONE, objective=objective, importance=shared)
    monkeypatch.setattr(blocks, "CHUNK_CPU", chunk)
    assert_same(quantize(x, objective=objective, importance=importance), whole)
    assert torch.equal(round_blocks(x, ONE, objective=objective, importance=shared), rounded)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_strides_do_not_show_and_the_input_is_not_changed(objective: str) -> None:
    x = normal(32, 24).T
    assert not x.is_contiguous()
    importance = importance_for(objective, x)
    before = x.clone()
    kept = None if importance is None else importance.clone()
    q = quantize(x, objective=objective, importance=importance)
    assert_same(q, quantize(x.contiguous(), objective=objective, importance=importance))
    round_blocks(x, ONE, objective=objective, importance=importance)
    assert torch.equal(x, before)
    assert importance is None or (kept is not None and torch.equal(importance, kept))
