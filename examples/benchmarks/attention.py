"""Time decode attention over a packed cache on a GPU, beside sdpa over bfloat16.

    python examples/benchmarks/attention.py
    python examples/benchmarks/attention.py --batch 1 8 --tokens 4096 32768 --output attention.json

One query token. Prints a Markdown table of medians and quartiles, in microseconds. Caches rotate
through more memory than the cache of the device holds. sdpa is called on grouped heads
(`enable_gqa`), with each of its fused backends, and with the query heads of a key-value head in the
place of query tokens; the fastest counts. "static" is the packed kernel with what a half-filled
static cache brings, a mask and a length.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import scalesweep_hf
from scalesweep_hf.kernels import resolve
from scalesweep_hf.ops.attention import attend_packed
from scalesweep_hf.ops.kv import StateCodec, packed_size

CACHE = 256 << 20
BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)


def main() -> None:
    """Time every size."""
    args = parse_arguments()
    results = [measure(args, batch, tokens) for batch in args.batch for tokens in args.tokens]
    report(results)
    if args.output is not None:
        versions = {"scalesweep_hf": scalesweep_hf.__version__, "torch": torch.__version__}
        about = {"device": torch.cuda.get_device_name(), "versions": versions}
        args.output.write_text(json.dumps(about | {"results": results}, indent=2))


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Time decode attention over a packed cache.")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 32768])
    parser.add_argument("--heads", type=int, default=8, help="key-value heads")
    parser.add_argument("--query-heads", type=int, default=32)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--output", type=Path, default=None, help="JSON file")
    return parser.parse_args()


def measure(args: argparse.Namespace, batch: int, tokens: int) -> dict[str, Any]:
    """Time both at one size."""
    shape = (batch, args.heads, tokens, args.head_dim)
    query = torch.randn(batch, args.query_heads, 1, args.head_dim, device="cuda").bfloat16()
    result: dict[str, Any] = {"batch": batch, "tokens": tokens}
    result["bytes"] = {"sdpa": 4 * batch * args.heads * tokens * args.head_dim}
    result["bytes"]["packed"] = 2 * batch * args.heads * tokens * packed_size(args.head_dim)
    copies = max(CACHE // result["bytes"]["sdpa"], 1) + 1
    plain = [torch.randn(shape, device="cuda").bfloat16() for _ in range(2 * copies)]
    pairs = list(zip(plain[::2], plain[1::2], strict=True))
    result["sdpa"] = fastest(query, pairs, args.repeats)
    codec = StateCodec.for_states(plain[0], backend=resolve("auto"))
    del pairs
    rows = [codec.pack(plain.pop()) for _ in range(2 * copies)]
    rows *= max(-(-CACHE // (copies * result["bytes"]["packed"])), 1)
    rows = [x.clone() for x in rows]  # as much memory as before
    packed = list(zip(rows[::2], rows[1::2], strict=True))
    length = torch.tensor(tokens // 2, device="cuda")
    mask = (torch.arange(tokens, device="cuda") < length)[None, None, None].repeat(batch, 1, 1, 1)
    for name, options in {"packed": {}, "static": {"mask": mask, "length": length}}.items():
        result[name] = timed(attend_to(query, codec, options), packed, args.repeats)
    return result


def attend_to(query: Tensor, codec: StateCodec, options: dict[str, Any]) -> Callable[..., Tensor]:
    """Return attention to packed keys and values."""
    scale, scaling = codec.tensor_scale, query.shape[-1] ** -0.5

    def attend(keys: Tensor, values: Tensor) -> Tensor:
        return attend_packed(
            query, keys, values, scale, scale, scaling=scaling, backend=codec.backend, **options
        )

    return attend


def fastest(query: Tensor, pairs: list[tuple[Tensor, Tensor]], repeats: int) -> list[float]:
    """Return the quartiles of the fastest way to call sdpa."""
    batch, heads, _, dim = pairs[0][0].shape
    found = []
    for backend in BACKENDS:
        for q in (query, query.view(batch, heads, -1, dim)):

            def attend(keys: Tensor, values: Tensor, q: Tensor = q) -> Tensor:
                return scaled_dot_product_attention(q, keys, values, enable_gqa=q is query)

            with sdpa_kernel(backend):
                found.append(timed(attend, pairs, repeats))
    return min(found, key=lambda quartiles: quartiles[1])


def timed(
    function: Callable[..., object], inputs: list[tuple[Tensor, Tensor]], repeats: int
) -> list[float]:
    """Return the quartiles of the time of one call, microseconds of the device."""
    for pair in inputs[:3]:
        function(*pair)
    torch.cuda.synchronize()
    times = []
    for i in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(2_000_000)  # launches queue up behind it, so that they do not count
        start.record()
        function(*inputs[i % len(inputs)])
        stop.record()
        stop.synchronize()
        times.append(1000 * start.elapsed_time(stop))
    return statistics.quantiles(times, n=4)


def report(results: list[dict[str, Any]]) -> None:
    """Print the table."""
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print(
        "| batch | tokens | sdpa, us (quartiles) | MB | TB/s | packed, us (quartiles) | MB | TB/s "
        "| times as fast | static, half full, us |"
    )
    print("|" + "---|" * 10)
    for result in results:
        cells = [str(result["batch"]), str(result["tokens"])]
        for name in ("sdpa", "packed"):
            low, median, high = result[name]
            size = result["bytes"][name]
            cells += [f"{median:.1f} ({low:.1f} to {high:.1f})", f"{size / 1e6:.1f}"]
            cells.append(f"{size / median / 1e6:.2f}")
        cells += [f"{result['sdpa'][1] / result['packed'][1]:.2f}", f"{result['static'][1]:.1f}"]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
