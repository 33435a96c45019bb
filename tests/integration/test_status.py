"""`cloud-server status`: what the status page shows, at the terminal."""

import json
import os
import pty
import re
import signal
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from tests.integration.test_round import QUICK
from tests.processes import Cluster, Command, cluster_in, free_port


def status(folder: Path, *args: object, **options: object) -> Command:
    return Command("ecavg.cloud_server", "status", *args, folder=folder / "logs", forked=True, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Return a cluster in round 2 of an endless run, whose page asks for a token."""
    with cluster_in(tmp_path_factory.mktemp("running")) as cluster:
        token = cluster.folder / "token"
        token.write_text("a-token-of-the-tests", "utf-8")
        server = cluster.server("--min-agents", 1, "--rounds", 1, *QUICK, "--http-token-file", token)
        agent = cluster.agent("edge-1", "--partition", "1/1")
        assert (agent.wait(), server.wait()) == (0, 0)
        cluster.server("--min-agents", 1, "--rounds", 2, *QUICK, "--http-token-file", token)
        yield cluster


def url(cluster: Cluster) -> str:
    return f"http://127.0.0.1:{cluster.http_port}"


def with_token(cluster: Cluster) -> tuple[object, ...]:
    return ("--server-url", url(cluster), "--http-token-file", cluster.folder / "token")


def test_status_shows_run_round_phase_model_and_agents_with_before_and_after(
    running: Cluster, tmp_path: Path
) -> None:
    command = status(tmp_path, *with_token(running))
    assert command.wait() == 0
    lines = command.output.splitlines()
    report = running.report()
    assert re.fullmatch(r"Run mlp on digits, \d{4}-\d\d-\d\d \([0-9a-f]{32}\)", lines[0])
    assert lines[1:3] == ["Round 2: collecting", "0 of 1 contributions, at least 1"]
    assert re.fullmatch(
        r"Waiting for 1 of 1: edge-1 has been away for \d+ (s|min). The round closes .+"
        r" if 1 have contributed, else it waits.",
        lines[3],
    )
    assert lines[4].startswith("Global model of round 1: accuracy ")
    assert lines[4].endswith(f"{100 * report['accuracy_published']:.1f} % as published")
    assert lines[5].split() == ["agent", "state", "local", "before", "after", "gain"]
    assert re.match(r"edge-1  away since [-\d]+ \d\d:\d\d UTC, uses the global model", lines[6])
    assert f"{100 * report['agents'][0]['accuracy_after']:.1f} %" in lines[6]


def test_json_is_the_document_of_the_page_as_it_is(running: Cluster, tmp_path: Path) -> None:
    command = status(tmp_path, "--json", *with_token(running))
    assert command.wait() == 0
    request = urllib.request.Request(
        url(running) + "/api/status", headers={"Authorization": "Bearer a-token-of-the-tests"}
    )
    with urllib.request.urlopen(request, timeout=10) as reply:
        expected = json.load(reply)
    shown = json.loads(command.output)
    for clock in ("phases", "waiting"):
        shown.pop(clock), expected.pop(clock)
    assert shown == expected


def test_page_and_token_are_found_by_the_servers_configuration(running: Cluster, tmp_path: Path) -> None:
    config = tmp_path / "server.toml"
    config.write_text(
        f'http_port = {running.http_port}\nhttp_token_file = "{running.folder / "token"}"', "utf-8"
    )
    command = status(tmp_path, "--config", config)
    assert (command.wait(), "Round 2: collecting" in command.output) == (0, True)


def test_page_that_asks_for_a_token_is_one_line_and_code_2(running: Cluster, tmp_path: Path) -> None:
    command = status(tmp_path, "--server-url", url(running))
    assert command.wait() == 2
    assert command.output == (
        f"cloud-server status: the status page {url(running)} asks for a token:"
        " name the file that has it with --http-token-file\n"
    )


def test_token_of_this_machines_server_is_not_sent_to_another_url(running: Cluster, tmp_path: Path) -> None:
    (tmp_path / "http-token").write_text("a-token-of-the-tests", "utf-8")
    command = status(tmp_path, "--server-url", url(running), "--state-dir", tmp_path)
    assert (command.wait(), "asks for a token" in command.output) == (2, True)
    command = status(tmp_path, "--http-port", running.http_port, "--state-dir", tmp_path)
    assert command.wait() == 0


def test_server_that_is_not_there_is_one_line_and_code_1(tmp_path: Path) -> None:
    port = free_port()
    command = status(tmp_path, "--watch", "--server-url", f"http://127.0.0.1:{port}/")
    assert command.wait() == 1
    assert command.output == (
        f"cloud-server status: no server answers at http://127.0.0.1:{port}/ (Connection refused):"
        " start it, or give the right --server-url\n"
    )


@pytest.mark.parametrize("text", ["127.0.0.1:8080", "ftp://x/", "http://", "http://x:0/", "http://[x/"])
def test_url_that_is_none_is_one_line_and_code_2(text: str, tmp_path: Path) -> None:
    command = status(tmp_path, "--server-url", text)
    assert command.wait() == 2
    assert command.output == (
        "cloud-server status: --server-url is not the URL of a status page: write http://HOST:PORT\n"
    )


def test_watch_follows_the_run_to_its_end(cluster: Cluster, tmp_path: Path) -> None:
    server = cluster.server("--min-agents", 1, *QUICK)
    watch = status(tmp_path, "--watch", "--server-url", url(cluster))
    watch.wait_for("No agent has joined yet")
    agent = cluster.agent("edge-1", "--partition", "1/1")
    assert (agent.wait(), server.wait(), watch.wait()) == (0, 0, 0)
    assert "Round 1: published\nThe run is over.\n" in watch.output


def test_watch_survives_a_restart_of_the_server(cluster: Cluster, tmp_path: Path) -> None:
    server = cluster.server("--min-agents", 1, *QUICK)
    watch = status(tmp_path, "--watch", "--json", "--server-url", url(cluster))
    watch.wait_for('"agents": \\[\\]')
    assert server.terminate() == 0
    cluster.server("--min-agents", 1, *QUICK)
    agent = cluster.agent("edge-1", "--partition", "1/1")
    watch.wait_for("edge-1")
    assert (agent.wait(), watch.wait()) == (0, 0)
    shown = [json.loads(line) for line in watch.output.splitlines()]
    # A server that is starting has no round yet.
    assert {each["round"] for each in shown if each != {"phase": "starting"}} == {1}
    assert shown[-1]["run_over"]


def test_watch_at_a_terminal_ends_with_130_by_ctrl_c(running: Cluster, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    watch = status(tmp_path, "--watch", *with_token(running), streams={1: os.ttyname(theirs)})
    shown = b""
    while b"edge-1" not in shown:
        shown += os.read(ours, 4096)
    watch.process.send_signal(signal.SIGINT)
    assert (watch.wait(), watch.output) == (130, "")
    for each in (ours, theirs):
        os.close(each)


@contextmanager
def answering(body: bytes) -> Iterator[str]:
    """Yield the URL of a server that gives the same answer to everything."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_what_a_server_says_cannot_control_the_terminal(tmp_path: Path) -> None:
    agent = {"agent_id": "edge-\x1b[2J1", "message": "[red]no[/red]\r\x1b]0;title\x07"}
    document = {"phase": "collecting", "round": 1, "run_id": "\x1b[31mrun", "agents": [agent]}
    with answering(json.dumps(document).encode()) as page:
        command = status(tmp_path, "--server-url", page)
        assert command.wait() == 0
    assert "edge- [2J1" in command.output
    assert "[red]no[/red]" in command.output
    assert command.output.replace("\n", "").isprintable()


def test_work_under_way_and_trouble_are_shown(tmp_path: Path) -> None:
    agents = [
        {
            "agent_id": "edge-1", "state": "contributed", "outcome": "accepted", "applied": False,
            "accuracy_before": 0.9, "accuracy_after": 0.85, "accuracy_adapted": 0.91,
            "audit": {"flags": ["labels"], "left_out": "quarantined"},
        },
        {"agent_id": "edge-2", "state": "away", "upload_place": 4, "message": "the disk is full"},
    ]  # fmt: skip
    document = {
        "phase": "fine_tuning", "round": 3, "run_id": "ab",
        "progress": {"done": 30, "total": 120, "loss": 0.1234},
        "agents": agents,
        "rounds": [
            {"round": 1, "outcome": "published", "accuracy_start": 0.8, "accuracy_published": 0.9},
            {"round": 2, "outcome": "failed", "failure": "too few agents"},
        ],
    }  # fmt: skip
    with answering(json.dumps(document).encode()) as page:
        command = status(tmp_path, "--server-url", page)
        assert command.wait() == 0
    lines = [re.sub(" {2,}", " | ", line) for line in command.output.splitlines()]
    assert lines[:4] == [
        "Run ab",
        "Round 3: fine-tuning",
        "Round 2 failed: too few agents",
        "Global model of round 1: accuracy 80.0 % at the start, 90.0 % as published",
    ]
    assert lines[4].endswith(" step 30 of 120, loss 0.123")
    assert lines[6] == (
        "edge-1 | contributed, kept its own model, flagged: labels, left out of the model"
        " | – | 90.0 % | 91.0 % | +1.0"
    )
    assert lines[7] == "edge-2 | away, waits to upload, place 4, the disk is full | – | – | – | –"


@pytest.mark.parametrize("body", [b"<html>", b"\xff", b"[]", b"{}", b""])
def test_another_server_is_one_line_and_code_2(body: bytes, tmp_path: Path) -> None:
    with answering(body) as page:
        command = status(tmp_path, "--server-url", page)
        assert command.wait() == 2
    assert command.output == (
        f"cloud-server status: {page} is no status page of a cloud-server: give the right --server-url\n"
    )
