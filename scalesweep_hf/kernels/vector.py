"""The product of one token by a packed weight: which programs take it."""

import torch
import triton
from torch import Tensor

from scalesweep_hf.kernels.decoding import in_words
from scalesweep_hf.kernels.devices import processors
from scalesweep_hf.kernels.fragments import converts_e4m3
from scalesweep_hf.kernels.overlap import overlapping
from scalesweep_hf.kernels.vector_kernel import EIGHTS, ROWS, vector_kernel
from scalesweep_hf.ops.sweep import BLOCK


def _shape_of_programs(tiles: int, count: int) -> tuple[int, bool, int]:
    """Return warps of a program, whether to load ahead, and registers of a thread.

    The best of those timed on an H200. All programs should be there at once, with registers to load
    ahead where 16 warps of a processor are enough, else as 28 warps.
    """
    share = triton.cdiv(tiles, count)
    if share <= 4:
        return 8 if share <= 2 else 4, True, 128
    return 4, False, 72


def multiply_one(
    row: Tensor,
    packed: Tensor,
    block_scale: Tensor,
    tensor_scale: Tensor,
    input_scale: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Twin of `multiply_blocks` for x [1, K] and N > 0."""
    n, blocks = packed.shape[0], row.shape[1] // BLOCK
    y = row.new_empty((1, n), dtype=dtype)
    paired = blocks % 2 == 0
    tiles = triton.cdiv(n, ROWS.value)
    warps, ahead, registers = _shape_of_programs(tiles, processors(row.device))
    columns = 8 * EIGHTS.value * warps  # blocks of a step
    steps = triton.cdiv(blocks, columns)
    with torch.cuda.device_of(row):
        vector_kernel[(tiles,)](
            in_words(row, torch.int64).view(row.dtype),
            in_words(packed, torch.int64),
            in_words(block_scale, torch.int16 if paired else torch.uint8).view(torch.uint8),
            tensor_scale,
            tensor_scale if input_scale is None else input_scale,
            y if bias is None else bias.contiguous(),
            y,
            n,
            blocks,
            steps,
            W=warps,
            AHEAD=ahead,
            PAIRED=paired,
            EVEN=blocks == columns * steps,
            CONVERTS=converts_e4m3(row.device),
            SCALES_INPUT=input_scale is not None,
            BIAS=bias is not None,
            num_warps=warps,
            maxnreg=registers,
            enable_fp_fusion=False,
            **overlapping(row.device),
        )
    return y
