"""The commands about the model in use, in the process of the test."""

import json
from pathlib import Path

import pytest
from PIL import Image

from ecavg.edge_agent.__main__ import main
from ecavg.edge_agent.history import History, Source, use_of
from ecavg.edge_agent.state import AgentState, Arrived, Progress
from tests.unit.test_agent_state import REPORT
from tests.unit.test_exporting import MLP, in_use
from tests.unit.test_history import take


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """Return a state directory with the models of two rounds; the one in use can be built."""
    folder = tmp_path / "state"
    AgentState(folder, "edge-1").close()
    history = History(folder, 3)
    take(history, tmp_path, 1)
    _, weights = in_use(MLP, tmp_path)
    history.take(weights, MLP, use_of(weights, "run", 2, Source.ADAPTED, (0.1, 0.25)))
    return folder


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str]:
    """Return the exit code of `edge-agent`, and what it has printed."""
    code = main([str(arg) for arg in args])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def test_history_lists_the_models_in_lines_and_as_json(
    state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = run(capsys, "history", "--state-dir", state)
    first, second = text.splitlines()
    assert (code, "round 1  published" in first, "accuracy none → 0.1000, kept" in first) == (0, True, True)
    assert "round 2  adapted" in second
    assert "accuracy 0.1000 → 0.2500, kept" in second
    _, text = run(capsys, "history", "--state-dir", state, "--json")
    assert [(use["round"], use["source"], use["is_kept"]) for use in json.loads(text)] == [
        (1, "published", True),
        (2, "adapted", True),
    ]


@pytest.mark.parametrize("command", ["history", "predict x.png", "export --format torch-export", "roll-back"])
def test_device_without_a_model_is_told_so(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = run(capsys, *command.split(), "--state-dir", tmp_path / "none")
    name = command.split()[0]
    assert (code, text) == (
        2,
        f"edge-agent {name}: no model is in use in {tmp_path / 'none'} yet: name the right --state-dir,"
        " or start the agent\n",
    )
    assert not (tmp_path / "none").exists()


def test_predict_names_the_classes_of_each_picture(
    state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [tmp_path / "dark.png", tmp_path / "light.png"]
    for path, shade in zip(paths, (0, 255), strict=True):
        Image.new("L", (20, 20), shade).save(path)
    code, text = run(capsys, "predict", *paths, "--state-dir", state, "--json")
    found = json.loads(text)
    assert (code, list(found)) == (0, [str(path) for path in paths])
    for guesses in found.values():
        assert len(guesses) == 5
        assert {guess["label"] for guess in guesses} < set(MLP.class_names)
        assert [guess["probability"] for guess in guesses] == sorted(
            (guess["probability"] for guess in guesses), reverse=True
        )
    assert found[str(paths[0])] != found[str(paths[1])]
    code, text = run(capsys, "predict", paths[0], "--state-dir", state)
    best = found[str(paths[0])][0]
    assert text.startswith(f"{paths[0]}: {best['label']} {best['probability']:.1%}, ")


def test_picture_that_cannot_be_read_is_named(
    state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "broken.png"
    path.write_text("no picture")
    code, text = run(capsys, "predict", path, "--state-dir", state)
    assert code == 2
    assert text.startswith(f"edge-agent predict: picture {path} cannot be read (")


def test_export_writes_the_file_that_was_asked_for(
    state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.pt2"
    where = ("--state-dir", state, "--format", "torch-export", "--output")
    code, text = run(capsys, "export", *where, output)
    assert (code, text) == (0, f"wrote {output}: the adapted model of round 2\n")
    assert output.stat().st_size > 0
    code, text = run(capsys, "export", *where, tmp_path / "nowhere" / "out.pt2")
    assert (code, "cannot be written (No such file or directory): name another --output" in text) == (2, True)


def test_roll_back_uses_the_model_before_and_tells_the_command(
    state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls, script = tmp_path / "calls", 'echo "$ECAVG_ROUND $ECAVG_SOURCE" >> "$0"'
    command = [f"--on-update={word}" for word in ("sh", "-c", script, calls)]
    code, text = run(capsys, "roll-back", "--state-dir", state, *command)
    restored = History(state, 3).latest()
    assert (code, text) == (0, f"rolled back to the model of round 1 ({restored.digest[:12]})\n")
    assert calls.read_text() == "1 rolled-back\n"
    assert restored.is_told
    code, text = run(capsys, "roll-back", "--state-dir", state)
    assert (code, "no older model is kept" in text) == (2, True)
    code, text = run(capsys, "roll-back", 2, "--state-dir", state, "--on-update=false")
    assert code == 1
    assert "rolled back to the model of round 2 (" in text
    assert "but on_update: false ended with exit code 1" in text


def test_roll_back_waits_for_no_agent_that_runs(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    disk = AgentState(state, "edge-1")
    code, text = run(capsys, "roll-back", "--state-dir", state)
    disk.close()
    assert (code, "runs: stop it, roll back, and start it again" in text) == (2, True)
    assert History(state, 3).latest().round == 2


def test_model_that_was_about_to_be_reported_is_not_taken_again(
    state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from ecavg.common.transfer import blob_of

    disk = AgentState(state, "edge-1")
    arrived = Arrived(weights=blob_of(disk.model), report=REPORT)
    disk.save(Progress(run_id="run", arrived=arrived))
    disk.close()
    assert run(capsys, "roll-back", "--state-dir", state)[0] == 0
    disk = AgentState(state, "edge-1")
    report = disk.progress.arrived.report
    disk.close()
    assert (report.applied, report.reason) == (False, "rolled back by the user of the device")
