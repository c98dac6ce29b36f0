"""lm-eval: quantized on load, as a command, in two processes; and the offline tasks' prompts."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from scalesweep_hf import NVFP4Linear, ScaleSweepConfig
from tests.conftest import REFERENCE, ROOT, load_example

pytest.importorskip("lm_eval")

TASKS = ROOT / "examples" / "offline_tasks"
PIQA = [
    {"query": f"Goal: Tell of the {animal}.\nAnswer:", "choices": ["It ran.", "zq"], "gold": i % 2}
    for i, animal in enumerate(["cat", "dog", "fox", "hen", "owl"])
]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "piqa.jsonl").write_text("\n".join(json.dumps(line) for line in PIQA))
    monkeypatch.setenv("OFFLINE_DATA", str(folder))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return folder


def run(*arguments: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *launcher, "scalesweep_hf.evaluate.harness", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        timeout=300,
    )


def test_fields_among_the_arguments_quantize_on_load(trained_model: Path) -> None:
    from scalesweep_hf.evaluate.harness import ScaleSweepLM

    options = {"scheme": "W", "objective": "wmse", "num_samples": 2, "sequence_length": 32}
    lm = ScaleSweepLM(str(trained_model), device="cpu", calibration_batch_size=1, **options)
    config = lm.model.config.quantization_config
    assert (config.scheme, config.num_samples, config.batch_size) == ("W", 2, 1)
    assert any(isinstance(module, NVFP4Linear) for module in lm.model.modules())
    plain = ScaleSweepLM(str(trained_model), device="cpu")
    assert not any(isinstance(module, NVFP4Linear) for module in plain.model.modules())


def test_fields_for_what_is_quantized_or_loaded_raise(trained_model: Path, tmp_path: Path) -> None:
    from scalesweep_hf.evaluate.harness import ScaleSweepLM

    config = ScaleSweepConfig(scheme="W", objective="mse", dataset=None)
    model = AutoModelForCausalLM.from_pretrained(trained_model, quantization_config=config)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is quantized already: drop objective, scheme"):
        ScaleSweepLM(str(tmp_path), scheme="W", objective="mse", device="cpu")
    with pytest.raises(ValueError, match="is loaded already: drop scheme"):
        ScaleSweepLM(model, scheme="W")
    with pytest.raises(ValueError, match="objective is 'best'"):
        ScaleSweepLM(str(trained_model), objective="best", device="cpu")


def test_a_loaded_model_is_scored(trained_model: Path, data: Path) -> None:
    from scalesweep_hf.evaluate.harness import evaluate_tasks

    model = AutoModelForCausalLM.from_pretrained(trained_model)
    found = evaluate_tasks(model, ["offline_piqa"], include_path=str(TASKS))["offline_piqa"]
    # By hand: the log-likelihood of each answer, summed and per byte.
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(trained_model)
    right = 0
    for doc in PIQA:
        prompt = tokenizer("Question" + str(doc["query"])[4:])["input_ids"]
        scores = []
        for choice in doc["choices"]:  # type: ignore[attr-defined]
            answer = tokenizer("Question" + str(doc["query"])[4:] + " " + choice)["input_ids"]
            with torch.no_grad():
                logits = model(torch.tensor([answer])).logits.float().log_softmax(-1)[0]
            scores.append(
                sum(float(logits[i - 1, answer[i]]) for i in range(len(prompt), len(answer)))
            )
        right += int(scores[0] < scores[1]) == doc["gold"]
    assert found["acc"] == right / len(PIQA)
    assert set(found) >= {"acc", "acc_norm"}


def test_filters_of_one_metric_are_kept_apart() -> None:
    from scalesweep_hf.evaluate.harness import _metrics

    found = {"em,strict": 0.8, "em,loose": 0.1, "acc,none": 0.5, "alias": "x", "sample_len": 3}
    assert _metrics(found) == {"em,strict": 0.8, "em,loose": 0.1, "acc": 0.5}


def test_an_unknown_task_is_named(trained_model: Path) -> None:
    from scalesweep_hf.evaluate.harness import evaluate_tasks

    model = AutoModelForCausalLM.from_pretrained(trained_model)
    with pytest.raises(ValueError, match="no task offline_piqua; `lm_eval ls tasks`"):
        evaluate_tasks(model, ["offline_piqua"], include_path=str(TASKS))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_the_command_of_lm_eval_knows_the_model(
    processes: int, trained_model: Path, data: Path, tmp_path: Path
) -> None:
    launcher: tuple[str, ...] = ()
    if processes > 1:
        launcher = ("accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m")
    done = run(
        *("--model", "scalesweep", "--device", "cpu", "--include_path", str(TASKS)),
        *("--tasks", "offline_piqa", "--output_path", str(tmp_path / "out.json")),
        *("--model_args", f"pretrained={trained_model},scheme=W,objective=mse"),
        launcher=launcher,
    )
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("**/*out*.json")
    result = json.loads(file.read_text())
    assert result["n-samples"]["offline_piqa"]["effective"] == len(PIQA)
    assert 0 <= result["results"]["offline_piqa"]["acc,none"] <= 1


def test_the_prompts_are_those_of_the_stock_tasks() -> None:
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks.winogrande import preprocess_winogrande

    offline = load_example("offline_tasks/tasks")
    piqa = {"query": "Goal: Goal: a goal\nAnswer:"}
    assert offline.piqa_prompt(piqa) == "Question: Goal: a goal\nAnswer:"
    doc = {
        "sentence": "Ann met Eve so _ left. _",
        "option1": "Ann",
        "option2": "Eve",
        "answer": "2",
    }
    assert offline.winogrande_choices({"doc": doc}) == preprocess_winogrande.doc_to_choice(doc)
    assert offline.winogrande_answer({"doc": doc}) == preprocess_winogrande.doc_to_text(doc)
    assert offline.winogrande_rest({"doc": doc}) == preprocess_winogrande.doc_to_target(doc)
    known = set(TaskManager(include_path=str(TASKS)).all_tasks)
    assert known >= {
        f"offline_{name}" for name in ("hellaswag", "piqa", "arc_easy", "winogrande", "lambada")
    }


@pytest.mark.slow
def test_all_offline_tasks_run_on_real_data(
    reference_model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from scalesweep_hf.evaluate.harness import evaluate_tasks

    monkeypatch.setenv("OFFLINE_DATA", str(REFERENCE / "data" / "eval"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    names = [f"offline_{n}" for n in ("hellaswag", "piqa", "arc_easy", "winogrande", "lambada")]
    model: Any = AutoModelForCausalLM.from_pretrained(reference_model)
    found = evaluate_tasks(model, names, include_path=str(TASKS), limit=40)
    assert set(found) == set(names)
    assert found["offline_piqa"]["acc"] > 0.4
    assert found["offline_lambada"]["perplexity"] < 2000
