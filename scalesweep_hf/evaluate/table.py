"""The paper's table: models x schemes x algorithms x objectives, each cell evaluated and kept.

A cell's result is a JSON file, written when the cell is done: a second start goes on where the
first one stopped.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from scalesweep_hf.config import ALGORITHMS, SCHEMES, ScaleSweepConfig
from scalesweep_hf.evaluate.fidelity import measure_fidelity
from scalesweep_hf.evaluate.text import heldout_tokens
from scalesweep_hf.ops.objectives import OBJECTIVES
from scalesweep_hf.version import __version__

REFERENCE = "bf16"


@dataclass(frozen=True)
class Task:
    """One lm-eval task and how it is run.

    Attributes:
        name: as lm-eval knows it.
        metric: which number stands for it in averages.
        options: of `lm_eval.simple_evaluate`, for example num_fewshot and apply_chat_template.
    """

    name: str
    metric: str = "acc"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """A table.

    Attributes:
        models: folders or Hub ids.
        tasks: evaluated for every cell.
        schemes: of `ScaleSweepConfig`, as algorithms and objectives.
        algorithms: see schemes.
        objectives: see schemes.
        calibration: fields of `ScaleSweepConfig` that all cells share.
        heldout: text for KL and perplexity, see `heldout_tokens`; None leaves both out.
        heldout_rows: at the most.
        include_path: folder of task definitions.
        limit: documents per task at the most.
        batch_size: sequences per forward pass.
        device_map: of from_pretrained.
    """

    models: tuple[str, ...]
    tasks: tuple[Task, ...] = ()
    schemes: tuple[str, ...] = ("WA", "WAKV", "WAKVQ")
    algorithms: tuple[str, ...] = ("rtn", "gptq")
    objectives: tuple[str, ...] = ("absmax", "four_over_six", "mse", "wmse", "hessian")
    calibration: dict[str, Any] = field(default_factory=dict)
    heldout: str | None = None
    heldout_rows: int | None = None
    include_path: str | None = None
    limit: float | None = None
    batch_size: int = 8
    device_map: str | None = None

    @classmethod
    def from_yaml(cls, path: str | Path, **changes: Any) -> "Plan":
        """Read a plan.

        Args:
            path: YAML file with the attributes as keys; a task is a name or a mapping.
            changes: attributes that replace the file's.

        Raises:
            ValueError: a key or a value is unknown.
        """
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"{path} holds a {type(content).__name__}; expected a mapping")
        content |= changes
        known = {entry.name for entry in fields(cls)}
        if unknown := sorted(set(content) - known):
            raise ValueError(f"{path}: unknown keys {unknown}; a plan has {sorted(known)}")
        if not content.get("models"):
            raise ValueError(f"{path} names no models")
        tasks = [{"name": t} if isinstance(t, str) else dict(t) for t in content.get("tasks", ())]
        content["tasks"] = tuple(Task(**task) for task in tasks)
        for name in ("models", "schemes", "algorithms", "objectives"):
            if name in content:
                content[name] = tuple(content[name])
        plan = cls(**content)
        plan.validate()
        return plan

    def validate(self) -> None:
        """Raise ValueError for the first value that no cell could have."""
        known = {"schemes": SCHEMES, "algorithms": ALGORITHMS, "objectives": tuple(OBJECTIVES)}
        for name, choices in known.items():
            if wrong := [value for value in getattr(self, name) if value not in choices]:
                raise ValueError(f"{name} has {wrong[0]!r}; use some of {', '.join(choices)}")
        if not self.tasks and self.heldout is None:
            raise ValueError("a plan needs tasks, or heldout text for KL and perplexity")
        for cell in self.cells():
            cell.config(self.calibration)

    def cells(self) -> Iterator["Cell"]:
        """Yield every cell, the reference of each model first."""
        for model in self.models:
            yield Cell(model, REFERENCE, "", "")
            for setting in product(self.schemes, self.algorithms, self.objectives):
                yield Cell(model, *setting)


@dataclass(frozen=True)
class Cell:
    """One model in one setting; scheme "bf16" is the model as it is."""

    model: str
    scheme: str
    algorithm: str
    objective: str

    @property
    def name(self) -> str:
        """What to call it: also its file's stem."""
        model = Path(self.model).name
        parts = [part for part in (self.scheme, self.algorithm, self.objective) if part]
        return "-".join([model, *parts])

    def config(self, calibration: Mapping[str, Any]) -> ScaleSweepConfig | None:
        """Return its recipe; None for the reference."""
        if self.scheme == REFERENCE:
            return None
        return ScaleSweepConfig(
            scheme=self.scheme,
            algorithm=self.algorithm,
            objective=self.objective,
            **calibration,
        )


def run_table(
    plan: Plan, folder: str | Path, *, report: Callable[[str], None] = print
) -> dict[str, Any]:
    """Evaluate every cell that has no result yet; write results.json, table.md and table.tex.

    Args:
        plan: the table.
        folder: where results are kept, one file per cell, and found again.
        report: told about every cell.

    Returns:
        What results.json holds.

    Raises:
        ValueError: the folder has results of another plan.
    """
    folder = Path(folder)
    (folder / "cells").mkdir(parents=True, exist_ok=True)
    cells = list(plan.cells())
    reference: Any = None
    for number, cell in enumerate(cells, start=1):
        file = folder / "cells" / f"{cell.name}.json"
        if cell.scheme == REFERENCE:
            reference = None
        if file.is_file():
            _check_same_plan(file, plan, cell)
            report(f"[{number}/{len(cells)}] {cell.name}: done before")
            continue
        if reference is None and plan.heldout is not None:
            reference = _load(plan, Cell(cell.model, REFERENCE, "", ""))
        result = evaluate_cell(plan, cell, reference)
        _write(file, json.dumps(result, indent=2))
        report(f"[{number}/{len(cells)}] {cell.name}: {summarise(result)}")
    results = collect_results(plan, folder)
    _write(folder / "results.json", json.dumps(results, indent=2))
    _write(folder / "table.md", markdown(results))
    _write(folder / "table.tex", latex(results))
    return results


def evaluate_cell(plan: Plan, cell: Cell, reference: Any) -> dict[str, Any]:
    """Quantize one model in one way and evaluate it.

    Args:
        plan: what to evaluate.
        cell: the model and the setting.
        reference: the model in full precision, for KL; None leaves KL out.

    Returns:
        JSON types: those of `evaluate_model`, and the cell, seconds, versions, the recipe as it was
        resolved and a digest of the plan.
    """
    start = time.perf_counter()
    model = _load(plan, cell)
    loaded = time.perf_counter()
    result = evaluate_model(plan, model, model if cell.scheme == REFERENCE else reference)
    seconds = {"quantize": loaded - start, "evaluate": time.perf_counter() - loaded}
    about = {"recipe": _recipe(model), "plan": digest(plan, cell), "versions": versions()}
    return asdict(cell) | result | {"seconds": seconds} | about


def evaluate_model(plan: Plan, model: Any, reference: Any) -> dict[str, Any]:
    """Evaluate a loaded model.

    Args:
        plan: what to evaluate.
        model: a Transformers causal language model.
        reference: the same in full precision, for KL; None leaves KL out.

    Returns:
        ``tasks``: the metrics of every task; ``average`` of the tasks' chosen metrics, None without
        tasks; with held-out text ``perplexity`` and ``kl``, nats per token.
    """
    tasks = {}
    for task in plan.tasks:
        from scalesweep_hf.evaluate.harness import evaluate_tasks

        tasks[task.name] = evaluate_tasks(
            model,
            [task.name],
            include_path=plan.include_path,
            limit=plan.limit,
            batch_size=plan.batch_size,
            **task.options,
        )[task.name]
    scores = [_score(tasks[task.name], task) for task in plan.tasks]
    result: dict[str, Any] = {
        "tasks": tasks,
        "average": sum(scores) / len(scores) if scores else None,
    }
    if plan.heldout is not None:
        tokens = heldout_tokens(plan.heldout, model, rows=plan.heldout_rows)
        against = model if reference is None else reference
        batch = plan.batch_size
        measured = measure_fidelity({"": model}, against, tokens, batch_size=batch)[""]
        result["perplexity"] = measured.perplexity
        if reference is not None:
            result["kl"] = measured.kl
    return result


def collect_results(plan: Plan, folder: Path) -> dict[str, Any]:
    """Gather all cells' results, with their recovery in percent of the model's reference."""
    results = []
    reference: dict[str, Any] = {}
    for cell in plan.cells():
        result = json.loads((folder / "cells" / f"{cell.name}.json").read_text())
        if cell.scheme == REFERENCE:
            reference = result
        if result["average"] is not None:
            result["recovery"] = 100 * result["average"] / reference["average"]
        results.append(result)
    return {"plan": asdict(plan), "versions": versions(), "cells": results}


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


def summarise(result: Mapping[str, Any]) -> str:
    """Return one line about a cell."""
    parts = []
    if result["average"] is not None:
        parts.append(f"average {100 * result['average']:.2f}")
    if "kl" in result:
        parts.append(f"KL {result['kl']:.5f}, perplexity {result['perplexity']:.3f}")
    seconds = result["seconds"]
    parts.append(f"{seconds['quantize']:.0f} s to quantize, {seconds['evaluate']:.0f} to evaluate")
    return "; ".join(parts)


def versions() -> dict[str, str]:
    """Return the versions that a figure depends on."""
    found = {
        "scalesweep_hf": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    try:
        import lm_eval
    except ImportError:
        return found
    return found | {"lm_eval": str(lm_eval.__version__)}


def digest(plan: Plan, cell: Cell) -> str:
    """Return a digest of what decides a cell's result."""
    shared = asdict(plan)
    for name in ("models", "schemes", "algorithms", "objectives", "batch_size", "device_map"):
        del shared[name]
    text = json.dumps([shared, asdict(cell)], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _rows(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    tasks = [Task(**task) for task in results["plan"]["tasks"]]
    fidelity = results["plan"]["heldout"] is not None
    header = ["model", "scheme", "algorithm", "scales", *(task.name for task in tasks)]
    header += ["average", "recovery, %"] if tasks else []
    header += ["KL", "perplexity"] if fidelity else []
    rows = []
    for cell in results["cells"]:
        row = [Path(cell["model"]).name, cell["scheme"], cell["algorithm"], cell["objective"]]
        row += [f"{100 * _score(cell['tasks'][task.name], task):.2f}" for task in tasks]
        row += [f"{100 * cell['average']:.2f}", f"{cell['recovery']:.2f}"] if tasks else []
        row += [f"{cell['kl']:.5f}", f"{cell['perplexity']:.3f}"] if fidelity else []
        rows.append(row)
    return header, rows


def _score(metrics: Mapping[str, float], task: Task) -> float:
    if task.metric not in metrics:
        raise ValueError(
            f"{task.name} has no metric {task.metric!r}; set metric to one of {', '.join(metrics)}"
        )
    return metrics[task.metric]


def _load(plan: Plan, cell: Cell) -> Any:
    return load_model(cell.model, cell.config(plan.calibration), plan.device_map)


def load_model(name: str, config: ScaleSweepConfig | None, device_map: str | None) -> Any:
    """Load a causal language model, quantized on the way if there is a recipe."""
    # (Not even None may be passed for what is quantized already.)
    options: dict[str, Any] = {} if config is None else {"quantization_config": config}
    if device_map is not None:
        options["device_map"] = device_map
    return AutoModelForCausalLM.from_pretrained(name, **options)


def _recipe(model: Any) -> dict[str, Any] | None:
    config = getattr(model.config, "quantization_config", None)
    if config is None:
        return None
    recipe: dict[str, Any] = config if isinstance(config, dict) else config.to_dict()
    return {key: value for key, value in recipe.items() if key != "quantized_modules"}


def _check_same_plan(file: Path, plan: Plan, cell: Cell) -> None:
    if json.loads(file.read_text())["plan"] != digest(plan, cell):
        raise ValueError(f"{file} is of another plan: use another folder, or delete it")


def _write(file: Path, text: str) -> None:
    part = file.with_name(file.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(file)


def describe(plan: Plan, folder: str | Path, sizes: Mapping[str, int]) -> Sequence[str]:
    """Return what a run would do, line by line: cells, what is done, and what calibration costs.

    Args:
        plan: the table.
        folder: where results are kept.
        sizes: parameters of every model.
    """
    cells = list(plan.cells())
    done = [c for c in cells if (Path(folder) / "cells" / f"{c.name}.json").is_file()]
    lines = [f"{len(cells)} cells, {len(done)} of them done, in {folder}"]
    for model in plan.models:
        mine = [c for c in cells if c.model == model and c not in done]
        config = ScaleSweepConfig(**plan.calibration)
        tokens = config.num_samples * config.sequence_length
        passes = {"rtn": 1, "gptq": 2, "gptq-plus": 4}
        runs = sum(passes.get(cell.algorithm, 0) for cell in mine)
        size = sizes[model]
        lines.append(
            f"{model}: {size / 1e9:.2f} B parameters, {len(mine)} cells to do; calibration "
            f"{runs} x {tokens:,} tokens, {2 * size * tokens * runs:.1e} operations; each cell "
            f"runs {len(plan.tasks)} tasks"
        )
    lines.append("The time of the first quantized cell tells that of the others of its scheme.")
    return lines


def count_parameters(model: str) -> int:
    """Return the parameters of a model, from its config alone."""
    config = AutoConfig.from_pretrained(model)
    with torch.device("meta"):
        shape = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in shape.parameters())
