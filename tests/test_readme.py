import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from scalesweep_hf import NVFP4Linear
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


def test_paths_that_the_readme_names_exist() -> None:
    for path in re.findall(r"`(?:python )?((?:examples|configs)/[\w/.]+)", README):
        assert (ROOT / path).is_file(), path
    order = re.findall(r"`([\w/]+\.py)` →|→ `([\w/]+\.py)`", README)
    assert len(order) >= 3
    for pair in order:
        for name in filter(None, pair):
            assert (ROOT / "scalesweep_hf" / name).is_file(), name
