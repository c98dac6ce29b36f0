"""The paper's table: models x schemes x algorithms x objectives, each cell evaluated and kept.

A cell's result is a JSON file, written when the cell is done: a second start goes on where the
first one stopped.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from scalesweep_hf.config import ScaleSweepConfig
from scalesweep_hf.evaluate.fidelity import measure_fidelity
from scalesweep_hf.evaluate.plan import REFERENCE, Cell, Plan, digest
from scalesweep_hf.evaluate.render import latex, markdown, score, summarise
from scalesweep_hf.evaluate.text import heldout_tokens
from scalesweep_hf.files import write_text
from scalesweep_hf.version import __version__


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
    for cell in cells:
        if (file := folder / "cells" / f"{cell.name}.json").is_file():
            _check_same_plan(file, plan, cell)
    reference: Any = None
    for number, cell in enumerate(cells, start=1):
        file = folder / "cells" / f"{cell.name}.json"
        if cell.scheme == REFERENCE:
            reference = None
        if file.is_file():
            report(f"[{number}/{len(cells)}] {cell.name}: done before")
            continue
        if reference is None and plan.heldout is not None:
            reference = _load(plan, Cell(cell.model, REFERENCE, "", ""))
        result = evaluate_cell(plan, cell, reference)
        write_text(file, json.dumps(result, indent=2))
        report(f"[{number}/{len(cells)}] {cell.name}: {summarise(result, plan.tasks)}")
    results = collect_results(plan, folder)
    write_text(folder / "results.json", json.dumps(results, indent=2))
    write_text(folder / "table.md", markdown(results))
    write_text(folder / "table.tex", latex(results))
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
    is_reference = cell.scheme == REFERENCE
    model = reference if is_reference and reference is not None else _load(plan, cell)
    loaded = time.perf_counter()
    result = evaluate_model(plan, model, model if is_reference else reference)
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
        ``tasks``: the metrics of every task; with held-out text ``perplexity`` and, with a
        reference, ``kl``, nats per token.
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
    result: dict[str, Any] = {"tasks": tasks}
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
    """Gather all cells' results, with their average and its recovery in percent of the reference.

    Raises:
        ValueError: a task has no such metric as the plan names.
    """
    results = []
    reference: dict[str, Any] = {}
    for cell in plan.cells():
        result = json.loads((folder / "cells" / f"{cell.name}.json").read_text())
        scores = [score(result["tasks"][task.name], task) for task in plan.tasks]
        result["average"] = sum(scores) / len(scores) if scores else None
        if cell.scheme == REFERENCE:
            reference = result
        if reference["average"]:
            result["recovery"] = 100 * result["average"] / reference["average"]
        results.append(result)
    return {"plan": asdict(plan), "cells": results}


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


def _load(plan: Plan, cell: Cell) -> Any:
    model = load_language_model(cell.model, cell.config(plan.calibration), plan.device_map)
    if cell.scheme == REFERENCE and is_quantized(model.config):
        raise ValueError(f"{cell.model} is quantized already: name the full-precision model")
    return model


def load_model(name: str, config: ScaleSweepConfig | None, device_map: str | None) -> Any:
    """Load a model as the class that its config names, quantized on the way if there is a recipe.

    Raises:
        ValueError: there is a recipe, and the model is quantized already.
    """
    about = AutoConfig.from_pretrained(name)
    if config is not None and is_quantized(about):
        raise ValueError(f"{name} is quantized already: name the full-precision model")
    # (Not even None may be passed for what is quantized already.)
    options: dict[str, Any] = {} if config is None else {"quantization_config": config}
    if device_map is not None:
        options["device_map"] = device_map
    (architecture,) = (about.architectures or ["AutoModelForCausalLM"])[:1]
    return getattr(transformers, architecture, AutoModelForCausalLM).from_pretrained(
        name, **options
    )


def load_language_model(name: str, config: ScaleSweepConfig | None, device_map: str | None) -> Any:
    """Load a model that predicts the next token, as `load_model`.

    Raises:
        ValueError: the model is of another kind.
    """
    model = load_model(name, config, device_map)
    if not model.can_generate():
        raise ValueError(f"{name} is a {type(model).__name__}, which does not predict tokens")
    return model


def is_quantized(config: Any) -> bool:
    """Whether a model's config says that its checkpoint is quantized."""
    return getattr(config, "quantization_config", None) is not None


def _recipe(model: Any) -> dict[str, Any] | None:
    config = getattr(model.config, "quantization_config", None)
    if config is None:
        return None
    recipe: dict[str, Any] = config if isinstance(config, dict) else config.to_dict()
    return {key: value for key, value in recipe.items() if key != "quantized_modules"}


def _check_same_plan(file: Path, plan: Plan, cell: Cell) -> None:
    if json.loads(file.read_text())["plan"] != digest(plan, cell):
        raise ValueError(f"{file} is of another plan: use another folder, or delete it")


def count_parameters(model: str) -> int:
    """Return the parameters of a model, from its config alone."""
    config = AutoConfig.from_pretrained(model)
    with torch.device("meta"):
        shape = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in shape.parameters())
