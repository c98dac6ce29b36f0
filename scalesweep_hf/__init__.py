"""NVFP4 quantization of Hugging Face models with ScaleSweep block scales.

Importing this package registers the method "scalesweep" with Transformers, and imports neither it
nor torch: public names are imported when they are used.
"""

from scalesweep_hf import discovery

TYPE_CHECKING = False  # that of `typing` costs an import at every start of an interpreter
if TYPE_CHECKING:
    from typing import Any

    from scalesweep_hf.calibration import Statistics, collect
    from scalesweep_hf.config import ScaleSweepConfig
    from scalesweep_hf.modules import NVFP4Linear
    from scalesweep_hf.modules.cache import NVFP4Cache, NVFP4StaticCache
    from scalesweep_hf.ops.nvfp4 import NVFP4Tensor, dequantize, quantize
    from scalesweep_hf.quantizer import ScaleSweepHfQuantizer
    from scalesweep_hf.statistics import calibrate
    from scalesweep_hf.version import __version__

discovery.install()

__all__ = [
    "NVFP4Cache",
    "NVFP4Linear",
    "NVFP4StaticCache",
    "NVFP4Tensor",
    "ScaleSweepConfig",
    "ScaleSweepHfQuantizer",
    "Statistics",
    "__version__",
    "calibrate",
    "collect",
    "dequantize",
    "quantize",
]

# Where the public names are.
_HOMES = {
    "calibration": ("Statistics", "collect"),
    "config": ("ScaleSweepConfig",),
    "modules": ("NVFP4Linear",),
    "modules.cache": ("NVFP4Cache", "NVFP4StaticCache"),
    "ops.nvfp4": ("NVFP4Tensor", "dequantize", "quantize"),
    "quantizer": ("ScaleSweepHfQuantizer",),
    "statistics": ("calibrate",),
    "version": ("__version__",),
}


def __getattr__(name: str) -> "Any":
    from importlib import import_module

    for home, names in _HOMES.items():
        if name in names:
            globals()[name] = value = getattr(import_module(f"{__name__}.{home}"), name)
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
