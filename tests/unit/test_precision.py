import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from ecavg.common import precision, training, training_step
from ecavg.common.checkpoint import CheckpointFile
from ecavg.common.config import RunConfig, TrainingConfig
from ecavg.common.dataset import pictures
from ecavg.common.models import build_model
from ecavg.common.precision import MIN_STEPS, decide, describe
from ecavg.common.tasks.classification import Classification
from ecavg.common.tasks.task import Task, task_of
from ecavg.common.training import Examples, Recipe, choose_precision, train

CPU = torch.device("cpu")
LONG = 1_000_000  # steps


class Steps:
    """Steps that take so many seconds of the processor, by precision; a fake clock says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **seconds: float) -> None:
        self.taken: list[str] = []
        self._now, self._seconds = 0.0, seconds
        monkeypatch.setattr(time, "process_time", lambda: self._now)

    def __call__(self, name: precision.Precision) -> Callable[[], object]:
        first = [10.0]  # the first step of each also makes its kernels

        def step() -> None:
            self.taken.append(name)
            self._now += self._seconds[name] + (first.pop() if first else 0)

        return step


@pytest.mark.parametrize(("bfloat16", "expected"), [(0.08, "bfloat16"), (0.09, "float32"), (0.2, "float32")])
def test_bfloat16_is_taken_where_it_is_a_fifth_faster(
    bfloat16: float, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps(monkeypatch, float32=0.1, bfloat16=bfloat16)
    assert decide(tmp_path / "kept", "x", LONG, steps) == expected
    assert set(steps.taken) == {"float32", "bfloat16"}


def test_a_decision_holds_though_timings_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "kept"
    fast = Steps(monkeypatch, float32=2.0, bfloat16=1.0)
    assert decide(path, "x", LONG, fast) == "bfloat16"
    assert len(fast.taken) == 4  # of a large model no more than that
    slow = Steps(monkeypatch, float32=1.0, bfloat16=2.0)
    assert decide(path, "x", LONG, slow) == decide(path, "x", 1, slow) == "bfloat16"
    assert slow.taken == []
    assert decide(path, "another machine", LONG, slow) == "float32"
    assert json.loads(path.read_text())["subject"] == "another machine"


def test_what_is_short_is_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(monkeypatch, float32=10.0, bfloat16=0.1)
    assert decide(tmp_path / "kept", "x", MIN_STEPS - 1, steps) == "float32"
    assert steps.taken == []
    small = Steps(monkeypatch, float32=0.001, bfloat16=0.0001)
    assert decide(tmp_path / "kept", "x", 3000, small) == "float32"
    assert set(small.taken) == {"float32"}


def test_without_a_file_to_keep_it_in_it_is_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(monkeypatch, float32=2.0, bfloat16=1.0)
    assert decide(tmp_path / "missing" / "kept", "x", LONG, steps) == "float32"
    (tmp_path / "damaged").write_text('{"subject": "x", "preci')
    assert decide(tmp_path / "damaged", "x", LONG, steps) == "bfloat16"
    assert decide(tmp_path / "damaged", "x", LONG, Steps(monkeypatch)) == "bfloat16"


def test_a_model_that_has_no_bfloat16_is_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(monkeypatch, float32=2.0)

    def make_step(name: precision.Precision) -> Callable[[], object]:
        if name == "bfloat16":
            raise RuntimeError("not implemented for 'BFloat16'")
        return steps(name)

    assert decide(tmp_path / "kept", "x", LONG, make_step) == "float32"
    assert decide(tmp_path / "kept", "x", LONG, steps) == "float32"


def test_another_model_batch_or_number_of_threads_is_another_subject(monkeypatch: pytest.MonkeyPatch) -> None:
    subjects = [
        describe(nn.Linear(2, 3), (1, 8, 8), 5),
        describe(nn.Linear(2, 4), (1, 8, 8), 5),
        describe(nn.Linear(2, 3), (3, 8, 8), 5),
        describe(nn.Linear(2, 3), (1, 8, 8), 6),
    ]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    assert len({*subjects, describe(nn.Linear(2, 3), (1, 8, 8), 5)}) == 5


def trained(
    asked: Literal["auto", "float32", "bfloat16"],
    path: Path | None = None,
    epochs: int = 2,
    checkpoint: CheckpointFile | None = None,
) -> dict[str, Tensor]:
    """Train a little network with every kind of state, and return its state_dict."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3), nn.Linear(216, 3)
    )
    images = torch.randint(256, (50, 3, 8, 8), dtype=torch.uint8)
    examples = Examples(images, torch.randint(3, (50,)))
    spec = pictures(3, (3, 8, 8), (0.4,) * 3, (0.2,) * 3)
    config = TrainingConfig(epochs=epochs, batch_size=20, precision=asked)
    before = torch.get_rng_state()
    chosen = choose_precision(model, examples, config, task=Classification(spec), device=CPU, kept_at=path)
    train(model, examples, Recipe(config, Classification(spec), 1, chosen), device=CPU, checkpoint=checkpoint)
    assert torch.equal(torch.get_rng_state(), before)
    return model.state_dict()


def are_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_precisions_differ_a_little_and_weights_stay_float32() -> None:
    fine, coarse = trained("float32"), trained("bfloat16")
    assert not are_equal(fine, coarse)
    assert are_equal(coarse, trained("bfloat16"))
    for name, tensor in coarse.items():
        assert tensor.dtype == fine[name].dtype
        torch.testing.assert_close(tensor, fine[name], rtol=0.1, atol=0.05)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Precision "auto" is measured however short the training, whatever the processor."""
    monkeypatch.setattr(training, "has_bfloat16", lambda _: True)
    monkeypatch.setattr(precision, "MIN_STEPS", 1)
    monkeypatch.setattr(precision, "MIN_SECONDS", 0.0)


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize("expected", ["float32", "bfloat16"])
def test_measuring_leaves_no_trace_in_the_training(
    expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "MIN_SPEED", 0.0 if expected == "bfloat16" else 1e9)
    path = tmp_path / "kept"
    assert are_equal(trained("auto", path), trained(expected))
    assert json.loads(path.read_text())["precision"] == expected
    assert are_equal(trained("auto"), trained("float32"))  # nowhere to keep it
    monkeypatch.setattr(training, "has_bfloat16", lambda _: False)
    assert are_equal(trained("auto", path), trained("float32"))


@pytest.mark.usefixtures("measured")
def test_a_checkpoint_of_another_precision_is_not_gone_on_with(tmp_path: Path) -> None:
    path, checkpoint = tmp_path / "kept", CheckpointFile(tmp_path / "checkpoint", seconds=0)
    trained("auto", path, checkpoint=checkpoint)
    text = path.read_text()
    other = "float32" if "bfloat16" in text else "bfloat16"
    path.write_text(text.replace(json.loads(text)["precision"], other))
    assert are_equal(trained("auto", path, checkpoint=checkpoint), trained(other))


def odd_model(name: str) -> tuple[nn.Module, Examples, TrainingConfig, Task]:
    run = RunConfig(model=f"tests.integration.models:{name}")
    images = torch.randint(256, (8, 1, 8, 8), dtype=torch.uint8)
    return build_model(run), Examples(images, torch.arange(8)), TrainingConfig(), task_of(run)


@pytest.mark.parametrize(("name", "can"), [("linear", True), ("full_precision", False), ("scripted", False)])
def test_model_that_cannot_take_a_step_in_bfloat16_is_found_out(name: str, *, can: bool) -> None:
    model, examples, config, task = odd_model(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    assert training.can_train_in_bfloat16(model, examples, config, task, CPU) is can
    assert are_equal(before, model.state_dict())


def test_lack_of_memory_says_nothing_of_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(training_step.TrainingStep, "take", fail)
    with pytest.raises(torch.OutOfMemoryError):
        training.can_train_in_bfloat16(*odd_model("linear"), CPU)


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize("name", ["full_precision", "scripted"])
def test_such_a_model_is_trained_in_float32(tmp_path: Path, name: str) -> None:
    model, examples, config, task = odd_model(name)
    kept_at = tmp_path / "kept"
    assert choose_precision(model, examples, config, task=task, device=CPU, kept_at=kept_at) == "float32"
