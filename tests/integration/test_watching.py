"""What is seen of a run while it lasts: at a terminal, in the log, and in the JSON of the status page."""

import json
import os
import pty
import re
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from tests.integration.test_round import QUICK
from tests.processes import Cluster, Command, until

# An agent trains for minutes; no test waits for the end.
LONG = ("--set", "run.pretrain.epochs=100000", "--set", "run.pretrain.batch_size=8")


def status_of(cluster: Cluster) -> dict[str, Any]:
    with urllib.request.urlopen(f"http://127.0.0.1:{cluster.http_port}/api/status", timeout=10) as reply:
        document: dict[str, Any] = json.load(reply)
    return document


def seen(cluster: Cluster, command: Command, condition: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    """Return the first status of which the condition is true."""

    def look() -> dict[str, Any] | None:
        document = status_of(cluster)
        return document if condition(document) else None

    found: dict[str, Any] = until(look, command)
    return found


def agent_in(document: dict[str, Any], name: str) -> dict[str, Any]:
    return next((each for each in document["agents"] if each["agent_id"] == name), {})


class Terminal:
    """A pseudo-terminal, and what was written to it."""

    def __init__(self) -> None:
        self._ours, self._theirs = pty.openpty()
        self.path = os.ttyname(self._theirs)
        self._written = b""
        self._reading = Thread(target=self._read, daemon=True)
        self._reading.start()

    def _read(self) -> None:
        try:
            while part := os.read(self._ours, 65536):
                self._written += part
        except OSError:
            # Nobody has the other end open any more.
            pass

    @property
    def text(self) -> str:
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self._written.decode("utf-8", "replace"))

    def close(self) -> None:
        os.close(self._theirs)
        self._reading.join(5)
        os.close(self._ours)


@contextmanager
def terminal() -> Iterator[Terminal]:
    made = Terminal()
    try:
        yield made
    finally:
        made.close()


def test_status_names_who_holds_up_the_round_and_a_terminal_has_its_bar(cluster: Cluster) -> None:
    server = cluster.server("--min-agents", 2, *QUICK, *LONG)
    with terminal() as shown:
        agent = cluster.agent("edge-1", "--partition", "1/2", streams={2: shown.path})
        document = seen(
            cluster, server, lambda each: (agent_in(each, "edge-1").get("progress") or {}).get("rate")
        )
        progress = agent_in(document, "edge-1")["progress"]
        assert (progress["phase"], progress["unit"]) == ("pre_training", "steps")
        assert 0 < progress["done"] < progress["total"]
        assert progress["seconds_left"] > 0
        assert re.match(
            r"Waiting for 2 of 2: edge-1 trains, \d+ (min|h|d) left; 1 has not joined\. The round closes at ",
            document["waiting"],
        )
        until(lambda: re.search(r"round 1: pre-training.*%.*steps/s.*loss", shown.text), agent)
        agent.kill()
        away = seen(cluster, server, lambda each: agent_in(each, "edge-1")["state"] == "away")
    assert agent_in(away, "edge-1")["progress"] is None
    assert "edge-1 has been away for " in away["waiting"]


def test_terminals_of_a_whole_round_have_bars_of_every_long_step(cluster: Cluster) -> None:
    with terminal() as of_server, terminal() as of_agent:
        # The agent hears of the progress of the cloud once a second, so the fine-tune must take a few.
        tune = ("--set", "run.fine_tune.epochs=80", "--set", "run.fine_tune.batch_size=8")
        server = cluster.server("--min-agents", 1, *QUICK, *tune, streams={2: of_server.path})
        agent = cluster.agent("edge-1", "--partition", "1/1", streams={2: of_agent.path})
        assert (agent.wait(), server.wait()) == (0, 0)
        for label in ("upload weights", "upload data", "download global model", "round 1: pre-training"):
            assert re.search(f"{label} .*100%", of_agent.text)
        for label in ("contributions", "fine-tuning"):
            assert re.search(f"round 1: {label} .*100%", of_server.text)
        assert re.search(r"cloud: fine-tuning .*%.* \d+ of 80 epochs", of_agent.text)


@pytest.mark.parametrize("level", [pytest.param("info", marks=pytest.mark.soak), "debug"])
def test_json_log_parses_line_by_line_and_knows_round_and_agent(
    cluster: Cluster, tmp_path: Path, level: str
) -> None:
    files = {name: tmp_path / f"{name}.jsonl" for name in ("server", "agent")}
    for file in files.values():
        file.touch()
    json_log = ("--log-format", "json", "--log-level", level)
    token = tmp_path / "http-token"
    token.write_text("a-secret-of-the-page", "utf-8")
    server = cluster.server(
        "--min-agents", 1, *QUICK, *json_log, "--http-token-file", token, streams={2: str(files["server"])}
    )
    join_token = cluster.join_token(1)
    agent = cluster.agent(
        "edge-1", "--join-token-file", join_token, *json_log, streams={2: str(files["agent"])}
    )
    assert (agent.wait(), server.wait()) == (0, 0)
    lines = {name: file.read_text("utf-8").splitlines() for name, file in files.items()}
    events = {name: [json.loads(line) for line in each] for name, each in lines.items()}
    assert {event.get("agent_id") for event in events["agent"]} == {"edge-1"}
    contributed = next(event for event in events["agent"] if event["event"] == "contributed")
    assert contributed["round"] == 1
    assert all("round" in event for event in events["server"] if event["event"] == "progress")
    reported = next(event for event in events["server"] if event["event"] == "agent_reported")
    assert (reported["round"], reported["agent_id"]) == (1, "edge-1")
    # What is secret is neither in the log nor on stdout.
    everything = "\n".join([*lines["server"], *lines["agent"], agent.output])
    secrets = [token.read_text("utf-8"), join_token.read_text("utf-8").strip()]
    for path in (*cluster.folder.glob("**/*key*.pem"),):
        secrets += [line for line in path.read_text("utf-8").splitlines() if "-----" not in line]
    assert len(secrets) > 2
    assert not [secret for secret in secrets if secret in everything]
