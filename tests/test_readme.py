import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from scalesweep_hf import NVFP4Linear, cli
from tests.conftest import ROOT, load_example

README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_every_snippet_runs_in_order(
    random_model: Callable[[str], Path], trained_model: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    assert len(SNIPPETS) == 4
    main, again, tensors, cache = SNIPPETS
    assert '"meta-llama/Llama-3.2-1B"' in main
    exec(main.replace("meta-llama/Llama-3.2-1B", str(random_model("llama"))), names)
    assert isinstance(names["model"].model.layers[0].mlp.up_proj, NVFP4Linear)
    texts = load_example("tiny_model").make_text(5, 40)
    lines = [json.dumps({"text": text}) for text in texts]
    Path("notes.jsonl").write_text("\n".join(lines), encoding="utf-8")
    exec(again.replace("meta-llama/Llama-3.2-1B", str(trained_model)), names)
    assert Path("statistics.safetensors").is_file()
    AutoModelForCausalLM.from_pretrained(trained_model, quantization_config=names["config"])
    exec(tensors, names)
    assert names["x"].shape == (4096, 4096)
    exec(cache, names)


def test_the_commands_run_in_order(
    trained_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    texts = load_example("tiny_model").make_text(5, 40)
    lines = [json.dumps({"text": text}) for text in texts]
    Path("notes.jsonl").write_text("\n".join(lines), encoding="utf-8")
    commands = re.findall(r"^scalesweep (.*?)(?:\s+#.*)?$", README, flags=re.MULTILINE)
    assert [command.split()[0] for command in commands] == [
        *("quantize", "eval", "eval", "eval", "report", "inspect", "export", "inspect")
    ]
    quick = {
        "quantize": ["--num-samples", "2", "--sequence-length", "32"],
        "eval": ["--rows", "1"],
        "report": ["--rows", "1", "--length", "32"],
    }
    for command in commands:
        if "--tasks" in command or "paper.yaml" in command:  # need the Hub
            continue
        words = shlex.split(command.replace("meta-llama/Llama-3.2-1B", str(trained_model)))
        with pytest.raises(SystemExit) as end:
            cli.main([*words, *quick.get(words[0], [])])
        assert end.value.code == 0, command
    assert {entry.name for entry in tmp_path.iterdir()} >= {"Llama-NVFP4", "report.html"}


def test_paths_that_the_readme_names_exist() -> None:
    for path in re.findall(r"`(?:python )?((?:examples|configs)/[\w/.]+)", README):
        assert (ROOT / path).exists(), path
    order = re.findall(r"`([\w/]+\.py)` →|→ `([\w/]+\.py)`", README)
    assert len(order) >= 3
    for pair in order:
        for name in filter(None, pair):
            assert (ROOT / "scalesweep_hf" / name).is_file(), name
