"""The server's progress bars."""

import time
from dataclasses import replace

import pytest

from ecavg.common.config import FineTuneConfig, RunConfig
from ecavg.common.run_display import RunDisplay
from ecavg.common.run_state import Phase, RunState, WorkProgress
from ecavg.common.transfer import Blob

STATE = RunState(
    round=1,
    phase=Phase.COLLECTING,
    initial_weights=Blob("0" * 64, 1),
    initial_encoded=None,
    outcome=None,
    accepted_weights="",
    progress=None,
    latest_model=None,
    failed_round=0,
    failure="",
    run_over=False,
    num_contributions=0,
    max_contributions=3,
    counted_round=0,
    left_out=None,
)


class Bars:
    """Keeps the last figures of each bar."""

    def __init__(self) -> None:
        self.figures: dict[str, tuple[float, float]] = {}
        self.details: dict[str, str] = {}
        self.messages: list[str] = []

    def update(self, label: str, done: float, total: float, detail: str = "", unit: str = "") -> None:
        self.figures[label] = (done, total)
        self.details[label] = detail

    def message(self, text: str) -> None:
        self.messages.append(text)

    def close(self) -> None: ...


def test_bars_are_full_once_their_work_is_over() -> None:
    bars = Bars()
    display = RunDisplay(bars)
    display.show(replace(STATE, num_contributions=1))
    assert bars.figures == {"round 1: contributions": (1, 3)}
    display.show(replace(STATE, num_contributions=2))
    step = WorkProgress(8, 9, 0.5)
    display.show(replace(STATE, phase=Phase.FINE_TUNING, progress=step))
    assert bars.figures == {"round 1: contributions": (2, 2), "round 1: fine-tuning": (8, 9)}
    display.show(replace(STATE, phase=Phase.PUBLISHED))
    assert bars.figures["round 1: fine-tuning"] == (9, 9)


def test_round_0_is_shown_as_the_warm_up() -> None:
    bars = Bars()
    RunDisplay(bars).show(replace(STATE, round=0))
    assert bars.figures == {"warm-up: contributions": (0, 3)}


def test_an_agent_shows_what_the_cloud_does_and_in_which_epoch() -> None:
    bars = Bars()
    display = RunDisplay(bars, "cloud: ")
    tuning = replace(STATE, phase=Phase.FINE_TUNING)
    display.show(replace(tuning, progress=WorkProgress(3, 50, 0.25)))
    assert bars.details == {"cloud: fine-tuning": "loss 0.250"}
    # The agent hears of the run's epochs when it joins.
    display.run = RunConfig(fine_tune=FineTuneConfig(epochs=5), warm_up_epochs=2)
    display.show(replace(tuning, progress=WorkProgress(29, 50, 0.25)))
    assert bars.details == {"cloud: fine-tuning": "2 of 5 epochs, loss 0.250"}
    assert bars.figures == {"cloud: fine-tuning": (29, 50)}
    display.show(replace(tuning, round=0, progress=WorkProgress(29, 50, 0.25)))
    assert bars.details == {"cloud: fine-tuning": "1 of 2 epochs, loss 0.250"}


def test_what_the_next_round_waits_for_is_said_once_after_each_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC")
    monkeypatch.setattr(time, "time", lambda: 82_800.0)
    bars = Bars()
    display = RunDisplay(bars)
    over = replace(STATE, phase=Phase.PUBLISHED)
    display.show(over)
    assert bars.messages == []
    for _ in range(2):
        display.show(replace(over, next_round_at=93_600.0))
    assert bars.messages == ["the next round opens at 02:00 UTC (in 3 h)"]
    display.show(replace(over, round=2, num_examples_to_open=500))
    display.show(replace(over, round=3, next_round_at=93_600.0, run_over=True))
    assert bars.messages[1:] == ["the next round opens when the agents have 500 new examples"]
