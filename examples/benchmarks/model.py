"""Time loading a random Llama as it is, quantized on the fly, and calibrated and quantized.

    python examples/benchmarks/model.py                     # 8 B parameters, needs a GPU
    python examples/benchmarks/model.py --shape tiny --rows 4 --length 32 --device cpu

The checkpoint is written to /dev/shm where it fits, else to a temporary folder, so that its bytes
are in memory before they are read, and removed afterwards. Every load runs in a process of its own;
its seconds are those of from_pretrained, with whatever is set up or compiled on first use. Peaks
are of that process: of what torch has allocated on the GPU, and of its resident set (VmHWM, so
Linux only), which counts the mapped pages of the checkpoint.
"""

import argparse
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from llama import SHAPES, random_llama
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import scalesweep_hf
from scalesweep_hf import ScaleSweepConfig

WAYS = {
    "bf16": "as it is",
    "mse": "mse on the fly",
    "offloaded": "mse on the fly, weights on the CPU",
    "wmse": "calibrated, then wmse",
}
HEAD = """| load | seconds | peak GPU memory, GB | peak RSS, GB | parameters, GB |
|---|---|---|---|---|"""
GB = 1e9


def main() -> None:
    """Make the checkpoint, load it in every way, print and write what it took."""
    args = parse_arguments()
    logging.disable_progress_bar()
    if args.worker is not None:
        way, folder = args.worker
        print(json.dumps(measure(way, folder, args)))
        return
    shape = LlamaConfig(**SHAPES[args.shape], max_position_embeddings=args.length)
    with checkpoint_folder(shape, args.folder) as folder:
        seconds = save_random(shape, folder, args.device)
        where = f"written to {folder} in {seconds:.1f} s"
        print(f"{device_name(args.device)}; {args.shape} shape {where}", flush=True)
        ways = [way for way in args.ways if way != "offloaded" or args.device != "cpu"]
        print(HEAD)
        results = []
        for way in (way for way in ways for _ in range(args.repeats)):
            results.append(run_worker(way, folder))
            report(results[-1])
    if args.output is not None:
        packages = (scalesweep_hf, torch, transformers)
        about = {
            "device": device_name(args.device),
            "versions": {package.__name__: package.__version__ for package in packages},
            "shape": args.shape,
            "calibration": [args.rows, args.length],
        }
        args.output.write_text(json.dumps(about | {"results": results}, indent=2))


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", default="8b", choices=SHAPES)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--rows", type=int, default=128, help="calibration rows of random tokens")
    parser.add_argument("--length", type=int, default=2048, help="tokens a row")
    parser.add_argument("--repeats", type=int, default=1, help="loads of each kind")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--folder", default=None, help="write the checkpoint here and keep it")
    parser.add_argument("--output", type=Path, default=None, help="JSON file")
    parser.add_argument("--worker", nargs=2, default=None, help=argparse.SUPPRESS)
    return parser.parse_args()


@contextmanager
def checkpoint_folder(shape: LlamaConfig, folder: str | None) -> Iterator[str]:
    """Yield where the checkpoint goes: that folder, or a temporary one, in memory if it fits."""
    if folder is not None:
        yield folder
        return
    with torch.device("meta"):
        size = 2 * sum(p.numel() for p in LlamaForCausalLM(shape).parameters())
    memory = Path("/dev/shm")
    fits = memory.is_dir() and shutil.disk_usage(memory).free > size
    with tempfile.TemporaryDirectory(dir=memory if fits else None) as temporary:
        yield temporary


def save_random(shape: LlamaConfig, folder: str, device: str) -> float:
    """Write a checkpoint of random weights; return the seconds that it took."""
    start = time.perf_counter()
    torch.manual_seed(0)
    model = random_llama(shape, device)
    model.save_pretrained(folder, max_shard_size="5GB")
    del model
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return time.perf_counter() - start


def run_worker(way: str, folder: str) -> dict[str, Any]:
    """Measure one load in a process of its own, which gets this one's arguments."""
    command = [sys.executable, *sys.argv, "--worker", way, folder]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    measured: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return measured


def measure(way: str, folder: str, args: argparse.Namespace) -> dict[str, Any]:
    """Load in one way; return seconds and bytes."""
    config = None
    if way in ("mse", "offloaded"):
        config = ScaleSweepConfig(scheme="W", objective="mse", dataset=None)
    elif way == "wmse":
        generator = torch.Generator().manual_seed(0)
        size = SHAPES[args.shape]["vocab_size"]
        tokens = torch.randint(size, (args.rows, args.length), generator=generator)
        config = ScaleSweepConfig(
            scheme="W", dataset=tokens, num_samples=args.rows, sequence_length=args.length
        )
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=config,
        device_map="cpu" if way == "offloaded" else args.device,
    )
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    status = Path("/proc/self/status").read_text().splitlines()
    resident = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    return {
        "what": way,
        "seconds": seconds,
        "gpu_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        "resident_bytes": 1024 * resident,
        "parameter_bytes": sum(p.nbytes for p in model.parameters()),
    }


def report(result: dict[str, Any]) -> None:
    """Print a row of the table."""
    peak = "" if result["gpu_bytes"] is None else f"{result['gpu_bytes'] / GB:.2f}"
    print(
        f"| {WAYS[result['what']]} | {result['seconds']:.2f} | {peak} "
        f"| {result['resident_bytes'] / GB:.2f} | {result['parameter_bytes'] / GB:.2f} |",
        flush=True,
    )


def device_name(device: str) -> str:
    """Say what it ran on."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
