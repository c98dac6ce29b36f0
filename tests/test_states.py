"""Quantized keys, values and queries, end to end on tiny models in float32."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DynamicCache, StaticCache

from scalesweep_hf import NVFP4Cache, NVFP4StaticCache, ScaleSweepConfig, calibrate
from scalesweep_hf.modules.cache import PackedLayer, pack_cache
from tests.models import DECODER, load, random_tokens, save_random

TOKENS = random_tokens(4, 32)
INPUT = random_tokens(2, 20, seed=1)
MODELS = ("llama", "qwen3", "mistral", "gemma2")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return float32 models, in which ways to compute the same thing differ by rounding only."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = save_random(name, tmp_path_factory.mktemp(name), torch.float32)
        return made[name]

    return get


@pytest.fixture(scope="module")
def models(folders: Callable[[str], Path]) -> Callable[[str], Any]:
    """Return models with weights left alone, so that only states can make a difference."""
    made: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in made:
            made[name] = quantize(folders(name), overrides={"activations": None})
        return made[name]

    return get


def quantize(folder: Path, **changes: Any) -> Any:
    settings: dict[str, Any] = {"scheme": "WAKVQ", "dataset": TOKENS}
    return load(folder, quantization_config=ScaleSweepConfig(**(settings | changes)))


def logits(model: Any, ids: Tensor = INPUT, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        result = model(input_ids=ids, **kwargs).logits
    assert isinstance(result, Tensor)
    return result


def step_by_step(model: Any, cache: Any, prefill: int) -> Tensor:
    parts = []
    with torch.no_grad():
        out = model(input_ids=INPUT[:, :prefill], past_key_values=cache, use_cache=True)
        parts.append(out.logits)
        for t in range(prefill, INPUT.shape[1]):
            token = INPUT[:, t : t + 1]
            out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
            parts.append(out.logits)
    return torch.cat(parts, dim=1)


CACHES: dict[str, Callable[[Any], Any]] = {
    "none given": lambda config: None,
    "dynamic": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config=config, max_cache_len=24),
    "packed": lambda config: NVFP4Cache(config=config),
    "packed static": lambda config: NVFP4StaticCache(config=config, max_cache_len=24),
}


@pytest.mark.parametrize("prefill", [1, 12])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", MODELS)
def test_full_forward_and_cached_decoding_agree(
    name: str, cache: str, prefill: int, models: Callable[[str], Any]
) -> None:
    model = models(name)
    full = logits(model, use_cache=False)
    actual = step_by_step(model, CACHES[cache](model.config), prefill)
    # A rounding difference can push a value over the border between two codes, rarely.
    error = (actual - full).abs().flatten()
    assert error.median() < 1e-5
    assert error.quantile(0.9) < 5e-3


@pytest.mark.parametrize("name", MODELS)
def test_states_are_quantized_with_and_without_a_cache(
    name: str, models: Callable[[str], Any]
) -> None:
    model = models(name)
    assert torch.equal(logits(model, use_cache=False), logits(model, use_cache=True))
    plain = copy.deepcopy(model)
    for module in plain.modules():
        for part in ("q_scale", "k_scale", "v_scale"):
            if hasattr(module, part):
                setattr(module, part, None)
    assert (logits(plain) - logits(model)).abs().max() > 1e-3


@pytest.mark.parametrize("scheme", ["WAKV", "WAKVQ"])
@pytest.mark.parametrize("name", MODELS)
def test_reloaded_logits_are_equal_to_the_bit(
    name: str, scheme: str, random_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model = quantize(random_model(name), scheme=scheme)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    attention = "model.layers.0.self_attn"
    shapes = {
        key.removeprefix(f"{attention}."): (value.dtype, tuple(value.shape))
        for key, value in stored.items()
        if key.startswith(attention) and key.rpartition(".")[2][1:] in ("_scale", "_importance")
    }
    heads = (2, DECODER["head_dim"]) if name != "gemma2" else shapes["k_importance"][1]
    wanted = {"k_scale": (), "v_scale": (), "k_importance": heads}
    if scheme == "WAKVQ":
        wanted |= {"q_scale": (), "q_importance": heads}
    assert shapes == {part: (torch.float32, shape) for part, shape in wanted.items()}
    assert torch.equal(logits(load(tmp_path)), expected)


def test_importance_of_keys_comes_from_queries_and_back(folders: Callable[[str], Path]) -> None:
    model = load(folders("llama"))
    attention = model.model.layers[0].self_attn
    seen: dict[str, Tensor] = {}

    def record(
        module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        if module is attention:
            seen.update(q=query, k=key, v=value)
        return tf.integrations.sdpa_attention.sdpa_attention_forward(
            module, query, key, value, *args, **kwargs
        )

    tf.AttentionInterface.register("recording", record)
    tf.AttentionMaskInterface.register("recording", tf.masking_utils.sdpa_mask)
    model.set_attn_implementation("recording")
    logits(model, TOKENS)
    quantized = quantize(folders("llama"), overrides={"weights": "mse"}, batch_size=4)
    module = quantized.model.layers[0].self_attn
    q = seen["q"].double().square().sum((0, 2)).reshape(2, 2, -1).sum(1)
    k = seen["k"].double().square().sum((0, 2))
    torch.testing.assert_close(module.k_importance, q.float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(module.q_importance, k.float(), rtol=1e-4, atol=1e-4)
    for part in "qkv":
        scale = getattr(module, f"{part}_scale")
        torch.testing.assert_close(scale, seen[part].abs().max() / (256 * 6), rtol=1e-5, atol=0)
    weight = module.o_proj.to_linear(torch.float32).weight.detach().double()
    v = weight.square().sum(0).reshape(2, 2, -1).sum(1)
    ratio = module.v_importance.double() / v
    torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-5, atol=0)


@pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flex_attention"])
def test_any_attention_implementation_sees_quantized_states(
    implementation: str, models: Callable[[str], Any]
) -> None:
    model = models("llama")
    expected = logits(model)
    other = copy.deepcopy(model)
    other.set_attn_implementation(implementation)
    error = (logits(other) - expected).abs().flatten()
    assert error.median() < 1e-5


GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": GREEDY,
    "beam": {**GREEDY, "num_beams": 4},
    "prompt lookup": {**GREEDY, "prompt_lookup_num_tokens": 3},
    "static": {**GREEDY, "cache_implementation": "static", "disable_compile": True},
}


def generate(model: Any, ids: Tensor, **kwargs: Any) -> Any:
    mask = (ids != 2).long()
    with torch.no_grad():
        return model.generate(
            input_ids=ids, attention_mask=mask, return_dict_in_generate=True, **kwargs
        )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_generation_stores_packed_and_writes_what_the_plain_cache_writes(
    name: str, way: str, models: Callable[[str], Any]
) -> None:
    model = models(name)
    ids = INPUT[:1] if way == "prompt lookup" else INPUT
    packed = generate(model, ids, **WAYS[way])
    assert all(isinstance(layer, PackedLayer) for layer in packed.past_key_values.layers)
    assert packed.past_key_values.layers[0].keys.dtype == torch.uint8
    reference = WAYS[way] if way == "beam" else GREEDY
    plain = generate(model, ids, past_key_values=DynamicCache(config=model.config), **reference)
    assert not isinstance(plain.past_key_values.layers[0], PackedLayer)
    assert torch.equal(packed.sequences, plain.sequences)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_left_padded_batches_write_what_each_row_writes_alone(
    name: str, models: Callable[[str], Any]
) -> None:
    model = models(name)
    short = INPUT[:1, :7]
    padded = torch.cat((torch.full((1, 13), 2), short), dim=1)
    batch = generate(model, torch.cat((INPUT[1:], padded)), **GREEDY).sequences
    alone = generate(model, short, **GREEDY).sequences
    assert torch.equal(batch[1, 20:], alone[0, 7:])


def test_assisted_decoding_writes_what_the_model_writes(models: Callable[[str], Any]) -> None:
    model, assistant = models("llama"), models("qwen3")
    assisted = generate(model, INPUT[:1], assistant_model=assistant, **GREEDY)
    assert torch.equal(assisted.sequences, generate(model, INPUT[:1], **GREEDY).sequences)


def test_cropping_forgets_tokens(models: Callable[[str], Any]) -> None:
    model = models("llama")
    cache = NVFP4Cache(config=model.config)
    expected = logits(model, INPUT, past_key_values=cache)[:, 10:]
    cache.crop(-10)
    assert cache.get_seq_length() == 10
    torch.testing.assert_close(
        logits(model, INPUT[:, 10:], past_key_values=cache), expected, rtol=1e-3, atol=1e-3
    )


def test_a_packed_row_is_all_that_grows_with_tokens(models: Callable[[str], Any]) -> None:
    model = models("llama")
    cache = NVFP4Cache(config=model.config)
    logits(model, INPUT, past_key_values=cache)
    layer = cache.layers[0]
    tensors = [value for value in vars(layer).values() if isinstance(value, Tensor)]
    assert {id(t) for t in tensors} == {id(layer.keys), id(layer.values)}
    elements = INPUT.numel() * 2 * DECODER["head_dim"]
    assert layer.keys.nbytes * 8 / elements == 4.5


def test_an_unquantized_model_can_use_the_cache(folders: Callable[[str], Path]) -> None:
    model = load(folders("llama"))
    out = generate(model, INPUT, past_key_values=NVFP4Cache(config=model.config), **GREEDY)
    assert out.past_key_values.layers[0].keys.dtype == torch.uint8
    full = logits(model)
    cached = logits(model, past_key_values=NVFP4Cache(config=model.config))
    error = ((cached - full).norm() / full.norm()).item()
    assert 1e-4 < error < 0.1


def test_the_cache_switch_can_be_changed_on_loading(
    random_model: Callable[[str], Path], tmp_path: Path
) -> None:
    quantize(random_model("llama")).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="loading attributes"):
        model = load(tmp_path, quantization_config=ScaleSweepConfig(packed_cache=False))
    cache = generate(model, INPUT, **GREEDY).past_key_values
    assert not isinstance(cache.layers[0], PackedLayer)


def test_a_used_cache_cannot_be_packed(models: Callable[[str], Any]) -> None:
    model = models("llama")
    cache = DynamicCache(config=model.config)
    logits(model, past_key_values=cache)
    with pytest.raises(ValueError, match="pack it before its first use"):
        pack_cache(cache)


def test_static_decoding_compiles_as_one_graph(models: Callable[[str], Any]) -> None:
    model = copy.deepcopy(models("llama"))
    torch.compiler.reset()
    cache = NVFP4StaticCache(config=model.config, max_cache_len=24)
    expected = step_by_step(model, NVFP4StaticCache(config=model.config, max_cache_len=24), 12)
    with torch.no_grad():
        first = model(input_ids=INPUT[:, :12], past_key_values=cache, use_cache=True).logits
        step: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
        parts = [first]
        for t in range(12, 20):
            out = step(input_ids=INPUT[:, t : t + 1], past_key_values=cache, use_cache=True)
            parts.append(out.logits)
    assert (torch.cat(parts, dim=1) - expected).abs().median() < 1e-5


def test_casting_leaves_scales_and_copies_are_independent(models: Callable[[str], Any]) -> None:
    model = models("llama")
    other = copy.deepcopy(model).to(torch.float16)
    attention = other.model.layers[0].self_attn
    for part in ("k_scale", "k_importance", "v_importance"):
        assert getattr(attention, part).dtype == torch.float32
        assert torch.equal(getattr(attention, part), getattr(model.model.layers[0].self_attn, part))
    assert generate(other, INPUT, **GREEDY).past_key_values.layers[0].keys.dtype == torch.uint8
    attention.k_scale.data.fill_(1.0)
    assert not torch.equal(attention.k_scale, model.model.layers[0].self_attn.k_scale)


def test_kinds_can_be_set_apart(folders: Callable[[str], Path], tmp_path: Path) -> None:
    overrides = {"values": "mse", "queries": None, "layers.1.*": {"keys": "absmax"}}
    model = quantize(folders("llama"), overrides=overrides)
    first, second = (layer.self_attn for layer in model.model.layers)
    assert first.q_scale is None
    assert first.v_importance is None
    assert first.nvfp4_states.recipe.keys == "wmse"
    assert second.nvfp4_states.recipe.keys == "absmax"
    assert second.k_importance is None
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(model))


def test_statistics_give_the_same_bytes(folders: Callable[[str], Path], tmp_path: Path) -> None:
    calibrated = quantize(folders("qwen3"))
    statistics = calibrate(load(folders("qwen3")), TOKENS, states=True)
    statistics.save(tmp_path / "s.safetensors")
    again = quantize(folders("qwen3"), dataset=None, statistics=tmp_path / "s.safetensors")
    assert torch.equal(logits(again), logits(calibrated))


def test_dequantizing_unhooks(folders: Callable[[str], Path]) -> None:
    plain = quantize(folders("llama")).dequantize()
    assert not any(hasattr(module, "nvfp4_states") for module in plain.modules())
    assert "k_scale" not in " ".join(plain.state_dict())
    assert not isinstance(generate(plain, INPUT, **GREEDY).past_key_values.layers[0], PackedLayer)


@pytest.mark.parametrize("part", ["k_scale", "q_importance"])
def test_damage_to_states_is_named(
    part: str, random_model: Callable[[str], Path], tmp_path: Path
) -> None:
    quantize(random_model("llama")).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = f"model.layers.1.self_attn.{part}"
    tensors[name].fill_(torch.nan)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"{name} has \d+ scales that are NaN"):
        load(tmp_path)
    del tensors[name]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"{name} is missing from the checkpoint"):
        load(tmp_path)


def test_layers_can_be_exempt_and_the_others_stay_packed(folders: Callable[[str], Path]) -> None:
    model = quantize(folders("llama"), overrides={"layers.1.*": {"keys": None}})
    cache = generate(model, INPUT, **GREEDY).past_key_values
    assert [isinstance(layer, PackedLayer) for layer in cache.layers] == [True, False]
    with pytest.raises(ValueError, match="layer 1 quantizes only one of keys and values"):
        logits(model, past_key_values=NVFP4Cache(config=model.config))


def test_a_cache_that_cannot_be_packed_is_refused() -> None:
    with pytest.raises(ValueError, match=r"has no layers yet: make it with config=model\.config"):
        pack_cache(DynamicCache())
    shape = {key: DECODER[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers")}
    hybrid = tf.FalconH1Config(**shape, num_attention_heads=4, num_key_value_heads=2)
    with pytest.raises(ValueError, match="which cannot be packed"):
        NVFP4Cache(config=hybrid)


def test_a_reused_cache_takes_its_scales_anew(folders: Callable[[str], Path]) -> None:
    cache = NVFP4Cache(config=load(folders("llama")).config)
    states = torch.randn(1, 2, 4, 16)
    cache.update(states, states, 0)
    cache.reset()
    keys, _ = cache.update(1000 * states, 1000 * states, 0)
    latest = keys[:, :, -4:]  # Transformers 5.17 keeps zeros in place of what it resets
    assert ((latest / 1000 - states).norm() / states.norm()) < 0.2
    with pytest.raises(ValueError, match=r"the first states have max\|x\| = inf"):
        cache.update(states * torch.inf, states, 1)


def test_a_pickled_model_computes_the_same(models: Callable[[str], Any], tmp_path: Path) -> None:
    model = models("llama")
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(logits(again), logits(model))
    assert isinstance(generate(again, INPUT, **GREEDY).past_key_values.layers[0], PackedLayer)


def test_statistics_that_do_not_suit_are_refused_early(
    folders: Callable[[str], Path], tmp_path: Path
) -> None:
    path = tmp_path / "s.safetensors"
    statistics = calibrate(load(folders("llama")), TOKENS)
    statistics.save(path)
    with pytest.raises(ValueError, match=r"make them with calibrate\(model, states=True\)"):
        quantize(folders("llama"), dataset=None, statistics=path)
    statistics = calibrate(load(folders("llama")), TOKENS, states=True)
    seen = statistics.states["layers.0.self_attn"]
    wide = seen.key_square.repeat(2, 1)
    statistics.states["layers.0.self_attn"] = type(seen)(seen.absmax, wide, wide.clone())
    statistics.save(path)
    with pytest.raises(ValueError, match=r"are of \[4, 16\] heads and channels"):
        quantize(folders("llama"), dataset=None, statistics=path)


def refused(tmp_path: Path, model: Any) -> Any:
    model.save_pretrained(tmp_path)
    auto = tf.AutoModelForSeq2SeqLM if model.config.is_encoder_decoder else tf.AutoModel
    config = ScaleSweepConfig(scheme="WAKV", dataset=TOKENS)
    return auto.from_pretrained(tmp_path, quantization_config=config)


def test_models_whose_attention_cannot_be_hooked_say_why(tmp_path: Path) -> None:
    narrow = tf.LlamaConfig(**(DECODER | {"head_dim": 24}))
    with pytest.raises(ValueError, match="has head_dim 24, not a multiple of 16"):
        refused(tmp_path / "narrow", tf.LlamaModel(narrow))
    shape = {key: DECODER[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers")}
    latent = tf.DeepseekV3Config(
        **shape, intermediate_size=96, moe_intermediate_size=32, num_attention_heads=4,
        num_key_value_heads=4, n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2,
        q_lora_rank=32, kv_lora_rank=32, first_k_dense_replace=1,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"uses latent attention \(MLA\)"):
        refused(tmp_path / "latent", tf.DeepseekV3Model(latent))
    shared = tf.Gemma3nTextConfig(
        **shape, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        num_kv_shared_layers=1, vocab_size_per_layer_input=256, hidden_size_per_layer_input=16,
        layer_types=["full_attention", "full_attention"], activation_sparsity_pattern=[0.0, 0.0],
        laurel_rank=8, altup_num_inputs=2,
    )  # fmt: skip
    with pytest.raises(ValueError, match="shares the keys and values of another layer"):
        refused(tmp_path / "shared", tf.Gemma3nForCausalLM(shared))
    bert = tf.BertConfig(**shape, num_attention_heads=4, intermediate_size=96)
    with pytest.raises(ValueError, match=r"BertSelfAttention\) .*: use scheme 'WA'"):
        refused(tmp_path / "bert", tf.BertModel(bert))
    t5 = tf.T5Config(vocab_size=256, d_model=64, d_kv=16, d_ff=96, num_layers=1, num_heads=4)
    with pytest.raises(ValueError, match="encoder-decoder"):
        refused(tmp_path / "t5", tf.T5ForConditionalGeneration(t5))


def test_the_recipe_is_recorded(random_model: Callable[[str], Path], tmp_path: Path) -> None:
    quantize(random_model("llama"), scheme="WAKV").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["scheme"] == "WAKV"
    assert config["packed_cache"] is True
