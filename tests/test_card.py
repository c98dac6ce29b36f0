"""The model card: what it says, whose README.md stays, and what would reach the Hub."""

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file, save_file

from scalesweep_hf import ScaleSweepConfig
from scalesweep_hf.card import GENERATED, MARK, write_card
from scalesweep_hf.names import hub_id
from tests.models import load, random_tokens

INPUT = random_tokens(1, 8, seed=1)
EVALUATION = {
    "tasks": {"piqa": {"acc": 0.715, "acc_stderr": 0.01}},
    "perplexity": 12.25,
    "kl": 0.0175,
    "versions": {"torch": "2.13.0"},
}


@pytest.fixture
def model(random_model: Callable[[str], Path]) -> Any:
    config = ScaleSweepConfig(dataset=random_tokens(4, 32), overrides={"activations": "mse"})
    return load(random_model("llama"), quantization_config=config)


def card_of(folder: Path) -> Any:
    return ModelCard((folder / "README.md").read_text())


def test_saving_writes_a_card_of_the_recipe(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    card = card_of(tmp_path)
    assert card.data.tags == ["nvfp4", "scalesweep"]
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.base_model is None
    assert "14 Linears" in card.text
    rows = ("scheme | WA", 'overrides | {"activations": "mse"}', "calibration source | tokens")
    assert all(f"| {row} |" in card.text for row in rows)
    assert "Evaluation" not in card.text
    assert str(tmp_path.parent) not in card.content


def test_the_snippet_of_a_card_loads_the_model(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    snippet = card_of(tmp_path).text.split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(snippet.replace("path/to/this/model", str(tmp_path)), names)
    with torch.no_grad():
        assert torch.equal(names["model"](INPUT).logits, model(INPUT).logits)


def test_the_base_model_is_named_where_it_is_on_the_hub(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "local").mkdir(parents=True)
    assert hub_id("org/model") == "org/model"
    assert hub_id("gpt2") == "gpt2"
    assert hub_id("org/local") is None
    assert hub_id(str(tmp_path / "gone")) is None
    model.config.quantization_config.base_model = "org/model"
    model.save_pretrained(tmp_path)
    data = card_of(tmp_path).data
    assert (data.base_model, data.base_model_relation) == ("org/model", "quantized")


def test_a_readme_that_somebody_wrote_stays(model: Any, tmp_path: Path) -> None:
    file = tmp_path / "README.md"
    file.write_text("mine")
    model.save_pretrained(tmp_path)
    assert file.read_text() == "mine"
    with pytest.raises(FileExistsError, match=r"README\.md is not of this package: rename it"):
        write_card(tmp_path)
    template = ModelCard.from_template(ModelCardData(license="mit"), model_description=GENERATED)
    file.write_text(str(template).replace("[More Information Needed]", "mine", 1))
    model.save_pretrained(tmp_path)
    assert "mine" in file.read_text()
    for generated in (f"---\nbase_model: org/old\n---\nold\n{MARK}", str(template)):
        file.write_text(generated)
        model.save_pretrained(tmp_path)
        assert "## Recipe" in file.read_text()
    assert card_of(tmp_path).data.license == "mit"
    assert card_of(tmp_path).data.base_model is None


@pytest.mark.parametrize("place", ["beside", "given"])
def test_figures_are_shown_where_there_are_any(place: str, model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "q")
    name = "q/results.json" if place == "beside" else "other.json"
    (tmp_path / name).write_text(json.dumps(EVALUATION))
    write_card(tmp_path / "q", None if place == "beside" else tmp_path / name)
    text = card_of(tmp_path / "q").text
    for row in ("| perplexity | 12.25 |", "| kl | 0.0175 |", "| piqa acc | 0.715 |"):
        assert row in text
    load(tmp_path / "q").save_pretrained(tmp_path / "again")  # the card goes with the model
    assert card_of(tmp_path / "again").text == text


def test_figures_of_other_weights_are_not_shown(model: Any, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps(EVALUATION))
    model.save_pretrained(tmp_path)
    assert "perplexity" not in card_of(tmp_path).text


def test_an_evaluation_without_figures_is_refused(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    (tmp_path / "results.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match=r"has no figures, only \['a'\]: make it with scalesweep"):
        write_card(tmp_path)


@pytest.mark.parametrize("content", ['{"results": {}}', "[1]", "{"])
def test_results_of_another_tool_stop_no_saving(
    content: str, model: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model.save_pretrained(tmp_path / "q")
    (tmp_path / "q" / "README.md").unlink()
    (tmp_path / "q" / "results.json").write_text(content)
    load(tmp_path / "q").save_pretrained(tmp_path / "again")
    assert "## Recipe" in card_of(tmp_path / "again").text
    assert "results.json is not in the model card" in caplog.text


def test_a_checkpoint_of_another_package_gets_no_card(
    random_model: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(random_model("llama"), tmp_path / "copy")
    with pytest.raises(ValueError, match="is not quantized by 'scalesweep'"):
        write_card(folder)


def test_copies_and_dequantized_models_save_themselves(model: Any, tmp_path: Path) -> None:
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.model.embed_tokens.weight.zero_()
    twin.save_pretrained(tmp_path / "twin")
    assert not load(tmp_path / "twin").model.embed_tokens.weight.any()
    assert load(tmp_path / "twin").model.layers[0].mlp.up_proj.is_packed
    model.dequantize().save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain" / "README.md").exists()


def test_a_checkpoint_without_a_name_takes_no_card_from_the_working_folder(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.save_pretrained(tmp_path / "q")
    (tmp_path / "q" / "README.md").unlink()
    (tmp_path / "README.md").write_text("of something else")
    monkeypatch.chdir(tmp_path)
    config = tf.AutoConfig.from_pretrained(tmp_path / "q")
    config._name_or_path = ""
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    kind = tf.LlamaForCausalLM
    nameless = kind.from_pretrained(None, config=config, state_dict=tensors)
    nameless.save_pretrained(tmp_path / "again")
    assert "## Recipe" in (tmp_path / "again" / "README.md").read_text()


# Up to the boundary of the Hub: only the calls that would reach it are replaced.


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return where the uploaded files go; REMOTE.md in its parent is the card on the Hub."""
    uploaded = tmp_path / "uploaded"
    uploaded.mkdir()

    def create_repo(self: Any, repo_id: str, **kwargs: Any) -> Any:
        return type("Url", (), {"repo_id": repo_id})()

    def create_commit(self: Any, repo_id: str, operations: Any, **kwargs: Any) -> str:
        for operation in operations:
            target = uploaded / operation.path_in_repo
            target.write_bytes(Path(operation.path_or_fileobj).read_bytes())
        return f"commit to {repo_id}"

    def card_on_the_hub(repo_id: Any, **kwargs: Any) -> ModelCard:
        if not (tmp_path / "REMOTE.md").is_file():
            raise EntryNotFoundError("no card")
        return ModelCard((tmp_path / "REMOTE.md").read_text())

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    monkeypatch.setattr("transformers.utils.hub.ModelCard.load", card_on_the_hub)
    return uploaded


RELOAD = """
import sys, torch
import scalesweep_hf
from transformers import AutoModelForCausalLM
from safetensors.torch import load_file
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
expected = load_file(sys.argv[2])
with torch.no_grad():
    assert torch.equal(model(expected["input"]).logits, expected["logits"])
"""


@pytest.mark.parametrize("way", ["push_to_hub", "save_pretrained"])
def test_what_is_pushed_is_complete_and_carries_the_card(
    way: str, model: Any, hub: Path, tmp_path: Path
) -> None:
    if way == "push_to_hub":
        assert model.push_to_hub("me/model-NVFP4", tags=["mine"]) == "commit to me/model-NVFP4"
    else:
        model.save_pretrained(tmp_path / "local", push_to_hub=True, repo_id="me/model-NVFP4")
    names = {"config.json", "generation_config.json", "model.safetensors", "README.md"}
    assert {file.name for file in hub.iterdir()} == names
    card, text = card_of(hub), (hub / "README.md").read_text()
    tags = ["nvfp4", "scalesweep"] + (["mine"] if way == "push_to_hub" else [])
    assert card.data.tags == tags
    assert GENERATED not in text
    assert "from_pretrained('me/model-NVFP4')" in text
    with torch.no_grad():
        tensors = {"input": INPUT, "logits": model(INPUT).logits}
    save_file(tensors, tmp_path / "expected")
    command = [sys.executable, "-c", RELOAD, str(hub), str(tmp_path / "expected")]
    quiet = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=quiet)
    assert done.returncode == 0, done.stderr


def test_a_card_on_the_hub_stays_if_somebody_wrote_it(
    model: Any, hub: Path, tmp_path: Path
) -> None:
    (tmp_path / "REMOTE.md").write_text("---\nlicense: mit\n---\nmine")
    model.push_to_hub("me/model")
    card = card_of(hub)
    assert card.text.strip() == "mine"
    assert set(card.data.tags) == {"nvfp4", "scalesweep"}
    (tmp_path / "REMOTE.md").write_text(f"---\nlicense: mit\n---\nold\n{MARK}")
    model.push_to_hub("me/model")
    card = card_of(hub)
    assert "## Recipe" in card.text
    assert card.data.license == "mit"


def test_the_readme_of_a_pushed_folder_is_what_is_pushed(
    model: Any, hub: Path, tmp_path: Path
) -> None:
    (tmp_path / "local").mkdir()
    (tmp_path / "local" / "README.md").write_text("mine")
    model.save_pretrained(tmp_path / "local", push_to_hub=True, repo_id="me/model")
    assert (hub / "README.md").read_text() == "mine"
    assert (tmp_path / "local" / "README.md").read_text() == "mine"


def test_a_checkpoint_is_pushed_with_the_card_of_its_folder(
    model: Any, hub: Path, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "q")
    (tmp_path / "q" / "README.md").write_text("mine")
    load(tmp_path / "q").push_to_hub("me/model")
    assert (hub / "README.md").read_text() == "mine"
