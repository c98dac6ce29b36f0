"""Checkpoints in nvidia-modelopt's form: written by our own save, and by the real tool."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from scalesweep_hf import NVFP4Linear, ScaleSweepConfig
from scalesweep_hf.modelopt import quantization_config
from scalesweep_hf.targets import linears
from tests.conftest import ROOT
from tests.models import load, random_tokens

INPUT = random_tokens(2, 16, seed=1)
GRID = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
PRODUCER = {"name": "modelopt", "version": "0.47.0"}
STATES = {f"self_attn.{x}_scale": f"self_attn.{x}_proj.{x}_scale" for x in "kv"}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result = model(input_ids=INPUT).logits
    assert isinstance(result, Tensor)
    return result


def flat(**changes: Any) -> dict[str, Any]:
    fields = {"quant_algo": "NVFP4", "ignore": ["lm_head"], "producer": PRODUCER}
    return fields | changes | {"quant_method": "modelopt"}


def nested(**changes: Any) -> dict[str, Any]:
    fields = {"quant_algo": "NVFP4", "kv_cache_quant_algo": None, "group_size": 16}
    fields |= {"exclude_modules": ["lm_head"]} | changes
    return {"producer": PRODUCER, "quantization": fields, "quant_method": "modelopt"}


def describe(folder: Path, quantization: dict[str, Any] | None) -> Path:
    """Replace what config.json says of the quantization."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config.pop("quantization_config", None)
    if quantization is not None:
        config["quantization_config"] = quantization
    file.write_text(json.dumps(config))
    return folder


@pytest.fixture
def saved(random_model: Callable[[str], Path], tmp_path: Path) -> Callable[..., tuple[Path, Any]]:
    """Return a checkpoint of ours, quantized as ModelOpt does, and the model that was saved."""

    def make(architecture: str = "llama", **fields: Any) -> tuple[Path, Any]:
        fields = {"objective": "absmax", "dataset": random_tokens(4, 32)} | fields
        config = ScaleSweepConfig(**fields)
        model = load(random_model(architecture), quantization_config=config)
        model.save_pretrained(tmp_path / "saved")
        return tmp_path / "saved", model

    return make


@pytest.mark.parametrize("form", [flat, nested])
@pytest.mark.parametrize("architecture", ["llama", "llama-tied-biased", "qwen3"])
def test_the_same_tensors_give_the_same_logits_to_the_bit(
    architecture: str, form: Callable[..., Any], saved: Any, tmp_path: Path
) -> None:
    folder, model = saved(architecture)
    loaded = load(describe(folder, form()))
    assert set(linears(loaded)) == set(linears(model))
    assert torch.equal(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path / "ours")
    recorded = json.loads((tmp_path / "ours" / "config.json").read_text())["quantization_config"]
    assert recorded["quant_method"] == "scalesweep"
    assert recorded["calibration"] == {"source": "modelopt 0.47.0"}
    assert torch.equal(logits(load(tmp_path / "ours")), logits(model))


def test_weight_only_checkpoints_leave_inputs_alone(saved: Any) -> None:
    folder, model = saved(scheme="W", dataset=None)
    loaded = load(describe(folder, flat(quant_algo="W4A16_NVFP4")))
    assert {module.recipe.activations for module in linears(loaded).values()} == {None}
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize(
    ("pattern", "left"),
    [("model.layers.0*", 7), ("model.layers.0", 7), ("*.down_proj", 12), ("*mlp*", 8)],
)
def test_excluded_modules_stay_unquantized(pattern: str, left: int, saved: Any) -> None:
    folder, model = saved(modules_to_not_convert=[pattern])
    loaded = load(describe(folder, nested(exclude_modules=["lm_head", pattern])))
    assert len(linears(loaded)) == left
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("form", [flat, nested])
def test_scales_of_keys_and_values_are_in_units_of_six(
    form: Callable[..., Any], saved: Any, tmp_path: Path
) -> None:
    folder, model = saved(scheme="WAKV")
    tensors = load_file(folder / "model.safetensors")
    for index, layer in enumerate(model.model.layers):
        for name, exponent in (("k_scale", -9 - index), ("v_scale", -8)):
            scale = torch.tensor(2.0**exponent)  # times 6 and back is exact
            getattr(layer.self_attn, name).data = scale
            tensors[f"model.layers.{index}.self_attn.{name}"] = scale * 6
    renamed = {
        next((n.replace(ours, theirs) for ours, theirs in STATES.items() if ours in n), n): t
        for n, t in tensors.items()
    }
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    key = "kv_cache_scheme" if form is flat else "kv_cache_quant_algo"
    loaded = load(describe(folder, form(**{key: "NVFP4"})))
    assert torch.equal(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path / "ours")
    assert load_file(tmp_path / "ours" / "model.safetensors").keys() == tensors.keys()
    assert torch.equal(logits(load(tmp_path / "ours")), logits(model))


def test_a_checkpoint_without_a_head_gets_a_new_one(saved: Any) -> None:
    folder, _ = saved()
    auto = tf.AutoModelForSequenceClassification
    model = auto.from_pretrained(describe(folder, flat()))
    assert type(model.score) is nn.Linear
    assert len(linears(model)) == 14


def test_loading_attributes_and_dequantize_work(saved: Any) -> None:
    folder, model = saved()
    config = ScaleSweepConfig(dequantize=True)
    with pytest.warns(UserWarning, match="loading attributes"):
        loaded = load(describe(folder, flat()), quantization_config=config)
    assert type(loaded.model.layers[0].mlp.up_proj) is nn.Linear
    assert torch.equal(logits(loaded), logits(model.dequantize()))


def test_what_only_hf_quant_config_says_can_be_passed_on(saved: Any) -> None:
    folder, model = saved()
    describe(folder, None)
    said = {key: value for key, value in nested().items() if key != "quant_method"}
    (folder / "hf_quant_config.json").write_text(json.dumps(said))
    config = tf.AutoConfig.from_pretrained(folder)
    config.quantization_config = quantization_config(folder)
    assert torch.equal(logits(load(folder, config=config)), logits(model))


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        (flat(quant_algo="FP8"), "quant_algo is 'FP8'; of ModelOpt's checkpoints .* loads NVFP4"),
        (nested(quant_algo="NVFP4_AWQ"), "quant_algo is 'NVFP4_AWQ'; .* quantize the original"),
        (nested(quant_algo="W4A8_NVFP4_FP8"), "quant_algo is 'W4A8_NVFP4_FP8'"),
        (nested(quant_algo="MIXED_PRECISION"), "quant_algo is 'MIXED_PRECISION'"),
        (flat(quant_algo=None), "quant_algo is None"),
        (flat(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme is .*: remove kv_cache_scheme"),
        (nested(kv_cache_quant_algo="FP8"), "kv_cache_quant_algo is 'FP8'; this package"),
        (nested(kv_cache_quant_algo="NVFP4_AFFINE"), "kv_cache_quant_algo is 'NVFP4_AFFINE'"),
        (nested(group_size=32), "group_size is 32; NVFP4 has blocks of 16"),
        (flat(config_groups={"g": {"weights": {"group_size": 32}}}), "group_size is 32"),
        (flat(ignore=["*.up_proj"]), r"config\.json excludes layers\.0\.mlp\.up_proj: they are of"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(
    quantization: dict[str, Any], message: str, saved: Any
) -> None:
    folder, _ = saved(scheme="W", dataset=None)
    with pytest.raises(ValueError, match=message):
        load(describe(folder, quantization))


def test_packed_experts_are_refused_by_name(saved: Any) -> None:
    folder, _ = saved(scheme="W", dataset=None)
    tensors = load_file(folder / "model.safetensors")
    scale = tensors["model.layers.0.mlp.up_proj.weight_scale"]
    tensors["model.layers.0.mlp.experts.0.up_proj.weight_scale"] = scale.clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"experts\.0\.up_proj is no torch\.nn\.Linear of Llama"):
        load(describe(folder, flat(quant_algo="W4A16_NVFP4")))


# The real tool

WRITE = """
import sys, warnings
warnings.simplefilter("ignore")
import torch
from pathlib import Path
from safetensors.torch import load_file, save_file
from tests.models import load, random_tokens, save_random
try:
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint
    from modelopt.torch.quantization.qtensor import NVFP4QTensor
except ImportError as error:
    print(f"{error}")
    sys.exit(77)

architecture, recipe, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
model = load(save_random(architecture, folder / "plain"))
tokens = random_tokens(4, 32)
config = getattr(mtq, recipe.removesuffix("+KV"))
if recipe.endswith("+KV"):
    cache = mtq.NVFP4_KV_CFG["quant_cfg"]
    config = mtq.utils.update_quant_cfg_with_kv_cache_quant(config, cache)
quantized = mtq.quantize(model, config, forward_loop=lambda model: model(tokens))
with torch.inference_mode():
    export_hf_checkpoint(quantized, export_dir=folder / "packed")

def decode(packed, scale, double_scale, dtype):
    shape = torch.Size((*packed.shape[:-1], 2 * packed.shape[-1]))
    tensor = NVFP4QTensor(shape, dtype, packed)
    sizes = {-1: 16}
    return tensor.dequantize(scale=scale, double_scale=double_scale, block_sizes=sizes, dtype=dtype)

tensors = load_file(folder / "packed" / "model.safetensors")
names = [name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")]
PARTS = ("weight", "weight_scale", "weight_scale_2")

def weights(dtype):
    return {name: decode(*(tensors[f"{name}.{part}"] for part in PARTS), dtype) for name in names}

save_file(weights(torch.bfloat16), folder / "weights")

# Its arithmetic of activations, with the tool's own functions, in a plain model.
plain = load(folder / "plain")

def quantize_input(module, scale, x):
    rows = x.float().reshape(-1, x.shape[-1])
    packed, block_scale, _ = NVFP4QTensor.quantize(rows, 16, None, scale)
    return decode(packed._quantized_data, block_scale, scale, torch.float32).reshape(x.shape)

for name, weight in weights(torch.float32).items():
    module = plain.get_submodule(name)
    def forward(x, module=module, weight=weight, scale=tensors.get(f"{name}.input_scale")):
        x = x if scale is None else quantize_input(module, scale, x)
        return (x.float() @ weight.T).to(torch.bfloat16)
    module.forward = forward
with torch.no_grad():
    result = plain(input_ids=random_tokens(2, 16, seed=1)).logits
save_file({"logits": result.contiguous()}, folder / "logits")
"""


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """Return a folder that nvidia-modelopt has filled, in a process of its own."""
    if importlib.util.find_spec("modelopt") is None:
        pytest.skip("nvidia-modelopt is not here")
    made: dict[tuple[str, str], Path] = {}

    def get(architecture: str, recipe: str) -> Path:
        if (architecture, recipe) not in made:
            folder = tmp_path_factory.mktemp("modelopt")
            paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
            done = subprocess.run(
                [sys.executable, "-c", WRITE, architecture, recipe, str(folder)],
                capture_output=True,
                text=True,
                env=os.environ | {"PYTHONPATH": paths, "SCALESWEEP_NO_AUTOLOAD": "1"},
            )
            if done.returncode == 77:
                pytest.skip(f"nvidia-modelopt cannot be imported: {done.stdout.strip()}")
            assert done.returncode == 0, done.stderr
            made[architecture, recipe] = folder
        return made[architecture, recipe]

    return get


REAL = [(a, "NVFP4_DEFAULT_CFG") for a in ("llama", "qwen3")] + [("llama", "W4A16_NVFP4_CFG")]


@pytest.mark.parametrize(("architecture", "recipe"), REAL)
def test_real_weights_decode_to_the_tools_own_bits(
    architecture: str, recipe: str, written: Callable[[str, str], Path]
) -> None:
    folder = written(architecture, recipe)
    model = load(folder / "packed")
    expected = load_file(folder / "weights")
    assert set(linears(model)) == set(expected)
    plain = model.dequantize()
    for name, weight in expected.items():
        assert torch.equal(plain.get_submodule(name).weight, weight), name
    reference = load(folder / "plain")
    for name, weight in expected.items():
        reference.get_submodule(name).weight.data = weight
    assert torch.equal(logits(plain), logits(reference))


@pytest.mark.parametrize(("architecture", "recipe"), REAL)
def test_real_logits_are_those_of_the_tools_own_arithmetic(
    architecture: str, recipe: str, written: Callable[[str, str], Path]
) -> None:
    folder = written(architecture, recipe)
    expected = load_file(folder / "logits")["logits"].float()
    actual = logits(load(folder / "packed")).float()
    unquantized = logits(load(folder / "plain")).float()
    # Sums are scaled in another order, then rounded to bfloat16.
    assert (actual - expected).square().mean() < 1e-3 * (unquantized - expected).square().mean()


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_real_logits_are_those_of_a_plain_definition_to_the_bit(
    architecture: str, written: Callable[[str, str], Path]
) -> None:
    folder = written(architecture, "NVFP4_DEFAULT_CFG")
    stored = load_file(folder / "packed" / "model.safetensors")
    reference = load(folder / "plain")
    for name, module in reference.named_modules():
        if f"{name}.input_scale" in stored:
            module.forward = by_definition(stored, name)
    loaded = load(folder / "packed")
    assert isinstance(loaded.model.layers[0].mlp.up_proj, NVFP4Linear)
    assert torch.equal(logits(loaded), logits(reference))


def by_definition(stored: dict[str, Tensor], name: str) -> Callable[[Tensor], Tensor]:
    """Return y = (x_q w_q^T) * (S_x * S_w): the input by AbsMax, the weight as it is stored."""
    packed = stored[f"{name}.weight"]
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2).long()
    signs = torch.where(codes >= 8, -1.0, 1.0)
    scales = stored[f"{name}.weight_scale"].float().repeat_interleave(16, dim=-1)
    weight = GRID[codes % 8] * signs * scales
    tensor_scale = stored[f"{name}.input_scale"]

    def forward(x: Tensor) -> Tensor:
        blocks = (x.float() / tensor_scale).reshape(-1, x.shape[-1] // 16, 16)
        largest = blocks.abs().amax(-1, keepdim=True)
        scale = (largest / 6).clamp(2**-9, 448).to(torch.float8_e4m3fn).float()
        magnitude = (blocks / scale).abs().double().unsqueeze(-1)
        distance = (magnitude - GRID).abs()
        # Of two codes that are equally near, the even one.
        nearest = (distance - 1e-9 * (torch.arange(8) % 2 == 0)).argmin(-1)
        values = GRID[nearest].copysign(blocks) * scale
        product = values.reshape(-1, x.shape[-1]) @ weight.T
        y = product * (tensor_scale * stored[f"{name}.weight_scale_2"])
        return y.reshape(*x.shape[:-1], -1).to(x.dtype)

    return forward


def test_real_scales_of_keys_and_values_load(written: Callable[[str, str], Path]) -> None:
    folder = written("qwen3", "NVFP4_DEFAULT_CFG+KV")
    stored = load_file(folder / "packed" / "model.safetensors")
    model = load(folder / "packed")
    for index, layer in enumerate(model.model.layers):
        prefix = f"model.layers.{index}.self_attn"
        for letter in "kv":
            expected = stored[f"{prefix}.{letter}_proj.{letter}_scale"].float() / 6
            assert torch.equal(getattr(layer.self_attn, f"{letter}_scale"), expected.reshape(()))
    assert torch.isfinite(logits(model)).all()
    cached = model.generate(
        INPUT, attention_mask=torch.ones_like(INPUT), max_new_tokens=3, do_sample=False
    )
    assert cached.shape[1] > INPUT.shape[1]


def test_real_scales_fit_the_states_that_they_scale(
    written: Callable[[str, str], Path],
) -> None:
    folder = written("qwen3", "NVFP4_DEFAULT_CFG+KV")
    plain = load(folder / "plain")
    config = ScaleSweepConfig(scheme="WAKV", objective="absmax", dataset=random_tokens(4, 32))
    ours = load(folder / "plain", quantization_config=config)
    theirs = load(folder / "packed")
    assert plain.config.num_hidden_layers == len(theirs.model.layers)
    for mine, other in zip(ours.model.layers, theirs.model.layers, strict=True):
        for name in ("k_scale", "v_scale"):
            torch.testing.assert_close(
                getattr(other.self_attn, name), getattr(mine.self_attn, name), rtol=1e-6, atol=0
            )


def test_compressed_tensors_checkpoints_are_left_to_transformers() -> None:
    from transformers.quantizers import auto

    kept = auto.AUTO_QUANTIZATION_CONFIG_MAPPING["compressed-tensors"]
    assert kept.__module__.startswith("transformers.")
