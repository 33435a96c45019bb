"""The webhook: what happens to the run is sent to an address of the operator's own, one JSON object for each.

A file in the state directory has what was sent last, so that a server that starts again goes on from there.
A message that was sent may be sent again, under the same id, if the server dies before that is on the disk.
"""

import hashlib
import hmac
import json
import ssl
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from email.message import Message
from http.client import HTTPException
from pathlib import Path
from typing import IO, Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import (
    HTTPRedirectHandler,
    HTTPSHandler,
    OpenerDirector,
    ProxyHandler,
    Request,
    build_opener,
)

import structlog
from pydantic import BaseModel, ValidationError
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_random_exponential

from ecavg.cloud_server.round import OVER
from ecavg.cloud_server.store import Store
from ecavg.cloud_server.tracking.facts import Facts, RunFacts
from ecavg.common.addresses import is_loopback
from ecavg.common.errors import one_line
from ecavg.common.files import replacing

# The receiver has so much time to answer.
ANSWER_SECONDS = 10.0
# A message that was not taken is sent again for so long, after random pauses that grow up to the next number.
# After that, the thread that calls this waits for its own pause, and all of it begins again.
AGAIN_SECONDS = 15.0
MAX_PAUSE_SECONDS = 5.0
# What is older than this is not sent any more: it would be no news.
GIVE_UP_SECONDS = 24 * 3600.0

log = structlog.get_logger()


@dataclass(frozen=True)
class Receiver:
    """Who is told, and how."""

    url: str
    # The key of the signature; None: messages are not signed.
    secret: str | None
    # Where people find the status page; None: nobody knows.
    page_url: str | None


class Told(BaseModel):
    """What was sent last, as it is on the disk."""

    # The last round of which all was sent, or given up; -1: there is none.
    round: int
    # The last round of the run whose end was sent; None: it was not sent.
    run_over_after: int | None = None


class Webhook:
    """The receiver of a run's messages, as a tracker.

    Args:
        run_name: the run's name for people.
        path: the file that has what was sent last.
        first: the last round that is over already; it counts as sent where there is no such file.
        on_outcome: called for each message, and for each attempt that failed: "delivered", "failed" or
            "given_up".
        clock: returns seconds since the epoch.
    """

    name = "webhook"

    def __init__(
        self,
        receiver: Receiver,
        run_name: str,
        path: Path,
        first: int,
        on_outcome: Callable[[str], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._receiver = receiver
        self._run_name = run_name
        self._path = path
        self._first = first
        self._on_outcome = on_outcome
        self._clock = clock
        self._opener = _opener(receiver.url)
        self._run_id = ""
        # What was sent last, also where the disk did not take that; None: the file was not looked at.
        self._told: Told | None = None
        # The last round that was seen.
        self._last: Facts | None = None

    def open(self, run: RunFacts) -> int:
        """Find out what was sent last, and return that round."""
        self._run_id = run.run_id
        if self._told is None:
            self._told = _read(self._path) or Told(round=self._first)
        self._keep(self._told)
        return self._told.round

    def write(self, facts: Facts) -> None:
        """Send what is new about a round that is over."""
        assert self._told
        if facts.report is None:
            return
        self._last = facts
        if facts.round <= self._told.round:
            return
        for event in _events_of(facts):
            self._send(event, facts)
        self._keep(self._told.model_copy(update={"round": facts.round}))

    def finish(self) -> None:
        """Send that the run is over, unless that was sent after the same round."""
        assert self._told
        if self._last is None or self._told.run_over_after == self._last.round:
            return
        self._send("run_over", self._last)
        self._keep(self._told.model_copy(update={"run_over_after": self._last.round}))

    def _keep(self, told: Told) -> None:
        self._told = told
        with replacing(self._path) as partial:
            partial.write_text(told.model_dump_json() + "\n", "utf-8")

    def _send(self, event: str, facts: Facts) -> None:
        """Send a message until it is taken.

        Raises:
            ConnectionError: nobody has taken it, though it was sent again for a while.
        """
        if self._clock() - facts.at > GIVE_UP_SECONDS:
            self._on_outcome("given_up")
            log.warning("notification_given_up", notification=event, round=facts.round)
            return
        request = self._request(event, self._message(event, facts))
        retrying = Retrying(
            retry=retry_if_exception_type(ConnectionError),
            stop=stop_after_delay(AGAIN_SECONDS),
            wait=wait_random_exponential(max=MAX_PAUSE_SECONDS),
            reraise=True,
        )
        retrying(self._post, request)

    def _message(self, event: str, facts: Facts) -> dict[str, Any]:
        """Return the message; docs/webhook.md says what its fields are. What is not known is absent."""
        assert facts.report is not None
        page_url, report = self._receiver.page_url, facts.report
        score = report.get("accuracy_published", report.get("score_published"))
        message = {
            "id": f"{self._run_id}-{facts.round}-{event}",
            "event": event,
            "at": datetime.fromtimestamp(facts.at, UTC).isoformat(timespec="seconds"),
            "run_id": self._run_id,
            "run_name": self._run_name,
            "round": facts.round,
            "digest": facts.digest,
            "score": score,
            "score_name": None if score is None else report.get("metric", "accuracy"),
            "agents": _num_agents(facts),
            "failure": report.get("failure"),
            "report_url": page_url and f"{page_url.rstrip('/')}/#round-{facts.round}",
        }
        return {name: value for name, value in message.items() if value is not None}

    def _request(self, event: str, message: dict[str, Any]) -> Request:
        body = json.dumps(message).encode()
        headers = {
            "Content-Type": "application/json",
            "User-Agent": "ecavg",
            "X-ECAvg-Event": event,
            "X-ECAvg-Delivery": message["id"],
        }
        if self._receiver.secret is not None:
            headers["X-Hub-Signature-256"] = signature(self._receiver.secret, body)
        return Request(self._receiver.url, body, headers, method="POST")  # noqa: S310  the scheme is checked

    def _post(self, request: Request) -> None:
        """Send the message once; raise ConnectionError, without the address, unless it is taken."""
        try:
            with self._opener.open(request, timeout=ANSWER_SECONDS):
                pass
        except (OSError, HTTPException) as error:
            if isinstance(error, HTTPError):
                # It holds the connection.
                error.close()
            self._on_outcome("failed")
            raise ConnectionError(f"the receiver at {request.host} {_what_happened(error)}") from None
        self._on_outcome("delivered")


def webhook_of(receiver: Receiver, run_name: str, store: Store, on_outcome: Callable[[str], None]) -> Webhook:
    """Return the webhook of the run on record; rounds that are over already are sent only if it says so."""
    over = [row.number for row in store.rounds(last=2) if row.phase in OVER]
    return Webhook(receiver, run_name, store.state_dir.notified, max(over, default=-1), on_outcome)


def signature(secret: str, body: bytes) -> str:
    """Return X-Hub-Signature-256 for a body, as GitHub's webhooks have it: HMAC-SHA256 in hex."""
    return f"sha256={hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()}"


def _events_of(facts: Facts) -> Iterator[str]:
    """Yield what happened in a round that is over."""
    if facts.metrics.get("agents/flagged") or facts.metrics.get("agents/left_out"):
        yield "flagged"
    yield "published" if facts.digest else "failed"


def _num_agents(facts: Facts) -> dict[str, int]:
    """Return how many agents had which part in the round."""
    names = ("contributed", "left_out", "flagged", "rejected")
    return {name: int(facts.metrics.get(f"agents/{name}", 0)) for name in names}


def _read(path: Path) -> Told | None:
    """Return what was sent last; None where there is no file that says so."""
    try:
        return Told.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError:
        log.warning("notified_not_readable", file=path.name)
        return None


class _NoRedirect(HTTPRedirectHandler):
    """The refusal to send a message to another address than the operator's."""

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> None:
        """Have the redirection count as an error."""


def _opener(url: str) -> OpenerDirector:
    """Return what sends messages: it knows the system's roots, and goes through the environment's proxy."""
    handlers = [HTTPSHandler(context=ssl.create_default_context()), _NoRedirect()]
    direct = [ProxyHandler({})] if is_loopback(urlsplit(url).hostname or "") else []
    return build_opener(*handlers, *direct)


def _what_happened(error: Exception) -> str:
    if isinstance(error, HTTPError):
        return f"answered with the status {error.code}"
    reason = getattr(error, "reason", None) or error
    text = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
    return f"does not take messages: {one_line(text)}"
