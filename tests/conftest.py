import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers.utils import logging

from tests.models import save_random

if not torch.cuda.is_available():  # Triton then runs kernels in its interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT.parent / "shared"


@pytest.fixture(autouse=True)
def poison_uninitialised_memory() -> Iterator[None]:
    """Fill what torch.empty returns with NaN, so that reading it shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True, scope="session")
def quiet_transformers() -> None:
    logging.disable_progress_bar()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return str(request.param)


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the folder of a tiny random model, saved once per architecture."""
    saved: dict[str, Path] = {}

    def get(architecture: str) -> Path:
        if architecture not in saved:
            folder = tmp_path_factory.mktemp(architecture)
            saved[architecture] = save_random(architecture, folder)
        return saved[architecture]

    return get


def load_example(name: str) -> ModuleType:
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def trained_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the demo's model, which knows its text."""
    folder = tmp_path_factory.mktemp("trained") / "model"
    return Path(load_example("tiny_model").build_tiny_model(folder))


@pytest.fixture(params=["ref-llama-46m", "ref-qwen3-34m"])
def reference_model(request: pytest.FixtureRequest) -> Path:
    folder = REFERENCE / "models" / str(request.param)
    if not folder.is_dir():
        pytest.skip(f"{request.param} is not here")
    return folder
