"""How near each way of choosing block scales comes to the best, tensor by tensor.

The gap of a choice is ``sum loss / sum loss of the optimal float32 scales - 1`` over the blocks of
a tensor (the paper's Figures 4 and 6), for the squared and the importance-weighted error.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from scalesweep_hf.calibration.observers import LocalHessian
from scalesweep_hf.calibration.run import make_runner
from scalesweep_hf.evaluate.fidelity import measure_fidelity
from scalesweep_hf.modules import attention
from scalesweep_hf.names import STATES
from scalesweep_hf.ops import e4m3
from scalesweep_hf.ops.local_hessian import sweep_local_hessian
from scalesweep_hf.ops.nvfp4 import compute_tensor_scale, dequantize, quantize
from scalesweep_hf.ops.objectives import OBJECTIVES, RUNTIME_OBJECTIVES
from scalesweep_hf.ops.oracle import nearest_codes, optimal_scales
from scalesweep_hf.ops.sweep import BLOCK, absmax_codes, block_loss
from scalesweep_hf.targets import find_attention, group_by_input

# Blocks looked at per tensor, picked at random: optimal scales are slow.
BLOCKS = 2048
# Rows of activations and states kept per module for that.
ROWS = 512
# The widest bounded windows, whose ends are reported.
WINDOWS = {"mse": (-3, 7), "wmse": (-8, 7)}


@dataclass(frozen=True)
class Gap:
    """One tensor under one error.

    Attributes:
        module: name of its module.
        kind: "weights", "activations", "keys", "values" or "queries".
        error: "mse", or "wmse" by importance.
        gaps: by objective, and "nearest E4M3" of the optimal scale.
        offsets: how often the exact sweep of this error chose each E4M3 offset from AbsMax.
        edge: share of blocks whose choice lies at or beyond an end of the widest bounded window.
    """

    module: str
    kind: str
    error: str
    gaps: dict[str, float]
    offsets: dict[int, int] = field(default_factory=dict)
    edge: float = 0.0


def measure_gaps(model: Any, names: Sequence[str], tokens: Tensor) -> list[Gap]:
    """Measure weights, their inputs and, where it can be hooked, what attention computes with.

    Args:
        model: in full precision; left as it was.
        names: of the nn.Linear modules.
        tokens: [rows, length] token ids that the model runs on.

    Returns:
        Two gaps per tensor, for "mse" and "wmse".

    Raises:
        ValueError: a module did not run.
    """
    inputs, states = _sample(model, names, tokens)
    if missing := [name for name in names if name not in inputs]:
        raise ValueError(f"no text reached {', '.join(missing)}")
    weights = {name: model.get_submodule(name).weight.detach() for name in names}
    result = []
    for name, weight in weights.items():
        x = inputs[name].float()
        coupling = LocalHessian()
        coupling.update(x)
        result += _gaps(name, "weights", weight, x.square().sum(0), coupling.value.to(x.device))
    for group in group_by_input(names):
        columns = sum(weights[name].float().square().sum(0) for name in group)
        assert isinstance(columns, Tensor)
        label = "/".join([group[0], *(name.rpartition(".")[2] for name in group[1:])])
        result += _gaps(label, "activations", inputs[group[0]], columns)
    for name, seen in states.items():
        for kind, (x, importance) in _weigh_states(model.get_submodule(name), seen).items():
            result += _gaps(name, kind, x, importance)
    return result


def measure_sensitivity(model: Any, names: Sequence[str], tokens: Tensor) -> dict[str, float]:
    """Return the KL in nats per token when only one Linear's weight is quantized, by "mse".

    Args:
        model: in full precision; its weights are exchanged and put back.
        names: of the nn.Linear modules.
        tokens: [rows, length] token ids.
    """
    result = {}
    with torch.no_grad():
        reference = _Frozen(model, tokens)
        for name in names:
            weight = model.get_submodule(name).weight
            original = weight.detach().clone()
            try:
                weight.copy_(dequantize(quantize(original, objective="mse"), original.dtype))
                measured = measure_fidelity(
                    {name: model}, reference, tokens, batch_size=len(tokens)
                )
            finally:
                weight.copy_(original)
            result[name] = measured[name].kl
    return result


class _Frozen:
    """Answers with the logits that a model had for the same tokens before it was changed."""

    def __init__(self, model: Any, tokens: Tensor) -> None:
        self.device = model.device
        ids = tokens.to(device=model.device, dtype=torch.int64)
        self.output = model(input_ids=ids, use_cache=False)

    def __call__(self, **kwargs: Any) -> Any:
        return self.output


def _gaps(
    name: str, kind: str, x: Tensor, importance: Tensor, coupling: Tensor | None = None
) -> list[Gap]:
    """Measure one tensor [R, K] with importance [K], by both errors.

    With coupling [K/16, 16, 16] also the objective "hessian".
    """
    amax = x.detach().abs().amax()
    result = []
    blocks, weights, columns = _pick_blocks(x, importance)
    for error in ("mse", "wmse"):
        w = weights if error == "wmse" else None
        losses: dict[str, Tensor] = {}
        for objective in RUNTIME_OBJECTIVES:
            scale = compute_tensor_scale(amax, objective)
            scaled = blocks / scale
            codes = OBJECTIVES[objective].choose(scaled, weights, "bounded")
            losses[objective] = block_loss(scaled, e4m3.decode(codes), w) * scale**2
        if coupling is not None:  # [B, 1, 16] seen as one row of blocks
            scale = compute_tensor_scale(amax, "hessian")
            scaled = blocks / scale
            codes = sweep_local_hessian(scaled.movedim(1, 0), coupling[columns]).codes.mT
            losses["hessian"] = block_loss(scaled, e4m3.decode(codes), w) * scale**2
        scale = compute_tensor_scale(amax, "mse")
        scaled = blocks / scale
        best = optimal_scales(scaled, w)
        losses["nearest E4M3"] = nearest_codes(scaled, best.scale, w).loss * scale**2
        optimum = float((best.loss * scale**2).sum())
        if optimum == 0:  # nothing but zeros, or all on the grid
            continue
        gaps = {key: float(loss.sum()) / optimum - 1 for key, loss in losses.items()}
        codes = OBJECTIVES[error].choose(scaled, w, "exact")
        offsets = (codes.int() - absmax_codes(scaled).int()).flatten()
        low, high = WINDOWS[error]
        edge = ((offsets <= low) | (offsets >= high)).float().mean()
        counts = {int(k): int(v) for k, v in sorted(Counter(offsets.tolist()).items())}
        result.append(Gap(name, kind, error, gaps, counts, float(edge)))
    return result


def _pick_blocks(x: Tensor, importance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return about `BLOCKS` nonzero blocks [B, 1, 16] of x, their importance and columns [B]."""
    blocks = x.detach().to(torch.float32).unflatten(-1, (-1, BLOCK)).flatten(0, 1)  # [R G, 16]
    weights = importance.to(torch.float32).unflatten(-1, (-1, BLOCK))  # [G, 16]
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(blocks), generator=generator)[:BLOCKS].to(x.device)
    chosen = chosen[blocks[chosen].abs().amax(-1) > 0]
    columns = chosen % len(weights)
    return blocks[chosen].unsqueeze(1), weights[columns].unsqueeze(1), columns


def _sample(
    model: Any, names: Sequence[str], tokens: Tensor
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Keep some rows of every Linear's input and of every attention module's states."""
    inputs: dict[str, Tensor] = {}
    run = make_runner(model, names)
    with torch.no_grad(), ExitStack() as stack:
        for name in names:
            module = model.get_submodule(name)

            def keep(module: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
                inputs.setdefault(name, _some(args[0].flatten(0, -2)))

            stack.callback(module.register_forward_pre_hook(keep).remove)
        states = stack.enter_context(_observed_states(model))
        run(tokens)
    return inputs, {name: keeper.kept for name, keeper in states.items()}


class _Keeper:
    """Observes states [B, H, T, D]; keeps them as rows [B T, H D]."""

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}

    def observe(self, kind: str, states: Tensor) -> None:
        self.kept.setdefault(kind, states.transpose(1, 2).flatten(2).flatten(0, 1))


@contextmanager
def _observed_states(model: Any) -> Iterator[dict[str, _Keeper]]:
    try:
        names = find_attention(model)
    except ValueError:  # no attention whose states could be quantized
        names = []
    recipe = attention.StateRecipe(None, None, None, "bounded")
    keepers = {name: _Keeper() for name in names}
    try:
        for name, keeper in keepers.items():
            module = model.get_submodule(name)
            attention.attach(module, recipe)
            module.nvfp4_states.observer = keeper
        yield keepers
    finally:
        for name in keepers:
            attention.detach(model.get_submodule(name))


def _weigh_states(module: nn.Module, seen: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return states [R, H D] and their importance [H D] (method: eqs. 11 to 13), by kind."""
    if not all(kind in seen for kind in STATES):
        return {}
    head_dim = int(module.head_dim)  # type: ignore[arg-type]
    keys, values, queries = (seen[kind] for kind in STATES)
    heads = keys.shape[-1] // head_dim
    key_square = keys.float().square().sum(0).reshape(heads, head_dim)
    query_square = queries.float().square().sum(0).reshape(heads, -1, head_dim)
    groups = query_square.shape[1]
    output = module.get_submodule("o_proj").weight
    columns = output.detach().float().square().sum(0).reshape(heads, groups, head_dim)  # type: ignore[operator]
    return {
        "keys": (_some(keys), query_square.sum(1).flatten()),
        "values": (_some(values), columns.sum(1).flatten()),
        "queries": (_some(queries), key_square.repeat_interleave(groups, dim=0).flatten()),
    }


def _some(rows: Tensor) -> Tensor:
    spread = torch.linspace(0, len(rows) - 1, min(ROWS, len(rows)), device=rows.device)
    return rows[spread.long()]
