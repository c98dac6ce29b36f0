import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from scalesweep_hf import __version__
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def model() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "examples" / "benchmarks")
        yield importlib.import_module("model")


def test_the_benchmark_of_loading_measures_every_way_that_a_cpu_can(
    model: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    script = str(ROOT / "examples" / "benchmarks" / "model.py")
    sizes = ["--shape", "tiny", "--rows", "4", "--length", "32"]
    output = tmp_path / "model.json"
    monkeypatch.setattr(sys, "argv", [script, *sizes, "--device", "cpu", "--output", str(output)])
    args = model.parse_arguments()
    folders: list[str] = []

    def measure_here(way: str, folder: str) -> Any:
        folders.append(folder)
        return model.measure(way, folder, args)

    monkeypatch.setattr(model, "run_worker", measure_here)
    model.main()
    assert len(set(folders)) == 1
    assert not Path(folders[0]).exists()
    found = json.loads(output.read_text())
    assert found["versions"]["scalesweep_hf"] == __version__
    assert found["calibration"] == [4, 32]
    results = {result["what"]: result for result in found["results"]}
    assert list(results) == ["bf16", "mse", "wmse"]
    plain = results["bf16"]["parameter_bytes"]
    for what in ("mse", "wmse"):
        assert results[what]["parameter_bytes"] < 0.7 * plain
    printed = capsys.readouterr().out
    for result in results.values():
        assert 0 < result["seconds"] < 600
        assert result["resident_bytes"] > 10**8
        assert f"| {model.WAYS[result['what']]} | {result['seconds']:.2f} |" in printed


def test_a_worker_is_a_process_of_its_own(
    model: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = model.LlamaConfig(**model.SHAPES["tiny"], max_position_embeddings=32)
    model.save_random(shape, str(tmp_path), "cpu")
    monkeypatch.setattr(sys, "argv", [str(model.__file__), "--shape", "tiny", "--device", "cpu"])
    measured = model.run_worker("bf16", str(tmp_path))
    assert measured["what"] == "bf16"
    stored = (tmp_path / "model.safetensors").stat().st_size
    assert stored - 10_000 < measured["parameter_bytes"] < stored  # the file has a header
