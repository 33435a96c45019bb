"""Spans and their contexts, in one process, with a collector on loopback; test_traces.py has whole rounds."""

from collections.abc import Iterator
from importlib.util import find_spec

import pytest

from ecavg.common import tracing
from tests.conftest import need
from tests.integration.test_traces import PACKAGE, Collector, Span


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    need("opentelemetry", find_spec("opentelemetry"), PACKAGE)
    monkeypatch.setattr(tracing, "_exporting", None)
    with Collector() as collector:
        for name, value in collector.variables.items():
            monkeypatch.setenv(name, value)
        tracing.start("test")
        yield collector
        collector.shutdown()


def spans(collector: Collector) -> dict[str, Span]:
    tracing.flush(10)
    return {span.name: span for span in collector.spans}


def test_parts_of_a_round_find_its_first_span_without_being_told(collector: Collector) -> None:
    with tracing.round_span("early", "run", 1):
        pass
    tracing.end_round("run", 1, 0.0)
    with tracing.round_span("another", "run", 2):
        pass
    found = spans(collector)
    assert found["early"].parent_id == found["round"].span_id
    assert found["early"].trace_id == found["round"].trace_id != found["another"].trace_id


def test_context_travels_as_text(collector: Collector) -> None:
    with tracing.round_span("here", "run", 1):
        text = tracing.current()
    assert tracing.current() is None
    with tracing.remote_span("there", text), tracing.span("below"):
        pass
    found = spans(collector)
    assert found["there"].parent_id == found["here"].span_id
    assert found["below"].parent_id == found["there"].span_id


@pytest.mark.parametrize(
    "text", [None, "", "x", "00-0-0-00", "00-" + "0" * 32 + "-" + "0" * 16 + "-01", "\n" * 99]
)
def test_damaged_context_makes_no_span(collector: Collector, text: str | None) -> None:
    with tracing.remote_span("there", text), tracing.span("below"):
        assert tracing.current() is None
    assert spans(collector) == {}


def test_error_is_marked_without_its_message(collector: Collector) -> None:
    with pytest.raises(ValueError, match="edge-1"), tracing.round_span("failing", "run", 1):
        raise ValueError("edge-1 has sent nonsense")
    assert "failing" in spans(collector)
    assert not [text for text in collector.texts if b"edge-1" in text]


def test_sampler_of_the_environment_counts(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "_exporting", None)
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0.0")
    tracing.start("test")
    with tracing.round_span("unwanted", "run", 1):
        text = tracing.current()
    assert text
    assert text.endswith("-00")
    tracing.end_round("run", 1, 0.0)
    assert spans(collector) == {}
