"""What `quantize` and `round_blocks` take and refuse, and what whole weights cost and lose."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from scalesweep_hf.ops.blocks import round_blocks
from scalesweep_hf.ops.nvfp4 import dequantize, quantize
from scalesweep_hf.ops.objectives import OBJECTIVES, check_objective
from scalesweep_hf.ops.sweep import Window

ONE = torch.tensor(1.0)
NAN = float("nan")
INF = float("inf")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def holding(value: float) -> Tensor:
    x = normal(2, 3, 32)
    x[1, 2, 31] = value
    return x


def wmse(importance: Tensor) -> dict[str, Any]:
    return {"objective": "wmse", "importance": importance}


X = normal(2, 3, 32)
REFUSED = [
    pytest.param(holding(NAN), {}, r"max\|x\| = nan.*clean x", id="nan"),
    pytest.param(holding(INF), {}, r"max\|x\| = inf.*clean x", id="inf"),
    pytest.param(holding(-INF), {}, r"max\|x\| = inf.*clean x", id="minus_inf"),
    pytest.param(normal(2, 17), {}, r"shape \[2, 17\].*multiple of 16.*pad", id="17"),
    pytest.param(normal(2, 8), {}, r"shape \[2, 8\].*multiple of 16", id="8"),
    pytest.param(normal(2, 0), {}, r"shape \[2, 0\].*positive multiple of 16", id="no_columns"),
    pytest.param(ONE, {}, r"shape \[\].*multiple of 16", id="scalar"),
    pytest.param(torch.zeros(2, 16, dtype=torch.int32), {}, "torch.int32.*floating", id="int32"),
    pytest.param(torch.zeros(2, 16, dtype=torch.bool), {}, "torch.bool.*floating", id="bool"),
    pytest.param(X, {"objective": "best"}, "objective is 'best'; use one of absmax", id="unknown"),
    pytest.param(X, {"objective": "wmse"}, "'wmse' needs importance", id="no_importance"),
    pytest.param(X, {"importance": X.abs()}, "'mse' does not use importance", id="unused"),
    pytest.param(
        X, {"objective": "absmax", "importance": X.abs()}, "'absmax' does not use", id="unused_abs"
    ),
    pytest.param(X, wmse(normal(31).abs()), r"\[31\] does not broadcast to x \[2, 3", id="shape"),
    pytest.param(X, wmse(normal(4, 2, 3, 32).abs()), "does not broadcast", id="larger"),
    pytest.param(X, wmse(-torch.ones(32)), "negative, NaN or infinite", id="negative"),
    pytest.param(X, wmse(torch.full((32,), NAN)), "negative, NaN or infinite", id="nan_weight"),
    pytest.param(X, wmse(torch.full((32,), INF)), "negative, NaN or infinite", id="inf_weight"),
    pytest.param(X, {"tensor_scale": -ONE}, "tensor_scale is .*one finite number > 0", id="S<0"),
    pytest.param(X, {"tensor_scale": 0 * ONE}, "one finite number > 0", id="S=0"),
    pytest.param(X, {"tensor_scale": NAN * ONE}, "one finite number > 0", id="S_nan"),
    pytest.param(X, {"tensor_scale": INF * ONE}, "one finite number > 0", id="S_inf"),
    pytest.param(X, {"tensor_scale": torch.ones(2)}, "one finite number > 0", id="S_two"),
    pytest.param(X, {"window": "all"}, "window is 'all'; use 'bounded', 'exact'", id="window"),
    pytest.param(X, {"window": (1, 2)}, r"window is \(1, 2\).*low <= 0 <= high", id="above"),
    pytest.param(X, {"window": (-3, -1)}, "low <= 0 <= high", id="below"),
    pytest.param(X, {"window": (-3,)}, r"window is \(-3,\)", id="single"),
    pytest.param(X, {"window": (-3.0, 7)}, r"window is \(-3.0, 7\)", id="float"),
    pytest.param(X, {"window": (False, 7)}, r"window is \(False, 7\)", id="bool_window"),
    pytest.param(
        X,
        {"window": 7},
        "window is 7",
        id="int",
    ),
    pytest.param(
        X,
        {"objective": "absmax", "window": "all"},
        "window is 'all'",
        id="absmax_window",
    ),
    pytest.param(
        torch.full((1, 16), 1e300, dtype=torch.float64),
        {},
        r"max\|x\| = ",
        id="float64",
    ),
    pytest.param(
        X,
        {"tensor_scale": torch.tensor(1e-60, dtype=torch.float64)},
        "one finite number > 0",
        id="S_underflow",
    ),
]


@pytest.mark.parametrize(("x", "options", "message"), REFUSED)
def test_wrong_input_raises_with_the_value(
    x: Tensor, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        quantize(x, **options)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_check_objective_takes_what_exists(name: str) -> None:
    check_objective(name)
    with pytest.raises(
        ValueError, match=f"{name}_'; use one of absmax, four_over_six, mse, wmse, hessian"
    ):
        check_objective(name + "_")


@pytest.mark.parametrize(
    "shape", [(32,), (1, 32), (3, 32), (3, 1), (2, 1, 32), (2, 3, 32), (1,), ()]
)
def test_importance_broadcasts_as_if_written_out(shape: tuple[int, ...]) -> None:
    importance = normal(*shape, seed=3).square()
    written_out = importance.expand(X.shape).contiguous()
    a, b = quantize(X, **wmse(importance)), quantize(X, **wmse(written_out))
    assert torch.equal(a.packed, b.packed)
    assert torch.equal(a.block_scale.view(torch.uint8), b.block_scale.view(torch.uint8))


def test_importance_of_a_row_moves_only_that_row() -> None:
    importance = torch.ones(2, 3, 32)
    importance[1, 0] = normal(32, seed=5).abs() ** 4
    changed, plain = quantize(X, **wmse(importance)), quantize(X, **wmse(torch.ones(32)))
    rows = (dequantize(changed) != dequantize(plain)).any(-1)
    assert rows.tolist() == [[False, False, False], [True, False, False]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_importance_and_tensor_scale_of_any_dtype_work_as_float32(dtype: torch.dtype) -> None:
    importance = normal(32, seed=3).square().to(dtype)
    scale = torch.tensor([0.0031], dtype=dtype)
    a = quantize(X, **wmse(importance), tensor_scale=scale)
    b = quantize(X, **wmse(importance.float()), tensor_scale=scale.float())
    assert a.tensor_scale.shape == ()
    assert torch.equal(dequantize(a), dequantize(b))


def test_a_parameter_leaves_no_graph() -> None:
    q = quantize(torch.nn.Parameter(normal(2, 32)))
    assert not q.tensor_scale.requires_grad


@pytest.mark.parametrize("window", ["bounded", "exact"])
@pytest.mark.parametrize("huge", [1e12, INF])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_infinity_saturates(objective: str, huge: float, window: Window) -> None:
    x = normal(1, 16)
    x[0, 3], x[0, 4] = huge, -huge
    kind = OBJECTIVES[objective]
    importance = torch.ones(16) if kind.weighted else torch.eye(16)[None] if kind.coupled else None
    y = round_blocks(x, ONE, objective=objective, importance=importance, window=window)
    assert y[0, 3:5].tolist() == [2688.0, -2688.0]


@pytest.fixture(scope="module")
def weight() -> Tensor:
    return normal(4096, 4096)


@pytest.mark.parametrize(
    ("objective", "nmse"), [("absmax", 0.00904), ("four_over_six", 0.00756), ("mse", 0.00660)]
)
def test_error_of_a_normal_weight_to_three_digits(
    weight: Tensor, objective: str, nmse: float
) -> None:
    error = (dequantize(quantize(weight, objective=objective)) - weight).square_().sum()
    assert round((error / weight.square().sum()).item(), 5) == nmse


# VmHWM, not ru_maxrss: the latter starts from the peak of the parent process.
MEMORY = """
import re, torch
from pathlib import Path
from scalesweep_hf import quantize
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
quantize(torch.randn(64, 1024))
x = torch.empty(4096, 14336).normal_()
before = peak()
result = quantize(x)
print(peak() - before, x.nbytes, result.nbytes)
"""


@pytest.fixture(scope="module")
def memory() -> tuple[int, int, int]:
    """Bytes that quantizing a large weight adds to the peak, of the weight, and of the result."""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    done = subprocess.run([sys.executable, "-c", MEMORY], check=True, capture_output=True)
    beyond, own, result = map(int, done.stdout.split())
    return beyond, own, result


@pytest.mark.slow
def test_quantizing_a_large_weight_needs_less_than_a_gigabyte(
    memory: tuple[int, int, int],
) -> None:
    beyond, own, result = memory
    assert own == 4096 * 14336 * 4
    assert result == 4096 * 14336 * 9 // 16 + 4
    assert beyond < 1e9


@pytest.mark.slow
def test_quantizing_needs_a_few_megabytes_beyond_input_and_result(
    memory: tuple[int, int, int],
) -> None:
    beyond, _, result = memory
    assert beyond < result + 50e6
