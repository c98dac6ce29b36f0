"""ScaleSweep: choose the E4M3 scale of every block of 16 by the error it causes (arXiv 2606.07618).

Everything here works on blocks already divided by the tensor scale; the tensor scale only
multiplies the loss. Windows count E4M3 codes from the AbsMax code ``q0 = nearest(max|x| / 6)``.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from scalesweep_hf.ops import e2m1, e4m3
from scalesweep_hf.ops.window import DOWN_MAX as DOWN_MAX
from scalesweep_hf.ops.window import DOWN_NORMAL as DOWN_NORMAL
from scalesweep_hf.ops.window import DOWN_SUBNORMAL as DOWN_SUBNORMAL
from scalesweep_hf.ops.window import DOWN_TOP as DOWN_TOP
from scalesweep_hf.ops.window import DOWN_WEIGHTED as DOWN_WEIGHTED
from scalesweep_hf.ops.window import LAST_ODD as LAST_ODD
from scalesweep_hf.ops.window import TOP as TOP
from scalesweep_hf.ops.window import UP_MAX as UP_MAX
from scalesweep_hf.ops.window import UP_NORMAL as UP_NORMAL
from scalesweep_hf.ops.window import UP_SUBNORMAL as UP_SUBNORMAL

BLOCK = 16

Window = Literal["bounded", "exact"] | tuple[int, int]


@dataclass(frozen=True)
class SweepResult:
    """The winner of every block: its scale code and its loss.

    Attributes:
        codes: [..., G] uint8, E4M3 bit patterns in 1...126.
        loss: [..., G] float32, eq. 2 in units of (x / tensor_scale)**2 times importance, where the
            importance of each block is rescaled by a power of two (`normalize_importance`).
    """

    codes: Tensor
    loss: Tensor


def sweep_scales(
    x: Tensor, importance: Tensor | None = None, *, window: Window = "bounded"
) -> SweepResult:
    """Choose, for every block, the E4M3 scale of least weighted squared error.

    For block x and candidate s the loss is ``sum_i w_i * (x_i - s * round_e2m1(x_i / s))**2`` (eq.
    2), each term as ``w * (e * e)``, summed left to right in float32 without fused multiply-add, so
    that fast twins can reproduce it bit for bit. Ties go to the smaller scale.

    Args:
        x: [..., G, 16] float32, finite, already divided by the tensor scale.
        importance: [16], [G, 16] or [..., G, 16] float32, finite and >= 0; None means 1. A block
            whose importance is zero throughout is swept with 1. The result does not depend on its
            unit.
        window: "bounded": the offsets proved sufficient for the squared error, by mantissa field of
            q0 (`ops.window`); with importance, eight codes down, as the paper does. "exact": the
            optimum over all 126 codes, with a proof per block (see `_sweep_exact`). ``(low,
            high)``: code offsets from q0, inclusive.

    Returns:
        The winning codes and their losses.

    Raises:
        ValueError: the last dimension is not 16, or the window is none of the above.
    """
    if x.ndim < 2 or x.shape[-1] != BLOCK:
        raise ValueError(
            f"x has shape {list(x.shape)}; expected [..., G, {BLOCK}]: reshape it into blocks"
        )
    # By rows, the sum over a block is 15 vector additions in a fixed order.
    magnitude = to_rows(x.abs(), x.ndim)  # [16, ..., G]
    weight = None if importance is None else to_rows(normalize_importance(importance), x.ndim)
    code = absmax_codes(x).to(torch.int16)  # [..., G]
    loss = functools.partial(_loss, magnitude, weight)
    if window == "bounded":
        down, up = _bounded_window(code, weighted=weight is not None)
        steps = UP_MAX + (DOWN_MAX if weight is None else DOWN_WEIGHTED)
        return sweep_window(loss, code - down, code + up, steps, last=LAST_ODD)
    if window == "exact":
        if torch.compiler.is_compiling():  # no data-dependent stop in a graph: try them all
            every = torch.zeros_like(code)
            return sweep_window(loss, every, every + e4m3.MAX_CODE, e4m3.MAX_CODE)
        return _sweep_exact(magnitude, weight, code)
    low, high = check_window(window)
    return sweep_window(loss, code + low, code + high, high - low)


def block_loss(x: Tensor, scale: Tensor, importance: Tensor | None = None) -> Tensor:
    """Evaluate eq. 2 for given scales, with the arithmetic of `sweep_scales`.

    Args:
        x: [..., G, 16] float32, already divided by the tensor scale.
        scale: [..., G] float32, > 0.
        importance: [16], [G, 16] or [..., G, 16] float32, >= 0, used as it is; None means 1.

    Returns:
        [..., G] float32 losses.
    """
    weight = None if importance is None else to_rows(importance, x.ndim)
    return _loss(x.abs().movedim(-1, 0), weight, scale)


def absmax_codes(x: Tensor) -> Tensor:
    """Choose the AbsMax scale: the E4M3 code nearest to max|x| / 6, the base q0 of every sweep.

    Args:
        x: [..., G, 16] float32, already divided by the tensor scale.

    Returns:
        [..., G] uint8 codes in 1...126.
    """
    return e4m3.encode_nearest(e4m3.divide(x.abs().amax(-1), e2m1.MAX))


def four_over_six_codes(x: Tensor) -> Tensor:
    """Choose the better of two scales by squared error: the largest magnitude maps to 6 or to 4.

    Ties go to the smaller scale, which maps to 6 (the published rule: arXiv 2512.02010).

    Args:
        x: [..., G, 16] float32, already divided by the tensor scale.

    Returns:
        [..., G] uint8 codes in 1...126.
    """
    six = absmax_codes(x)
    four = e4m3.encode_nearest(e4m3.divide(x.abs().amax(-1), 4.0))
    magnitude = x.abs().movedim(-1, 0)
    better = _loss(magnitude, None, e4m3.decode(four)) < _loss(magnitude, None, e4m3.decode(six))
    return torch.where(better, four, six)


def normalize_importance(importance: Tensor) -> Tensor:
    """Scale every block's importance by a power of two, exactly, to a largest one in [0.5, 1).

    Only ratios matter to eq. 2; the rescaling keeps products of very large or very small
    importances inside float32. A block of zeros becomes a block of ones.

    Args:
        importance: [..., 16] float32, finite and >= 0.

    Returns:
        [..., 16] float32.
    """
    largest = importance.amax(-1, keepdim=True)  # [..., 1]
    scaled = divide_by_exponent(importance, largest)
    return torch.where(largest > 0, scaled, torch.ones_like(scaled))


def divide_by_exponent(x: Tensor, largest: Tensor) -> Tensor:
    """Multiply by the power of two, exactly, that brings ``largest`` into [0.5, 1)."""
    _, exponent = torch.frexp(largest)
    # Two steps, because 2**149 overflows float32 and the smallest subnormals need it.
    half = -exponent // 2
    return torch.ldexp(torch.ldexp(x, half), -exponent - half)


def _loss(magnitude: Tensor, weight: Tensor | None, scale: Tensor) -> Tensor:
    """Sum ``w * (e * e)`` over dimension 0, left to right; the sign of x cancels in e."""
    error = magnitude - e2m1.round_magnitude(magnitude / scale) * scale  # [16, ..., G]
    term = error * error
    if weight is not None:
        term = weight * term
    return sum_left_to_right(term)


def sum_left_to_right(terms: Tensor | Sequence[Tensor]) -> Tensor:
    """Add tensors, or the rows of one, in order, whatever the device."""
    total = terms[0].clone()  # [..., G]
    for i in range(1, len(terms)):
        total += terms[i]
    return total


def to_rows(x: Tensor, ndim: int) -> Tensor:
    """Bring blocks [..., 16] to [16, ..., G] with ndim dimensions: one row per element position."""
    leading = (1,) * (ndim - x.ndim)
    return x.reshape(leading + x.shape).movedim(-1, 0).contiguous()


def _bounded_window(code: Tensor, *, weighted: bool) -> tuple[Tensor, Tensor]:
    """Return how many codes down and up from q0 the optimum can lie, [..., G] int16 each."""
    field = (code & 7).int()
    subnormal = code < 8
    up = torch.where(subnormal, _table(UP_SUBNORMAL, code)[field], _table(UP_NORMAL, code)[field])
    if weighted:
        return torch.full_like(code, DOWN_WEIGHTED), up
    down = torch.where(
        subnormal, _table(DOWN_SUBNORMAL, code)[field], _table(DOWN_NORMAL, code)[field]
    )
    return torch.where(code < TOP, down, _table(DOWN_TOP, code)[field]), up


def check_window(window: Window) -> tuple[int, int]:
    """Return an explicit window's offsets.

    Raises:
        ValueError: it is not a pair of integers with low <= 0 <= high.
    """
    if (
        not isinstance(window, tuple)
        or len(window) != 2
        or not all(type(offset) is int for offset in window)
        or not window[0] <= 0 <= window[1]
    ):
        raise ValueError(
            f"window is {window!r}; use 'bounded', 'exact' or integer code offsets (low, high) "
            "with low <= 0 <= high"
        )
    return window[0], window[1]


def _table(values: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)


def sweep_window(
    loss: Callable[[Tensor], Tensor], low: Tensor, high: Tensor, steps: int, last: int = 0
) -> SweepResult:
    """Try the codes low...high of every block, then odd codes up to last; repeat the largest.

    Args:
        loss: scales [..., G] float32 -> losses [..., G].
        low: [..., G] int16 codes, clamped to those that exist.
        high: likewise.
        steps: codes to try after the first.
        last: largest odd code to try beyond high.
    """
    low = low.clamp(e4m3.MIN_CODE, e4m3.MAX_CODE)
    high = high.clamp(e4m3.MIN_CODE, e4m3.MAX_CODE)
    largest = high.clamp(min=last)
    odd = (high - 1) | 1  # the odd code at or below high
    best_code = low
    best_loss = loss(e4m3.decode(low.to(torch.uint8)))
    for step in range(1, steps + 1):
        code = low + step
        code = torch.where(code > high, odd + 2 * (code - high), code).minimum(largest)
        found = loss(e4m3.decode(code.to(torch.uint8)))
        better = found < best_loss  # strictly: the smaller scale, tried first, keeps a tie
        best_loss = torch.where(better, found, best_loss)
        best_code = torch.where(better, code, best_code)
    return SweepResult(best_code.to(torch.uint8), best_loss)


def _sweep_exact(magnitude: Tensor, weight: Tensor | None, base: Tensor) -> SweepResult:
    """Walk the codes downward from q0 + 7 and drop a block once no smaller scale can win.

    Every scale s' <= s costs at least what clipping costs at s: C(s) = sum_i w_i max(0, |x_i| - 6
    s)**2.
    This holds for the computed numbers too, not only the real ones: 6 s is exact in float32, a
    clipped element's computed error is the same expression at s' and grows as s' falls, and rounded
    subtraction, multiplication and addition of non-negative terms in one fixed order are monotone.
    So a block with C(s) > best loss has its optimum over all 126 codes; q0 + 7 bounds it from above
    (Lemma 4.1).
    """
    shape = base.shape
    rows = magnitude.reshape(BLOCK, -1)  # [16, B]
    weights = None if weight is None else weight.expand(magnitude.shape).reshape(BLOCK, -1)
    code = base.reshape(-1).add(UP_MAX).clamp(LAST_ODD, e4m3.MAX_CODE)  # [B]
    best_code = code.clone()
    best_loss = torch.full_like(code, torch.inf, dtype=torch.float32)
    alive = torch.arange(code.numel(), device=code.device)
    while alive.numel():
        scale = e4m3.decode(code.to(torch.uint8))
        loss = _loss(rows, weights, scale)
        better = loss <= best_loss[alive]  # the walk goes down: the smaller scale takes a tie
        best_loss[alive] = torch.where(better, loss, best_loss[alive])
        best_code[alive] = torch.where(better, code, best_code[alive])
        clipped = (rows - e2m1.MAX * scale).clamp(min=0.0)
        cost = clipped * clipped if weights is None else weights * (clipped * clipped)
        go_on = (code > e4m3.MIN_CODE) & (sum_left_to_right(cost) <= best_loss[alive])
        alive, code, rows = alive[go_on], code[go_on] - 1, rows[:, go_on]
        weights = None if weights is None else weights[:, go_on]
    return SweepResult(best_code.to(torch.uint8).reshape(shape), best_loss.reshape(shape))
