import copy
import fnmatch
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from scalesweep_hf import ScaleSweepConfig
from scalesweep_hf.config import RESOLVED

TOKENS = torch.arange(6).reshape(2, 3)
TEXTS = ["one text", "another"]
CONFIGS = [
    path
    for path in sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
    if path.stem not in ("paper", "offline")  # plans of tables
]

FULL: dict[str, Any] = {
    "scheme": "WA",
    "objective": "four_over_six",
    "algorithm": "gptq",
    "gptq_damping": 0.05,
    "gptq_dtype": "float64",
    "pipeline": "block",
    "propagate_quantized": False,
    "offload_hidden_states": True,
    "resume_dir": None,
    "window": (-5, 6),
    "overrides": {"activations": "mse", "*.down_proj": {"weights": "wmse", "activations": None}},
    "dataset": "org/name:config:split",
    "num_samples": 3,
    "sequence_length": 77,
    "seed": 5,
    "batch_size": 2,
    "statistics": None,
    "modules_to_not_convert": ["lm_head", "*.gate"],
    "backend": "auto",
    "packed_cache": False,
    "quantized_modules": ["layers.0.up_proj"],
    "shared_inputs": [["layers.0.up_proj", "layers.0.gate_proj"]],
    "calibration": {"source": "self", "num_samples": 3},
    "version": "0.1.0",
    "base_model": "org/model",
}
EXAMPLES: list[dict[str, Any]] = [
    {},
    {"scheme": "W", "objective": "mse", "dataset": None},
    {"window": "exact"},
    {"window": [-3, 7]},
    FULL,
]


@pytest.mark.parametrize("fields", EXAMPLES)
def test_dict_json_and_yaml_round_trip(fields: dict[str, Any], tmp_path: Path) -> None:
    config = ScaleSweepConfig(**fields)
    as_dict = config.to_dict()
    config.to_yaml(tmp_path / "config.yaml")
    config.to_json_file(tmp_path / "config.json")
    copies = [
        ScaleSweepConfig.from_dict(as_dict),
        ScaleSweepConfig(**json.loads(config.to_json_string())),
        ScaleSweepConfig(**json.loads((tmp_path / "config.json").read_text())),
        ScaleSweepConfig.from_yaml(tmp_path / "config.yaml"),
        ScaleSweepConfig(**dict(config)),
    ]
    for other in copies:
        assert other == config
        assert other.__dict__ == config.__dict__
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "config.yaml"]


def test_every_field_is_kept() -> None:
    written = ScaleSweepConfig(**FULL).to_dict()
    assert written == {**FULL, "window": [-5, 6], "quant_method": "scalesweep"}
    assert json.loads(json.dumps(written)) == written


def test_a_checkpoint_leaves_the_backend_to_whoever_loads_it() -> None:
    config = ScaleSweepConfig(**copy.deepcopy(FULL) | {"backend": "torch"})
    assert config.to_dict()["backend"] == "auto"
    config.quantized_modules = None
    assert config.to_dict()["backend"] == "torch"


def test_to_dict_shares_nothing_with_the_config() -> None:
    config = ScaleSweepConfig(**copy.deepcopy(FULL))
    written = config.to_dict()
    written["overrides"]["*.down_proj"]["weights"] = "mse"
    written["modules_to_not_convert"].append("all")
    written["quantized_modules"].clear()
    assert config.to_dict() == {**FULL, "window": [-5, 6], "quant_method": "scalesweep"}


def test_the_users_overrides_are_not_shared() -> None:
    overrides: dict[str, Any] = {"activations": "mse"}
    config = ScaleSweepConfig(overrides=overrides)
    overrides["activations"] = "absmax"
    assert config.overrides == {"activations": "mse"}


@pytest.mark.parametrize("dataset", [TOKENS, TEXTS, tuple(TEXTS)])
def test_calibration_data_in_memory_is_not_written(dataset: Any) -> None:
    config = ScaleSweepConfig(dataset=dataset)
    assert config.dataset is dataset
    assert config.to_dict()["dataset"] is None
    assert json.loads(config.to_json_string())["dataset"] is None


@pytest.mark.parametrize("dataset", [TOKENS, TEXTS])
def test_deepcopy_shares_the_data_and_copies_the_rest(dataset: Any) -> None:
    config = ScaleSweepConfig(**{**FULL, "dataset": dataset})
    other = copy.deepcopy(config)
    assert type(other) is ScaleSweepConfig
    assert other == config
    assert other.dataset is dataset
    for name in ("overrides", "modules_to_not_convert", "quantized_modules", "calibration"):
        assert getattr(other, name) == getattr(config, name)
        assert getattr(other, name) is not getattr(config, name)
    assert other.overrides["*.down_proj"] is not config.overrides["*.down_proj"]


def test_equality_sees_every_field() -> None:
    default = ScaleSweepConfig()
    assert default == ScaleSweepConfig()
    assert default != ScaleSweepConfig(seed=1)
    assert default != ScaleSweepConfig(window="exact")
    assert default != default.to_dict()


@pytest.mark.parametrize("name", ["schema", "group_size", "_scheme", "validate"])
def test_unknown_fields_raise_with_their_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=rf"unknown fields \['{name}'\].*'scheme'.*'dataset'"):
        ScaleSweepConfig.from_dict({name: 1})
    (tmp_path / "c.yaml").write_text(f"{name}: 1")
    with pytest.raises(TypeError, match=name):
        ScaleSweepConfig.from_yaml(tmp_path / "c.yaml")


def test_fields_are_keyword_only() -> None:
    constructor: Any = ScaleSweepConfig
    with pytest.raises(TypeError, match="positional"):
        constructor("W")


def test_resolved_fields_start_empty() -> None:
    assert [getattr(ScaleSweepConfig(), name) for name in RESOLVED] == [None] * len(RESOLVED)


WRONG = [
    ({"scheme": "WAK"}, "scheme is 'WAK'; use one of W, WA, WAKV, WAKVQ"),
    ({"packed_cache": "yes"}, "packed_cache is 'yes'; use True or False"),
    ({"overrides": ["mse"]}, r"overrides is \['mse'\]; expected a mapping"),
    ({"statistics": 3}, "statistics is a int; save it and pass the file's path"),
    ({"statistics": "x", "dataset": TOKENS}, "dataset and statistics are both given"),
    ({"overrides": {"keys": "mse"}}, "scheme 'WA' leaves them unquantized: use scheme 'WAKV'"),
    ({"scheme": "WAKV", "overrides": {"queries": "mse"}}, "use scheme 'WAKVQ'"),
    ({"scheme": "A"}, "scheme is 'A'; use one of W, WA, WAKV, WAKVQ"),
    ({"scheme": "wa"}, "scheme is 'wa'"),
    ({"algorithm": "gptq", "dataset": None}, "needs calibration, but dataset is None"),
    ({"algorithm": "gptq", "statistics": "x"}, "needs whole Hessians.*drop statistics"),
    ({"algorithm": "gptq-plus", "propagate_quantized": False}, "quantizes in order: drop it"),
    ({"algorithm": "gptq-plus", "statistics": "x"}, "'gptq-plus' needs whole Hessians"),
    ({"algorithm": "gptq-plus", "pipeline": "model"}, "quantizes block by block: drop it"),
    ({"gptq_damping": 0.5}, "gptq_damping is 0.5, but algorithm is 'rtn'"),
    ({"gptq_dtype": "float64"}, "gptq_dtype is 'float64', but algorithm is 'rtn'"),
    ({"gptq_damping": 0}, "gptq_damping is 0; it must be > 0 and <= 1"),
    ({"gptq_damping": 1.5}, "gptq_damping is 1.5"),
    ({"gptq_damping": float("nan")}, "gptq_damping is nan"),
    ({"gptq_dtype": "bfloat16"}, "gptq_dtype is 'bfloat16'; use one of float32, float64"),
    ({"pipeline": "blocks"}, "pipeline is 'blocks'; use one of auto, block, model"),
    ({"pipeline": "block", "statistics": "x"}, "pipeline is 'block', but nothing is calibrated"),
    ({"resume_dir": "x"}, "resume_dir is 'x', but nothing is quantized block by block"),
    ({"propagate_quantized": False}, "propagate_quantized is False, but nothing"),
    ({"offload_hidden_states": 1}, "offload_hidden_states is 1; use True or False"),
    ({"overrides": {"activations": "hessian"}}, "'hessian' for activations; it is for weights"),
    ({"overrides": {"*.up": {"activations": "hessian"}}}, "it is for weights: use one of absmax"),
    ({"algorithm": "awq"}, "algorithm is 'awq'"),
    ({"objective": "best"}, "objective is 'best'; use one of absmax, four_over_six, mse, wmse"),
    ({"objective": None}, "objective is None"),
    ({"backend": "cuda"}, "backend is 'cuda'; use one of auto, torch, triton, numba"),
    ({"num_samples": 0}, "num_samples is 0; it must be an integer > 0"),
    ({"num_samples": True}, "num_samples is True"),
    ({"num_samples": 2.0}, "num_samples is 2.0"),
    ({"num_samples": None}, "num_samples is None"),
    ({"sequence_length": -1}, "sequence_length is -1"),
    ({"batch_size": 0}, "batch_size is 0"),
    ({"batch_size": "8"}, "batch_size is '8'"),
    ({"seed": -1}, "seed is -1; it must be an integer >= 0"),
    ({"seed": False}, "seed is False"),
    ({"window": (1, 2)}, r"window is \(1, 2\).*low <= 0 <= high"),
    ({"window": [-3]}, r"window is \(-3,\)"),
    ({"window": (-3, 7.0)}, r"window is \(-3, 7.0\)"),
    ({"window": "all"}, "window is 'all'; use 'bounded', 'exact'"),
    ({"window": None}, "window is None"),
    ({"window": 7}, "window is 7"),
    ({"overrides": {"*.up": {"key": "mse"}}}, r"overrides\['\*.up'\] names 'key'; tensor kinds"),
    ({"overrides": {"activations": "best"}}, "objective is 'best'"),
    ({"overrides": {"*.up": {"weights": "best"}}}, "objective is 'best'"),
    ({"overrides": {"weights": None}}, r"overrides\['weights'\] turns weights off: use modules_"),
    ({"overrides": {"*.up": None}}, r"\['\*.up'\] turns weights off: use modules_to_not_convert"),
    ({"overrides": {"*.up": {"weights": None}}}, "turns weights off"),
    ({"scheme": "W", "overrides": {"activations": "mse"}}, "scheme 'W' leaves them unquantized"),
    ({"scheme": "W", "overrides": {"*.up": {"activations": "mse"}}}, "use scheme 'WA'"),
    ({"overrides": {"*.up": ["mse"]}}, r"\['mse'\]; use one of absmax"),
    ({"overrides": {"weights": {"weights": "mse"}}}, "weights"),
    ({"overrides": {"keys": "mse"}}, "keys"),
    ({"modules_to_not_convert": "lm_head"}, "'lm_head'; expected a list of module name patterns"),
    ({"modules_to_not_convert": [1]}, r"modules_to_not_convert is \[1\]"),
    ({"dataset": TOKENS.float()}, "use 'self', a file.*integer tensor of token ids"),
    ({"dataset": TOKENS > 1}, r"dataset is tensor\(\[\[False"),
    ({"dataset": TOKENS[0]}, r"token ids \[rows, length\]"),
    ({"dataset": []}, r"dataset is \[\]; use 'self', a file"),
    ({"dataset": ["text", 1]}, "dataset is .*a list of strings"),
    ({"dataset": ""}, "dataset is ''"),
    ({"dataset": 5}, "dataset is 5"),
    ({"dataset": None}, "scheme 'WA' with objective 'wmse' needs calibration, but dataset is None"),
    ({"dataset": None, "objective": "mse"}, "needs calibration.*use dataset='self', or scheme 'W'"),
    ({"dataset": None, "scheme": "W"}, "'W' with objective 'wmse' needs calibration"),
    ({"quant_method": "gptq"}, "quant_method is 'gptq'; ScaleSweepConfig is for 'scalesweep'"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG)
def test_wrong_values_raise_with_value_and_remedy(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScaleSweepConfig(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"dataset": TOKENS.to(torch.int32)},
        {"dataset": tuple(TEXTS)},
        {"dataset": None, "statistics": Path("s.safetensors")},
        {"dataset": None, "quantized_modules": ["layers.0.up_proj"]},
        {"dataset": None, "scheme": "W", "objective": "absmax"},
        {"scheme": "W", "overrides": {"activations": None}},
        {"modules_to_not_convert": []},
        {"window": (0, 0)},
        {"seed": 0, "batch_size": None},
        {"quant_method": "scalesweep"},
        {"algorithm": "gptq", "resume_dir": "x", "offload_hidden_states": True},
        {"pipeline": "block", "resume_dir": "x", "propagate_quantized": False},
        {"objective": "hessian", "scheme": "WAKVQ"},
    ],
)
def test_right_values_pass(fields: dict[str, Any]) -> None:
    ScaleSweepConfig(**fields).validate()


def applies(pattern: str) -> bool:
    return fnmatch.fnmatchcase("layers.0.up", pattern)


@pytest.mark.parametrize(
    ("overrides", "weights", "activations"),
    [
        ({}, "wmse", "wmse"),
        ({"activations": "mse"}, "wmse", "mse"),
        ({"weights": "mse", "activations": None}, "mse", None),
        ({"*.up": "mse"}, "mse", "mse"),
        ({"*.down": "mse"}, "wmse", "wmse"),
        ({"*.up": {"activations": "mse"}}, "wmse", "mse"),
        ({"*.up": {"activations": None}}, "wmse", None),
        # Patterns beat kinds, in whatever order.
        ({"*.up": "mse", "activations": "absmax"}, "mse", "mse"),
        ({"activations": None, "*.up": "mse"}, "mse", "mse"),
        ({"activations": None, "*.up": {"weights": "mse"}}, "mse", None),
        # Later patterns beat earlier ones, kind by kind.
        ({"*": "absmax", "*.up": "mse"}, "mse", "mse"),
        ({"*.up": "mse", "*": "absmax"}, "absmax", "absmax"),
        ({"*": "absmax", "*.up": {"activations": "mse"}}, "absmax", "mse"),
        ({"*.up": {"weights": "mse"}, "*.u?": {"activations": None}}, "mse", None),
        ({"*.UP": "mse"}, "wmse", "wmse"),
        # Couplings are known of weights alone.
        ({"*.up": "hessian"}, "hessian", "wmse"),
        ({"weights": "hessian"}, "hessian", "wmse"),
    ],
)
def test_the_most_specific_override_wins(
    overrides: dict[str, Any], weights: str, activations: str | None
) -> None:
    config = ScaleSweepConfig(overrides=overrides)
    assert config.objective_for("weights", applies) == weights
    assert config.objective_for("activations", applies) == activations


def test_scheme_w_leaves_activations_whatever_the_overrides() -> None:
    config = ScaleSweepConfig(scheme="W", overrides={"*.up": "mse"})
    assert config.objective_for("activations", applies) is None
    assert config.objective_for("weights", applies) == "mse"


@pytest.mark.parametrize(
    ("fields", "needed"),
    [
        ({"scheme": "W", "objective": "absmax"}, False),
        ({"scheme": "W", "objective": "four_over_six"}, False),
        ({"scheme": "W", "objective": "mse"}, False),
        ({"scheme": "W", "objective": "wmse"}, True),
        ({"scheme": "WA", "objective": "absmax"}, True),
        ({"scheme": "WA", "objective": "mse"}, True),
        ({"scheme": "WA", "objective": "wmse"}, True),
        ({"scheme": "WA", "objective": "wmse", "statistics": "file"}, False),
        ({"scheme": "W", "objective": "wmse", "overrides": {"weights": "mse"}}, False),
        ({"scheme": "W", "objective": "mse", "overrides": {"weights": "wmse"}}, True),
        ({"scheme": "W", "objective": "mse", "overrides": {"*.up": "wmse"}}, True),
        ({"scheme": "W", "objective": "mse", "overrides": {"*.up": {"weights": "wmse"}}}, True),
        ({"scheme": "W", "objective": "mse", "overrides": {"*.up": {"activations": None}}}, False),
        ({"scheme": "W", "objective": "wmse", "overrides": {"*.up": "mse"}}, True),
    ],
)
def test_calibration_is_needed_for_activations_and_weighted_weights(
    fields: dict[str, Any], needed: bool
) -> None:
    assert ScaleSweepConfig(**fields).needs_calibration is needed


def test_loading_attributes_are_what_a_reload_may_change() -> None:
    config = ScaleSweepConfig(backend="torch", dequantize=True, packed_cache=False)
    assert config.get_loading_attributes() == {
        "backend": "torch",
        "packed_cache": False,
        "dequantize": True,
    }
    assert "dequantize" not in config.to_dict()


def test_a_checkpoint_tells_nobodys_paths() -> None:
    config = ScaleSweepConfig(dataset="/home/me/notes.jsonl")
    assert config.to_dict()["dataset"] == "/home/me/notes.jsonl"
    config.quantized_modules = ["layers.0.up"]
    assert config.to_dict()["dataset"] == "notes.jsonl"
    config = ScaleSweepConfig(statistics="/home/me/s.safetensors")
    config.quantized_modules = ["layers.0.up"]
    assert config.to_dict()["statistics"] is None


@pytest.mark.parametrize("text", ["", "- a", "text"])
def test_yaml_without_a_mapping_raises(text: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"c\.yaml holds a .*; expected keyword arguments"):
        ScaleSweepConfig.from_yaml(tmp_path / "c.yaml")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_configs_of_the_repository_load(path: Path) -> None:
    scheme = yaml.safe_load(path.read_text())["scheme"]
    assert ScaleSweepConfig.from_yaml(path).scheme == scheme
