"""The moving average of a fine-tune's weights: its formula, and what becomes of it in a training."""

from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from ecavg.cloud_server.trainer import pipeline
from ecavg.cloud_server.trainer.finetune import CombinedData, fine_tune
from ecavg.cloud_server.trainer.measuring import Measuring
from ecavg.cloud_server.trainer.moving_average import MovingAverage
from ecavg.cloud_server.trainer.selection import Selection
from ecavg.common import training, training_step
from ecavg.common.batches import DeviceData
from ecavg.common.config import FineTuneConfig, RunConfig
from ecavg.common.models import build_model
from ecavg.common.training import Examples
from tests.tapes import TapeRecorder

CPU = torch.device("cpu")
RUN = RunConfig(hidden_units=16, fine_tune=FineTuneConfig(epochs=2, batch_size=64))
DECAY = 0.75


@pytest.fixture(scope="module")
def examples() -> Examples:
    bunch = load_digits()
    images = torch.from_numpy(bunch.images[:300] * (255 / 16)).to(torch.uint8)[:, None]
    return Examples(images, torch.from_numpy(bunch.target[:300]))


def test_average_is_that_of_the_weights_after_each_step(examples: Examples) -> None:
    model = build_model(RUN, seed=1)
    average, seen = MovingAverage(model, DECAY), list[Tensor]()

    def after_step() -> None:
        average.update()
        seen.append(model[1].weight.detach().clone())

    fine_tune(model, examples, RUN, round_number=1, device=CPU, after_step=after_step)
    assert len(seen) == 2 * 5
    expected = seen[0].double()
    for weight in seen[1:]:
        expected = DECAY * expected + (1 - DECAY) * weight.double()
    assert average.load()
    assert torch.allclose(model[1].weight.double(), expected, atol=1e-6)
    assert not torch.allclose(model[1].weight, seen[-1], atol=1e-4)


def test_keeping_an_average_does_not_change_the_training(examples: Examples) -> None:
    def trained(**options: Any) -> dict[str, Tensor]:
        model = build_model(RUN, seed=1)
        keep = {"after_step": MovingAverage(model, DECAY).update} if options else {}
        fine_tune(model, examples, RUN, round_number=1, device=CPU, **keep)
        return model.state_dict()

    plain, kept = trained(), trained(average=True)
    assert all(torch.equal(plain[name], kept[name]) for name in plain)


def test_without_a_step_there_is_no_average() -> None:
    model = nn.Linear(2, 2)
    before = model.weight.detach().clone()
    assert not MovingAverage(model, DECAY).load()
    assert torch.equal(model.weight, before)


def test_frozen_parameters_and_buffers_stay_as_they_are() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model[0].weight.requires_grad_(False)
    average = MovingAverage(model, DECAY)
    average.update()
    with torch.no_grad():
        model[0].bias.add_(1)
        # Whoever changes a frozen parameter does not want the average of it.
        model[0].weight.add_(1)
        model[1].running_mean.add_(1)
    weight, bias = model[0].weight.clone(), model[0].bias.detach().clone()
    average.update()
    average.load()
    assert torch.equal(model[0].weight, weight)
    assert torch.equal(model[1].running_mean, torch.ones(2))
    assert torch.allclose(model[0].bias, bias - DECAY)


def test_small_changes_of_bfloat16_weights_are_not_lost() -> None:
    model = nn.Linear(1, 1, bias=False).bfloat16()
    nn.init.constant_(model.weight, 256)
    average = MovingAverage(model, 0.99)
    average.update()
    nn.init.constant_(model.weight, 258)
    for _ in range(100):
        average.update()
    # In bfloat16 itself each hundredth of the way would be rounded away.
    assert average._averages[0].item() == pytest.approx(258 - 2 * 0.99**100, abs=1e-3)


def test_average_is_the_same_where_steps_are_replayed(
    examples: Examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = TapeRecorder()
    run = RUN.model_copy(update={"fine_tune": RUN.fine_tune.model_copy(update={"epochs": 15})})
    monkeypatch.setattr(training_step, "_has_tensor_rate", lambda device: True)

    def averaged() -> Tensor:
        model = build_model(run, seed=1)
        average = MovingAverage(model, DECAY)
        fine_tune(model, examples, run, round_number=1, device=CPU, after_step=average.update)
        average.load()
        return model[1].weight.detach()

    plain = averaged()
    monkeypatch.setattr(training, "recorder_for", lambda device: recorder)
    assert torch.equal(averaged(), plain)
    assert recorder.num_replayed > 50


@pytest.mark.parametrize("num_held_out", [50, 0])
def test_average_that_is_measured_has_statistics_of_its_own(
    examples: Examples, tmp_path: Path, num_held_out: int
) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 10))
    average = MovingAverage(model, DECAY)
    data = CombinedData(examples, Examples(*(part[:num_held_out] for part in examples)))
    selection = Selection(Measuring(model, RUN, data, CPU), [], None, scratch=tmp_path)
    fine_tune(model, examples, RUN, round_number=1, device=CPU, after_step=average.update)
    before = model[2].running_mean.clone()
    expected = ["fine_tuned", "fine_tuned_average"] if num_held_out else ["fine_tuned"]
    assert list(pipeline._trained(average, data, selection)) == expected
    assert torch.equal(model[2].running_mean, before) == (num_held_out == 0)
    if num_held_out:
        with torch.no_grad():
            activations = model[1](
                DeviceData(examples.inputs, RUN.spec, CPU).normalise(examples.inputs).flatten(1)
            )
        assert torch.allclose(model[2].running_mean, activations.mean(0), atol=0.05)
