"""What a table consists of: models, settings, tasks and text."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from scalesweep_hf.config import ALGORITHMS, SCHEMES, ScaleSweepConfig
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
        names = set()
        for cell in self.cells():
            cell.config(self.calibration)
            if cell.name in names:
                raise ValueError(f"two models are called {Path(cell.model).name!r}: rename one")
            names.add(cell.name)

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


def digest(plan: Plan, cell: Cell) -> str:
    """Return a digest of what decides a cell's result."""
    shared = asdict(plan)
    for name in ("models", "schemes", "algorithms", "objectives", "batch_size", "device_map"):
        del shared[name]
    for task in shared["tasks"]:
        del task["metric"]  # chosen when the table is written
    shared["limit"] = None if plan.limit is None else float(plan.limit)
    shared["version"] = __version__
    heldout = Path(str(plan.heldout).partition(":")[0])
    if heldout.is_file():
        shared["heldout_sha256"] = hashlib.sha256(heldout.read_bytes()).hexdigest()
    text = json.dumps([shared, asdict(cell)], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


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
