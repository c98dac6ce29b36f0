"""Measure the output error that quantizing single layers makes on held-out text.

    python examples/benchmarks/layers.py MODEL --calibration TOKENS --heldout TOKENS

Inputs are those of the full-precision model; each layer is quantized alone. The error is relative:
||X (W - W_q)^T||^2 / ||X W^T||^2 over all held-out tokens, averaged over the chosen layers.
"""

import argparse
import fnmatch
import statistics
import time

import torch
from accuracy import read_tokens
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from scalesweep_hf.calibration import run_calibration
from scalesweep_hf.calibration.collect import InputStatistics, Observed
from scalesweep_hf.ops.gptq import factorize, quantize_gptq
from scalesweep_hf.ops.gptq_plus import block_order, quantize_gptq_plus
from scalesweep_hf.ops.nvfp4 import NVFP4Tensor, compute_tensor_scale, dequantize, quantize
from scalesweep_hf.ops.objectives import OBJECTIVES

ALGORITHMS = ("rtn", "gptq", "gptq-plus")


def main() -> None:
    """Observe the layers' inputs on both texts, quantize each in every way, print the table."""
    args = parse_arguments()
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(args.model, device_map=args.device)
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and fnmatch.fnmatch(name, args.layers)
    ]
    observed = Observed(local_hessian=True, hessian=torch.float32)
    seen, heldout = (
        run_calibration(model, read_tokens(file)[: args.rows], names=names, observed=observed)
        for file in (args.calibration, args.heldout)
    )
    settings = [(a, o) for a in ALGORITHMS[:2] for o in OBJECTIVES] + [("gptq-plus", "-")]
    errors: dict[tuple[str, str], list[float]] = {setting: [] for setting in settings}
    seconds = dict.fromkeys(settings, 0.0)
    for key, known in seen.items():
        weight = model.get_submodule(next(n for n in names if n.endswith(key))).weight.detach()
        for algorithm, objective in settings:
            start = time.perf_counter()
            quantized = dequantize(quantize_layer(weight, known, algorithm, objective))
            seconds[algorithm, objective] += time.perf_counter() - start
            hessian = heldout[key].hessian
            assert hessian is not None
            error, norm = (energy(w, hessian) for w in (weight - quantized, weight))
            errors[algorithm, objective].append(error / norm)
    print(f"\n{args.model}: {len(seen)} layers {args.layers}")
    print("| algorithm | scales | output NMSE | seconds |")
    print("|---|---|---|---|")
    for (algorithm, objective), values in errors.items():
        cost = seconds[algorithm, objective]
        print(f"| {algorithm} | {objective} | {statistics.mean(values):.6f} | {cost:.2f} |")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", help="folder or Hub id")
    parser.add_argument("--calibration", required=True, help="FILE[:NAME]")
    parser.add_argument("--heldout", required=True, help="FILE[:NAME]")
    parser.add_argument("--rows", type=int, default=None, help="of both texts; default all")
    parser.add_argument("--layers", default="*mlp.*_proj", help="name pattern")
    parser.add_argument("--device", default="auto", help="device_map")
    return parser.parse_args()


def quantize_layer(
    weight: Tensor, known: InputStatistics, algorithm: str, objective: str
) -> NVFP4Tensor:
    """Quantize one weight [N, K] by what is known of its input."""
    assert known.hessian is not None
    if algorithm == "gptq-plus":
        factor = factorize(known.hessian, damping=0.1, order=block_order(known.hessian))
        scale = compute_tensor_scale(weight.abs().amax(), "mse")
        return quantize_gptq_plus(weight, scale, factor)
    kind = OBJECTIVES[objective]
    importance = known.square if kind.weighted else known.local_hessian if kind.coupled else None
    start = quantize(weight, objective=objective, importance=importance)
    return start if algorithm == "rtn" else quantize_gptq(weight, start, factorize(known.hessian))


def energy(weight: Tensor, hessian: Tensor) -> float:
    """Return ||X W^T||^2 = tr(W H W^T)."""
    w = weight.to(torch.float32)
    return float(((w @ hessian) * w).sum(dtype=torch.float64))


if __name__ == "__main__":
    main()
