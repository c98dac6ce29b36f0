"""Time calls on a device, and hold what was measured.

On a CUDA device times are those of the device, by events; launches either queue up behind a kernel
that sleeps, or are recorded once and replayed as a CUDA graph, so that they do not count. Elsewhere
they are wall time.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

# Bytes that inputs rotate through: more than the cache of any device holds.
ROTATED = 256 << 20
SLEEP = 1_000_000  # clock cycles, about half a millisecond
SECONDS = 3.0  # after which a measurement that has enough repeats ends
ENOUGH = 5


@dataclass(frozen=True)
class Settings:
    """What to measure, and on what.

    Attributes:
        device: of the subjects that need one: "cuda", or "cpu" to try them out.
        tiny: take sizes that only show that everything runs.
        repeats: of every measurement, at the most.
        threads: of the CPU subject.
        dtype: of the CPU subject.
        shape: of the decoding model.
        compiled: measure the decoding model through torch.compile too.
    """

    device: str = "cuda"
    tiny: bool = False
    repeats: int = 50
    threads: int = 2
    dtype: str = "float32"
    shape: str = "8b"
    compiled: bool = False


@dataclass
class Measurement:
    """One time, and what follows from it.

    Attributes:
        size: what was measured, as rows of the table name it.
        column: likewise, as columns do.
        what: who did it.
        quartiles: three times in the unit of the table; None where there is a problem.
        figures: what follows, by name.
        note: why there is no time, or what is particular about it.
    """

    size: str
    column: str
    what: str
    quartiles: list[float] | None = None
    figures: dict[str, float] = field(default_factory=dict)
    note: str = ""

    @property
    def median(self) -> float:
        """The median; NaN where there is a problem."""
        return float("nan") if self.quartiles is None else self.quartiles[1]


def attempt(
    size: str, column: str, what: str, function: Callable[[], tuple[list[float], str]]
) -> Measurement:
    """Measure quartiles and a note, or say what went wrong: no peer or size stops the others."""
    try:
        found, note = function()
    except Exception as error:  # noqa: BLE001  peers fail in any way
        return Measurement(size, column, what, note=named(error))
    return Measurement(size, column, what, found, note=note)


def named(error: Exception) -> str:
    """Return the kind of an error and its first line."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"[:160]


def time_calls(
    function: Callable[[Any], object], inputs: Sequence[Any], repeats: int, device: str
) -> list[float]:
    """Return the quartiles of the time of one call, microseconds; inputs take turns."""
    for x in inputs[:3]:
        function(x)
    return quartiles(
        lambda i: timed(lambda: function(inputs[i % len(inputs)]), device, sleep=SLEEP), repeats
    )


def time_chain(
    calls: Sequence[Callable[[], object]], repeats: int, device: str
) -> tuple[list[float], str]:
    """Time calls that follow each other, as one CUDA graph where they can be captured.

    Returns:
        Quartiles of the time of all calls divided by their number, microseconds; and a note that
        says why they were not captured, empty if they were.
    """

    def run() -> None:
        for call in calls:
            call()

    replay, reason = captured(run, device)
    found = quartiles(lambda _: timed(replay, device, sleep=SLEEP), repeats)
    return [one / len(calls) for one in found], reason


def captured(function: Callable[[], object], device: str) -> tuple[Callable[[], object], str]:
    """Return a function that replays another as a CUDA graph, or the other and why not."""
    if device != "cuda":
        function()
        return function, ""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            function()
    except Exception as error:  # noqa: BLE001  what cannot be captured is measured without
        torch.cuda.synchronize()
        return function, f"no graph: {named(error)}"
    return graph.replay, ""


def timed(function: Callable[[], object], device: str, sleep: int = 0) -> float:
    """Return the time of one call, microseconds."""
    if device != "cuda":
        begin = time.perf_counter()
        function()
        return 1e6 * (time.perf_counter() - begin)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(sleep)
    start.record()
    function()
    stop.record()
    stop.synchronize()
    return float(1000 * start.elapsed_time(stop))


def quartiles(measure: Callable[[int], float], repeats: int) -> list[float]:
    """Repeat a measurement, fewer times if it is slow, and return its quartiles."""
    begin, times = time.perf_counter(), []
    for i in range(repeats):
        times.append(measure(i))
        if len(times) >= ENOUGH and time.perf_counter() - begin > SECONDS:
            break
    return three(times)


def three(times: list[float]) -> list[float]:
    """Return the quartiles of times, all of them within what was measured."""
    if len(times) == 1:
        return 3 * times
    return statistics.quantiles(times, n=4, method="inclusive")


def copies(nbytes: int, settings: Settings) -> int:
    """Return how many tensors of this size inputs rotate through."""
    return 2 if settings.tiny else max(-(-ROTATED // nbytes), 1)
