"""The product of one token agrees with float64, whatever its shape, values and programs."""

import importlib
import os
import re
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from scalesweep_hf.ops.blocks import BACKENDS, Backend
from tests.kernels.test_linear import HALVES, check, matrix, multiply, tokens

# Interpreted kernels are numpy, which warns of NaN and overflow.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture
def twin(device: str) -> Backend:
    pytest.importorskip("triton", reason="triton is not installed")
    importlib.import_module("scalesweep_hf.kernels.blocks")
    return BACKENDS["triton"]


# Rows, columns: a step of 4 or 8 warps, several, part of one, half a pair of blocks, one block.
SHAPES = [(16, 1024), (17, 4096), (40, 2048 + 128), (33, 864), (3, 1040), (7, 16)]


PROGRAMS = [(8, True, 128), (4, True, 128), (4, False, 72)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", HALVES)
def test_every_shape_of_programs_has_the_error_of_float32_sums(
    twin: Backend,
    dtype: torch.dtype,
    shape: tuple[int, int],
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vector = importlib.import_module("scalesweep_hf.kernels.vector")
    n, k = shape
    own = (SHAPES.index(shape) + HALVES.index(dtype)) % 3  # interpreted programs are slow
    for programs in PROGRAMS if device == "cuda" else PROGRAMS[own : own + 1]:
        monkeypatch.setattr(vector, "_shape_of_programs", lambda *_, use=programs: use)
        check_one_token(twin, n, k, dtype, device)


def check_one_token(twin: Backend, n: int, k: int, dtype: torch.dtype, device: str) -> None:
    w, x = matrix(n, k, device, 2.0**-9), tokens(1, k, dtype=dtype, device=device)
    bias, input_scale = tokens(n, dtype=dtype, device=device), torch.tensor(0.7, device=device)
    y = multiply(twin, x, w, bias=bias, input_scale=input_scale)
    check(y, x, w, w.tensor_scale * input_scale, bias)


def test_programs_are_there_at_once_with_registers_to_spare() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    vector = importlib.import_module("scalesweep_hf.kernels.vector")
    for rows in (16, 4096, 4240, 8192, 14336):
        tiles = -(-rows // 16)
        warps, _, registers = vector._shape_of_programs(tiles, 132)
        assert -(-tiles // 132) * warps * 32 * registers <= 65536


@pytest.mark.parametrize("power", [-60, 31, 34, 100])
def test_x_may_be_as_large_or_small_as_bfloat16_is(twin: Backend, power: int, device: str) -> None:
    w = matrix(20, 1024, device, 2.0**-9)
    x = tokens(1, 1024, dtype=torch.bfloat16, device=device)
    x = torch.cat([x[:, :512] * 2.0**power, x[:, 512:]], 1) if power > 0 else x * 2.0**power
    y = multiply(twin, x, w, dtype=torch.float32)
    assert y.isfinite().all()
    check(y, x, w, w.tensor_scale)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", HALVES)
def test_nan_and_infinity_come_out_as_in_the_definition(
    twin: Backend, dtype: torch.dtype, value: float, device: str
) -> None:
    w, x = matrix(40, 288, device), tokens(1, 288, dtype=dtype, device=device)
    x[0, 37] = value
    y = multiply(twin, x, w, dtype=torch.float32)
    expected = multiply(BACKENDS["torch"], x, w, dtype=torch.float32)
    assert not expected.isfinite().any()
    assert torch.equal(y.nan_to_num(), expected.nan_to_num())
    assert torch.equal(y.isnan(), expected.isnan())


@pytest.mark.parametrize("place", [0, 100, 287])
def test_each_column_meets_its_own_weight(twin: Backend, place: int, device: str) -> None:
    w, x = matrix(20, 288, device, 1.0), torch.zeros(1, 288, device=device)
    x[0, place] = 1.0
    y = multiply(twin, x.to(torch.bfloat16), w, dtype=torch.float32)
    assert torch.equal(y[0], w.values(torch.float32)[:, place])


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from scalesweep_hf.kernels.vector_kernel import vector_kernel

NEW = CAPABILITY >= 90
types = {"x_ptr": "*HALF", "packed_ptr": "*i64", "block_scale_ptr": "*u8", "y_ptr": "*HALF"}
types |= {"tensor_scale_ptr": "*fp32", "input_scale_ptr": "*fp32", "bias_ptr": "*HALF"}
types |= {"N": "i32", "G": "i32", "STEPS": "i32"}
constants = {"W": 8, "AHEAD": True, "PAIRED": True, "EVEN": True, "CONVERTS": NEW}
constants |= {"SCALES_INPUT": False, "BIAS": False, "OVERLAPS": NEW}
signature = {name: types.get(name, "constexpr") for name in vector_kernel.arg_names}
names = [name for name in types if name != "STEPS"]
aligned = {(vector_kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in names}
source = ASTSource(vector_kernel, signature, constants, aligned)
options = {"num_warps": 8, "enable_fp_fusion": False, "maxnreg": 128}
kernel = triton.compile(source, target=GPUTarget("cuda", CAPABILITY, 32), options=options)
print(kernel.asm["ptx"])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "half"),
    [(80, "bf16"), (90, "bf16"), (90, "fp16"), (100, "bf16"), (120, "fp16")],
)
def test_operands_are_loaded_and_decoded_where_they_are_multiplied(
    capability: int, half: str
) -> None:
    """Until the first sum of threads, nothing goes through shared memory or to other threads."""
    pytest.importorskip("triton", reason="triton is not installed")
    script = COMPILE.replace("CAPABILITY", str(capability)).replace("HALF", half)
    env = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    products = [match.start() for match in re.finditer("mma.sync", done.stdout)]
    exchanges = re.search(r"(?:ld|st)\.shared|shfl|matrix", done.stdout)
    assert exchanges is not None
    # 16 in the loop, 16 after it: what bfloat16 may compute again is not counted.
    assert sum(start < exchanges.start() for start in products) == 32
    waits = done.stdout.find("griddepcontrol.wait")
    assert (waits >= 0) == (capability >= 90)
    assert waits < done.stdout.index("ld.global")


@pytest.mark.gpu
@pytest.mark.parametrize("t", [1, 4])
def test_products_that_overlap_read_what_the_one_before_wrote(t: int) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    importlib.import_module("scalesweep_hf.kernels.blocks")
    torch.use_deterministic_algorithms(False)  # which fills new memory by a kernel between two
    twin = BACKENDS["triton"]
    w = matrix(2048, 2048, "cuda", 2.0**-12)
    first = tokens(t, 2048, dtype=torch.bfloat16, device="cuda")

    def run(wait: bool) -> Tensor:
        x = first
        for _ in range(60):  # memory of earlier results is given to later ones
            x = multiply(twin, x, w)
            if wait:
                torch.cuda.synchronize()
        return x

    expected = run(wait=True)
    assert expected.isfinite().all()
    assert expected.any()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(wait=False)
    for _ in range(20):
        assert torch.equal(run(wait=False), expected)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(captured, expected)
