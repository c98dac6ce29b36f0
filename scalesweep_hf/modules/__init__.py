"""Modules that hold packed tensors and call the ops."""

from scalesweep_hf.modules.linear import LinearRecipe, NVFP4Linear

__all__ = ["LinearRecipe", "NVFP4Linear"]
