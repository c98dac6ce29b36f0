"""Fast twins of `scalesweep_hf.ops.blocks`: the same functions, the same bits."""

import importlib
import importlib.util

import torch

BACKENDS = ("auto", "torch", "triton")
HAS_TRITON = torch.backends.cuda.is_built() and importlib.util.find_spec("triton") is not None

if HAS_TRITON:  # adds itself to scalesweep_hf.ops.blocks.BACKENDS
    importlib.import_module("scalesweep_hf.kernels.blocks")


def resolve(name: str) -> str:
    """Return which implementation to use.

    Args:
        name: "torch": the definition. "triton": kernels for CUDA tensors (others go to the
            definition). "auto": "triton" where there is a CUDA device and Triton, else "torch".

    Returns:
        A key of `scalesweep_hf.ops.blocks.BACKENDS`.

    Raises:
        ValueError: there is no such name, or "triton" cannot run here.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend is {name!r}; use one of {', '.join(BACKENDS)}")
    runs = HAS_TRITON and torch.cuda.is_available()
    if name == "triton" and not runs:
        raise ValueError("backend 'triton' needs a CUDA device and the package triton: use 'auto'")
    return "triton" if runs and name != "torch" else "torch"
