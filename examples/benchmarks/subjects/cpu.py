"""Quantizing a weight on the CPU: the definition, numba's loops, and peers."""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from timing import Measurement, Settings, named, three
from torch import Tensor

from scalesweep_hf.kernels import HAS_NUMBA
from scalesweep_hf.ops.nvfp4 import quantize
from scalesweep_hf.ops.objectives import OBJECTIVES, RUNTIME_OBJECTIVES
from subjects import peers

TITLE = "Quantizing on the CPU"
UNIT = "CPU ns per element"
FIGURE = ""
NOTE = (
    "4096 x 4096 from the tensor to packed codes and scales, with the search for its largest "
    "magnitude. Each figure is the CPU time of the whole process, which threads do not hide; calls "
    "take turns. Wall: the same by the clock. Ratio: to the AbsMax of torchao. First call: seconds "
    "by the clock; for numba with its import and compiling, nothing cached. Peers that only choose "
    "scales are marked so, and those that need seconds get the first 256 rows."
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SIZE, TINY = (4096, 4096), (64, 128)
SLOW_ROWS = 256
REPEATS = 7


@dataclass
class Way:
    """One way to quantize, and its times.

    Attributes:
        call: quantizes.
        elements: how many.
        first: seconds of the first call.
        cpu: ns per element.
        wall: ns per element.
    """

    call: Callable[[], object]
    elements: int
    first: float = 0.0
    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)

    def time(self) -> None:
        """Time one call."""
        cpu, wall = time.process_time(), time.perf_counter()
        self.call()
        self.wall.append(1e9 * (time.perf_counter() - wall) / self.elements)
        self.cpu.append(1e9 * (time.process_time() - cpu) / self.elements)


def measure(settings: Settings) -> Iterator[Measurement]:
    """Measure all ways, in turns."""
    rows, columns = TINY if settings.tiny else SIZE
    case = f"{rows} x {columns} {settings.dtype}, {settings.threads} threads"
    threads, cache = torch.get_num_threads(), os.environ.get("NUMBA_CACHE_DIR")
    torch.set_num_threads(settings.threads)
    x = torch.randn(rows, columns).to(DTYPES[settings.dtype])
    try:
        with tempfile.TemporaryDirectory() as folder:  # where numba finds nothing compiled
            os.environ["NUMBA_CACHE_DIR"] = folder
            yield from report(case, *run(x, settings))
    finally:
        torch.set_num_threads(threads)
        os.environ.pop("NUMBA_CACHE_DIR")
        if cache is not None:
            os.environ["NUMBA_CACHE_DIR"] = cache


def run(x: Tensor, settings: Settings) -> tuple[dict[str, Way], dict[str, Exception]]:
    """Return every way with its times, and what went wrong with the others."""
    found: dict[str, Way] = {}
    problems: dict[str, Exception] = {}
    for name, (make, rows) in ways(x).items():
        part = x[:rows]
        try:
            call = make(part)
            begin = time.perf_counter()
            call()
            found[name] = Way(call, part.numel(), time.perf_counter() - begin)
        except Exception as error:  # noqa: BLE001  peers fail in any way
            problems[name] = error
    for _ in range(min(settings.repeats, REPEATS)):
        for way in found.values():
            way.time()
    return found, problems


def report(
    case: str, found: dict[str, Way], problems: dict[str, Exception]
) -> Iterator[Measurement]:
    """Yield a row for every way."""
    peer = found.get("torchao absmax")
    for name, way in found.items():
        cpu = three(way.cpu)
        figures: dict[str, float] = {
            "wall": statistics.median(way.wall),
            "first call, s": way.first,
        }
        if peer is not None:
            figures["ratio"] = cpu[1] / statistics.median(peer.cpu)
        yield Measurement(case, "", name, cpu, figures)
    for name, error in problems.items():
        yield Measurement(case, "", name, note=named(error))


def ways(x: Tensor) -> dict[str, tuple[Callable[[Tensor], Callable[[], object]], int]]:
    """Return by name what makes calls, and how many rows they get."""
    rows, importance = x.shape[0], torch.rand(x.shape[1])

    def own(backend: str, objective: str) -> Callable[[Tensor], Callable[[], object]]:
        weight = importance if OBJECTIVES[objective].weighted else None
        options = {"objective": objective, "importance": weight, "backend": backend}
        return lambda part: lambda: quantize(part, **options)  # type: ignore[arg-type]

    backends = ("torch", "numba") if HAS_NUMBA else ("torch",)
    found = {f"{o}, {b}": (own(b, o), rows) for b in backends for o in RUNTIME_OBJECTIVES}

    def other(make: Callable[[Tensor], peers.Way]) -> Callable[[Tensor], Callable[[], object]]:
        def prepare(part: Tensor) -> Callable[[], object]:
            make(part.abs().amax())  # raises where the peer is not installed
            return lambda: make(part.abs().amax())(part)

        return prepare

    return found | {
        "torchao absmax": (other(peers.torchao), rows),
        "fouroversix absmax": (other(lambda a: peers.fouroversix(a, "static_6", "pytorch")), rows),
        "fouroversix 4/6 mse": (other(lambda a: peers.fouroversix(a, "mse", "pytorch")), rows),
        "Model-Optimizer 126 scales, scales only": (other(peers.modelopt_sweep_cpu), SLOW_ROWS),
        "llm-compressor nvfp4_expanded_mse, scales only": (
            other(lambda _: peers.llm_compressor()),
            SLOW_ROWS,
        ),
    }
