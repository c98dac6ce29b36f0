"""The model card: README.md of a checkpoint, written when a model is saved or pushed to the Hub.

A README.md that somebody wrote stays: only our own cards, which carry `MARK`, and those that
Transformers generates are written over.
"""

import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from scalesweep_hf.config import METHOD
from scalesweep_hf.evaluate.render import markdown
from scalesweep_hf.files import write_text

NAME = "README.md"
RESULTS = "results.json"
MARK = (
    f"<!-- Written by {METHOD}_hf, and again when the model is saved. To edit it, remove this. -->"
)
# Of the card that Transformers puts over any other when it pushes.
GENERATED = (
    "This is the model card of a 🤗 transformers model that has been pushed on the Hub. This model "
    "card has been automatically generated."
)
TAGS = ("nvfp4", METHOD)
logger = logging.getLogger(__name__)
RECIPE = ("scheme", "objective", "algorithm", "window", "overrides", "modules_to_not_convert")


def write_card(
    folder: str | os.PathLike[str], evaluation: str | os.PathLike[str] | None = None
) -> Path:
    """Write the card of a saved checkpoint.

    Args:
        folder: of the checkpoint.
        evaluation: file that ``scalesweep eval --output`` or a table wrote; None takes results.json
            in the folder, if it is there.

    Returns:
        The path of README.md.

    Raises:
        FileExistsError: there is a README.md that somebody wrote.
        FileNotFoundError: there is no config.json, or no such evaluation.
        ValueError: the checkpoint is not of this package, or the evaluation has no figures.
    """
    folder = Path(folder)
    file = folder / NAME
    if not is_generated(file):
        raise FileExistsError(f"{file} is not of this package: rename it, or add this: {MARK}")
    found = folder / RESULTS
    if evaluation is None and found.is_file():
        evaluation = found
    figures = None if evaluation is None else json.loads(Path(evaluation).read_text("utf-8"))
    _write(folder, figures, "path/to/this/model")
    return file


def is_generated(file: Path) -> bool:
    """Whether a card is absent, or may be written over because a program alone wrote it."""
    if not file.is_file():
        return True
    text = file.read_text(encoding="utf-8", errors="replace")
    if GENERATED not in text:
        return MARK in text
    card = ModelCard(text, ignore_metadata_errors=True)
    template = ModelCard.from_template(card.data, model_description=GENERATED)
    return bool(card.text.strip() == template.text.strip())


class Cards:
    """Writes a card wherever a model is saved or pushed, for as long as it is quantized."""

    def __init__(self, model: Any, source: Path | None) -> None:
        """Take over ``save_pretrained`` of a model, and what uploads its files.

        Args:
            model: whose card to write.
            source: folder of the checkpoint that it was loaded from, whose card, figures included,
                goes with it; None for a model that has just been quantized.
        """
        self._model = model
        self._source = None if source is None else source.resolve()
        self._own: bytes | None = None
        model.save_pretrained = self.save
        model._upload_modified_files = self.upload

    def save(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Save the model as its class does, and the card beside it."""
        file = Path(save_directory) / NAME
        # Transformers writes over it before it uploads.
        self._own = None if is_generated(file) else file.read_bytes()
        model = self._model
        try:
            saved = type(model).save_pretrained(
                model, save_directory, is_main_process, *args, **kwargs
            )
        finally:
            self._own, own = None, self._own
        is_saved = is_main_process and file.with_name("config.json").is_file()
        if is_saved and own is None and is_generated(file):
            self._write(file, "path/to/this/model")
        return saved

    def upload(self, working_dir: str | os.PathLike[str], repo_id: str, *a: Any, **kw: Any) -> Any:
        """Upload the files of a folder, with the right card among them."""
        file = Path(working_dir) / NAME
        if self._own is not None:
            file.write_bytes(self._own)
        elif is_generated(file):
            self._write(file, repo_id)
        return type(self._model)._upload_modified_files(self._model, working_dir, repo_id, *a, **kw)

    def _write(self, file: Path, name: str) -> None:
        source = self._source
        if source is not None and (source / NAME).is_file():
            if not (file.is_file() and file.samefile(source / NAME)):
                shutil.copyfile(source / NAME, file)
            return
        figures = None
        if source is not None and (source / RESULTS).is_file():
            try:
                figures = json.loads((source / RESULTS).read_text(encoding="utf-8"))
                _figures(figures)
            except (ValueError, TypeError, AttributeError, KeyError) as error:
                logger.warning(f"{source / RESULTS} is not in the model card: {error}")
                figures = None
        _write(file.parent, figures, name)


def forget_cards(model: Any) -> None:
    """Undo what `Cards` took over."""
    for name in ("save_pretrained", "_upload_modified_files"):
        vars(model).pop(name, None)


def _write(folder: Path, figures: Mapping[str, Any] | None, name: str) -> None:
    """Write a card over a generated one, whose metadata it keeps where it has none of its own."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    recipe = config.get("quantization_config") or {}
    if recipe.get("quant_method") != METHOD:
        raise ValueError(
            f"{folder} is not quantized by {METHOD!r}: its quant_method is "
            f"{recipe.get('quant_method')!r}"
        )
    file = folder / NAME
    old: dict[str, Any] = {}
    if file.is_file():
        card = ModelCard(file.read_text("utf-8"), ignore_metadata_errors=True)
        old = card.data.to_dict()
    tags = list(dict.fromkeys([*TAGS, *(old.pop("tags", None) or ())]))
    for field in ("base_model", "base_model_relation"):  # perhaps of other weights
        old.pop(field, None)
    (architecture,) = (config.get("architectures") or [""])[:1]
    fields: dict[str, Any] = {"library_name": "transformers", "tags": tags}
    if recipe.get("base_model"):
        fields |= {"base_model": recipe["base_model"], "base_model_relation": "quantized"}
    if architecture.endswith("ForCausalLM"):
        fields["pipeline_tag"] = "text-generation"
    parts = [_title(recipe, architecture), _loading(architecture, name), _recipe(recipe)]
    if figures is not None:
        parts.append(_figures(figures))
    text = "\n\n".join([*parts, MARK])
    data = ModelCardData(**(old | fields))
    write_text(file, str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n")))


def _title(recipe: Mapping[str, Any], architecture: str) -> str:
    base = recipe.get("base_model")
    title = (base or architecture).rpartition("/")[2]
    origin = f"[{base}](https://huggingface.co/{base})" if base else f"A {architecture}"
    count = len(recipe.get("quantized_modules") or ())
    return (
        f"# {title}, NVFP4\n\n{origin} with {count} Linears quantized to NVFP4, 4.5 bits per "
        "weight, in the layout of `scalesweep_hf`."
    )


def _loading(architecture: str, name: str) -> str:
    auto = architecture if architecture else "AutoModel"
    if architecture.endswith("ForCausalLM"):
        auto = "AutoModelForCausalLM"
    return (
        "## Load\n\n`pip install scalesweep-hf`, then, with no import of it:\n\n```python\n"
        f"from transformers import {auto}\n\nmodel = {auto}.from_pretrained({name!r})\n```"
    )


def _recipe(recipe: Mapping[str, Any]) -> str:
    rows = {key: recipe[key] for key in RECIPE if recipe.get(key)}
    rows |= {f"calibration {key}": v for key, v in (recipe.get("calibration") or {}).items()}
    rows["scalesweep_hf"] = recipe.get("version")
    return "## Recipe\n\n" + _table(rows)


def _figures(figures: Mapping[str, Any]) -> str:
    if "cells" in figures:
        return "## Evaluation\n\n" + markdown(figures).strip()
    rows = {key: figures[key] for key in ("perplexity", "kl") if key in figures}
    for task, metrics in (figures.get("tasks") or {}).items():
        rows |= {f"{task} {metric}": value for metric, value in metrics.items()}
    if not rows:
        raise ValueError(
            f"the evaluation has no figures, only {sorted(figures)}: make it with "
            "scalesweep eval MODEL --output results.json"
        )
    versions = ", ".join(f"{k} {v}" for k, v in (figures.get("versions") or {}).items())
    return f"## Evaluation\n\n{_table(rows)}" + (f"\n\n({versions})" if versions else "")


def _table(rows: Mapping[str, Any]) -> str:
    def cell(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.5g}"
        plain = value if isinstance(value, str) else json.dumps(value)
        return plain.replace("|", "\\|")

    lines = [f"| {key} | {cell(value)} |" for key, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])
