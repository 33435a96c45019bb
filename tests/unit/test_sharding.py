"""Models of which each rank has a part: what is trained and measured is what whole models give."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torchvision.models import resnet18

from ecavg.cloud_server.contribution import Contribution
from ecavg.cloud_server.jobs import Job, JobDirectory, Result
from ecavg.cloud_server.trainer import finetune, work
from ecavg.cloud_server.trainer.group import Group
from ecavg.cloud_server.trainer.moving_average import MovingAverage
from ecavg.common import training, training_step
from ecavg.common.checkpoint import CheckpointFile
from ecavg.common.config import RunConfig, TrainingConfig
from ecavg.common.errors import UsageError
from ecavg.common.models import build_model
from ecavg.common.ranks import ALONE, Ranks
from ecavg.common.sharding import copy_whole, gather, is_sharded, local, shard, units
from ecavg.common.shards import Shard, write_shard
from ecavg.common.tasks.classification import Classification
from ecavg.common.training import Examples, Recipe, StepReport, train
from ecavg.common.weights import read_state_dict, write_state_dict
from tests.recipes import CPU, SPEC, PowerCutError, Tied, make_data, put
from tests.unit.rank_processes import run_ranks

# So far apart, relatively and absolutely, weights may be because of rounding.
RTOL, ATOL = 1e-4, 1e-5
# Scores may differ by one of the 60 examples that are held out.
SCORE_ATOL = 1.01 / 60


class Block(nn.Module):
    """Two convolutions beside a shortcut, as in a ResNet."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(6, 6, 3, padding=1, bias=False) for _ in range(2))
        self.norm, self.last_norm = nn.BatchNorm2d(6), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.norm(self.first(x)).relu()
        return (self.last_norm(self.second(x)) + shortcut).relu()


def blocks(num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    stem = nn.Conv2d(image_shape[0], 6, 3, bias=False)
    return nn.Sequential(
        stem, nn.BatchNorm2d(6), nn.ReLU(), nn.Sequential(Block(), Block()), nn.Flatten(),
        nn.Linear(6 * 36, num_classes),
    )  # fmt: skip


class TiedEnds(nn.Module):
    """A model with one weight in two entries of a list, a frozen bias, and a running sum of its inputs."""

    seen: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [nn.Linear(64, 64), nn.Linear(64, 31), nn.Linear(31, 64), nn.Linear(64, 64)]
        )
        self.layers[3].weight = self.layers[0].weight
        self.layers[0].bias.requires_grad_(False)
        self.last = nn.Linear(64, num_classes)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        if self.training:
            self.seen.copy_(0.9 * self.seen + 0.1 * x.detach().sum() / 100)
        for layer in self.layers:
            x = layer(x).relu()
        logits: Tensor = self.last(x) * (1 + self.seen.tanh() / 2)
        return logits


def tied(num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    return TiedEnds(num_classes)


SGD: dict[str, Any] = {"epochs": 2, "batch_size": 64, "learning_rate": 0.05}
ADAMW = {**SGD, "optimizer": "adamw", "learning_rate": 0.01}
RUNS = {
    "mlp": RunConfig(
        hidden_units=33,
        fine_tune={**ADAMW, "ema_decay": 0.9, "schedule": "constant"},
    ),
    "bfloat16": RunConfig(hidden_units=33, fine_tune={**SGD, "precision": "bfloat16"}),
    "blocks": RunConfig(model="tests.unit.test_sharding:blocks", fine_tune=SGD),
    "tied": RunConfig(
        model="tests.unit.test_sharding:tied",
        targets={"missing": True},
        fine_tune={**SGD, "pseudo_label_confidence": 0.12},
    ),
}  # fmt: skip


def contribution(run: RunConfig, number: int, blobs_dir: Path) -> Contribution:
    """Return that of an agent with 200 digits of its own, and with random weights."""
    bunch, mine = load_digits(), slice(200 * number, 200 * (number + 1))
    write_state_dict(build_model(run, seed=number).state_dict(), blobs_dir / "new")
    weights = put(blobs_dir / "new", blobs_dir)
    images = (bunch.images[mine] * (255 / 16)).astype(np.uint8)[:, None]
    labels = bunch.target[mine].astype(np.int64)
    if run.targets.missing:
        labels[::3] = -1
    write_shard(blobs_dir / "new", Shard(images, labels))
    return Contribution(f"agent-{number}", weights, (put(blobs_dir / "new", blobs_dir),), 200)


def prepare(name: str, parallel: str, folder: Path) -> JobDirectory:
    """Write the job of a round of three agents to the folder."""
    run, blobs_dir = RUNS[name], folder / "blobs"
    blobs_dir.mkdir(parents=True, exist_ok=True)
    contributions = tuple(contribution(run, number, blobs_dir) for number in range(3))
    fine_tune = run.fine_tune.model_copy(update={"parallel": parallel})
    run = run.model_copy(update={"fine_tune": fine_tune})
    directory = JobDirectory(folder / f"{name}-{parallel}")
    directory.write_job(
        Job(
            kind="round", name=directory.path.name, round=1, run=run, device="cpu", initial_weights=None,
            contributions=contributions,
        )
    )  # fmt: skip
    return directory


class Cut:
    """A training with a checkpoint, of a sharded model if there are ranks; it may be cut off in epoch 3."""

    def __init__(self, ranks: Ranks, path: Path | None, *, is_cut: bool = False) -> None:
        self.steps: list[int] = []
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(192, 33), nn.ReLU(), nn.Linear(33, 3))
        self.trained = model if ranks == ALONE else shard(model, ranks, CPU)
        self.average = MovingAverage(self.trained, 0.9)
        self._is_cut = is_cut
        config = TrainingConfig(epochs=4, batch_size=10, optimizer="adamw", learning_rate=0.01)
        recipe = Recipe(config, Classification(SPEC), 3, "float32")
        file = CheckpointFile(path, seconds=0, subject="these", also=self.average) if path else None
        try:
            train(
                self.trained, Examples(*make_data(45)), recipe, device=CPU, ranks=ranks, checkpoint=file,
                on_step=self._on_step, after_step=self.average.update,
            )  # fmt: skip
        except PowerCutError:
            assert is_cut

    def _on_step(self, report: StepReport) -> None:
        self.steps.append(report.step)
        # 45 examples in batches of 10 are 5 steps.
        if self._is_cut and report.step > 10:
            raise PowerCutError

    def tensors(self, is_first: bool = True) -> dict[str, Tensor]:
        """Return the whole tensors of the model and of its average; every rank calls this."""
        found: dict[str, Tensor] = {}
        model = nn.Sequential(nn.Flatten(), nn.Linear(192, 33), nn.ReLU(), nn.Linear(33, 3))
        if is_sharded(self.trained):
            gather(self.trained, model)
        else:
            model.load_state_dict(self.trained.state_dict())
        average = self.average.gathered(model)
        assert average
        found |= {f"average.{name}": each for name, each in average.tensors().items()}
        return {**model.state_dict(), **found}


def cut_and_resume(rank: int, world_size: int, folder: Path) -> None:
    """Cut a training off, go on with it, and do it once more in one piece."""
    training.REPORT_SECONDS = 0.0
    ranks, path = Ranks(rank, world_size, rank), folder / "checkpoint"
    assert Cut(ranks, path, is_cut=True).steps[-1] == 11
    torch.distributed.barrier()
    if rank == 0:
        (folder / "kept").write_bytes(path.read_bytes())
    resumed, undisturbed = Cut(ranks, path), Cut(ranks, None)
    assert (resumed.steps[0], undisturbed.steps[0]) == (11, 1)
    for name, each in (("resumed", resumed), ("undisturbed", undisturbed)):
        tensors = each.tensors()
        if rank == 0:
            write_state_dict(tensors, folder / name)
    torch.distributed.barrier()


def count(rank: int, world_size: int, folder: Path) -> None:
    """Write how many numbers this rank has for parameters, gradients and the optimizer, in a training."""
    counts: dict[str, int] = {}
    take = training_step.TrainingStep.take

    def taken(step: training_step.TrainingStep, *arguments: Any, **more: Any) -> None:
        take(step, *arguments, **more)
        parameters = list(step._model.parameters())
        moments = [
            value
            for state in step.optimizer.state.values()
            for name, value in state.items()
            if name != "step"
        ]
        gradients = [each.grad for each in parameters if each.grad is not None]
        for name, tensors in (("parameters", parameters), ("gradients", gradients), ("moments", moments)):
            counts[name] = sum(local(each).numel() for each in tensors)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_step.TrainingStep, "take", taken)
        Cut(Ranks(rank, world_size, rank), None)
    write_state_dict({name: torch.tensor(each) for name, each in counts.items()}, folder / f"counts-{rank}")


def work_as_rank(rank: int, world_size: int, folder: Path) -> None:
    """Do the part of one of the ranks: all rounds of the folder, and two trainings without a job."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size
    )
    group, measured = Group(rank, world_size, rank), []
    predict = finetune.predict

    def predicted(model: nn.Module, *arguments: Any, **more: Any) -> Tensor:
        measured.append(is_sharded(model))
        return predict(model, *arguments, **more)

    finetune.predict = predicted
    for path in sorted(folder.glob("*/job.json")):
        directory = JobDirectory(path.parent)
        work.run_job(directory, blobs_dir=folder / "blobs", device_name="cpu", group=group)
    # The start labels examples on all ranks, if it is sharded, and on rank 0 if it is not.
    assert sorted(measured) == ([False, True] if rank == 0 else [True])
    cut_and_resume(rank, world_size, folder)
    count(rank, world_size, folder)
    torch.distributed.destroy_process_group()


SCRIPT = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from tests.unit.test_sharding import work_as_rank
work_as_rank(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
"""


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.soak)])
def folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """Return the folder with what two or four ranks have done."""
    folder: Path = tmp_path_factory.mktemp(f"ranks-{request.param}")
    for name in RUNS:
        for parallel in ("ddp", "fsdp"):
            prepare(name, parallel, folder)
    run_ranks(SCRIPT, request.param, folder, world_size=request.param)
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_round_with_a_sharded_model_is_that_with_whole_ones(folder: Path, name: str) -> None:
    sharded, whole = (JobDirectory(folder / f"{name}-{parallel}") for parallel in ("fsdp", "ddp"))
    assert_alike(sharded, whole)


def test_round_with_a_sharded_model_is_that_of_one_rank(folder: Path, tmp_path: Path) -> None:
    # The other models have statistics of a rank's part of each batch, however the ranks train.
    alone = prepare("mlp", "fsdp", tmp_path)
    work.run_job(alone, blobs_dir=tmp_path / "blobs", device_name="cpu", group=Group())
    assert_alike(JobDirectory(folder / "mlp-fsdp"), alone)


def test_sharded_training_goes_on_from_its_last_epoch(folder: Path) -> None:
    resumed, undisturbed = (read_state_dict(folder / name) for name in ("resumed", "undisturbed"))
    assert resumed.keys() == undisturbed.keys()
    assert [name for name in resumed if not torch.equal(resumed[name], undisturbed[name])] == []


def test_one_rank_that_is_left_goes_on_with_the_checkpoint_of_a_sharded_model(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "REPORT_SECONDS", 0.0)
    path = tmp_path / "checkpoint"
    path.write_bytes((folder / "kept").read_bytes())
    left = Cut(ALONE, path)
    assert left.steps[0] == 11
    found, expected = left.tensors(), read_state_dict(folder / "undisturbed")
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=RTOL, atol=ATOL)


def test_each_rank_has_its_part_of_parameters_gradients_and_optimizer(folder: Path) -> None:
    counts = [read_state_dict(path) for path in sorted(folder.glob("counts-*"))]
    whole = 192 * 33 + 33 + 33 * 3 + 3
    for name, factor in (("parameters", 1), ("gradients", 1), ("moments", 2)):
        each = [int(found[name]) for found in counts]
        assert sum(each) == factor * whole
        # A row of each tensor is the least that a rank may have more than another.
        assert max(each) <= factor * (whole / len(counts) + 192 + 33 + 2)


def assert_alike(found: JobDirectory, expected: JobDirectory) -> None:
    results = [result_of(found), result_of(expected)]
    for name in ("start", "published", "soup", "metric"):
        assert getattr(results[0], name) == getattr(results[1], name), name
    for name in ("candidates", "score_published", "score_fine_tuned", "score_fine_tuned_average"):
        of_found, of_expected = (getattr(result, name) for result in results)
        assert of_found == pytest.approx(of_expected, abs=SCORE_ATOL), name
    weights = [read_state_dict(directory.weights_path) for directory in (found, expected)]
    assert weights[0].keys() == weights[1].keys()
    for name in weights[1]:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=RTOL, atol=ATOL)


def result_of(directory: JobDirectory) -> Result:
    result = directory.read_result()
    assert result
    assert result.error is None
    return result


# ---------------------------------------------------------------------- in this process


def names_of_units(model: nn.Module) -> list[str]:
    names = {module: name for name, module in model.named_modules()}
    return [names[unit] for unit in units(model)]


def test_units_are_the_entries_of_lists() -> None:
    expected = [f"layer{layer}.{block}" for layer in (1, 2, 3, 4) for block in (0, 1)]
    assert names_of_units(resnet18()) == expected
    assert names_of_units(blocks(10, (1, 8, 8))) == ["0", "1", "3.0", "3.1", "5"]


def test_shared_parameters_stay_with_the_whole_model() -> None:
    assert names_of_units(TiedEnds(10)) == ["layers.1", "layers.2"]
    assert names_of_units(Tied()) == []


@pytest.mark.parametrize(
    ("parameter", "reason"),
    [
        (torch.zeros(()), "parameter odd is a single number: give it the shape (1,)"),
        (torch.zeros(2, dtype=torch.complex64), "parameter odd is complex64"),
        (torch.zeros(2, dtype=torch.bfloat16), "its trainable parameters differ in dtype"),
    ],
)
def test_model_that_cannot_be_sharded_is_refused(parameter: Tensor, reason: str) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model.register_parameter("odd", nn.Parameter(parameter))
    with pytest.raises(UsageError) as caught:
        shard(model, Ranks(0, 2), CPU)
    assert str(caught.value) == f'run.fine_tune.parallel = "fsdp" cannot shard this model: {reason}'


def test_whole_tensors_are_copied_as_they_are() -> None:
    target = torch.zeros(3)
    copy_whole(target, torch.arange(3.0))
    assert target.tolist() == [0, 1, 2]
