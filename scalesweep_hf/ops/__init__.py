"""Definitions of the NVFP4 format and of ScaleSweep in plain torch: tensors in, tensors out."""
