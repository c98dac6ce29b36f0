"""Measures of what quantization costs a language model."""

from scalesweep_hf.evaluate.fidelity import Fidelity, measure_fidelity, weight_error

__all__ = ["Fidelity", "measure_fidelity", "weight_error"]
