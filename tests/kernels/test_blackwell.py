"""Kernels with Blackwell's conversion instructions compile; nothing here runs or times them."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from scalesweep_hf.kernels import blocks, fp4
from scalesweep_hf.ops import e2m1, e4m3
from scalesweep_hf.ops.sweep import absmax_codes

COMPILE = """
import json
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from scalesweep_hf.kernels.blocks import _kernel

capability, mode, weighted, encode = json.loads(sys.argv[1])
pointers = {
    "x_ptr": "*bf16",
    "tensor_scale_ptr": "*fp32",
    "weight_ptr": "*fp32",
    "result_ptr": "*u8" if encode else "*bf16",
    "scale_ptr": "*u8" if encode else "*bf16",
}
constants = {
    "MODE": mode,
    "WINDOW": 0,
    "WEIGHTED": weighted,
    "ENCODE": encode,
    "MANY": False,
    "FP4": capability >= 100,
    "ROWS": 32,
}
integers = dict.fromkeys(("blocks", "period", "low", "high"), "i32")
signature = pointers | integers | dict.fromkeys(constants, "constexpr")
aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(pointers))}
kernel = triton.compile(
    ASTSource(_kernel, signature, constants, aligned),
    target=GPUTarget("cuda", capability, 32),
    options={"num_warps": 1, "enable_fp_fusion": False},
)
print(json.dumps([kernel.asm["ptx"], len(kernel.asm["cubin"])]))
"""


def compiled(capability: int, mode: int, weighted: bool, encode: bool) -> str:
    """Return the PTX of a kernel that ptxas took."""
    arguments = json.dumps([capability, mode, weighted, encode])
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", COMPILE, arguments],
        env=environment | {"TRITON_ALWAYS_COMPILE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if "is not defined for option 'gpu-name'" in run.stderr:
        pytest.skip(f"this ptxas does not know sm_{capability}a")
    assert run.returncode == 0, run.stderr[-2000:]
    ptx, size = json.loads(run.stdout.splitlines()[-1])
    assert size > 0
    return str(ptx)


@pytest.mark.parametrize("encode", [True, False])
@pytest.mark.parametrize(("mode", "weighted"), [(0, False), (2, True)])
@pytest.mark.parametrize("capability", [100, 120])
def test_kernels_compile_with_the_conversion(
    capability: int, mode: int, weighted: bool, encode: bool
) -> None:
    ptx = compiled(capability, mode, weighted, encode)
    assert f".target sm_{capability}a" in ptx
    assert ptx.count("cvt.rn.satfinite.e2m1x2.f32") == 8
    assert ptx.count("cvt.rn.f16x2.e2m1x2") == (0 if encode else 8)


def test_older_devices_have_no_conversion() -> None:
    assert "e2m1" not in compiled(90, 0, False, True)


def test_a_device_whose_conversion_fails_emulates_it_and_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("here kernels are not interpreted")
    with pytest.warns(UserWarning, match="failed .*: quantizing goes on with emulated rounding"):
        assert not fp4.agrees(torch.device("cpu"), blocks._launch)


@pytest.mark.parametrize("wrong", [0, 1])
def test_a_device_whose_conversion_differs_emulates_it_and_says_so(wrong: int) -> None:
    def launch(*args: Any) -> None:
        result, _, converts = args[-3:]
        emulated: list[Any] = [*args[:-1], False]
        blocks._launch(*emulated)
        if converts:
            result.view(torch.uint8)[-1, -1] += wrong

    if torch.cuda.is_available():
        pytest.skip("here kernels are not interpreted")
    if not wrong:
        assert fp4.agrees(torch.device("cpu"), launch)
        return
    with pytest.warns(UserWarning, match="gave other codes: quantizing goes on"):
        assert not fp4.agrees(torch.device("cpu"), launch)


def test_probes_are_chosen_the_scales_that_their_midpoints_are_for() -> None:
    probes = fp4.neighbours_of_midpoints()
    codes = absmax_codes(probes.unsqueeze(1)).squeeze(1)
    assert sorted(set(codes.tolist())) == list(range(56, 64))
    y = probes[8:16, 1:8] / e4m3.decode(codes[8:16]).unsqueeze(1)
    assert torch.equal(y, torch.tensor(e2m1.MIDPOINTS).expand(8, 7))


def test_devices_that_cannot_convert_are_not_asked() -> None:
    assert not fp4.converts(torch.device("cpu"), None)  # type: ignore[arg-type]
