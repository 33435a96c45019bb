"""Windows of a series: no row is on both sides of any split."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ecavg.common.config import RunConfig
from ecavg.common.errors import UsageError
from ecavg.common.shards import cloud_holdout
from ecavg.edge_agent.data import AgentData
from ecavg.edge_agent.partition import Partition
from ecavg.edge_agent.series import check_shared_fraction, hold_out_latest
from ecavg.edge_agent.tables import TableFormat
from tests.recipes import data_of

WINDOW, STRIDE, HORIZON = 6, 2, 3
FORM = TableFormat(("level",), ("level",), window=WINDOW, stride=STRIDE, horizon=HORIZON)
RUN: dict[str, Any] = {
    "task": "regression",
    "dataset": "river",
    "inputs": {"shape": (1, WINDOW), "overlap": FORM.overlap},
    "holdout_fraction": 0.2,
}


def series(folder: Path, num_rows: int) -> Path:
    """Write a series whose values are the numbers of its rows."""
    path = folder / "river.csv"
    path.write_text("level\n" + "".join(f"{row}\n" for row in range(num_rows)))
    return path


def load(path: Path, partition: Partition | None = None, run: dict[str, Any] = RUN) -> AgentData:
    return data_of(
        RunConfig(**run),
        source=str(path),
        partition=partition,
        table=FORM,
    )


def rows_of(*sides: Any) -> set[int]:
    """Return the rows of the file that are in some windows or their targets."""
    return {int(value) for side in sides for value in np.ravel(side)}


def test_held_out_rows_come_after_those_that_are_trained_on(tmp_path: Path) -> None:
    data = load(series(tmp_path, 200))
    assert max(rows_of(*data.train)) < min(rows_of(*data.held_out))
    assert max(rows_of(*data.held_out)) in (198, 199)
    assert 15 <= len(data.held_out.targets) <= 20
    # The gap is no larger than it must be.
    assert min(rows_of(*data.held_out)) - max(rows_of(*data.train)) <= STRIDE


def test_growing_series_never_holds_out_what_was_trained_on(tmp_path: Path) -> None:
    trained_on: set[bytes] = set()
    for num_rows in range(60, 200, 7):
        data = load(series(tmp_path, num_rows))
        held_out = {window.tobytes() for window in data.held_out.inputs}
        assert not trained_on & held_out
        trained_on |= {window.tobytes() for window in data.train.inputs}


def test_parts_of_a_series_share_no_row(tmp_path: Path) -> None:
    path = series(tmp_path, 300)
    parts = [load(path, Partition(number, 3)) for number in (1, 2, 3)]
    rows = [rows_of(*part.train, *part.held_out) for part in parts]
    assert max(rows[0]) < min(rows[1]) <= max(rows[1]) < min(rows[2])


@pytest.mark.parametrize("num_examples", [12, 13, 40, 101])
def test_cloud_holds_out_rows_that_no_shard_trains_on(num_examples: int) -> None:
    starts = np.arange(2 * num_examples)[:, None] * STRIDE
    windows = starts + np.array([*range(WINDOW), WINDOW - 1 + HORIZON])
    shards = windows[:num_examples], windows[num_examples:]
    splits = [cloud_holdout(shard[:, -1:], 0.2, 1, FORM.overlap) for shard in shards]
    trained = rows_of(*(shard[rest] for shard, (rest, _) in zip(shards, splits, strict=True)))
    held_out = rows_of(*(shard[part] for shard, (_, part) in zip(shards, splits, strict=True)))
    assert len(splits[0][1]) == round(0.2 * num_examples)
    assert trained
    assert not trained & held_out


def test_small_shard_of_windows_is_trained_on_as_a_whole() -> None:
    rest, held_out = cloud_holdout(np.zeros((9, 1), np.float32), 0.2, 1, overlap=4)
    assert (list(rest), list(held_out)) == (list(range(9)), [])


def test_run_must_know_of_the_overlap(tmp_path: Path) -> None:
    run = {**RUN, "inputs": {"shape": (1, WINDOW)}}
    with pytest.raises(UsageError, match=r"set overlap = 4 in the server's \[run.inputs\] table"):
        load(series(tmp_path, 100), run=run)


def test_too_short_a_series_is_refused() -> None:
    with pytest.raises(UsageError, match="5 windows are too few to hold some back"):
        hold_out_latest(5, 0.2, 4)


def test_sharing_some_windows_is_refused() -> None:
    with pytest.raises(UsageError, match="set share_data to all or none"):
        check_shared_fraction(RunConfig(**RUN), 0.5)
    check_shared_fraction(RunConfig(**RUN), 1)
