"""Time quantizing blocks on a GPU against copying them.

    python examples/benchmarks/speed.py                     # 8192 x 8192, bfloat16
    python examples/benchmarks/speed.py --rows 1 16 4096 --output speed.json

Prints a Markdown table of medians and quartiles, in microseconds. Inputs rotate through more memory
than the cache of the device holds. "share" is the bandwidth reached, bytes read and written over
time, of that of a copy of the input in the same run.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import scalesweep_hf
from scalesweep_hf.kernels import resolve
from scalesweep_hf.ops.blocks import BACKENDS
from scalesweep_hf.ops.nvfp4 import compute_tensor_scale
from scalesweep_hf.ops.objectives import OBJECTIVES, RUNTIME_OBJECTIVES

CACHE = 256 << 20


def main() -> None:
    """Time every objective at every size."""
    args = parse_arguments()
    results = [
        measure(rows, args.columns, args.backend, args.repeats, objective)
        for rows in args.rows
        for objective in ("copy", *RUNTIME_OBJECTIVES)
    ]
    report(results)
    if args.output is not None:
        versions = {"scalesweep_hf": scalesweep_hf.__version__, "torch": torch.__version__}
        about = {"device": torch.cuda.get_device_name(), "versions": versions}
        args.output.write_text(json.dumps(about | {"results": results}, indent=2))


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, nargs="+", default=[8192])
    parser.add_argument("--columns", type=int, default=8192)
    parser.add_argument("--backend", default="auto", choices=["auto", "torch", "triton"])
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--output", type=Path, default=None, help="JSON file")
    return parser.parse_args()


def measure(rows: int, columns: int, backend: str, repeats: int, objective: str) -> dict[str, Any]:
    """Time one objective at one size: packing and rounding; or copying."""
    size = rows * columns
    copies = max(CACHE // (2 * size), 1)
    inputs = torch.randn(copies, rows, columns, device="cuda").to(torch.bfloat16)
    result: dict[str, Any] = {"rows": rows, "columns": columns, "what": objective}
    if objective == "copy":
        target = torch.empty_like(inputs[0])
        return result | {"copy": timed(lambda x: target.copy_(x), inputs, repeats)}
    scale = compute_tensor_scale(inputs.abs().amax(), objective)
    weight = torch.rand(columns, device="cuda") if OBJECTIVES[objective].weighted else None
    chosen = BACKENDS[resolve(backend)]
    options: dict[str, Any] = {"objective": objective, "importance": weight}
    pack = timed(lambda x: chosen.encode_blocks(x, scale, **options), inputs, repeats)
    around = timed(lambda x: chosen.round_blocks(x, scale, **options), inputs, repeats)
    return result | {"pack": pack, "round": around}


def timed(
    function: Callable[[torch.Tensor], object], inputs: torch.Tensor, repeats: int
) -> list[float]:
    """Return the quartiles of the time of one call, microseconds of the device."""
    for x in inputs[:3]:
        function(x)
    torch.cuda.synchronize()
    times = []
    for i in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(1_000_000)  # launches queue up behind it, so that they do not count
        start.record()
        function(inputs[i % len(inputs)])
        stop.record()
        stop.synchronize()
        times.append(1000 * start.elapsed_time(stop))
    return statistics.quantiles(times, n=4)


def report(results: list[dict[str, Any]]) -> None:
    """Print the table."""
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print(
        "| rows x columns | what | pack, us (quartiles) | share | round, us (quartiles) | share |"
    )
    print("|---|---|---|---|---|---|")
    copied: dict[int, float] = {}
    for result in results:
        size = result["rows"] * result["columns"]
        name = f"| {result['rows']} x {result['columns']} | {result['what']} "
        if "copy" in result:
            copied[size] = 4 * size / result["copy"][1]
            print(f"{name}| {show(result['copy'])} | 1 | | |")
            continue
        share = [
            moved * size / result[key][1] / copied[size]
            for key, moved in (("pack", 2 + 9 / 16), ("round", 4))
        ]
        print(
            f"{name}| {show(result['pack'])} | {share[0]:.2f} | {show(result['round'])} "
            f"| {share[1]:.2f} |"
        )


def show(quartiles: list[float]) -> str:
    """Format a median and the quartiles beside it."""
    low, median, high = quartiles
    return f"{median:.1f} ({low:.1f} to {high:.1f})"


if __name__ == "__main__":
    main()
