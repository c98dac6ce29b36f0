"""Compare bounded and exact sweeps with brute force over all 126 codes, and count candidates.

    python examples/benchmarks/window.py [MODEL ...] --random 10000000 --adversarial 1000000

Models are folders with safetensors, whose matrices are swept; with --text FILE the inputs of their
linear layers are too. Prints one line per source; --picture FILE draws where optima fall. Install
numba to have brute force in minutes.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from brute_force import brute_force
from safetensors.torch import load_file
from torch import Tensor, nn

from scalesweep_hf.ops import e2m1, e4m3
from scalesweep_hf.ops.nvfp4 import compute_tensor_scale
from scalesweep_hf.ops.sweep import BLOCK, absmax_codes, block_loss, sweep_scales
from scalesweep_hf.ops.window import ROUNDED, TOP

CHUNK = 8192
ORDER = (0, -1, 1, 5, 4, 2, 3, 6, -2, -3, 7, -4)  # offsets from q0, likely ones first
SLACK = 1 - 2.0**-18  # more than rounding adds to a partial sum and takes from a whole one
LARGEST = (2, 3, 4)


class Tally:
    """Counts over the blocks of one source."""

    def __init__(self) -> None:
        """Start at zero."""
        self.blocks = self.bounded = self.exact = self.window = 0
        self.sampled = self.wrong = 0  # every eighth chunk
        self.pruned = dict.fromkeys(LARGEST, 0)
        self.offsets = torch.zeros(8, 12, dtype=torch.int64)  # [field of q0, offset + 4]

    def add(self, x: Tensor, weight: Tensor | None = None) -> None:
        """Sweep blocks x [B, 16], weighted or not; the bounded window is for unweighted ones."""
        rows = x.unsqueeze(1)
        importance = None if weight is None else weight.unsqueeze(1)
        best = brute_force(x, weight)
        exact = sweep_scales(rows, importance, window="exact").codes.squeeze(1)
        self.blocks += len(x)
        self.exact += int((exact != best).sum())
        if weight is not None:
            return
        self.bounded += int((sweep_scales(rows).codes.squeeze(1) != best).sum())
        q0 = absmax_codes(rows).squeeze(1).long()
        self.window += int(WINDOW[q0].sum())
        if self.blocks // CHUNK % 8 == 1 or len(x) < CHUNK:
            self.sampled += len(x)
            for k, (winners, count) in pruned(x, q0).items():
                self.pruned[k] += count
                self.wrong += int((winners != best).sum())
        usual = (q0 >= 2 * 8) & (q0 < TOP)
        place = (q0[usual] % 8) * 12 + best[usual].long() - q0[usual] + 4
        self.offsets += place.bincount(minlength=96).view(8, 12)

    def line(self) -> str:
        """Return blocks, mismatches, mean candidates."""
        text = f"{self.blocks} blocks, mismatches: exact {self.exact}"
        if self.window:
            means = ", ".join(
                f"{n / max(1, self.sampled):.2f} by {k}" for k, n in self.pruned.items()
            )
            text += f", bounded {self.bounded}, pruned {self.wrong}"
            text += f"; candidates {self.window / self.blocks:.2f}, pruned {means}"
        return text


# Which codes the window of a base holds, [127, 127].
WINDOW = torch.zeros(127, 127, dtype=torch.bool)
for _q0 in range(1, 127):
    WINDOW[_q0, ROUNDED.codes(_q0)] = True


def main() -> None:
    """Sweep every source and print its line."""
    args = parse_arguments()
    total = torch.zeros(8, 12, dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)
    for name, chunks in sources(args, generator):
        start, tally = time.perf_counter(), Tally()
        for x in chunks:
            weight = None
            if name.endswith("weighted"):
                weight = torch.rand(x.shape, generator=generator) ** 8
                weight[torch.rand(x.shape, generator=generator) < 0.1] = 0.0
            for i in range(0, len(x), CHUNK):
                tally.add(x[i : i + CHUNK], None if weight is None else weight[i : i + CHUNK])
        print(f"{name}: {tally.line()} ({time.perf_counter() - start:.0f} s)", flush=True)
        if name.endswith("weights"):
            total += tally.offsets
    if args.picture:
        draw(total, args.picture)


def sources(
    args: argparse.Namespace, generator: torch.Generator
) -> Iterator[tuple[str, Iterator[Tensor]]]:
    """Yield names and the blocks [B, 16] of each."""
    for folder in args.models:
        yield f"{folder.name} weights", weight_blocks(folder)
        if args.text:
            yield f"{folder.name} activations", iter(activation_blocks(folder, args.text))
    for suffix in ("", " weighted"):
        n = args.adversarial
        yield f"adversarial{suffix}", (adversarial(CHUNK, generator) for _ in range(-(-n // CHUNK)))
    n = args.random
    yield "random weighted", (random(CHUNK, generator) for _ in range(-(-n // 10 // CHUNK)))
    yield "random", (random(CHUNK, generator) for _ in range(-(-n // CHUNK)))


def pruned(x: Tensor, q0: Tensor) -> dict[int, tuple[Tensor, int]]:
    """Sweep the window, but skip the candidates that the largest elements alone rule out.

    L(s) is at least the sum of the errors of any elements of the block, so a candidate whose k
    largest elements cost more than the best loss so far cannot win. `SLACK` covers rounding: k
    terms in another order are at most 1 + 18.1 * 2**-24 times as large, the sum as much smaller.

    Args:
        x: [B, 16] float32.
        q0: [B] int64.

    Returns:
        By k: the winners [B] int64, and how many losses were computed in full.
    """
    top = x.abs().topk(max(LARGEST), dim=-1).values  # [B, k]
    best = {k: torch.full((len(x),), torch.inf) for k in LARGEST}
    winner = {k: q0.clone() for k in LARGEST}
    count = dict.fromkeys(LARGEST, 0)
    odd = tuple(range(8, 15)) if int(q0.min()) < 8 else ()
    for offset in ORDER + odd:
        code = (q0 + offset).clamp(1, 126)
        inside = WINDOW[q0, code] & (code == q0 + offset)
        scale = e4m3.decode(code.to(torch.uint8))
        loss = block_loss(x, scale)
        ratio = top / scale.unsqueeze(-1)
        error = (ratio - e2m1.round_magnitude(ratio)) * scale.unsqueeze(-1)
        bound = error.square().cumsum(-1)  # [B, k]
        for k in LARGEST:
            go = inside & (bound[:, k - 1] * SLACK <= best[k])
            better = go & ((loss < best[k]) | ((loss == best[k]) & (code < winner[k])))
            count[k] += int(go.sum())
            best[k] = torch.where(better, loss, best[k])
            winner[k] = torch.where(better, code, winner[k])
    return {k: (winner[k], count[k]) for k in LARGEST}


def random(n: int, generator: torch.Generator) -> Tensor:
    """Return blocks [n, 16]: normal, uniform, heavy-tailed, sparse; bases over all codes."""
    x = torch.randn(n, BLOCK, generator=generator)
    q = n // 4
    x[q : 2 * q].uniform_(-1, 1, generator=generator)
    x[2 * q : 3 * q] *= torch.exp(torch.randn(q, BLOCK, generator=generator))
    x[3 * q :][torch.rand(n - 3 * q, BLOCK, generator=generator) < 0.7] = 0.0
    return with_bases(x, 1, 120, generator)


def adversarial(n: int, generator: torch.Generator) -> Tensor:
    """Return blocks [n, 16]: ties and near ties of one or two scales, subnormal, saturating."""
    q = n // 4
    halves = torch.arange(0, 33) / 4  # grid points and midpoints, up to 8
    near = halves[torch.randint(0, 33, (n, BLOCK), generator=generator)]
    code = torch.randint(1, 127, (n, 2), generator=generator, dtype=torch.uint8)
    which = torch.randint(0, 2, (n, BLOCK), generator=generator)
    second = (code[:, :1] + torch.randint(0, 9, (n, 1), generator=generator)).clamp(max=126)
    scale = e4m3.decode(torch.cat([code[:, :1], second.to(torch.uint8)], 1)).gather(1, which)
    x = near * scale
    x[q : 2 * q] = torch.nextafter(x[q : 2 * q], torch.randn(q, BLOCK, generator=generator) * 1e9)
    x = x.abs()
    x[2 * q : 3 * q] = with_bases(random(q, generator), 1, 24, generator)
    large = with_bases(random(n - 3 * q, generator), 112, 126, generator)
    beyond = torch.exp2(6 * torch.rand(len(large), 1, generator=generator))
    x[3 * q :] = large * torch.where(
        torch.rand(len(large), 1, generator=generator) < 0.5, 1, beyond
    )
    return x


def with_bases(x: Tensor, low: int, high: int, generator: torch.Generator) -> Tensor:
    """Scale blocks so that their bases are spread over low...high."""
    code = torch.randint(low, high + 1, (len(x), 1), generator=generator, dtype=torch.uint8)
    spread = 1 + (torch.rand(len(x), 1, generator=generator) - 0.5) / 8
    return x / x.abs().amax(-1, keepdim=True).clamp(min=1e-6) * (6 * e4m3.decode(code) * spread)


def as_blocks(x: Tensor) -> Tensor:
    """Divide a matrix by its tensor scale, as `quantize` does; return blocks [B, 16]."""
    x = x.float()
    return (x / compute_tensor_scale(x.abs().amax(), "mse")).reshape(-1, BLOCK)


def weight_blocks(folder: Path) -> Iterator[Tensor]:
    """Yield the blocks of every matrix of a model."""
    for file in sorted(folder.glob("*.safetensors")):
        for weight in load_file(file).values():
            if weight.ndim == 2:
                yield as_blocks(weight)


def activation_blocks(folder: Path, text: Path) -> list[Tensor]:
    """Return the blocks that enter each linear layer, for the first 256 tokens of a text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokens = AutoTokenizer.from_pretrained(folder)(text.read_text()[:4000], return_tensors="pt")
    result: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        result.append(as_blocks(inputs[0].detach().flatten(0, -2)))

    hooks = [
        module.register_forward_pre_hook(keep)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    ]
    try:
        with torch.no_grad():
            model(tokens["input_ids"][:, :256])
    finally:
        for hook in hooks:
            hook.remove()
    return result


def draw(offsets: Tensor, file: Path) -> None:
    """Draw the share of blocks by offset of the optimum and mantissa field; offsets [8, 12]."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib.figure import Figure

    share = offsets.double() / offsets.sum(1, keepdim=True).clamp(min=1)
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(share.numpy() * 100, cmap="Blues", aspect="auto")
    for field in range(8):
        low, high = 4 - ROUNDED.down_normal[field], 4 + ROUNDED.up_normal[field]
        axes.plot(
            [low - 0.5, high + 0.5, high + 0.5, low - 0.5, low - 0.5],
            [field - 0.48, field - 0.48, field + 0.48, field + 0.48, field - 0.48],
            color="tab:red",
            linewidth=1.2,
        )
        for place in range(12):
            if offsets[field, place]:
                percent = float(share[field, place]) * 100
                color = "white" if percent > 25 else "black"
                label = f"{percent:.1f}" if percent >= 0.05 else "<.1"
                axes.text(place, field, label, ha="center", va="center", fontsize=7, color=color)
    axes.set_xticks(range(12), [f"{offset:+d}" if offset else "q0" for offset in range(-4, 8)])
    axes.set_yticks(range(8))
    axes.set_xlabel("code of the best scale, from q0")
    axes.set_ylabel("mantissa field of q0")
    figure.colorbar(image, label="% of the field's blocks")
    figure.savefig(file, dpi=110)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--random", type=int, default=100_000)
    parser.add_argument("--adversarial", type=int, default=100_000)
    parser.add_argument("--text", type=Path, help="UTF-8 text for activations")
    parser.add_argument("--picture", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
