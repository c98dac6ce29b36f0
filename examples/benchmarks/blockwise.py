"""Measure block-by-block quantization of a random Llama: peak memory, and time per block.

    python examples/benchmarks/blockwise.py                     # 1 B parameters, needs a GPU
    python examples/benchmarks/blockwise.py --device cpu --hidden 128 --layers 2 --rows 2

The expected peak, from the first block on, is the model in bfloat16, plus the Hessians of one
block (one per input, float32), plus the hidden states of all tokens.
"""

import argparse
import gc
import tempfile
import time
from contextlib import suppress
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from scalesweep_hf import ScaleSweepConfig
from scalesweep_hf.blockwise import BlockQuantizer
from scalesweep_hf.config import ALGORITHMS, SCHEMES

MB = 1e6


def main() -> None:
    """Make the model, quantize it while loading, print what it took."""
    args = parse_arguments()
    logging.disable_progress_bar()
    config = llama(args)
    tokens = torch.randint(0, config.vocab_size, (args.rows, args.length))
    recipe = ScaleSweepConfig(
        scheme=args.scheme,
        objective=args.objective,
        algorithm=args.algorithm,
        dataset=tokens,
        num_samples=args.rows,
        sequence_length=args.length,
    )
    seconds = time_blocks(args.blocks)
    on_gpu = torch.device(args.device).type == "cuda"
    with tempfile.TemporaryDirectory() as folder:
        with torch.device(args.device):
            torch.manual_seed(0)
            LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
        gc.collect()
        with suppress(_Enough):
            AutoModelForCausalLM.from_pretrained(
                folder, quantization_config=recipe, device_map=args.device
            )
    model, hessians, hidden = expected_bytes(args, config)
    total = model + hessians + hidden
    print(f"model {model / MB:.0f} MB + Hessians {hessians / MB:.0f} + hidden {hidden / MB:.0f}")
    if on_gpu:
        peak = torch.cuda.max_memory_allocated()
        print(f"peak {peak / MB:.0f} MB, {peak / total:.3f} of that sum ({total / MB:.0f} MB)")
    print(f"seconds per block: {', '.join(f'{s:.2f}' for s in seconds)}")


def parse_arguments() -> argparse.Namespace:
    """Read the command line; the default shape is that of Llama-3.2-1B."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--hidden", type=int, default=2048, help="hidden size; the MLP has 4 times")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--rows", type=int, default=128, help="calibration rows")
    parser.add_argument("--length", type=int, default=2048, help="tokens a row")
    parser.add_argument("--scheme", default="W", choices=SCHEMES)
    parser.add_argument("--objective", default="wmse")
    parser.add_argument("--algorithm", default="gptq", choices=ALGORITHMS)
    parser.add_argument("--blocks", type=int, default=None, help="stop after so many; default all")
    parser.add_argument("--device", default="cuda")
    return parser.parse_args()


def llama(args: argparse.Namespace) -> LlamaConfig:
    """Return the shape, with heads of 64."""
    return LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=4 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=max(args.hidden // 256, 1),
        vocab_size=args.vocab,
        max_position_embeddings=args.length,
        tie_word_embeddings=True,
    )


def expected_bytes(args: argparse.Namespace, config: LlamaConfig) -> tuple[int, int, int]:
    """Return the bytes of the model, of one block's Hessians and of the hidden states."""
    with torch.device("meta"):
        parameters = sum(p.numel() for p in LlamaForCausalLM(config).parameters())
    inputs = 3 * config.hidden_size**2 + config.intermediate_size**2
    streams = 2 if args.algorithm == "gptq-plus" else 1
    states = args.rows * args.length * config.hidden_size * streams
    return 2 * parameters, 4 * inputs * streams, 2 * states


class _Enough(Exception):  # noqa: N818 (no error)
    """Ends the run."""


def time_blocks(most: int | None) -> list[float]:
    """Let every block that is quantized from now on add its seconds to a list; stop after most.

    The peak of memory is counted from the first block on: loading has peaks of its own.
    """
    seconds: list[float] = []
    original = BlockQuantizer.quantize

    def timed(self: BlockQuantizer, index: int) -> Any:
        if not seconds and torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        result = original(self, index)
        seconds.append(time.perf_counter() - start)
        if len(seconds) == most:
            raise _Enough
        return result

    BlockQuantizer.quantize = timed  # type: ignore[method-assign]
    return seconds


if __name__ == "__main__":
    main()
