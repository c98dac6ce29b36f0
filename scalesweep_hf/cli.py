"""The command line: ``scalesweep quantize | eval | report | export | inspect | card``."""

import json
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.table import Table

from scalesweep_hf.files import check_free, whole_folder, write_text
from scalesweep_hf.version import __version__

app = typer.Typer(
    help="Quantize language models to NVFP4 with ScaleSweep block scales, and measure them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
console = Console(stderr=True)
MB = 1e6

Model = Annotated[str, typer.Argument(help="Folder or Hub id.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines on stdout.")]
Recipe = "Recipe (fields of ScaleSweepConfig; an option beats --config)"
Calibration = "Calibration"
Blocks = "GPTQ and block by block"


def option(panel: str, text: str, **kwargs: Any) -> Any:
    """Return an option without a default of its own: what is not given comes from the config."""
    return typer.Option(help=text, rich_help_panel=panel, show_default=False, **kwargs)


@app.callback()
def common(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks of errors; may stand anywhere.")
    ] = False,
) -> None:
    """Take the options that stand before the command; `main` sees to both."""


@app.command(epilog="Example: scalesweep quantize MODEL OUT --scheme WA --dataset notes.jsonl")
def quantize(
    model: Model,
    out: Annotated[Path, typer.Argument(help="Folder to make.", show_default=False)],
    config: Annotated[
        Path | None, typer.Option(help="YAML file of recipe fields, as configs/WA.yaml.")
    ] = None,
    scheme: Annotated[str | None, option(Recipe, "W, WA, WAKV or WAKVQ.")] = None,
    objective: Annotated[
        str | None, option(Recipe, "absmax, four_over_six, mse, wmse or hessian.")
    ] = None,
    algorithm: Annotated[str | None, option(Recipe, "rtn, gptq or gptq-plus.")] = None,
    window: Annotated[
        str | None, option(Recipe, "bounded, exact, or E4M3 code offsets LOW,HIGH.")
    ] = None,
    overrides: Annotated[
        str | None, option(Recipe, """JSON, as '{"*.down_proj": {"activations": null}}'.""")
    ] = None,
    modules_to_not_convert: Annotated[
        list[str] | None,
        option(Recipe, "Name pattern of modules to leave alone; may be repeated."),
    ] = None,
    backend: Annotated[str | None, option(Recipe, "auto, torch, triton or numba.")] = None,
    packed_cache: Annotated[
        bool | None, option(Recipe, "Whether generate stores keys and values packed.")
    ] = None,
    dataset: Annotated[
        str | None,
        option(Calibration, "self, a .jsonl, .txt or .parquet file, or a Hub data set."),
    ] = None,
    num_samples: Annotated[int | None, option(Calibration, "Rows.")] = None,
    sequence_length: Annotated[int | None, option(Calibration, "Tokens a row.")] = None,
    seed: Annotated[int | None, option(Calibration, "Of sampling or shuffling.")] = None,
    batch_size: Annotated[int | None, option(Calibration, "Rows per forward pass.")] = None,
    statistics: Annotated[
        str | None, option(Calibration, "File of statistics, in place of calibration.")
    ] = None,
    gptq_damping: Annotated[
        float | None, option(Blocks, "In units of the Hessian's mean diagonal, > 0 and <= 1.")
    ] = None,
    gptq_dtype: Annotated[str | None, option(Blocks, "float32 or float64.")] = None,
    pipeline: Annotated[str | None, option(Blocks, "auto, block or model.")] = None,
    propagate_quantized: Annotated[
        bool | None, option(Blocks, "Whether blocks see quantized inputs.")
    ] = None,
    offload_hidden_states: Annotated[
        bool | None, option(Blocks, "Keep hidden states in CPU memory.")
    ] = None,
    resume_dir: Annotated[
        str | None, option(Blocks, "Folder of finished blocks, to go on after an interruption.")
    ] = None,
    device_map: Annotated[
        str | None, typer.Option(help="As in from_pretrained: auto, cpu, cuda:0.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Quantize MODEL and save it in OUT."""
    given = dict(locals())
    out = out.resolve()
    check_free(out)
    from scalesweep_hf.config import ScaleSweepConfig
    from scalesweep_hf.evaluate.table import load_model

    recipe = make_recipe(config, {name: given.get(name) for name in ScaleSweepConfig.choices()})
    start = time.perf_counter()
    quantized = load_model(model, recipe, device_map)
    save_whole(quantized, model, out)
    summary = describe_checkpoint(out) | {
        "out": str(out),
        "seconds": round(time.perf_counter() - start, 1),
        "peak_memory_mb": round(peak_memory() / MB),
    }
    show(str(out), summary, as_json)


@app.command(
    "eval",
    epilog="Examples: scalesweep eval MODEL --tasks hellaswag,piqa --limit 500; "
    "scalesweep eval MODEL --heldout notes.jsonl --reference ORIGINAL; "
    "scalesweep eval --table configs/paper.yaml --output results",
)
def evaluate(
    model: Annotated[
        str | None, typer.Argument(help="Folder or Hub id.", show_default=False)
    ] = None,
    tasks: Annotated[str, typer.Option(help="lm-eval tasks, separated by commas.")] = "",
    include_path: Annotated[str | None, typer.Option(help="Folder of task definitions.")] = None,
    limit: Annotated[float | None, typer.Option(help="Documents per task at the most.")] = None,
    heldout: Annotated[
        str | None,
        typer.Option(
            help="Text for perplexity and KL: a file, or token ids FILE.safetensors:NAME."
        ),
    ] = None,
    rows: Annotated[
        int | None, typer.Option(min=1, help="Rows of held-out text at the most.")
    ] = None,
    reference: Annotated[str | None, typer.Option(help="The full-precision model, for KL.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file of recipe fields: quantize MODEL on load.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Sequences per forward pass; 8 if not given.")
    ] = None,
    device_map: Annotated[str | None, typer.Option(help="As in from_pretrained.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="File for the results; with --table the folder.")
    ] = None,
    table: Annotated[
        Path | None, typer.Option(help="Plan of a whole table, as configs/paper.yaml.")
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="With --table: only say what would run.")] = False,
    as_json: Json = False,
) -> None:
    """Measure MODEL: lm-eval tasks, perplexity, and KL to a reference; or a whole table."""
    from scalesweep_hf.evaluate.plan import Plan, Task

    if dry_run and table is None:
        raise ValueError("--dry-run is for --table")
    if table is not None:
        if ignored := [
            f"--{n}"
            for n, v in (("tasks", tasks), ("reference", reference), ("config", config))
            if v
        ]:
            raise ValueError(f"{ignored[0]} does not go with --table: put it into the plan")
        changes: dict[str, Any] = {"limit": limit, "include_path": include_path, "heldout": heldout}
        changes |= {"models": [model] if model else None, "device_map": device_map}
        changes |= {"heldout_rows": rows, "batch_size": batch_size}
        plan = Plan.from_yaml(table, **{k: v for k, v in changes.items() if v is not None})
        return run_plan(plan, output or Path("results"), dry_run, as_json)
    if model is None:
        raise ValueError("name a model, or a plan with --table")
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names and heldout is None:
        raise ValueError("nothing to measure: give --tasks, --heldout or --table")
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
    plan = Plan(
        models=(model,),
        tasks=tuple(Task(name) for name in names),
        heldout=heldout,
        heldout_rows=rows,
        include_path=include_path,
        limit=limit,
        batch_size=batch_size or 8,
        device_map=device_map,
    )
    recipe = None if config is None else make_recipe(config, {})
    result = measure(plan, recipe, reference)
    if output is not None:
        write_text(output, json.dumps(result, indent=2))
    flat = {key: value for key, value in result.items() if not isinstance(value, dict)}
    for task, metrics in result["tasks"].items():
        flat |= {f"{task} {metric}": value for metric, value in metrics.items()}
    show(model, result if as_json else flat, as_json)
    return None


@app.command(epilog="Example: scalesweep report MODEL --output report.html --text notes.jsonl")
def report(
    model: Model,
    output: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("report.html"),
    text: Annotated[
        str, typer.Option(help="self, a text file, or token ids FILE.safetensors:NAME.")
    ] = "self",
    rows: Annotated[int, typer.Option(min=1, help="Rows of text.")] = 4,
    length: Annotated[int, typer.Option(min=1, help="Tokens a row.")] = 512,
    modules_to_not_convert: Annotated[
        list[str] | None, typer.Option(help="Name pattern to leave out; may be repeated.")
    ] = None,
    device_map: Annotated[str | None, typer.Option(help="As in from_pretrained.")] = None,
    as_json: Json = False,
) -> None:
    """Show how a full-precision MODEL quantizes, in one HTML file.

    How near every way of choosing scales comes to the best, which scales are chosen, which layers
    matter, and what memory is saved.
    """
    from scalesweep_hf.evaluate.report import to_json, write_report
    from scalesweep_hf.evaluate.study import study

    output.parent.mkdir(parents=True, exist_ok=True)
    gaps, sensitivity, size, about = study(
        model, text, rows=rows, length=length, skips=modules_to_not_convert, device_map=device_map
    )
    write_report(output, about=about, gaps=gaps, sensitivity=sensitivity, size=size)
    if as_json:
        typer.echo(to_json(gaps, sensitivity, size))
    else:
        typer.echo(f"{output}: {len(gaps)} rows, {output.stat().st_size / 1e3:.0f} kB")


@app.command(
    epilog="Examples: scalesweep export MODEL OUT --format compressed-tensors; "
    "scalesweep export MODEL OUT --format modelopt --without-states"
)
def export(
    source: Annotated[
        str, typer.Argument(help="Folder or Hub id of a quantized model.", show_default=False)
    ],
    out: Annotated[Path, typer.Argument(help="Folder to make.", show_default=False)],
    target: Annotated[
        str,
        typer.Option("--format", help="compressed-tensors or modelopt.", show_default=False),
    ],
    without_states: Annotated[
        bool, typer.Option(help="Leave out the scales of keys, values and queries.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write a quantized model for vLLM, SGLang, TensorRT-LLM or plain Transformers."""
    from scalesweep_hf.export import export_checkpoint

    start = time.perf_counter()
    result = export_checkpoint(source, out.resolve(), target, states=not without_states)
    result |= {
        "seconds": round(time.perf_counter() - start, 1),
        "peak_memory_mb": round(peak_memory() / MB),
    }
    inexact = len(result["inexact"])
    show(str(out), result if as_json else result | {"inexact": inexact}, as_json)


@app.command(epilog="Examples: scalesweep inspect MODEL; scalesweep inspect MODEL --for vllm")
def inspect(
    path: Annotated[str, typer.Argument(help="Folder.", show_default=False)],
    engine: Annotated[
        str | None,
        typer.Option("--for", help="vllm or sglang: also say why it would not be served right."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Explain an NVFP4 checkpoint of this package, ModelOpt or compressed-tensors.

    Nothing is loaded. With --for, the exit code is 1 if there are problems.
    """
    from scalesweep_hf.export.layout import read_checkpoint
    from scalesweep_hf.export.serving import check_serving
    from scalesweep_hf.inspection import by_kind, explain

    problems = None if engine is None else check_serving(read_checkpoint(Path(path)), engine)
    result = explain(Path(path))
    if as_json:
        show(path, result if problems is None else result | {"problems": problems}, as_json)
    else:
        rows = by_kind(result.pop("layers"))
        show(path, result, as_json)
        show_rows(rows)
        for line in problems or ():
            typer.echo(f"- {line}")
        if problems is not None:
            typer.echo(f"{len(problems)} problems for {engine}")
    if problems:
        raise typer.Exit(1)


@app.command(epilog="Example: scalesweep eval FOLDER --tasks piqa --output FOLDER/results.json")
def card(
    folder: Annotated[Path, typer.Argument(help="Of a quantized model.", show_default=False)],
    results: Annotated[
        Path | None, typer.Option(help="What eval wrote; results.json in FOLDER if not given.")
    ] = None,
) -> None:
    """Write FOLDER's README.md, with the figures of an evaluation."""
    from scalesweep_hf.card import write_card

    typer.echo(write_card(folder, results))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; end with 0, 1 after an error, 2 after wrong usage, 130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if "--version" in arguments:
        typer.echo(__version__)
        sys.exit(0)
    debug = "--debug" in arguments
    try:
        app([argument for argument in arguments if argument != "--debug"])
    except Exception as error:
        if debug:
            raise
        typer.echo(f"Error: {describe_error(error)}", err=True)
        sys.exit(1)


def describe_error(error: Exception) -> str:
    """Return one line: what is wrong and what to do."""
    if isinstance(error, ModuleNotFoundError):
        extra = "report" if "matplotlib" in str(error) else "eval"
        return f"{error}: pip install 'scalesweep-hf[{extra}]'"
    text = " ".join(str(error).split())
    return text or type(error).__name__


def make_recipe(file: Path | None, given: dict[str, Any]) -> Any:
    """Return the recipe of a YAML file, with options in place of its fields.

    Raises:
        ValueError: the file or an option is wrong.
        TypeError: the file has an unknown field.
    """
    from scalesweep_hf.config import ScaleSweepConfig

    fields: Any = {}
    if file is not None:
        fields = yaml.safe_load(file.read_text(encoding="utf-8"))
        if not isinstance(fields, dict):
            raise ValueError(f"{file} holds a {type(fields).__name__}; expected recipe fields")
    if (window := given.get("window")) is not None and "," in window:
        try:
            given["window"] = tuple(int(offset) for offset in window.split(","))
        except ValueError as error:
            raise ValueError(f"--window is {window!r}; use bounded, exact or LOW,HIGH") from error
    if (overrides := given.get("overrides")) is not None:
        try:
            given["overrides"] = json.loads(overrides)
        except json.JSONDecodeError as error:
            raise ValueError(f"--overrides is no JSON: {error}") from error
    fields |= {name: value for name, value in given.items() if value is not None}
    return ScaleSweepConfig(**fields)


def save_whole(model: Any, source: str, out: Path) -> None:
    """Save a model and its tokenizer under a temporary name, and rename the folder when whole."""
    from transformers import AutoTokenizer

    with whole_folder(out) as part:
        model.save_pretrained(part)
        try:
            tokenizer = AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError, KeyError, ImportError) as error:
            console.print(f"No tokenizer at {source} ({type(error).__name__}): none is saved.")
        else:
            tokenizer.save_pretrained(part)


def measure(plan: Any, recipe: Any, reference: str | None) -> dict[str, Any]:
    """Load a model, quantized on the way if there is a recipe, and evaluate it."""
    from scalesweep_hf.evaluate.table import evaluate_model, load_language_model, versions

    load = load_language_model
    model = load(plan.models[0], recipe, plan.device_map)
    original = None if reference is None else load(reference, None, plan.device_map)
    start = time.perf_counter()
    result = evaluate_model(plan, model, original)
    seconds = round(time.perf_counter() - start, 1)
    return result | {"seconds": seconds, "versions": versions(), "model": plan.models[0]}


def run_plan(plan: Any, folder: Path, dry_run: bool, as_json: bool) -> None:
    """Run a table, or say what it would run."""
    from scalesweep_hf.evaluate.plan import describe
    from scalesweep_hf.evaluate.render import markdown
    from scalesweep_hf.evaluate.table import count_parameters, run_table

    if dry_run:
        sizes = {name: count_parameters(name) for name in plan.models}
        typer.echo("\n".join(describe(plan, folder, sizes)))
        return
    results = run_table(plan, folder, report=lambda line: console.print(line, highlight=False))
    typer.echo(json.dumps(results, indent=2) if as_json else markdown(results))


def describe_checkpoint(path: Path) -> dict[str, Any]:
    """Return what a saved checkpoint of this package holds, from its headers and scales.

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: the checkpoint is not of this package.
    """
    from scalesweep_hf.inspection import summarise

    return summarise(path)


def show(title: str, values: dict[str, Any], as_json: bool) -> None:
    """Print a two-column table, or JSON on stdout."""
    if as_json:
        typer.echo(json.dumps(values, indent=2))
        return
    table = Table(title=title, show_header=False)
    for key, value in values.items():
        table.add_row(key, f"{value:.5g}" if isinstance(value, float) else str(value))
    Console().print(table)


def show_rows(rows: Sequence[dict[str, Any]]) -> None:
    """Print a table of rows that have the same keys."""
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console().print(table)


def peak_memory() -> int:
    """Return the bytes of the process's peak resident memory, or of the accelerator's if more."""
    import torch

    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if not torch.accelerator.is_available():
        return resident
    return max(resident, torch.accelerator.max_memory_allocated())
