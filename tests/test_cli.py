import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from scalesweep_hf import ScaleSweepConfig, __version__, cli
from tests.conftest import ROOT
from tests.models import load, random_tokens


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        cli.main([str(argument) for argument in arguments])
    out = capsys.readouterr()
    code = end.value.code
    assert isinstance(code, int)
    return code, out.out, out.err


PLAIN = ("--scheme", "W", "--objective", "mse", "--device-map", "cpu")


def test_quantize_saves_what_from_pretrained_makes(
    random_model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = random_model("llama")
    code, out, _ = run(capsys, "quantize", folder, tmp_path / "out", *PLAIN, "--json")
    assert code == 0
    summary = json.loads(out)
    assert summary["linears"] == 14
    assert summary["bits_per_weight"] == pytest.approx(4.5, abs=0.01)
    assert summary["weights"] == 2 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 96)
    config = ScaleSweepConfig(scheme="W", objective="mse", dataset=None)
    expected = load(folder, quantization_config=config, device_map="cpu")
    ids = random_tokens(1, 8)
    with torch.no_grad():
        saved = load(tmp_path / "out")(input_ids=ids).logits
        assert torch.equal(saved, expected(input_ids=ids).logits)
    assert not list(tmp_path.glob("*.part"))
    code, again, _ = run(capsys, "inspect", tmp_path / "out", "--json")
    explained = json.loads(again)
    assert len(explained.pop("layers")) == 14
    assert explained.items() <= summary.items()


def test_options_beat_the_config_file(
    trained_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_text("scheme: WA\nobjective: wmse\nnum_samples: 2\n")
    code, _, _ = run(
        capsys,
        *("quantize", trained_model, tmp_path / "out", "--config", tmp_path / "c.yaml"),
        *("--objective", "mse", "--window", "-2,5", "--sequence-length", "32", "--seed", "3"),
        *("--overrides", '{"*.down_proj": {"activations": null}}', "--device-map", "cpu"),
        *("--modules-to-not-convert", "*.o_proj", "--modules-to-not-convert", "*.up_proj"),
    )
    assert code == 0
    config = load(tmp_path / "out").config.quantization_config
    assert (config.scheme, config.objective, config.window) == ("WA", "mse", (-2, 5))
    assert config.calibration["num_samples"] == 2
    assert config.modules_to_not_convert == ["*.o_proj", "*.up_proj"]
    assert config.overrides == {"*.down_proj": {"activations": None}}
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_every_field_is_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    parameters = inspect.signature(cli.quantize).parameters
    assert set(ScaleSweepConfig.choices()) - {"dequantize"} <= set(parameters)
    code, out, _ = run(capsys, "quantize", "--help")
    assert code == 0
    assert "--num-samples" in out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["quantize", "{model}", "{out}", "--scheme", "X"], 1, "Error: scheme is 'X'; use one of"),
        (["quantize", "{model}", "{here}"], 1, "exists: name a new folder"),
        (["quantize", "{model}", "{out}", "--overrides", "{{"], 1, "--overrides is no JSON"),
        (["quantize", "{model}", "{out}", "--config", "{list}"], 1, "holds a list; expected"),
        (["quantize", "{out}", "{out}2", "--scheme", "W"], 1, "Error: "),
        (["quantize", "{model}"], 2, "Missing argument"),
        (["quantize", "{model}", "{out}", "--num-samples", "many"], 2, "Error"),
        (["inspect", "{model}"], 1, "has no packed NVFP4 Linear; its quant_method is None"),
        (["inspect", "{model}", "--for", "x"], 1, "engine is 'x'; use one of vllm, sglang"),
        (["export", "{model}", "{out}", "--format", "modelopt"], 1, "its quant_method is None"),
        (["export", "{model}", "{here}", "--format", "modelopt"], 1, "exists: name a new folder"),
        (["export", "{model}", "{out}", "--format", "gguf"], 1, "use one of compressed-tensors"),
        (["export", "{out}", "{out}2", "--format", "modelopt"], 1, "is no folder, nor an id"),
        (["export", "{model}", "{out}"], 2, "Missing option '--format'"),
        (["inspect", "{out}"], 1, "has no config.json: name the folder of a checkpoint"),
        (["eval"], 1, "name a model, or a plan with --table"),
        (["eval", "{model}"], 1, "nothing to measure: give --tasks, --heldout or --table"),
        (["eval", "--table", "{list}"], 1, "expected a mapping"),
        (["eval", "{model}", "--dry-run"], 1, "--dry-run is for --table"),
        (["eval", "--table", "{list}", "--tasks", "a"], 1, "--tasks does not go with --table"),
        (["quantize", "{model}", "{out}", "--window", "a,b"], 1, "--window is 'a,b'; use bounded"),
    ],
)
def test_errors_are_one_line_with_the_remedy(
    arguments: list[str],
    code: int,
    message: str,
    random_model: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "list.yaml").write_text("- a")
    places = {
        "model": random_model("llama"),
        "out": tmp_path / "out",
        "here": tmp_path,
        "list": tmp_path / "list.yaml",
    }
    found, _, err = run(capsys, *(argument.format(**places) for argument in arguments))
    assert found == code
    assert message in " ".join(err.split())
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()
    if code == 1:
        assert err.count("\n") == 1


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        cli.main(["inspect", str(tmp_path), "--debug"])


def test_a_classifier_stays_a_classifier(
    random_model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, _ = run(capsys, "quantize", random_model("bert"), tmp_path / "new" / "out", *PLAIN)
    assert code == 0
    assert type(load(tmp_path / "new" / "out")).__name__ == "BertForSequenceClassification"
    code, _, err = run(capsys, "report", random_model("bert"), "--output", tmp_path / "r.html")
    assert (code, "which does not predict tokens" in err) == (1, True)


def test_what_is_quantized_is_not_quantized_again(
    random_model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, "quantize", random_model("llama"), tmp_path / "q", *PLAIN)
    for command in (
        ["quantize", tmp_path / "q", tmp_path / "q2", *PLAIN],
        ["report", tmp_path / "q"],
    ):
        code, _, err = run(capsys, *command)
        assert (code, "is quantized already" in err) == (1, True)


def test_neighbours_are_left_alone(
    random_model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part" / "precious").write_text("x")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for name in ("out", "link"):
        assert run(capsys, "quantize", random_model("llama"), tmp_path / name, *PLAIN)[0] == 0
    assert (tmp_path / "out.part" / "precious").read_text() == "x"
    assert (tmp_path / "real" / "config.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "out", "out.part", "real"]


@pytest.mark.parametrize("target", ["compressed-tensors", "modelopt"])
def test_exports_pass_the_inspection_that_the_original_fails(
    random_model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], target: str
) -> None:
    run(capsys, "quantize", random_model("llama"), tmp_path / "q", *PLAIN)
    code, out, _ = run(
        capsys, "export", tmp_path / "q", tmp_path / "x", "--format", target, "--json"
    )
    assert code == 0
    assert json.loads(out)["linears"] == 14
    code, out, _ = run(capsys, "inspect", tmp_path / "x", "--for", "vllm")
    assert code == 0
    assert out.endswith("0 problems for vllm\n")
    assert "down_proj" in out
    code, out, _ = run(capsys, "inspect", tmp_path / "q", "--for", "vllm", "--json")
    assert code == 1
    assert "unknown to vllm" in json.loads(out)["problems"][0]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version")[:2] == (0, f"{__version__}\n")


def test_eval_measures_perplexity_and_kl(
    random_model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({"t": random_tokens(3, 16)}, tmp_path / "t.safetensors")
    run(capsys, "quantize", random_model("llama"), tmp_path / "q", *PLAIN)
    heldout = ("--heldout", tmp_path / "t.safetensors", "--reference", random_model("llama"))
    code, out, _ = run(capsys, "eval", tmp_path / "q", *heldout, "--json")
    assert code == 0
    assert json.loads(out)["kl"] > 0
    (tmp_path / "c.yaml").write_text("{scheme: W, objective: mse, dataset: null}")
    on_load = ("--config", tmp_path / "c.yaml", "--output", tmp_path / "r.json")
    code, _, _ = run(capsys, "eval", random_model("llama"), *heldout, *on_load)
    assert json.loads((tmp_path / "r.json").read_text())["kl"] == json.loads(out)["kl"]


def test_a_table_is_run_and_printed(
    random_model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({"t": random_tokens(2, 16)}, tmp_path / "t.safetensors")
    (tmp_path / "plan.yaml").write_text(
        "models: [MODEL]\nschemes: [W]\nalgorithms: [rtn]\nobjectives: [mse]\n"
    )
    arguments = [
        *("eval", random_model("llama"), "--table", tmp_path / "plan.yaml"),
        *("--heldout", tmp_path / "t.safetensors", "--output", tmp_path / "out"),
    ]
    code, out, _ = run(capsys, *arguments, "--dry-run")
    assert code == 0
    assert out.startswith("2 cells, 0 of them done")
    code, out, _ = run(capsys, *arguments)
    assert code == 0
    assert out == (tmp_path / "out" / "table.md").read_text() + "\n"
    assert out.count("\n") == 5


def test_the_card_shows_what_was_measured(
    random_model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({"t": random_tokens(2, 16)}, tmp_path / "t.safetensors")
    run(capsys, "quantize", random_model("llama"), tmp_path / "q", *PLAIN)
    heldout = ("--heldout", tmp_path / "t.safetensors", "--output", tmp_path / "q" / "results.json")
    run(capsys, "eval", tmp_path / "q", *heldout)
    assert run(capsys, "card", tmp_path / "q")[:2] == (0, f"{tmp_path / 'q' / 'README.md'}\n")
    perplexity = json.loads((tmp_path / "q" / "results.json").read_text())["perplexity"]
    assert f"| perplexity | {perplexity:.5g} |" in (tmp_path / "q" / "README.md").read_text()
    assert run(capsys, "card", random_model("llama"))[0] == 1


START = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name == REFUSED:
            raise KeyboardInterrupt
sys.meta_path.insert(0, Refuse())
from scalesweep_hf.__main__ import main
sys.argv = ["scalesweep", *sys.argv[1:]]
main()
"""


def start(refused: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the script as if Ctrl-C were pressed while a module is imported."""
    code = START.replace("REFUSED", repr(refused))
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)


@pytest.mark.parametrize("heavy", ["torch", "transformers"])
@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["--help"], 0), (["quantize", "--help"], 0), (["--version"], 0), (["eval", "--no"], 2)],
)
def test_help_and_wrong_usage_import_neither_torch_nor_transformers(
    arguments: list[str], code: int, heavy: str
) -> None:
    done = start(heavy, *arguments)
    assert done.returncode == code, done.stderr


@pytest.mark.parametrize("module", ["typer", "torch", "transformers"])
def test_ctrl_c_during_imports_ends_without_a_traceback(module: str, tmp_path: Path) -> None:
    done = start(module, "quantize", str(tmp_path), str(tmp_path / "out"))
    assert done.returncode == 130
    assert "Traceback" not in done.stderr


def test_the_script_is_installed() -> None:
    assert 'scalesweep = "scalesweep_hf.__main__:main"' in (ROOT / "pyproject.toml").read_text()
