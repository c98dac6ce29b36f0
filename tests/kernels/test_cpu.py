"""What is particular to numba's loops: threads, vectors, numba itself; bits are in test_blocks."""

import platform
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from scalesweep_hf import kernels
from scalesweep_hf.ops import e2m1, e4m3
from scalesweep_hf.ops.blocks import BACKENDS
from scalesweep_hf.ops.nvfp4 import NVFP4Tensor, quantize
from scalesweep_hf.ops.sweep import block_loss, normalize_importance

numba = pytest.importorskip("numba")
from scalesweep_hf.kernels import cpu, cpu_loops  # noqa: E402


def bytes_of(tensor: NVFP4Tensor) -> tuple[list[int], list[int]]:
    scale = tensor.block_scale.view(torch.uint8)
    return tensor.packed.flatten().tolist(), scale.flatten().tolist()


def weight(rows: int = 48) -> Tensor:
    return torch.randn(rows, 1040, generator=torch.Generator().manual_seed(0))


def columns_of(blocks: Tensor) -> Tensor:
    """Lay out blocks [LANES, 16] as the loops do."""
    return blocks.T.contiguous().flatten()


def test_losses_have_the_bits_of_the_definition_around_every_midpoint() -> None:
    """Of all scales; a sweep would not show it, since both neighbours err almost alike."""
    generator = torch.Generator().manual_seed(0)
    midpoints, lanes = torch.tensor(e2m1.MIDPOINTS), cpu_loops.LANES
    importance = torch.rand(lanes, 16, generator=generator)
    for code in range(1, 127):
        scale = e4m3.decode(torch.full((lanes,), code, dtype=torch.uint8))
        ties = midpoints[torch.randint(0, 7, (lanes, 16), generator=generator)] * scale[:, None]
        steps = torch.randint(-2, 3, (lanes, 16), generator=generator, dtype=torch.int32)
        x = (ties.view(torch.int32) + steps).view(torch.float32)
        columns, found = torch.cat([columns_of(x), columns_of(importance)]), torch.empty(lanes)
        codes = torch.full((lanes,), code, dtype=torch.int32)
        cpu_loops.losses(columns.numpy(), codes.numpy(), found.numpy())
        assert torch.equal(found, block_loss(x, scale, importance))


def test_importance_of_any_size_is_normalized_as_the_definition_does_it() -> None:
    lanes = cpu_loops.LANES
    powers = torch.logspace(-149, 127, lanes, base=2.0, dtype=torch.float64)[:, None]
    importance = (torch.rand(lanes, 16, dtype=torch.float64) * powers).to(torch.float32)
    importance[7] = 0.0
    found = columns_of(importance)
    cpu_loops.normalize(found.numpy(), torch.empty(lanes).numpy())
    assert torch.equal(found, columns_of(normalize_importance(importance)))


def test_threads_share_the_blocks_without_a_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    x, expected = weight(), bytes_of(quantize(weight()))
    monkeypatch.setattr(cpu, "BLOCKS_PER_THREAD", 64)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            found = quantize(x, backend="numba")
            assert bytes_of(found) == expected
            values = found.values(backend="numba")
            assert torch.equal(values, found.values(backend="torch"))
    finally:
        torch.set_num_threads(before)


def test_no_more_threads_than_torch_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    parts: list[tuple[int, int]] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    cpu._in_threads(lambda *part: parts.append(part), 10 * cpu.BLOCKS_PER_THREAD)
    assert len(parts) == 3
    parts.clear()
    cpu._in_threads(lambda *part: parts.append(part), cpu.BLOCKS_PER_THREAD)
    assert parts == [(0, cpu.BLOCKS_PER_THREAD)]


def test_an_error_in_a_thread_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(begin: int, end: int) -> None:
        if begin:
            raise ZeroDivisionError

    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with pytest.raises(ZeroDivisionError):
        cpu._in_threads(work, 4 * cpu.BLOCKS_PER_THREAD)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="reads x86 assembly")
def test_the_sweep_is_compiled_to_vectors() -> None:
    """A loop that LLVM no longer vectorises has the same bits at a quarter of the speed."""
    compiled: Any = numba.njit(nogil=True, error_model="numpy")(cpu_loops.losses.py_func)
    columns, codes = numba.float32[::1], numba.int32[::1]
    compiled.compile((columns, codes, columns))
    (assembly,) = compiled.inspect_asm().values()
    packed = [line for line in assembly.splitlines() if re.search(r"\bvfn?m\w+ps\b", line)]
    assert len(packed) >= 2 * 16  # two fused operations for each of 16 columns


def test_arguments_are_not_written_to() -> None:
    x, importance = weight(), torch.rand(1040)
    kept = x.clone(), importance.clone()
    quantize(x, objective="wmse", importance=importance, backend="numba")
    assert torch.equal(x, kept[0])
    assert torch.equal(importance, kept[1])


def test_couplings_and_float64_go_to_the_definition() -> None:
    x = weight(2).double()
    assert bytes_of(quantize(x, backend="numba")) == bytes_of(quantize(x))
    options: dict[str, Any] = {
        "objective": "hessian",
        "importance": torch.eye(16).expand(65, 16, 16),
    }
    assert bytes_of(quantize(x, **options, backend="numba")) == bytes_of(quantize(x, **options))


def test_importing_the_package_imports_no_numba() -> None:
    code = "import sys, scalesweep_hf, scalesweep_hf.kernels.cpu; print('numba' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("objective", ["absmax", "mse"])
@pytest.mark.parametrize("window", ["bounded", (-1, 1)])
def test_without_a_working_numba_the_definition_takes_over_aloud(
    monkeypatch: pytest.MonkeyPatch, objective: str, window: Any
) -> None:
    monkeypatch.setattr(cpu, "_loops", [])
    monkeypatch.setitem(sys.modules, "scalesweep_hf.kernels.cpu_loops", None)
    x, options = weight(2), {"objective": objective, "window": window}
    with pytest.warns(UserWarning, match="numba does not work here"):
        found = quantize(x, **options, backend="numba")
    assert bytes_of(found) == bytes_of(quantize(x, **options))  # and no second warning
    assert torch.equal(found.values(backend="numba"), found.values(backend="torch"))
    one = torch.tensor(1.0)
    values = BACKENDS["numba"].round_blocks(x, one, **options)
    assert torch.equal(values, BACKENDS["torch"].round_blocks(x, one, **options))


def test_auto_takes_the_first_backend_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "HAS_TRITON", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert kernels.resolve("auto") == "triton"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(kernels, "HAS_NUMBA", True)
    assert kernels.resolve("auto") == "numba"
    monkeypatch.setattr(kernels, "HAS_NUMBA", False)
    assert kernels.resolve("auto") == "torch"


@pytest.mark.parametrize(
    ("name", "remedy"),
    [("triton", "CUDA device"), ("numba", r"pip install 'scalesweep-hf\[cpu\]'")],
)
def test_a_backend_that_cannot_run_names_what_it_needs(
    monkeypatch: pytest.MonkeyPatch, name: str, remedy: str
) -> None:
    monkeypatch.setattr(kernels, "HAS_TRITON", False)
    monkeypatch.setattr(kernels, "HAS_NUMBA", False)
    with pytest.raises(ValueError, match=remedy):
        kernels.resolve(name)
