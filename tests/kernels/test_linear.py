"""Products agree with float64 to the rounding of float32 sums, interpreted or on a GPU."""

import importlib
import os
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from scalesweep_hf import quantize
from scalesweep_hf.modules.linear import LinearRecipe, NVFP4Linear
from scalesweep_hf.ops.blocks import BACKENDS, Backend
from scalesweep_hf.ops.linear import linear, quantized_linear
from scalesweep_hf.ops.nvfp4 import NVFP4Tensor

# Interpreted kernels are numpy, which warns of NaN and overflow.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

HALVES = [torch.bfloat16, torch.float16]
# Tokens, N, K: tiles of 8 tokens, 16 rows and 128 columns, their edges, and what is decoded first.
SHAPES = [
    (1, 32, 1024),
    (1, 33, 4096 + 128),
    (1, 5, 272),
    (3, 33, 4096 + 128),
    (2, 17, 272),
    (8, 16, 16),
    (9, 31, 400),
    (16, 1, 32),
    (17, 48, 144),
    (32, 65, 128),
    (33, 40, 80),
    (65, 33, 48),
]


@pytest.fixture
def twin(device: str) -> Backend:
    pytest.importorskip("triton", reason="triton is not installed")
    importlib.import_module("scalesweep_hf.kernels.blocks")
    return BACKENDS["triton"]


def matrix(n: int, k: int, device: str, tensor_scale: float = 0.03) -> NVFP4Tensor:
    """Return a packed matrix of any codes and positive scales."""
    generator = torch.Generator().manual_seed(n + k)
    packed = torch.randint(0, 256, (n, k // 2), generator=generator, dtype=torch.uint8)
    scale = torch.randint(0, 127, (n, k // 16), generator=generator, dtype=torch.uint8)
    parts = packed, scale.view(torch.float8_e4m3fn), torch.tensor(tensor_scale)
    return NVFP4Tensor(*(part.to(device) for part in parts))


def tokens(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype).to(device)


def multiply(twin: Backend, x: Tensor, w: NVFP4Tensor, **options: Any) -> Tensor:
    return twin.multiply_blocks(x, w.packed, w.block_scale, w.tensor_scale, **options)


def check(y: Tensor, x: Tensor, w: NVFP4Tensor, scale: Tensor, bias: Tensor | None = None) -> None:
    """Check y: a rounding to its dtype, and the sum's error, that of tensor cores."""
    values = w.values(torch.float32).double()
    exact = x.double() @ values.T * scale.double()
    size = x.double().abs() @ values.abs().T * scale.double()
    if bias is not None:
        exact = exact + bias.double()
        size = size + bias.double().abs()
    rounding = torch.finfo(y.dtype).eps / 2
    if y.device.type == "cpu" and y.dtype == torch.bfloat16:
        rounding *= 2  # Triton's interpreter truncates
    bound = exact.abs() * rounding * 1.001 + size * 2.0**-21 + torch.finfo(y.dtype).tiny
    assert ((y.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", HALVES)
def test_products_have_the_error_of_float32_sums(
    twin: Backend, dtype: torch.dtype, shape: tuple[int, int, int], device: str
) -> None:
    t, n, k = shape
    w, x = matrix(n, k, device, 2.0**-9), tokens(t, k, dtype=dtype, device=device)
    y = multiply(twin, x, w)
    assert y.dtype == dtype
    assert y.shape == (t, n)
    check(y, x, w, w.tensor_scale)
    bias = tokens(n, dtype=dtype, device=device)
    check(multiply(twin, x, w, bias=bias), x, w, w.tensor_scale, bias)


@pytest.mark.parametrize(("t", "r", "warps"), [(3, 1, 4), (16, 4, 4), (30, 4, 4), (9, 2, 16)])
def test_programs_of_every_shape_have_the_same_products(
    twin: Backend, t: int, r: int, warps: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shapes that only a larger N takes, and one that shares out all of K evenly."""
    few = importlib.import_module("scalesweep_hf.kernels.few")
    monkeypatch.setattr(few, "_shape_of_programs", lambda *_: (r, warps))
    for k in (512, 1056, 2048) if device == "cuda" else (2048 if warps == 16 else 1056,):
        w, x = matrix(99, k, device), tokens(t, k, dtype=torch.bfloat16, device=device)
        check(multiply(twin, x, w), x, w, w.tensor_scale)


@pytest.mark.parametrize("t", [3, 40])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_both_scales_come_after_the_sum(
    twin: Backend, dtype: torch.dtype, t: int, device: str
) -> None:
    w, x = matrix(16, 64, device, 0.7), tokens(t, 64, dtype=torch.bfloat16, device=device)
    input_scale, bias = (
        torch.tensor(0.013, device=device),
        tokens(16, dtype=torch.float32, device=device),
    )
    y = multiply(twin, x, w, input_scale=input_scale, bias=bias, dtype=dtype)
    assert y.dtype == dtype
    check(y, x, w, input_scale * w.tensor_scale, bias)


@pytest.mark.parametrize("dtype", HALVES)
def test_every_code_with_every_scale_is_multiplied_exactly(
    twin: Backend, dtype: torch.dtype, device: str
) -> None:
    codes = torch.tensor([0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE], dtype=torch.uint8)
    packed = codes.expand(256, 8).contiguous().to(device)
    scale = torch.arange(256, dtype=torch.uint8)[:, None].to(device).view(torch.float8_e4m3fn)
    w = NVFP4Tensor(packed, scale, torch.tensor(1.0, device=device))
    eye = torch.eye(16, dtype=dtype, device=device)
    expected = w.values(dtype).T.nan_to_num(9999.0)
    # One token takes all 16 at once: each has bits of its own in the sum, which is exact.
    powers = 2.0 ** torch.arange(-8, 8, device=device)[None]
    exact = (powers.double() @ w.values(torch.float32).double().T).float().nan_to_num(9999.0)
    for before, after in ((0, 0), (0, 1), (1, 0)):  # blocks: scales come one by one, or in pairs
        count = before + 1 + after
        more = NVFP4Tensor(packed.repeat(1, count), scale.repeat(1, count), w.tensor_scale)
        x = torch.nn.functional.pad(powers, (16 * before, 16 * after)).to(dtype)
        y = multiply(twin, x, more, dtype=torch.float32)
        assert torch.equal(y.nan_to_num(9999.0), exact)
    packed, scale = torch.cat([packed, 0 * packed], 1), scale.repeat(1, 2)  # K divisible by 32
    wide = NVFP4Tensor(packed, scale, w.tensor_scale)
    y = multiply(twin, torch.cat([eye, 0 * eye], 1), wide)  # [16, 256]
    assert torch.equal(y.nan_to_num(9999.0), expected)


@pytest.mark.parametrize("t", [1, 3, 40])
def test_shapes_that_do_not_fit_are_refused(twin: Backend, t: int, device: str) -> None:
    w = matrix(24, 64, device)
    for k in (32, 48, 96):
        x = tokens(t, k, dtype=torch.bfloat16, device=device)
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            multiply(twin, x, w)
    x = tokens(t, 64, dtype=torch.bfloat16, device=device)
    with pytest.raises(RuntimeError, match="must match the size"):
        multiply(twin, x, w, bias=x[0, :5])
    with pytest.raises(RuntimeError):
        twin.round_blocks(x[:, :24], w.tensor_scale, objective="mse")
    with pytest.raises(RuntimeError):
        twin.encode_blocks(x, w.tensor_scale, objective="wmse", importance=x[0, :32].float() ** 2)
    with pytest.raises(RuntimeError):
        twin.decode_blocks(w.packed, w.block_scale[:, :2], torch.bfloat16)


@pytest.mark.parametrize("t", [1, 3, 40])
def test_autocast_leaves_sums_in_float32(twin: Backend, t: int, device: str) -> None:
    w, x = matrix(16, 1024, device), tokens(t, 1024, dtype=torch.bfloat16, device=device)
    for backend in (twin, BACKENDS["torch"]):
        expected = multiply(backend, x, w, dtype=torch.float32)
        with torch.autocast(device, torch.float16):
            found = multiply(backend, x, w, dtype=torch.float32)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("t", [1, 3, 40])
def test_one_row_of_a_wider_tensor(twin: Backend, t: int, device: str) -> None:
    w, x = matrix(1, 64, device), tokens(t, 64, dtype=torch.bfloat16, device=device)
    wider = torch.cat([w.packed, w.packed[:, :1]], 1)
    view = NVFP4Tensor(wider[:, :32], w.block_scale, w.tensor_scale)
    assert torch.equal(multiply(twin, x, view), multiply(twin, x, w))


@pytest.mark.parametrize("t", [1, 7, 34])
def test_input_is_read_as_it_is_seen(twin: Backend, t: int, device: str) -> None:
    w = matrix(24, 96, device)
    x = tokens(96, 2, t, dtype=torch.bfloat16, device=device).permute(1, 2, 0)
    y = multiply(twin, x, w)
    assert y.shape == (2, t, 24)
    assert torch.equal(y, multiply(twin, x.contiguous(), w))
    other = NVFP4Tensor(w.packed.T.contiguous().T, w.block_scale, w.tensor_scale)
    assert torch.equal(y, multiply(twin, x, other))
    odd = torch.empty(w.packed.numel() + 1, dtype=torch.uint8, device=device)[1:]
    odd = odd.view_as(w.packed).copy_(w.packed)
    assert torch.equal(y, multiply(twin, x, NVFP4Tensor(odd, w.block_scale, w.tensor_scale)))


def test_no_tokens_and_no_rows(twin: Backend, device: str) -> None:
    w = matrix(24, 96, device)
    x = tokens(2, 0, 96, dtype=torch.bfloat16, device=device)
    assert multiply(twin, x, w).shape == (2, 0, 24)
    none = NVFP4Tensor(w.packed[:0], w.block_scale[:0], w.tensor_scale)
    assert multiply(twin, x.new_ones(3, 96), none).shape == (3, 0)


@pytest.mark.parametrize("t", [2, 40])
def test_nan_and_infinity_stay_in_their_token(twin: Backend, t: int, device: str) -> None:
    w, x = matrix(16, 64, device), tokens(t, 64, dtype=torch.bfloat16, device=device)
    expected = multiply(twin, x, w)
    x[0, 5], x[1, 7] = torch.nan, torch.inf
    y = multiply(twin, x, w)
    assert y[0].isnan().all()
    assert not y[1].isfinite().any()
    assert torch.equal(y[2:], expected[2:])


def test_float32_input_has_the_bits_of_the_definition(twin: Backend, device: str) -> None:
    w, x = matrix(16, 64, device), tokens(3, 64, dtype=torch.float32, device=device)
    assert torch.equal(multiply(twin, x, w), linear(x, w))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("t", [3, 40])
@pytest.mark.usefixtures("twin")
def test_gradients_are_those_of_the_dequantized_linear(
    t: int, graph: bool, backend: str, device: str
) -> None:
    w = matrix(24, 64, device, 2.0**-9)
    bias = tokens(24, dtype=torch.bfloat16, device=device).requires_grad_()
    x = tokens(2, t, 64, dtype=torch.bfloat16, device=device).requires_grad_()

    def run(x: Tensor, bias: Tensor) -> Tensor:
        return linear(x, w, bias, backend=backend)

    if graph:
        torch.compiler.reset()
        run = torch.compile(run, fullgraph=True, backend="aot_eager")
    y = run(x, bias)
    weight = tokens(2, t, 24, dtype=torch.bfloat16, device=device)
    (y * weight).sum().backward()
    assert x.grad is not None
    assert bias.grad is not None
    back = NVFP4Tensor.values(w, torch.float32).double()
    exact = weight.double() @ back * w.tensor_scale.double()
    torch.testing.assert_close(x.grad.double(), exact, rtol=2.0**-7, atol=1e-5)
    torch.testing.assert_close(
        bias.grad.double(), weight.double().sum((0, 1)), rtol=2.0**-7, atol=1e-5
    )


@pytest.mark.parametrize("activations", [None, "mse"])
@pytest.mark.parametrize("t", [1, 40])
def test_graphs_have_the_bits_of_direct_calls(
    twin: Backend, t: int, activations: str | None, device: str
) -> None:
    module = NVFP4Linear(64, 24, recipe=LinearRecipe("mse", activations, "bounded"), device=device)
    module = module.to(torch.bfloat16)
    packed = quantize(module.weight.detach())
    names = {"weight": packed.packed, "weight_scale": packed.block_scale}
    names |= {"weight_scale_2": packed.tensor_scale, "input_scale": torch.tensor(0.01).to(device)}
    module.set_packed(names)
    module.backend = "triton"
    x = tokens(t, 64, dtype=torch.bfloat16, device=device)
    torch.compiler.reset()
    compiled: Any = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), module(x))


def test_the_operator_keeps_what_torch_asks_of_operators(twin: Backend, device: str) -> None:
    w = matrix(16, 32, device)
    x = tokens(3, 32, dtype=torch.float16, device=device).requires_grad_()
    operator: Any = torch.ops.scalesweep_hf.triton_multiply.default
    arguments = (x, w.packed, w.block_scale, w.tensor_scale, None, None, torch.float16)
    # Not its schema test, which multiplies every argument by something: float8 has no product.
    utils = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(operator, arguments, test_utils=utils)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from scalesweep_hf.kernels.few import _few_kernel

OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}
types = {"x_ptr": "*bf16", "packed_ptr": "*i32", "block_scale_ptr": "*i16", "y_ptr": "*bf16"}
types |= {"tensor_scale_ptr": "*fp32", "input_scale_ptr": "*fp32", "bias_ptr": "*bf16"}
types |= {"N": "i32", "K": "i32", "tokens": "i32"}
constants = {"TILES": 2, "R": 2, "W": 8, "EVEN": True}
constants |= {"CONVERTS": CAPABILITY >= 89, "SCALES_INPUT": False, "BIAS": False}
constants |= {"OVERLAPS": CAPABILITY >= 90}
signature = {name: types.get(name, "constexpr") for name in _few_kernel.arg_names}
names = [name for name in types if name != "tokens"]
aligned = {(_few_kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in names}
source = ASTSource(_few_kernel, signature, constants, aligned)
kernel = triton.compile(source, target=GPUTarget("cuda", CAPABILITY, 32), options=OPTIONS)
print(kernel.asm["ttgir"], kernel.asm["ptx"], sep=SEPARATOR)
"""
SEPARATOR = "\n-----\n"


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100, 120])
def test_operands_are_loaded_and_decoded_where_they_are_multiplied(capability: int) -> None:
    """Threads have the elements of their number, and before the last product share nothing."""
    pytest.importorskip("triton", reason="triton is not installed")
    script = COMPILE.replace("CAPABILITY", str(capability)).replace("SEPARATOR", repr(SEPARATOR))
    env = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    ttgir, ptx = done.stdout.split(SEPARATOR)
    calls = [line for line in ttgir.splitlines() if "mma.sync" in line]
    (layout,) = {name for line in calls for name in re.findall(r"tensor<256x\w+, (#\w+)>", line)}
    one_by_one = "sizePerThread = [1], threadsPerWarp = [32], warpsPerCTA = [8], order = [0]"
    assert f"{layout} = #ttg.blocked<{{{one_by_one}" in ttgir
    assert ptx.count("mma.sync") == 2 * 2 * 8  # tiles, 16 rows, of 128 columns
    products = ptx[: ptx.rindex("mma.sync")]
    assert not re.findall(r"(?:ld|st)\.shared|shfl|matrix", products)
    waits = ptx.find("griddepcontrol.wait")
    assert (waits >= 0) == (capability >= 90)
    assert waits < ptx.index("ld.global")
    assert ptx.count("v2.b64") == 2 * 4 + 2 * 4  # weights, now and ahead, and x, 16 bytes at a time


def needs_cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    importlib.import_module("scalesweep_hf.kernels.blocks")


@pytest.mark.gpu
@pytest.mark.parametrize("t", [1, 16, 40, 1024])
@pytest.mark.parametrize("activations", [None, "mse"])
def test_cuda_graphs_replay_products(t: int, activations: str | None) -> None:
    needs_cuda()
    w, x = matrix(256, 512, "cuda"), tokens(t, 512, dtype=torch.bfloat16, device="cuda")
    input_scale = torch.tensor(0.01, device="cuda")

    def run() -> Tensor:
        if activations is None:
            return linear(x, w, backend="triton")
        options: dict[str, Any] = {"input_scale": input_scale, "objective": activations}
        options |= {"importance": None, "window": "bounded", "backend": "triton"}
        return quantized_linear(x, w, None, **options)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(torch.cuda.Stream()):
        run()  # compiles
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        y = run()
    x.copy_(tokens(2, t, 512, dtype=torch.bfloat16, device="cuda")[1])
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, run())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("biased", [False, True])
def test_scales_that_cublas_applies_come_after_the_sum_too(
    dtype: torch.dtype, biased: bool
) -> None:
    needs_cuda()
    twin = BACKENDS["triton"]
    w, x = matrix(4096, 512, "cuda", 0.0123), tokens(1100, 512, dtype=dtype, device="cuda")
    w = NVFP4Tensor(w.packed, w.block_scale, w.tensor_scale * 2.0**-9)
    bias = tokens(4096, dtype=dtype, device="cuda") if biased else None
    input_scale = torch.tensor(0.77, device="cuda")
    check(multiply(twin, x, w, bias=bias), x, w, w.tensor_scale, bias)
    y = multiply(twin, x, w, bias=bias, input_scale=input_scale)
    check(y, x, w, input_scale * w.tensor_scale, bias)


@pytest.mark.gpu
@pytest.mark.parametrize("t", [1, 1100])
def test_a_scale_that_changes_is_noticed(t: int) -> None:
    needs_cuda()
    twin = BACKENDS["triton"]
    w, x = matrix(4096, 512, "cuda"), tokens(t, 512, dtype=torch.bfloat16, device="cuda")
    multiply(twin, x, w)
    w.tensor_scale.mul_(1.37)
    check(multiply(twin, x, w), x, w, w.tensor_scale)
    w.tensor_scale.data.mul_(0.71)  # which torch does not count as a change
    values = w.values(torch.float32).double()
    exact = x.double() @ values.T * w.tensor_scale
    size = x.double().abs() @ values.abs().T * w.tensor_scale
    # A rounding of y, and one of every weight, each by up to 2**-8 of it.
    error = (multiply(twin, x, w).double() - exact).abs()
    assert (error <= 2.0**-8 * (exact.abs() + size) * 1.01).all()
    assert error.mean() < 2.0**-7 * exact.abs().mean()  # 0.29 of it, had it not been noticed


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("t", [2, 40])
def test_more_weights_than_int32_counts(t: int) -> None:
    needs_cuda()
    n, k = (1 << 17) + 5, 1 << 14
    generator = torch.Generator("cuda").manual_seed(0)
    packed = torch.randint(
        0, 256, (n, k // 2), generator=generator, dtype=torch.uint8, device="cuda"
    )
    scale = torch.full((n, k // 16), 56, dtype=torch.uint8, device="cuda")
    w = NVFP4Tensor(packed, scale.view(torch.float8_e4m3fn), torch.tensor(0.1, device="cuda"))
    x = tokens(t, k, dtype=torch.bfloat16, device="cuda")
    y = multiply(BACKENDS["triton"], x, w)
    for part in (slice(0, 64), slice(n - 64, n)):
        rows = NVFP4Tensor(w.packed[part], w.block_scale[part], w.tensor_scale)
        check(y[:, part], x, rows, w.tensor_scale)
