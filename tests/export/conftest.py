from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scalesweep_hf import ScaleSweepConfig
from tests.models import load, random_tokens


@pytest.fixture(scope="session")
def quantized(
    random_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Return the folder of a tiny quantized model, saved once per architecture and recipe."""
    saved: dict[str, Path] = {}

    def get(architecture: str, scheme: str = "W", objective: str = "mse", **settings: Any) -> Path:
        key = f"{architecture} {scheme} {objective} {sorted(settings.items())}"
        if key not in saved:
            calibrated = scheme != "W" or objective == "wmse"
            dataset = random_tokens(4, 32) if calibrated else None
            config = ScaleSweepConfig(
                scheme=scheme, objective=objective, dataset=dataset, **settings
            )
            model = load(random_model(architecture), quantization_config=config, device_map="cpu")
            saved[key] = tmp_path_factory.mktemp("quantized") / "model"
            model.save_pretrained(saved[key])
        return saved[key]

    return get
