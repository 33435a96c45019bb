"""What is left of a round, and what of it is known once its job is gone."""

import json
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from ecavg.cloud_server.jobs import AgentAudit, ClassScore, JobDirectory, Result
from ecavg.cloud_server.showing import reports
from ecavg.cloud_server.showing.reports import Reports
from ecavg.cloud_server.store import Store
from ecavg.common.config import RunConfig
from ecavg.common.errors import Reason
from tests.unit.states import AGENT, begin, contribute, digest_of, model_of, publish

RESULT = Result(
    candidates={"aligned": 0.9, "average": 0.7, "greedy_soup": 0.95},
    start="greedy_soup",
    soup=("edge-3", "edge-1"),
    published="fine_tuned",
    score_fine_tuned=0.97,
    score_published=0.97,
    classes=(
        ClassScore(label=0, num_examples=8, score_start=0.5, score_published=0.75),
        ClassScore(label=7, num_examples=2, score_start=0.5, score_published=0.0),
    ),
    audit=(
        AgentAudit(agent_id="edge-1", update_norm=2.0, norm_ratio=1.0, label_share=0.9),
        AgentAudit(
            agent_id="edge-3",
            update_norm=9.0,
            norm_ratio=4.5,
            scale=0.5,
            flags=("labels",),
            left_out=Reason.QUARANTINED,
        ),
    ),
    audit_note="nobody knows",
    seconds={"audit": 0.1, "aggregate": 0.25, "fine_tune": 1.5, "evaluate": 0.5},
)
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """With one published round."""
    with closing(Store(tmp_path)) as store:
        begin(store, tmp_path)
        contribute(store, 1)
        publish(store, tmp_path, 1)
        yield store


async def report_of(result: Result, store: Store, state_dir: Path, **run: Any) -> dict[str, Any]:
    JobDirectory(state_dir / "jobs/round-0001").write_result(result)
    await Reports(RunConfig(**run), store).write(1)
    report: dict[str, Any] = json.loads((state_dir / "rounds/0001/report.json").read_text("utf-8"))
    return report


async def test_report_has_what_the_trainer_found(store: Store, tmp_path: Path) -> None:
    report = await report_of(RESULT, store, tmp_path, class_names=NAMES)
    assert report["candidates"] == {"aligned": 0.9, "average": 0.7, "greedy_soup": 0.95}
    assert (report["start"], report["soup"]) == ("greedy_soup", ["edge-3", "edge-1"])
    assert (report["published"], report["accuracy_published"]) == ("fine_tuned", 0.97)
    assert report["classes"] == [
        {"label": 0, "name": "zero", "num_examples": 8, "accuracy_start": 0.5, "accuracy_published": 0.75},
        {"label": 7, "name": "seven", "num_examples": 2, "accuracy_start": 0.5, "accuracy_published": 0.0},
    ]


async def test_report_says_what_the_audit_found_and_whose_contribution_was_left_out(
    store: Store, tmp_path: Path
) -> None:
    published = digest_of(model_of(1))
    left_out = {AGENT: ("quarantined", "its labels")}
    store.set_phase(1, "published", 2.0, published_digest=published, left_out=left_out)
    report = await report_of(RESULT, store, tmp_path)
    assert report["agents"][0]["left_out"] == {"reason": "quarantined", "message": "its labels"}
    first, second = report["audit"]
    assert (first["agent_id"], first["flags"], first["left_out"]) == ("edge-1", [], None)
    assert (second["scale"], second["flags"], second["left_out"]) == (0.5, ["labels"], "quarantined")
    assert report["audit_note"] == "nobody knows"


async def test_classes_without_names_have_none(store: Store, tmp_path: Path) -> None:
    report = await report_of(RESULT, store, tmp_path)
    assert [item.get("name") for item in report["classes"]] == [None, None]
    assert "name" not in report["classes"][0]


async def test_what_was_not_found_is_absent(store: Store, tmp_path: Path) -> None:
    report = await report_of(Result(start="average", published="start"), store, tmp_path)
    assert (report["start"], report["published"]) == ("average", "start")
    absent = {
        "candidates", "soup", "classes", "accuracy_fine_tuned", "accuracy_published", "failure",
        "audit", "audit_note",
    }  # fmt: skip
    assert not absent & set(report)


async def test_accuracy_of_zero_is_not_absent(store: Store, tmp_path: Path) -> None:
    report = await report_of(RESULT.model_copy(update={"score_published": 0.0}), store, tmp_path)
    assert report["accuracy_published"] == 0.0


@pytest.mark.parametrize("run", [{}, {"class_names": NAMES}], ids=["numbered", "named"])
async def test_result_is_read_back_from_the_report_of_a_job_that_is_gone(
    store: Store, tmp_path: Path, run: dict[str, Any]
) -> None:
    await report_of(RESULT, store, tmp_path, **run)
    shutil.rmtree(tmp_path / "jobs/round-0001")
    assert Reports(RunConfig(**run), store).result_of(1) == RESULT


async def test_report_of_a_job_that_is_gone_can_be_written_again(store: Store, tmp_path: Path) -> None:
    before = await report_of(RESULT, store, tmp_path, class_names=NAMES)
    shutil.rmtree(tmp_path / "jobs/round-0001")
    await Reports(RunConfig(class_names=NAMES), store).write(1)
    assert json.loads((tmp_path / "rounds/0001/report.json").read_text("utf-8")) == before


@pytest.mark.parametrize("text", ["", "{", '{"classes": [{"label": "?"}]}', '{"published": "both"}'])
def test_damaged_report_tells_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "report.json").write_text(text, "utf-8")
    assert reports.read_result(tmp_path) is None


def test_every_candidate_is_a_stage_and_nothing_that_is_unknown() -> None:
    candidates = {"average": 0.1, "aligned": 0.2, "greedy_soup": 0.3, "best_agent": 0.4, "previous": 0.5}
    result = Result(candidates=candidates | {"made_up": 0.9}, score_fine_tuned=0.6, score_published=0.7)
    assert reports.stages(result) == candidates | {"fine_tuned": 0.6, "published": 0.7}


async def test_average_of_the_fine_tune_has_its_place(store: Store, tmp_path: Path) -> None:
    average = {"published": "fine_tuned_average", "score_fine_tuned_average": 0.98, "score_published": 0.98}
    result = RESULT.model_copy(update=average)
    report = await report_of(result, store, tmp_path)
    assert report["published"] == "fine_tuned_average"
    assert report["accuracy_fine_tuned"] < report["accuracy_fine_tuned_average"] == 0.98
    assert reports.read_result(tmp_path / "rounds/0001") == result
    assert reports.stages(result)["fine_tuned_average"] == 0.98


def test_what_was_not_measured_is_no_stage() -> None:
    result = Result(candidates={"best_agent": 0.0}, start="best_agent", score_published=0.5)
    assert reports.stages(result) == {"best_agent": 0.0, "published": 0.5}
