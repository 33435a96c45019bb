"""`make demo` as a user runs it: to its end, and stopped on the way."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from experiments import demo
from tests.processes import ROOT, Command, until

NUM_PROCESSES = 5  # the demo, server, trainer, two agents


def processes_in(folder: Path) -> list[int]:
    """Those whose working directory it is."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").readlink() == folder:
                found.append(int(process.name))
        except OSError:  # it has just ended, or is another user's
            continue
    return found


@pytest.fixture
def flags() -> list[str]:
    return []


@pytest.fixture
def running_demo(tmp_path: Path, flags: list[str]) -> Iterator[Command]:
    # A proxy for the world outside, such as a company's, has no part in it.
    dead = "http://127.0.0.1:9"
    env = {"PYTHONPATH": str(ROOT), "https_proxy": dead, "http_proxy": dead}
    command = Command("experiments.demo", *flags, folder=tmp_path / "log", cwd=tmp_path, env=env)
    yield command
    for pid in processes_in(tmp_path):
        os.kill(pid, signal.SIGKILL)
    command.close()


def test_demo_shows_before_and_after(running_demo: Command, tmp_path: Path) -> None:
    assert running_demo.wait() == 0
    output = running_demo.output
    assert "accuracy on held-out data" in output
    for name in (*demo.AGENTS, "cloud (start → published)"):
        row = next(line for line in output.splitlines() if name in line)
        assert row.count(" 0.") == 2 or " 1.0000" in row
    assert "one round of mlp on digits" in output
    assert processes_in(tmp_path) == []


@pytest.mark.parametrize("flags", [["--task", "regression"]])
@pytest.mark.soak
def test_demo_of_a_regression_shows_its_own_figure(running_demo: Command) -> None:
    assert running_demo.wait() == 0
    assert "R² on held-out data" in running_demo.output
    assert "one round of mlp on diabetes" in running_demo.output


@pytest.mark.parametrize("signals", [(signal.SIGTERM,), (signal.SIGINT, signal.SIGINT, signal.SIGTERM)])
def test_stopped_demo_leaves_no_process(
    running_demo: Command, tmp_path: Path, signals: tuple[signal.Signals, ...]
) -> None:
    until(lambda: len(processes_in(tmp_path)) == NUM_PROCESSES, running_demo)
    for number in signals:
        running_demo.process.send_signal(number)
        if len(signals) > 1:  # the next one comes while it cleans up
            until(lambda: len(processes_in(tmp_path)) < NUM_PROCESSES, running_demo)
    assert running_demo.wait() == 130
    assert processes_in(tmp_path) == []
    assert "stopped" in running_demo.output
    assert "Traceback" not in running_demo.output


def test_figure_that_is_missing_is_a_dash(capsys: pytest.CaptureFixture[str]) -> None:
    demo.show(
        {
            "agents": [{"agent_id": "edge-1", "accuracy_after": 0.5}, {"agent_id": "edge-2"}],
            "candidates": {},
            "start": "aligned",
            "accuracy_published": None,
        }
    )
    rows = [line for line in capsys.readouterr().out.splitlines() if "edge-" in line]
    assert [row.replace("│", " ").split() for row in rows] == [
        ["edge-1", "-", "0.5000"],
        ["edge-2", "-", "-"],
    ]
