import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scalesweep_hf.evaluate import gaps
from scalesweep_hf.evaluate.fidelity import measure_fidelity
from scalesweep_hf.evaluate.gaps import measure_gaps, measure_sensitivity
from scalesweep_hf.evaluate.study import count_bytes
from scalesweep_hf.ops.nvfp4 import compute_tensor_scale, dequantize, quantize
from scalesweep_hf.ops.oracle import optimal_scales
from scalesweep_hf.ops.sweep import absmax_codes, sweep_scales
from scalesweep_hf.targets import select_linears
from tests.models import load, random_tokens

TOKENS = random_tokens(2, 16)


@pytest.fixture(scope="module")
def model(random_model: Any) -> Any:
    return load(random_model("llama")).float()


def loss(x: Tensor, quantized: Tensor, importance: Tensor | float = 1.0) -> float:
    return float(((x - quantized).double().square() * importance).sum())


def test_the_gap_of_a_weight_is_that_of_its_quantization(model: Any) -> None:
    name = "model.layers.0.self_attn.o_proj"
    weight = model.get_submodule(name).weight.detach()
    inputs: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda m, a: inputs.append(a[0]))
    with torch.no_grad():
        model(TOKENS)
    hook.remove()
    importance = inputs[0].flatten(0, 1).square().sum(0)
    found = {g.error: g for g in measure_gaps(model, [name], TOKENS) if g.kind == "weights"}
    blocks = weight.unflatten(-1, (-1, 16))
    for error, w in (("mse", torch.ones(64)), ("wmse", importance)):
        best = float(optimal_scales(blocks, w.unflatten(-1, (-1, 16))).loss.sum())
        for objective in ("absmax", "four_over_six", "mse", "wmse"):
            given = importance if objective == "wmse" else None
            q = dequantize(quantize(weight, objective=objective, importance=given))
            expected = loss(weight, q, w) / best - 1
            assert found[error].gaps[objective] == pytest.approx(expected, rel=1e-3)


def test_an_input_is_weighed_by_all_weights_that_read_it(model: Any) -> None:
    names = [f"model.layers.0.mlp.{part}_proj" for part in ("gate", "up")]
    found = [g for g in measure_gaps(model, names, TOKENS) if g.kind == "activations"]
    (gap,) = (g for g in found if g.error == "wmse")
    inputs: list[Tensor] = []
    hook = model.get_submodule(names[0]).register_forward_pre_hook(lambda m, a: inputs.append(a[0]))
    with torch.no_grad():
        model(TOKENS)
    hook.remove()
    x = inputs[0].flatten(0, 1)
    weights = [model.get_submodule(name).weight.detach() for name in names]
    importance = sum((w.square().sum(0) for w in weights), torch.zeros(64))
    blocks = x.unflatten(-1, (-1, 16))
    best = float(optimal_scales(blocks, importance.unflatten(-1, (-1, 16))).loss.sum())
    q = dequantize(quantize(x, objective="wmse", importance=importance))
    assert gap.gaps["wmse"] == pytest.approx(loss(x, q, importance) / best - 1, rel=1e-3)


def test_offsets_and_edges_are_those_of_the_exact_sweep() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 32, generator=generator)
    importance = torch.rand(32, generator=generator) ** 8
    scaled = (x / compute_tensor_scale(x.abs().amax(), "mse")).unflatten(-1, (-1, 16))
    for gap, weight in zip(
        gaps._gaps("name", "weights", x, importance), (None, importance), strict=True
    ):
        w = None if weight is None else weight.unflatten(-1, (-1, 16))
        codes = sweep_scales(scaled, w, window="exact").codes.int()
        offsets = (codes - absmax_codes(scaled).int()).flatten().tolist()
        assert gap.offsets == {k: offsets.count(k) for k in sorted(set(offsets))}
        low, high = gaps.WINDOWS[gap.error]
        assert gap.edge == pytest.approx(sum(not low < k < high for k in offsets) / len(offsets))
        assert 0 < gap.edge < 1 or gap.error == "mse"


def test_keys_are_weighed_by_queries_and_queries_by_keys(model: Any) -> None:
    module = model.model.layers[0].self_attn
    sizes = {"keys": 32, "values": 32, "queries": 64}
    seen = {kind: torch.randn(5, size) for kind, size in sizes.items()}
    weighed = gaps._weigh_states(module, seen)
    for dim in range(16):
        for head in range(2):
            own = seen["queries"].reshape(5, 2, 2, 16)[:, head, :, dim]
            at = head * 16 + dim
            assert weighed["keys"][1][at] == pytest.approx(float(own.square().sum()), rel=1e-5)
            columns = module.o_proj.weight.detach().reshape(-1, 2, 2, 16)[:, head, :, dim]
            expected = float(columns.square().sum())
            assert weighed["values"][1][at] == pytest.approx(expected, rel=1e-5)
            for query in (0, 1):
                key = float(seen["keys"].reshape(5, 2, 16)[:, head, dim].square().sum())
                found = weighed["queries"][1].reshape(2, 2, 16)[head, query, dim]
                assert found == pytest.approx(key, rel=1e-5)


def test_every_column_block_is_looked_at() -> None:
    x = torch.arange(1.0, 257.0).repeat_interleave(16).expand(256, -1)
    blocks, _, _ = gaps._pick_blocks(x, torch.ones(4096))
    assert len(blocks) == gaps.BLOCKS
    assert len(blocks[:, 0, 0].unique()) == 256
    rows = gaps._some(torch.arange(1535)[:, None])
    assert len(rows) == gaps.ROWS
    assert (int(rows[0]), int(rows[-1])) == (0, 1534)


def test_a_weight_of_zeros_has_no_gap() -> None:
    assert gaps._gaps("name", "weights", torch.zeros(4, 32), torch.ones(32)) == []


def test_the_best_choice_has_the_smallest_gap(model: Any) -> None:
    for gap in measure_gaps(model, select_linears(model, None), TOKENS):
        assert min(gap.gaps.values()) >= -1e-6
        best = min((v, k) for k, v in gap.gaps.items() if k in ("absmax", "mse", "wmse"))[1]
        assert best == gap.error or gap.gaps[gap.error] - gap.gaps[best] < 1e-3
        assert sum(gap.offsets.values()) > 0
        assert 0 <= gap.edge <= 1


def test_every_tensor_is_there(model: Any) -> None:
    names = select_linears(model, None)
    found = measure_gaps(model, names, TOKENS)
    assert len(found) == 2 * (14 + 2 * 4 + 2 * 3)
    kinds = [gap.kind for gap in found if gap.error == "mse"]
    assert {kind: kinds.count(kind) for kind in kinds} == {
        "weights": 14,
        "activations": 8,
        "keys": 2,
        "values": 2,
        "queries": 2,
    }
    shared = "model.layers.0.self_attn.q_proj/k_proj/v_proj"
    assert shared in {gap.module for gap in found if gap.kind == "activations"}
    assert not any(hasattr(module, "nvfp4_states") for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_encoders_have_no_states_to_look_at(random_model: Any) -> None:
    model = load(random_model("bert"))
    found = measure_gaps(model, ["bert.encoder.layer.0.attention.self.query"], TOKENS)
    assert {gap.kind for gap in found} == {"weights", "activations"}


def test_sensitivity_is_the_kl_of_one_quantized_weight(model: Any) -> None:
    name = "model.layers.1.mlp.down_proj"
    before = copy.deepcopy(model.state_dict())
    found = measure_sensitivity(model, [name, "model.layers.0.mlp.up_proj"], TOKENS)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    changed = copy.deepcopy(model)
    weight = changed.get_submodule(name).weight
    with torch.no_grad():
        weight.copy_(dequantize(quantize(weight, objective="mse")))
    expected = measure_fidelity({"": changed}, model, TOKENS)[""].kl
    assert found[name] == pytest.approx(expected, rel=1e-6)
    assert found[name] > 0


def test_bytes_are_those_of_a_checkpoint(model: Any) -> None:
    size = count_bytes(model, ["model.layers.0.mlp.down_proj"])
    weights = 64 * 96
    assert size["before"] == sum(p.nbytes for p in model.parameters())
    assert size["quantized"] == 4 * weights
    assert size["before"] - size["after"] == 4 * weights - weights * 9 // 16 - 4


def test_a_module_that_does_not_run_is_named(model: Any) -> None:
    other = copy.deepcopy(model)
    other.unused = nn.Linear(16, 16)
    with pytest.raises(ValueError, match="no text reached unused"):
        measure_gaps(other, ["unused"], TOKENS)


def test_blocks_keep_their_importance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gaps, "BLOCKS", 5)
    x = torch.arange(1.0, 1 + 7 * 48).reshape(7, 48)
    blocks, weights, columns = gaps._pick_blocks(x, torch.arange(48.0))
    column = ((blocks[:, 0, 0] - 1) % 48).int()
    assert len(blocks) == 5
    assert torch.equal(weights[:, 0, 0].int(), column)
    assert torch.equal(columns.int(), column // 16)


def test_a_diagonal_coupling_is_an_importance() -> None:
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    importance = torch.rand(64, generator=torch.Generator().manual_seed(1)) + 0.1
    coupling = torch.diag_embed(importance.unflatten(0, (-1, 16)))
    for gap in gaps._gaps("name", "weights", x, importance, coupling):
        assert gap.gaps["hessian"] == gap.gaps["wmse"]


def test_weights_alone_are_swept_by_their_couplings(model: Any) -> None:
    for gap in measure_gaps(model, select_linears(model, None), TOKENS):
        assert ("hessian" in gap.gaps) == (gap.kind == "weights")
