"""The table `async`: accuracy against time where one agent is ten times slower than the others.

The agents and the cloud are the product's own, and their work is done one after the other. Time is simulated:
a fast agent's pre-training takes 1, the slow agent's takes SLOW, and the cloud's work on a round takes CLOUD.
Transfers take none. An agent starts again from the newest model when its contribution has been merged.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from ecavg.cloud_server.contribution import Contribution
from ecavg.common.devices import select_device
from ecavg.common.errors import RunError, UsageError
from experiments.cell import Record, TestSet, alone_in, new_network, prefixed, read_record, write_record
from experiments.round import Edge, Network, OnProgress, round_job
from experiments.tables import grid, spread
from experiments.tasks import Setting

SLOW = 10.0
CLOUD = 0.5
# The synchronous server that waits for all does so many rounds in the time of the table.
NUM_SLOW_ROUNDS = 3
END = NUM_SLOW_ROUNDS * (SLOW + CLOUD)


class Row(NamedTuple):
    """One way to deal with the slow agent, which is the last one."""

    label: str
    # So many agents fewer than there are close a round.
    num_missing: int = 0
    # False: the slow agent is always late, and nothing of it is merged.
    with_slow: bool = True


WAITING = "sync"
ROWS: Mapping[str, Row] = {
    WAITING: Row("sync, waits for all"),
    "sync_without": Row("sync, does not wait for the slow agent", 1, with_slow=False),
    "async_1": Row("async, buffer of all but one", 1),
    "async_2": Row("async, buffer of all but two", 2),
}


class Cell(NamedTuple):
    """One setting, and the folder that keeps the figures known so far."""

    setting: Setting
    path: Path
    device: str = "cpu"

    @property
    def missing(self) -> list[str]:
        return [name for name in ROWS if self.record(name) is None]

    @property
    def is_done(self) -> bool:
        return not self.missing

    def record(self, name: str) -> Record | None:
        """Return the record of a row; None if there is none, or only one with other settings."""
        record = read_record(self.path / f"{name}.json")
        return record if record and record["run"] == self._run else None

    def run(self, on_progress: OnProgress) -> None:
        """Measure the rows that are missing.

        Raises:
            UsageError: there are too few data, or another process is working on this cell.
        """
        device = select_device(self.device)
        with alone_in(self.path):
            for name in self.missing:
                show = prefixed(ROWS[name].label, on_progress)
                with new_network(self.setting, self.path / "network", device, show) as network:
                    steps = _Timeline(self, ROWS[name], network, show).steps()
                    write_record(self.path / f"{name}.json", {"steps": steps, "run": self._run})

    @property
    def _run(self) -> Record:
        return self.setting.run.model_dump(mode="json")


def check(num_agents: int) -> None:
    """Raise UsageError unless there are enough agents for every row."""
    if num_agents < 3:
        raise UsageError("the table async needs 3 agents or more: give --agents 4")


@dataclass
class _Trainee:
    """An agent that pre-trains."""

    edge: Edge
    seconds: float
    # The number of the round in which its pre-training began, and when it is done.
    begun_in: int = 1
    done_at: float = 0.0


class _Timeline:
    """The rounds of one row with new agents."""

    def __init__(self, cell: Cell, row: Row, network: Network, on_progress: OnProgress) -> None:
        self._run = cell.setting.run
        self._row = row
        self._network = network
        self._on_progress = on_progress
        self._test = TestSet(self._run, select_device(cell.device), cell.path / "measured.json")
        edges = network.edges if row.with_slow else network.edges[:-1]
        self._trainees = [
            _Trainee(edge, seconds := SLOW if edge is network.edges[-1] else 1.0, done_at=seconds)
            for edge in edges
        ]
        self._buffer_size = len(network.edges) - row.num_missing
        # The initial weights of round 1, then those of each round after it.
        start = network.start(None)
        assert start
        self._starts = [start]

    def steps(self) -> list[Record]:
        """Do the rounds that are published by END, and return a record for each."""
        steps: list[Record] = []
        opened_at = 0.0
        while True:
            # Those that were done before have waited for the round to open.
            order = sorted(self._trainees, key=lambda each: each.done_at)
            merged = order[: self._buffer_size]
            published_at = max(opened_at, merged[-1].done_at) + CLOUD
            if published_at > END:
                return steps
            steps.append({"time": published_at, **self._round(merged)})
            for each in merged:
                each.begun_in, each.done_at = len(self._starts), published_at + each.seconds
            opened_at = published_at

    def _round(self, merged: Sequence[_Trainee]) -> Record:
        """Have these agents contribute to the open round, and publish its model."""
        number = len(self._starts)
        contributions = [self._contribution(each, number) for each in merged]
        job = round_job(self._run, number, self._starts[-1], contributions)
        result = self._network.cloud.publish(job, self._on_progress)
        if result.weights is None:
            raise RunError(f"round {number} of {self._row.label} published nothing")
        self._starts.append(result.weights.sha256)
        published = self._network.cloud.blobs.get(result.weights.sha256)
        return {
            "accuracy": self._test.measure_file(published)["accuracy"],
            "staleness": [each.staleness for each in contributions],
            "start": result.start,
        }

    def _contribution(self, trainee: _Trainee, number: int) -> Contribution:
        start, blobs = self._starts[trainee.begun_in - 1], self._network.cloud.blobs
        made = trainee.edge.contribute(trainee.begun_in, start, blobs, self._on_progress)
        return replace(made, staleness=number - trainee.begun_in)


# ---------------------------------------------------------------------- the table


def figures_of(groups: Mapping[str, Sequence[Cell]]) -> Record:
    """Return for each setting and row the steps of each seed."""
    return {
        name: {
            row: {
                "label": ROWS[row].label,
                "seeds": [{"seed": cell.setting.run.seed, "steps": _steps(cell, row)} for cell in cells],
            }
            for row in ROWS
        }
        for name, cells in groups.items()
    }


def _steps(cell: Cell, row: str) -> list[Record]:
    record = cell.record(row)
    assert record, f"{cell.path} lacks {row}"
    return record["steps"]  # type: ignore[no-any-return]


def in_words(figures: Record) -> str:
    texts = [
        f"One agent is {SLOW:g} times slower. Time is simulated, not measured: a fast agent's pre-training"
        f" takes 1, the slow agent's {SLOW:g}, the cloud's work on a round {CLOUD:g}, and transfers nothing."
        f" Everything ends at {END:g}. The target of a seed is the last accuracy of the server that waits for"
        " all; the time to it is the mean over the seeds that reach it."
    ]
    ends = [(SLOW + CLOUD) * number for number in range(1, NUM_SLOW_ROUNDS + 1)]
    headings = ["", "rounds", *(f"accuracy at {end:g}" for end in ends), "time to the target", "staleness"]
    for name, rows in figures.items():
        targets = [seed["steps"][-1]["accuracy"] for seed in rows[WAITING]["seeds"]]
        lines = [_line(row, ends, targets) for row in rows.values()]
        texts += [f"## {name}", grid(headings, lines)]
    return "\n\n".join(texts)


def _line(row: Record, ends: Sequence[float], targets: Sequence[float]) -> list[str]:
    seeds = [seed["steps"] for seed in row["seeds"]]
    times = [_time_to(target, steps) for target, steps in zip(targets, seeds, strict=True)]
    reached = [time for time in times if time is not None]
    when = f"{fmean(reached):.1f} ({len(reached)} of {len(seeds)} seeds)" if reached else "not reached"
    most = max(staleness for steps in seeds for step in steps for staleness in step["staleness"])
    accuracies = [spread([_accuracy_at(end, steps) for steps in seeds]) for end in ends]
    return [row["label"], f"{fmean(map(len, seeds)):g}", *accuracies, when, f"0 to {most}"]


def _accuracy_at(time: float, steps: Sequence[Record]) -> float:
    """Return the accuracy of the model that was the newest at this time."""
    return float([step["accuracy"] for step in steps if step["time"] <= time][-1])


def _time_to(accuracy: float, steps: Sequence[Record]) -> float | None:
    """Return when the first model with this accuracy was published; None: none has it."""
    return next((step["time"] for step in steps if step["accuracy"] >= accuracy), None)
