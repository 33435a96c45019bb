import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms.v2 import functional as v2

from common import training
from common.batches import CROP_PADDING, draw_epoch, horizontal_flip, random_crop
from common.config import DatasetSpec, RunConfig, TrainingConfig
from common.devices import make_deterministic, select_device
from common.errors import DivergedError, UsageError
from common.evaluation import evaluate, predict, recompute_statistics
from common.models import build_model
from common.schedule import Place, learning_rate_factor, whole
from common.seeds import derive_seed
from common.training import CheckpointFile, Examples, Recipe, StepReport, train
from common.weights import read_state_dict, write_state_dict
from tests.recipes import recipe_of

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
SPEC = DatasetSpec(3, (3, 8, 8), (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))


def make_data(num_images: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images whose brightest channel is their label."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (num_images,), generator=generator)
    images = torch.randint(0, 160, (num_images, 3, 8, 8), dtype=torch.uint8, generator=generator)
    images[torch.arange(num_images), labels] += 80
    return images, labels


def make_model(seed: int = 0, *, batch_norm: bool = False, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(seed)
    norm = nn.BatchNorm2d(6) if batch_norm else nn.Identity()
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), norm, nn.ReLU(), nn.Flatten(), nn.Dropout(dropout), nn.Linear(216, 3)
    )


def run(model: nn.Module, data: tuple[Tensor, Tensor], seed: int = 0, **config: Any) -> float:
    more = {key: config.pop(key) for key in ("on_step", "checkpoint") if key in config}
    is_balanced = config.pop("class_balanced", False)
    recipe = Recipe(TrainingConfig(**config), SPEC, seed, "float32", is_balanced)
    return train(model, Examples(*data), recipe, device=CPU, **more)


def normalised(images: Tensor) -> Tensor:
    return v2.normalize(v2.to_dtype(images, torch.float32, scale=True), list(SPEC.mean), list(SPEC.std))


class Recorder(nn.Module):
    """Keeps what it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(192, 3)
        self.batches: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.batches.append(x.detach().clone())
        return self.linear(x.flatten(1))


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
    std = torch.tensor(SPEC.std).view(-1, 1, 1)
    shift = -torch.tensor(SPEC.mean).view(-1, 1, 1) / std
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
    monkeypatch.setattr("common.batches._fits", lambda tensors, device: fits)
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


def test_images_that_do_not_fit_are_measured_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = make_data(43)
    measured = []
    for fits in (True, False):
        monkeypatch.setattr("common.batches._fits", lambda tensors, device, fits=fits: fits)
        model = make_normalised_model()
        recompute_statistics(model, images, spec=SPEC, device=CPU, seed=2, batch_size=10)
        found = evaluate(model, images, labels, spec=SPEC, device=CPU, batch_size=10)
        measured.append((found.loss, [tensor.tolist() for tensor in model.state_dict().values()]))
    assert measured[0] == measured[1]


def test_thread_that_gathers_batches_ends_with_a_stopped_training(monkeypatch: pytest.MonkeyPatch) -> None:
    class StoppedError(Exception):
        pass

    def stop(report: StepReport) -> None:
        seen.append({thread.name[:7] for thread in threading.enumerate()})
        raise StoppedError

    monkeypatch.setattr("common.batches._fits", lambda tensors, device: False)
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
    assert evaluate(model, images, labels, spec=SPEC, device=CPU).accuracy > 0.95


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
    logits = predict(model, images, spec=SPEC, device=CPU)
    assert logits.dtype == torch.float32
    expected = -(F.one_hot(labels, 3) * logits.double().log_softmax(1)).sum(1).mean().item()

    found = run(model, (images, labels), epochs=1, batch_size=40)

    assert found == pytest.approx(expected, rel=1e-6)  # bfloat16 would be off by up to 4e-3


def test_class_balanced_training_keeps_no_checkpoint() -> None:
    options = {"class_balanced": True, "checkpoint": CheckpointFile(Path("x"))}
    with pytest.raises(ValueError, match="plain training"):
        run(make_model(), make_data(20), epochs=1, batch_size=10, **options)


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
                recipe = Recipe(config, SPEC, 0, "float32", place=place)
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


@pytest.mark.parametrize("was_training", [True, False])
def test_evaluation_equals_a_plain_loop_over_images(was_training: bool) -> None:
    images, labels = make_data(23)
    model = make_model(batch_norm=True, dropout=0.5).train(was_training)
    model[1].eval()  # the user's own frozen layer
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    found = evaluate(model, images, labels, spec=SPEC, device=CPU, batch_size=10)
    predicted = predict(model, images, spec=SPEC, device=CPU, batch_size=7)

    assert model.training is model[4].training is was_training
    assert not model[1].training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model.eval()
    logits = torch.cat([model(normalised(image)[None]) for image in images]).detach()
    assert torch.equal(found.correct, logits.argmax(1) == labels)
    assert found.accuracy == found.correct.double().mean().item()
    assert found.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert found.num_examples == 23
    torch.testing.assert_close(predicted, logits)
    # More batches than are fetched at once.
    torch.testing.assert_close(predict(model, images, spec=SPEC, device=CPU, batch_size=1), logits)


def test_predictions_can_be_trained_with() -> None:
    images, _ = make_data(5)
    predicted = predict(make_model(), images, spec=SPEC, device=CPU)
    assert predicted.dtype == torch.float32
    assert not predicted.requires_grad
    scale = torch.ones(3, requires_grad=True)
    (predicted * scale).sum().backward()  # an inference tensor cannot be saved for this
    assert torch.allclose(scale.grad, predicted.sum(0))


def make_normalised_model() -> nn.Module:
    """Chance before a BatchNorm, one BatchNorm after another, and statistics that fit nothing."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.BatchNorm2d(3, momentum=0.3), nn.Flatten(), nn.Dropout(0.5), nn.Linear(192, 6),
        nn.BatchNorm1d(6, momentum=None), nn.Linear(6, 3),
    )  # fmt: skip
    for norm in (model[0], model[4]):
        for tensor in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
            tensor.uniform_(1, 3)
        norm.num_batches_tracked.fill_(77)
    return model


@pytest.mark.parametrize(("batch_size", "num_batches"), [(512, 1), (25, 1), (10, 3), (1, 12)])
def test_recomputed_statistics_are_the_mean_over_equal_batches(batch_size: int, num_batches: int) -> None:
    images, _ = make_data(25)
    model = make_normalised_model()
    given = {name: tensor.double().numpy().copy() for name, tensor in model.state_dict().items()}
    mean, std = (np.array(values).reshape(3, 1, 1) for values in (SPEC.mean, SPEC.std))
    x = (images.double().numpy() / 255 - mean) / std
    order = torch.randperm(25, generator=torch.Generator().manual_seed(9)).numpy()
    expected: dict[str, list[Any]] = {"0": [], "4": []}
    for batch in np.array_split(x[order], num_batches):
        hidden = batch.transpose(0, 2, 3, 1).reshape(-1, 3)
        expected["0"].append([hidden.mean(0), hidden.var(0, ddof=1)])
        hidden = (hidden - hidden.mean(0)) / np.sqrt(hidden.var(0) + 1e-5)
        hidden = hidden * given["0.weight"] + given["0.bias"]
        hidden = hidden.reshape(-1, 8, 8, 3).transpose(0, 3, 1, 2).reshape(-1, 192)
        hidden = hidden @ given["3.weight"].T + given["3.bias"]
        expected["4"].append([hidden.mean(0), hidden.var(0, ddof=1)])

    recompute_statistics(model, images, spec=SPEC, device=CPU, seed=9, batch_size=batch_size)

    after = model.state_dict()
    for norm, batches in expected.items():
        running_mean, running_var = np.mean(batches, 0)
        np.testing.assert_allclose(after[f"{norm}.running_mean"], running_mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(after[f"{norm}.running_var"], running_var, rtol=1e-4)
        assert after[f"{norm}.num_batches_tracked"] == num_batches
    parameters = [name for name, _ in model.named_parameters()]
    assert all(np.array_equal(after[name].double().numpy(), given[name]) for name in parameters)


def test_recomputing_statistics_leaves_modes_momenta_and_chance_alone() -> None:
    model = make_normalised_model()
    model[0].eval()
    before = torch.get_rng_state()
    recompute_statistics(model, make_data(25)[0], spec=SPEC, device=CPU, seed=0)
    assert [module.training for module in model] == [False, True, True, True, True, True]
    assert (model[0].momentum, model[4].momentum) == (0.3, None)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(RuntimeError):
        recompute_statistics(model, torch.zeros(2, 3, 9, 9, dtype=torch.uint8), spec=SPEC, device=CPU, seed=0)
    assert (model[0].momentum, model[4].momentum, model.training) == (0.3, None, True)


def test_recomputed_variances_have_what_differs_between_agents() -> None:
    images = torch.zeros(60, 3, 8, 8, dtype=torch.uint8)
    images[30:] = 255  # one agent at night, one by day
    model = make_normalised_model()
    recompute_statistics(model, images, spec=SPEC, device=CPU, seed=0, batch_size=30)
    assert model[0].running_var.numpy() == pytest.approx(0.25 / np.square(SPEC.std), rel=0.1)


def test_statistics_stay_where_there_is_nothing_to_recompute() -> None:
    images, _ = make_data(10)
    batch_statistics = nn.Sequential(Recorder(), nn.BatchNorm1d(3, track_running_stats=False))
    for model in (nn.Sequential(Recorder()), batch_statistics):
        recompute_statistics(model, images, spec=SPEC, device=CPU, seed=0)
        assert model[0].batches == []
    one = make_normalised_model()
    before = {name: tensor.clone() for name, tensor in one.state_dict().items()}
    recompute_statistics(one, images[:1], spec=SPEC, device=CPU, seed=0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in one.state_dict().items())


class FarDevice(TorchDispatchMode):
    """A device that has shapes but no numbers, and the count of how often the host waited for one.

    PyTorch's "meta" device refuses to give numbers, and with this mode it gives zeros.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if args and isinstance(args[0], Tensor) and args[0].is_meta:
            if func is torch.ops.aten._local_scalar_dense.default:
                self.num_waits += 1
                return 1
            if func is torch.ops.aten._to_copy.default and given.get("device") == CPU:
                self.num_waits += 1
                return torch.zeros(args[0].shape, dtype=given.get("dtype") or args[0].dtype)
        if func is torch.ops.aten.copy_.default and args[1].is_meta and not args[0].is_meta:
            self.num_waits += 1
            return args[0]
        return func(*args, **given)


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    monkeypatch.setattr("common.batches._fits", lambda tensors, device: True)
    return torch.device("meta")


@pytest.mark.parametrize(("num_batches", "num_waits"), [(1, 1), (16, 1), (17, 2), (50, 4)])
def test_evaluation_waits_for_the_device_once_in_sixteen_batches(
    far: torch.device, num_batches: int, num_waits: int
) -> None:
    images, labels = make_data(2 * num_batches)
    with FarDevice() as mode:
        evaluate(make_normalised_model(), images, labels, spec=SPEC, device=far, batch_size=2)
    assert mode.num_waits == num_waits


@pytest.mark.parametrize("num_batches", [1, 50])
def test_recomputing_statistics_waits_for_the_device_once_for_each_layer(
    far: torch.device, num_batches: int
) -> None:
    model = make_normalised_model()
    with FarDevice() as mode:
        images, _ = make_data(3 * num_batches)
        recompute_statistics(model, images, spec=SPEC, device=far, seed=0, batch_size=3)
    # The model has two layers of BatchNorm, and its counts are on the device again.
    assert mode.num_waits == 2
    assert {buffer.device for buffer in model.buffers()} == {far}


def test_model_that_fails_in_evaluation_is_back_in_its_mode() -> None:
    model = make_model()
    with pytest.raises(RuntimeError):
        evaluate(
            model, torch.zeros(2, 3, 9, 9, dtype=torch.uint8), torch.tensor([0, 1]), spec=SPEC, device=CPU
        )
    assert model.training


def test_derived_seeds_are_stable_and_tell_all_parts_apart() -> None:
    assert derive_seed(1, "round", 2) == derive_seed(1, "round", 2)
    # python3 -c 'import hashlib; print(int(hashlib.sha256(b"[0, \"a\", 1]").hexdigest()[:16], 16) >> 1)'
    assert derive_seed(0, "a", 1) == 5352727647617221297
    parts = [(), (1,), ("1",), ("a", "b"), ("ab",), ("b", "a"), ("a", 1), ("a", 11), ("a", 1, 1)]
    seeds = {derive_seed(seed, *part) for seed in (0, 1, 2**63 - 1) for part in parts}
    assert len(seeds) == 3 * len(parts)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_devices() -> None:
    gpus = torch.cuda.device_count()
    assert select_device("cpu") == CPU
    assert select_device("auto") == (torch.device("cuda:0") if gpus else CPU)
    for name in ("gpu", "cuda:", "cuda:-1", "", f"cuda:{gpus}", *([] if gpus else ["cuda"])):
        with pytest.raises(UsageError, match=f"device '{name}' is not there: choose auto, cpu"):
            select_device(name)


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


STATISTICS_SCRIPT = """
import sys
from pathlib import Path
from unittest.mock import patch
import torch
from common import training
from common.config import TrainingConfig
from tests.unit.test_training import SPEC, make_data, make_model

rank, folder = int(sys.argv[1]), Path(sys.argv[2])
torch.distributed.init_process_group(
    "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
)

def trained():
    model = make_model(batch_norm=True, dropout=0.3)
    recipe = training.Recipe(TrainingConfig(epochs=2, batch_size=10), SPEC, 3, "float32")
    ranks, device = training.Ranks(rank, 2), torch.device("cpu")
    training.train(model, training.Examples(*make_data(45)), recipe, device=device, ranks=ranks)
    return model.state_dict()

found = trained()
with patch("common.training._has_shared_buffers", return_value=True) as shared:
    expected = trained()
assert shared.called
torch.distributed.destroy_process_group()
different = [name for name in found if not torch.equal(found[name], expected[name])]
# The other rank's statistics are its own, and nobody uses them.
assert different == (["1.running_mean", "1.running_var"] if rank else []), different
"""


def test_ranks_need_not_share_statistics(tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen([sys.executable, "-c", STATISTICS_SCRIPT, str(rank), str(tmp_path)], cwd=ROOT)
        for rank in range(2)
    ]
    assert [process.wait(100) for process in ranks] == [0, 0]


def test_ranks_share_other_buffers() -> None:
    model = make_model(batch_norm=True)
    assert not training._has_shared_buffers(model)
    model[2].register_buffer("mean", torch.zeros(1))
    assert training._has_shared_buffers(model)


class HalvedNorm(nn.BatchNorm2d):
    """A BatchNorm that normalises each of two ranks' parts by itself, and counts only the first."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = x[: len(x) // 2], x[len(x) // 2 :]
        return torch.cat(
            [super().forward(first), F.batch_norm(second, None, None, self.weight, self.bias, training=True)]
        )


def make_deep_model(kind: str) -> nn.Module:
    """Return a model with a norm that is "none", "whole", or "halved"."""
    torch.manual_seed(0)
    norm = {"none": lambda _: nn.Identity(), "whole": nn.BatchNorm2d, "halved": HalvedNorm}[kind]
    # The gradient of a bias before a BatchNorm is a rounding error, of which Adam would make a full step.
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), norm(8), nn.ReLU(), nn.Conv2d(8, 8, 3, bias=False), norm(8),
        nn.ReLU(), nn.Flatten(), nn.Linear(128, 3),
    )  # fmt: skip


DEEP_SCRIPT = """
import sys
from pathlib import Path
import torch
from common.training import Ranks
from common.weights import write_state_dict
from tests.unit.test_training import DEEP_KINDS, train_deep

rank, folder = int(sys.argv[1]), Path(sys.argv[2])
torch.distributed.init_process_group(
    "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
)
for kind, optimizer in DEEP_KINDS:
    model = train_deep(kind, optimizer, Ranks(rank, 2))
    write_state_dict(model.state_dict(), folder / f"{kind}-{optimizer}-{rank}")
torch.distributed.destroy_process_group()
"""

DEEP_KINDS = [(kind, optimizer) for kind in ("none", "whole") for optimizer in ("sgd", "adamw")]
# So far apart, relatively and absolutely, numbers may be after 20 steps because of rounding.
RTOL, ATOL = 1e-5, 1e-6


def train_deep(kind: str, optimizer: Any, ranks: training.Ranks = training.ALONE) -> nn.Module:
    model = make_deep_model(kind)
    augment = ("random_crop", "horizontal_flip")
    config = TrainingConfig(
        epochs=4, batch_size=10, optimizer=optimizer, learning_rate=0.01, augment=augment, label_smoothing=0.1
    )
    recipe = Recipe(config, SPEC, 3, "float32")
    train(model, Examples(*make_data(45)), recipe, device=CPU, ranks=ranks)
    return model


def are_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return all(torch.allclose(found[name], expected[name], rtol=RTOL, atol=ATOL) for name in expected)


def test_two_ranks_equal_one_but_for_the_statistics_of_their_batches(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen([sys.executable, "-c", DEEP_SCRIPT, str(rank), str(tmp_path)], cwd=ROOT)
        for rank in range(2)
    ]
    assert [process.wait(100) for process in processes] == [0, 0]
    for kind, optimizer in DEEP_KINDS:
        first, second = (read_state_dict(tmp_path / f"{kind}-{optimizer}-{rank}") for rank in range(2))
        different = [name for name in first if not torch.equal(first[name], second[name])]
        assert different == [name for name in first if "running" in name]
        alone = train_deep(kind, optimizer).state_dict()
        # Without BatchNorm it does not matter how many ranks there are.
        assert are_close(first, alone) == (kind == "none")
        if kind == "whole":
            # BatchNorm takes mean and variance of a rank's part of the batch, and that is all that differs.
            assert are_close(first, train_deep("halved", optimizer).state_dict())


RANK_SCRIPT = """
import sys
from pathlib import Path
import torch
from common.config import DatasetSpec, TrainingConfig
from common.training import Examples, Ranks, Recipe, train
from common.weights import read_state_dict, write_state_dict

rank, folder = int(sys.argv[1]), Path(sys.argv[2])
given = read_state_dict(folder / "given")
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 3))
model[1].load_state_dict({"weight": given["weight"], "bias": given["bias"]})
torch.distributed.init_process_group(
    "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
)
loss = train(
    model, Examples(given["images"], given["labels"]),
    Recipe(
        TrainingConfig.model_validate_json(sys.argv[3]), DatasetSpec(*eval(sys.argv[4])),
        seed=3, precision="float32", class_balanced=True,
    ),
    device=torch.device("cpu"), ranks=Ranks(rank, 2),
)
torch.distributed.destroy_process_group()
write_state_dict({**model[1].state_dict(), "loss": torch.tensor(loss)}, folder / str(rank))
"""


def test_two_ranks_train_what_one_process_trains(tmp_path: Path) -> None:
    images, labels = make_data(23)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    examples = Examples(images, labels)
    write_state_dict({**model[1].state_dict(), **examples._asdict()}, tmp_path / "given")
    config = TrainingConfig(epochs=2, batch_size=5, augment=("random_crop",))  # parts of 2 and 3 images
    arguments = [str(tmp_path), config.model_dump_json(), repr(tuple(SPEC))]
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK_SCRIPT, str(rank), *arguments]) for rank in range(2)
    ]
    assert [process.wait(100) for process in ranks] == [0, 0]

    recipe = Recipe(config, SPEC, 3, "float32", class_balanced=True)
    loss = train(model, examples, recipe, device=CPU)

    assert (tmp_path / "0").read_bytes() == (tmp_path / "1").read_bytes()
    together = read_state_dict(tmp_path / "0")
    assert together.keys() == {"weight", "bias", "loss"}
    assert together["loss"].item() == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(together["weight"], model[1].weight.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(together["bias"], model[1].bias.detach(), rtol=1e-4, atol=1e-6)
