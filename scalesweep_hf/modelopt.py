"""Load NVFP4 checkpoints that nvidia-modelopt wrote, whose layout of tensors is ours.

What differs is how config.json describes them, that it lists the modules left out instead of those
quantized, and where the scales of keys and values are. Once loaded and saved, they are ours.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.utils import cached_file

from scalesweep_hf.checkpoint import read_header
from scalesweep_hf.config import ScaleSweepConfig
from scalesweep_hf.names import canonical_name, matches
from scalesweep_hf.ops.sweep import BLOCK
from scalesweep_hf.version import __version__

METHOD = "modelopt"
# Activations, keys and values are quantized at run time, by AbsMax under a static tensor scale.
OBJECTIVE = "absmax"
SCHEMES = {"NVFP4": "WA", "W4A16_NVFP4": "W"}


class ModelOptConfig:
    """What Transformers finds under "modelopt"; it makes a `ScaleSweepConfig`."""

    @staticmethod
    def from_dict(
        config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """Translate the ``quantization_config`` of a config.json.

        Args:
            config_dict: in either form that ModelOpt writes, flat or as hf_quant_config.json.
            return_unused_kwargs: whether to return kwargs too.
            kwargs: not looked at.

        Returns:
            A config whose ``quantized_modules`` are None until the model is known
            (`packed_modules`); with return_unused_kwargs also kwargs.

        Raises:
            ValueError: names the algorithm, the cache format or the block size that is not
                supported.
        """
        fields = dict(config_dict.get("quantization") or config_dict)
        scheme = _scheme(fields)
        overrides: dict[str, Any] = {}
        if _quantizes_cache(fields):
            overrides = {} if scheme == "WA" else {"activations": None}
            scheme = "WAKV"
        producer = fields.get("producer") or config_dict.get("producer") or {}
        source = " ".join(str(producer[key]) for key in ("name", "version") if key in producer)
        config = ScaleSweepConfig(
            scheme=scheme,
            objective=OBJECTIVE,
            overrides=overrides,
            dataset=None,
            modules_to_not_convert=fields.get("exclude_modules") or fields.get("ignore"),
            calibration={"source": source or METHOD},
            version=__version__,
        )
        return (config, kwargs) if return_unused_kwargs else config


def quantization_config(model: str | os.PathLike[str], **kwargs: Any) -> dict[str, Any]:
    """Read what a checkpoint says in hf_quant_config.json, for a config.json that does not.

    Args:
        model: folder or Hub id.
        kwargs: of `transformers.utils.cached_file`, for example ``revision``.

    Returns:
        The value for ``config.quantization_config``.

    Raises:
        OSError: there is no such file.
    """
    file = cached_file(os.fspath(model), "hf_quant_config.json", **kwargs)
    return {**json.loads(Path(file).read_text(encoding="utf-8")), "quant_method": METHOD}


def _scheme(fields: Mapping[str, Any]) -> str:
    algorithm = fields.get("quant_algo")
    if algorithm not in SCHEMES:
        raise ValueError(
            f"quant_algo is {algorithm!r}; of ModelOpt's checkpoints this package loads "
            f"{' and '.join(SCHEMES)}: quantize the original model instead, or serve this "
            "checkpoint with an engine that reads it"
        )
    groups = (fields.get("config_groups") or {}).values()
    tensors = [part for group in groups for part in group.values() if isinstance(part, Mapping)]
    for size in (part.get("group_size") for part in (fields, *tensors)):
        if size not in (None, BLOCK):
            raise ValueError(
                f"group_size is {size}; NVFP4 has blocks of {BLOCK}: quantize the original model "
                "instead"
            )
    return SCHEMES[algorithm]


def _quantizes_cache(fields: Mapping[str, Any]) -> bool:
    name = next((n for n in ("kv_cache_quant_algo", "kv_cache_scheme") if fields.get(n)), None)
    if name is None:
        return False
    value = fields[name]
    if value != "NVFP4":
        raise ValueError(
            f"{name} is {value!r}; this package quantizes keys and values to NVFP4 alone: remove "
            f"{name} from config.json, and keys and values stay as they are"
        )
    return True


def packed_modules(
    model: PreTrainedModel, ignored: Iterable[str] | None, files: Iterable[str]
) -> list[str]:
    """Name the Linears that a checkpoint of ModelOpt holds packed.

    Args:
        model: on the meta device.
        ignored: name patterns that config.json excludes.
        files: paths of all shards, if they are known.

    Returns:
        Canonical names, in model order: of all Linears that are not excluded, and of which there is
        a weight if files are known (a head that the checkpoint lacks is made anew).

    Raises:
        ValueError: names a packed module that is excluded, or is no Linear of this model.
    """
    ignored = list(ignored or ())
    linears = {
        canonical_name(model, name): any(matches(model, name, pattern) for pattern in ignored)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    stored = {canonical_name(model, name) for file in files for name in read_header(Path(file))}
    for name in sorted(stored):
        if not name.endswith(".weight_scale"):
            continue
        owner = name.removesuffix(".weight_scale")
        if owner not in linears:
            raise ValueError(
                f"tensor {name} is stored, but {owner} is no torch.nn.Linear of "
                f"{type(model).__name__}: fused experts and other modules cannot be loaded packed"
            )
        if linears[owner]:
            raise ValueError(
                f"tensor {name} is stored, but config.json excludes {owner}: they are of "
                "different checkpoints"
            )
    return [
        name
        for name, excluded in linears.items()
        if not excluded and (not stored or f"{name}.weight" in stored)
    ]


class OverSix(ConversionOps):  # type: ignore[misc]
    """Divide by 6: ModelOpt keeps max|k| / 448, the tensor scale is max|k| / (448 * 6)."""

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Divide every tensor, under the name it is to get."""
        (value,) = input_dict.values()
        (target,) = kwargs["target_patterns"]
        return {target: (value[0] if isinstance(value, list) else value) / 6}

    @property
    def reverse_op(self) -> "ConversionOps":
        """There is none: what is saved is ours."""
        raise NotImplementedError("scales of keys and values are saved as they are")


def state_converters() -> list[WeightConverter]:
    """Return how the scales of keys and values get from ModelOpt's modules to ours."""
    return [
        WeightConverter(rf"{letter}_proj.{letter}_scale", f"{letter}_scale", [OverSix()])
        for letter in ("k", "v")
    ]


def forget_converters(model: Any) -> None:
    """Keep Transformers from undoing `state_converters` when the model is saved."""
    model._weight_conversions = [
        conversion
        for conversion in getattr(model, "_weight_conversions", None) or ()
        if not any(isinstance(op, OverSix) for op in getattr(conversion, "operations", ()))
    ]
