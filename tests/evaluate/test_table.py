import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from scalesweep_hf import ScaleSweepConfig
from scalesweep_hf.evaluate import table
from scalesweep_hf.evaluate.plan import Cell, Plan, Task, describe
from scalesweep_hf.evaluate.render import latex, markdown
from scalesweep_hf.evaluate.table import run_table
from scalesweep_hf.evaluate.text import heldout_tokens
from tests.conftest import ROOT
from tests.models import load, random_tokens


@pytest.fixture
def plan(random_model: Any, tmp_path: Path) -> Plan:
    save_file({"a": random_tokens(3, 16), "b": random_tokens(2, 16)}, tmp_path / "t.safetensors")
    return Plan(
        models=(str(random_model("llama")),),
        schemes=("W",),
        algorithms=("rtn",),
        objectives=("absmax", "wmse"),
        calibration={"num_samples": 2, "sequence_length": 16},
        heldout=f"{tmp_path}/t.safetensors:a",
        device_map="cpu",
    )


def test_every_cell_is_measured_once_and_kept(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    results = run_table(plan, tmp_path / "out", report=lines.append)
    cells = {cell["objective"] or "bf16": cell for cell in results["cells"]}
    assert list(cells) == ["bf16", "absmax", "wmse"]
    assert cells["bf16"]["kl"] == 0.0
    assert 0 < cells["wmse"]["kl"] != cells["absmax"]["kl"] > 0
    assert cells["wmse"]["recipe"]["calibration"]["num_samples"] == 2
    assert cells["wmse"]["versions"]["torch"] == torch.__version__
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == json.loads(
        json.dumps(results)
    )
    assert len(lines) == 3
    monkeypatch.setattr(table, "load_model", lambda *args: pytest.fail("loaded again"))
    again = run_table(plan, tmp_path / "out", report=lines.append)
    assert [cell["kl"] for cell in again["cells"]] == [c["kl"] for c in cells.values()]
    assert all("done before" in line for line in lines[3:])


def test_it_goes_on_after_an_interruption(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_table(plan, tmp_path / "whole", report=lambda line: None)
    original = table.evaluate_cell

    def interrupted(plan: Plan, cell: Cell, reference: Any) -> Any:
        if cell.objective == "wmse":
            raise KeyboardInterrupt
        return original(plan, cell, reference)

    monkeypatch.setattr(table, "evaluate_cell", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_table(plan, tmp_path / "out", report=lambda line: None)
    assert not (tmp_path / "out" / "results.json").exists()
    monkeypatch.undo()
    results = run_table(plan, tmp_path / "out", report=lambda line: None)
    assert [c["kl"] for c in results["cells"]] == [c["kl"] for c in whole["cells"]]


def test_results_of_another_plan_are_refused(plan: Plan, tmp_path: Path) -> None:
    run_table(plan, tmp_path / "out", report=lambda line: None)
    other = Plan(**{**vars(plan), "heldout_rows": 1})
    with pytest.raises(ValueError, match=r"bf16\.json is of another plan: use another folder"):
        run_table(other, tmp_path / "out", report=lambda line: None)


@pytest.mark.slow
def test_tasks_are_averaged_and_compared_with_the_reference(
    trained_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = pytest.importorskip("scalesweep_hf.evaluate.harness")
    docs = [
        {"query": f"Goal: the {word}.\nAnswer:", "choices": ["the cat ran", word], "gold": i % 2}
        for i, word in enumerate(["cat", "dog", "fox", "hen", "owl", "pig"])
    ]
    for name in ("piqa", "arc_easy"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(doc) for doc in docs))
    monkeypatch.setenv("OFFLINE_DATA", str(tmp_path))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    seen: list[dict[str, Any]] = []
    original = harness.evaluate_tasks

    def kept(model: Any, tasks: list[str], **kwargs: Any) -> Any:
        seen.append({"tasks": tasks, **kwargs})
        return original(model, tasks, **kwargs)

    monkeypatch.setattr(harness, "evaluate_tasks", kept)
    plan = Plan(
        models=(str(trained_model),),
        tasks=(
            Task("offline_piqa", "acc_norm"),
            Task("offline_arc_easy", "acc", {"num_fewshot": 1}),
        ),
        schemes=("W",),
        algorithms=("rtn",),
        objectives=("mse",),
        calibration={"dataset": None},
        include_path=str(ROOT / "examples" / "offline_tasks"),
        limit=5,
        device_map="cpu",
    )
    results = run_table(plan, tmp_path / "out", report=lambda line: None)
    reference, cell = results["cells"]
    for found in (reference, cell):
        scores = [found["tasks"]["offline_piqa"]["acc_norm"]]
        scores.append(found["tasks"]["offline_arc_easy"]["acc"])
        assert found["average"] == sum(scores) / 2
        if reference["average"]:
            assert found["recovery"] == 100 * found["average"] / reference["average"]
    assert [call["limit"] for call in seen] == [5] * 4
    assert [call.get("num_fewshot") for call in seen] == [None, 1] * 2


def test_models_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text("models: [a/x, b/x]\nheldout: y")
    with pytest.raises(ValueError, match="two models are called 'x': rename one"):
        Plan.from_yaml(tmp_path / "plan.yaml")


def test_other_text_under_the_same_name_is_another_plan(plan: Plan, tmp_path: Path) -> None:
    run_table(plan, tmp_path / "out", report=lambda line: None)
    save_file({"a": random_tokens(3, 16, seed=5)}, tmp_path / "t.safetensors")
    with pytest.raises(ValueError, match="is of another plan"):
        run_table(plan, tmp_path / "out", report=lambda line: None)


def test_a_quantized_model_is_no_reference(plan: Plan, tmp_path: Path) -> None:
    config = ScaleSweepConfig(scheme="W", objective="mse", dataset=None)
    load(Path(plan.models[0]), quantization_config=config).save_pretrained(tmp_path / "q")
    for model in ("q",):
        other = Plan(**{**vars(plan), "models": (str(tmp_path / model),)})
        with pytest.raises(ValueError, match="is quantized already"):
            run_table(other, tmp_path / "out", report=lambda line: None)


def result(scheme: str, accuracy: float) -> dict[str, Any]:
    return {
        "model": "a/b_c",
        "scheme": scheme,
        "algorithm": "rtn",
        "objective": "mse",
        "tasks": {"t_1": {"acc": accuracy}},
        "average": accuracy,
        "recovery": 100 * accuracy / 0.5,
        "kl": 0.1,
        "perplexity": 20.0,
    }


def test_tables_are_written_out() -> None:
    plan = Plan(models=("a/b_c",), tasks=(Task("t_1"),), heldout="x")
    from dataclasses import asdict

    results = {"plan": asdict(plan), "cells": [result("bf16", 0.5), result("WA", 0.475)]}
    assert markdown(results).splitlines() == [
        "| model | scheme | algorithm | scales | t_1 | average | recovery, % | KL | perplexity |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| b_c | bf16 | rtn | mse | 50.00 | 50.00 | 100.00 | 0.10000 | 20.000 |",
        "| b_c | WA | rtn | mse | 47.50 | 47.50 | 95.00 | 0.10000 | 20.000 |",
    ]
    assert r"b\_c & WA & rtn & mse & 47.50 & 47.50 & 95.00 & 0.10000 & 20.000 \\" in latex(results)


def test_a_dry_run_counts_cells(plan: Plan, tmp_path: Path) -> None:
    lines = describe(plan, tmp_path, {plan.models[0]: 10**9})
    assert lines[0] == f"3 cells, 0 of them done, in {tmp_path}"
    assert "1.00 B parameters, 3 cells to do; calibration 2 x 32 tokens" in lines[1]
    assert table.count_parameters(plan.models[0]) == sum(
        p.numel() for p in load(Path(plan.models[0])).parameters()
    )


@pytest.mark.parametrize("name", ["paper", "offline"])
def test_plans_of_the_repository_load(name: str) -> None:
    plan = Plan.from_yaml(ROOT / "configs" / f"{name}.yaml")
    assert len(list(plan.cells())) == len(plan.models) * 31
    assert len({cell.name for cell in plan.cells()}) == len(plan.models) * 31
    assert len(plan.tasks) == 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a", "holds a list; expected a mapping"),
        ("models: []\nheldout: x", "names no models"),
        ("models: [a]", "a plan needs tasks, or heldout text"),
        ("models: [a]\nheldout: x\nschemas: [W]", r"unknown keys \['schemas'\]"),
        ("models: [a]\nheldout: x\nschemes: [B]", "schemes has 'B'; use some of W, WA"),
        ("models: [a]\nheldout: x\nobjectives: [best]", "objectives has 'best'"),
        ("models: [a]\nheldout: x\ncalibration: {num_samples: 0}", "num_samples is 0"),
    ],
)
def test_wrong_plans_raise_before_anything_is_loaded(
    text: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        Plan.from_yaml(tmp_path / "plan.yaml")


def test_heldout_text_is_read_from_tokens_and_text(
    trained_model: Path, plan: Plan, tmp_path: Path
) -> None:
    model = load(trained_model)
    file = tmp_path / "t.safetensors"
    assert heldout_tokens(f"{file}:b", model).shape == (2, 16)
    assert heldout_tokens(f"{file}:a", model, rows=1).shape == (1, 16)
    (tmp_path / "t.txt").write_text("the cat ran to the dog\n" * 50)
    assert heldout_tokens(str(tmp_path / "t.txt"), model, rows=2, length=32).shape == (2, 32)
    with pytest.raises(ValueError, match="has the tensors a, b: name one"):
        heldout_tokens(str(file), model)
    with pytest.raises(ValueError, match="'self', which every model would write anew"):
        heldout_tokens("self", model)
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors' do not exist"):
        heldout_tokens("nothing.safetensors", model)
