"""Time quantizing a weight on the CPU: the definition, numba's loops, and torchao's AbsMax.

    python examples/benchmarks/cpu.py                       # 4096 x 4096, float32, 2 threads
    python examples/benchmarks/cpu.py --dtype bfloat16 --output cpu.json

Each figure is the CPU time of the whole process per element, which threads do not hide: the median
and quartiles of calls that take turns, each from the tensor to packed codes and scales, with the
search for its largest magnitude. torchao is measured where it is installed. "ratio" is to its
median; "first call" is wall time, and for numba has its import and compiling, nothing cached.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scalesweep_hf.kernels import HAS_NUMBA
from scalesweep_hf.ops.nvfp4 import quantize
from scalesweep_hf.ops.objectives import OBJECTIVES, RUNTIME_OBJECTIVES

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PACKAGES = ("scalesweep-hf", "torch", "numba", "torchao")


def main() -> None:
    """Time all ways, print the table, write JSON."""
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    x = torch.randn(args.rows, args.columns).to(DTYPES[args.dtype])
    ways = ours(x, torch.rand(args.columns)) | torchao(x)
    with tempfile.TemporaryDirectory() as folder:  # where numba finds nothing compiled
        os.environ["NUMBA_CACHE_DIR"] = folder
        results = measure(ways, x.numel(), args.repeats)
    about = {
        "cpu": name_of_cpu(),
        "threads": args.threads,
        "rows": args.rows,
        "columns": args.columns,
        "dtype": args.dtype,
        "versions": {name: version_of(name) for name in PACKAGES},
    }
    report(about, results)
    if args.output is not None:
        args.output.write_text(json.dumps(about | {"results": results}, indent=2))


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, default=None, help="JSON file")
    return parser.parse_args()


def ours(x: Tensor, importance: Tensor) -> dict[str, Callable[[], object]]:
    """Return this package's ways to quantize x, by name."""

    def way(backend: str, objective: str) -> Callable[[], object]:
        weight = importance if OBJECTIVES[objective].weighted else None
        return lambda: quantize(x, objective=objective, importance=weight, backend=backend)

    backends = ("torch", "numba") if HAS_NUMBA else ("torch",)
    return {f"{b}, {o}": way(b, o) for b in backends for o in RUNTIME_OBJECTIVES}


def torchao(x: Tensor) -> dict[str, Callable[[], object]]:
    """Return torchao's way to quantize x where it is installed and takes x's dtype."""
    if importlib.util.find_spec("torchao") is None or x.dtype == torch.float16:
        return {}
    from torchao.prototype.mx_formats import nvfp4_tensor as peer

    def absmax() -> object:
        scale = peer.per_tensor_amax_to_scale(x.abs().amax())
        return peer.NVFP4Tensor.to_nvfp4(x, per_tensor_scale=scale)

    return {"torchao, absmax": absmax}


def measure(
    ways: dict[str, Callable[[], object]], elements: int, repeats: int
) -> dict[str, dict[str, Any]]:
    """Return seconds of the first call, and quartiles of ns per element: CPU and wall time."""
    results: dict[str, dict[str, Any]] = {}
    for name, way in ways.items():
        start = time.perf_counter()
        way()
        results[name] = {"first call": time.perf_counter() - start, "cpu": [], "wall": []}
    for _ in range(repeats):
        for name, way in ways.items():
            cpu, wall = time.process_time(), time.perf_counter()
            way()
            results[name]["wall"].append(1e9 * (time.perf_counter() - wall) / elements)
            results[name]["cpu"].append(1e9 * (time.process_time() - cpu) / elements)
    for result in results.values():
        for key in ("cpu", "wall"):
            result[key] = statistics.quantiles(result[key], n=4)
    return results


def report(about: dict[str, Any], results: dict[str, dict[str, Any]]) -> None:
    """Print the table."""
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    print(f"{about['rows']} x {about['columns']} {about['dtype']}, {about['threads']} threads")
    print(f"{about['cpu']}; {versions}\n")
    print("| what | CPU ns / element (quartiles) | wall | ratio | first call, s |")
    print("|---|---|---|---|---|")
    peer = results.get("torchao, absmax")
    for name, result in results.items():
        low, median, high = result["cpu"]
        ratio = f"{median / peer['cpu'][1]:.2f}" if peer else ""
        print(
            f"| {name} | {median:.1f} ({low:.1f} to {high:.1f}) | {result['wall'][1]:.1f} "
            f"| {ratio} | {result['first call']:.1f} |"
        )


def version_of(package: str) -> str:
    """Return the installed version."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def name_of_cpu() -> str:
    """Return what the system calls its processor, and the vectors that torch finds there."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{(names or [platform.processor()])[0]}, {torch.backends.cpu.get_cpu_capability()}"


if __name__ == "__main__":
    main()
