"""Launches overlap only where the device can."""

import importlib

import pytest
import torch


def test_a_cpu_overlaps_nothing() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    overlap = importlib.import_module("scalesweep_hf.kernels.overlap")
    assert overlap.overlapping(torch.device("cpu")) == {"OVERLAPS": False}


@pytest.mark.gpu
def test_hopper_and_newer_overlap() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    overlap = importlib.import_module("scalesweep_hf.kernels.overlap")
    device = torch.device("cuda", 0)
    expected = torch.cuda.get_device_capability(device) >= (9, 0)
    assert overlap.overlapping(device).get("launch_pdl", False) == expected
