"""Calibration: token batches, observers of activations, and the statistics they leave."""

from scalesweep_hf.calibration.collect import InputStatistics, Statistics, collect
from scalesweep_hf.calibration.data import calibration_tokens
from scalesweep_hf.calibration.run import run_calibration

__all__ = [
    "InputStatistics",
    "Statistics",
    "calibration_tokens",
    "collect",
    "run_calibration",
]
