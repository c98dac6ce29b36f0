"""The benchmark command: what can run on a CPU runs, and nothing that fails is hidden."""

import importlib
import itertools
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from scalesweep_hf import NVFP4Linear, ScaleSweepConfig
from tests.conftest import ROOT
from tests.models import load

BENCHMARKS = ROOT / "examples" / "benchmarks"
PEERS = ("torchao", "fouroversix", "bitsandbytes", "Model-Optimizer", "llm-compressor")


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    names = ("timing", "tables", "subjects.decode", "subjects.cpu", "speed")
    return {name: importlib.import_module(name) for name in names}


@pytest.mark.slow
def test_one_command_measures_every_subject_and_names_what_it_could_not(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "speed.py"), "--tiny", "--device", "cpu"]
    command += ["--repeats", "2", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "speed.json").read_text(), parse_constant=pytest.fail)
    text = (tmp_path / "speed.md").read_text()
    assert "--tiny --device cpu --repeats 2" in found["command"]
    assert found["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert {"cpu"} <= set(found["devices"])
    assert list(found["subjects"]) == ["blocks", "linear", "attention", "decode", "cpu"]
    for subject in found["subjects"].values():
        assert f"## {subject['title']}\n" in text
        measured = [row for row in subject["rows"] if row["quartiles"] is not None]
        assert measured
        for row in measured:
            low, median, high = row["quartiles"]
            assert 0 < low <= median <= high
        for row in subject["rows"]:
            assert f"| {row['what']} |" in text
            assert row["column"] in text
            if row["quartiles"] is None:
                assert row["what"].startswith(PEERS), row
                assert row["note"] in text
    whats = {row["what"] for subject in found["subjects"].values() for row in subject["rows"]}
    assert {"mse, pack", "wmse, round", "W4A16", "sdpa", "packed", "WAKVQ", "wmse, torch"} <= whats
    assert all(any(what.startswith(peer) for what in whats) for peer in PEERS)


def test_without_a_device_a_subject_says_so(
    modules: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (row,) = modules["speed"].rows("linear", modules["timing"].Settings())
    assert row.note == "not run: no CUDA device"


def test_a_subject_that_fails_keeps_its_rows_and_names_the_error(
    modules: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    timing, speed = modules["timing"], modules["speed"]

    def measure(settings: Any) -> Iterator[Any]:
        yield timing.Measurement("1 x 1", "", "first", [1.0, 2.0, 3.0])
        raise RuntimeError("out of luck\nand more")

    monkeypatch.setattr(speed.SUBJECTS["blocks"], "measure", measure)
    rows = list(speed.rows("blocks", timing.Settings(device="cpu")))
    assert [row.what for row in rows] == ["first", "the rest"]
    assert rows[1].note == "RuntimeError: out of luck"
    table = modules["tables"].Table("T", "N", "s", "", rows).markdown()
    assert "| 1 x 1 | first | 2 (1 to 3) |  |" in table
    assert "|  | the rest |  | RuntimeError: out of luck |" in table
    assert "| size | what | s (quartiles) | notes |" in table


def test_what_raises_is_a_row_without_a_time(modules: dict[str, ModuleType]) -> None:
    timing = modules["timing"]

    def absent() -> tuple[list[float], str]:
        raise ModuleNotFoundError("No module named 'peer'")

    row = timing.attempt("size", "column", "peer", absent)
    assert row.quartiles is None
    assert math.isnan(row.median)
    assert row.note == "ModuleNotFoundError: No module named 'peer'"


def test_a_slow_measurement_is_repeated_less_often(
    modules: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    timing = modules["timing"]
    clock = itertools.count(0, 10)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(clock)))
    seen: list[int] = []

    def measure(i: int) -> float:
        seen.append(i)
        return float(i)

    assert timing.quartiles(measure, 50) == [1.0, 2.0, 3.0]
    assert seen == list(range(timing.ENOUGH))


def test_figures_of_one_row_make_a_column_for_all(modules: dict[str, ModuleType]) -> None:
    row = modules["timing"].Measurement
    rows = [row("a", "", "x", [1.0, 1.0, 1.0]), row("a", "", "y", [1.0, 1.0, 1.0], {"ratio": 0.25})]
    lines = modules["tables"].Table("T", "N", "s", "", rows).markdown().splitlines()
    assert lines[-4] == "| size | what | s (quartiles) | ratio |"
    assert lines[-2:] == ["| a | x | 1 (1 to 1) |  |", "| a | y | 1 (1 to 1) | 0.25 |"]


def test_sizes_in_columns_show_figure_spread_and_every_note(modules: dict[str, ModuleType]) -> None:
    row = modules["timing"].Measurement
    rows = [
        row("a", "1", "x", [1.0, 2.0, 3.0], {"share": 0.5, "hidden": 7.0}),
        row("a", "1", "y", note="No: such thing"),
        row("a", "2", "x", [9.0, 10.0, 11.0], note="no graph"),
    ]
    table = modules["tables"].Table("T", "N", "s", "share", rows)
    assert table.markdown().splitlines()[-4:] == [
        "| size | s (share) | 1 | 2 | spread | notes |",
        "| --- | --- | --- | --- | --- | --- |",
        "| a | x | 2 (0.50) | 10 | 100.0 % | no graph |",
        "| a | y |  |  |  | No: such thing |",
    ]


@pytest.mark.parametrize(
    ("share", "shown"), [(0.8967, "0.89"), (2.0, "2.00"), (0.29, "0.29"), (1.999, "1.99")]
)
def test_figures_behind_medians_are_cut_and_not_rounded_up(
    modules: dict[str, ModuleType], share: float, shown: str
) -> None:
    row = modules["timing"].Measurement("a", "1", "x", [1.0, 2.0, 3.0], {"share": share})
    assert modules["tables"].Table("T", "N", "s", "share").cell(row) == f"2 ({shown})"


def test_a_model_quantized_in_place_is_the_one_that_is_quantized_on_loading(
    modules: dict[str, ModuleType], tmp_path: Path
) -> None:
    decode = modules["subjects.decode"]
    model = decode.build("tiny", "cpu")
    model.save_pretrained(tmp_path)
    decode.quantize_in_place(model, "W")
    config = ScaleSweepConfig(scheme="W", objective="mse", dataset=None)
    loaded = load(tmp_path, quantization_config=config, device_map="cpu")
    expected = {n: m for n, m in loaded.named_modules() if isinstance(m, NVFP4Linear)}
    assert expected
    for name, module in expected.items():
        twin = model.get_submodule(name)
        for part in ("weight", "weight_scale", "weight_scale_2"):
            here, there = (getattr(m, part).reshape(-1).view(torch.uint8) for m in (twin, module))
            assert torch.equal(here, there), (name, part)


@pytest.mark.gpu
def test_a_captured_function_is_replayed(modules: dict[str, ModuleType]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    x = torch.zeros((), device="cuda")
    replay, reason = modules["timing"].captured(lambda: x.add_(1), "cuda")
    assert reason == ""
    before = float(x)
    replay()
    replay()
    assert float(x) == before + 2
    _, reason = modules["timing"].captured(lambda: x.item(), "cuda")
    assert reason
