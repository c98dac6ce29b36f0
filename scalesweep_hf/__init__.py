"""NVFP4 quantization of Hugging Face models with ScaleSweep block scales.

Importing this package registers the method "scalesweep" with Transformers.
"""

from scalesweep_hf.calibration import Statistics, collect
from scalesweep_hf.config import ScaleSweepConfig
from scalesweep_hf.modules import NVFP4Linear
from scalesweep_hf.modules.cache import NVFP4Cache, NVFP4StaticCache
from scalesweep_hf.ops.nvfp4 import NVFP4Tensor, dequantize, quantize
from scalesweep_hf.quantizer import ScaleSweepHfQuantizer, register
from scalesweep_hf.statistics import calibrate
from scalesweep_hf.version import __version__

register()

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
