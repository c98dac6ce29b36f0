"""The ways to choose block scales, by name."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from scalesweep_hf.ops import e4m3
from scalesweep_hf.ops.local_hessian import sweep_local_hessian
from scalesweep_hf.ops.sweep import Window, absmax_codes, four_over_six_codes, sweep_scales


@dataclass(frozen=True)
class Objective:
    """One way to initialise block scales.

    Attributes:
        choose: (x [..., G, 16] float32, importance or None, window) -> [..., G] uint8 codes.
        scale_range: largest block scale that the tensor scale leaves to the largest block's AbsMax
            scale; 256 keeps E4M3 room for scales up to 1.75 times as large (eq. 14), 448 is the
            plain baseline.
        weighted: whether its importance is one number per channel, [K].
        coupled: whether its importance is a matrix per block, [K/16, 16, 16], known of weights
            alone.
    """

    choose: Callable[[Tensor, Tensor | None, Window], Tensor]
    scale_range: float
    weighted: bool = False
    coupled: bool = False


def _choose_weighted(x: Tensor, importance: Tensor | None, window: Window) -> Tensor:
    assert importance is not None
    return sweep_scales(x, importance, window=window).codes


def _choose_coupled(x: Tensor, importance: Tensor | None, window: Window) -> Tensor:
    assert importance is not None
    return sweep_local_hessian(x, importance, window=window).codes


OBJECTIVES = {
    "absmax": Objective(lambda x, importance, window: absmax_codes(x), e4m3.MAX),
    "four_over_six": Objective(lambda x, importance, window: four_over_six_codes(x), 256.0),
    "mse": Objective(lambda x, importance, window: sweep_scales(x, window=window).codes, 256.0),
    "wmse": Objective(_choose_weighted, 256.0, weighted=True),
    "hessian": Objective(_choose_coupled, 256.0, coupled=True),
}

# What states and activations can be swept by: their couplings are not known at run time.
RUNTIME_OBJECTIVES = tuple(name for name, entry in OBJECTIVES.items() if not entry.coupled)


def check_objective(objective: str) -> None:
    """Raise ValueError unless objective names an initialisation of block scales."""
    if objective not in OBJECTIVES:
        raise ValueError(f"objective is {objective!r}; use one of {', '.join(OBJECTIVES)}")
