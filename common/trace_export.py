"""The part of tracing that needs OpenTelemetry: spans, and the way they are sent (OTLP over HTTP)."""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import structlog
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import Decision
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from ecavg.common.tracing import TRACEPARENT

_ROUND = "ecavg.round"
_W3C = TraceContextTextMapPropagator()
# The ids of trace and span for the next span that is made; None: random ones.
_fixed_ids: ContextVar[tuple[int, int] | None] = ContextVar("fixed_ids", default=None)

log = structlog.get_logger()


class Exporting:
    """The spans of one process, and the thread that sends them.

    Args:
        service: the name of the service in the traces.
    """

    def __init__(self, service: str) -> None:
        # What it has to say about a collector that is down, it says again and again.
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": service}),
            id_generator=_Ids(),
            shutdown_on_exit=False,
        )
        self._processor = BatchSpanProcessor(_Telling(OTLPSpanExporter()))
        self._provider.add_span_processor(self._processor)
        self._tracer = self._provider.get_tracer("ecavg")

    def flush(self) -> None:
        """Send the spans that have ended."""
        self._processor.force_flush()

    @contextmanager
    def span(self, name: str, parent: Context | None = None, number: int | None = None) -> Iterator[None]:
        """Make a span of the context; without a parent, below the current span."""
        attributes = {} if number is None else {_ROUND: number}
        with self._tracer.start_as_current_span(
            name, parent, attributes=attributes, record_exception=False, set_status_on_exception=False
        ) as span:
            try:
                yield
            except Exception:
                # Without the message: it may name an agent.
                span.set_status(trace.StatusCode.ERROR)
                raise

    def parent(self, trace_id: int, span_id: int) -> Context:
        """Return the context below a span with these ids, which some process makes."""
        decision = self._provider.sampler.should_sample(None, trace_id, "round").decision
        flags = trace.TraceFlags(trace.TraceFlags.SAMPLED if decision is Decision.RECORD_AND_SAMPLE else 0)
        root = trace.SpanContext(trace_id, span_id, is_remote=True, trace_flags=flags)
        return trace.set_span_in_context(trace.NonRecordingSpan(root), Context())

    def end_root(self, name: str, trace_id: int, span_id: int, began_at: float, number: int) -> None:
        """Make the first span of a trace, with these ids, from `began_at` to now."""
        token = _fixed_ids.set((trace_id, span_id))
        try:
            began_ns = min(int(began_at * 1e9), time.time_ns())
            self._tracer.start_span(name, Context(), attributes={_ROUND: number}, start_time=began_ns).end()
        finally:
            _fixed_ids.reset(token)

    def context_of(self, traceparent: str) -> Context | None:
        """Return the context below the span that a traceparent names; None: it is damaged."""
        found = _W3C.extract({TRACEPARENT: traceparent}, Context())
        return found if trace.get_current_span(found).get_span_context().is_valid else None

    def current(self) -> str | None:
        """Return the current span as a traceparent; None: there is none."""
        carrier: dict[str, str] = {}
        _W3C.inject(carrier)
        return carrier.get(TRACEPARENT)


class _Ids(RandomIdGenerator):
    """Random ids, except for the span of a whole round."""

    def generate_trace_id(self) -> int:
        """Return the id of a new trace."""
        fixed = _fixed_ids.get()
        return fixed[0] if fixed else super().generate_trace_id()

    def generate_span_id(self) -> int:
        """Return the id of a new span."""
        fixed = _fixed_ids.get()
        return fixed[1] if fixed else super().generate_span_id()


class _Telling(SpanExporter):
    """An exporter with one log line when it begins to fail, and one when it works again."""

    def __init__(self, exporter: Any) -> None:
        self._exporter = exporter
        self._is_failing = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send the spans; those that cannot be sent are lost."""
        result: SpanExportResult = self._exporter.export(spans)
        is_failing = result is not SpanExportResult.SUCCESS
        if is_failing and not self._is_failing:
            log.warning("traces_not_sent")
        elif self._is_failing and not is_failing:
            log.info("traces_sent_again")
        self._is_failing = is_failing
        return result

    def shutdown(self) -> None:
        """End the exporter."""
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:  # noqa: ARG002
        """Return True: nothing is kept here."""
        return True
