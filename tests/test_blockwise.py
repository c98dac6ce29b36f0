"""Calibration block by block: the same statistics, in any order of interruptions the same bytes."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from accelerate import cpu_offload
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from scalesweep_hf import NVFP4Linear, ScaleSweepConfig
from scalesweep_hf.calibration import blocks
from scalesweep_hf.calibration.blocks import (
    NotBlockwiseError,
    check_chain,
    find_blocks,
    record_calls,
    run_block,
)
from scalesweep_hf.calibration.pipeline import BlockWalk
from scalesweep_hf.calibration.run import make_runner
from scalesweep_hf.ops.gptq import factorize
from scalesweep_hf.targets import linears, select_linears
from tests.models import ARCHITECTURES, DECODER, DECODERS, load, random_tokens

TOKENS = random_tokens(5, 32)
IDS = random_tokens(2, 16, seed=1)
Models = Callable[[str], Path]


def gptq(folder: Path, **settings: Any) -> Any:
    settings = dict[str, Any](algorithm="gptq", dataset=TOKENS, batch_size=2) | settings
    placed = settings.pop("load", {})
    if "device_map" in settings:
        placed["device_map"] = settings.pop("device_map")
    return load(folder, quantization_config=ScaleSweepConfig(**settings), **placed)


def packed(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.reshape(-1).view(torch.uint8) for name, p in model.state_dict().items()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


LAYERS = ["sliding_attention", "full_attention"]
MULTIMODAL: dict[str, Callable[[], Any]] = {
    "llava": lambda: tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(
            text_config=tf.LlamaConfig(**DECODER),
            vision_config=tf.CLIPVisionConfig(
                **{"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1},
                **{"num_attention_heads": 2, "image_size": 16, "patch_size": 8},
            ),
            image_token_index=255,
        )
    ),
    "gemma3": lambda: tf.Gemma3ForCausalLM(
        tf.Gemma3TextConfig(**DECODER, sliding_window=8, layer_types=LAYERS)
    ),
}


def states_that_leave(model: Any, block: str) -> list[torch.Tensor]:
    """Return the hidden states that leave a block, batch by batch."""
    states: list[torch.Tensor] = []
    hook = model.get_submodule(block).register_forward_hook(lambda m, a, out: states.append(out))
    with torch.no_grad():
        for batch in TOKENS.split(2):
            model(input_ids=batch, use_cache=False)
    hook.remove()
    return states


@pytest.mark.parametrize("algorithm", ["gptq", "gptq-plus"])
@pytest.mark.parametrize("scheme", ["W", "WA", "WAKVQ"])
@pytest.mark.parametrize("architecture", [*DECODERS, *MULTIMODAL])
def test_blocks_see_what_the_reloaded_model_computes(
    architecture: str,
    scheme: str,
    algorithm: str,
    random_model: Models,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if architecture in MULTIMODAL:
        torch.manual_seed(0)
        folder = tmp_path / "model"
        MULTIMODAL[architecture]().to(torch.bfloat16).save_pretrained(folder)
    else:
        folder = random_model(architecture)
    walks: list[BlockWalk] = []
    original = BlockWalk.__init__

    def kept(self: BlockWalk, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        walks.append(self)

    monkeypatch.setattr(BlockWalk, "__init__", kept)
    gptq(folder, scheme=scheme, algorithm=algorithm).save_pretrained(tmp_path / "out")
    last = walks[0].calls.names[-1]
    expected = states_that_leave(load(tmp_path / "out"), last)
    assert all(torch.equal(a, b) for a, b in zip(walks[0].calls.hidden, expected, strict=True))
    assert (walks[0].exact is None) == (algorithm == "gptq")
    if walks[0].exact is not None:
        expected = states_that_leave(load(folder), last)
        assert all(torch.equal(a, b) for a, b in zip(walks[0].exact, expected, strict=True))


@pytest.mark.parametrize("skipped", [[], ["*.layers.0.*"], ["*.layers.1.*"]])
def test_every_group_is_observed_in_both_models(
    skipped: list[str], random_model: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    original = BlockWalk.observe_input

    def kept(self: BlockWalk, index: int, name: str) -> Any:
        statistics = original(self, index, name)
        (found,) = statistics.values()
        # What the model as it is now, and the original, give this Linear.
        expected = inputs_of(self._model, name), inputs_of(plain, name)
        assert found.hessian is not None
        assert found.cross is not None
        seen[name] = (found.hessian.clone(), found.cross.clone(), *expected)
        return statistics

    def inputs_of(model: Any, name: str) -> torch.Tensor:
        inputs: list[torch.Tensor] = []
        module = model.get_submodule(name)
        hook = module.register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
        with torch.no_grad():
            for batch in TOKENS.split(2):
                model(input_ids=batch, use_cache=False)
        hook.remove()
        return torch.cat([x.flatten(0, 1) for x in inputs]).float()

    plain = load(random_model("llama"))
    monkeypatch.setattr(BlockWalk, "observe_input", kept)
    gptq(random_model("llama"), algorithm="gptq-plus", modules_to_not_convert=skipped or None)
    assert len(seen) == 4 * (2 - len(skipped))
    for hessian, cross, x, x0 in seen.values():
        torch.testing.assert_close(hessian, x.T @ x, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(cross, x0.T @ x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_blocks_one_by_one_are_the_model(architecture: str, random_model: Models) -> None:
    model = load(random_model(architecture))
    names = find_blocks(model, select_linears(model, None))
    assert len(names) == 2
    run = make_runner(model.base_model, None)
    check_chain(model, names, run)
    batches = TOKENS.split(2)
    calls = record_calls(model, names, batches, run, store=torch.device("cpu"))
    with torch.no_grad():
        for index, batch in enumerate(batches):
            hidden = calls.hidden[index]
            for name, call in zip(names, calls.arguments[index], strict=True):
                hidden = run_block(model.get_submodule(name), hidden, call, hidden.device)
            outputs = model.base_model(input_ids=batch, output_hidden_states=True)
            last = getattr(model.base_model, "norm", nn.Identity())(hidden)
            assert torch.equal(last, outputs.last_hidden_state)
    assert not any("forward" in vars(module) for module in model.modules())


def test_arguments_that_all_batches_share_are_kept_once(random_model: Models) -> None:
    model = load(random_model("llama"))
    run = make_runner(model, None)
    calls = record_calls(model, find_blocks(model, ["model.layers.0.mlp"]), TOKENS.split(1), run)
    cosines = {c.kwargs["position_embeddings"][0].data_ptr() for b in calls.arguments for c in b}
    assert len(calls.arguments) == 5
    assert len(cosines) == 1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("scheme", ["W", "WA", "WAKVQ"])
def test_without_propagation_blocks_give_the_bytes_of_the_whole_model(
    architecture: str, scheme: str, random_model: Models
) -> None:
    if "KV" in scheme and architecture not in DECODERS:
        pytest.skip("keys and values of decoders only")
    whole, walked = (
        gptq(
            random_model(architecture),
            algorithm="rtn",
            scheme=scheme,
            pipeline=pipeline,
            **({"propagate_quantized": False} if pipeline == "block" else {}),
        )
        for pipeline in ("model", "block")
    )
    assert_same(packed(walked), packed(whole))
    with torch.no_grad():
        assert torch.equal(walked(input_ids=IDS).logits, whole(input_ids=IDS).logits)


@pytest.mark.parametrize("algorithm", ["gptq", "gptq-plus"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("scheme", ["W", "WAKVQ"])
def test_it_is_saved_and_reloaded(
    architecture: str, scheme: str, algorithm: str, random_model: Models, tmp_path: Path
) -> None:
    if "KV" in scheme and architecture not in DECODERS:
        pytest.skip("keys and values of decoders only")
    model = gptq(random_model(architecture), scheme=scheme, algorithm=algorithm)
    modules = linears(model)
    assert modules
    assert all(module.is_packed for module in modules.values())
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.config.quantization_config.algorithm == algorithm
    with torch.no_grad():
        assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_a_block_sees_the_quantized_output_of_those_before_it(random_model: Models) -> None:
    folder = random_model("llama")
    seen = []
    for propagate in (True, False):
        model = gptq(folder, scheme="WAKVQ", propagate_quantized=propagate)
        inputs: list[torch.Tensor] = []
        second = model.model.layers[1].self_attn.q_proj
        hook = second.register_forward_pre_hook(lambda m, args: inputs.append(args[0]))  # noqa: B023
        with torch.no_grad():
            for batch in TOKENS.split(2):
                model(input_ids=batch)
        hook.remove()
        largest = torch.stack([x.abs().amax() for x in inputs]).amax()
        seen.append(torch.equal(second.input_scale, (largest.float() / torch.tensor(1536.0))))
    assert seen == [True, False]


def test_gptq_lowers_the_output_error_of_a_trained_model(trained_model: Path) -> None:
    reference = load(trained_model)
    rows = TOKENS % reference.config.vocab_size
    with torch.no_grad():
        expected = reference(input_ids=rows).logits.float()
        errors = {}
        for algorithm in ("rtn", "gptq", "gptq-plus"):
            model = gptq(trained_model, algorithm=algorithm, scheme="W", dataset=rows)
            errors[algorithm] = (model(input_ids=rows).logits.float() - expected).square().mean()
    assert errors["gptq-plus"] < 0.9 * errors["gptq"] < 0.8 * errors["rtn"]


def test_hidden_states_on_the_cpu_give_the_same_bytes(random_model: Models) -> None:
    other = gptq(random_model("llama"), offload_hidden_states=True)
    assert_same(packed(other), packed(gptq(random_model("llama"))))


@pytest.mark.parametrize(("damping", "used"), [(None, 0.01), (0.03, 0.03)])
def test_hessians_are_factorized_as_the_config_says(
    damping: float | None, used: float, random_model: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[float, torch.dtype, torch.dtype]] = []

    def kept(hessian: torch.Tensor, *, damping: float, dtype: torch.dtype, **kwargs: Any) -> Any:
        seen.append((damping, dtype, hessian.dtype))
        return factorize(hessian, damping=damping, dtype=dtype, **kwargs)

    monkeypatch.setattr("scalesweep_hf.packing.factorize", kept)
    gptq(random_model("llama"), gptq_dtype="float64", gptq_damping=damping)
    assert seen == [(used, torch.float64, torch.float64)] * 8


def test_a_head_outside_the_blocks_is_quantized_too(random_model: Models, tmp_path: Path) -> None:
    kept: dict[str, Any] = {"modules_to_not_convert": ["!lm_head"], "resume_dir": tmp_path / "run"}
    model = gptq(random_model("llama"), **kept)
    assert isinstance(model.lm_head, NVFP4Linear)
    assert model.lm_head.is_packed
    assert_same(packed(gptq(random_model("llama"), **kept)), packed(model))


def test_a_model_offloaded_to_the_cpu_gives_the_same_bytes(random_model: Models) -> None:
    expected = packed(gptq(random_model("llama"), scheme="WAKVQ"))
    where = {"": "cpu", "model.layers.1": "cpu"}
    model = gptq(random_model("llama"), scheme="WAKVQ", device_map=where)
    assert_same(packed(model), expected)


class Weaving(PreTrainedModel):  # type: ignore[misc]
    """A model whose second block reads what the first one kept."""

    config_class = LlamaConfig
    main_input_name = "input_ids"
    base_model_prefix = ""

    def __init__(self, config: LlamaConfig, kind: str) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(256, 32)
        size = 1 if kind == "shared" else 2
        self.layers = nn.ModuleList(Weave(kind) for _ in range(size))
        self.order = [0, 0] if kind == "shared" else [1, 0] if kind == "reversed" else [0, 1]

    def forward(self, input_ids: torch.Tensor) -> Any:
        hidden: Any = self.embed(input_ids)
        Weave.memory = hidden
        for index in self.order:
            hidden = self.layers[index](hidden)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        Weave.memory = None
        return hidden


class Weave(nn.Module):
    memory: Any = None

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.proj = nn.Linear(32, 32)

    def forward(self, hidden: torch.Tensor) -> Any:
        x = self.proj(hidden)
        if self.kind == "memory" and Weave.memory is not None:
            x = x + Weave.memory
        return (x,) if self.kind == "tuple" else x


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("shared", "its 1 blocks do not run once each in order"),
        ("reversed", r"as layers\.1, layers\.0"),
        ("tuple", "its blocks return more than hidden states"),
        ("memory", "its blocks alone give other hidden states"),
    ],
)
def test_models_that_are_no_chain_are_told_why(kind: str, reason: str) -> None:
    model = Weaving(LlamaConfig(**DECODER), kind).eval()
    names = find_blocks(model, ["layers.0.proj"])
    with pytest.raises(NotBlockwiseError, match=reason):
        check_chain(model, names, lambda batch: model(batch))


def test_linears_in_no_or_several_lists_are_no_blocks() -> None:
    model = nn.Module()
    model.one, model.two = nn.ModuleList([nn.Linear(1, 1)]), nn.ModuleList([nn.Linear(1, 1)])
    with pytest.raises(NotBlockwiseError, match="in several ModuleLists: one, two"):
        find_blocks(model, ["one.0", "two.0"])
    with pytest.raises(NotBlockwiseError, match=r"in no torch\.nn\.ModuleList"):
        find_blocks(model, ["three"])
    assert find_blocks(model, ["two.0", "three"]) == ["two.0"]


def test_a_model_that_is_no_chain_is_calibrated_whole_with_a_warning(
    random_model: Models, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(blocks, "TOLERANCE", -1.0)  # no two hidden states are that near
    whole = gptq(random_model("llama"), propagate_quantized=False)
    with pytest.raises(NotBlockwiseError, match="read or change more than their arguments"):
        gptq(random_model("llama"), pipeline="block")
    monkeypatch.undo()
    walked = gptq(random_model("llama"), propagate_quantized=False)
    assert_same(packed(whole), packed(walked))


@pytest.mark.parametrize("algorithm", ["rtn", "gptq", "gptq-plus"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(
    value: float, algorithm: str, random_model: Models, tmp_path: Path
) -> None:
    model = load(random_model("llama"))
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] = value
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"layers\.1.*(not finite|max\|)"):
        gptq(tmp_path, algorithm=algorithm)


def test_the_order_of_overrides_counts(random_model: Models, tmp_path: Path) -> None:
    first = {"*.mlp.*": "absmax", "*.down_proj": "mse"}
    gptq(random_model("llama"), resume_dir=tmp_path, overrides=first)
    second = dict(reversed(first.items()))
    with pytest.raises(ValueError, match="belongs to another run: recipe was"):
        gptq(random_model("llama"), resume_dir=tmp_path, overrides=second)


def test_the_local_hessian_objective_lowers_the_error_of_a_trained_model(
    trained_model: Path,
) -> None:
    reference = load(trained_model)
    rows = TOKENS % reference.config.vocab_size
    with torch.no_grad():
        expected = reference(input_ids=rows).logits.float()
        errors = {}
        for objective in ("mse", "hessian"):
            model = gptq(
                trained_model, algorithm="rtn", objective=objective, scheme="W", dataset=rows
            )
            errors[objective] = (model(input_ids=rows).logits.float() - expected).square().mean()
    assert errors["hessian"] < 0.95 * errors["mse"]


def test_an_error_names_the_layer(random_model: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise ValueError("not today")

    monkeypatch.setattr("scalesweep_hf.modules.linear.quantize", broken)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj.*: not today"):
        gptq(random_model("llama"))


RUN_ONE = """
import os, sys, time, signal, random
import torch
torch.set_num_threads(1)
from pathlib import Path
from transformers.utils import logging
logging.disable_progress_bar()
from scalesweep_hf import ScaleSweepConfig
from tests.models import load, random_tokens

folder, work = Path(sys.argv[1]), Path(sys.argv[2])

def quantize(where, out=None):
    config = ScaleSweepConfig(
        algorithm="gptq", scheme="WAKVQ", dataset=random_tokens(4, 32), batch_size=2,
        resume_dir=where,
    )
    model = load(folder, quantization_config=config)
    if out is not None:
        model.save_pretrained(out)

def child(*args):
    pid = os.fork()
    if pid == 0:
        quantize(*args)
        os._exit(0)
    return pid

os.waitpid(child(work / "clean", work / "clean-out"), 0)
random.seed(int(sys.argv[3]))
for point in range(5):
    where = work / f"run{point}"
    pid = child(where)
    while not (where / f"block-{point:04}.safetensors").exists():
        time.sleep(0.0005)
    time.sleep(random.random() * 0.05)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    print(len(list(where.glob("block-*.safetensors"))))
    os.waitpid(child(where, work / f"out{point}"), 0)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_five_random_points_it_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**DECODER, "num_hidden_layers": 8}))
    model.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    done = subprocess.run(
        [sys.executable, "-c", RUN_ONE, str(tmp_path / "model"), str(tmp_path), "0"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    finished = [int(line) for line in done.stdout.split()]
    assert len(finished) == 5
    assert sum(0 < count < 8 for count in finished) >= 3, finished
    clean = (tmp_path / "clean-out" / "model.safetensors").read_bytes()
    for point in range(5):
        assert (tmp_path / f"out{point}" / "model.safetensors").read_bytes() == clean
        assert not list((tmp_path / f"run{point}").glob("*.part"))


@pytest.mark.parametrize("algorithm", ["gptq", "gptq-plus"])
@pytest.mark.parametrize("calls", [1, 2, 3, 4, 5])
def test_interrupted_while_writing_it_leaves_whole_files(
    algorithm: str,
    calls: int,
    random_model: Models,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = {"scheme": "WAKV", "algorithm": algorithm}
    expected = packed(gptq(random_model("llama"), **settings))
    original, left = save_file, [calls]

    def interrupted(tensors: Any, path: Path, *args: Any) -> None:
        left[0] -= 1
        original(tensors, path, *args)
        if left[0] == 0:
            path.write_bytes(path.read_bytes()[:50])
            raise KeyboardInterrupt

    monkeypatch.setattr("scalesweep_hf.calibration.resume.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        gptq(random_model("llama"), resume_dir=tmp_path, **settings)
    monkeypatch.undo()
    for file in tmp_path.iterdir():
        assert file.suffix != ".part"
        if file.suffix == ".safetensors":
            assert load_file(file)
    model = gptq(random_model("llama"), resume_dir=tmp_path, **settings)
    assert_same(packed(model), expected)


def test_a_finished_run_is_only_read(random_model: Models, tmp_path: Path) -> None:
    first = gptq(random_model("qwen3"), resume_dir=tmp_path)
    times = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    assert {file.name for file in times} == {
        "run.json",
        "tokens.safetensors",
        "block-0000.safetensors",
        "block-0001.safetensors",
        "hidden-0002.safetensors",
    }
    assert_same(packed(gptq(random_model("qwen3"), resume_dir=tmp_path)), packed(first))
    assert {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()} == times


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objective": "mse"}, "belongs to another run: recipe was"),
        ({"gptq_damping": 0.02}, "belongs to another run: recipe was"),
        ({"window": "exact"}, "belongs to another run: recipe was"),
        ({"batch_size": 1}, "belongs to another run: recipe was"),
        ({"scheme": "W"}, "belongs to another run: recipe was"),
        ({"attention": "eager"}, "belongs to another run: attention was 'sdpa' and is 'eager'"),
        ({"dataset": random_tokens(5, 32, seed=9)}, "other calibration text: use an empty folder"),
        ({"architecture": "qwen3"}, "belongs to another run: model was"),
    ],
)
def test_a_folder_of_another_run_is_refused(
    change: dict[str, Any], message: str, random_model: Models, tmp_path: Path
) -> None:
    gptq(random_model("llama"), resume_dir=tmp_path)
    change = dict(change)
    architecture = change.pop("architecture", "llama")
    if "attention" in change:
        change = {"load": {"attn_implementation": change["attention"]}}
    with pytest.raises(ValueError, match=message):
        gptq(random_model(architecture), resume_dir=tmp_path, **change)


def test_a_folder_with_other_files_is_refused(random_model: Models, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match=r"holds other files \(thesis.tex\): use an empty folder"):
        gptq(random_model("llama"), resume_dir=tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_hooks_come_back_after_an_error(
    random_model: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(random_model("llama"))
    cpu_offload(model.model.layers[0], execution_device="cpu")
    hooked = [name for name, module in model.named_modules() if hasattr(module, "_hf_hook")]
    names = find_blocks(model, ["model.layers.0.mlp"])
    with pytest.raises(RuntimeError, match="no"):
        record_calls(
            model, names, [TOKENS], lambda batch: (_ for _ in ()).throw(RuntimeError("no"))
        )
    assert hooked == [name for name, m in model.named_modules() if hasattr(m, "_hf_hook")]
    assert "forward" in vars(model.model.layers[0])
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=IDS).logits).all()
