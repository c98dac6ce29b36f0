"""Twins of `scalesweep_hf.ops.blocks` for CPU tensors, compiled by numba (extra ``cpu``).

As many threads as torch would take, for the length of a call. The first call imports numba and
compiles, which takes seconds, once: numba keeps the result on disk.
"""

import functools
import importlib
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scalesweep_hf.kernels.operators import DTYPES, Kernels
from scalesweep_hf.ops import blocks as definition
from scalesweep_hf.ops.blocks import BACKENDS
from scalesweep_hf.ops.sweep import BLOCK

# Fewer blocks are not worth a thread.
BLOCKS_PER_THREAD = 1 << 13

INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}

_lock = threading.Lock()
_loops: list[ModuleType | None] = []


def _compiled() -> ModuleType | None:
    """Return the compiled loops; where numba does not work, warn once and return None."""
    with _lock:
        if not _loops:
            try:
                _loops.append(importlib.import_module("scalesweep_hf.kernels.cpu_loops"))
            except ImportError as error:
                _loops.append(None)
                warnings.warn(
                    f"numba does not work here ({error}); CPU tensors take slower torch operations "
                    "with the same bits: repair or remove numba, or pass backend='torch'",
                    stacklevel=2,
                )
        return _loops[0]


def _quantize(
    x: Tensor,
    tensor_scale: Tensor,
    importance: Tensor | None,
    objective: str,
    window: str,
    low: int,
    high: int,
    result: Tensor,
    scale: Tensor | None,
) -> None:
    loops = _compiled()
    if loops is None:
        options: dict[str, Any] = {"objective": objective, "importance": importance}
        options["window"] = (low, high) if window == "fixed" else window
        if scale is None:
            result.copy_(definition.round_blocks(x, tensor_scale, **options))
            return
        for target, part in zip(
            (result, scale), definition.encode_blocks(x, tensor_scale, **options), strict=True
        ):
            target.copy_(part)
        return
    weight = x.new_empty(0, dtype=torch.float32) if importance is None else importance
    arguments = (
        _bytes_of(x),
        DTYPES.index(x.dtype),
        np.float32(tensor_scale.item()),
        _bytes_of(weight),
        loops.MODES.get(objective, loops.WINDOWS[window]),
        low,
        high,
        scale is not None,
        _bytes_of(result),
        _bytes_of(result if scale is None else scale),
    )
    _in_threads(lambda *part: loops.quantize(*arguments, *part), x.numel() // BLOCK)


def _decode(packed: Tensor, block_scale: Tensor, result: Tensor) -> None:
    loops = _compiled()
    if loops is None:
        result.copy_(definition.decode_blocks(packed, block_scale, result.dtype))
        return
    words = INTEGERS[result.dtype]
    table, out = (t.view(-1).view(words).numpy() for t in (_table(result.dtype), result))
    arguments = _bytes_of(packed), _bytes_of(block_scale), table, out
    _in_threads(lambda *part: loops.look_up(*arguments, *part), block_scale.numel())


@functools.cache
def _table(dtype: torch.dtype) -> Tensor:
    """Return the value of every code at every scale, [256, 16], by the definition."""
    packed = definition.pack(torch.arange(16, dtype=torch.uint8, device="cpu")).expand(256, 8)
    scale = (
        torch.arange(256, dtype=torch.uint8, device="cpu").unsqueeze(-1).view(torch.float8_e4m3fn)
    )
    return definition.decode_blocks(packed, scale, dtype)


def _bytes_of(x: Tensor) -> "np.ndarray[Any, np.dtype[np.uint8]]":
    """Return the elements of x, in order, as bytes; they are x's own if x is contiguous."""
    return x.detach().contiguous().view(-1).view(torch.uint8).numpy()


def _in_threads(work: Callable[[int, int], None], blocks: int) -> None:
    """Call work(first, last + 1) for parts of the blocks, in as many threads as torch takes."""
    threads = max(min(torch.get_num_threads(), blocks // BLOCKS_PER_THREAD), 1)
    if threads == 1:
        work(0, blocks)
        return
    bounds = [blocks * i // threads for i in range(threads + 1)]
    with ThreadPoolExecutor(threads - 1) as pool:
        others = [pool.submit(work, *bounds[i : i + 2]) for i in range(1, threads)]
        work(*bounds[:2])
        for other in others:
            other.result()


BACKENDS["numba"] = Kernels(
    "numba",
    _quantize,
    _decode,
    runs_on=lambda x: x.device.type == "cpu",
    fallback=BACKENDS["torch"],
).backend()
