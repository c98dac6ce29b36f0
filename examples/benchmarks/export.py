"""Measure time and peak memory of exporting a checkpoint of about 1 GB, on the CPU.

    python examples/benchmarks/export.py [--layers 8] [--folder WORK]

The checkpoint is a Llama of random packed weights, one shard a layer, and is deleted afterwards.
Each export runs in a process of its own; the figure is the process's peak resident set (VmHWM of
/proc/self/status, so Linux only). The first row imports what an export imports and does nothing
else; the last copies the folder with the standard library, which is what a disk allows.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

HIDDEN, INNER, STATES, VOCABULARY = 4096, 11008, 1024, 32000
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (STATES, HIDDEN),
    "self_attn.v_proj": (STATES, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}

SCRIPT = """
import shutil, sys, time
from pathlib import Path
# (Transformers loads a model's code when it is first used.)
from transformers import LlamaForCausalLM
from scalesweep_hf.export import export_checkpoint
source, out, way = sys.argv[1:]
start = time.perf_counter()
if way == "copy":
    shutil.copytree(source, out)
elif way != "import":
    export_checkpoint(source, Path(out), way)
seconds = time.perf_counter() - start
lines = Path("/proc/self/status").read_text().splitlines()
print(seconds, next(line for line in lines if "VmHWM" in line).split()[1])
"""


def main() -> None:
    """Export both ways and print a Markdown table."""
    parser = argparse.ArgumentParser(description="Measure exporting a random checkpoint.")
    parser.add_argument("--layers", type=int, default=8, help="about 100 MB each")
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as work:
        source = Path(work) / "source"
        start = time.perf_counter()
        size = make_checkpoint(source, arguments.layers)
        print(f"{size / 1e9:.2f} GB, made in {time.perf_counter() - start:.0f} s\n")
        print("| what | seconds | MB/s | peak RSS, MB |")
        print("|---|---|---|---|")
        for way in ("import", "compressed-tensors", "modelopt", "copy"):
            command = [sys.executable, "-c", SCRIPT, str(source), str(Path(work) / way), way]
            result = subprocess.run(command, capture_output=True, text=True, check=True)
            seconds, kilobytes = (float(word) for word in result.stdout.split()[-2:])
            speed = "" if way in ("import", "modelopt") else f"{size / 1e6 / seconds:.0f}"
            print(f"| {way} | {seconds:.1f} | {speed} | {kilobytes * 1024 / 1e6:.0f} |")


def make_checkpoint(folder: Path, layers: int) -> int:
    """Write a checkpoint of random packed weights; return the bytes of its tensors."""
    folder.mkdir(parents=True)
    names = [f"layers.{i}.{name}" for i in range(layers) for name in SHAPES]
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
        dtype=torch.bfloat16,
        quantization_config={"quant_method": "scalesweep", "quantized_modules": names},
    )
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    places: dict[str, str] = {}
    total = 0
    for number in range(layers + 1):
        shard = make_layer(number, generator) if number < layers else make_rest(generator)
        file = f"model-{number + 1:05}-of-{layers + 1:05}.safetensors"
        save_file(shard, folder / file, {"format": "pt"})
        places |= dict.fromkeys(shard, file)
        total += sum(tensor.nbytes for tensor in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def make_layer(number: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Return random tensors of one decoder layer."""
    prefix = f"model.layers.{number}"
    tensors = {}
    for name, (n, k) in SHAPES.items():
        packed = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, generator=generator)
        codes = torch.randint(1, 127, (n, k // 16), dtype=torch.uint8, generator=generator)
        tensors[f"{prefix}.{name}.weight"] = packed
        tensors[f"{prefix}.{name}.weight_scale"] = codes.view(torch.float8_e4m3fn)
        for scale in ("weight_scale_2", "input_scale"):
            tensors[f"{prefix}.{name}.{scale}"] = torch.tensor(1e-4 * (number + 1))
    for name in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"{prefix}.{name}.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
    return tensors


def make_rest(generator: torch.Generator) -> dict[str, Tensor]:
    """Return random embeddings and the last norm."""
    embedding = torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=torch.bfloat16)
    norm = torch.ones(HIDDEN, dtype=torch.bfloat16)
    return {"model.embed_tokens.weight": embedding, "model.norm.weight": norm}


if __name__ == "__main__":
    main()
