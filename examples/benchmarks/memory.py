"""Measure the peak memory of loading a model as it is and quantized on the fly, on the CPU.

    python examples/benchmarks/memory.py MODEL

Each load runs in a process of its own; the figure is the process's peak resident set (VmHWM of
/proc/self/status, so Linux only), PyTorch and Transformers included.
"""

import argparse
import os
import subprocess
import sys

SCRIPT = """
import sys
from pathlib import Path
from transformers import AutoModelForCausalLM
from transformers.utils import logging
import scalesweep_hf
logging.disable_progress_bar()
config = None
if sys.argv[2] != "bf16":
    config = scalesweep_hf.ScaleSweepConfig(scheme="W", objective=sys.argv[2], dataset=None)
model = AutoModelForCausalLM.from_pretrained(
    sys.argv[1], quantization_config=config, device_map="cpu"
)
peak = next(
    line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line
)
print(peak.split()[1], sum(p.nbytes for p in model.parameters()))
"""


def main() -> None:
    """Load three ways and print a Markdown table."""
    parser = argparse.ArgumentParser(description="Measure the peak memory of loading a model.")
    parser.add_argument("model", help="folder or Hub id")
    model = parser.parse_args().model
    print("| load | peak RSS, MB | against bf16 | parameters, MB |")
    print("|---|---|---|---|")
    baseline = 0.0
    for way in ("bf16", "absmax", "mse"):
        command = [sys.executable, "-c", SCRIPT, model, way]
        hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}  # weights would be swept there
        result = subprocess.run(command, capture_output=True, text=True, check=True, env=hidden)
        kilobytes, size = (int(word) for word in result.stdout.split()[-2:])
        peak = kilobytes * 1024 / 1e6
        baseline = baseline or peak
        print(f"| {way} | {peak:.0f} | {peak / baseline:.3f} | {size / 1e6:.1f} |")


if __name__ == "__main__":
    main()
