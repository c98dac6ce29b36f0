"""Bounded, exact and pruned sweeps against all 126 codes, on what examples/benchmarks makes."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.conftest import load_example

brute = load_example("benchmarks/brute_force")
sys.modules.setdefault("brute_force", brute)
window = load_example("benchmarks/window")


def tally(x: Tensor, weight: Tensor | None = None) -> None:
    counts = window.Tally()
    counts.add(x, weight)
    assert counts.blocks == len(x)
    assert (counts.exact, counts.bounded, counts.wrong) == (0, 0, 0), counts.line()


@pytest.mark.parametrize("kind", ["random", "adversarial"])
@pytest.mark.parametrize("weighted", [False, True])
def test_sweeps_have_the_codes_of_brute_force(kind: str, weighted: bool) -> None:
    generator = torch.Generator().manual_seed(7)
    x = getattr(window, kind)(8192, generator)
    tally(x, torch.rand(x.shape, generator=generator) ** 8 if weighted else None)


@pytest.mark.skipif(not importlib.util.find_spec("numba"), reason="numba is not installed")
@pytest.mark.parametrize("kind", ["random", "adversarial"])
def test_compiled_brute_force_is_that_of_torch(kind: str) -> None:
    generator = torch.Generator().manual_seed(8)
    x = getattr(window, kind)(4096, generator)
    weight = torch.rand(x.shape, generator=generator) ** 8
    weight[::7] = 0.0
    for w in (None, weight):
        assert torch.equal(brute.brute_force(x, w), brute.brute_force(x, w, fast=False))


def test_sweeps_of_real_weights_have_the_codes_of_brute_force(reference_model: Path) -> None:
    every = 499
    x = torch.cat([blocks[::every] for blocks in window.weight_blocks(reference_model)])
    assert len(x) > 2000
    tally(x)


def test_adversarial_blocks_are_subnormal_saturating_and_beside_ties() -> None:
    x = window.adversarial(8192, torch.Generator().manual_seed(7))
    largest = x.abs().amax(-1)
    assert (largest < 42 * 2.0**-9).sum() > 500
    assert (largest > 2688).sum() > 500
    assert float(largest.max()) < 2.0**20
    ratio = x[:2048] / x[:2048].amin(-1, keepdim=True).clamp(min=2.0**-12)
    assert (ratio == ratio.round()).sum() > 500


def test_fewer_candidates_than_the_window_holds_are_enough() -> None:
    counts = window.Tally()
    counts.add(window.random(8192, torch.Generator().manual_seed(7)))
    assert 9 < counts.window / counts.blocks < 11
    assert counts.pruned[4] < counts.pruned[3] < counts.pruned[2] < 6 * counts.blocks
