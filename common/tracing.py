"""Traces of rounds by OpenTelemetry, for those who have its package and set its variables.

Every round is one trace. Its id is made from the run and the number of the round, so that agents and server
know it without being told. Below the round, the context travels as W3C's `traceparent`: in the metadata of
calls, and in job.json. Nothing is imported, and nothing is done, unless `start` finds both package and
variables. Spans have names and numbers for attributes, but no data, no agent's id and no error message.
"""

import hashlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

# With one of these, the standard says where the spans go.
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
TRACEPARENT = "traceparent"
# How long the end of a process waits for the last spans to be sent.
FLUSH_SECONDS = 2.0

# The `Exporting` of this process; None: nothing is traced.
_exporting: Any = None


def start(service: str) -> None:
    """Trace from now on, as this service, if the package and a variable with an endpoint are there."""
    global _exporting
    if _is_wanted() and find_spec("opentelemetry") and find_spec("opentelemetry.exporter"):
        from ecavg.common.trace_export import Exporting

        _exporting = Exporting(os.environ.get("OTEL_SERVICE_NAME") or service)


def flush(seconds: float = FLUSH_SECONDS) -> None:
    """Send the spans that have ended, and wait for that, but no longer than this."""
    if _exporting:
        # A collector that does not answer must not hold up the process.
        thread = threading.Thread(target=_exporting.flush, name="tracing-flush", daemon=True)
        thread.start()
        thread.join(seconds)


@contextmanager
def round_span(name: str, run_id: str, number: int) -> Iterator[None]:
    """Make a span of the context, right below the round of this number."""
    if _exporting is None:
        yield
        return
    with _exporting.span(name, _exporting.parent(*_ids(run_id, number)), number):
        yield


def end_round(run_id: str, number: int, opened_at: float) -> None:
    """Make the span of the whole round, which ends now.

    Args:
        run_id: the id of the run.
        number: the number of the round.
        opened_at: when the round was opened, in seconds since the epoch.
    """
    if _exporting:
        _exporting.end_root("round", *_ids(run_id, number), opened_at, number)


@contextmanager
def remote_span(name: str, traceparent: str | None) -> Iterator[None]:
    """Make a span of the context, below the span that another process has named; None: make none."""
    parent = _exporting.context_of(traceparent) if _exporting and traceparent else None
    if parent is None:
        yield
        return
    with _exporting.span(name, parent):
        yield


@contextmanager
def span(name: str) -> Iterator[None]:
    """Make a span of the context, below the current span; without a current span, make none."""
    if current() is None:
        yield
        return
    with _exporting.span(name):
        yield


def current() -> str | None:
    """Return the current span for another process, as a traceparent; None: there is none."""
    found: str | None = _exporting.current() if _exporting else None
    return found


def _is_wanted() -> bool:
    is_off = os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
    is_off = is_off or os.environ.get("OTEL_TRACES_EXPORTER", "otlp") != "otlp"
    return not is_off and any(os.environ.get(name) for name in _ENDPOINTS)


def _ids(run_id: str, number: int) -> tuple[int, int]:
    """Return the ids of a round's trace and of its first span."""
    digest = hashlib.sha256(f"ecavg round {run_id} {number}".encode()).digest()
    return int.from_bytes(digest[:16]), int.from_bytes(digest[16:24])
