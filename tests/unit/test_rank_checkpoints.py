"""Checkpoints of ranks: whoever is left goes on from the last epoch, with any number of ranks."""

import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ecavg.cloud_server.trainer.moving_average import MovingAverage
from ecavg.common import training
from ecavg.common.checkpoint import CheckpointFile
from ecavg.common.config import TrainingConfig
from ecavg.common.ranks import ALONE, Ranks
from ecavg.common.tasks.classification import Classification
from ecavg.common.training import Examples, Recipe, StepReport, train
from ecavg.common.weights import read_state_dict, write_state_dict
from tests.recipes import CPU, SPEC, PowerCutError, make_data
from tests.unit.rank_processes import run_ranks
from tests.unit.test_ranks import are_close, make_deep_model

KINDS = ("none", "whole")
# 45 examples in batches of 10.
STEPS_PER_EPOCH = 5
NUM_FINISHED, NUM_EPOCHS = 2, 4


class Trained:
    """A training, from a checkpoint if there is one, which may be cut off in the third epoch."""

    def __init__(self, kind: str, ranks: Ranks, path: Path | None, *, is_cut: bool = False) -> None:
        self.steps: list[int] = []
        self._is_cut = is_cut
        model = make_deep_model(kind)
        self._average = MovingAverage(model, 0.9)
        examples = Examples(*make_data(45))
        file = CheckpointFile(path, seconds=0, subject="these", also=self._average) if path else None
        with suppress(PowerCutError):
            train(
                model, examples, recipe(), device=CPU, ranks=ranks, checkpoint=file,
                on_step=self._on_step, after_step=self._average.update,
            )  # fmt: skip
        self._model = model

    def tensors(self) -> dict[str, Tensor]:
        """Return the model's tensors and those of the average."""
        average = {f"average.{name}": tensor for name, tensor in self._average.tensors().items()}
        return {**self._model.state_dict(), **average}

    def _on_step(self, report: StepReport) -> None:
        self.steps.append(report.step)
        if self._is_cut and report.step > NUM_FINISHED * STEPS_PER_EPOCH:
            raise PowerCutError


def recipe() -> Recipe:
    config = TrainingConfig(
        epochs=NUM_EPOCHS, batch_size=10, optimizer="adamw", learning_rate=0.01,
        augment=("random_crop", "horizontal_flip"), schedule="one-cycle",
    )  # fmt: skip
    return Recipe(config, Classification(SPEC), 3, "float32", class_balanced=True)


def train_as_rank(rank: int, folder: Path) -> None:
    """Do the part of one of two ranks, each of which is a machine of its own with a folder of its own."""
    training.REPORT_SECONDS = 0.0
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    ranks = Ranks(rank, 2)
    for kind in KINDS:
        path = folder / f"{kind}-machine-{rank}"
        cut = Trained(kind, ranks, path, is_cut=True)
        assert cut.steps[-1] == NUM_FINISHED * STEPS_PER_EPOCH + 1
        if rank == 0:
            # This machine is another one when the group forms anew.
            path.unlink()
        else:
            shutil.copy(path, folder / f"{kind}-kept")
        resumed = Trained(kind, ranks, path)
        assert resumed.steps[0] == NUM_FINISHED * STEPS_PER_EPOCH + 1
        write_state_dict(resumed.tensors(), folder / f"{kind}-resumed-{rank}")
        write_state_dict(Trained(kind, ranks, None).tensors(), folder / f"{kind}-undisturbed-{rank}")
    torch.distributed.destroy_process_group()


SCRIPT = """
import sys
from pathlib import Path
from tests.unit.test_rank_checkpoints import train_as_rank
train_as_rank(int(sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder with what two ranks have trained."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(SCRIPT, folder)
    return folder


@pytest.fixture(autouse=True)
def _report_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "REPORT_SECONDS", 0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_go_on_with_the_file_of_the_machine_that_is_left(folder: Path, kind: str) -> None:
    # The statistics of rank 1 are its own, and those in the checkpoint are rank 0's.
    names = [name for name in make_deep_model(kind).state_dict() if "running" not in name]
    for rank in range(2):
        resumed, undisturbed = (
            read_state_dict(folder / f"{kind}-{what}-{rank}") for what in ("resumed", "undisturbed")
        )
        compared = names if rank else undisturbed
        assert [name for name in compared if not torch.equal(resumed[name], undisturbed[name])] == []


def test_one_rank_goes_on_where_two_have_been(folder: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(folder / "none-kept", tmp_path))
    resumed = Trained("none", ALONE, path)
    assert resumed.steps[0] == NUM_FINISHED * STEPS_PER_EPOCH + 1
    assert are_close(resumed.tensors(), Trained("none", ALONE, None).tensors())


def test_balanced_training_is_another_training() -> None:
    found = {
        training._identity(recipe()._replace(class_balanced=is_balanced), nn.Linear(1, 1), NOTHING, subject)
        for is_balanced in (False, True)
        for subject in ("", "these", "those")
    }
    assert len(found) == 6


NOTHING = Examples(torch.zeros(0), torch.zeros(0))
