"""The window is no larger than it must be: blocks whose only optimum lies at its ends."""

import importlib

import pytest
import torch

from scalesweep_hf.ops.nvfp4 import quantize
from scalesweep_hf.ops.sweep import Window, absmax_codes
from scalesweep_hf.ops.window import ROUNDED
from tests.proofs.exact import CODES, base, candidates, loss
from tests.proofs.files import covered, read_certificates, read_witnesses

WITNESSES = [witness for witness in read_witnesses() if len(witness[2]) == 16]
OF = {(q0, code): block for q0, code, block in WITNESSES}


@pytest.mark.parametrize("q0", sorted({q0 for q0, _, _ in WITNESSES}))
def test_a_witness_is_won_by_its_code_alone(q0: int) -> None:
    for own, code, block in WITNESSES:
        if own == q0:
            assert base(max(block)) == q0
            least = loss(block, code)
            assert all(loss(block, other) > least for other in CODES if other != code)


@pytest.mark.parametrize("field", range(8))
def test_both_ends_of_the_window_of_every_field_are_attained(field: int) -> None:
    q0 = 16 + field
    for code in (q0 + ROUNDED.up_normal[field], q0 - ROUNDED.down_normal[field]):
        block = OF[q0, code]
        for octave in range(1, 13):  # q0 up to 119
            moved, own = [x * 2**octave for x in block], code + 8 * octave
            assert base(max(moved)) == q0 + 8 * octave
            least = loss(moved, own)
            assert all(loss(moved, other) > least for other in {*CODES} - {own})


@pytest.mark.parametrize("q0", range(120, 127))
def test_the_lower_end_of_the_last_binade_is_attained(q0: int) -> None:
    down = ROUNDED.down_top[q0 % 8]
    assert (q0, q0 - down) in OF
    assert down > ROUNDED.down_normal[q0 % 8] or q0 in (120, 121, 125)


@pytest.mark.parametrize("q0", [*range(1, 24), *range(119, 127)])
def test_every_code_that_is_not_excluded_wins_a_block(q0: int) -> None:
    proved = covered(read_certificates(16))
    left = candidates(q0, proved, 16, floored=False)
    assert left == sorted(code for own, code in OF if own == q0)


@pytest.mark.parametrize("size", [8, 32])
def test_the_lower_end_of_every_field_is_attained_for_other_sizes(size: int) -> None:
    proved = covered(read_certificates(size))
    others = {q0: (code, block) for q0, code, block in read_witnesses() if len(block) == size}
    for q0 in (*range(16, 24), *range(120, 127)):
        code, block = others[q0]
        assert code == candidates(q0, proved, size, floored=False)[0]
        assert base(max(block)) == q0
        least = loss(block, code)
        assert all(loss(block, other) > least for other in CODES if other != code)


# Odd codes above the window that can win, by base; the definition tries all up to 15.
ODD = {
    1: [3, 5, 7, 11, 13],
    2: [5, 7, 9, 11, 13],
    3: [7, 9, 11, 13],
    4: [9, 11, 13, 15],
    5: [11, 13, 15],
    6: [13, 15],
    7: [13, 15],
    8: [15],
}


@pytest.mark.parametrize("q0", ODD)
def test_odd_codes_that_small_blocks_need(q0: int) -> None:
    up = ROUNDED.up_subnormal[q0] if q0 < 8 else ROUNDED.up_normal[0]
    assert [code for own, code in sorted(OF) if own == q0 and code > q0 + up] == ODD[q0]


@pytest.mark.parametrize("window", ["bounded", "exact"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # interpreted kernels are numpy
def test_float32_sweeps_find_the_winner_of_every_witness(backend: str, window: Window) -> None:
    if backend == "triton":
        pytest.importorskip("triton", reason="triton is not installed")
        importlib.import_module("scalesweep_hf.kernels.blocks")  # adds itself to BACKENDS
    x = torch.tensor([[float(v / 512) for v in block] for _, _, block in WITNESSES])
    assert absmax_codes(x).tolist() == [q0 for q0, _, _ in WITNESSES]
    chosen = quantize(x, window=window, tensor_scale=torch.tensor(1.0), backend=backend)
    codes = chosen.block_scale.view(torch.uint8).squeeze(1)
    assert codes.tolist() == [code for _, code, _ in WITNESSES]


def test_witnesses_are_exact_in_float32() -> None:
    for _, _, block in WITNESSES:
        for x in block:
            assert float(torch.tensor(float(x))) == x
