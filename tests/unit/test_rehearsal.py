"""What a rehearsal lets pass, and what it finds before anybody trains."""

import random

import numpy as np
import pytest
import torch

from ecavg.common.config import RunConfig
from ecavg.common.errors import UsageError
from ecavg.common.models import build_model
from ecavg.common.rehearsal import check_probe, rehearse

ODD = (
    "auxiliary", "auxiliary_dict", "spectral", "left_out_buffer", "persistent_buffer", "tied", "lazy",
    "scripted", "weight_norm", "integer_parameter",
)  # fmt: skip


def run_of(name: str, **more: object) -> RunConfig:
    return RunConfig.model_validate({"model": f"tests.integration.models:{name}", **more})


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_odd_models_that_work_are_let_pass(name: str, optimizer: str) -> None:
    probe = rehearse(run_of(name, pretrain={"optimizer": optimizer}))
    assert len(probe) == 16
    assert np.isfinite(probe).all()


@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet18"])
def test_models_of_torchvision_are_let_pass(name: str) -> None:
    assert len(rehearse(RunConfig(model=name, dataset="cifar10"))) == 16


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("unseeded", "not determined by its state_dict and the run's seed"),
        ("drifting", "after a training step, another model with its state_dict gives different outputs"),
        ("copies", "its state_dict has copies, so no weights can be loaded by it"),
        ("frozen", "has no parameter that could be trained"),
        ("extra_state", "its state_dict has '_extra_state', which is dict and no tensor"),
        ("only_evaluates", "failed: RuntimeError: this model is for inference"),
        ("sparse_gradient", "failed: RuntimeError: .*sparse"),
        ("one_image_too_few", "Expected more than 1 spatial element when training"),
        ("double_complex", r"'unused' has the dtype torch.complex128"),
    ],
)
def test_models_that_cannot_work_are_refused_in_one_line(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as refused:
        rehearse(run_of(name))
    assert f"model 'tests.integration.models:{name}'" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_batches_too_small_for_the_model_are_refused() -> None:
    run = RunConfig.model_validate(
        {"model": "resnet18", "dataset": "cifar10", "fine_tune": {"batch_size": 1}}
    )
    with pytest.raises(UsageError, match="this model needs at least 2 images in a batch"):
        rehearse(run)


def test_rehearsal_is_the_same_each_time_and_leaves_the_random_states_alone() -> None:
    states = [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]
    assert rehearse(run_of("left_out_buffer")) == rehearse(run_of("left_out_buffer"))
    assert states == [
        torch.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),
    ]


def test_probe_knows_another_model_behind_the_same_state_dict(monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of("by_environment")
    servers = rehearse(run)
    check_probe(run, rehearse(run), servers)
    monkeypatch.setenv("SCALE_OF_THIS_MACHINE", "1.05")
    with pytest.raises(UsageError, match="gives other outputs here than on the server"):
        check_probe(run, rehearse(run), servers)


def test_probe_forgives_what_rounding_makes() -> None:
    run = run_of("spectral")
    check_probe(run, rehearse(run), [value + 1e-5 for value in rehearse(run)])


def test_probe_depends_on_neither_the_weights_nor_the_runs_seed() -> None:
    probes = [rehearse(run_of("linear", seed=seed)) for seed in (1, 2)]
    assert probes[0] == probes[1]


def test_nothing_is_compared_without_a_probe() -> None:
    check_probe(RunConfig(), (), (1.0, 2.0))
    check_probe(RunConfig(), (1.0, 2.0), ())


def test_parameters_are_drawn_anew_and_left_out_buffers_are_not() -> None:
    run = run_of("left_out_buffer")
    common, own, again = build_model(run), build_model(run, seed=7), build_model(run, seed=7)
    assert torch.equal(common.projection, own.projection)
    assert torch.equal(own.head.weight, again.head.weight)
    assert not torch.equal(common.head.weight, own.head.weight)
