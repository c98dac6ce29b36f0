"""Write what was measured: a Markdown table per subject, and JSON."""

import importlib.metadata
import json
import platform
import sys
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
        rows: in order.
        seconds: that the subject took.
    """

    title: str
    note: str
    unit: str
    rows: list[Measurement] = field(default_factory=list)
    seconds: float = 0.0

    def markdown(self) -> str:
        """Return title, note and table."""
        names = list(dict.fromkeys(name for row in self.rows for name in row.figures))
        head = ["size", "what", f"{self.unit} (quartiles)", *names]
        lines = [f"## {self.title}", "", self.note, "", line(head), line(["---"] * len(head))]
        lines += [line(cells(row, names)) for row in self.rows]
        return "\n".join(lines) + "\n"


def line(entries: list[str]) -> str:
    """Return a line of a Markdown table."""
    return f"| {' | '.join(entry.replace('|', '/') for entry in entries)} |"


def cells(row: Measurement, names: list[str]) -> list[str]:
    """Return the cells of a row."""
    if row.quartiles is None:
        shown = row.problem
    else:
        low, median, high = map(number, row.quartiles)
        shown = f"{median} ({low} to {high})"
    return [row.case, row.what, shown, *(number(row.figures.get(name, "")) for name in names)]


def number(value: float | str) -> str:
    """Return a number with three significant digits or more; strings as they are."""
    if isinstance(value, str):
        return value
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
    about = f"{devices}; {versions}. Times are medians, with their quartiles."
    return f"`{facts['command']}`\n\n{about}\n"


def write(folder: Path, facts: dict[str, Any], tables: dict[str, Table]) -> None:
    """Write speed.md and speed.json; called after every row, so that none is lost."""
    folder.mkdir(parents=True, exist_ok=True)
    text = [preface(facts), *(table.markdown() for table in tables.values())]
    (folder / "speed.md").write_text("\n".join(text))
    subjects = {name: asdict(table) for name, table in tables.items()}
    (folder / "speed.json").write_text(json.dumps(facts | {"subjects": subjects}, indent=2))
