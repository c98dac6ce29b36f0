"""Checkpoints for other engines: write them, and say what they hold and who can read them."""

from scalesweep_hf.export.run import export_checkpoint

__all__ = ["export_checkpoint"]
