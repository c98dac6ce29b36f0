"""Checkpoints reload with no import of the package, after a plain and after an editable install."""

import json
import os
import subprocess
import sys
import threading
import venv
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from scalesweep_hf import ScaleSweepConfig, discovery
from tests.conftest import ROOT

OPT_OUT = {"SCALESWEEP_NO_AUTOLOAD": "1"}
INSTALLS = ("wheel", "editable")
PTH = (ROOT / "scalesweep_hf" / "scalesweep_hf.pth").read_text(encoding="utf-8")


def make_environment(folder: Path) -> tuple[Path, Path]:
    """Make an environment that sees the packages of this one, but none of its .pth files."""
    venv.create(folder, with_pip=False)
    (packages,) = (folder / "lib").glob("python*/site-packages")
    (own,) = {p for p in sys.path if p.endswith("site-packages") and (Path(p) / "torch").is_dir()}
    (packages / "environment.pth").write_text(own)
    return folder / "bin" / "python", packages


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the interpreter of an environment with the package, built and installed once."""
    pytest.importorskip("hatchling")
    pytest.importorskip("editables")
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            python, packages = make_environment(folder / "venv")
            (packages / "environment.pth").rename(folder / "later")
            build = f"from hatchling import build; build.build_{kind}({str(folder)!r})"
            subprocess.run([sys.executable, "-c", build], cwd=ROOT, check=True, capture_output=True)
            pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps"]
            (wheel,) = folder.glob("*.whl")
            subprocess.run([*pip, "--no-index", str(wheel)], check=True, capture_output=True)
            (folder / "later").rename(packages / "environment.pth")
            made[kind] = python
        return made[kind]

    return get


def run(
    python: Path, *arguments: Any, cwd: Path, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", *OPT_OUT)}
    quiet = {"TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [python, *arguments],
        cwd=cwd,
        env=clean | quiet | (env or {}),
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="session")
def checkpoint(trained_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    config = ScaleSweepConfig(
        scheme="WA", num_samples=2, sequence_length=32, modules_to_not_convert=["layers.0"]
    )
    model = AutoModelForCausalLM.from_pretrained(trained_model, quantization_config=config)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(trained_model).save_pretrained(folder)
    return folder


IMPORTED = "import json, sys; print(json.dumps(sorted(sys.modules)))"


@pytest.mark.parametrize("kind", INSTALLS)
def test_starting_up_imports_two_small_modules_and_nothing_else(
    kind: str, installed: Callable[[str], Path], tmp_path: Path
) -> None:
    on, off = (run(installed(kind), "-c", IMPORTED, cwd=tmp_path, env=e) for e in ({}, OPT_OUT))
    assert (on.stderr, off.stderr) == ("", "")
    added = set(json.loads(on.stdout)) - set(json.loads(off.stdout))
    assert added == {"scalesweep_hf", "scalesweep_hf.discovery"}


RELOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
assert "scalesweep_hf.quantizer" not in sys.modules
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
with torch.no_grad():
    print(model(torch.tensor([[5, 7, 9, 11]])).logits.float().flatten().tolist())
assert type(model.model.layers[1].mlp.up_proj).__name__ == "NVFP4Linear"
"""


@pytest.mark.parametrize("kind", INSTALLS)
def test_a_checkpoint_reloads_with_no_import(
    kind: str, installed: Callable[[str], Path], checkpoint: Path, tmp_path: Path
) -> None:
    done = run(installed(kind), "-c", RELOAD, checkpoint, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(checkpoint)
        expected = model(torch.tensor([[5, 7, 9, 11]])).logits.float().flatten().tolist()
    assert json.loads(done.stdout) == expected


def test_a_pipeline_reloads_with_no_import(
    installed: Callable[[str], Path], checkpoint: Path, tmp_path: Path
) -> None:
    code = (
        "import sys; from transformers import pipeline\n"
        "pipe = pipeline('text-generation', model=sys.argv[1])\n"
        "print(pipe('The', max_new_tokens=3, do_sample=False)[0]['generated_text'])\n"
        "assert type(pipe.model.model.layers[1].mlp.up_proj).__name__ == 'NVFP4Linear'"
    )
    done = run(installed("wheel"), "-c", code, checkpoint, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("The")


@pytest.mark.parametrize("order", ["before", "after"])
def test_an_import_registers_also_where_autoload_is_off(
    order: str, installed: Callable[[str], Path], checkpoint: Path, tmp_path: Path
) -> None:
    lines = ["from transformers.quantizers import auto", "import scalesweep_hf"]
    unknown = "assert 'scalesweep' not in auto.AUTO_QUANTIZER_MAPPING"
    lines = [lines[0], unknown, lines[1]] if order == "after" else lines[::-1]
    code = "\n".join([*lines, RELOAD])
    done = run(installed("wheel"), "-c", code, checkpoint, cwd=tmp_path, env=OPT_OUT)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("model", ["hf", "scalesweep"])
def test_lm_eval_loads_a_checkpoint_with_no_import(
    model: str, installed: Callable[[str], Path], checkpoint: Path, tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval")
    docs = [{"query": "Goal: A\nAnswer:", "choices": ["It ran.", "zq"], "gold": 0}]
    (tmp_path / "piqa.jsonl").write_text("\n".join(map(json.dumps, docs)))
    done = run(
        installed("wheel"),
        *("-m", "lm_eval", "--model", model, "--model_args", f"pretrained={checkpoint}"),
        *("--tasks", "offline_piqa", "--include_path", ROOT / "examples" / "offline_tasks"),
        *("--device", "cpu", "--output_path", tmp_path / "out.json"),
        cwd=tmp_path,
        env={"OFFLINE_DATA": str(tmp_path), "HF_DATASETS_CACHE": str(tmp_path / "cache")},
    )
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("**/*out*.json")
    assert json.loads(file.read_text())["n-samples"]["offline_piqa"]["effective"] == 1


@pytest.mark.parametrize("package", ["absent", "broken"])
def test_what_is_left_of_the_package_breaks_no_start(package: str, tmp_path: Path) -> None:
    python, packages = make_environment(tmp_path / "venv")
    (packages / "environment.pth").unlink()
    (packages / "scalesweep_hf.pth").write_text(PTH)
    if package == "broken":
        (packages / "scalesweep_hf").mkdir()
        (packages / "scalesweep_hf" / "__init__.py").write_text("a b")
    done = run(python, "-c", "print(1)", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")


# The finder itself


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Return the name of a module on disk."""
    (tmp_path / "followed_module.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "followed_module"
    sys.modules.pop("followed_module", None)


def test_installing_twice_adds_one_finder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    for _ in range(2):
        discovery.install()
    assert sum(isinstance(finder, discovery.Finder) for finder in sys.meta_path) == 1


def test_a_followed_module_is_loaded_as_it_would_be_without_us(
    module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    followed: list[Any] = []
    monkeypatch.setitem(discovery.FOLLOWERS, module, followed.append)
    found: Any = __import__(module)
    assert followed == [found]
    assert found.value == 1
    for loader in (found.__loader__, found.__spec__.loader):
        assert type(loader).__name__ == "SourceFileLoader"


def test_the_import_of_a_module_survives_the_failure_of_what_follows(
    module: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(module: ModuleType) -> None:
        raise AttributeError("no such mapping")

    monkeypatch.setitem(discovery.FOLLOWERS, module, fail)
    assert __import__(module).value == 1
    assert f"could not register with {module}" in caplog.text
    assert "no such mapping" in caplog.text


def test_finders_behind_ours_are_asked_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name = name

        def find_spec(self, *args: Any) -> None:
            asked.append(self.name)

    ours = discovery.Finder()
    behind = [Recorder("a"), object(), Recorder("b")]  # one that is no finder, as of old
    monkeypatch.setattr(sys, "meta_path", [Recorder("front"), ours, *behind])
    monkeypatch.setitem(discovery.FOLLOWERS, "nowhere_module", lambda module: None)
    assert ours.find_spec("nowhere_module") is None
    assert ours.find_spec("json") is None
    assert asked == ["a", "b"]
    monkeypatch.setattr(sys, "meta_path", behind)
    assert ours.find_spec("nowhere_module") is None


def test_threads_that_import_at_once_follow_once(
    module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    followed: list[Any] = []
    monkeypatch.setitem(discovery.FOLLOWERS, module, followed.append)
    threads = [threading.Thread(target=__import__, args=(module,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert followed == [sys.modules[module]]


def test_methods_that_transformers_has_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    auto: Any = ModuleType("auto")
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING = dict.fromkeys(("scalesweep", "modelopt"), int)
    auto.AUTO_QUANTIZER_MAPPING = dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING)
    discovery.register_methods(auto)
    assert set(auto.AUTO_QUANTIZATION_CONFIG_MAPPING.values()) == {int}
    assert set(auto.AUTO_QUANTIZER_MAPPING.values()) == {int}


def test_looking_at_a_stub_loads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discovery.Stub, "_load", lambda self: pytest.fail("loaded"))
    stub = discovery.Stub("config", "ScaleSweepConfig")
    assert not hasattr(stub, "__wrapped__")
    assert repr(stub)
