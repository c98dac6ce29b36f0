"""Time this package and its peers side by side, in one process.

    python examples/benchmarks/speed.py
    python examples/benchmarks/speed.py --only blocks linear --output results

Subjects: quantizing blocks, a Linear, decode attention and decoding with a whole model, on a CUDA
device; and quantizing on the CPU. Peers are measured where they are installed (`pip install
'.[bench]'`; fouroversix: docs/speed.md). What is absent or fails is named in its table. Writes
speed.md and speed.json.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from llama import SHAPES
from subjects import attention, blocks, cpu, decode, linear
from tables import Table, about, preface, write
from timing import Measurement, Settings, named

SUBJECTS = {
    "blocks": blocks,
    "linear": linear,
    "attention": attention,
    "decode": decode,
    "cpu": cpu,
}


def main() -> None:
    """Measure, print and write."""
    args = parse_arguments()
    settings = Settings(
        args.device, args.tiny, args.repeats, args.threads, args.dtype, args.shape, args.compile
    )
    facts = about(settings)
    print(preface(facts), flush=True)
    tables: dict[str, Table] = {}
    for name in args.only:
        subject = SUBJECTS[name]
        tables[name] = table = Table(subject.TITLE, subject.NOTE, subject.UNIT, subject.FIGURE)
        begin = time.perf_counter()
        for row in rows(name, settings):
            table.rows.append(row)
            table.seconds = time.perf_counter() - begin
            write(args.output, facts, tables)
            print(f"{name}: {row.size} {row.column}, {row.what}", file=sys.stderr, flush=True)
        print(table.markdown(), flush=True)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="+", choices=list(SUBJECTS), default=list(SUBJECTS))
    parser.add_argument("--output", type=Path, default=Path("speed"), help="folder")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: to try out")
    parser.add_argument("--tiny", action="store_true", help="sizes that only show that it runs")
    parser.add_argument("--repeats", type=int, default=50, help="at the most")
    parser.add_argument("--shape", choices=list(SHAPES), default="8b", help="of the Llama")
    parser.add_argument("--compile", action="store_true", help="decode compiled too: minutes")
    parser.add_argument("--threads", type=int, default=2, help="of the cpu subject")
    parser.add_argument("--dtype", choices=list(cpu.DTYPES), default="float32", help="likewise")
    return parser.parse_args()


def rows(name: str, settings: Settings) -> Iterator[Measurement]:
    """Measure one subject; what ends it is a row too, and the other subjects go on."""
    if name != "cpu" and settings.device == "cuda" and not torch.cuda.is_available():
        yield Measurement("", "", "all", note="not run: no CUDA device")
        return
    try:
        yield from SUBJECTS[name].measure(settings)
    except Exception as error:  # noqa: BLE001  whatever it is
        yield Measurement("", "", "the rest", note=named(error))
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
