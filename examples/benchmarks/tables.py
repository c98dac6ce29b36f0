"""Write what was measured: a Markdown table per subject, and JSON."""

import importlib.metadata
import json
import math
import platform
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from timing import Measurement, Settings

import scalesweep_hf

PACKAGES = (
    *("torch", "triton", "transformers", "numba", "torchao", "fouroversix", "bitsandbytes"),
    *("nvidia-modelopt", "llmcompressor"),
)


@dataclass
class Table:
    """One subject's results.

    Attributes:
        title: what was measured.
        note: how.
        unit: of the times.
        figure: in brackets behind every median, where sizes have columns; else all figures have.
        rows: in order.
        seconds: that the subject took.
    """

    title: str
    note: str
    unit: str
    figure: str = ""
    rows: list[Measurement] = field(default_factory=list)
    seconds: float = 0.0

    def markdown(self) -> str:
        """Return title, note and table."""
        lines = filled(self.wide() if self.figure else self.long())
        lines.insert(1, ["---"] * len(lines[0]))
        return "\n".join([f"## {self.title}", "", self.note, "", *map(line, lines)]) + "\n"

    def long(self) -> list[list[str]]:
        """Return a row for every measurement."""
        names = list(dict.fromkeys(name for row in self.rows for name in row.figures))
        lines = [["size", "what", f"{self.unit} (quartiles)", *names, "notes"]]
        for row in self.rows:
            time = ""
            if row.quartiles is not None:
                low, median, high = map(number, row.quartiles)
                time = f"{median} ({low} to {high})"
            figures = [number(row.figures[name]) if name in row.figures else "" for name in names]
            lines.append([row.size, row.what, time, *figures, row.note])
        return lines

    def wide(self) -> list[list[str]]:
        """Return a row for everything measured at several sizes, with its spread."""
        columns = list(dict.fromkeys(row.column for row in self.rows))
        together: dict[tuple[str, str], dict[str, Measurement]] = {}
        for row in self.rows:
            together.setdefault((row.size, row.what), {})[row.column] = row
        lines = [["size", f"{self.unit} ({self.figure})", *columns, "spread", "notes"]]
        for (size, what), found in together.items():
            entries = [self.cell(found.get(column)) for column in columns]
            notes = "; ".join(dict.fromkeys(row.note for row in found.values() if row.note))
            lines.append([size, what, *entries, spread(found.values()), notes])
        return lines

    def cell(self, row: Measurement | None) -> str:
        """Return a median, and in brackets what follows from it, cut to two decimals."""
        if row is None or row.quartiles is None:
            return ""
        if self.figure not in row.figures:
            return number(row.median)
        cut = math.floor(100 * row.figures[self.figure] + 1e-9) / 100
        return f"{number(row.median)} ({cut:.2f})"


def filled(lines: list[list[str]]) -> list[list[str]]:
    """Return the columns that have anything below their head."""
    kept = [i for i in range(len(lines[0])) if any(entries[i] for entries in lines[1:])]
    return [[entries[i] for i in kept] for entries in lines]


def spread(rows: Iterable[Measurement]) -> str:
    """Return the largest interquartile range, relative to its median."""
    ranges = [(q[2] - q[0]) / q[1] for q in (row.quartiles for row in rows) if q is not None]
    return f"{100 * max(ranges):.1f} %" if ranges else ""


def line(entries: list[str]) -> str:
    """Return a line of a Markdown table."""
    return f"| {' | '.join(entry.replace('|', '/') for entry in entries)} |"


def number(value: float) -> str:
    """Return a number with three significant digits or more."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def about(settings: Settings) -> dict[str, Any]:
    """Return where this runs, with what, and how it was called."""
    versions = {"scalesweep_hf": scalesweep_hf.__version__, "python": platform.python_version()}
    versions |= {name: version_of(name) for name in PACKAGES}
    devices = {"cpu": name_of_cpu()}
    if torch.cuda.is_available():
        devices["cuda"] = torch.cuda.get_device_name()
        versions["cuda"] = str(torch.version.cuda)
    command = " ".join(["python", "examples/benchmarks/speed.py", *sys.argv[1:]])
    return {
        "command": command,
        "devices": devices,
        "versions": versions,
        "settings": asdict(settings),
    }


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
    names = [entry.split(":")[1].strip() for entry in lines if entry.startswith("model name")]
    return f"{(names or [platform.processor()])[0]}, {torch.backends.cpu.get_cpu_capability()}"


def preface(facts: dict[str, Any]) -> str:
    """Return the lines above the tables."""
    devices = "; ".join(facts["devices"].values())
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    spreads = "Spread: the largest interquartile range of a row, relative to its median."
    return f"`{facts['command']}`\n\n{devices}; {versions}. Times are medians. {spreads}\n"


def write(folder: Path, facts: dict[str, Any], tables: dict[str, Table]) -> None:
    """Write speed.md and speed.json; called after every row, so that none is lost."""
    folder.mkdir(parents=True, exist_ok=True)
    text = [preface(facts), *(table.markdown() for table in tables.values())]
    (folder / "speed.md").write_text("\n".join(text))
    subjects = {name: asdict(table) for name, table in tables.items()}
    (folder / "speed.json").write_text(json.dumps(facts | {"subjects": subjects}, indent=2))
