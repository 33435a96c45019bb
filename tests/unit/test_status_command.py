"""`cloud-server status` against a page that the test fills: what is drawn, and what is refused."""

import json
import re
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from ecavg.cloud_server.commands import status, status_view
from ecavg.cloud_server.showing import waiting
from ecavg.common.errors import RunError, UsageError
from ecavg.common.run_state import Wait

AGENTS: list[dict[str, Any]] = [
    {
        "agent_id": "edge-1",
        "outcome": "accepted",
        "accuracy_local": 0.5,
        "accuracy_before": None,
        "accuracy_after": 0.625,
        "applied": True,
    },
    {
        "agent_id": "edge-2",
        "state": "away",
        "accuracy_local": 0.5,
        "accuracy_before": 0.75,
        "accuracy_after": 0.5,
        "accuracy_adapted": 0.7,
        "applied": False,
        "audit": {"flags": ["labels"], "left_out": True},
    },
    {"agent_id": "edge-3\x1b[2J", "upload_place": 4, "message": "later"},
]
DOCUMENT: dict[str, Any] = {
    "run_id": "r",
    "round": 3,
    "phase": "collecting",
    "min_agents": 2,
    "max_agents": 5,
    "phases": {},
    "agents": AGENTS,
    "rounds": [
        {"round": 1, "outcome": "published", "accuracy_start": 0.25, "accuracy_published": 0.5},
        {"round": 2, "outcome": "failed", "failure": "too few agents"},
    ],
}


class Page(ThreadingHTTPServer):
    """A page that answers with each of its documents in turn, and with the last one from then on."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: list[Any] = [DOCUMENT]
        self.token = ""
        self.code = 200

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    """What answers a request of the test."""

    server: Page

    def do_GET(self) -> None:
        page = self.server
        is_known = self.headers["Authorization"] in (None if not page.token else "", f"Bearer {page.token}")
        answers = page.answers
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        self.send_response(page.code if is_known else 401)
        self.end_headers()
        self.wfile.write(answer if isinstance(answer, bytes) else json.dumps(answer).encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Iterator[Page]:
    monkeypatch.setattr(status, "POLL_SECONDS", 0.0)
    with Page() as page:
        thread = Thread(target=page.serve_forever)
        thread.start()
        yield page
        page.shutdown()
        thread.join()


def shown(page: Page, capsys: pytest.CaptureFixture[str], *args: str) -> list[str]:
    assert status.main(["--server-url", page.url, *args]) == 0
    return capsys.readouterr().out.splitlines()


def test_agents_have_a_row_each_with_what_they_do(page: Page, capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(page, capsys)
    assert lines[:5] == [
        "Run r",
        "Round 3: collecting",
        "1 of 5 contributions, at least 2",
        "Round 2 failed: too few agents",
        "Global model of round 1: accuracy 25.0 % at the start, 50.0 % as published",
    ]
    rows = [line.split("  ") for line in lines[6:]]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    assert cells[0] == ["edge-1", "contributed, uses the global model", "50.0 %", "–", "62.5 %", "+12.5"]
    assert cells[1][1] == "away, kept its own model, flagged: labels, left out of the model"
    assert cells[1][2:] == ["50.0 %", "75.0 %", "70.0 %", "-5.0"]
    assert cells[2][1:] == ["working, waits to upload, place 4, later", "–", "–", "–", "–"]
    assert "\x1b" not in "".join(lines)


def test_canary_pin_and_withdrawal_are_shown(page: Page, capsys: pytest.CaptureFixture[str]) -> None:
    withdrawn = {"state": "withdrawn", "reason": "worse\x1b[2J"}
    rows = [DOCUMENT["rounds"][0], {"round": 2, "outcome": "published", "roll_out": withdrawn}]
    agents = [
        {"agent_id": "edge-1", "applied": True, "model_round": 2, "is_canary": True},
        {"agent_id": "edge-2", "model_round": 1, "is_canary": False},
    ]
    changes = {"phase": "published", "waiting": "Tried out.", "pinned_round": 1, "rounds": rows}
    page.answers = [DOCUMENT | changes | {"agents": agents}]
    text = "\n".join(shown(page, capsys))
    assert "Tried out.\nThe model of round 1 is pinned: agents use that one." in text
    assert "The model of round 2 is withdrawn: worse [2J\nGlobal model of round 1: accuracy 25.0 %" in text
    assert "edge-1  working, uses the global model of round 2, in the canary" in text
    assert "edge-2  working, uses the global model of round 1" in text


def test_figure_of_another_task_is_a_number_with_its_name(
    page: Page, capsys: pytest.CaptureFixture[str]
) -> None:
    agent = {"agent_id": "edge-1", "score_local": 0.25, "score_before": None, "score_after": -0.125}
    rounds = [{"round": 1, "outcome": "published", "score_start": 0.25, "score_published": 0.5}]
    page.answers = [DOCUMENT | {"metric": "R²", "agents": [agent], "rounds": rounds}]
    lines = shown(page, capsys)
    assert "Global model of round 1: R² 0.250 at the start, 0.500 as published" in lines
    assert lines[-1].split()[-4:] == ["0.250", "–", "-0.125", "-0.375"]


def test_work_under_way_has_a_bar(page: Page, capsys: pytest.CaptureFixture[str]) -> None:
    work = {"done": 3, "total": 12, "loss": 0.25}
    page.answers = [{**DOCUMENT, "phase": "fine_tuning", "progress": work, "agents": []}]
    lines = shown(page, capsys)
    assert lines[1] == "Round 3: fine-tuning"
    assert lines[-2].endswith("step 3 of 12, loss 0.250")
    assert lines[-1] == "No agent has joined yet."


def test_pace_and_time_left_are_shown_and_who_holds_up_the_round(
    page: Page, capsys: pytest.CaptureFixture[str]
) -> None:
    training = {"phase": "pre_training", "done": 40, "total": 100, "unit": "steps", "rate": 2.0}
    upload = {"phase": "uploading", "done": 3_100_000, "total": 9_100_000, "unit": "bytes", "rate": 1.2e6}
    agents = [
        {"agent_id": "edge-1", "progress": training | {"seconds_left": 30.0}},
        {"agent_id": "edge-2", "outcome": "rejected", "progress": upload | {"seconds_left": 5.0}},
        {"agent_id": "edge-3", "progress": {"phase": "reading", "done": 0, "unit": "examples"}},
        {"agent_id": "edge-4", "state": "away", "away_since": 1_800_000_120.0},
        {"agent_id": "edge-5", "progress": {"phase": "queued"}, "upload_place": 4},
        {"agent_id": "edge-6", "waits_for": "examples"},
        {"agent_id": "edge-7", "outcome": "accepted", "waits_for": "time"},
        {"agent_id": "edge-8", "waits_for": "of the future"},
    ]
    page.answers = [{**DOCUMENT, "agents": agents, "waiting": "Waiting for edge-\x1b[2J1."}]
    lines = shown(page, capsys)
    assert lines[3] == "Waiting for edge- [2J1."
    states = [re.split("  +", line)[1] for line in lines[7:]]
    assert states == [
        "pre-training 40 % at 2 steps/s, 0:00:30 left",
        "rejected, uploading 3.1 MB of 9.1 MB at 1.2 MB/s, 0:00:05 left",
        "reading",
        "away since 2027-01-15 08:02 UTC",
        "working, waits to upload, place 4",
        "waits for new examples",
        "contributed, waits for the time at which it pre-trains",
        "working",
    ]
    work = {"done": 3, "total": 12, "loss": 0.25}
    trainer = {"state": "restarting", "seconds_left": 75.2}
    page.answers = [{**DOCUMENT, "phase": "fine_tuning", "progress": work, "agents": [], "trainer": trainer}]
    lines = shown(page, capsys)
    assert "The trainer has ended, and is started again." in lines
    assert lines[-2].endswith("step 3 of 12, loss 0.250, 0:01:15 left")


def test_watch_shows_nothing_anew_that_only_time_has_changed(
    page: Page, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = {"phase": "reading", "done": 1, "unit": "examples"}
    first = {**DOCUMENT, "waiting": "1 s", "agents": [{"agent_id": "a", "progress": progress | {"rate": 1}}]}
    later = {**DOCUMENT, "waiting": "2 s", "agents": [{"agent_id": "a", "progress": progress | {"rate": 2}}]}
    further = {**DOCUMENT, "agents": [{"agent_id": "a", "progress": progress | {"done": 2}}]}
    page.answers = [first, later, further, {**DOCUMENT, "run_over": True}]
    assert shown(page, capsys, "--watch").count("Run r") == 3


def test_server_that_is_starting_is_said(page: Page, capsys: pytest.CaptureFixture[str]) -> None:
    page.answers = [{"phase": "starting"}]
    assert shown(page, capsys) == ["The server is starting."]


def test_watch_shows_each_change_until_the_run_is_over(
    page: Page, capsys: pytest.CaptureFixture[str]
) -> None:
    page.answers = [DOCUMENT, {**DOCUMENT, "phases": {"collecting": 1}}, {**DOCUMENT, "run_over": True}]
    lines = shown(page, capsys, "--watch")
    assert lines.count("Run r") == 2
    assert lines.count("The run is over.") == 1


def test_json_is_passed_on(page: Page, capsys: pytest.CaptureFixture[str]) -> None:
    assert json.loads("".join(shown(page, capsys, "--json"))) == DOCUMENT


def test_token_is_sent_and_a_wrong_one_is_told(
    page: Page, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page.token, file = "secret", tmp_path / "token"
    file.write_text("secret\n", "utf-8")
    assert shown(page, capsys, "--http-token-file", str(file))[0] == "Run r"
    file.write_text("other", "utf-8")
    with pytest.raises(UsageError, match="asks for another token"):
        shown(page, capsys, "--http-token-file", str(file))
    with pytest.raises(UsageError, match="asks for a token"):
        shown(page, capsys)


@pytest.mark.parametrize(
    ("code", "answer", "kind", "message"),
    [
        (503, DOCUMENT, RunError, "answers 503"),
        (404, DOCUMENT, UsageError, "is no status page"),
        (200, b"<html>", UsageError, "is no status page"),
        (200, b"\xff", UsageError, "is no status page"),
        (200, {"phase": 1}, UsageError, "is no status page"),
    ],
)
def test_other_answers_are_errors_of_one_line(
    page: Page, code: int, answer: object, kind: type[Exception], message: str
) -> None:
    page.code, page.answers = code, [answer]
    with pytest.raises(kind, match=message):
        status.main(["--server-url", page.url])


@pytest.mark.parametrize("url", ["127.0.0.1:80", "ftp://host", "http://", "http://a b", "http://host:x"])
def test_url_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match="write http://HOST:PORT"):
        status.main(["--server-url", url])


def test_page_terminal_and_sentence_know_every_wait() -> None:
    words = (Path(status_view.__file__).parents[1] / "web/words.js").read_text("utf-8")
    on_page = words.split("WAITS_FOR = {")[1].split("}")[0]
    for wait in Wait:
        assert status_view._WAITS[wait.value] in on_page
        assert waiting._WAITS[wait]
