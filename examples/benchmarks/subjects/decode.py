"""Decoding one token at a time with a whole Llama of random weights."""

import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch
from llama import SHAPES, random_llama
from timing import Measurement, Settings, attempt, captured, quartiles, timed
from transformers import LlamaConfig, StaticCache
from transformers.utils import logging

from scalesweep_hf import NVFP4StaticCache, ScaleSweepConfig, ScaleSweepHfQuantizer

TITLE = "Decoding with a whole model"
UNIT = "µs per token"
FIGURE = ""
NOTE = (
    "A Llama of random weights in bfloat16, batch 1, behind a prompt of random tokens in a static "
    "cache of 1,024: one forward pass of one token, recorded as a CUDA graph and replayed, without "
    "sampling; where that was not possible, a note says so. GB: of parameters that a token reads. "
    "W4A16: scheme W. The head and the embedding stay in bfloat16."
)
SCHEMES = {"bfloat16": None, "W4A16": "W", "WAKVQ": "WAKVQ"}
CONTEXT, STEPS = 1024, 64


def measure(settings: Settings) -> Iterator[Measurement]:
    """Measure every scheme, a fresh model each."""
    logging.disable_progress_bar()
    shape = "tiny" if settings.tiny else settings.shape
    for compiled in (False, True) if settings.compiled else (False,):
        base = float("nan")
        for name, scheme in SCHEMES.items():
            what = f"{name}, compiled" if compiled else name
            row = measure_scheme(what, shape, scheme, compiled, settings)
            if scheme is None:
                base = row.median
            if row.quartiles is not None:
                row.figures["speed-up"] = base / row.median
            yield row


def measure_scheme(
    what: str, shape: str, scheme: str | None, compiled: bool, settings: Settings
) -> Measurement:
    """Measure one model and forget it."""
    gigabytes = 0.0

    def run() -> tuple[list[float], str]:
        nonlocal gigabytes
        model = build(shape, settings.device)
        if scheme is not None:
            quantize_in_place(model, scheme)
        embedding = model.get_input_embeddings().weight
        gigabytes = (sum(p.nbytes for p in model.parameters()) - embedding.nbytes) / 1e9
        with torch.no_grad():
            return decode(model, scheme, compiled, settings)

    row = attempt(f"Llama {shape}", "", what, run)
    if row.quartiles is not None:
        row.figures |= {"tokens/s": 1e6 / row.median, "GB": gigabytes}
    gc.collect()
    if settings.device == "cuda":
        torch.cuda.empty_cache()
    return row


def build(shape: str, device: str) -> Any:
    """Return a random Llama in bfloat16, made on the device."""
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=8192, rope_theta=500000.0)
    config._attn_implementation = "sdpa"
    return random_llama(config, device).eval()


def quantize_in_place(model: Any, scheme: str) -> None:
    """Do what from_pretrained does around loading, to a model that is there already."""
    if scheme == "W":
        config = ScaleSweepConfig(scheme=scheme, objective="mse", dataset=None)
    else:
        tokens = torch.randint(3, model.config.vocab_size, (4, 256))
        config = ScaleSweepConfig(scheme=scheme, dataset=tokens)
    quantizer = ScaleSweepHfQuantizer(config, pre_quantized=False)
    quantizer.preprocess_model(model=model)
    quantizer.postprocess_model(model)


def decode(
    model: Any, scheme: str | None, compiled: bool, settings: Settings
) -> tuple[list[float], str]:
    """Return quartiles of the time of a token, and a note."""
    kind: Callable[..., Any] = NVFP4StaticCache if scheme == "WAKVQ" else StaticCache
    context = 2 * STEPS if settings.tiny else CONTEXT
    cache = kind(config=model.config, max_cache_len=context)
    prompt = torch.randint(3, model.config.vocab_size, (1, context - STEPS), device=settings.device)
    model(input_ids=prompt, past_key_values=cache, use_cache=True)
    token = prompt[:, -1:].clone()
    forward = torch.compile(model.forward, dynamic=False) if compiled else model

    def step() -> None:
        forward(input_ids=token, past_key_values=cache, use_cache=True)

    replay, note = captured(step, settings.device)
    repeats = min(settings.repeats, STEPS - 8)  # warming up takes some; the cache ends there
    return quartiles(lambda _: timed(replay, settings.device), repeats), note
