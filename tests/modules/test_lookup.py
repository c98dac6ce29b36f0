"""Decoding reads packed rows where it can, and computes what it computed before."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from scalesweep_hf import NVFP4Cache, NVFP4StaticCache, ScaleSweepConfig
from scalesweep_hf.modules.lookup import _attend
from scalesweep_hf.modules.packed import PackedStates
from scalesweep_hf.ops import attention as definition
from scalesweep_hf.ops.attention import ATTENTION, Attention
from scalesweep_hf.ops.kv import StateCodec
from tests.models import DECODER, load, random_tokens, save_random

INPUT = random_tokens(2, 20, seed=1)
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12}
sdpa = tf.integrations.sdpa_attention.sdpa_attention_forward


class Counter:
    """The definition, as if it paid, counting its calls."""

    def __init__(self) -> None:
        self.calls = 0
        self.lengths: list[bool] = []
        self.pays = True

    def attend(self, *args: Any) -> Tensor:
        self.calls += 1
        self.lengths.append(args[-1] is not None)
        return definition.attend(*args)


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Counter:
    counter = Counter()
    fake = Attention(counter.attend, pays=lambda query, rows: counter.pays)
    for name in ATTENTION:
        monkeypatch.setitem(ATTENTION, name, fake)
    return counter


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Return tiny float32 models, quantized or not, in which ways to compute differ by rounding."""
    made: dict[tuple[str, str | None], Any] = {}
    folders: dict[str, Path] = {}

    def get(name: str, scheme: str | None = "WAKVQ") -> Any:
        if name not in folders:
            folders[name] = save_random(name, tmp_path_factory.mktemp(name), torch.float32)
        if (name, scheme) not in made:
            config = None
            if scheme is not None:
                tokens = random_tokens(4, 32)
                overrides = {"activations": None}
                config = ScaleSweepConfig(scheme=scheme, dataset=tokens, overrides=overrides)
            made[name, scheme] = load(folders[name], quantization_config=config)
        return made[name, scheme]

    return get


def generate(model: Any, ids: Tensor, **kwargs: Any) -> Any:
    with torch.no_grad():
        return model.generate(
            input_ids=ids,
            attention_mask=(ids != 2).long(),
            return_dict_in_generate=True,
            output_logits=True,
            **(GREEDY | kwargs),
        )


WAYS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "dynamic": lambda model: {"past_key_values": NVFP4Cache(config=model.config)},
    "static": lambda model: {
        "past_key_values": NVFP4StaticCache(config=model.config, max_cache_len=40),
        "disable_compile": True,
    },
    "prompt lookup": lambda model: {"prompt_lookup_num_tokens": 3},
    "beam": lambda model: {"num_beams": 3},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("scheme", [None, "WAKVQ"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral"])
def test_generation_is_that_of_decoded_states(
    name: str, scheme: str | None, way: str, models: Callable[..., Any], counter: Counter
) -> None:
    model = models(name, scheme)
    ids = INPUT[:1] if way == "prompt lookup" else INPUT
    if way in ("prompt lookup", "beam") and scheme is None:
        pytest.skip("the cache that generate makes is plain")
    counter.pays = False
    expected = generate(model, ids, **WAYS[way](model))
    assert counter.calls == 0
    counter.pays = True
    actual = generate(model, ids, **WAYS[way](model))
    layers = model.config.num_hidden_layers
    if way != "prompt lookup":  # where several tokens are checked at a time
        # The prompt is decoded, all tokens after it are read packed.
        assert counter.calls == 11 * layers
    assert counter.calls >= layers
    assert torch.equal(actual.sequences, expected.sequences)
    if way != "beam":
        for a, b in zip(actual.logits, expected.logits, strict=True):
            # Near a border between two codes, a rounding difference decides which is taken.
            assert (a - b).abs().median() < 1e-5


def test_static_caches_say_how_much_is_filled(models: Callable[..., Any], counter: Counter) -> None:
    model = models("llama")
    cache = NVFP4StaticCache(config=model.config, max_cache_len=40)
    expected = generate(model, INPUT, past_key_values=NVFP4Cache(config=model.config))
    assert not any(counter.lengths)
    counter.lengths.clear()
    poisoned = False

    def poison(*args: Any) -> Tensor:
        nonlocal poisoned
        for layer in cache.layers:
            for rows in (layer.keys, layer.values):
                rows[:, :, int(layer.cumulative_length) :] = 255  # NaN scales
                poisoned = True
        return counter.attend(*args)

    for name in ATTENTION:
        ATTENTION[name] = Attention(poison, pays=lambda query, rows: True)
    actual = generate(model, INPUT, past_key_values=cache, disable_compile=True)
    assert poisoned
    assert all(counter.lengths)
    assert torch.equal(actual.sequences, expected.sequences)


def test_left_padded_batches_write_what_each_row_writes_alone(
    models: Callable[..., Any], counter: Counter
) -> None:
    model = models("llama")
    short = INPUT[:1, :7]
    padded = torch.cat((torch.full((1, 13), 2), short), dim=1)
    batch = generate(model, torch.cat((INPUT[1:], padded))).sequences
    assert counter.calls
    assert torch.equal(batch[1, 20:], generate(model, short).sequences[0, 7:])


@pytest.mark.parametrize("implementation", ["eager", "flex_attention"])
@pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
def test_other_implementations_get_decoded_states(
    implementation: str, models: Callable[..., Any], counter: Counter
) -> None:
    model = models("llama")
    expected = generate(model, INPUT).sequences
    calls = counter.calls
    assert calls
    model.set_attn_implementation(implementation)
    try:
        assert torch.equal(generate(model, INPUT).sequences, expected)
    finally:
        model.set_attn_implementation("sdpa")
    assert counter.calls == calls


@pytest.mark.parametrize("name", ["gemma2", "gpt-oss"])
def test_capped_scores_and_sinks_get_decoded_states(name: str, counter: Counter) -> None:
    """As `attend_packed` has neither; gemma2 asks for its softcap, gpt-oss takes no sdpa."""
    if name == "gemma2":
        model: Any = tf.Gemma2ForCausalLM(tf.Gemma2Config(**DECODER))
    else:
        model = tf.GptOssForCausalLM(
            tf.GptOssConfig(**DECODER, num_local_experts=2, num_experts_per_tok=1, sliding_window=8)
        )
    model.eval()
    cache = NVFP4Cache(config=model.config)
    out = generate(model, INPUT, past_key_values=cache)
    assert counter.calls == 0
    assert all(layer.reaches_attention for layer in cache.layers)
    assert torch.isfinite(torch.stack(out.logits)).all()


def test_static_decoding_compiles_as_one_graph(
    models: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models("qwen3")
    for name in ATTENTION:
        monkeypatch.setitem(ATTENTION, name, Attention(definition.attend, lambda query, rows: True))
    expected = generate(model, INPUT).sequences
    torch.compiler.reset()
    cache = NVFP4StaticCache(config=model.config, max_cache_len=40)
    graphs = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph.code)
        return graph.forward

    with torch.no_grad():
        token = model(input_ids=INPUT, past_key_values=cache).logits[:, -1:].argmax(-1)
        step: Any = torch.compile(model, fullgraph=True, backend=keep)
        written = [token]
        for _ in range(11):
            token = step(input_ids=token, past_key_values=cache).logits[:, -1:].argmax(-1)
            written.append(token)
    assert graphs
    assert not any("scaled_dot_product_attention" in code for code in graphs)
    assert torch.equal(torch.cat(written, dim=1), expected[:, 20:])


def states(tokens: int, length: Tensor | None = None) -> tuple[Any, Tensor]:
    x = torch.randn(1, 2, tokens, 16)
    codec = StateCodec(torch.tensor(0.01), "mse")
    packed = PackedStates(codec.pack(x), codec, torch.float32, length)
    return packed, codec.round(x)


class Module(nn.Module):
    num_key_value_groups = 2


UNSUPPORTED: dict[str, dict[str, Any]] = {
    "dropout": {"dropout": 0.5},
    "a position bias": {"position_bias": torch.zeros(1, 4, 1, 9)},
    "a mask of another length": {"attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool)},
    "an integer mask": {"attention_mask": torch.ones(1, 1, 1, 9, dtype=torch.int64)},
    "positional arguments": {},
}


@pytest.mark.parametrize("feature", UNSUPPORTED)
def test_what_is_not_supported_gets_decoded_states(
    feature: str, counter: Counter, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def attention(
        module: Any, query: Tensor, key: Any, value: Any, *args: Any, **kwargs: Any
    ) -> None:
        seen.extend((key, value))

    monkeypatch.setattr("scalesweep_hf.modules.lookup.sdpa_attention_forward", attention)
    (key, plain), (value, _) = states(9), states(9)
    query = torch.randn(1, 4, 1, 16)
    args = (None, 0.0) if feature == "positional arguments" else ()
    kwargs = UNSUPPORTED[feature] or {}
    if not args:
        kwargs = {"attention_mask": None} | kwargs
    _attend(attention, Module(), query, key, value, *args, **kwargs)
    assert counter.calls == 0
    assert torch.equal(seen[0], plain)
    _attend(attention, Module(), query, key, value, attention_mask=None, scaling=0.25)
    assert counter.calls == 1


def test_several_queries_without_a_mask_are_causal_and_get_decoded_states(
    counter: Counter,
) -> None:
    (key, plain), (value, plain_value) = states(9), states(9)
    query = torch.randn(1, 4, 3, 16)
    actual, _ = _attend(sdpa, Module(), query, key, value, None)
    expected, _ = sdpa(Module(), query, plain, plain_value, None)
    assert counter.calls == 0
    assert torch.equal(actual, expected)


def test_packed_states_are_tensors_to_everything_else() -> None:
    packed, plain = states(9)
    assert packed.shape == plain.shape
    assert packed.dtype == plain.dtype
    assert packed.device == plain.device
    assert packed.dim() == 4
    pairs: Any = (
        (packed.transpose(1, 2), plain.transpose(1, 2)),
        (packed[:, :, :3], plain[:, :, :3]),
        (packed * 2, plain * 2),
        (2 + plain.new_ones(()) * packed, 2 + plain),
        (-packed, -plain),
        (torch.cat([packed, packed], dim=2), torch.cat([plain, plain], dim=2)),
        (plain @ packed.mT, plain @ plain.mT),
        (torch.matmul(packed, plain.mT), plain @ plain.mT),
        (
            nn.functional.scaled_dot_product_attention(plain, packed, value=packed),
            nn.functional.scaled_dot_product_attention(plain, plain, value=plain),
        ),
    )
    for found, expected in pairs:
        assert torch.equal(found, expected)


def test_states_that_do_not_reach_attention_untouched_stay_decoded() -> None:
    """A model that does something to what its cache returns gets tensors, at every step."""
    config = tf.LlamaConfig(**DECODER)
    cache = NVFP4Cache(config=config)
    x = torch.randn(1, 2, 4, 16)
    for _ in range(3):
        keys, values = cache.update(x[:, :, :1], x[:, :, :1], 0)
        assert isinstance(keys, Tensor)
        _attend(sdpa, Module(), torch.randn(1, 4, 1, 16), keys * 1, values, None)
    _attend(sdpa, Module(), torch.randn(1, 4, 1, 16), keys, values, None)
    keys, values = cache.update(x[:, :, :1], x[:, :, :1], 0)
    assert isinstance(keys, PackedStates)
    keys, values = cache.update(x.repeat(1, 1, 3, 1), x.repeat(1, 1, 3, 1), 0)
    assert isinstance(keys, Tensor)  # a prompt


def test_states_changed_in_place_are_not_taken_for_what_the_cache_returned() -> None:
    cache = NVFP4Cache(config=tf.LlamaConfig(**DECODER))
    x = torch.randn(1, 2, 4, 16)
    keys, values = cache.update(x, x, 0)
    keys.mul_(2)
    _attend(sdpa, Module(), torch.randn(1, 4, 4, 16), keys, values, None)
    assert not cache.layers[0].reaches_attention
    packed, _ = states(3)
    with pytest.raises(AttributeError, match="in place"):
        packed.mul_(2)


def test_a_device_that_cannot_run_the_kernel_gets_decoded_states(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache = NVFP4Cache(config=tf.LlamaConfig(**DECODER))
    x = torch.randn(1, 2, 4, 16)
    keys, values = cache.update(x, x, 0)
    backend = cache.layers[0].key_codec.backend
    fake = Attention(definition.attend, lambda query, rows: True, lambda device: False)
    monkeypatch.setitem(ATTENTION, backend, fake)
    _attend(sdpa, Module(), torch.randn(1, 4, 4, 16), keys, values, None)
    assert isinstance(cache.update(x, x, 0)[0], Tensor)


def test_packed_states_are_decoded_once_and_can_be_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, expected = states(3)
    assert packed.to(torch.float32) is packed
    assert packed.to(torch.device("cpu")) is packed
    assert torch.equal(2 * pickle.loads(pickle.dumps(packed)), 2 * expected)
    assert torch.equal(copy.copy(packed) + 0, expected)
    assert packed.decoded() is packed.decoded()
    assert packed.to(torch.float64).dtype == torch.float64


def test_what_a_cache_returns_does_not_hold_the_cache(tmp_path: Path) -> None:
    cache = NVFP4Cache(config=tf.LlamaConfig(**DECODER))
    keys, _ = cache.update(torch.randn(1, 2, 4, 16), torch.randn(1, 2, 4, 16), 0)
    torch.save(keys, tmp_path / "keys.pt")
    assert torch.equal(torch.load(tmp_path / "keys.pt", weights_only=True), keys)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
class TestOnGPU:
    @pytest.fixture(params=[64, 96, 128])
    def model(self, request: pytest.FixtureRequest) -> Any:
        config = tf.LlamaConfig(**(DECODER | {"head_dim": request.param, "num_key_value_heads": 1}))
        return tf.LlamaForCausalLM(config).cuda().to(torch.bfloat16).eval()

    @pytest.fixture
    def calls(self, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
        kernel = ATTENTION["triton"]
        calls: list[bool] = []

        def attend(*args: Any) -> Tensor:
            calls.append(args[-1] is not None)
            return kernel.attend(*args)

        monkeypatch.setitem(ATTENTION, "triton", Attention(attend, kernel.pays))
        return calls

    @staticmethod
    def steps(model: Any, step: Any, cache: Any) -> Tensor:
        """Return the logits of ten steps whose tokens are given."""
        ids = INPUT.cuda()
        parts = []
        with torch.no_grad():
            model(input_ids=ids[:, :10], past_key_values=cache)
            for t in range(10, 20):
                out = step(input_ids=ids[:, t : t + 1], past_key_values=cache)
                parts.append(out.logits.clone())
        return torch.cat(parts, dim=1).float()

    def caches(self, model: Any) -> dict[str, Any]:
        return {
            "dynamic": NVFP4Cache(config=model.config),
            "static": NVFP4StaticCache(config=model.config, max_cache_len=100),
        }

    @pytest.mark.parametrize("kind", ["dynamic", "static"])
    def test_logits_are_those_of_decoded_states(
        self, kind: str, model: Any, calls: list[bool], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        actual = self.steps(model, model, self.caches(model)[kind])
        assert calls == [kind == "static"] * 2 * 10
        plain = ATTENTION["torch"]
        monkeypatch.setitem(ATTENTION, "triton", plain)
        expected = self.steps(model, model, self.caches(model)[kind])
        # bfloat16 has 8 bits, and rounding differences can move codes of later layers.
        assert (actual - expected).norm() < 0.02 * expected.norm()

    @pytest.mark.slow
    @pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
    def test_decoding_compiles_as_one_graph(self, mode: str, model: Any) -> None:
        expected = self.steps(model, model, self.caches(model)["static"])
        torch.compiler.reset()
        step = torch.compile(model, fullgraph=True, mode=mode)
        actual = self.steps(model, step, self.caches(model)["static"])
        assert (actual - expected).norm() < 0.02 * expected.norm()

    def test_generate_compiles_decoding_by_itself(self, model: Any) -> None:
        ids = INPUT.cuda()
        options = GREEDY | {"attention_mask": torch.ones_like(ids)}
        expected = model.generate(
            ids, past_key_values=self.caches(model)["static"], disable_compile=True, **options
        )
        actual = model.generate(ids, past_key_values=self.caches(model)["static"], **options)
        assert (actual == expected).float().mean() > 0.8
