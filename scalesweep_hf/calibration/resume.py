"""A folder that keeps finished blocks, so that an interrupted quantization can go on."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from scalesweep_hf.files import write_text, write_whole

RUN = "run.json"
TOKENS = "tokens.safetensors"
SAMPLE = 256


class ResumeFolder:
    """Finished blocks of one quantization run, in safetensors files.

    A file appears under its name only when it is whole. A block counts as finished once its own
    file is there, which is written after the hidden states that leave it.
    """

    def __init__(self, path: str | os.PathLike[str], run: dict[str, Any]) -> None:
        """Open or make the folder.

        Args:
            path: of the folder.
            run: JSON types; what must be equal for finished blocks to be of use.

        Raises:
            ValueError: the folder belongs to another run, or holds other files.
        """
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        file = self.path / RUN
        if not file.is_file():
            entries = sorted(entry.name for entry in self.path.iterdir())
            if others := [name for name in entries if name != f"{RUN}.part"]:
                raise ValueError(
                    f"resume_dir {str(path)!r} holds other files ({others[0]}): use an empty folder"
                )
            write_text(file, json.dumps(run, indent=2))
        before = json.loads(file.read_text())
        # As text, since the order of overrides counts.
        differing = [
            key for key in run | before if json.dumps(run.get(key)) != json.dumps(before.get(key))
        ]
        if differing:
            key = differing[0]
            raise ValueError(
                f"resume_dir {str(path)!r} belongs to another run: {key} was "
                f"{before.get(key)!r:.200} and is {run.get(key)!r:.200}; use an empty folder"
            )

    @property
    def finished(self) -> int:
        """How many blocks, from the first on, are finished."""
        count = 0
        while self._block(count).is_file():
            count += 1
        return count

    def tokens(
        self, make: Callable[[], tuple[Tensor, dict[str, Any]]], *, reuse: bool
    ) -> tuple[Tensor, dict[str, Any]]:
        """Return the calibration tokens of the first start, and their provenance.

        Args:
            make: makes both, on the first start.
            reuse: whether later starts take them from the folder, rather than make and compare
                them.

        Raises:
            ValueError: this start's tokens are others.
        """
        file = self.path / TOKENS
        if file.is_file() and reuse:
            tensors, metadata = _read(file)
            return tensors["tokens"], json.loads(metadata["provenance"])
        tokens, provenance = make()
        if not file.is_file():
            metadata = {"provenance": json.dumps(provenance)}
            write_whole(file, lambda part: save_file({"tokens": tokens}, part, metadata))
        elif not torch.equal(tokens, _read(file)[0]["tokens"]):
            raise ValueError(
                f"resume_dir {str(self.path)!r} belongs to a run with other calibration text: use "
                "an empty folder"
            )
        return tokens, provenance

    def save_block(
        self,
        index: int,
        tensors: dict[str, Tensor],
        shared_inputs: dict[str, int],
        hidden: list[Tensor],
    ) -> None:
        """Keep a finished block.

        Args:
            index: of the block.
            tensors: by name, what quantizing it made.
            shared_inputs: of its Linears, as in `Statistics`.
            hidden: the hidden states that left it, a batch each.
        """
        batches = {f"{i:06}": states.cpu().contiguous() for i, states in enumerate(hidden)}
        write_whole(self._hidden(index + 1), lambda part: save_file(batches, part))
        metadata = {"shared_inputs": json.dumps(shared_inputs)}
        on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        write_whole(self._block(index), lambda part: save_file(on_cpu, part, metadata))
        for old in self.path.glob("hidden-*.safetensors"):
            if old != self._hidden(index + 1):
                old.unlink()

    def load_block(self, index: int) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Return the tensors and shared inputs that `save_block` was given."""
        tensors, metadata = _read(self._block(index))
        return tensors, json.loads(metadata["shared_inputs"])

    def load_hidden(self) -> list[Tensor]:
        """Return the hidden states that left the last finished block, on the CPU."""
        tensors, _ = _read(self._hidden(self.finished))
        return [tensors[name] for name in sorted(tensors)]

    def _block(self, index: int) -> Path:
        return self.path / f"block-{index:04}.safetensors"

    def _hidden(self, index: int) -> Path:
        return self.path / f"hidden-{index:04}.safetensors"


def model_digest(model: nn.Module) -> str:
    """Return what tells models apart: a digest of names, shapes and first values of parameters.

    Args:
        model: parameters on the meta device count without values.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if parameter.device.type != "meta":
            first = parameter.detach().reshape(-1)[:SAMPLE].cpu().contiguous()
            digest.update(first.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(file, framework="pt") as opened:
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        return tensors, opened.metadata() or {}
