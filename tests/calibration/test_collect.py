from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from scalesweep_hf import Statistics, collect
from scalesweep_hf.calibration import run_calibration
from scalesweep_hf.calibration.observers import AbsMax, ChannelSquare


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))


def test_statistics_are_those_of_all_batches_together() -> None:
    model = two_layers()
    batches = [torch.randn(3, 5, 16), 10 * torch.randn(1, 2, 16)]
    with torch.no_grad(), collect(model) as statistics:
        assert not statistics
        for batch in batches:
            model(batch)
    rows = torch.cat([batch.flatten(0, 1) for batch in batches])
    assert torch.equal(statistics["0"].absmax, rows.abs().max())
    torch.testing.assert_close(statistics["0"].square, rows.double().square().sum(0).float())
    hidden = torch.relu(model[0](rows)).detach()
    torch.testing.assert_close(statistics["2"].square, hidden.double().square().sum(0).float())


def test_hooks_come_off_however_the_block_ends() -> None:
    model = two_layers()
    with pytest.raises(KeyboardInterrupt), collect(model):
        raise KeyboardInterrupt
    assert not any(module._forward_pre_hooks for module in model.modules())
    with collect(model) as statistics:
        model(torch.randn(1, 16))
    model(torch.full((1, 16), 1e9))
    assert statistics["0"].absmax < 1e3
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_only_named_modules_are_observed() -> None:
    model = two_layers()
    with torch.no_grad(), collect(model, ["2"]) as statistics:
        model(torch.randn(1, 16))
    assert list(statistics) == ["2"]
    with (
        pytest.raises(ValueError, match=r"'1' is not an nn\.Linear of Sequential"),
        collect(model, ["1"]),
    ):
        pass


def test_keyword_inputs_are_observed() -> None:
    model = nn.Linear(16, 16)
    with torch.no_grad(), collect(model, [""]) as statistics:
        model(input=torch.ones(1, 16))
    assert statistics[""].absmax == 1


class Branches(nn.Module):
    def __init__(self, offset: float = 0.0) -> None:
        super().__init__()
        self.offset = offset
        self.same, self.twin, self.other = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = input_ids.float() + self.offset
        result: torch.Tensor = self.same(x) + self.twin(x) + self.other(x + 1)
        return result


def test_modules_that_read_one_tensor_are_recognised() -> None:
    statistics = run_calibration(Branches(), torch.ones(2, 16, dtype=torch.int64))
    shared = statistics.shared_inputs
    assert shared["same"] == shared["twin"] != shared["other"]


def test_a_named_module_that_never_ran_is_an_error() -> None:
    model = Branches()
    model.add_module("idle", nn.Linear(16, 16))
    with pytest.raises(ValueError, match="no calibration text reached idle: add them to"):
        run_calibration(model, torch.ones(2, 16, dtype=torch.int64), names=["same", "idle"])


def test_an_input_that_is_not_finite_is_an_error() -> None:
    tokens = torch.ones(2, 16, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"same: its input has max\|x\| = inf"):
        run_calibration(Branches(offset=torch.inf), tokens, names=["same"])


def test_a_file_gives_back_what_was_saved(tmp_path: Path) -> None:
    statistics = run_calibration(Branches(), torch.ones(2, 16, dtype=torch.int64))
    statistics.provenance = {"source": "test", "seed": 3}
    statistics.save(tmp_path / "s.safetensors")
    loaded = Statistics.load(tmp_path / "s.safetensors")
    assert loaded.provenance == statistics.provenance
    assert loaded.shared_inputs == statistics.shared_inputs
    assert set(loaded) == set(statistics)
    for name, value in statistics.items():
        assert torch.equal(loaded[name].square, value.square)
        assert torch.equal(loaded[name].absmax, value.absmax)
    assert [path.name for path in tmp_path.iterdir()] == ["s.safetensors"]


def test_another_file_is_refused(tmp_path: Path) -> None:
    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="is not a statistics file: format is None"):
        Statistics.load(tmp_path / "x.safetensors")


def test_absmax_keeps_nan() -> None:
    observer = AbsMax()
    assert observer.value == 0
    for value in (1.0, float("nan"), 2.0):
        observer.update(torch.tensor([value]))
    assert observer.value.isnan()


def test_sums_of_squares_do_not_lose_small_batches() -> None:
    observer = ChannelSquare()
    observer.update(torch.tensor([[4096.0]]))
    for _ in range(64):
        observer.update(torch.tensor([[0.5]]))
    assert observer.value.item() == 4096**2 + 16


def test_reading_an_empty_sum_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="no batch was observed"):
        _ = ChannelSquare().value
