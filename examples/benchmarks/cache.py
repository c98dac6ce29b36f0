"""Measure the packed key-value cache: bytes per token, and decoding speed, beside the plain cache.

    python examples/benchmarks/cache.py MODEL --device cuda

The model is not quantized, so that the caches alone differ. Bytes are those of the storages that a
cache holds once it is filled with random states. The prompt is random token ids. On a CUDA device
with Triton, steps of a model in bfloat16 or float16 read packed rows; elsewhere they decode the
whole cache.
"""

import argparse
import gc
import statistics
import time
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils import logging

from scalesweep_hf import NVFP4Cache

CHUNK = 1024


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description="Measure the packed key-value cache.")
    parser.add_argument("model", help="folder or Hub id")
    parser.add_argument("--device", default="cpu", help="device_map")
    parser.add_argument("--memory", type=int, nargs="+", default=[4096, 32768], help="tokens")
    parser.add_argument("--speed", type=int, nargs="+", default=[1024, 16384], help="tokens")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens decoded per run")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(args.model, device_map=args.device)
    print("| context, tokens | DynamicCache, bytes/token | NVFP4Cache, bytes/token | ratio |")
    print("|---|---|---|---|")
    for length in args.memory:
        plain = bytes_per_token(DynamicCache(config=model.config), model, length)
        packed = bytes_per_token(NVFP4Cache(config=model.config), model, length)
        print(f"| {length} | {plain:.1f} | {packed:.1f} | {plain / packed:.3f} |")
    print("\n| context, tokens | DynamicCache, tokens/s | NVFP4Cache, tokens/s | ratio |")
    print("|---|---|---|---|")
    for length in args.speed:
        ids = prompt(model, length)
        plain = speed(DynamicCache, model, ids, args)
        packed = speed(NVFP4Cache, model, ids, args)
        print(f"| {length} | {plain:.1f} | {packed:.1f} | {packed / plain:.3f} |")


def prompt(model: Any, length: int) -> Tensor:
    """Return random token ids [1, length]."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (1, length), generator=generator)
    return ids.to(model.device)


def fill(model: Any, cache: Any, ids: Tensor) -> None:
    """Run a prompt through the model without its head, a chunk at a time."""
    with torch.no_grad():
        for part in ids.split(CHUNK, dim=1):
            model.base_model(input_ids=part, past_key_values=cache, use_cache=True)


def bytes_per_token(cache: Any, model: Any, length: int) -> float:
    """Fill a cache with states of the model's shape; return the bytes it holds, per token."""
    config = model.config.get_text_config()
    heads, head_dim = config.num_key_value_heads, config.head_dim
    for layer in range(config.num_hidden_layers):
        for start in range(0, length, CHUNK):
            shape = (1, heads, min(CHUNK, length - start), head_dim)
            states = torch.randn(shape, device=model.device).to(model.dtype)
            cache.update(states, states, layer)
    gc.collect()
    storages = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
        for layer in cache.layers
        for value in vars(layer).values()
        if isinstance(value, Tensor)
    }
    return float(sum(storages.values())) / length


def speed(kind: Any, model: Any, ids: Tensor, args: argparse.Namespace) -> float:
    """Return decoded tokens per second after a prompt, the median of several runs."""
    results: list[float] = []
    for _ in range(args.repeats + 1):  # the first warms up
        cache = kind(config=model.config)
        fill(model, cache, ids[:, :-1])
        if ids.is_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            min_new_tokens=args.new_tokens,
            max_new_tokens=args.new_tokens,
            do_sample=False,
        )
        if ids.is_cuda:
            torch.cuda.synchronize()
        results.append(args.new_tokens / (time.perf_counter() - start))
    return statistics.median(results[1:])


if __name__ == "__main__":
    main()
