"""The table `worth`: what edges and cloud are worth together, against the images that the cloud trains on.

Every row has the same data and the same recipe. The cloud alone trains the initial weights on the shared data
of all agents. The other rows have one total budget of edge epochs and cloud epochs, spread over the rounds.
Our rows have one learning-rate schedule over all of it, the others one for each training.
"""

from collections.abc import Mapping, Sequence
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from ecavg.cloud_server.jobs import Job, Result
from ecavg.cloud_server.trainer.finetune import combine
from ecavg.common.config import RunConfig
from ecavg.common.devices import select_device
from ecavg.common.errors import RunError, UsageError
from ecavg.common.layers import deep_merge
from experiments.cell import Record, TestSet, alone_in, new_network, prefixed, read_record, write_record
from experiments.round import Network, OnProgress, round_job
from experiments.tables import grid, signed, spread
from experiments.tasks import PLAIN, Setting

# The cloud alone has so many times the budget of the other rows.
BUDGETS = (1, 2, 3)
ALONE = "alone_1"
# The epochs of the warm-up, in the rows that have one.
WARM_UP = 1


class Row(NamedTuple):
    """One way to spend a budget."""

    label: str
    # How many times the budget the cloud trains alone; 0 with edges.
    alone: int = 0
    rounds: int = 1
    has_warm_up: bool = False
    is_paper: bool = False


def rows_of(rounds: Sequence[int]) -> dict[str, Row]:
    """Return the rows of the table, by name.

    Args:
        rounds: the numbers of rounds over which the epochs are spread, each in two rows.
    """
    rows = {f"alone_{times}": Row(_alone(times), alone=times) for times in BUDGETS}
    rows["paper"] = Row("the paper's: one round, plain average", is_paper=True)
    for number in rounds:
        label = f"ours, {number} round{'s' if number > 1 else ''}"
        rows[f"rounds_{number}"] = Row(label, rounds=number)
        rows[f"rounds_{number}_warm_up"] = Row(f"{label}, warm-up", rounds=number, has_warm_up=True)
    return rows


def _alone(times: int) -> str:
    return f"the cloud alone, {f'{times} times the' if times > 1 else 'the same'} budget"


def check(run: RunConfig, rounds: Sequence[int]) -> None:
    """Refuse what the table cannot compare.

    Raises:
        UsageError: the epochs cannot be spread evenly, or the cloud has no weights to train alone.
    """
    if run.initial_weights != "shared":
        raise UsageError(
            'the table worth needs initial weights that the cloud can train: give "shared" in place of'
            f' "{run.initial_weights}"'
        )
    if run.warm_up_epochs:
        raise UsageError("the table worth has rows with and without a warm-up: leave out warm_up_epochs")
    for name, epochs in (("pretrain", run.pretrain.epochs), ("fine_tune", run.fine_tune.epochs)):
        for number in rounds:
            if not epochs or epochs % number:
                raise UsageError(
                    f"{name}.epochs = {epochs} cannot be spread evenly over {number} rounds: change --rounds,"
                    f" or --set {name}.epochs to a multiple"
                )


# ---------------------------------------------------------------------- what each training of a row does


def alone_run(run: RunConfig, times: int) -> RunConfig:
    """Return the table with which a warm-up is the whole training of the cloud alone."""
    return _changed(run, warm_up=times * run.fine_tune.epochs, schedule_over="round")


def paper_run(run: RunConfig) -> RunConfig:
    plain = RunConfig.model_validate(deep_merge(run.model_dump(), PLAIN))
    return _changed(plain, schedule_over="round")


class Part(NamedTuple):
    """The `[run]` table of a part of a row, and the rounds that its learning-rate schedule is for."""

    run: RunConfig
    planned_rounds: int


def begin_part(run: RunConfig, rounds: int) -> Part:
    """Return the part for the warm-up and the pre-training after it.

    The warm-up counts in the cloud's budget, while the product adds it. So these two are described as the
    beginning of a run of one round, whose fine-tune is as long as all that comes later. So the schedule is as
    long as in the other rows.
    """
    pretrain = run.pretrain.epochs // rounds
    rest = run.pretrain.epochs + run.fine_tune.epochs - WARM_UP - pretrain
    return Part(_changed(run, warm_up=WARM_UP, pretrain=pretrain, fine_tune=rest), 1)


def first_fine_tune_part(run: RunConfig, rounds: int) -> Part:
    """Return the part for the fine-tune of round 1 after a warm-up, which has been cut by the warm-up.

    The warm-up is described as a part of the pre-training, which gives the fine-tune its place.
    """
    pretrain, fine_tune = run.pretrain.epochs // rounds, run.fine_tune.epochs // rounds
    return Part(_changed(run, pretrain=pretrain + WARM_UP, fine_tune=fine_tune - WARM_UP), rounds)


def round_part(run: RunConfig, rounds: int) -> Part:
    """Return the part for a whole round."""
    epochs = run.pretrain.epochs // rounds, run.fine_tune.epochs // rounds
    return Part(_changed(run, pretrain=epochs[0], fine_tune=epochs[1]), rounds)


def _changed(
    run: RunConfig,
    *,
    warm_up: int = 0,
    pretrain: int | None = None,
    fine_tune: int | None = None,
    schedule_over: str = "run",
) -> RunConfig:
    """Return the run with other epochs (None: as they are) and another reach of the schedule."""
    changes: dict[str, Any] = {"warm_up_epochs": warm_up}
    for name, epochs in (("pretrain", pretrain), ("fine_tune", fine_tune)):
        changes[name] = {"schedule_over": schedule_over} | ({} if epochs is None else {"epochs": epochs})
    return RunConfig.model_validate(deep_merge(run.model_dump(), changes))


# ---------------------------------------------------------------------- measuring


class Cell(NamedTuple):
    """The rows wanted for one setting, and the folder that keeps the figures known so far."""

    setting: Setting
    rounds: Sequence[int]
    path: Path
    device: str = "cpu"

    @property
    def rows(self) -> dict[str, Row]:
        return rows_of(self.rounds)

    @property
    def missing(self) -> list[str]:
        return [name for name in self.rows if self.record(name) is None]

    @property
    def is_done(self) -> bool:
        return not self.missing

    def record(self, name: str) -> Record | None:
        """Return the record of a row; None if there is none, or only one with other settings."""
        record = read_record(self.path / f"{name}.json")
        is_same = record and (record["run"], record.get("device")) == (self._run, self.device)
        return record if is_same else None

    def keep(self, name: str, steps: Sequence[Record]) -> None:
        record = {"steps": steps, "run": self._run, "device": self.device}
        write_record(self.path / f"{name}.json", record)

    def run(self, on_progress: OnProgress) -> None:
        """Measure the rows that are missing.

        Raises:
            UsageError: there are too few data, or another process is working on this cell.
        """
        device = select_device(self.device)
        with alone_in(self.path):
            for name in self.missing:
                row = self.rows[name]
                show = prefixed(row.label, on_progress)
                with new_network(self.setting, self.path / "network", device, show) as network:
                    self.keep(name, _Way(self, row, network, show).steps())

    @property
    def _run(self) -> Record:
        return self.setting.run.model_dump(mode="json")


class _Way:
    """The rounds of one row with new agents."""

    def __init__(self, cell: Cell, row: Row, network: Network, on_progress: OnProgress) -> None:
        self._run = cell.setting.run
        self._row = row
        self._network = network
        self._on_progress = on_progress
        self._test = TestSet(self._run, select_device(cell.device), cell.path / "measured.json")
        self._steps: list[Record] = []

    def steps(self) -> list[Record]:
        """Do the row, and return a record for each published model, with the cloud's images up to it."""
        if self._row.alone:
            self._warm_up(Part(alone_run(self._run, self._row.alone), 1))
        elif self._row.is_paper:
            self._round(1, None, Part(paper_run(self._run), 1))
        else:
            self._rounds()
        return self._steps

    def _rounds(self) -> None:
        rounds, latest = self._row.rounds, None
        part = round_part(self._run, rounds)
        if self._row.has_warm_up:
            begin = begin_part(self._run, rounds)
            latest = self._warm_up(begin)
            latest = self._round(1, latest, begin, first_fine_tune_part(self._run, rounds))
        for number in range(2 if latest else 1, rounds + 1):
            latest = self._round(number, latest, part)

    def _warm_up(self, part: Part) -> str:
        """Let the cloud train the initial weights, and return the digest of the published model."""
        start = self._network.start(None)
        job = round_job(part.run, 0, start, self._network.share(), part.planned_rounds)
        return self._publish(job)

    def _round(self, number: int, latest: str | None, part: Part, fine_tuning: Part | None = None) -> str:
        """Do a round, and return the digest of the published model.

        Args:
            fine_tuning: the part for the cloud's work, if it is another one than for the pre-training.
        """
        contributions = self._network.contribute(part.run, number, latest, part.planned_rounds)
        run, planned_rounds = fine_tuning or part
        job = round_job(run, number, self._network.start(latest), contributions, planned_rounds)
        return self._publish(job)

    def _publish(self, job: Job) -> str:
        """Do the cloud's work, and note the published model.

        Returns:
            The digest of the published model.
        """
        result = self._network.cloud.publish(
            job, self._on_progress, is_warmed_up=self._row.has_warm_up and job.round > 0
        )
        if result.weights is None:
            raise RunError(f"round {job.round} of {self._row.label} published nothing")
        blobs = self._network.cloud.blobs
        num_images = len(combine(job.run, job.contributions, blobs.path).train.targets)
        before = self._steps[-1] if self._steps else {"images": 0, "seconds": 0.0}
        self._steps.append(
            {
                "round": job.round,
                "epochs": job.run.fine_tune_of(job.round).epochs,
                "images": before["images"] + num_images * job.run.fine_tune_of(job.round).epochs,
                "seconds": before["seconds"] + result.seconds.get("fine_tune", 0.0),
                "start": result.start,
                "published": result.published,
                "held_out": result.candidates,
                "accuracy": self._accuracy(job, result, blobs.get(result.weights.sha256)),
            }
        )
        return result.weights.sha256

    def _accuracy(self, job: Job, result: Result, published: Path) -> float:
        """Measure the published model; the paper publishes the fine-tuned model in any case."""
        if not self._row.is_paper or result.published == "fine_tuned":
            return float(self._test.measure_file(published)["accuracy"])
        weighed = self._network.cloud.weighed(job, result)
        fine_tuned = next(model for name, model in weighed if name == "fine_tuned")
        return float(self._test.measure(fine_tuned)["accuracy"])


# ---------------------------------------------------------------------- the table


def figures_of(groups: Mapping[str, Sequence[Cell]]) -> Record:
    """Return for each setting and row the steps of each seed; the last step is the end of the row."""
    return {
        name: {
            row: {
                "label": cells[0].rows[row].label,
                "seeds": [{"seed": cell.setting.run.seed, "steps": _steps(cell, row)} for cell in cells],
            }
            for row in cells[0].rows
        }
        for name, cells in groups.items()
    }


def _steps(cell: Cell, row: str) -> list[Record]:
    record = cell.record(row)
    assert record, f"{cell.path} lacks {row}"
    return record["steps"]  # type: ignore[no-any-return]


def last_values(row: Record, key: str) -> list[float]:
    """Return the value at the end of the row, of each seed."""
    return [seed["steps"][-1][key] for seed in row["seeds"]]


def in_words(figures: Record) -> str:
    texts = [
        "An image counts as often as the cloud trains on it. Differences are taken seed by seed, and given"
        " as mean ± standard error. The starts are those of each round's fine-tune, on the first seed. The"
        " seconds are those of the cloud's training. Our rows have one learning-rate schedule over the run."
        " The others have one for each training. The warm-up is one epoch, taken from the first fine-tune."
    ]
    for name, rows in figures.items():
        alone = last_values(rows[ALONE], "accuracy")
        lines = [_line(row, None if key == ALONE else alone) for key, row in rows.items()]
        headings = ["", "cloud images", "accuracy", "over the cloud alone, same budget", "starts", "seconds"]
        texts += [f"## {name}", grid(headings, lines)]
    return "\n\n".join(texts)


def _line(row: Record, alone: Sequence[float] | None) -> list[str]:
    """Return the cells of a row's line.

    Args:
        alone: the accuracies of the cloud alone with the same budget; None in the line of just that.
    """
    accuracies = last_values(row, "accuracy")
    differences = [value - other for value, other in zip(accuracies, alone or (), strict=alone is not None)]
    return [
        row["label"],
        f"{fmean(last_values(row, 'images')):,.0f}",
        spread(accuracies),
        with_error(differences),
        _starts(row),
        f"{fmean(last_values(row, 'seconds')):.1f}",
    ]


def _starts(row: Record) -> str:
    """Return from what the fine-tune of each round started, on the first seed; "-" for the cloud alone."""
    starts = [step["start"].replace("_", " ") for step in row["seeds"][0]["steps"] if step["round"]]
    return ", ".join(starts) or "-"


def with_error(differences: Sequence[float]) -> str:
    """Format the mean difference ± its standard error."""
    if not differences:
        return "-"
    text = signed(fmean(differences))
    if len(differences) == 1:
        return text
    return f"{text} ± {stdev(differences) / sqrt(len(differences)):.4f}"
