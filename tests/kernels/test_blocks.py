"""Every backend has the bits of the definition: numba's, Triton's interpreted or on a GPU."""

import importlib
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from scalesweep_hf import kernels
from scalesweep_hf.modules.linear import (
    LinearRecipe,
    NVFP4Linear,
    quantize_group,
    share_input_importance,
)
from scalesweep_hf.ops import blocks as definition
from scalesweep_hf.ops import e2m1, e4m3
from scalesweep_hf.ops.blocks import BACKENDS, Backend
from scalesweep_hf.ops.objectives import RUNTIME_OBJECTIVES

# Interpreted kernels are numpy, which warns of NaN and overflow.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

ONE = torch.tensor(1.0)
NAN, INF = float("nan"), float("inf")
WINDOWS = ["bounded", "exact", (-2, 5)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MODULES = {"numba": "cpu", "triton": "blocks"}


@pytest.fixture(params=list(MODULES))
def backend(request: pytest.FixtureRequest, device: str) -> str:
    name = str(request.param)
    pytest.importorskip(name, reason=f"{name} is not installed")
    if name == "numba" and device == "cuda":
        pytest.skip("numba's loops are for the CPU")
    importlib.import_module(f"scalesweep_hf.kernels.{MODULES[name]}")
    return name


@pytest.fixture
def twin(backend: str) -> Backend:
    return BACKENDS[backend]


@pytest.fixture
def interpreted(backend: str, device: str) -> bool:
    return backend == "triton" and device == "cpu"


def hard_rows(k: int) -> Tensor:
    """Return rows [R, k] of what goes wrong first: ties, zeros, extremes, tiny blocks."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(k, generator=generator)
    midpoints = torch.tensor(e2m1.MIDPOINTS)
    ties = midpoints[torch.arange(k) % 7] * torch.tensor([1.0, 2.0, 1.125, 1.875])[:, None]
    codes = torch.randint(1, 127, (6, k // 16), generator=generator, dtype=torch.uint8)
    scale = e4m3.decode(codes).repeat_interleave(16, 1)
    on_ties = midpoints[torch.randint(0, 7, (6, k), generator=generator)] * scale
    return torch.cat(
        [
            torch.stack([normal, normal * 1e-4, normal * 3e4, normal**5]),
            ties,
            on_ties,
            torch.nextafter(on_ties, torch.zeros(())),
            -torch.nextafter(on_ties, torch.full((), INF)),
            torch.stack([torch.zeros(k), torch.full((k,), -0.0), torch.full((k,), 5.5 * 2.0**-9)]),
            torch.stack([normal.sign(), torch.full((k,), 1e-45), torch.full((k,), 448.0 * 6)]),
            normal[None] * 2.0**-10,
        ]
    )


def broken_rows(k: int) -> Tensor:
    x = hard_rows(k)[:4].clone()
    x[0, 3], x[1, 17], x[2, 18] = NAN, INF, -INF
    x[3] = NAN
    return x


def importances(k: int, rows: int) -> dict[str, Tensor]:
    """Return importances by name, with zeros, subnormals and huge numbers."""
    generator = torch.Generator().manual_seed(1)
    shared = torch.rand(k, generator=generator) ** 4
    shared[: k // 4] = 0.0
    own = torch.rand(rows, k, generator=generator) * torch.logspace(-44, 38, rows)[:, None]
    return {"shared": shared, "per row": own}


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same bits, all NaN being one."""
    a, b = a.detach().cpu(), b.detach().cpu()
    if a.is_floating_point():
        a, b = (torch.where(t.isnan(), torch.full_like(t, NAN), t) for t in (a, b))
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("objective", [*RUNTIME_OBJECTIVES, "wmse, per row"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_twins_agree_to_the_bit(
    twin: Backend, dtype: torch.dtype, objective: str, window: Any, device: str, interpreted: bool
) -> None:
    if interpreted and window == "exact" and dtype != torch.float32:
        pytest.skip("interpreted, exact windows take float32 alone")
    x = torch.cat([hard_rows(80), broken_rows(80)]).to(dtype).to(device)
    objective, _, own = objective.partition(", ")
    importance = None
    if objective == "wmse":
        importance = importances(80, len(x))[own or "shared"].to(device)
    options = {"objective": objective, "importance": importance, "window": window}
    for tensor_scale in (ONE.to(device), torch.tensor(0.0123, device=device)):
        found, expected = (
            module.encode_blocks(x, tensor_scale, **options) for module in (twin, definition)
        )
        assert same(found[1], expected[1])
        assert same(found[0], expected[0])
        values = twin.round_blocks(x, tensor_scale, **options)
        assert same(values, definition.round_blocks(x, tensor_scale, **options))


def test_tiny_and_huge_tensor_scales(twin: Backend, device: str) -> None:
    x = hard_rows(32).to(device)
    for scale in (1e-44, 2.0**-126, 1e-30, 1e30):
        tensor_scale = torch.tensor(scale, device=device)
        for factor in (1.0, scale):
            found = twin.round_blocks(x * factor, tensor_scale, objective="mse")
            expected = definition.round_blocks(x * factor, tensor_scale, objective="mse")
            assert same(found, expected)


def test_quotients_are_rounded_as_ieee_does_it(
    twin: Backend, device: str, interpreted: bool
) -> None:
    """AbsMax codes of random numbers under random tensor scales: a wrong last bit moves some."""
    generator = torch.Generator().manual_seed(4)
    rows = 1 << 8 if interpreted else 1 << 14
    for _ in range(4 if interpreted else 8):
        x = torch.randn(rows, 64, generator=generator).to(device)
        tensor_scale = torch.rand((), generator=generator).to(device) * 1e-2
        found = twin.encode_blocks(x, tensor_scale, objective="mse")
        expected = definition.encode_blocks(x, tensor_scale, objective="mse")
        assert same(found[0], expected[0])
        assert same(found[1], expected[1])


def test_the_neighbours_of_every_midpoint_stay_on_their_side() -> None:
    """What `rounding_error` and `cpu_loops.losses` rest on, for all mantissas of a scale."""
    for mantissa in range(8, 16):
        scale = Fraction(mantissa, 8)
        inverse = Fraction(float(torch.tensor(1.0) / torch.tensor(float(scale))))
        for midpoint in map(Fraction, e2m1.MIDPOINTS):
            tie = torch.tensor(float(midpoint * scale))
            assert Fraction(float(tie)) == midpoint * scale
            below, above = (torch.nextafter(tie, torch.tensor(to)) for to in (0.0, INF))
            assert Fraction(float(below)) * inverse < midpoint < Fraction(float(above)) * inverse


def packed_linear(activations: str | None, device: str) -> NVFP4Linear:
    recipe = LinearRecipe("wmse", activations, "bounded")
    module = NVFP4Linear.from_linear(nn.Linear(64, 32).to(device, torch.bfloat16), recipe)
    absmax, square = torch.tensor(4.0), torch.rand(64, device=device)
    module.set_packed(
        quantize_group([module], [module.weight], input_absmax=absmax, input_square=square)[0]
    )
    share_input_importance([module])
    return module


@pytest.mark.parametrize("activations", [None, "wmse"])
def test_graphs_hold_kernels_as_operators(
    backend: str, activations: str | None, device: str
) -> None:
    module = packed_linear(activations, device)
    x = torch.randn(5, 64).to(device, torch.bfloat16)
    module.backend = backend
    torch.compiler.reset()
    compiled: Any = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), module(x))


def test_graphs_with_gradients_have_none_through_rounding(backend: str, device: str) -> None:
    module = packed_linear("wmse", device)
    module.backend = backend
    torch.compiler.reset()
    compiled: Any = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 64).to(device, torch.bfloat16).requires_grad_()
    compiled(x).float().sum().backward()
    assert x.grad is None or not x.grad.any()
    assert module.bias.grad is not None


def test_every_backend_has_an_implementation_wherever_it_is_unpickled() -> None:
    assert set(BACKENDS) == set(kernels.BACKENDS) - {"auto"}


def test_importance_of_another_dtype_and_fake_tensors_are_taken(twin: Backend, device: str) -> None:
    x, importance = hard_rows(32).to(device), importances(32, 1)["shared"].to(device)
    options: dict[str, Any] = {"objective": "wmse", "importance": importance}
    expected = twin.round_blocks(x, ONE.to(device), **options)
    options["importance"] = importance.double()
    assert same(twin.round_blocks(x, ONE.to(device), **options), expected)
    with FakeTensorMode():
        fake = torch.empty(4, 32, device=device)
        assert twin.round_blocks(fake, torch.ones((), device=device), objective="mse").shape == (
            4,
            32,
        )


@pytest.mark.parametrize("shape", [(0, 32), (1, 16), (63, 16), (65, 48), (2, 3, 129 * 16)])
def test_any_number_of_blocks(twin: Backend, shape: tuple[int, ...], device: str) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(device)
    scale = ONE.to(device)
    found = twin.encode_blocks(x, scale, objective="mse")
    expected = definition.encode_blocks(x, scale, objective="mse")
    assert [t.shape for t in found] == [t.shape for t in expected]
    assert same(found[0], expected[0])
    assert same(twin.round_blocks(x, scale, objective="mse"), twin.decode_blocks(*found_of(found)))


def found_of(found: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, torch.dtype]:
    return found[0], found[1].view(torch.float8_e4m3fn), torch.bfloat16


def test_strided_input_is_read_as_it_is_seen(twin: Backend, device: str) -> None:
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(3)).to(device)
    scale = ONE.to(device)
    found = twin.round_blocks(x.T, scale, objective="mse")
    assert same(found, definition.round_blocks(x.T, scale, objective="mse"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_with_every_scale_is_decoded(
    twin: Backend, dtype: torch.dtype, device: str
) -> None:
    packed = torch.arange(256, dtype=torch.uint8).reshape(32, 1, 8).expand(32, 256, 8)
    scale = torch.arange(256, dtype=torch.uint8).reshape(1, 256, 1).expand(32, 256, 1)
    packed, scale = packed.contiguous().to(device), scale.contiguous().to(device)
    arguments = packed, scale.view(torch.float8_e4m3fn), dtype
    assert same(twin.decode_blocks(*arguments), definition.decode_blocks(*arguments))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_value_of_two_bytes_is_rounded(
    twin: Backend, dtype: torch.dtype, device: str, interpreted: bool
) -> None:
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    x = bits.view(dtype).reshape(-1, 16).to(device)
    if interpreted:  # every seventh block
        x = x[::7]
    scale = ONE.to(device)
    for objective in ("absmax", "mse"):
        found = twin.round_blocks(x, scale, objective=objective)
        assert same(found, definition.round_blocks(x, scale, objective=objective))
