"""Attention of one new token over a packed cache, against sdpa over bfloat16."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from timing import Measurement, Settings, attempt, copies, time_chain
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from scalesweep_hf.kernels import resolve
from scalesweep_hf.ops.attention import attend_packed
from scalesweep_hf.ops.kv import StateCodec, packed_size

TITLE = "Decode attention"
UNIT = "µs"
FIGURE = "speed-up"
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
NOTE = (
    f"One new token a sequence, {HEADS} query heads over {KV_HEADS} key-value heads, head_dim "
    f"{HEAD_DIM}, over a cache of bfloat16 ({4 * KV_HEADS * HEAD_DIM} bytes a token) or of packed "
    f"rows ({2 * KV_HEADS * packed_size(HEAD_DIM)}), batch x tokens: time of one call in a chain "
    "over caches of more than 256 MB together, replayed as a CUDA graph. Half filled: with the "
    "mask and the length of a static cache. Speed-up: over the fastest sdpa."
)
SIZES = ((8, 32768), (8, 4096), (1, 32768), (1, 4096), (1, 1024))
TINY = ((2, 48),)


def measure(settings: Settings) -> Iterator[Measurement]:
    """Measure every way at every size."""
    for batch, tokens in TINY if settings.tiny else SIZES:
        rows = []
        for what, make in ways(settings).items():
            facts: dict[str, float] = {}

            def run(
                make: Callable[[int, int, str], Call] = make,
                facts: dict[str, float] = facts,
                batch: int = batch,
                tokens: int = tokens,
            ) -> tuple[list[float], str]:
                first = make(batch, tokens, settings.device)
                facts["MB"] = first.nbytes / 1e6
                others = copies(first.nbytes, settings) - 1
                calls = [first, *(make(batch, tokens, settings.device) for _ in range(others))]
                return time_chain(calls, settings.repeats, settings.device)

            row = attempt("", f"{batch} x {tokens}", what, run)
            if row.quartiles is not None:
                row.figures |= facts
                row.figures["TB/s"] = facts["MB"] / row.median
            rows.append(row)
        timed = [row for row in rows if row.quartiles is not None]
        sdpa_times = [row.median for row in timed if row.what.startswith("sdpa")]
        for row in timed if sdpa_times else ():
            row.figures["speed-up"] = min(sdpa_times) / row.median
        yield from rows


@dataclass(frozen=True)
class Call:
    """One attention over one cache, which no other call reads.

    Attributes:
        nbytes: of keys and values that it reads.
        function: computes it.
    """

    nbytes: int
    function: Callable[[], object]

    def __call__(self) -> object:
        """Attend."""
        return self.function()


def states(batch: int, tokens: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return a query [B, Hq, 1, D], keys and values [B, H, T, D] of random numbers."""
    query = torch.randn(batch, HEADS, 1, HEAD_DIM, device=device).to(torch.bfloat16)
    shape = (batch, KV_HEADS, tokens, HEAD_DIM)
    keys, values = (torch.randn(shape, device=device).to(torch.bfloat16) for _ in range(2))
    return query, keys, values


def sdpa(backend: SDPBackend | None = None) -> Callable[[int, int, str], Call]:
    """Return what makes calls of torch's attention."""

    def make(batch: int, tokens: int, device: str) -> Call:
        query, keys, values = states(batch, tokens, device)

        def attend() -> Tensor:
            with nullcontext() if backend is None else sdpa_kernel(backend):
                return scaled_dot_product_attention(query, keys, values, enable_gqa=True)

        return Call(keys.nbytes + values.nbytes, attend)

    return make


def unpacked(batch: int, tokens: int, device: str) -> Call:
    """Return a call that decodes the whole cache, then takes torch's attention."""
    query, keys, values = states(batch, tokens, device)
    codec = StateCodec.for_states(keys, backend=resolve("auto"))
    rows = [codec.pack(keys), codec.pack(values)]

    def attend() -> Tensor:
        k, v = (codec.unpack(part, torch.bfloat16) for part in rows)
        return scaled_dot_product_attention(query, k, v, enable_gqa=True)

    return Call(sum(part.nbytes for part in rows), attend)


def packed(filled: float = 1.0) -> Callable[[int, int, str], Call]:
    """Return what makes calls that read packed rows, of which a part is filled."""

    def make(batch: int, tokens: int, device: str) -> Call:
        query, keys, values = states(batch, tokens, device)
        codec = StateCodec.for_states(keys, backend=resolve("auto"))
        rows = (codec.pack(keys), codec.pack(values))
        options: dict[str, Tensor] = {}
        if filled < 1:
            options["length"] = torch.tensor(int(tokens * filled), device=device)
            inside = torch.arange(tokens, device=device) < options["length"]
            options["mask"] = inside.repeat(batch, 1, 1, 1)

        def attend() -> Tensor:
            scales = (codec.tensor_scale, codec.tensor_scale)
            scaling = HEAD_DIM**-0.5
            return attend_packed(
                query, *rows, *scales, scaling=scaling, backend=codec.backend, **options
            )

        return Call(int(sum(part.nbytes for part in rows) * filled), attend)

    return make


def ways(settings: Settings) -> dict[str, Callable[[int, int, str], Call]]:
    """Return what makes calls, by name; plain attention first."""
    found = {"sdpa": sdpa()}
    if settings.device == "cuda":
        found["sdpa, flash"] = sdpa(SDPBackend.FLASH_ATTENTION)
        found["sdpa, cudnn"] = sdpa(SDPBackend.CUDNN_ATTENTION)
    return (
        found
        | {"packed": packed(), "packed, half filled": packed(0.5)}
        | {"packed, decoded for sdpa": unpacked}
    )
