"""The same round with real processes and without."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from experiments import command, paper


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As in the processes that are started: sums in several threads have other last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.soak
def test_the_network_makes_the_same_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "set_up_process", lambda: None)
    monkeypatch.setenv("EXPERIMENT_DATA", "")  # what is written there ends with the test
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    dirs = ["--work-dir", str(tmp_path), "--out-dir", str(tmp_path)]
    few = ["--examples-per-agent", "60", "--seeds", "1", "--set", "fine_tune.epochs=2"]
    assert paper.main(["--task", "digits", "--table", "claims", *few, *dirs, "--networked"]) == 0
    assert "the same, bit for bit" in (tmp_path / "digits-networked.md").read_text("utf-8")
