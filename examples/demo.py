"""Quantize a language model to NVFP4 in every way and show what each costs.

    python examples/demo.py                       # trains a tiny Llama first, under a minute
    python examples/demo.py --model FOLDER_OR_ID  # a real model
    python examples/demo.py --model FOLDER_OR_ID --text FILE.jsonl

Every objective quantizes weights and the inputs of the same Linears (scheme "WA", or --scheme); the
last two rows add keys and values, and queries. Quality is measured on text that was not used for
calibration: the tiny model's held-out stories, or --text, or else text that the model writes itself
with another seed.
"""

import argparse
import warnings
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tiny_model import build_tiny_model, heldout_tokens
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from scalesweep_hf import NVFP4Linear, ScaleSweepConfig
from scalesweep_hf.calibration import calibration_tokens
from scalesweep_hf.config import SCHEMES
from scalesweep_hf.evaluate import measure_fidelity, weight_error
from scalesweep_hf.ops.objectives import OBJECTIVES

TINY_MODEL = Path(__file__).parents[1] / ".build" / "tiny-llama"
MB = 1e6


def main() -> None:
    """Load or train, quantize, measure, print one table and two samples."""
    args = parse_arguments()
    logging.disable_progress_bar()
    console = Console()
    folder = args.model or str(tiny_model(console))
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    reference = AutoModelForCausalLM.from_pretrained(folder, device_map=device)
    tokens = evaluation_tokens(args, folder, reference)
    models = {"bfloat16": reference}
    settings = [(args.scheme, objective) for objective in OBJECTIVES]
    settings += [(scheme, "wmse") for scheme in ("WAKV", "WAKVQ") if scheme != args.scheme]
    for scheme, objective in settings:
        name = f"{scheme} {objective}"
        console.print(f"Quantizing {folder}: {name} ...", highlight=False)
        config = ScaleSweepConfig(
            scheme=scheme,
            objective=objective,
            num_samples=args.num_samples,
            sequence_length=args.length,
        )
        models[name] = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=config, device_map=device
        )
    console.print(comparison(models, reference, tokens))
    for name in ("bfloat16", list(models)[-1]):
        text = sample(models[name], folder)
        console.print(f"\n[bold]{name} writes:[/bold] {text}", highlight=False)
    if not args.model:
        command = "python examples/demo.py --model FOLDER_OR_ID"
        console.print(f"\nThe same on a real model: {command}", highlight=False)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Quantize a model to NVFP4 in every way.")
    parser.add_argument("--model", help="folder or Hub id; default: train a tiny Llama")
    parser.add_argument("--text", help=".jsonl, .txt or .parquet to measure on")
    parser.add_argument("--scheme", default="WA", choices=SCHEMES)
    parser.add_argument("--rows", type=int, default=64, help="token rows to measure on")
    parser.add_argument("--length", type=int, default=256, help="tokens per row")
    parser.add_argument("--num-samples", type=int, default=32, help="calibration rows")
    args = parser.parse_args()
    if args.text and not args.model:
        parser.error("--text needs --model: the tiny model has its own held-out stories")
    return args


def tiny_model(console: Console) -> Path:
    """Return the built-in model's folder, training it on first use."""
    if not TINY_MODEL.exists():
        console.print("Training a tiny Llama on made-up stories; this takes under a minute ...")
        TINY_MODEL.parent.mkdir(exist_ok=True)
        build_tiny_model(TINY_MODEL)
    return TINY_MODEL


def evaluation_tokens(args: argparse.Namespace, folder: str, reference: Any) -> Tensor:
    """Return token ids [rows, length] that calibration does not see."""
    if args.model is None:
        return heldout_tokens(Path(folder), args.rows, args.length)
    tokens, _ = calibration_tokens(
        args.text or "self",
        reference,
        num_samples=args.rows,
        sequence_length=args.length,
        seed=1,
    )
    return tokens


def comparison(models: dict[str, Any], reference: Any, tokens: Tensor) -> Table:
    """Measure every model and lay the figures out."""
    fidelity = measure_fidelity(models, reference, tokens)
    table = Table(
        title=f"NVFP4, {tokens.shape[0]} x {tokens.shape[1]} held-out tokens",
        caption="NMSE: relative squared error of the weights. KL: nats per token from bfloat16.",
    )
    columns = ("", "NMSE", "KL", "perplexity", "Linear MB", "cache B/tok")
    for column in columns:
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    linears = [
        name
        for name, module in list(models.values())[-1].named_modules()
        if isinstance(module, NVFP4Linear)
    ]
    for name, model in models.items():
        quantized = sum(bytes_of(model.get_submodule(linear)) for linear in linears)
        table.add_row(
            name,
            f"{weight_error(model, reference):.5f}",
            f"{fidelity[name].kl:.5f}",
            f"{fidelity[name].perplexity:.4f}",
            f"{quantized / MB:.2f}",
            f"{cache_bytes(model, tokens[:1]):.0f}",
        )
    return table


def bytes_of(module: torch.nn.Module) -> int:
    """Return the bytes of all parameters."""
    return sum(parameter.nbytes for parameter in module.parameters())


def cache_bytes(model: Any, prompt: Tensor) -> float:
    """Return the bytes per token of the cache that `generate` makes."""
    prompt = prompt.to(device=model.device, dtype=torch.int64)
    out = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=1,
        do_sample=False,
        return_dict_in_generate=True,
    )
    layers = out.past_key_values.layers
    return sum(float(layer.keys.nbytes + layer.values.nbytes) for layer in layers) / prompt.shape[1]


def sample(model: Any, folder: str) -> str:
    """Let a model continue from its begin token, the same way every time."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    start = torch.tensor([[tokenizer.bos_token_id or 0]], device=model.device)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ids = model.generate(
            input_ids=start,
            attention_mask=torch.ones_like(start),
            max_new_tokens=60,
            do_sample=True,
            temperature=0.6,
        )
    return str(tokenizer.decode(ids[0], skip_special_tokens=True)).strip()


if __name__ == "__main__":
    main()
