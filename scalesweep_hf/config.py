"""ScaleSweepConfig: every choice a user has, validated once, here."""

import copy
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers.utils.quantization_config import QuantizationConfigMixin

from scalesweep_hf.files import write_text
from scalesweep_hf.kernels import BACKENDS
from scalesweep_hf.names import source_name
from scalesweep_hf.ops.objectives import OBJECTIVES, RUNTIME_OBJECTIVES, check_objective
from scalesweep_hf.ops.sweep import Window, check_window

METHOD = "scalesweep"
# Tensor kinds, and the letter that stands for each in a scheme.
LETTERS = {"weights": "W", "activations": "A", "keys": "K", "values": "V", "queries": "Q"}
KINDS = tuple(LETTERS)
ALGORITHMS = ("rtn", "gptq", "gptq-plus")
SCHEMES = ("W", "WA", "WAKV", "WAKVQ")
# What a saved checkpoint adds to a user's choices.
RESOLVED = ("quantized_modules", "shared_inputs", "calibration", "version", "base_model")


class ScaleSweepConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """How to quantize a model to NVFP4, for ``from_pretrained(quantization_config=...)``.

    Args:
        scheme: "W" quantizes weights; "WA" weights and the inputs of the same Linears; "WAKV" also
            keys and values, after RoPE, once, when they enter the cache; "WAKVQ" also queries.
        objective: what chooses every block scale: "absmax" (max -> 6), "four_over_six" (max -> 6 or
            4), "mse" (least squared error), "wmse" (least importance-weighted squared error),
            "hessian" (least output error, channels of a block coupled; for weights: activations,
            keys, values and queries are then swept by "wmse").
        algorithm: "rtn" rounds weights to nearest; "gptq" rounds them column by column, each for
            what the others lost, against the inputs that the already quantized blocks make;
            "gptq-plus" also sweeps the scales of weights on the way (objective then says how
            everything else is swept), and moves its target towards the full-precision model's
            output, for which that model runs beside the quantized one.
        gptq_damping: added to the diagonal of a Hessian, in units of its mean, > 0 and <= 1; raised
            tenfold where a Hessian is not positive definite. None picks 0.01, and 0.1 for
            "gptq-plus".
        gptq_dtype: "float32" or "float64", of Hessians and GPTQ's linear algebra.
        pipeline: how a model is calibrated: "block" keeps the statistics of one block at a time and
            quantizes it before the next one sees its output; "model" runs the whole
            full-precision model; "auto" is "block" for "gptq" where the model allows it, else
            "model".
        propagate_quantized: whether, block by block, a block sees the quantized output of those
            before it; False: their full-precision output.
        offload_hidden_states: whether, block by block, the hidden states between blocks (rows x
            length x hidden size) are kept in CPU memory instead of on the device.
        resume_dir: folder for finished blocks; a second start with the same recipe goes on after
            the last of them and gives the same bytes. It may be deleted once the model is saved.
        window: of the sweep: "bounded", "exact" or E4M3 code offsets (low, high); see
            `sweep_scales`.
        overrides: other objectives by tensor kind, ``{"activations": "mse"}``, or by module name
            pattern (`fnmatch`), ``{"*.down_proj": "mse"}`` or ``{"*.down_proj": {"activations":
            None}}``. Patterns beat kinds, later patterns beat earlier ones; None leaves a kind
            unquantized. Keys, values and queries go by the names of attention modules.
        dataset: calibration data: "self" (the model writes it), a .jsonl, .json, .txt or .parquet
            path, a Hub data set "name[:config[:split]]", a list of strings, token ids [rows,
            length] as an integer tensor, or None where nothing needs calibration.
        num_samples: calibration rows at the most.
        sequence_length: tokens a row, clipped to what the model takes.
        seed: of the sampling or shuffling of calibration data.
        batch_size: calibration rows per forward pass; None picks 8, or as many as make 2**23
            elements of hidden states block by block, and 32 for writing text.
        statistics: path of a file that `Statistics.save` wrote; replaces calibration, so that
            weights are quantized as they are read and the full-precision model never exists in
            memory.
        modules_to_not_convert: name patterns of Linears to leave alone, besides output heads,
            routers and non-text towers; "!pattern" quantizes what would be left, for example
            "!lm_head".
        backend: "torch", or "triton", kernels for CUDA devices, and "numba", loops for CPUs, which
            also keeps weights there that are there; "auto" takes them where they run. They have the
            same bits, but for the order in which products and attention are summed. May differ when
            a saved checkpoint is loaded.
        packed_cache: with quantized keys and values, ``generate`` stores them packed, at 4.5 bits
            per element, unless given a cache; False keeps Transformers' own cache, with the same
            values. May differ when a saved checkpoint is loaded.
        dequantize: on loading a saved checkpoint, turn it back into plain Linears.
        kwargs: fields that saved checkpoints carry (`RESOLVED`); anything else raises.

    Raises:
        ValueError: a value is not as above, or two fields contradict each other.
        TypeError: a field is unknown.
    """

    def __init__(
        self,
        *,
        scheme: str = "WA",
        objective: str = "wmse",
        algorithm: str = "rtn",
        gptq_damping: float | None = None,
        gptq_dtype: str = "float32",
        pipeline: str = "auto",
        propagate_quantized: bool = True,
        offload_hidden_states: bool = False,
        resume_dir: str | os.PathLike[str] | None = None,
        window: Window | list[int] = "bounded",
        overrides: Mapping[str, Any] | None = None,
        dataset: str | Sequence[str] | Tensor | None = "self",
        num_samples: int = 128,
        sequence_length: int = 2048,
        seed: int = 0,
        batch_size: int | None = None,
        statistics: str | os.PathLike[str] | None = None,
        modules_to_not_convert: Sequence[str] | None = None,
        backend: str = "auto",
        packed_cache: bool = True,
        dequantize: bool = False,
        **kwargs: Any,
    ) -> None:
        """Validate every field; see the class."""
        self.quant_method = METHOD
        self.scheme = scheme
        self.objective = objective
        self.algorithm = algorithm
        self.gptq_damping = gptq_damping
        self.gptq_dtype = gptq_dtype
        self.pipeline = pipeline
        self.propagate_quantized = propagate_quantized
        self.offload_hidden_states = offload_hidden_states
        self.resume_dir = None if resume_dir is None else os.fspath(resume_dir)
        self.window: Window = tuple(window) if isinstance(window, list) else window  # type: ignore[assignment]
        if overrides is not None and not isinstance(overrides, Mapping):
            raise ValueError(f"overrides is {overrides!r}; expected a mapping to objectives")
        self.overrides = copy.deepcopy(dict(overrides or {}))
        self.dataset = dataset
        self.num_samples = num_samples
        self.sequence_length = sequence_length
        self.seed = seed
        self.batch_size = batch_size
        if statistics is not None and not isinstance(statistics, str | os.PathLike):
            raise ValueError(
                f"statistics is a {type(statistics).__name__}; save it and pass the file's path"
            )
        self.statistics = None if statistics is None else os.fspath(statistics)
        self.modules_to_not_convert = modules_to_not_convert
        self.backend = backend
        self.packed_cache = packed_cache
        self.dequantize = dequantize
        self.quantized_modules: list[str] | None = None
        self.shared_inputs: list[list[str]] | None = None
        self.calibration: dict[str, Any] | None = None
        self.version: str | None = None
        self.base_model: str | None = None
        self._take_resolved(kwargs)
        self.validate()

    def _take_resolved(self, fields: dict[str, Any]) -> None:
        fields = dict(fields)
        method = fields.pop("quant_method", METHOD)
        if method != METHOD:
            raise ValueError(f"quant_method is {method!r}; ScaleSweepConfig is for {METHOD!r}")
        for name in RESOLVED:
            setattr(self, name, fields.pop(name, None))
        if fields:
            known = [name for name in self.to_dict() if name not in (*RESOLVED, "quant_method")]
            raise TypeError(f"unknown fields {sorted(fields)}; ScaleSweepConfig takes {known}")

    def validate(self) -> None:
        """Raise ValueError, with the value and the remedy, for the first field that is wrong."""
        _check_choice("scheme", self.scheme, SCHEMES)
        _check_choice("objective", self.objective, tuple(OBJECTIVES))
        _check_choice("algorithm", self.algorithm, ALGORITHMS)
        _check_choice("gptq_dtype", self.gptq_dtype, ("float32", "float64"))
        _check_choice("pipeline", self.pipeline, ("auto", "block", "model"))
        _check_choice("backend", self.backend, BACKENDS)
        if self.window not in ("bounded", "exact"):
            check_window(self.window)
        damping = self.gptq_damping
        if damping is not None and not (type(damping) in (int, float) and 0 < damping <= 1):
            raise ValueError(f"gptq_damping is {damping!r}; it must be > 0 and <= 1")
        for name in (
            *("dequantize", "packed_cache"),
            *("propagate_quantized", "offload_hidden_states"),
        ):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name} is {getattr(self, name)!r}; use True or False")
        for name in ("num_samples", "sequence_length", "batch_size"):
            value = getattr(self, name)
            optional = name == "batch_size" and value is None
            if not optional and not (type(value) is int and value > 0):
                raise ValueError(f"{name} is {value!r}; it must be an integer > 0")
        if type(self.seed) is not int or self.seed < 0:
            raise ValueError(f"seed is {self.seed!r}; it must be an integer >= 0")
        _check_names("modules_to_not_convert", self.modules_to_not_convert)
        self._check_overrides()
        self._check_dataset()
        self._check_pipeline()

    def _check_overrides(self) -> None:
        for key, value in self.overrides.items():
            field = f"overrides[{key!r}]"
            if key in KINDS:
                self._check_override(field, key, value)
            elif isinstance(value, Mapping):
                for kind, objective in value.items():
                    self._check_override(field, kind, objective)
            else:
                self._check_override(field, "weights", value)

    def _check_override(self, field: str, kind: str, objective: Any) -> None:
        if kind not in KINDS:
            raise ValueError(f"{field} names {kind!r}; tensor kinds are {', '.join(KINDS)}")
        if objective is None and kind == "weights":
            raise ValueError(f"{field} turns weights off: use modules_to_not_convert for that")
        if objective is None:
            return
        if not isinstance(objective, str):
            raise ValueError(f"{field} is {objective!r}; use one of {', '.join(OBJECTIVES)}")
        check_objective(objective)
        if kind != "weights" and objective not in RUNTIME_OBJECTIVES:
            raise ValueError(
                f"{field} is {objective!r} for {kind}; it is for weights: use one of "
                f"{', '.join(RUNTIME_OBJECTIVES)}"
            )
        if LETTERS[kind] not in self.scheme:
            wider = next(scheme for scheme in SCHEMES if LETTERS[kind] in scheme)
            raise ValueError(
                f"{field} sets {kind} to {objective!r}, but scheme {self.scheme!r} leaves them "
                f"unquantized: use scheme {wider!r}"
            )

    def _check_dataset(self) -> None:
        data = self.dataset
        if not _is_dataset(data):
            raise ValueError(
                f"dataset is {data!r:.80}; use 'self', a file, a Hub name, a list of strings or an "
                "integer tensor of token ids [rows, length]"
            )
        unused = data is None or (isinstance(data, str) and data == "self")
        if self.statistics is not None and not unused:
            raise ValueError("dataset and statistics are both given: drop one of them")
        known = self.quantized_modules is not None or self.calibration is not None
        if data is None and self.needs_calibration and not known:
            raise ValueError(
                f"scheme {self.scheme!r} with objective {self.objective!r} needs calibration, but "
                "dataset is None: use dataset='self', or scheme 'W' with objective 'mse'"
            )

    def _check_pipeline(self) -> None:
        if self.uses_hessians and self.statistics is not None:
            raise ValueError(
                f"algorithm {self.algorithm!r} needs whole Hessians, which statistics do not hold: "
                "drop statistics and pass dataset"
            )
        if self.algorithm == "gptq-plus" and not self.propagate_quantized:
            raise ValueError(
                "propagate_quantized is False, but algorithm 'gptq-plus' quantizes in order: drop "
                "it, or use algorithm 'gptq'"
            )
        if self.algorithm == "gptq-plus" and self.pipeline == "model":
            raise ValueError(
                "pipeline is 'model', but algorithm 'gptq-plus' quantizes block by block: drop it, "
                "or use algorithm 'gptq'"
            )
        if not self.uses_hessians:
            unused: dict[str, Any] = {"gptq_damping": None, "gptq_dtype": "float32"}
            for name, default in unused.items():
                if getattr(self, name) != default:
                    raise ValueError(
                        f"{name} is {getattr(self, name)!r}, but algorithm is 'rtn': drop it, or "
                        "use algorithm 'gptq'"
                    )
        if self.quantized_modules is not None or self.block_by_block:
            return
        fields = {"resume_dir": None, "offload_hidden_states": False, "propagate_quantized": True}
        if self.pipeline == "block":
            raise ValueError(
                "pipeline is 'block', but nothing is calibrated: drop it, or drop statistics"
            )
        for name, default in fields.items():
            if getattr(self, name) != default:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, but nothing is quantized block by block: "
                    "drop it, or use algorithm 'gptq' or pipeline 'block'"
                )

    def objective_for(self, kind: str, applies: Callable[[str], bool]) -> str | None:
        """Return the objective of one tensor kind in one module, overrides applied.

        Args:
            kind: "weights", "activations", "keys", "values" or "queries".
            applies: whether a name pattern matches the module.

        Returns:
            The objective; None where the tensor stays unquantized.
        """
        if LETTERS[kind] not in self.scheme:
            return None
        chosen: str | None = self.overrides.get(kind, self.objective)
        for pattern in self.override_patterns:
            if applies(pattern):
                value = self.overrides[pattern]
                chosen = value.get(kind, chosen) if isinstance(value, Mapping) else value
        if chosen is not None and kind != "weights" and chosen not in RUNTIME_OBJECTIVES:
            return "wmse"
        return chosen

    @property
    def override_patterns(self) -> list[str]:
        """The keys of ``overrides`` that are module name patterns."""
        return [key for key in self.overrides if key not in KINDS]

    @property
    def needs_calibration(self) -> bool:
        """Whether activations must be seen before weights can be quantized."""
        if self.statistics is not None:
            return False
        runtime = [kind for kind in KINDS if kind != "weights" and LETTERS[kind] in self.scheme]
        if self.uses_hessians or any(self._possible(kind) != {None} for kind in runtime):
            return True
        weights = [OBJECTIVES[name] for name in self._possible("weights") if name]
        return any(objective.weighted or objective.coupled for objective in weights)

    @property
    def needs_local_hessian(self) -> bool:
        """Whether some weights are swept by the couplings inside blocks."""
        if self.algorithm == "gptq-plus":  # sweeps them by the whole Hessian
            return False
        return any(OBJECTIVES[name].coupled for name in self._possible("weights") if name)

    @property
    def block_by_block(self) -> bool:
        """Whether blocks are calibrated and quantized in order, where the model allows it."""
        by_default = self.pipeline == "auto" and self.uses_hessians
        return self.needs_calibration and (by_default or self.pipeline == "block")

    @property
    def uses_hessians(self) -> bool:
        """Whether weights are rounded by the whole Hessian of their input."""
        return self.algorithm != "rtn"

    @property
    def damping(self) -> float:
        """The damping of Hessians, the default resolved."""
        if self.gptq_damping is not None:
            return self.gptq_damping
        return 0.1 if self.algorithm == "gptq-plus" else 0.01

    @property
    def in_order(self) -> bool:
        """Whether, inside a block, a Linear sees the quantized output of those before it."""
        return self.algorithm == "gptq-plus"

    def _possible(self, kind: str) -> set[str | None]:
        """Return every objective that some module may get for a kind."""
        values = {self.overrides.get(kind, self.objective)}
        for pattern in self.override_patterns:
            value = self.overrides[pattern]
            if not isinstance(value, Mapping):
                values.add(value)
            elif kind in value:
                values.add(value[kind])
        return values

    def get_loading_attributes(self) -> dict[str, Any]:
        """Return the fields that may differ when a saved checkpoint is loaded."""
        names = ("backend", "packed_cache", "dequantize")
        return {name: getattr(self, name) for name in names}

    def to_dict(self) -> dict[str, Any]:
        """Return JSON types only; calibration data held in memory becomes None."""
        fields = {name: value for name, value in self.__dict__.items() if name != "dataset"}
        fields = copy.deepcopy(fields)
        fields["dataset"] = self.dataset if isinstance(self.dataset, str) else None
        del fields["dequantize"]  # said when loading, never of a checkpoint
        if self.quantized_modules is not None:  # a checkpoint, which tells nobody's paths
            fields["statistics"] = fields["resume_dir"] = None
            fields["backend"] = "auto"  # whoever loads it has other devices
            fields["dataset"] = fields["dataset"] and source_name(fields["dataset"])
        fields["window"] = list(self.window) if isinstance(self.window, tuple) else self.window
        if self.modules_to_not_convert is not None:
            fields["modules_to_not_convert"] = list(self.modules_to_not_convert)
        return fields

    def __iter__(self) -> Any:
        """Iterate over the items of `to_dict`, as Transformers does with quantization configs."""
        yield from self.to_dict().items()

    def __deepcopy__(self, memo: dict[int, Any]) -> "ScaleSweepConfig":
        """Copy every choice; share the calibration data, which nobody changes."""
        result = object.__new__(type(self))
        memo[id(self)] = result
        for name, value in self.__dict__.items():
            result.__dict__[name] = value if name == "dataset" else copy.deepcopy(value, memo)
        return result

    def __eq__(self, other: object) -> bool:
        """Compare what a checkpoint records."""
        return isinstance(other, ScaleSweepConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """Build a config from `to_dict`'s fields, replaced by those of kwargs that are fields.

        Returns:
            The config; with return_unused_kwargs also the kwargs that are no fields.
        """
        known = {name: kwargs.pop(name) for name in list(kwargs) if name in cls.choices()}
        config = cls(**(config_dict | known))
        return (config, kwargs) if return_unused_kwargs else config

    @classmethod
    def choices(cls) -> tuple[str, ...]:
        """Return the names of the fields that a user chooses."""
        names = inspect.signature(cls.__init__).parameters
        return tuple(name for name in names if name not in ("self", "kwargs"))

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str]) -> "ScaleSweepConfig":
        """Read keyword arguments from a YAML file.

        Raises:
            ValueError: the file holds no mapping, or a value is wrong.
            TypeError: a field is unknown.
        """
        fields = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        if not isinstance(fields, dict):
            raise ValueError(f"{path} holds a {type(fields).__name__}; expected keyword arguments")
        return cls(**fields)

    def to_yaml(self, path: str | os.PathLike[str]) -> None:
        """Write `to_dict` as YAML; the file appears under its name only when whole."""
        write_text(Path(path), yaml.safe_dump(self.to_dict(), sort_keys=False))


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; use one of {', '.join(choices)}")


def _is_dataset(data: Any) -> bool:
    if isinstance(data, Tensor):
        return data.ndim == 2 and data.dtype in (torch.int16, torch.int32, torch.int64)
    return data is None or (
        isinstance(data, Sequence) and len(data) > 0 and all(isinstance(text, str) for text in data)
    )


def _check_names(field: str, names: Any) -> None:
    if names is None:
        return
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{field} is {names!r}; expected a list of module name patterns")
