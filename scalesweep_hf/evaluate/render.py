"""Write the results of a table out: Markdown, LaTeX, and a line about one cell."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scalesweep_hf.evaluate.plan import Task


def markdown(results: Mapping[str, Any]) -> str:
    """Return the table in Markdown: a row per cell, a column per task."""
    header, rows = _rows(results)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def latex(results: Mapping[str, Any]) -> str:
    """Return the table in LaTeX (booktabs)."""
    header, rows = _rows(results)
    escaped = [[cell.replace("_", r"\_").replace("%", r"\%") for cell in row] for row in rows]
    head = [cell.replace("_", r"\_").replace("%", r"\%") for cell in header]
    body = "\n".join(" & ".join(row) + r" \\" for row in escaped)
    columns = "l" * 4 + "r" * (len(header) - 4)
    return (
        f"\\begin{{tabular}}{{{columns}}}\n\\toprule\n{' & '.join(head)} \\\\\n\\midrule\n"
        f"{body}\n\\bottomrule\n\\end{{tabular}}\n"
    )


def summarise(result: Mapping[str, Any], tasks: Sequence[Task]) -> str:
    """Return one line about a cell."""
    parts = [f"{task.name} {score(result['tasks'][task.name], task):.4f}" for task in tasks]
    if "kl" in result:
        parts.append(f"KL {result['kl']:.5f}, perplexity {result['perplexity']:.3f}")
    seconds = result["seconds"]
    parts.append(f"{seconds['quantize']:.0f} s to quantize, {seconds['evaluate']:.0f} to evaluate")
    return "; ".join(parts)


def _rows(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    tasks = [Task(**task) for task in results["plan"]["tasks"]]
    fidelity = results["plan"]["heldout"] is not None
    header = ["model", "scheme", "algorithm", "scales", *(task.name for task in tasks)]
    header += ["average", "recovery, %"] if tasks else []
    header += ["KL", "perplexity"] if fidelity else []
    rows = []
    for cell in results["cells"]:
        row = [Path(cell["model"]).name, cell["scheme"], cell["algorithm"], cell["objective"]]
        row += [f"{100 * score(cell['tasks'][task.name], task):.2f}" for task in tasks]
        if tasks:
            recovery = cell.get("recovery")
            row.append(f"{100 * cell['average']:.2f}")
            row.append("-" if recovery is None else f"{recovery:.2f}")
        row += [f"{cell['kl']:.5f}", f"{cell['perplexity']:.3f}"] if fidelity else []
        rows.append(row)
    return header, rows


def score(metrics: Mapping[str, float], task: Task) -> float:
    """Return the number that stands for a task; raise ValueError if the task has no such metric."""
    if task.metric not in metrics:
        raise ValueError(
            f"{task.name} has no metric {task.metric!r}; set metric to one of {', '.join(metrics)}"
        )
    return metrics[task.metric]
