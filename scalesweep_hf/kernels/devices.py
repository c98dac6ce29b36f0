"""What a device has, for kernels whose programs are shaped by it; interpreted, an H100."""

import functools

import torch

from scalesweep_hf.kernels.numbers import INTERPRETED


@functools.cache
def processors(device: torch.device) -> int:
    """Return how many processors a device has, which run programs on their own."""
    if INTERPRETED:
        return 132
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count
