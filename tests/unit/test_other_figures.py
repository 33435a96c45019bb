"""A run whose figure is no accuracy, as everybody sees it: by its own name, and as the number that it is."""

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from ecavg.cloud_server.commands import status_view
from ecavg.cloud_server.jobs import Result, round_job
from ecavg.cloud_server.showing.history import History
from ecavg.cloud_server.showing.reports import Reports
from ecavg.cloud_server.store import Store
from ecavg.cloud_server.tracking import facts
from ecavg.common.config import RunConfig
from tests.unit.states import AGENT, begin, contribute, digest_of, model_of, publish
from tests.unit.test_page import report_of
from tests.unit.test_standing import Viewed

REGRESSION = RunConfig(dataset="own", task="regression", inputs={"shape": (4,)})
RESULT = Result(
    metric="R²",
    candidates={"aligned": 0.4, "average": -0.25},
    start="aligned",
    published="fine_tuned",
    score_fine_tuned=0.5,
    score_fine_tuned_average=0.45,
    score_published=0.5,
    figures={"mean_absolute_error": 41.5},
)


async def run_a_round(store: Store, state_dir: Path) -> dict[str, Any]:
    """Return the status after a round whose agent has reported, and whose report is written."""
    begin(store, state_dir, run=REGRESSION)
    contribute(store, 1)
    publish(store, state_dir, 1)
    round_job(store.state_dir, 1).write_result(RESULT)
    store.record_report(1, report_of(AGENT, -0.1, adapted=0.3))
    await Reports(REGRESSION, store).write(1)
    store.open_round(2, digest_of(model_of(1)), 2.0)
    return await Viewed(store, state_dir, REGRESSION).status.read()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with closing(Store(tmp_path)) as store:
        yield store


async def test_status_has_scores_and_says_of_what(store: Store, tmp_path: Path) -> None:
    status = await run_a_round(store, tmp_path)
    assert status["metric"] == "R²"
    assert "accuracy" not in json.dumps(status)
    (last,) = status["rounds"]
    assert (last["score_start"], last["score_published"], last["candidates"]) == (0.4, 0.5, RESULT.candidates)
    agent = status["agents"][0]
    assert [agent[f"score_{stage}"] for stage in ("before", "after", "adapted")] == [None, -0.1, 0.3]


async def test_terminal_shows_numbers(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status_view.show(await run_a_round(store, tmp_path))
    lines = capsys.readouterr().out.splitlines()
    assert "Global model of round 1: R² 0.400 at the start, 0.500 as published" in lines
    (agent,) = (line for line in lines if line.startswith(AGENT))
    assert agent.split()[-1] == "–"
    assert "0.300" in agent
    assert "%" not in "".join(lines)


async def test_history_has_scores_as_they_are(store: Store, tmp_path: Path) -> None:
    await run_a_round(store, tmp_path)
    (figures,) = History(store).read()["rounds"]
    assert (figures["average"], figures["start"], figures["published"]) == (-0.25, 0.4, 0.5)
    assert figures["after"] == {"low": 0.3, "mean": 0.3, "high": 0.3}


async def test_trackers_are_told_scores_and_further_figures(store: Store, tmp_path: Path) -> None:
    await run_a_round(store, tmp_path)
    part, edges = facts.of_rounds(store, -4, is_run_over=True)
    told = {name: value for name, value in part.metrics.items() if name.partition("/")[0] == "score"}
    assert told == {
        "score/candidate/aligned": 0.4,
        "score/candidate/average": -0.25,
        "score/figure/mean_absolute_error": 41.5,
        "score/fine_tuned": 0.5,
        "score/fine_tuned_average": 0.45,
        "score/published": 0.5,
        "score/start": 0.4,
    }
    assert edges.metrics["score/edges_after"] == -0.1
    assert not [name for name in (*part.metrics, *edges.metrics) if name.startswith("accuracy")]
    assert part.report
    assert part.report["metric"] == "R²"


def test_names_of_figures_are_such_as_trackers_take() -> None:
    assert facts._tag("mean Wert (µ), <b>") == "mean_Wert_______b_"
