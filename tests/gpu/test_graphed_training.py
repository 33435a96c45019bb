"""Trainings on a GPU as CUDA graphs: with the bits of the same trainings without."""

from pathlib import Path
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs
from torch import Tensor, nn

from ecavg.common import training
from ecavg.common.checkpoint import CheckpointFile
from ecavg.common.config import RunConfig, TrainingConfig
from ecavg.common.evaluation import evaluate, predict
from ecavg.common.models import build_model
from ecavg.common.tasks.classification import Classification
from ecavg.common.tasks.task import task_of
from ecavg.common.training import Examples, Recipe, StepReport, train
from tests.recipes import TRAININGS, PowerCutError

DEVICE = torch.device("cuda:0")
MODELS = {
    "mlp": RunConfig(model="mlp", dataset="mnist"),
    "mobilenet_v2": RunConfig(model="mobilenet_v2", dataset="cifar10", small_images=True),
    "resnet50": RunConfig(model="resnet50", dataset="cifar100", small_images=True),
}
CIFAR = MODELS["mobilenet_v2"].spec
# Adam and its kin take smaller steps here, because the networks are larger.
SETTINGS = {
    name: settings | ({"learning_rate": 1e-3} if "learning_rate" in settings else {})
    for name, settings in TRAININGS.items()
}
# Four full batches in an epoch, and one of 44.
NUM_IMAGES, BATCH_SIZE = 300, 64


class Dropping(nn.Module):
    """A small network with BatchNorm and two kinds of dropout, and with a branch if that is asked for."""

    def __init__(self, what: str = "") -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout2d(0.2),
            nn.Conv2d(16, 16, 3, stride=4), nn.Flatten(), nn.Dropout(0.5), nn.Linear(784, 10),
        )  # fmt: skip
        self.what = what

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layers(x)
        if self.what == "branch" and logits.mean() > 0:
            return logits * 2
        if self.what == "wait":
            torch.cuda.synchronize()
        if self.what == "raise" and torch.cuda.is_current_stream_capturing():
            raise KeyError("not while it is recorded")
        return logits


def make_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name in MODELS:
        return build_model(MODELS[name], seed=0)
    return Dropping(name)


@pytest.fixture(autouse=True)
def _small_trainings_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "MIN_STEPS", 1)
    monkeypatch.setattr(training, "REPORT_SECONDS", 0.0)


class Trained:
    """A training on the GPU: what came out, and what it said of graphs."""

    def __init__(
        self, name: str, *, precision: Any = "float32", balanced: bool = False, **config: Any
    ) -> None:
        more = {key: config.pop(key) for key in ("on_step", "checkpoint") if key in config}
        self.losses: list[float] = []
        more.setdefault("on_step", lambda report: self.losses.append(report.loss))
        run = MODELS.get(name, MODELS["mobilenet_v2"])
        generator = torch.Generator().manual_seed(0)
        shape = (NUM_IMAGES, *run.spec.inputs.shape)
        images = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        labels = torch.randint(10, (NUM_IMAGES,), generator=generator)
        settings = {"epochs": 3, "batch_size": BATCH_SIZE, "learning_rate": 0.01, **config}
        recipe = Recipe(TrainingConfig(**settings), task_of(run), 7, precision, balanced)
        model = make_model(name)
        with capture_logs() as logs:
            self.loss = train(model, Examples(images, labels), recipe, device=DEVICE, **more)
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self.state = {key: tensor.detach().cpu() for key, tensor in tensors.items()}
        self.is_graphed = any(log["event"] == "graph_recorded" for log in logs)
        self.reasons = [log["reason"] for log in logs if log["event"] == "graph_not_used"]


def assert_same(found: Trained, expected: Trained) -> None:
    different = [name for name in expected.state if not torch.equal(found.state[name], expected.state[name])]
    assert not different
    assert found.loss == expected.loss
    assert found.losses == expected.losses


def assert_graphed_as_eager(name: str, **config: Any) -> None:
    graphed, eager = Trained(name, **config), Trained(name, graphs="off", **config)
    assert (graphed.reasons, graphed.is_graphed) == ([], True)
    assert (eager.reasons, eager.is_graphed) == ([], False)
    assert_same(graphed, eager)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", [*MODELS, "dropping"])
def test_graph_has_the_bits_of_the_usual_training(name: str, precision: str) -> None:
    augment = ("random_crop", "horizontal_flip")
    assert_graphed_as_eager(name, precision=precision, augment=augment, schedule="one-cycle")


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("settings", SETTINGS)
def test_every_optimizer_has_the_same_bits_in_a_graph(settings: str, balanced: bool) -> None:
    assert_graphed_as_eager("dropping", balanced=balanced, **SETTINGS[settings])


@pytest.mark.parametrize("what", ["branch", "wait", "raise"])
def test_model_that_cannot_be_recorded_is_trained_as_usual(what: str) -> None:
    found = Trained(what)
    assert not found.is_graphed
    assert len(found.reasons) == 1
    assert_same(found, Trained(what, graphs="off"))
    # The failed recording has left nothing behind that disturbs the next one.
    assert_graphed_as_eager("dropping")


@pytest.mark.parametrize("settings", SETTINGS)
def test_graphed_training_goes_on_from_a_checkpoint(settings: str, tmp_path: Path) -> None:
    def cut(report: StepReport) -> None:
        if report.step > 8:
            raise PowerCutError

    config = SETTINGS[settings]
    checkpoint = CheckpointFile(tmp_path / "x", 0.0)
    with pytest.raises(PowerCutError):
        Trained("dropping", checkpoint=checkpoint, on_step=cut, **config)
    resumed = Trained("dropping", checkpoint=checkpoint, **config)
    undisturbed = Trained("dropping", **config)
    assert resumed.is_graphed
    undisturbed.losses = undisturbed.losses[5:]
    assert_same(resumed, undisturbed)


def test_same_training_gives_the_same_bits_twice() -> None:
    assert_same(Trained("mobilenet_v2", precision="bfloat16"), Trained("mobilenet_v2", precision="bfloat16"))


@pytest.mark.parametrize("graphs", ["auto", "off"])
def test_images_that_do_not_fit_are_trained_on_alike(graphs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    resident = Trained("dropping", graphs=graphs, augment=("random_crop",))
    monkeypatch.setattr("ecavg.common.batches._fits", lambda tensors, device: False)
    on_host = Trained("dropping", graphs=graphs, augment=("random_crop",))
    assert on_host.is_graphed == (graphs == "auto")
    assert_same(on_host, resident)


def test_predictions_are_the_same_wherever_the_images_are(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randint(256, (1500, 3, 32, 32), dtype=torch.uint8)
    model = make_model("dropping")
    resident = predict(model, images, task=Classification(CIFAR), device=DEVICE)
    monkeypatch.setattr("ecavg.common.batches._fits", lambda tensors, device: False)
    assert torch.equal(predict(model, images, task=Classification(CIFAR), device=DEVICE), resident)
    labels = torch.zeros(1500, dtype=torch.int64)
    assert evaluate(model, images, labels, task=Classification(CIFAR), device=DEVICE).num_examples == 1500


def test_convolutions_are_measured_in_float32() -> None:
    images = torch.randint(256, (64, 3, 32, 32), dtype=torch.uint8)
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3), nn.Conv2d(64, 64, 3), nn.Conv2d(64, 64, 3), nn.Flatten(), nn.Linear(43264, 10)
    )
    on_gpu = predict(model, images, task=Classification(CIFAR), device=DEVICE)
    on_cpu = predict(model, images, task=Classification(CIFAR), device=torch.device("cpu"))
    # TF32 has ten bits, which is a difference of about 1e-3.
    assert (on_gpu - on_cpu).abs().max() < 5e-5 * on_cpu.abs().max()


def test_memory_of_a_graph_is_given_back() -> None:
    def reserved() -> int:
        Trained("resnet50", epochs=2)
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved(DEVICE)

    first = reserved()
    assert max(reserved() for _ in range(3)) <= first + 2**26
