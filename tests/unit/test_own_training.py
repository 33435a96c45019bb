"""A training loop of the user's own: what it gets, what becomes of its weights, and how it fails."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import ecavg
from ecavg import agent as agent_module
from ecavg.common.config import RunConfig, TrainingConfig
from ecavg.common.errors import DivergedError, RunError, UsageError
from ecavg.common.shards import Shard
from ecavg.common.training import Examples
from ecavg.common.weights import read_state_dict
from ecavg.edge_agent.data import AgentData
from ecavg.edge_agent.local import LocalModels
from ecavg.edge_agent.own_training import Data, Start, train_as_own
from ecavg.edge_agent.state import AgentState
from tests.recipes import CPU, SPEC, make_data, make_model, normalised

START = Start(1, "pretrain", 7, CPU, TrainingConfig(epochs=2))
RUN = RunConfig(model="mlp", dataset="own", num_classes=3, image_shape=(3, 8, 8), hidden_units=4)


def nothing(*_: object) -> None: ...


def data_of(num_images: int = 8) -> Data:
    return Data(Examples(*make_data(num_images)), SPEC)


def test_items_are_inputs_as_the_model_takes_them() -> None:
    data = data_of()
    assert len(data) == 8
    inputs, targets = next(iter(DataLoader(data, batch_size=8)))
    torch.testing.assert_close(inputs, normalised(data.inputs))
    assert torch.equal(targets, data.targets)
    torch.testing.assert_close(data.normalise(data.inputs[:2]), inputs[:2])


def test_loop_gets_model_start_and_report_and_its_weights_are_taken() -> None:
    model, steps = make_model().eval(), []
    wanted = {name: torch.full_like(each, 0.5) for name, each in model.state_dict().items()}

    def own(given: nn.Module, data: Data, start: Start, report: ecavg.Report) -> dict[str, torch.Tensor]:
        assert given is model
        assert model.training
        assert start == START
        report(1, 2, 0.25)
        return wanted

    train_as_own(own, model, data_of(), START, steps.append)
    assert steps == [(1, 2, 0.25)]
    assert all(torch.equal(each, wanted[name]) for name, each in model.state_dict().items())


def test_chance_is_the_starts_and_the_state_outside_is_left() -> None:
    model, drawn = make_model(), []

    def own(model: nn.Module, *_: object) -> dict[str, torch.Tensor]:
        drawn.append(torch.rand(()).item())
        return model.state_dict()

    before = torch.random.get_rng_state()
    for seed in (1, 1, 2):
        train_as_own(own, model, data_of(), START._replace(seed=seed), nothing)
        torch.random.set_rng_state(before)
    assert drawn[0] == drawn[1] != drawn[2]
    train_as_own(own, model, Data(Examples(*make_data(8)), SPEC), START, nothing)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("returned", "kind", "message"),
    [
        (None, RunError, "returned NoneType: have it return the weights"),
        ({}, RunError, "tensor 0.weight is missing"),
        ({"0.weight": torch.zeros(1)}, RunError, r"tensor 0.weight is F32 \[1\]"),
    ],
)
def test_other_things_than_the_models_weights_are_refused(returned: object, kind: type, message: str) -> None:
    with pytest.raises(kind, match=message):
        train_as_own(lambda *_: returned, make_model(), data_of(), START, nothing)


def test_weights_that_are_not_finite_have_diverged() -> None:
    def own(model: nn.Module, *_: object) -> dict[str, torch.Tensor]:
        return {name: each * float("nan") for name, each in model.state_dict().items()}

    with pytest.raises(DivergedError, match=r"the training function made 0\.weight not finite"):
        train_as_own(own, make_model(), data_of(), START, nothing)


def test_what_the_loop_raises_passes() -> None:
    def own(*_: object) -> dict[str, torch.Tensor]:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        train_as_own(own, make_model(), data_of(), START, nothing)


def test_agent_trains_by_the_loop_on_what_the_cloud_does_not_hold_back(tmp_path: Path) -> None:
    seen: list[tuple[Start, int]] = []

    def own(model: nn.Module, data: Data, start: Start, _: object) -> dict[str, torch.Tensor]:
        seen.append((start, len(data)))
        return {name: torch.ones_like(each) for name, each in model.state_dict().items()}

    images, labels = (tensor.numpy() for tensor in make_data(40))
    shard = Shard(images, labels.astype(np.int64))
    disk = AgentState(tmp_path / "agent", "edge-1")
    local = LocalModels(RUN, AgentData(shard, shard, 0), disk, CPU, (), 0.0, own_training=own)
    trained = local.keep(3, None, local.pretrain(3, None, nothing))
    assert trained.round == 3
    assert all((each == 1).all() for each in read_state_dict(disk.local_weights).values())
    start, num_examples = seen[0]
    assert (start.round, start.purpose, start.config) == (3, "pretrain", RUN.pretrain)
    assert 20 < num_examples < 40


def test_agent_of_the_library_has_the_keys_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ECAVG_AGENT_KEEP_MODELS", "5")
    taken = []

    async def take_part(config: object, train: object) -> int:
        taken.append((config, train))
        return 0

    monkeypatch.setattr(agent_module, "take_part", take_part)
    ecavg.Agent("localhost:1", agent_id="edge-1", allow_factory=["shapes:net"]).run(nothing)
    config, train = taken[0]
    assert (config.server, config.agent_id, config.keep_models) == ("localhost:1", "edge-1", 5)
    assert config.allow_factory == ("shapes:net",)
    assert train is nothing


@pytest.mark.parametrize("keys", [{"agent_ids": "edge-1"}, {"keep_models": 0}])
def test_wrong_key_of_the_library_is_a_usage_error(keys: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=next(iter(keys))):
        ecavg.Agent("localhost:1", **keys)
