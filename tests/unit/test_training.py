import math
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as v2

from ecavg.common import training
from ecavg.common.batches import CROP_PADDING, draw_epoch, horizontal_flip, random_crop
from ecavg.common.config import RunConfig, TrainingConfig
from ecavg.common.devices import make_deterministic
from ecavg.common.errors import DivergedError, UsageError
from ecavg.common.evaluation import evaluate, predict
from ecavg.common.models import build_model
from ecavg.common.schedule import Place, learning_rate_factor, whole
from ecavg.common.seeds import derive_seed
from ecavg.common.tasks.classification import Classification
from ecavg.common.training import Examples, Recipe, StepReport, train
from ecavg.common.weights import write_state_dict
from tests.recipes import CPU, SPEC, Recorder, make_data, make_model, normalised, recipe_of


def run(model: nn.Module, data: tuple[Tensor, Tensor], seed: int = 0, **config: Any) -> float:
    more = {key: config.pop(key) for key in ("on_step", "checkpoint") if key in config}
    is_balanced = config.pop("class_balanced", False)
    recipe = Recipe(TrainingConfig(**config), Classification(SPEC), seed, "float32", is_balanced)
    return train(model, Examples(*data), recipe, device=CPU, **more)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("name", ["mlp", "mobilenet_v2"])
def test_same_seed_gives_the_same_file_bit_by_bit(name: str, optimizer: str, tmp_path: Path) -> None:
    spec = RunConfig(model=name, dataset="cifar10", image_shape=(3, 16, 16))
    images = torch.randint(0, 256, (21, 3, 16, 16), dtype=torch.uint8)
    labels = torch.randint(0, 10, (21,))
    config = TrainingConfig(
        epochs=2, batch_size=10, optimizer=optimizer, augment=("horizontal_flip", "random_crop")
    )
    files = []
    for attempt, seed in enumerate((7, 7, 8)):
        torch.manual_seed(attempt)  # what the process drew before does not matter
        model = build_model(spec, seed=1)
        train(model, Examples(images, labels), recipe_of(spec, seed, config), device=CPU)
        write_state_dict(model.state_dict(), tmp_path / "x")
        files.append((tmp_path / "x").read_bytes())
    assert files[0] == files[1]
    assert files[0] != files[2]


def test_global_random_state_is_left_as_it_was() -> None:
    model = make_model(dropout=0.5)
    before = torch.get_rng_state()
    run(model, make_data(20), epochs=1, batch_size=8)
    assert torch.equal(torch.get_rng_state(), before)


WRITTEN_OUT: dict[str, tuple[dict[str, Any], Callable[[Any], torch.optim.Optimizer]]] = {
    "sgd": (
        {"weight_decay": 1e-2, "augment": ("random_crop", "horizontal_flip")},
        lambda p: torch.optim.SGD(p, 0.02, 0.9, weight_decay=1e-2, fused=True),
    ),
    "nesterov": (
        {"nesterov": True, "label_smoothing": 0.1},
        lambda p: torch.optim.SGD(p, 0.02, 0.9, nesterov=True, fused=True),
    ),
    "adam": (
        {"optimizer": "adam", "augment": ("horizontal_flip",)},
        lambda p: torch.optim.Adam(p, 0.02, fused=True),
    ),
    "adamw": (
        {"optimizer": "adamw", "weight_decay": 0.1, "augment": ("random_crop",)},
        lambda p: torch.optim.AdamW(p, 0.02, weight_decay=0.1, fused=True),
    ),
}


def written_out(model: nn.Module, optimizer: Any, config: TrainingConfig, seed: int, balanced: bool) -> float:
    """Train as `train` does on a CPU, in a plain loop; return the mean loss of the last epoch."""
    images, labels = make_data(43)
    std = torch.tensor(SPEC.inputs.std).view(-1, 1, 1)
    shift = -torch.tensor(SPEC.inputs.mean).view(-1, 1, 1) / std
    x = torch.addcmul(shift, images.float(), 1 / (255 * std))
    num_batches = 5
    for epoch in range(config.epochs):
        torch.manual_seed(derive_seed(seed, "layers", epoch, 0))
        order, corners, flipped = draw_epoch(
            43, derive_seed(seed, "data", epoch), labels if balanced else None
        )
        total = torch.zeros((), dtype=torch.float64)
        for index in range(num_batches):
            part = slice(10 * index, 10 * index + 10)
            step = epoch * num_batches + index
            factor = learning_rate_factor(config.schedule, whole(config), step, num_batches)
            optimizer.param_groups[0]["lr"] = config.learning_rate * factor
            batch, y = x[order[part]], labels[order[part]]
            if "random_crop" in config.augment:
                batch = random_crop(batch, corners[part])
            if "horizontal_flip" in config.augment:
                batch = horizontal_flip(batch, flipped[part])
            logits = model(batch.contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits, y, reduction="sum", label_smoothing=config.label_smoothing)
            optimizer.zero_grad()
            (loss * (1 / len(y))).backward()
            optimizer.step()
            total += loss.detach()
    return total.item() / 43


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("fits", [True, False])
@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_training_has_the_bits_of_a_loop_that_is_written_out(
    name: str, fits: bool, balanced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ecavg.common.batches._fits", lambda tensors, device: fits)
    changes, optimizer = WRITTEN_OUT[name]
    config = TrainingConfig(**{"epochs": 3, "batch_size": 10, "learning_rate": 0.02, **changes})
    found, expected = (make_model(batch_norm=True, dropout=0.3) for _ in range(2))
    expected.to(memory_format=torch.channels_last)
    global_state = torch.get_rng_state()
    loss = written_out(expected, optimizer(expected.parameters()), config, 5, balanced)
    torch.set_rng_state(global_state)

    assert run(found, make_data(43), seed=5, class_balanced=balanced, **config.model_dump()) == loss

    for key, tensor in expected.state_dict().items():
        assert torch.equal(found.state_dict()[key], tensor), key


def test_thread_that_gathers_batches_ends_with_a_stopped_training(monkeypatch: pytest.MonkeyPatch) -> None:
    class StoppedError(Exception):
        pass

    def stop(report: StepReport) -> None:
        seen.append({thread.name[:7] for thread in threading.enumerate()})
        raise StoppedError

    monkeypatch.setattr("ecavg.common.batches._fits", lambda tensors, device: False)
    seen: list[set[str]] = []
    with pytest.raises(StoppedError) as stopped:
        run(make_model(), make_data(50), epochs=1, batch_size=5, on_step=stop)
    # The error holds on to the frames of the training, and the thread has ended all the same.
    assert stopped.value.__traceback__
    assert "batches" in seen[0]
    assert "batches" not in {thread.name[:7] for thread in threading.enumerate()}


@pytest.mark.parametrize(
    ("config", "reference"),
    [
        ({"momentum": 0.9, "weight_decay": 1e-2}, lambda p: torch.optim.SGD(p, 0.1, 0.9, weight_decay=1e-2)),
        ({"momentum": 0.9, "nesterov": True}, lambda p: torch.optim.SGD(p, 0.1, 0.9, nesterov=True)),
        ({"optimizer": "adam", "weight_decay": 1e-2}, lambda p: torch.optim.Adam(p, 0.1, weight_decay=1e-2)),
        ({"optimizer": "adamw", "weight_decay": 0.1}, lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1)),
        ({"label_smoothing": 0.2, "momentum": 0.0}, lambda p: torch.optim.SGD(p, 0.1)),
    ],
)
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_training_equals_a_plain_loop(config: dict[str, Any], reference: Any, schedule: str) -> None:
    images, labels = make_data(40)
    found, expected = make_model(), make_model()
    losses = []
    optimizer = reference(expected.parameters())
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)
    for _ in range(6):
        smoothing = config.get("label_smoothing", 0.0)
        loss = F.cross_entropy(expected(normalised(images)), labels, label_smoothing=smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if schedule == "cosine":
            scheduler.step()
        losses.append(loss.item())

    # One batch an epoch: the order within it makes no difference beyond rounding.
    settings = {"learning_rate": 0.1, "schedule": schedule, "epochs": 6, "batch_size": 40, **config}
    last_loss = run(found, (images, labels), **settings)

    assert last_loss == pytest.approx(losses[-1], rel=1e-3)
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)


def test_training_learns() -> None:
    model = make_model(batch_norm=True)
    run(model, make_data(300), epochs=3, batch_size=20, schedule="one-cycle", augment=("horizontal_flip",))
    images, labels = make_data(200, seed=1)
    assert evaluate(model, images, labels, task=Classification(SPEC), device=CPU).score > 0.95


def test_every_epoch_shows_each_image_once_normalised_in_another_order() -> None:
    images, labels = make_data(25)
    model = Recorder()
    run(model, (images, labels), epochs=2, batch_size=10)
    assert [len(batch) for batch in model.batches] == [10, 10, 5] * 2
    expected = normalised(images)
    orders = []
    for epoch in (model.batches[:3], model.batches[3:]):
        seen = torch.cat(epoch)
        distances = (seen[:, None] - expected[None]).abs().amax((2, 3, 4))
        assert distances.amin(1).max() < 1e-5
        orders.append(distances.argmin(1).tolist())
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(25))
    assert orders[0] != orders[1]


def test_plain_training_draws_order_then_corners_then_flips() -> None:
    images, labels = make_data(25)
    model = Recorder()
    run(model, (images, labels), seed=4, epochs=2, batch_size=25, augment=("random_crop", "horizontal_flip"))
    for epoch, batch in enumerate(model.batches):  # other draws would be another result from the same run
        generator = torch.Generator().manual_seed(derive_seed(4, "data", epoch))
        order = torch.randperm(25, generator=generator)
        corners = torch.randint(2 * CROP_PADDING + 1, (25, 2), generator=generator)
        flipped = torch.rand(25, generator=generator) < 0.5
        expected = horizontal_flip(random_crop(normalised(images)[order], corners), flipped)
        torch.testing.assert_close(batch, expected)


def test_augmentation_in_training_draws_all_offsets_and_both_directions() -> None:
    images, _ = make_data(1)
    many = images.expand(2000, -1, -1, -1), torch.zeros(2000, dtype=torch.int64)
    model = Recorder()
    run(model, many, epochs=1, batch_size=500, augment=("random_crop", "horizontal_flip"))
    padded = v2.pad(normalised(images)[0], [CROP_PADDING])
    crops = [v2.crop(padded, top, left, 8, 8) for top in range(9) for left in range(9)]
    known = torch.stack([*crops, *(v2.horizontal_flip(crop) for crop in crops)])
    distances = torch.cdist(torch.cat(model.batches).flatten(1), known.flatten(1))
    assert distances.amin(1).max() < 0.05
    counts = distances.argmin(1).bincount(minlength=len(known))
    assert (counts > 0).all()  # a given one of the 162 is missing once in 240,000 draws of 2000
    assert counts[:81].sum() == pytest.approx(1000, abs=120)  # five standard deviations


def test_loss_is_computed_in_float32_whatever_the_model_answers_in() -> None:
    class Coarse(Recorder):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).bfloat16()

    images, labels = make_data(40)
    torch.manual_seed(0)
    model = Coarse()
    logits = predict(model, images, task=Classification(SPEC), device=CPU)
    assert logits.dtype == torch.float32
    expected = -(F.one_hot(labels, 3) * logits.double().log_softmax(1)).sum(1).mean().item()

    found = run(model, (images, labels), epochs=1, batch_size=40)

    assert found == pytest.approx(expected, rel=1e-6)  # bfloat16 would be off by up to 4e-3


def test_class_balanced_epochs_show_rare_classes_as_often_as_others() -> None:
    images, _ = make_data(40)
    labels = torch.tensor([0] * 34 + [1] * 5 + [2])
    model = Recorder()
    run(model, (images, labels), epochs=2, batch_size=16, class_balanced=True)
    assert [len(batch) for batch in model.batches] == [16, 16, 8] * 2
    epochs = []
    for epoch in (model.batches[:3], model.batches[3:]):
        distances = (torch.cat(epoch)[:, None] - normalised(images)[None]).abs().amax((2, 3, 4))
        assert distances.amin(1).max() < 1e-5
        epochs.append(distances.argmin(1))
        assert sorted(labels[epochs[-1]].bincount().tolist()) == [13, 13, 14]
    assert not torch.equal(*epochs)


def test_single_last_image_joins_the_batch_before_where_batch_norm_needs_it() -> None:
    model = make_model(batch_norm=True)
    run(model, make_data(21), epochs=1, batch_size=10)
    assert model[1].num_batches_tracked == 2
    with pytest.raises(UsageError, match=r"1 images in batches of 10.* at least 2"):
        run(model, make_data(1), epochs=1, batch_size=10)
    run(make_model(), make_data(1), epochs=1, batch_size=10)  # without BatchNorm it is a batch


def test_no_epochs_leave_the_weights_alone() -> None:
    model = make_model()
    assert math.isnan(run(model, make_data(1), epochs=0))
    assert torch.equal(model[0].weight, make_model()[0].weight)


def test_training_follows_its_part_of_the_schedule_of_the_run() -> None:
    """Two trainings of one epoch each, in a schedule of two, take the steps of one training of two epochs."""
    rates = []
    for places in ([None], [Place(0, 2), Place(1, 2)]):
        seen: list[float] = []
        with pytest.MonkeyPatch.context() as patch:
            step = torch.optim.SGD.step
            patch.setattr(
                torch.optim.SGD,
                "step",
                lambda self, step=step, seen=seen: seen.append(self.param_groups[0]["lr"]) or step(self),
            )
            for place in places:
                epochs = 2 // len(places)
                config = TrainingConfig(epochs=epochs, batch_size=5, schedule="one-cycle")
                recipe = Recipe(config, Classification(SPEC), 0, "float32", place=place)
                train(make_model(), Examples(*make_data(20)), recipe, device=CPU)
        rates.append(seen)
    assert rates[0] == rates[1]
    assert len(rates[0]) == 8


def test_reports_are_rare_carry_the_mean_loss_and_end_with_the_last_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = iter(range(10_000))
    monkeypatch.setattr(training.time, "monotonic", lambda: next(now))
    monkeypatch.setattr(training, "REPORT_SECONDS", 3.5)
    reports: list[StepReport] = []
    loss = run(make_model(), make_data(50), epochs=1, batch_size=5, on_step=reports.append)

    assert [report.step for report in reports] == [1, 5, 9, 10]
    assert {report.num_steps for report in reports} == {10}
    images = [5, 20, 20, 5]  # since the report before
    mean = sum(report.loss * num for report, num in zip(reports, images, strict=True)) / 50
    assert mean == pytest.approx(loss)


def test_callback_can_stop_the_training() -> None:
    class StoppedError(Exception):
        pass

    def stop(_: StepReport) -> None:
        raise StoppedError

    before = torch.get_rng_state()
    with pytest.raises(StoppedError):
        run(make_model(), make_data(50), epochs=1, batch_size=5, on_step=stop)
    assert torch.equal(torch.get_rng_state(), before)


def test_diverged_training_says_so() -> None:
    message = r"diverged in epoch \d+, its loss is (nan|inf): lower learning_rate"
    with pytest.raises(DivergedError, match=message):
        run(make_model(), make_data(50), epochs=20, batch_size=5, learning_rate=1000)


def test_deterministic_mode_is_on_and_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        make_deterministic()
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert not torch.backends.cudnn.allow_tf32
        assert torch.backends.cudnn.conv.fp32_precision != "tf32"
        augment = ("random_crop", "horizontal_flip")
        run(make_model(batch_norm=True), make_data(20), epochs=1, batch_size=10, augment=augment)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True
        torch.backends.cudnn.allow_tf32 = True
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
