"""Fast twins of `ops.blocks` and `ops.attention`: the same bits, or sums in another order."""

import importlib
import importlib.util
import platform
import warnings

import torch

from scalesweep_hf.ops.attention import ATTENTION as _ATTENTION
from scalesweep_hf.ops.blocks import BACKENDS as _BACKENDS

BACKENDS = ("auto", "torch", "triton", "numba")
# The kernels have instructions of NVIDIA's.
HAS_TRITON = torch.version.cuda is not None and importlib.util.find_spec("triton") is not None
# The loops rest on a fused multiply-add: all ARM64 have one, and x86 where torch takes AVX2.
HAS_FMA = platform.machine() in ("aarch64", "arm64") or (
    torch.backends.cpu.get_cpu_capability().startswith("AVX")
)
HAS_NUMBA = HAS_FMA and importlib.util.find_spec("numba") is not None

# Each adds itself to the tables in scalesweep_hf.ops; Triton's hands CPU tensors on to numba's.
if HAS_NUMBA:
    importlib.import_module("scalesweep_hf.kernels.cpu")
if HAS_TRITON:
    try:
        importlib.import_module("scalesweep_hf.kernels.blocks")
        importlib.import_module("scalesweep_hf.kernels.attention")
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        HAS_TRITON = False
        warnings.warn(
            f"triton does not work here ({error}); CUDA tensors take slower torch "
            "operations: repair or remove triton",
            stacklevel=2,
        )
# A module that was pickled where there was another backend works here too.
for _name in ("numba", "triton"):
    _BACKENDS.setdefault(_name, _BACKENDS["torch"])
    _ATTENTION.setdefault(_name, _ATTENTION["torch"])


def resolve(name: str) -> str:
    """Return which implementation to use.

    Args:
        name: "torch": the definition. "numba": loops for CPU tensors. "triton": kernels for CUDA
            tensors. Each of the two hands other tensors on: "triton" to "numba" where there is one,
            "numba" to the definition. "auto": the first of "triton", "numba" and "torch" that runs.

    Returns:
        A key of `scalesweep_hf.ops.blocks.BACKENDS`.

    Raises:
        ValueError: there is no such name, or it cannot run here.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend is {name!r}; use one of {', '.join(BACKENDS)}")
    runs = {
        "triton": HAS_TRITON and torch.cuda.is_available(),
        "numba": HAS_NUMBA,
        "torch": True,
    }
    if name == "auto":
        return next(backend for backend, works in runs.items() if works)
    if not runs[name]:
        raise ValueError(f"backend {name!r} needs {NEEDS[name]}: use 'auto'")
    return name


NEEDS = {
    "triton": "a CUDA device and the package triton",
    "numba": "a CPU with AVX2 or ARM64 and the package numba (pip install 'scalesweep-hf[cpu]')",
}
