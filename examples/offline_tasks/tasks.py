"""Where the files are, and the prompts that a template cannot say."""

import os
from pathlib import Path
from typing import Any

import datasets


def load(file: str, **kwargs: Any) -> dict[str, datasets.Dataset]:
    """Read one JSON lines file of the folder that OFFLINE_DATA names."""
    folder = os.environ.get("OFFLINE_DATA")
    if not folder:
        raise ValueError("OFFLINE_DATA is not set: name the folder of the JSON lines files in it")
    path = Path(folder) / file
    if not path.is_file():
        raise FileNotFoundError(f"OFFLINE_DATA={folder} has no {file}")
    data = datasets.load_dataset("json", data_files={"validation": str(path)})
    return dict(data)


def piqa_prompt(doc: dict[str, Any]) -> str:
    """Return the prompt as lm-eval's task has it, from one that says "Goal"."""
    goal: str = doc["query"]
    return "Question: " + goal.removeprefix("Goal: ")


def winogrande_choices(doc: dict[str, Any]) -> list[str]:
    """Return the sentence up to the gap, filled with each option."""
    sentence, _, _ = doc["doc"]["sentence"].partition("_")
    return [sentence + doc["doc"][option] for option in ("option1", "option2")]


def winogrande_answer(doc: dict[str, Any]) -> int:
    """Return the index of the right option."""
    return int(doc["doc"]["answer"]) - 1


def winogrande_rest(doc: dict[str, Any]) -> str:
    """Return the sentence behind the gap."""
    return str(doc["doc"]["sentence"].partition("_")[2]).strip()
