"""Tiny randomly initialised models of several architectures, for tests that need no accuracy."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf

SHAPE = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
DECODER = SHAPE | {
    "num_key_value_heads": 2,
    "head_dim": 16,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}

ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**DECODER)),
    "llama-tied-biased": lambda: tf.LlamaForCausalLM(
        tf.LlamaConfig(**DECODER, tie_word_embeddings=True, attention_bias=True, mlp_bias=True)
    ),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**DECODER)),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**DECODER, sliding_window=8)),
    "gemma2": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**DECODER)),
    "bert": lambda: tf.BertForSequenceClassification(tf.BertConfig(**SHAPE)),
}
DECODERS = ("llama", "llama-tied-biased", "qwen3", "mistral", "gemma2")


def save_random(architecture: str, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ARCHITECTURES[architecture]().to(dtype)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # zero as initialised, which would hide a lost bias
                torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(folder)
    return folder


def load(folder: Path, **kwargs: Any) -> Any:
    auto = tf.AutoModelForCausalLM
    if "bert" in (folder / "config.json").read_text():
        auto = tf.AutoModelForSequenceClassification
    if "llava" in (folder / "config.json").read_text():
        auto = tf.AutoModelForImageTextToText
    return auto.from_pretrained(folder, **kwargs)


def random_tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, SHAPE["vocab_size"], (rows, length), generator=generator)
