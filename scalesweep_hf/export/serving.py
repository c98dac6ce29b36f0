"""What vLLM and SGLang require of an NVFP4 checkpoint, checked without either.

Read in their sources (no engine was run); the letters are those of `check_serving`:

a. Method and algorithm. ``compressed-tensors`` with ``nvfp4-pack-quantized``, or ``modelopt`` with
   ``quant_algo`` NVFP4, in vLLM also W4A16_NVFP4 [1, 4]. A ModelOpt description needs
   ``group_size``, ``kv_cache_quant_algo`` and ``exclude_modules``, in SGLang not empty [1, 4].
b. Layout. Codes uint8 [N, K/2], block scales float8_e4m3fn [N, K/16] row by row (the engine
   interleaves them itself), tensor scales float32 with one element, of shape [] or [1] [1, 2].
c. Scales are finite and positive. A missing or zero input scale becomes NaN at run time [5].
d. Fused projections (q/k/v, gate/up, w1/w3) become one matrix with one tensor scale and one input
   scale: the largest of what is stored is taken for all (in compressed-tensors of the reciprocals),
   with a warning at the most. All members must be quantized, or none [1, 2, 3].
e. Inputs. What the configuration says of activations agrees with the stored input scales: an
   input scale that is declared and missing is read from uninitialised memory [1, 2].
f. Ignore lists name what is not quantized, and nothing that is. compressed-tensors: a name, or
   "re:" and a regular expression that matches from the start [3]. ModelOpt: names, or wildcards,
   which are held against fused names: "*.qkv_proj", not "*.q_proj". vLLM also leaves a layer alone
   if an entry occurs anywhere in its fused name, so that "mlp.gate" takes "mlp.gate_up_proj" along
   [1]; SGLang matches whole names [4].
g. Cache. compressed-tensors: 8 bits, one scale per tensor, symmetric; other schemes stop vLLM [6],
   and SGLang reads none [7]. A config group without weights (attention) stops both [6, 7].

[1] https://github.com/vllm-project/vllm/blob/00155cdecca722d98e34234c3d172725b7720b7d/vllm/model_executor/layers/quantization/modelopt.py
[2] https://github.com/vllm-project/vllm/blob/0094cb9b1d7bfe2054e733d2cad09b76cf319897/vllm/model_executor/layers/quantization/compressed_tensors/schemes/compressed_tensors_w4a4_nvfp4.py
[3] https://github.com/vllm-project/vllm/blob/008014e8503b206a8ae3eb9d17fd46b48b8d2606/vllm/model_executor/layers/quantization/compressed_tensors/utils.py
[4] https://github.com/sgl-project/sglang/blob/003ca3e5152c94c92d88fd43d5eb58e55201e895/python/sglang/srt/layers/quantization/modelopt_quant.py
[5] https://github.com/vllm-project/vllm/issues/45212
[6] https://github.com/vllm-project/vllm/blob/004dadbe4ed2cac9b4f140c50cc6a8d188c07c91/vllm/model_executor/layers/quantization/compressed_tensors/compressed_tensors.py
[7] https://github.com/sgl-project/sglang/blob/b5535699b732af5d2e049cc5b70112718964b774/python/sglang/srt/layers/quantization/compressed_tensors/compressed_tensors.py
"""

import fnmatch
import math
import re
from collections.abc import Iterator
from typing import Any

from scalesweep_hf.export.layout import (
    BLOCK_SCALE,
    COMPRESSED_TENSORS,
    MODELOPT,
    Checkpoint,
    Layer,
    Spelling,
    read_json,
)
from scalesweep_hf.ops.sweep import BLOCK
from scalesweep_hf.targets import FUSED

ALGORITHMS = {"vllm": ("NVFP4", "W4A16_NVFP4"), "sglang": ("NVFP4",)}
ENGINES = tuple(ALGORITHMS)
# Two-dimensional weights by these names are no Linears, of which alone ignore lists speak.
EMBEDDINGS = re.compile(r"embed|^wte$|^wpe$|^shared$", re.IGNORECASE)


def check_serving(checkpoint: Checkpoint, engine: str) -> list[str]:
    """Say why an engine would refuse a checkpoint, or compute something else with it.

    Args:
        checkpoint: of any tool.
        engine: "vllm" or "sglang".

    Returns:
        One sentence per problem, with the remedy; none if the contract above holds.

    Raises:
        ValueError: the engine is another one.
    """
    if engine not in ALGORITHMS:
        raise ValueError(f"engine is {engine!r}; use one of {', '.join(ENGINES)}")
    method = _method(checkpoint)
    if method not in ("compressed-tensors", "modelopt"):
        return [
            f"quant_method {method!r} is unknown to {engine}: write one that it knows with "
            "scalesweep export"
        ]
    if not checkpoint.layers:
        return ["no Linear is packed as NVFP4: name a quantized checkpoint"]
    problems = [*_description(checkpoint, method, engine), *_fused(checkpoint)]
    spelling = COMPRESSED_TENSORS if method == "compressed-tensors" else MODELOPT
    for layer in checkpoint.layers.values():
        problems += _layout(checkpoint, layer, spelling)
    problems += _ignored(checkpoint, method, engine)
    return problems


def _method(checkpoint: Checkpoint) -> Any:
    """Return the quantization method; hf_quant_config.json alone means ModelOpt."""
    default = "modelopt" if "quantization" in checkpoint.recipe else None
    return checkpoint.recipe.get("quant_method", default)


def _facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the ModelOpt facts by the names that config.json gives them."""
    facts = checkpoint.recipe.get("quantization") or checkpoint.recipe
    return {"ignore": facts.get("exclude_modules")} | facts


def _description(checkpoint: Checkpoint, method: str, engine: str) -> Iterator[str]:
    """Check the configuration (a, e, g)."""
    inputs = {name: layer.input_scale is not None for name, layer in checkpoint.layers.items()}
    if method == "modelopt":
        algorithm = _facts(checkpoint).get("quant_algo")
        if algorithm not in ALGORITHMS[engine]:
            yield (
                f"quant_algo {algorithm!r} is none that {engine} reads "
                f"({', '.join(ALGORITHMS[engine])}): export to compressed-tensors"
            )
        for name, present in inputs.items():
            if not present and algorithm == "NVFP4":
                yield f"{name} has no input_scale, which NVFP4 needs: use W4A16_NVFP4"
        yield from _modelopt_file(checkpoint, engine)
        return
    recipe = checkpoint.recipe
    if recipe.get("format") != "nvfp4-pack-quantized":
        yield f"format is {recipe.get('format')!r}, expected 'nvfp4-pack-quantized'"
    cache = recipe.get("kv_cache_scheme")
    if cache and (cache.get("num_bits"), cache.get("strategy")) != (8, "tensor"):
        reads = "reads 8 bits per tensor" if engine == "vllm" else "reads no scheme"
        yield (
            f"kv_cache_scheme has {cache.get('num_bits')} bits and strategy "
            f"{cache.get('strategy')!r}, where {engine} {reads}: export with --without-states"
        )
    for key, group in (recipe.get("config_groups") or {}).items():
        if not group.get("weights"):
            yield f"config group {key!r} has no weights: export with --without-states"
    for name, present in inputs.items():
        group = _group(recipe, name)
        if group is not None and bool(group.get("input_activations")) != present:
            said, stored = ("has", "none is") if not present else ("has no", "one is")
            yield f"{name} {said} quantized inputs by its config group, but {stored} stored"


def _modelopt_file(checkpoint: Checkpoint, engine: str) -> Iterator[str]:
    file = checkpoint.folder / "hf_quant_config.json"
    facts = read_json(file).get("quantization")
    if facts is None:
        yield f"{file.name} is missing or has no 'quantization': export again"
        return
    for key in ("group_size", "kv_cache_quant_algo", "exclude_modules"):
        if key not in facts:
            yield f"{file.name} has no {key}: export again"
    if engine == "sglang" and not facts.get("exclude_modules"):
        yield f"exclude_modules of {file.name} is empty, which sglang refuses: name the head in it"


def _fused(checkpoint: Checkpoint) -> Iterator[str]:
    """Check projections that engines fuse (d)."""
    known = {*checkpoint.layers, *checkpoint.unquantized()}
    groups: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for name in sorted(known):
        parent, _, own = name.rpartition(".")
        for fused in FUSED:
            if own in fused:
                groups.setdefault((parent, fused), []).append(name)
    for names in groups.values():
        packed = [checkpoint.layers[name] for name in names if name in checkpoint.layers]
        if packed and len(packed) < len(names):
            other = next(name for name in names if name not in checkpoint.layers)
            yield f"{packed[0].name} is quantized and {other}, fused with it, is not: do both"
        for what in ("tensor_scale", "input_scale"):
            values = {layer.name: getattr(layer, what) for layer in packed}
            if len(set(values.values())) > 1:
                listed = ", ".join(f"{name} {value}" for name, value in values.items())
                yield f"fused projections differ in {what}: {listed}; quantize them as one group"


def _layout(checkpoint: Checkpoint, layer: Layer, spelling: Spelling) -> Iterator[str]:
    """Check the tensors of one Linear (b, c)."""
    if layer.spelling != spelling:
        yield f"{layer.name} stores {layer.spelling.packed}, expected {spelling.packed}"
        return
    packed = checkpoint.entries[layer.tensor(spelling.packed)].shape
    blocks = checkpoint.entries[layer.tensor(BLOCK_SCALE)].shape
    expected = (*packed[:-1], packed[-1] * 2 // BLOCK)
    if len(packed) != 2 or blocks != expected or packed[-1] * 2 % BLOCK:
        yield f"{layer.name}: codes {list(packed)} need block scales {list(expected)}, not " + (
            f"{list(blocks)}: store them row by row, unpadded"
        )
    for suffix, value in (
        (spelling.tensor_scale, layer.tensor_scale),
        (spelling.input_scale, layer.input_scale),
    ):
        name = layer.tensor(suffix)
        entry = checkpoint.entries.get(name)
        if entry is None:
            if suffix == spelling.tensor_scale:
                yield f"{name} is missing: save the checkpoint again"
            continue
        if entry.dtype != "F32" or entry.shape not in ((), (1,)):
            yield f"{name} is {entry.dtype} {list(entry.shape)}, expected F32 of one element"
        if value is not None and not (math.isfinite(value) and value > 0):
            yield f"{name} stands for the scale {value}, which is not positive: calibrate again"


def _ignored(checkpoint: Checkpoint, method: str, engine: str) -> Iterator[str]:
    """Check that the configuration names the right modules (f)."""
    if method == "modelopt":
        patterns = _facts(checkpoint).get("ignore") or []

        def quantizes(name: str) -> bool:
            return not any(_excludes(pattern, name, engine) for pattern in patterns)
    else:

        def quantizes(name: str) -> bool:
            return _group(checkpoint.recipe, name) is not None

    for name in checkpoint.layers:
        if not quantizes(name):
            yield f"{name} is packed, but {engine} would take it for unquantized: mend the config"
    for name in checkpoint.unquantized():
        if not EMBEDDINGS.search(name.rpartition(".")[2]) and quantizes(name):
            yield f"{name} is not packed, but no entry of the ignore list matches it: add it"


def _group(recipe: dict[str, Any], name: str) -> dict[str, Any] | None:
    """Return the config group of compressed-tensors that a Linear belongs to."""
    if any(_matches(pattern, name) for pattern in recipe.get("ignore") or ()):
        return None
    for group in (recipe.get("config_groups") or {}).values():
        if any(target == "Linear" or _matches(target, name) for target in group["targets"]):
            return dict(group)
    return None


def _matches(pattern: str, name: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name) is not None
    return pattern == name


def _excludes(pattern: str, name: str, engine: str) -> bool:
    """Whether an entry of ModelOpt's ignore list leaves a module alone.

    Wildcards are held against the module that the engine builds: the fused projection, and all
    numbered experts as one.
    """
    built = re.sub(r"(\.experts)\.\d+\..*", r"\1", _fuse(name))
    if pattern == name or fnmatch.fnmatchcase(built, pattern):
        return True
    return engine == "vllm" and pattern in built


def _fuse(name: str) -> str:
    """Spell a projection as the fused module that engines build from it and its siblings."""
    parent, _, own = name.rpartition(".")
    fused = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}
    fused |= {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}
    return f"{parent}.{fused.get(own, own)}"
