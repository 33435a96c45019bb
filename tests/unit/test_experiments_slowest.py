"""The table `async` on a few digits: which agents each row waits for, and how old their contributions are."""

import json
from pathlib import Path
from typing import Any

import pytest

from experiments import command, paper, slowest

COMMAND = [
    "--task", "digits", "--table", "async", "--agents", "3", "--partition-by", "iid",
    "--examples-per-agent", "40", "--test-examples", "100", "--seeds", "1",
    "--set", "pretrain.epochs=1", "--set", "fine_tune.epochs=0", "--set", 'candidates=["average"]',
]  # fmt: skip


@pytest.fixture(autouse=True)
def _leave_the_process_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "set_up_process", lambda: None)
    monkeypatch.setenv("EXPERIMENT_DATA", "")


def test_each_row_waits_for_whom_it_should(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slowest, "SLOW", 3.0)
    monkeypatch.setattr(slowest, "END", 7.0)
    monkeypatch.setattr(slowest, "NUM_SLOW_ROUNDS", 2)
    dirs = ["--work-dir", str(tmp_path / "work"), "--out-dir", str(tmp_path / "out")]
    assert paper.main([*COMMAND, *dirs]) == 0
    (rows,) = json.loads((tmp_path / "out/digits-async.json").read_text("utf-8"))["figures"].values()

    def told(name: str) -> list[Any]:
        return [(step["time"], step["staleness"]) for step in rows[name]["seeds"][0]["steps"]]

    assert told("sync") == [(3.5, [0, 0, 0]), (7.0, [0, 0, 0])]
    assert told("sync_without") == [(time, [0, 0]) for time in (1.5, 3.0, 4.5, 6.0)]
    # The slow agent is done at 3, in the moment in which round 3 opens, and takes the place of a fast one.
    assert told("async_1") == [
        (1.5, [0, 0]), (3.0, [0, 0]), (4.5, [2, 0]), (6.0, [1, 0]),
    ]  # fmt: skip
    # A fast agent that waits for the next round is no slower than one that trains.
    assert [len(staleness) for _, staleness in told("async_2")] == [1] * len(told("async_2"))
    assert max(staleness for _, (staleness,) in told("async_2")) >= 2
    text = (tmp_path / "out/digits-async.md").read_text("utf-8")
    assert all(text.count(f"| {row['label']} |") == 1 for row in rows.values())


@pytest.mark.parametrize("option", [["--rounds", "3"], ["--variants", "rounds"], ["--wire", "int8,float32"]])
def test_option_that_is_not_for_the_table_is_refused(option: list[str]) -> None:
    with pytest.raises(SystemExit):
        paper.main([*COMMAND, *option])


def test_too_few_agents_are_refused(tmp_path: Path) -> None:
    dirs = ["--work-dir", str(tmp_path / "work"), "--out-dir", str(tmp_path / "out")]
    assert paper.main([*COMMAND, "--agents", "2", *dirs]) == 2
