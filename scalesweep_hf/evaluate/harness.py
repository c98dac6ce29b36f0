r"""Evaluate with lm-eval: a model "scalesweep" for its command line, and tasks on a loaded model.

    python -m scalesweep_hf.evaluate.harness --model scalesweep \
        --model_args pretrained=FOLDER_OR_ID,scheme=WA,objective=wmse --tasks hellaswag

is `lm_eval` with that model registered (`discovery.py`; plain `lm_eval` has it too unless that is
turned off): a quantized checkpoint as it is, or a full-precision one, quantized on load by the
fields of `ScaleSweepConfig` among the model arguments.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoConfig

from scalesweep_hf.config import ScaleSweepConfig

# lm-eval has a batch_size and a backend of its own.
CALIBRATION_BATCH = "calibration_batch_size"
FIELDS = set(ScaleSweepConfig.choices()) - {"batch_size", "backend"}


class ScaleSweepLM(HFLM):  # type: ignore[misc]
    """lm-eval's Hugging Face model, quantized on load where the arguments say how."""

    def __init__(self, pretrained: Any, **kwargs: Any) -> None:
        """Load a model.

        Args:
            pretrained: folder, Hub id, or a loaded model.
            kwargs: arguments of HFLM, and fields of `ScaleSweepConfig`; the batch size of
                calibration is ``calibration_batch_size``. Without fields the model is taken as it
                is.

        Raises:
            ValueError: fields are given for a model that is quantized already, or are wrong.
        """
        fields = {name: kwargs.pop(name) for name in list(kwargs) if name in FIELDS}
        if CALIBRATION_BATCH in kwargs:
            fields["batch_size"] = kwargs.pop(CALIBRATION_BATCH)
        self._recipe = ScaleSweepConfig(**fields) if fields else None
        if self._recipe is not None:
            _check_not_quantized(pretrained, kwargs, fields)
        super().__init__(pretrained, **kwargs)

    def _create_model(self, *args: Any, quantization_config: Any = None, **kwargs: Any) -> None:
        recipe = quantization_config if self._recipe is None else self._recipe
        super()._create_model(*args, quantization_config=recipe, **kwargs)


def evaluate_tasks(
    model: Any,
    tasks: Sequence[str],
    *,
    tokenizer: Any = None,
    include_path: str | None = None,
    limit: float | None = None,
    batch_size: int | str = 8,
    **kwargs: Any,
) -> dict[str, dict[str, float]]:
    """Run lm-eval tasks on a loaded model.

    Args:
        model: a Transformers causal language model.
        tasks: names that lm-eval or the files under include_path define.
        tokenizer: of the model; None loads it from ``model.name_or_path``.
        include_path: folder of task definitions.
        limit: documents per task at the most (below 1: their share); None takes all.
        batch_size: sequences per forward pass, or "auto".
        kwargs: of `lm_eval.simple_evaluate`, for example ``num_fewshot`` or
            ``apply_chat_template``.

    Returns:
        Per task its metrics and their standard errors, by the names that lm-eval gives them: "acc",
        "acc_stderr", "acc_norm", "perplexity" and others; with the filter, "exact_match,strict",
        where a task has several.

    Raises:
        ValueError: a task does not exist, or is a tag.
    """
    manager = TaskManager(include_path=include_path)
    known = set(manager.all_tasks)
    if unknown := [task for task in tasks if task not in known]:
        raise ValueError(
            f"no task {', '.join(unknown)}; `lm_eval ls tasks` lists what there is, and "
            "include_path adds a folder of your own"
        )
    if tags := [task for task in tasks if task in set(manager.all_tags)]:
        raise ValueError(f"{tags[0]!r} is a tag of several tasks: name the tasks themselves")
    with _quiet():
        results = lm_eval.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            bootstrap_iters=0,
            log_samples=False,
            **kwargs,
        )
    return {task: _metrics(found) for task, found in results["results"].items()}


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep lm-eval from warning of what is meant so: that the model is loaded already."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _metrics(found: Mapping[str, Any]) -> dict[str, float]:
    """Keep the numbers of one task; without the name of the filter where there is one filter."""
    numbers = {
        name: float(value)
        for name, value in found.items()
        if isinstance(value, int | float) and name != "sample_len"
    }
    short = Counter(name.partition(",")[0] for name in numbers)
    return {
        name if short[name.partition(",")[0]] > 1 else name.partition(",")[0]: value
        for name, value in numbers.items()
    }


def _check_not_quantized(
    pretrained: Any, kwargs: Mapping[str, Any], fields: Mapping[str, Any]
) -> None:
    if isinstance(pretrained, str):
        options = {"revision": kwargs["revision"]} if "revision" in kwargs else {}
        config = AutoConfig.from_pretrained(pretrained, **options)
    else:
        config = pretrained.config
    if getattr(config, "quantization_config", None) is not None or not isinstance(pretrained, str):
        state = "is quantized already" if isinstance(pretrained, str) else "is loaded already"
        raise ValueError(f"{pretrained!r:.80} {state}: drop {', '.join(sorted(fields))}")


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
