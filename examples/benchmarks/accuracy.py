"""Measure what every block-scale objective costs a causal language model: KL and perplexity.

    python examples/benchmarks/accuracy.py MODEL --calibration TOKENS --heldout TOKENS

Token files are safetensors with one integer tensor [rows, length] each, or FILE:NAME for one of
several. Prints a Markdown table; --output also writes JSON with versions and every setting.
"""

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import scalesweep_hf
from scalesweep_hf import ScaleSweepConfig
from scalesweep_hf.config import ALGORITHMS, SCHEMES
from scalesweep_hf.evaluate import Fidelity, measure_fidelity, weight_error
from scalesweep_hf.ops.objectives import OBJECTIVES


def main() -> None:
    """Quantize the model in every way asked for, measure all on the same text, print the table."""
    args = parse_arguments()
    calibration = args.calibration if args.calibration == "self" else read_tokens(args.calibration)
    heldout = read_tokens(args.heldout)[: args.rows]
    reference = AutoModelForCausalLM.from_pretrained(args.model, device_map=args.device)
    models: dict[str, Any] = {"bf16": reference}
    facts: dict[str, dict[str, float]] = {"bf16": {}}
    for scheme, algorithm in itertools.product(args.scheme, args.algorithm):
        for objective in args.objective:
            config = ScaleSweepConfig(
                scheme=scheme,
                objective=objective,
                algorithm=algorithm,
                window=args.window,
                dataset=calibration,
                num_samples=args.num_samples,
                sequence_length=args.sequence_length,
            )
            start = time.perf_counter()
            model = AutoModelForCausalLM.from_pretrained(
                args.model, quantization_config=config, device_map=args.device
            )
            name = f"{scheme} {algorithm} {objective}"
            models[name] = model
            facts[name] = {
                "seconds": time.perf_counter() - start,
                "weight_nmse": weight_error(model, reference),
            }
    fidelity = measure_fidelity(models, reference, heldout, batch_size=args.batch_size)
    report(args, heldout, fidelity, facts)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", help="folder or Hub id")
    parser.add_argument("--calibration", default="self", help="FILE[:NAME], or 'self' (default)")
    parser.add_argument("--heldout", required=True, help="FILE[:NAME]")
    parser.add_argument("--rows", type=int, default=None, help="held-out rows; default all")
    parser.add_argument("--scheme", nargs="+", default=["W", "WA"], choices=SCHEMES)
    parser.add_argument("--algorithm", nargs="+", default=["rtn"], choices=ALGORITHMS)
    parser.add_argument("--objective", nargs="+", default=list(OBJECTIVES), choices=OBJECTIVES)
    parser.add_argument("--window", default="bounded", choices=["bounded", "exact"])
    parser.add_argument("--num-samples", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=2048, help="tokens")
    parser.add_argument("--batch-size", type=int, default=4, help="held-out rows per forward pass")
    parser.add_argument("--device", default="auto", help="device_map")
    parser.add_argument("--output", type=Path, default=None, help="JSON file")
    return parser.parse_args()


def read_tokens(spec: str) -> Tensor:
    """Read token ids [rows, length] from ``FILE[:NAME]``."""
    file, _, name = spec.partition(":")
    tensors = load_file(file)
    tokens: Tensor = tensors[name or next(iter(tensors))]
    return tokens


def report(
    args: argparse.Namespace,
    heldout: Tensor,
    fidelity: dict[str, Fidelity],
    facts: dict[str, dict[str, float]],
) -> None:
    """Print the Markdown table and write the JSON file."""
    rows, length = heldout.shape
    print(f"\n{args.model}, held-out {rows} x {length} tokens, calibration {args.calibration}")
    print("| setting | KL to bf16 | perplexity | weight NMSE | seconds to quantize |")
    print("|---|---|---|---|---|")
    for name, result in fidelity.items():
        fact = facts[name]
        weight, seconds = fact.get("weight_nmse", 0.0), fact.get("seconds", 0.0)
        row = f"| {name} | {result.kl:.5f} | {result.perplexity:.3f}"
        print(f"{row} | {weight:.5f} | {seconds:.1f} |")
    if args.output is not None:
        results = {name: vars(result) | facts[name] for name, result in fidelity.items()}
        versions = {
            "scalesweep_hf": scalesweep_hf.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        settings = {k: str(v) for k, v in vars(args).items()}
        content = {"versions": versions, "settings": settings, "results": results}
        part = args.output.with_name(args.output.name + ".part")
        part.write_text(json.dumps(content, indent=2))
        part.replace(args.output)


if __name__ == "__main__":
    main()
