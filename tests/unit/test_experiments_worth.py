"""The table `worth` on a few digits: its rows, their budgets, and their learning-rate schedule."""

import json
from pathlib import Path
from typing import Any

import pytest

from ecavg.common.config import RunConfig
from ecavg.common.schedule import Place, place_of
from ecavg.edge_agent.local import LocalModels
from experiments import command, data, paper, worth
from experiments.cell import alone_in
from experiments.tasks import TASKS

FEW = ["--examples-per-agent", "60", "--test-examples", "100", "--seeds", "1", "--rounds", "1,3"]
SHORT = ["--set", "pretrain.epochs=3", "--set", "fine_tune.epochs=3"]
COMMAND = ["--task", "digits", "--table", "worth", *FEW, *SHORT]
# Of 60 images of an agent the cloud holds back a tenth.
EPOCH = 2 * 54


@pytest.fixture(autouse=True)
def _leave_the_process_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "set_up_process", lambda: None)
    monkeypatch.setenv("EXPERIMENT_DATA", "")


def test_every_row_has_its_budget_and_no_row_is_measured_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dirs = ["--work-dir", str(tmp_path / "work"), "--out-dir", str(tmp_path / "out")]
    assert paper.main([*COMMAND, *dirs]) == 0
    figures = json.loads((tmp_path / "out/digits-worth.json").read_text("utf-8"))["figures"]
    (rows,) = figures.values()
    images = {name: worth.last_values(row, "images") for name, row in rows.items()}
    one = [3 * EPOCH]
    assert images == {
        "alone_1": one,
        "alone_2": [6 * EPOCH],
        "alone_3": [9 * EPOCH],
        **dict.fromkeys(["paper", "rounds_1", "rounds_1_warm_up", "rounds_3", "rounds_3_warm_up"], one),
    }
    epochs = {
        name: [(step["round"], step["epochs"]) for step in row["seeds"][0]["steps"]]
        for name, row in rows.items()
    }
    assert epochs["alone_3"] == [(0, 9)]
    assert epochs["rounds_1_warm_up"] == [(0, 1), (1, 2)]
    assert epochs["rounds_3"] == [(1, 1), (2, 1), (3, 1)]
    assert epochs["rounds_3_warm_up"] == [(0, 1), (1, 0), (2, 1), (3, 1)]
    after_warm_up = rows["rounds_1_warm_up"]["seeds"][0]["steps"][1]
    assert "previous" in after_warm_up["held_out"]
    assert rows["paper"]["seeds"][0]["steps"][0]["held_out"].keys() == {"average"}
    text = (tmp_path / "out/digits-worth.md").read_text("utf-8")
    assert all(text.count(f"| {row['label']} |") == 1 for row in rows.values())
    assert (tmp_path / "out/digits-worth.svg").read_text("utf-8").startswith("<?xml")
    assert not list((tmp_path / "work/worth").glob("*/network"))

    monkeypatch.setattr(LocalModels, "pretrain", None)
    assert paper.main([*COMMAND, *dirs]) == 0


def test_second_command_leaves_the_first_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work_dir = ["--work-dir", str(tmp_path)]
    arguments = paper._parse([*COMMAND, *work_dir])
    folder = data.prepare(paper._run(arguments, {}), None, tmp_path)
    ((cell,),) = paper._groups(arguments, folder).values()
    (cell.path / "network").mkdir(parents=True)
    with alone_in(cell.path):
        assert paper.main([*COMMAND, *work_dir]) == 2
    assert "another process is at work in" in capsys.readouterr().out
    assert (cell.path / "network").exists()


@pytest.mark.parametrize("rounds", [1, 3, 5])
@pytest.mark.parametrize("has_warm_up", [False, True])
def test_trainings_of_a_run_follow_each_other_on_one_schedule(rounds: int, has_warm_up: bool) -> None:
    run = RunConfig(**TASKS["digits"].run)
    run = worth._changed(run, pretrain=30, fine_tune=15)
    part = worth.round_part(run, rounds)
    if has_warm_up:
        begin, first = worth.begin_part(run, rounds), worth.first_fine_tune_part(run, rounds)
        places = [place(begin, "fine_tune", 0), place(begin, "pretrain", 1), place(first, "fine_tune", 1)]
        lengths = [1, 30 // rounds, 15 // rounds - 1]
    else:
        places = [place(part, "pretrain", 1), place(part, "fine_tune", 1)]
        lengths = [30 // rounds, 15 // rounds]
    for number in range(2, rounds + 1):
        places += [place(part, "pretrain", number), place(part, "fine_tune", number)]
        lengths += [30 // rounds, 15 // rounds]
    begins = [sum(lengths[:count]) for count in range(len(lengths))]
    assert places == [Place(begin, 45) for begin in begins]


def place(part: worth.Part, training: Any, number: int) -> Place:
    return place_of(part.run, training, number, part.planned_rounds)


def test_difference_has_the_standard_error_of_its_mean() -> None:
    assert worth.with_error([0.1, 0.3]) == "+0.2000 ± 0.1000"
    assert worth.with_error([0.1]) == "+0.1000"
    assert worth.with_error([]) == "-"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "2"], "pretrain.epochs = 3 cannot be spread evenly over 2 rounds: change --rounds"),
        (["--set", "fine_tune.epochs=0"], "fine_tune.epochs = 0 cannot be spread evenly over 1 rounds"),
        (["--initial-weights", "independent"], 'give "shared" in place of "independent"'),
        (["--set", "warm_up_epochs=1"], "leave out warm_up_epochs"),
        (["--examples-in-all", "5000"], "5000 examples are wanted, and there are 1348"),
    ],
)
def test_what_cannot_be_compared_is_told_in_a_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert paper.main([*COMMAND, "--work-dir", str(tmp_path), *arguments]) == 2
    assert message in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--variants", "selection"], "--variants is not for the table worth: leave it out"),
        (["--networked"], "--networked is not for the table worth"),
        (["--wire", "float32,int8"], "--wire takes one encoding in the table worth"),
        (["--rounds", "1,many"], "--rounds 1,many: give numbers from 1 on, such as 1 or 1,3,5"),
        (["--rounds", "0"], "--rounds 0: give numbers from 1 on"),
        (["--table", "parts", "--rounds", "1,3"], "give one number; only the table worth takes several"),
    ],
)
def test_bad_options_are_told(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        paper.main([*COMMAND, *arguments])
    assert message in " ".join(capsys.readouterr().err.split())
