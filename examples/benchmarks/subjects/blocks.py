"""Quantizing blocks of 16 on a device: packing, as for weights; rounding, as for activations."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from timing import Measurement, Settings, attempt, copies, time_calls
from torch import Tensor

from scalesweep_hf.kernels import resolve
from scalesweep_hf.ops.blocks import BACKENDS
from scalesweep_hf.ops.nvfp4 import compute_tensor_scale
from scalesweep_hf.ops.objectives import OBJECTIVES, RUNTIME_OBJECTIVES
from subjects import peers

TITLE = "Quantizing blocks"
UNIT = "µs"
FIGURE = "share"
NOTE = (
    "bfloat16 to packed codes and scales (pack), or to rounded bfloat16 values (round), the "
    "largest magnitude of the tensor being known. Inputs rotate through more than 256 MB. Share: "
    "the bandwidth reached, bytes read and written over time, of that of a copy of the same "
    "tensor. Peers that only choose scales are marked so, and measured at the first size."
)
SIZES = ((8192, 8192), (1, 8192), (16, 8192), (256, 8192), (4096, 8192))
TINY = ((32, 64),)
# Bytes read and written per element of bfloat16 input.
MOVED = {"copy": 4.0, "pack": 2 + 9 / 16, "round": 4.0, "scales only": 2 + 4 / 16}


@dataclass(frozen=True)
class Way:
    """One way to quantize; `make` gives the function, and raises where there is none."""

    what: str
    kind: str
    make: Callable[[], Callable[[Tensor], object]]


def measure(settings: Settings) -> Iterator[Measurement]:
    """Measure every way at every size."""
    for rows, columns in TINY if settings.tiny else SIZES:
        shape = (copies(2 * rows * columns, settings), rows, columns)
        inputs = torch.randn(shape, device=settings.device).to(torch.bfloat16)
        copy = float("nan")
        for way in (*ours(inputs), *theirs(inputs, settings)):
            row = attempt(
                "",
                f"{rows} x {columns}",
                f"{way.what}, {way.kind}" if way.kind != "copy" else "copy",
                lambda way=way, inputs=inputs: (  # type: ignore[misc]
                    time_calls(way.make(), inputs, settings.repeats, settings.device),
                    "",
                ),
            )
            if way.kind == "copy":
                copy = row.median
            if row.quartiles is not None and way.kind != "copy":
                row.figures["share"] = MOVED[way.kind] / 4 * copy / row.median
            yield row


def ours(inputs: Tensor) -> Iterator[Way]:
    """Yield a copy, then this package's ways."""
    target, amax = torch.empty_like(inputs[0]), inputs.abs().amax()
    yield Way("copy", "copy", lambda: target.copy_)
    chosen = BACKENDS[resolve("auto")]
    importance = torch.rand(inputs.shape[-1], device=inputs.device)
    for kind, function in (("pack", chosen.encode_blocks), ("round", chosen.round_blocks)):
        for objective in RUNTIME_OBJECTIVES:
            weight = importance if OBJECTIVES[objective].weighted else None
            scale = compute_tensor_scale(amax, objective)

            def make(
                function: Callable[..., object] = function,
                objective: str = objective,
                weight: Tensor | None = weight,
                scale: Tensor = scale,
            ) -> Callable[[Tensor], object]:
                return lambda x: function(x, scale, objective=objective, importance=weight)

            yield Way(objective, kind, make)


def theirs(inputs: Tensor, settings: Settings) -> Iterator[Way]:
    """Yield the ways of peers."""
    amax = inputs.abs().amax()
    backend = "triton" if settings.device == "cuda" else "pytorch"
    yield Way("torchao absmax", "pack", lambda: peers.torchao(amax))
    if settings.device == "cuda":
        yield Way("torchao absmax, compiled", "pack", lambda: peers.torchao_compiled(amax))
    for rule, name in (("static_6", "absmax"), ("mse", "4/6 mse")):
        yield Way(
            f"fouroversix {name}, {backend}",
            "pack",
            lambda rule=rule: peers.fouroversix(amax, rule, backend),  # type: ignore[misc]
        )
    if tuple(inputs.shape[1:]) not in (SIZES[0], TINY[0]):
        return
    make = peers.modelopt_sweep if settings.device == "cuda" else peers.modelopt_sweep_cpu
    yield Way("Model-Optimizer, 126 scales", "scales only", lambda: make(amax))
    yield Way("llm-compressor nvfp4_expanded_mse", "scales only", peers.llm_compressor)
