"""Fast twins of `scalesweep_hf.ops.blocks`: the same functions, the same bits."""

import importlib.util

import torch

from scalesweep_hf.ops.blocks import TORCH, Backend

BACKENDS = ("auto", "torch", "triton")


def resolve(name: str) -> Backend:
    """Return an implementation by name.

    Args:
        name: "torch": the definition. "triton": kernels for CUDA tensors (others go to the
            definition). "auto": "triton" where there is a CUDA device and Triton, else "torch".

    Raises:
        ValueError: there is no such name, or "triton" cannot run here.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend is {name!r}; use one of {', '.join(BACKENDS)}")
    if name == "torch" or (name == "auto" and not has_triton()):
        return TORCH
    if not has_triton():
        raise ValueError("backend 'triton' needs a CUDA device and the package triton: use 'auto'")
    from scalesweep_hf.kernels.blocks import TRITON

    return TRITON


def has_triton() -> bool:
    """Whether there is a CUDA device, and Triton to compile for it."""
    return torch.cuda.is_available() and importlib.util.find_spec("triton") is not None
