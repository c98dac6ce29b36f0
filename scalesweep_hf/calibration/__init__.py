"""Calibration: token batches, observers of activations, and the statistics they leave."""

from scalesweep_hf.calibration.collect import InputStatistics, Statistics, collect, run_calibration
from scalesweep_hf.calibration.data import calibration_tokens

__all__ = ["InputStatistics", "Statistics", "calibration_tokens", "collect", "run_calibration"]
