"""What a receiver of the webhook gets: real HTTP, from played rounds and from runs of world.py."""

import asyncio
import hashlib
import hmac
import json
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import ValidationError
from structlog.testing import capture_logs

from ecavg.cloud_server.__main__ import receiver_of
from ecavg.cloud_server.config import ServerConfig
from ecavg.cloud_server.jobs import AgentAudit
from ecavg.cloud_server.metrics import ServerMetrics
from ecavg.cloud_server.store import Store
from ecavg.cloud_server.tracking import thread, to_webhook
from ecavg.cloud_server.tracking.facts import Facts, RunFacts
from ecavg.cloud_server.tracking.to_webhook import Receiver, Webhook, webhook_of
from ecavg.common.errors import UsageError
from tests.unit.states import publish, run_rounds
from tests.unit.test_docs import code_in
from tests.unit.world import hurry, world

SECRET = "a secret of the receiver's"
RUN = RunFacts("run-1", "mlp-digits", {})


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)
    monkeypatch.setattr(thread, "RETRY_SECONDS", 0.01)
    monkeypatch.setattr(to_webhook, "AGAIN_SECONDS", 0.0)


class Played:
    """A receiver that keeps what it gets, and answers with `statuses`, or 204 when there are none left."""

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        self.requests: list[tuple[Message, bytes]] = []
        self.statuses: list[int] = []
        self.location = ""
        played = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                played.requests.append((self.headers, body))
                self.send_response(played.statuses.pop(0) if played.statuses else 204)
                self.send_header("Location", played.location)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        if context:
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.url = f"http{'s' if context else ''}://127.0.0.1:{self.server.server_port}/secret-path"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    @property
    def messages(self) -> list[dict[str, Any]]:
        return [json.loads(body) for _, body in list(self.requests)]

    @property
    def events(self) -> list[tuple[int, str]]:
        return [(message["round"], message["event"]) for message in self.messages]


@pytest.fixture
def played() -> Iterator[Played]:
    with closing(Played()) as played:
        yield played


@pytest.fixture
def outcomes() -> list[str]:
    return []


def webhook(played: Played, tmp_path: Path, outcomes: list[str], **changes: Any) -> Webhook:
    keys = {"first": -1, "clock": lambda: 100.0} | changes
    receiver = Receiver(played.url, SECRET, "https://ecavg.example/")
    return Webhook(receiver, "night run", tmp_path / "notified.json", on_outcome=outcomes.append, **keys)


def facts_of(number: int, **changes: Any) -> Facts:
    metrics = {"agents/contributed": 3.0, "agents/left_out": 0.0, "agents/rejected": 1.0}
    report = {"outcome": "published", "accuracy_published": 0.75}
    keys = {"at": 60.0, "metrics": metrics, "order": 2 * number, "report": report, "digest": "d" * 64}
    return Facts(number, **(keys | changes))


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110  it is a thread that changes it
            await asyncio.sleep(0.005)


def test_message_has_the_documented_fields_and_a_signature_that_the_receiver_can_check(
    played: Played, tmp_path: Path, outcomes: list[str]
) -> None:
    hook = webhook(played, tmp_path, outcomes)
    hook.open(RUN)
    hook.write(facts_of(3))
    ((headers, body),) = played.requests
    assert json.loads(body) == {
        "id": "run-1-3-published",
        "event": "published",
        "at": "1970-01-01T00:01:00+00:00",
        "run_id": "run-1",
        "run_name": "night run",
        "round": 3,
        "digest": "d" * 64,
        "score": 0.75,
        "score_name": "accuracy",
        "agents": {"contributed": 3, "left_out": 0, "flagged": 0, "rejected": 1},
        "report_url": "https://ecavg.example/#round-3",
    }
    expected = hmac.new(SECRET.encode(), body, hashlib.sha256).hexdigest()
    assert headers["X-Hub-Signature-256"] == f"sha256={expected}"
    assert headers["X-ECAvg-Event"] == "published"
    assert headers["X-ECAvg-Delivery"] == "run-1-3-published"
    assert headers["Content-Type"] == "application/json"
    assert outcomes == ["delivered"]


def test_every_field_of_a_message_is_documented(played: Played, tmp_path: Path, outcomes: list[str]) -> None:
    hook = webhook(played, tmp_path, outcomes)
    hook.open(RUN)
    hook.write(facts_of(1, report={"accuracy_published": 0.5, "failure": "why"}))
    (message,) = played.messages
    assert not message.keys() - code_in("webhook.md")


def test_failed_round_says_why_and_has_neither_digest_nor_score(
    played: Played, tmp_path: Path, outcomes: list[str]
) -> None:
    hook = webhook(played, tmp_path, outcomes)
    hook.open(RUN)
    hook.write(facts_of(1, digest=None, report={"outcome": "failed", "failure": "too few agents"}))
    (message,) = played.messages
    assert message["event"] == "failed"
    assert message["failure"] == "too few agents"
    assert not {"digest", "score", "score_name"} & message.keys()


def test_figure_of_another_task_goes_by_its_name(played: Played, tmp_path: Path, outcomes: list[str]) -> None:
    hook = webhook(played, tmp_path, outcomes)
    hook.open(RUN)
    hook.write(facts_of(1, report={"score_published": 0.5, "metric": "r2"}))
    assert (played.messages[0]["score"], played.messages[0]["score_name"]) == (0.5, "r2")


@pytest.mark.parametrize("name", ["agents/flagged", "agents/left_out"])
def test_agents_that_are_flagged_or_left_out_are_told_of_before_the_model(
    played: Played, tmp_path: Path, outcomes: list[str], name: str
) -> None:
    hook = webhook(played, tmp_path, outcomes)
    hook.open(RUN)
    hook.write(facts_of(1, metrics={"agents/contributed": 3.0, name: 1.0}))
    assert played.events == [(1, "flagged"), (1, "published")]
    assert played.messages[0]["agents"][name.removeprefix("agents/")] == 1


def test_another_life_sends_nothing_that_was_sent_and_the_rest(
    played: Played, tmp_path: Path, outcomes: list[str]
) -> None:
    first = webhook(played, tmp_path, outcomes)
    first.open(RUN)
    first.write(facts_of(1))
    for _ in range(2):
        other = webhook(played, tmp_path, outcomes)
        assert other.open(RUN) == len(set(played.events))
        for number in (1, 2):
            other.write(facts_of(number))
    assert played.events == [(1, "published"), (2, "published")]


def test_end_of_the_run_is_sent_once_and_again_after_more_rounds(
    played: Played, tmp_path: Path, outcomes: list[str]
) -> None:
    for last in (1, 1, 2):
        hook = webhook(played, tmp_path, outcomes)
        hook.open(RUN)
        hook.write(facts_of(last))
        hook.finish()
    assert played.events == [(1, "published"), (1, "run_over"), (2, "published"), (2, "run_over")]


def test_receiver_that_is_set_in_the_middle_of_a_run_is_not_told_of_old_rounds(
    played: Played, tmp_path: Path
) -> None:
    with closing(Store(tmp_path / "state")) as store:
        run_rounds(store, store.state_dir.path, 2)
        hook = webhook_of(Receiver(played.url, None, None), "a run", store, lambda _: None)
        assert hook.open(RUN) == 2
        # Round 3 ends, and the server dies before it has told of that.
        publish(store, store.state_dir.path, 3)
        again = webhook_of(Receiver(played.url, None, None), "a run", store, lambda _: None)
        assert again.open(RUN) == 2


def test_message_that_is_not_taken_is_sent_again_under_the_same_id(
    played: Played, tmp_path: Path, outcomes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(to_webhook, "AGAIN_SECONDS", 20.0)
    monkeypatch.setattr(to_webhook, "MAX_PAUSE_SECONDS", 0.001)
    played.statuses = [500, 429]
    hook = webhook(played, tmp_path, outcomes)
    hook.open(RUN)
    hook.write(facts_of(1))
    assert [message["id"] for message in played.messages] == ["run-1-1-published"] * 3
    assert outcomes == ["failed", "failed", "delivered"]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirection_is_not_followed_and_the_error_names_no_path(
    played: Played, tmp_path: Path, outcomes: list[str], status: int
) -> None:
    with closing(Played()) as other:
        played.statuses, played.location = [status], other.url
        hook = webhook(played, tmp_path, outcomes)
        hook.open(RUN)
        with pytest.raises(ConnectionError, match=f"answered with the status {status}") as caught:
            hook.write(facts_of(1))
        assert not other.requests
    assert "secret" not in str(caught.value)


def test_message_that_is_older_than_a_day_is_given_up(
    played: Played, tmp_path: Path, outcomes: list[str]
) -> None:
    hook = webhook(played, tmp_path, outcomes, clock=lambda: 60.0 + 24 * 3600 + 1)
    hook.open(RUN)
    hook.write(facts_of(1))
    assert outcomes == ["given_up"]
    assert hook.open(RUN) == 1
    assert not played.requests


def test_damaged_file_counts_as_none(played: Played, tmp_path: Path, outcomes: list[str]) -> None:
    (tmp_path / "notified.json").write_text("{")
    with capture_logs() as logs:
        assert webhook(played, tmp_path, outcomes, first=4).open(RUN) == 4
    assert [line["event"] for line in logs] == ["notified_not_readable"]


async def test_full_disk_does_not_have_a_message_sent_again_and_again(
    played: Played, tmp_path: Path, outcomes: list[str]
) -> None:
    hook = webhook(played, tmp_path, outcomes)
    hook.open(RUN)
    (tmp_path / ".notified.json.partial").mkdir()
    with pytest.raises(OSError, match="directory"):
        hook.write(facts_of(1))
    with pytest.raises(OSError, match="directory"):
        hook.open(RUN)
    hook.write(facts_of(1))
    assert played.events == [(1, "published")]


def certificate(folder: Path) -> Path:
    """Write a certificate for 127.0.0.1 that is its own authority, with its key, and return the path."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name.from_rfc4514_string("CN=receiver")
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    path = folder / "receiver.pem"
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        + made.public_bytes(serialization.Encoding.PEM)
    )
    return path


@pytest.mark.parametrize("is_known", [True, False])
def test_receiver_needs_a_certificate_that_the_system_trusts(
    tmp_path: Path, outcomes: list[str], monkeypatch: pytest.MonkeyPatch, is_known: bool
) -> None:
    path = certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    if is_known:
        monkeypatch.setenv("SSL_CERT_FILE", str(path))
    with closing(Played(context)) as receiver:
        hook = webhook(receiver, tmp_path, outcomes)
        hook.open(RUN)
        if is_known:
            hook.write(facts_of(1))
        else:
            with pytest.raises(ConnectionError, match="certificate verify failed"):
                hook.write(facts_of(1))
        assert bool(receiver.requests) == is_known


# ---------------------------------------------------------------------- in a server


async def test_run_tells_of_its_rounds_and_its_end_each_once_though_the_server_starts_again(
    played: Played, tmp_path: Path
) -> None:
    receiver = Receiver(played.url, SECRET, None)
    async with world(tmp_path / "state", receiver=receiver) as here:
        here.trainer.audit = (
            AgentAudit(agent_id="a", scale=0.5, flags=("labels",), update_norm=1.0, norm_ratio=1.0),
        )
        await here.contribute("a", 1)
        await until(lambda: (1, "published") in played.events)
    async with world(tmp_path / "state", receiver=receiver, rounds=2) as here:
        # The first server may have ended before it opened the round.
        await here.until(lambda: here.standing.current.number == 2)
        await here.contribute("a", 2)
        await asyncio.wait_for(here.running, 20)
        value = here.metrics.registry.get_sample_value
        assert value("ecavg_server_notifications_total", {"outcome": "delivered"}) == 2
    assert played.events == [(1, "flagged"), (1, "published"), (2, "published"), (2, "run_over")]
    digests = [message.get("digest") for message in played.messages]
    assert all(digests)
    assert b'"a"' not in b"".join(body for _, body in played.requests)


async def test_receiver_that_is_down_holds_up_no_round_and_is_told_later_and_no_log_has_its_path(
    played: Played, tmp_path: Path
) -> None:
    played.statuses = [503] * 3
    with capture_logs() as logs:
        async with world(tmp_path / "state", receiver=Receiver(played.url, SECRET, None)) as here:
            await here.contribute("a", 1)
            await here.until(lambda: here.store.round(1).phase == "published")
            await here.until(lambda: any(line["event"] == "tracker_works_again" for line in logs))
    assert played.events[-1] == (1, "published")
    assert not [line for line in logs if "secret" in str(line)]


def test_every_outcome_of_a_message_is_a_series_from_the_start() -> None:
    value = ServerMetrics().registry.get_sample_value
    for outcome in ("delivered", "failed", "given_up"):
        assert value("ecavg_server_notifications_total", {"outcome": outcome}) == 0


# ---------------------------------------------------------------------- what the operator writes


@pytest.mark.parametrize(
    "url",
    [
        "http://hooks.example/x",
        "https://me:word@hooks.example/x",
        "https://[bad/x",
        "hooks.elsewhere",
        "ftp://h/x",
    ],
)
def test_address_to_which_others_could_listen_is_refused_without_being_shown(url: str) -> None:
    with pytest.raises(ValidationError, match="notify_url should") as caught:
        ServerConfig(notify_url=url)
    (error,) = caught.value.errors()
    assert error["loc"] == ()
    assert url not in error["msg"]


@pytest.mark.parametrize("key", ["notify_secret_file", "page_url"])
def test_key_of_the_messages_without_their_address_is_refused(key: str) -> None:
    with pytest.raises(ValidationError, match=f"{key} is for the messages to notify_url"):
        ServerConfig(**{key: "https://ecavg.example"})


def test_secret_comes_from_its_file_and_must_be_long(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    config = ServerConfig(
        notify_url="https://hooks.example/x", notify_secret_file=path, page_url="http://lan:8080"
    )
    path.write_text(f"{SECRET}\n")
    assert receiver_of(config) == Receiver("https://hooks.example/x", SECRET, "http://lan:8080")
    path.write_text("short\n")
    with pytest.raises(UsageError, match="is too short") as caught:
        receiver_of(config)
    assert "short\n" not in str(caught.value)
    assert receiver_of(ServerConfig()) is None
