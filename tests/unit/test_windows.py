"""The models for windows of a series: their shapes, and the order of their neurons."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ecavg.cloud_server.trainer.alignment import align_all
from ecavg.cloud_server.trainer.permutations import apply, permutation_groups
from ecavg.common.config import RunConfig
from ecavg.common.errors import UsageError
from ecavg.common.models import build_model, empty_inputs
from ecavg.common.weights import StateDict, write_state_dict

HIDDEN = 8


def run_of(model: str, shape: tuple[int, ...] = (2, 16)) -> RunConfig:
    return RunConfig(model=model, dataset="own", num_classes=3, hidden_units=HIDDEN, inputs={"shape": shape})


def outputs(model: nn.Module, state_dict: StateDict) -> Tensor:
    model.load_state_dict(state_dict)
    with torch.no_grad():
        found: Tensor = model.eval()(torch.randn(5, 2, 16, generator=torch.Generator().manual_seed(0)))
    return found


@pytest.mark.parametrize(("name", "num_groups"), [("cnn1d", 2), ("gru", 1), ("mlp", 1)])
def test_neurons_that_changed_places_are_brought_back(name: str, num_groups: int, tmp_path: Path) -> None:
    run = run_of(name)
    model = build_model(run)
    groups = permutation_groups(model, empty_inputs(run.spec))
    assert [group.size for group in groups] == [HIDDEN] * num_groups
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    orders = [torch.randperm(HIDDEN, generator=torch.Generator().manual_seed(n)) for n in range(num_groups)]
    moved = apply(groups, orders, before)
    # Every tensor of a hidden layer has moved, and nothing is to be seen of that from outside.
    changed = {key for key in before if not torch.equal(before[key], moved[key])}
    assert set(before) - changed <= {"8.bias", "head.0.bias", "3.bias"}
    torch.testing.assert_close(outputs(model, moved), outputs(model, before))
    paths = [tmp_path / "before", tmp_path / "moved"]
    for path, state_dict in zip(paths, (before, moved), strict=True):
        write_state_dict(state_dict, path)
    _, found = align_all(paths, [1.0, 1.0], groups, seed=0)
    aligned = apply(groups, found, moved)
    assert all(torch.equal(aligned[key], before[key]) for key in before)


@pytest.mark.parametrize("options", [{"num_layers": 2}, {"bidirectional": True}, {"batch_first": False}])
def test_other_recurrent_layers_are_averaged_as_they_are(options: dict[str, object]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru = nn.GRU(16, HIDDEN, **{"batch_first": True, **options})  # type: ignore[arg-type]

        def forward(self, x: Tensor) -> Tensor:
            states: Tensor = self.gru(x)[0]
            return states

    assert permutation_groups(Net(), torch.zeros(2, 2, 16)) == []


@pytest.mark.parametrize("name", ["cnn1d", "gru"])
def test_inputs_that_are_no_windows_are_refused(name: str) -> None:
    with pytest.raises(
        UsageError, match=r"takes windows \[channels, steps\], and the run's inputs are \[30\]"
    ):
        build_model(run_of(name, (30,)))
    with pytest.raises(UsageError, match="small_images"):
        build_model(run_of(name).model_copy(update={"small_images": True}))


def test_windows_that_are_too_short_are_refused_in_one_line() -> None:
    with pytest.raises(UsageError, match="model 'cnn1d' cannot take dataset 'own'"):
        build_model(run_of("cnn1d", (2, 3)))


def test_segmentation_has_models_of_its_own() -> None:
    run = RunConfig(task="segmentation", dataset="own", num_classes=3, image_shape=(3, 64, 64))
    model = build_model(run.model_copy(update={"model": "lraspp_mobilenet_v3_large"}))
    with torch.no_grad():
        assert model(torch.zeros(2, 3, 64, 64))["out"].shape == (2, 3, 64, 64)
    with pytest.raises(UsageError, match="unknown model 'resnet18'"):
        build_model(run.model_copy(update={"model": "resnet18"}))
