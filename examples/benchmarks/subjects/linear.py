"""A Linear of packed weights against one of bfloat16, at few tokens and at many."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from timing import Measurement, Settings, attempt, copies, time_chain
from torch import Tensor, nn

from scalesweep_hf.modules.linear import (
    LinearRecipe,
    NVFP4Linear,
    quantize_group,
    share_input_importance,
)

TITLE = "Linear"
UNIT = "µs"
FIGURE = "speed-up"
NOTE = (
    "y = x Wᵀ in bfloat16, N x K the size of W, then the tokens in x. Each time is that of one "
    "call in a chain over weights of more than 256 MB together, in their own format, recorded as "
    "a CUDA graph and replayed, so that launches do not count and no weight is in the cache; where "
    "that was not possible, a note says so. W4A16: packed weights; W4A4: packed weights and "
    "inputs swept by wmse at every call, FP4 arithmetic simulated. Speed-up: over bfloat16."
)
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))
TOKENS = (1, 4, 16, 32, 4096)
TINY = ((32, 64),)
TINY_TOKENS = (1, 5)


def measure(settings: Settings) -> Iterator[Measurement]:
    """Measure every kind of Linear, shape by shape."""
    for n, k in TINY if settings.tiny else SHAPES:
        medians: dict[int, float] = {}
        for what, make in KINDS.items():
            modules: list[nn.Module] = []
            for tokens in TINY_TOKENS if settings.tiny else TOKENS:
                x = torch.randn(tokens, k, device=settings.device).to(torch.bfloat16)

                def run(
                    x: Tensor = x,
                    make: Callable[[Tensor, Tensor], nn.Module] = make,
                    modules: list[nn.Module] = modules,
                    n: int = n,
                ) -> tuple[list[float], str]:
                    if not modules:
                        modules += rotation(n, x, make, settings)
                    calls = [lambda module=module: module(x) for module in modules]
                    with torch.no_grad():
                        return time_chain(calls, settings.repeats, settings.device)

                column = "1 token" if tokens == 1 else f"{tokens} tokens"
                row = attempt(f"{n} x {k}", column, what, run)
                if what == "bfloat16":
                    medians[tokens] = row.median
                if row.quartiles is not None:
                    row.figures["speed-up"] = medians[tokens] / row.median
                    row.figures["TB/s"] = nbytes(modules[0]) / row.median / 1e6
                yield row


def rotation(
    n: int, x: Tensor, make: Callable[[Tensor, Tensor], nn.Module], settings: Settings
) -> list[nn.Module]:
    """Return modules whose weights are together larger than the cache."""
    weight = torch.randn(n, x.shape[-1], device=x.device, dtype=torch.bfloat16) / 64
    first = make(weight, x)
    return [first, *(make(weight, x) for _ in range(copies(nbytes(first), settings) - 1))]


def nbytes(module: nn.Module) -> int:
    """Return the bytes of a module's weight and its scales."""
    state = getattr(module.weight, "quant_state", None)
    extra = 0 if state is None else state.absmax.nbytes
    return extra + sum(p.nbytes for p in module.parameters())


def plain(weight: Tensor, x: Tensor) -> nn.Module:
    """Return a Linear in bfloat16."""
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    module.weight = nn.Parameter(weight.clone(), requires_grad=False)
    return module


def packed(activations: str | None) -> Callable[[Tensor, Tensor], nn.Module]:
    """Return what makes an NVFP4Linear."""

    def make(weight: Tensor, x: Tensor) -> nn.Module:
        recipe = LinearRecipe("mse", activations, "bounded")
        module = NVFP4Linear.from_linear(plain(weight, x), recipe)  # type: ignore[arg-type]
        (tensors,) = quantize_group([module], [module.weight], input_absmax=x.abs().amax())
        module.set_packed(tensors)
        share_input_importance([module])
        return module

    return make


def bitsandbytes(weight: Tensor, x: Tensor) -> nn.Module:
    """Return bitsandbytes' Linear of NF4 weights."""
    with contextlib.redirect_stderr(None):
        import bitsandbytes as bnb

    module = bnb.nn.Linear4bit(
        weight.shape[1],
        weight.shape[0],
        bias=False,
        compute_dtype=torch.bfloat16,
        quant_type="nf4",
        compress_statistics=False,
    )
    module.weight = bnb.nn.Params4bit(
        weight.cpu(), requires_grad=False, quant_type="nf4", compress_statistics=False
    )
    moved: nn.Module = module.to(x.device)  # which quantizes
    return moved


KINDS: dict[str, Callable[[Tensor, Tensor], nn.Module]] = {
    "bfloat16": plain,
    "W4A16": packed(None),
    "W4A4 simulated, wmse": packed("wmse"),
    "bitsandbytes NF4": bitsandbytes,
}
