import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs
from torch import Tensor, nn

from ecavg.common import checkpoint
from ecavg.common.checkpoint import CheckpointFile
from ecavg.common.config import RunConfig, TrainingConfig
from ecavg.common.dataset import pictures
from ecavg.common.models import build_model
from ecavg.common.tasks.classification import Classification
from ecavg.common.training import Examples, Recipe, StepReport, train
from tests.recipes import PowerCutError, Tied

SPEC = pictures(3, (3, 8, 8), (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
NUM_EPOCHS = 4
SETTINGS: dict[str, dict[str, Any]] = {
    "sgd": {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-3, "schedule": "cosine"},
    "sgd_without_momentum": {"momentum": 0.0, "schedule": "one-cycle"},
    "adamw": {"optimizer": "adamw", "learning_rate": 1e-2, "weight_decay": 0.1, "schedule": "one-cycle"},
    "adam": {"optimizer": "adam", "learning_rate": 1e-2, "augment": ("random_crop", "horizontal_flip")},
}


def make_model(kind: str = "convolutions", seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    if kind == "tied":
        return Tied()
    if kind == "mobilenet_v2":  # BatchNorm and dropout
        return build_model(RunConfig(model=kind, num_classes=3, image_shape=(3, 8, 8)), seed=seed)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.Flatten(),
        nn.Dropout(0.3), nn.Linear(96, 3),
    )  # fmt: skip


def make_data(num_images: int = 23) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (num_images, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return images, torch.randint(3, (num_images,), generator=generator)


def run(
    model: nn.Module, path: Path | None, config: TrainingConfig, *, seed: int = 7, **more: Any
) -> tuple[float, dict[str, Tensor]]:
    examples = Examples(*(more.pop("data", None) or make_data()))
    recipe = Recipe(config, Classification(more.pop("spec", SPEC)), seed, "float32")
    checkpoint = CheckpointFile(path, more.pop("seconds", 0.0)) if path else None
    loss = train(model, examples, recipe, device=torch.device("cpu"), checkpoint=checkpoint, **more)
    return loss, model.state_dict()


def cut_in(epoch: int) -> Callable[[StepReport], None]:
    """Return an `on_step` that stops a training of three steps an epoch amid this epoch, counted from 0."""

    def on_step(report: StepReport) -> None:
        if report.step > 3 * epoch:
            raise PowerCutError

    return on_step


def config_of(optimizer: str = "sgd", **changes: Any) -> TrainingConfig:
    return TrainingConfig(**{"epochs": NUM_EPOCHS, "batch_size": 10, **SETTINGS[optimizer], **changes})


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.fixture(autouse=True)
def _report_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ecavg.common.training.REPORT_SECONDS", 0.0)


@pytest.mark.parametrize("cut_epoch", range(NUM_EPOCHS))
@pytest.mark.parametrize("optimizer", SETTINGS)
@pytest.mark.parametrize("kind", ["convolutions", "tied"])
def test_resumed_training_ends_with_the_bits_of_an_undisturbed_one(
    kind: str, optimizer: str, cut_epoch: int, tmp_path: Path
) -> None:
    config, path = config_of(optimizer), tmp_path / "checkpoint"
    loss, undisturbed = run(make_model(kind), None, config)

    with pytest.raises(PowerCutError):
        run(make_model(kind), path, config, on_step=cut_in(cut_epoch))
    torch.manual_seed(cut_epoch)  # another process has drawn other numbers
    steps: list[StepReport] = []
    resumed_loss, resumed = run(make_model(kind), path, config, on_step=steps.append)

    assert_same_bits(resumed, undisturbed)
    assert resumed_loss == loss
    assert [step.step for step in steps] == list(range(3 * cut_epoch + 1, 3 * NUM_EPOCHS + 1))


def test_training_that_is_cut_in_every_epoch_ends_with_the_same_bits(tmp_path: Path) -> None:
    config = config_of(augment=("random_crop",))
    _, undisturbed = run(make_model("mobilenet_v2"), None, config)
    for epoch in range(NUM_EPOCHS):
        with pytest.raises(PowerCutError):
            run(make_model("mobilenet_v2"), tmp_path / "x", config, on_step=cut_in(epoch))
    _, resumed = run(make_model("mobilenet_v2"), tmp_path / "x", config)
    assert_same_bits(resumed, undisturbed)


def test_finished_training_is_not_done_again(tmp_path: Path) -> None:
    loss, trained = run(make_model(), tmp_path / "x", config_of())
    steps: list[StepReport] = []
    again, restored = run(make_model(), tmp_path / "x", config_of(), on_step=steps.append)
    assert_same_bits(restored, trained)
    assert (again, steps) == (loss, [])


CHANGES: dict[str, dict[str, Any]] = {
    "config": {"config": config_of(learning_rate=0.04)},
    "seed": {"seed": 8},
    "weights": {"weights_seed": 1},
    "images": {"data": (make_data()[0] ^ 1, make_data()[1])},
    "labels": {"data": (make_data()[0], (make_data()[1] + 1) % 3)},
    "spec": {"spec": SPEC._replace(inputs=SPEC.inputs._replace(mean=(0.4, 0.5, 0.5)))},
}


@pytest.mark.parametrize("change", CHANGES)
def test_checkpoint_of_another_training_is_ignored(change: str, tmp_path: Path) -> None:
    run(make_model(), tmp_path / "x", config_of())
    arguments = {"config": config_of(), "weights_seed": 0, **CHANGES[change]}
    weights_seed = arguments.pop("weights_seed")
    _, undisturbed = run(make_model(seed=weights_seed), None, **arguments)
    with capture_logs() as logs:
        _, found = run(make_model(seed=weights_seed), tmp_path / "x", **arguments)
    assert_same_bits(found, undisturbed)
    assert [log["reason"] for log in logs] == ["it is of another training"]


def flip_last(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


def count_an_epoch_less(content: bytes) -> bytes:
    assert content.count(b'\\"num_epochs\\":4') == 1
    return content.replace(b'\\"num_epochs\\":4', b'\\"num_epochs\\":3')


def without_metadata(content: bytes) -> bytes:
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    del header["__metadata__"]
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + size :]


@pytest.mark.parametrize(
    "damage",
    [
        flip_last,
        count_an_epoch_less,
        without_metadata,
        lambda content: content[:-1],
        lambda content: content[:50],
        lambda content: b"",
        lambda content: b"\xff" * 100,
    ],
)
def test_damaged_checkpoint_is_ignored_and_replaced(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = tmp_path / "x"
    _, undisturbed = run(make_model(), path, config_of())
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    with capture_logs() as logs:
        _, found = run(make_model(), path, config_of())
    assert_same_bits(found, undisturbed)
    assert [(log["event"], log["reason"][:7]) for log in logs] == [("checkpoint_ignored", "damaged")]
    assert path.read_bytes() == whole


def test_checkpoint_is_written_at_most_every_few_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now)
    written = []

    def on_step(report: StepReport) -> None:
        nonlocal now
        if report.step % 3 == 0:  # an epoch ends
            now += 2.0
        else:
            written.append((tmp_path / "x").exists())
            (tmp_path / "x").unlink(missing_ok=True)

    config = config_of(epochs=7)
    run(make_model(), tmp_path / "x", config, on_step=on_step, seconds=5.0)
    # The third and the sixth epoch ended more than five seconds after the start, and the third.
    assert written == [False] * 6 + [True] + [False] * 5 + [True, False]


def test_disk_that_cannot_be_written_does_not_stop_the_training(tmp_path: Path) -> None:
    _, undisturbed = run(make_model(), None, config_of())
    with capture_logs() as logs:
        _, found = run(make_model(), tmp_path / "no-such-folder/x", config_of())
    assert_same_bits(found, undisturbed)
    assert [log["event"] for log in logs] == ["checkpoint_not_written"] * NUM_EPOCHS


def test_nothing_is_written_for_no_epochs(tmp_path: Path) -> None:
    loss, _ = run(make_model(), tmp_path / "x", config_of(epochs=0))
    assert math.isnan(loss)
    assert not (tmp_path / "x").exists()
