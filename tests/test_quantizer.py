import copy
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from torch import Tensor, nn

import scalesweep_hf
from scalesweep_hf import NVFP4Linear, ScaleSweepConfig, calibrate
from scalesweep_hf.targets import group_by_input, linears
from tests.models import ARCHITECTURES, DECODERS, SHAPE, load, random_tokens, save_random

Folders = Callable[[str], Path]
TOKENS = random_tokens(4, 32)
INPUT = random_tokens(2, 16, seed=1)

WAYS: dict[str, dict[str, Any]] = {
    "on the fly": {"scheme": "W", "objective": "mse", "dataset": None},
    "weights calibrated": {"scheme": "W", "objective": "wmse", "dataset": TOKENS},
    "weights and activations": {"scheme": "WA", "objective": "wmse", "dataset": TOKENS},
}


def quantize(folder: Path, way: str = "weights and activations", **changes: Any) -> Any:
    return load(folder, quantization_config=ScaleSweepConfig(**(WAYS[way] | changes)))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result = model(input_ids=INPUT).logits
    assert isinstance(result, Tensor)
    return result


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_reloaded_logits_are_equal_to_the_bit(
    architecture: str, way: str, random_model: Folders, tmp_path: Path
) -> None:
    model = quantize(random_model(architecture), way)
    expected = logits(model)
    assert torch.isfinite(expected).all()
    assert not torch.equal(expected, logits(load(random_model(architecture))))
    model.save_pretrained(tmp_path / "once")
    again = load(tmp_path / "once")
    assert torch.equal(logits(again), expected)
    again.save_pretrained(tmp_path / "twice")
    file = "model.safetensors"
    assert (tmp_path / "once" / file).read_bytes() == (tmp_path / "twice" / file).read_bytes()


@pytest.mark.parametrize("architecture", DECODERS)
def test_a_quantized_model_generates(architecture: str, random_model: Folders) -> None:
    model = quantize(random_model(architecture), num_samples=2)
    ids = model.generate(
        input_ids=INPUT, attention_mask=torch.ones_like(INPUT), max_new_tokens=4, do_sample=False
    )
    assert ids.shape[0] == 2
    assert ids.shape[1] > INPUT.shape[1]


def test_on_the_fly_weights_are_what_quantize_gives(random_model: Folders) -> None:
    folder = random_model("llama")
    model = quantize(folder, "on the fly")
    original = load(folder)
    groups = (("q_proj", "k_proj", "v_proj"), ("o_proj",))
    for group in groups:
        attention = "model.layers.1.self_attn"
        weights = [original.get_submodule(f"{attention}.{name}").weight for name in group]
        amax = max(float(weight.detach().abs().max()) for weight in weights)
        scale = torch.tensor(amax, dtype=torch.float32) / (256 * 6)
        for name, weight in zip(group, weights, strict=True):
            expected = scalesweep_hf.quantize(weight, objective="mse", tensor_scale=scale)
            module = model.get_submodule(f"{attention}.{name}")
            assert torch.equal(module.weight, expected.packed)
            assert torch.equal(
                module.weight_scale.view(torch.uint8), expected.block_scale.view(torch.uint8)
            )
            assert torch.equal(module.weight_scale_2, expected.tensor_scale)


def test_both_ways_give_the_same_bytes(random_model: Folders, tmp_path: Path) -> None:
    folder = random_model("qwen3")
    calibrated = quantize(folder)
    statistics = calibrate(load(folder), TOKENS)
    statistics.save(tmp_path / "statistics.safetensors")
    on_the_fly = quantize(folder, dataset=None, statistics=tmp_path / "statistics.safetensors")
    expected = calibrated.state_dict()
    actual = on_the_fly.state_dict()
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        same = torch.equal(
            tensor.flatten().view(torch.uint8), actual[name].flatten().view(torch.uint8)
        )
        assert same, name
    recorded = [m.config.quantization_config.calibration for m in (calibrated, on_the_fly)]
    assert recorded[0] == recorded[1]
    assert recorded[0]["num_samples"] == 4


def test_the_checkpoint_has_the_modelopt_layout(random_model: Folders, tmp_path: Path) -> None:
    quantize(random_model("llama")).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    layout = {
        "weight": (torch.uint8, (64, 48)),
        "weight_scale": (torch.float8_e4m3fn, (64, 6)),
        "weight_scale_2": (torch.float32, ()),
        "input_scale": (torch.float32, ()),
    }
    found = {n.removeprefix(f"{name}."): t for n, t in tensors.items() if n.startswith(name)}
    assert {n: (t.dtype, tuple(t.shape)) for n, t in found.items()} == layout
    bits = 8 * (found["weight"].nbytes + found["weight_scale"].nbytes) / (64 * 96)
    assert bits == 4.5
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "scalesweep"
    assert config["version"] == scalesweep_hf.__version__
    assert len(config["quantized_modules"]) == 14
    assert "layers.0.mlp.down_proj" in config["quantized_modules"]
    assert config["calibration"]["source"] == "tokens"
    assert config["dataset"] is None


def test_fused_projections_share_their_scales(random_model: Folders) -> None:
    model = quantize(random_model("llama"))
    layer = model.model.layers[0]
    attention, mlp = layer.self_attn, layer.mlp
    for group in (
        (attention.q_proj, attention.k_proj, attention.v_proj),
        (mlp.gate_proj, mlp.up_proj),
    ):
        for member in group[1:]:
            assert torch.equal(member.weight_scale_2, group[0].weight_scale_2)
            assert torch.equal(member.input_scale, group[0].input_scale)
            assert torch.equal(member.input_importance, group[0].input_importance)
        columns = sum(
            scalesweep_hf.dequantize(member.quantized_weight()).double().square().sum(0)
            for member in group
        )
        ratio = columns / group[0].input_importance.double()
        torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-6, atol=0)


def test_projections_of_different_inputs_keep_their_own_scales(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = tf.BertConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        is_decoder=True,
        add_cross_attention=True,
    )
    model = tf.BertModel(config)
    with torch.no_grad(), scalesweep_hf.collect(model) as statistics:
        model(input_ids=INPUT, encoder_hidden_states=torch.randn(2, 5, 64))
    groups = group_by_input(statistics, statistics.shared_inputs)
    cross = "encoder.layer.0.crossattention.self"
    assert [f"{cross}.query"] in groups
    assert [f"{cross}.key", f"{cross}.value"] in groups
    own = "encoder.layer.0.attention.self"
    assert [f"{own}.query", f"{own}.key", f"{own}.value"] in groups


def test_heads_stay_unless_asked_for(random_model: Folders) -> None:
    model = quantize(random_model("llama"), "on the fly")
    assert type(model.lm_head) is nn.Linear
    classifier = quantize(random_model("bert"), "on the fly")
    assert type(classifier.classifier) is nn.Linear
    assert isinstance(classifier.bert.pooler.dense, NVFP4Linear)
    assert classifier.bert.pooler.dense.bias.dtype == torch.bfloat16


@pytest.mark.parametrize("way", WAYS)
def test_a_tied_head_is_quantized_on_request_and_the_embedding_stays(
    way: str, random_model: Folders, tmp_path: Path
) -> None:
    folder = random_model("llama-tied-biased")
    model = quantize(folder, way, modules_to_not_convert=["!lm_head"])
    assert isinstance(model.lm_head, NVFP4Linear)
    assert torch.equal(model.model.embed_tokens.weight, load(folder).model.embed_tokens.weight)
    expected = logits(model)
    model.tie_weights()
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), expected)


def test_skip_patterns_leave_modules_alone(random_model: Folders, tmp_path: Path) -> None:
    patterns = ["layers.0", "*.down_proj"]
    model = quantize(random_model("llama"), modules_to_not_convert=patterns)
    names = set(linears(model))
    assert names == {
        *(f"model.layers.1.self_attn.{name}_proj" for name in "qkvo"),
        *(f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up")),
    }
    model.save_pretrained(tmp_path)
    assert set(linears(load(tmp_path))) == names


def test_a_pattern_that_matches_nothing_is_an_error(random_model: Folders) -> None:
    with pytest.raises(ValueError, match=r"'layers\.7' matches no module of LlamaForCausalLM"):
        quantize(random_model("llama"), "on the fly", modules_to_not_convert=["layers.7"])


def test_overrides_reach_the_modules(random_model: Folders, tmp_path: Path) -> None:
    model = quantize(
        random_model("llama"),
        overrides={"activations": "mse", "*.down_proj": {"activations": None, "weights": "absmax"}},
    )
    mlp = model.model.layers[0].mlp
    assert mlp.up_proj.recipe.activations == "mse"
    assert mlp.up_proj.recipe.weights == "wmse"
    assert mlp.down_proj.recipe.activations is None
    assert mlp.down_proj.recipe.weights == "absmax"
    assert mlp.down_proj.input_scale is None
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(model))


def test_narrow_linears_stay_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tf.LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=72,
        num_hidden_layers=1,
        num_attention_heads=4,
    )
    tf.LlamaForCausalLM(config).save_pretrained(tmp_path)
    monkeypatch.setattr(logging.getLogger("scalesweep_hf"), "propagate", True)
    with caplog.at_level("WARNING", logger="scalesweep_hf"):
        model = quantize(tmp_path, "on the fly")
    assert type(model.model.layers[0].mlp.down_proj) is nn.Linear
    assert "down_proj stays unquantized: in_features=72" in caplog.text


def test_a_model_without_linears_is_refused(tmp_path: Path) -> None:
    config = tf.GPT2Config(
        vocab_size=256, n_embd=64, n_layer=1, n_head=4, bos_token_id=0, eos_token_id=1
    )
    tf.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel has no torch\.nn\.Linear to quantize"):
        quantize(tmp_path, "on the fly")


def test_checkpoints_load_with_and_without_their_head(
    random_model: Folders, tmp_path: Path
) -> None:
    full = quantize(random_model("llama"))
    full.save_pretrained(tmp_path / "full")
    with torch.no_grad():
        expected = full.model(input_ids=INPUT).last_hidden_state
        base = tf.AutoModel.from_pretrained(tmp_path / "full")
        assert torch.equal(base(input_ids=INPUT).last_hidden_state, expected)
        base.save_pretrained(tmp_path / "base")
        again = tf.AutoModel.from_pretrained(tmp_path / "base")
        assert torch.equal(again(input_ids=INPUT).last_hidden_state, expected)


def test_dequantize_gives_plain_linears_of_the_same_weights(
    random_model: Folders, tmp_path: Path
) -> None:
    model = quantize(random_model("llama"), "on the fly")
    packed = model.model.layers[0].mlp.up_proj.quantized_weight()
    model.save_pretrained(tmp_path / "packed")
    plain = model.dequantize()
    up = plain.model.layers[0].mlp.up_proj
    assert type(up) is nn.Linear
    assert torch.equal(up.weight, scalesweep_hf.dequantize(packed, torch.bfloat16))
    assert not hasattr(plain.config, "quantization_config")
    config = ScaleSweepConfig(dequantize=True)
    with pytest.warns(UserWarning, match="loading attributes"):
        loaded = load(tmp_path / "packed", quantization_config=config)
    assert torch.equal(logits(loaded), logits(plain))
    loaded.save_pretrained(tmp_path / "plain")
    assert torch.equal(logits(load(tmp_path / "plain")), logits(plain))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_any_model_dtype_reloads_the_same_packed_tensors(
    dtype: torch.dtype, random_model: Folders, tmp_path: Path
) -> None:
    model = quantize(random_model("llama"))
    model.save_pretrained(tmp_path)
    other = load(tmp_path, dtype=dtype)
    for name, module in linears(model).items():
        twin = linears(other)[name]
        assert torch.equal(module.weight, twin.weight)
        assert twin.weight_scale is not None
        assert module.weight_scale is not None
        assert twin.weight_scale.dtype == torch.float8_e4m3fn
        assert torch.equal(
            module.weight_scale.view(torch.uint8), twin.weight_scale.view(torch.uint8)
        )
        assert module.weight_scale_2 is not None
        assert twin.weight_scale_2 is not None
        assert torch.equal(module.weight_scale_2, twin.weight_scale_2)
    assert logits(other).dtype == dtype
    torch.testing.assert_close(logits(other).float(), logits(model).float(), rtol=0.1, atol=0.1)


def test_sharded_checkpoints_reload(random_model: Folders, tmp_path: Path) -> None:
    model = quantize(random_model("llama"))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(logits(load(tmp_path)), logits(model))


def test_the_callers_config_stays_as_it_was(random_model: Folders) -> None:
    config = ScaleSweepConfig(dataset=TOKENS)
    before = copy.deepcopy(config)
    load(random_model("llama"), quantization_config=config)
    assert config == before
    assert config.dataset is TOKENS
    assert config.quantized_modules is None


def test_random_state_survives_loading(random_model: Folders) -> None:
    state = torch.get_rng_state()
    quantize(random_model("llama"), dataset="self", num_samples=2, sequence_length=16)
    assert torch.equal(torch.get_rng_state(), state)


def test_disk_offload_works_for_saved_checkpoints_only(
    random_model: Folders, tmp_path: Path
) -> None:
    parts = ("embed_tokens", "layers.0", "norm", "rotary_emb")
    device_map = {f"model.{part}": "cpu" for part in parts}
    device_map |= {"lm_head": "cpu", "model.layers.1": "disk"}
    where: dict[str, Any] = {"device_map": device_map, "offload_folder": tmp_path / "offload"}
    model = quantize(random_model("llama"))
    model.save_pretrained(tmp_path / "packed")
    assert torch.equal(logits(load(tmp_path / "packed", **where)), logits(model))
    with pytest.raises(ValueError, match="cannot be quantized: quantize with CPU offload"):
        load(random_model("llama"), quantization_config=ScaleSweepConfig(), **where)


def test_missing_calibration_data_is_noticed_before_the_weights_are_read(
    random_model: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(tf.PreTrainedModel, "_load_pretrained_model", refuse)
    with pytest.raises(FileNotFoundError, match=r"dataset 'nowhere\.jsonl' does not exist"):
        quantize(random_model("llama"), dataset="nowhere.jsonl")
    with pytest.raises(FileNotFoundError, match=r"statistics 'nowhere' does not exist"):
        quantize(random_model("llama"), dataset=None, statistics="nowhere")


def test_statistics_of_another_model_are_refused(random_model: Folders, tmp_path: Path) -> None:
    path = tmp_path / "statistics.safetensors"
    calibrate(load(random_model("bert")), TOKENS).save(path)
    with pytest.raises(ValueError, match=r"has no statistics of layers\.0\.self_attn\.q_proj"):
        quantize(random_model("llama"), dataset=None, statistics=path)
    wide = calibrate(load(random_model("llama")), TOKENS)
    entry = wide["layers.1.mlp.up_proj"]
    wide["layers.1.mlp.up_proj"] = type(entry)(entry.absmax, entry.square[:32])
    wide.save(path)
    with pytest.raises(ValueError, match=r"has 32 channels of .*up_proj, which has 64"):
        quantize(random_model("llama"), dataset=None, statistics=path)
    path.write_bytes(b"garbage")
    with pytest.raises(ValueError, match=r"statistics\.safetensors is not a statistics file"):
        quantize(random_model("llama"), dataset=None, statistics=path)


@pytest.mark.parametrize("way", ["on the fly", "weights calibrated"])
def test_a_weight_with_nan_is_named(
    way: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    folder = save_random("llama", tmp_path)
    broken = load(folder)
    with torch.no_grad():
        broken.lm_head.weight.zero_()
        broken.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    broken.save_pretrained(folder)
    if way == "on the fly":
        with pytest.raises(RuntimeError, match="conversion"):
            quantize(folder, way)
        assert "model.layers.1.mlp.down_proj: max|weight| is nan" in caplog.text
        return
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj: max\|weight\| is nan"):
        quantize(folder, way)


def test_an_encoder_cannot_write_its_own_text(random_model: Folders) -> None:
    with pytest.raises(ValueError, match="BertForSequenceClassification cannot write its own"):
        quantize(random_model("bert"), dataset="self")


def test_dequantize_is_refused_where_nothing_is_quantized(random_model: Folders) -> None:
    with pytest.raises(ValueError, match="dequantize=True is for loading a quantized checkpoint"):
        quantize(random_model("llama"), "on the fly", dequantize=True)


def test_an_override_that_matches_nothing_is_an_error(random_model: Folders) -> None:
    for pattern in ("activation", "layers.9.*"):
        with pytest.raises(ValueError, match=f"overrides pattern '{re.escape(pattern)}' matches"):
            quantize(random_model("llama"), "on the fly", overrides={pattern: "absmax"})
    for pattern in ("model.layers.0.mlp.down_proj", "layers.0.mlp.down_proj", "layers.0.mlp"):
        model = quantize(random_model("llama"), "on the fly", overrides={pattern: "absmax"})
        assert model.model.layers[0].mlp.down_proj.recipe.weights == "absmax"
        assert model.model.layers[1].mlp.down_proj.recipe.weights == "mse"


def test_a_list_of_skips_adds_to_the_defaults(random_model: Folders) -> None:
    model = quantize(random_model("llama"), "on the fly", modules_to_not_convert=["layers.0"])
    assert type(model.lm_head) is nn.Linear


def test_a_tied_head_with_a_bias_reloads(tmp_path: Path) -> None:
    tf.BertForMaskedLM(tf.BertConfig(**SHAPE)).save_pretrained(tmp_path / "plain")
    wanted = ["!cls.predictions.decoder"]
    settings = ScaleSweepConfig(**WAYS["on the fly"], modules_to_not_convert=wanted)
    auto = tf.AutoModelForMaskedLM
    model = auto.from_pretrained(tmp_path / "plain", quantization_config=settings)
    assert isinstance(model.cls.predictions.decoder, NVFP4Linear)
    model.save_pretrained(tmp_path / "packed")
    assert torch.equal(logits(auto.from_pretrained(tmp_path / "packed")), logits(model))


def test_models_that_token_rows_do_not_run_are_refused_early(tmp_path: Path) -> None:
    t5 = tf.T5Config(vocab_size=256, d_model=64, d_kv=16, d_ff=96, num_layers=1, num_heads=4)
    tf.T5ForConditionalGeneration(t5).save_pretrained(tmp_path)
    auto = tf.AutoModelForSeq2SeqLM
    with pytest.raises(ValueError, match="is an encoder-decoder model, which calibration does not"):
        auto.from_pretrained(tmp_path, quantization_config=ScaleSweepConfig())
    config = ScaleSweepConfig(scheme="W", objective="mse", dataset=None)
    model = auto.from_pretrained(tmp_path, quantization_config=config)
    with torch.no_grad():
        out = model(input_ids=INPUT, decoder_input_ids=INPUT).logits
    assert torch.isfinite(out).all()


def test_a_quantized_model_is_not_calibrated_again(random_model: Folders) -> None:
    with pytest.raises(ValueError, match="is quantized already: calibrate the full-precision"):
        calibrate(quantize(random_model("llama"), "on the fly"), TOKENS)


def test_calibrating_leaves_the_model_as_it_was(random_model: Folders) -> None:
    model = load(random_model("llama"))
    before = logits(model)
    statistics = calibrate(model, TOKENS, states=True)
    assert len(statistics) == 14
    assert len(statistics.states) == 2
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(logits(model), before)


def test_loading_twice_registers_once() -> None:
    from transformers.quantizers import auto

    from scalesweep_hf.quantizer import register

    before = auto.LOADING_ATTRIBUTES_CONFIG_TYPES
    register()
    assert before == auto.LOADING_ATTRIBUTES_CONFIG_TYPES
    assert auto.AUTO_QUANTIZER_MAPPING["scalesweep"] is scalesweep_hf.ScaleSweepHfQuantizer


def test_weights_to_be_packed_count_half_a_byte(random_model: Folders) -> None:
    config = ScaleSweepConfig(scheme="W", objective="mse", dataset=None)
    quantizer = scalesweep_hf.ScaleSweepHfQuantizer(config, pre_quantized=False)
    with torch.device("meta"):
        model = ARCHITECTURES["llama"]().to(torch.bfloat16)
    quantizer.preprocess_model(model, device_map=None)
    sizes = {
        name: quantizer.param_element_size(model, name, p) * p.numel()
        for name, p in model.named_parameters()
    }
    up = "model.layers.0.mlp.up_proj"
    assert sizes[f"{up}.weight"] + sizes[f"{up}.weight_scale"] == 64 * 96 * 4.5 / 8
    assert sizes["lm_head.weight"] == 2 * 64 * 256
