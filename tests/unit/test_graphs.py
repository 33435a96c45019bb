"""Recorded steps, with recorders that need no GPU: whatever they do, a training ends with the same bits."""

import gc
import random
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from structlog.testing import capture_logs
from torch import Tensor, nn

from ecavg.cloud_server.contribution import Contribution
from ecavg.cloud_server.jobs import Job, JobDirectory
from ecavg.cloud_server.trainer import pipeline
from ecavg.cloud_server.trainer.group import Group
from ecavg.common import graphs, training, training_step
from ecavg.common.checkpoint import CheckpointFile
from ecavg.common.config import RunConfig, TrainingConfig
from ecavg.common.dataset import pictures
from ecavg.common.models import build_model
from ecavg.common.tasks.classification import Classification
from ecavg.common.training import Examples, Recipe, StepReport, train
from tests.recipes import TRAININGS, PowerCutError, Tied
from tests.tapes import BitFlipper, Caller, Failing, TapeRecorder

CPU = torch.device("cpu")
SPEC = pictures(3, (3, 8, 8), (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))


class TiedWithPlainTensor(Tied):
    """The same, with a tensor that is neither a parameter nor a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = torch.zeros(())

    @property
    def drift(self) -> Tensor:
        return self.num_calls + self.seen

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add_(0.5)
        return super().forward(x)

    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("this model cannot be copied")


def make_model(kind: str = "convolutions") -> nn.Module:
    torch.manual_seed(0)
    if kind == "tied":
        return TiedWithPlainTensor()
    if kind == "mobilenet_v2":
        run = RunConfig(model=kind, num_classes=3, image_shape=(3, 8, 8), small_images=True)
        return build_model(run, seed=0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.Flatten(),
        nn.Dropout(0.3), nn.Linear(96, 3),
    )  # fmt: skip


def make_data() -> Examples:
    """Return so many images that an epoch has four full batches of ten and one of five."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (45, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return Examples(images, torch.randint(3, (45,), generator=generator))


@pytest.fixture(autouse=True)
def _small_trainings_on_a_gpu_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "MIN_STEPS", 1)
    monkeypatch.setattr(training, "REPORT_SECONDS", 0.0)
    monkeypatch.setattr(training_step, "_has_tensor_rate", lambda device: True)


class Trained:
    """A training: what came out, and what it said of graphs."""

    def __init__(
        self, model: nn.Module, recorder: graphs.Recorder | None, *, balanced: bool = False, **config: Any
    ) -> None:
        more = {key: config.pop(key) for key in ("on_step", "checkpoint") if key in config}
        self.losses: list[float] = []
        more.setdefault("on_step", lambda report: self.losses.append(report.loss))
        settings = {"epochs": 3, "batch_size": 10, "learning_rate": 0.02, **config}
        recipe = Recipe(TrainingConfig(**settings), Classification(SPEC), 7, "float32", balanced)
        with pytest.MonkeyPatch.context() as patch, capture_logs() as logs:
            patch.setattr(training, "recorder_for", lambda device: recorder)
            self.loss = train(model, make_data(), recipe, device=CPU, **more)
        self.state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self.said = [log.get("reason", "") for log in logs if log["event"].startswith("graph_")]


def assert_same(found: Trained, expected: Trained) -> None:
    assert found.state.keys() == expected.state.keys()
    for name, tensor in expected.state.items():
        assert torch.equal(found.state[name], tensor), name
    assert found.loss == expected.loss
    assert found.losses == expected.losses


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("settings", TRAININGS)
@pytest.mark.parametrize("kind", ["convolutions", "tied"])
def test_replayed_training_ends_with_the_bits_of_an_ordinary_one(
    kind: str, settings: str, balanced: bool
) -> None:
    expected = Trained(make_model(kind), None, balanced=balanced, **TRAININGS[settings])
    recorder = TapeRecorder()
    found = Trained(make_model(kind), recorder, balanced=balanced, **TRAININGS[settings])
    assert_same(found, expected)
    # Twelve full batches: one is ordinary, one is taken both ways.
    assert (recorder.num_recorded, recorder.num_replayed) == (1, 11)
    assert found.said == [""]
    assert len(found.losses) == 15


@pytest.mark.parametrize("settings", ["sgd", "adamw"])
def test_large_model_is_as_before_its_recording_when_it_is_replayed(settings: str) -> None:
    # The kernels that a tape sees for this model are others than without one, so here a replay is a step.
    expected = Trained(make_model("mobilenet_v2"), None, **TRAININGS[settings])
    recorder = Caller()
    assert_same(Trained(make_model("mobilenet_v2"), recorder, **TRAININGS[settings]), expected)
    assert recorder.num_replayed == 11


def test_batches_of_one_size_are_all_replayed() -> None:
    recorder = TapeRecorder()
    found = Trained(make_model(), recorder, batch_size=100, epochs=5)
    assert recorder.num_replayed == 4
    assert_same(found, Trained(make_model(), None, batch_size=100, epochs=5))


def test_tape_knows_nothing_of_python_as_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_step, "_has_tensor_rate", lambda device: False)
    constant, cosine = ({"schedule": schedule} for schedule in ("constant", "cosine"))
    assert_same(Trained(make_model(), TapeRecorder(), **constant), Trained(make_model(), None, **constant))
    with pytest.raises(AssertionError):
        assert_same(Trained(make_model(), TapeRecorder(), **cosine), Trained(make_model(), None, **cosine))


@pytest.mark.parametrize("settings", TRAININGS)
@pytest.mark.parametrize("cut_epoch", [0, 1, 2])
def test_replayed_training_goes_on_from_a_checkpoint(settings: str, cut_epoch: int, tmp_path: Path) -> None:
    def cut(report: StepReport) -> None:
        if report.step > 5 * cut_epoch + 3:
            raise PowerCutError

    config = TRAININGS[settings]
    checkpoint = CheckpointFile(tmp_path / "x", 0.0)
    with pytest.raises(PowerCutError):
        Trained(make_model(), TapeRecorder(), checkpoint=checkpoint, on_step=cut, **config)
    recorder = TapeRecorder()
    resumed = Trained(make_model(), recorder, checkpoint=checkpoint, **config)
    expected = Trained(make_model(), None, **config)
    expected.losses = expected.losses[5 * cut_epoch :]
    assert_same(resumed, expected)
    assert recorder.num_replayed == 4 * (3 - cut_epoch) - 1


def test_checkpoint_does_not_depend_on_graphs(tmp_path: Path) -> None:
    def cut(report: StepReport) -> None:
        if report.step > 5:
            raise PowerCutError

    checkpoint = CheckpointFile(tmp_path / "x", 0.0)
    with pytest.raises(PowerCutError):
        Trained(make_model(), None, checkpoint=checkpoint, on_step=cut, graphs="off")
    assert len(Trained(make_model(), TapeRecorder(), checkpoint=checkpoint).losses) == 10


@pytest.mark.parametrize("kind", ["convolutions", "tied"])
@pytest.mark.parametrize(
    "recorder", [Failing(0), Failing(2), Failing(0, at_replay=True), Failing(1, at_replay=True)]
)
def test_failure_while_recording_leaves_an_ordinary_training(recorder: Failing, kind: str) -> None:
    found = Trained(make_model(kind), recorder, optimizer="adam")
    assert_same(found, Trained(make_model(kind), None, optimizer="adam"))
    assert found.said == ["ValueError: this GPU has no graphs"]


NO_MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB."


def without_memory(num_steps: int = 0, *, at_replay: bool = False) -> Failing:
    """Return a recorder that runs out of memory after some steps."""
    return Failing(num_steps, at_replay=at_replay, error=torch.OutOfMemoryError, text=NO_MEMORY)


@pytest.mark.parametrize("at_replay", [False, True])
@pytest.mark.parametrize("num_steps", [0, 2])
def test_lack_of_memory_for_a_graph_leaves_an_ordinary_training(num_steps: int, at_replay: bool) -> None:
    found = Trained(make_model(), without_memory(num_steps, at_replay=at_replay))
    assert_same(found, Trained(make_model(), None))
    assert found.said == [f"OutOfMemoryError: {NO_MEMORY}"]


@pytest.mark.parametrize("num_good", [0, 1])
def test_lack_of_memory_for_the_comparison_leaves_an_ordinary_training(
    num_good: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, copy, num_copies = Trained(make_model(), None), graphs._State.now, 0

    def copy_or_fail(state: Any) -> Any:
        nonlocal num_copies
        num_copies += 1
        if num_copies > num_good:
            raise torch.OutOfMemoryError(NO_MEMORY)
        return copy(state)

    monkeypatch.setattr(graphs._State, "now", copy_or_fail)
    found = Trained(make_model(), Caller())
    assert_same(found, expected)
    assert found.said == [f"OutOfMemoryError: {NO_MEMORY}"]


def test_lack_of_memory_in_a_usual_step_as_well_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder, take = without_memory(), training_step.TrainingStep.take

    def take_or_fail(step: Any, batch: Any, batch_size: int) -> None:
        if recorder.num_asked:
            raise torch.OutOfMemoryError(NO_MEMORY)
        take(step, batch, batch_size)

    monkeypatch.setattr(training_step.TrainingStep, "take", take_or_fail)
    with pytest.raises(torch.OutOfMemoryError):
        Trained(make_model(), recorder)


def test_lack_of_memory_while_cuda_records_leaves_the_random_state(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch, error_at_the_end=RuntimeError("a previous error during capture"))

    def step() -> None:
        cuda.events.append("step")
        if ("begin", "thread_local") in cuda.events:
            raise torch.OutOfMemoryError(NO_MEMORY)

    with pytest.raises(graphs.RecordingError, match=f"OutOfMemoryError: {NO_MEMORY}"):
        graphs.CudaRecorder(torch.device("cuda:1")).record(step)
    assert cuda.random_state == "usual"


@pytest.mark.parametrize("name", ["0.weight", "1.running_mean", "1.num_batches_tracked"])
def test_replay_that_differs_in_one_bit_is_not_used(name: str) -> None:
    model = make_model()
    tensor = {**dict(model.named_parameters()), **dict(model.named_buffers())}[name]
    found = Trained(model, BitFlipper(tensor))
    assert_same(found, Trained(make_model(), None))
    assert found.said == ["a replay gives other bits"]


def test_replay_that_draws_another_number_is_not_used() -> None:
    class Drawing(Caller):
        def record(self, step: Callable[[], object]) -> Callable[[], object]:
            return lambda: (step(), torch.rand(()))

    found = Trained(make_model(), Drawing())
    assert_same(found, Trained(make_model(), None))
    assert found.said == ["a replay gives other bits"]


class Odd(nn.Module):
    """A model that does something in its forward pass which a replay would not do."""

    mean: Tensor

    def __init__(self, what: str = "") -> None:
        super().__init__()
        self.linear = nn.Linear(192, 3)
        self.register_buffer("mean", torch.zeros(()))
        self.count = 0
        self.what = what
        if what == "expanded buffer":
            self.register_buffer("wide", torch.ones(1).expand(4))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(x.flatten(1))
        if self.what == "branch" and logits.mean() > 0:
            return logits * 2
        if self.what == "count":
            self.count += 1
            return logits * (1 + self.count)
        if self.what == "replaced buffer":
            self.mean = self.mean * 0.9 + logits.mean().detach()
            return logits * (1 + self.mean)
        if self.what == "python":
            return logits * (1 + random.random())
        if self.what == "numpy":
            return logits * (1 + np.random.rand())
        return logits


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("branch", "RuntimeError: operation not permitted when stream is capturing"),
        ("count", "a step changes what a replay would not change: count"),
        ("replaced buffer", "a step changes what a replay would not change: mean"),
        ("python", "a step changes what a replay would not change: the random state of Python"),
        ("numpy", "a step changes what a replay would not change: the random state of NumPy"),
        (
            "expanded buffer",
            "RuntimeError: unsupported operation: more than one element of the written-to tensor",
        ),
    ],
)
def test_model_that_cannot_be_replayed_is_trained_as_usual(what: str, reason: str) -> None:
    trained = []
    for recorder in (TapeRecorder(), None):
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(0)
        trained.append(Trained(Odd(what), recorder))
    assert_same(*trained)
    (said,) = trained[0].said
    assert said.startswith(reason)


@pytest.mark.parametrize("num_good", [0, 1, 2, 7])
def test_error_of_the_model_is_raised_as_usual(num_good: int) -> None:
    class Broken(Odd):
        def forward(self, x: Tensor) -> Tensor:
            if len(self.calls) == num_good:
                raise ZeroDivisionError("the model's own")
            self.calls.append(1)
            return super().forward(x)

    model = Broken()
    model.calls = []
    with pytest.raises(ZeroDivisionError, match="the model's own"):
        Trained(model, Caller())


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"graphs": "off"}, []),
        ({"epochs": 1}, ["too few full batches to record one: 4 of at least 12"]),
        ({"epochs": 3}, [""]),
    ],
)
def test_training_is_recorded_where_it_is_long_enough_and_asked_for(
    config: dict[str, Any], said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "MIN_STEPS", 12)
    recorder = Caller()
    assert Trained(make_model(), recorder, **config).said == said
    assert recorder.num_recorded == (said == [""])


def test_complex_parameters_are_not_recorded() -> None:
    class Spectral(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, 192, dtype=torch.complex64))

        def forward(self, x: Tensor) -> Tensor:
            return (x.flatten(1).to(torch.complex64) @ self.weight.T).real

    found = Trained(Spectral(), Caller(), learning_rate=1e-4)
    assert found.said == ["not all parameters are floating-point numbers"]


def test_recording_is_given_back_with_the_training() -> None:
    class Weak(Caller):
        def record(self, step: Callable[[], object]) -> Callable[[], object]:
            replay = super().record(step)
            self.kept = weakref.ref(replay)
            return replay

    recorder = Weak()
    gc.disable()
    try:
        Trained(make_model(), recorder)
        assert recorder.num_replayed == 11
        # Its memory on the device is wanted right after the training.
        assert recorder.kept() is None
    finally:
        gc.enable()


def test_global_random_state_is_left_as_it_was() -> None:
    model, before = make_model(), torch.get_rng_state()
    Trained(model, TapeRecorder())
    assert torch.equal(torch.get_rng_state(), before)


def test_nothing_is_recorded_on_a_cpu() -> None:
    assert graphs.recorder_for(CPU) is None
    assert isinstance(graphs.recorder_for(torch.device("cuda:0")), graphs.CudaRecorder)


class FakeCuda:
    """The parts of `torch.cuda` that a recording uses, which write down what happens."""

    def __init__(self, patch: pytest.MonkeyPatch, error_at_the_end: Exception | None = None) -> None:
        self.events: list[Any] = []
        self.random_state = "usual"
        self.error_at_the_end = error_at_the_end
        patch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=self.replay))
        patch.setattr(torch.cuda, "graph", self.graph)
        patch.setattr(torch.cuda, "device", lambda device: nullcontext())
        patch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
        patch.setattr(torch.cuda, "current_stream", self.stream)
        patch.setattr(torch.cuda, "default_generators", (None, self))
        patch.setattr(graphs, "_recording_stream", lambda device: self.stream())

    def stream(self) -> Any:
        return SimpleNamespace(wait_stream=lambda other: None)

    def replay(self) -> None:
        self.events.append("replay")

    @contextmanager
    def graph(self, graph: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
        self.events.append(("begin", capture_error_mode))
        try:
            yield
        finally:
            self.events.append("end")
            if self.error_at_the_end:
                raise self.error_at_the_end

    def graphsafe_get_state(self) -> str:
        return self.random_state

    def clone_state(self) -> str:
        return "spare"

    def graphsafe_set_state(self, state: str) -> None:
        self.random_state = state


def test_cuda_graph_is_recorded_after_a_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    replay = graphs.CudaRecorder(torch.device("cuda:1")).record(lambda: cuda.events.append("step"))
    replay()
    assert cuda.events == ["step"] * 3 + [("begin", "thread_local"), "step", "end", "replay"]
    # The graph goes on with the random state that it was recorded with.
    assert cuda.random_state == "spare"


@pytest.mark.parametrize("num_good", [0, 3])
def test_failed_recording_says_what_failed_first_and_leaves_the_random_state(
    num_good: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = FakeCuda(monkeypatch, error_at_the_end=RuntimeError("a previous error during capture"))

    def step() -> None:
        cuda.events.append("step")
        if len(cuda.events) > num_good:
            raise RuntimeError("not permitted when stream is capturing")

    with pytest.raises(Exception, match="not permitted when stream is capturing"):
        graphs.CudaRecorder(torch.device("cuda:1")).record(step)
    assert cuda.random_state == "usual"


def test_reason_is_the_error_that_a_recording_met_first() -> None:
    class Unrecordable:
        def record(self, step: Callable[[], object]) -> Callable[[], object]:
            raise graphs.RecordingError("AcceleratorError: CUDA error: not permitted")

    assert Trained(make_model(), Unrecordable()).said == ["AcceleratorError: CUDA error: not permitted"]


def test_recording_that_only_fails_at_its_end_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch, error_at_the_end=RuntimeError("a previous error during capture"))
    with pytest.raises(graphs.RecordingError, match="RuntimeError: a previous error during capture"):
        graphs.CudaRecorder(torch.device("cuda:1")).record(lambda: None)
    assert cuda.random_state == "usual"


@pytest.mark.parametrize(("attempt", "expected"), [(1, "auto"), (2, "off")])
def test_further_attempts_at_a_round_do_without_graphs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attempt: int, expected: str
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(
        pipeline, "fine_tune", lambda _model, _examples, run, **_: asked.append(run.fine_tune.graphs)
    )
    job = Job(
        kind="round",
        name="round-0001",
        round=1,
        attempt=attempt,
        run=RunConfig(),
        device="cpu",
        initial_weights=None,
        contributions=(Contribution("edge-1", "0" * 64, (), 1),),
    )
    work = pipeline.RoundPipeline(
        job, pipeline.Workplace(JobDirectory(tmp_path / "jobs/round-0001"), tmp_path, CPU, Group())
    )
    work._fine_tune(nn.Identity(), Examples(torch.zeros(1, 1, 8, 8), torch.zeros(1, dtype=torch.int64)))
    assert asked == [expected]
