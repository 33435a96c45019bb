"""One round as one trace: what a collector on loopback receives from agents, server and trainer."""

import gzip
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from typing import Any, NamedTuple

import pytest

from tests.conftest import need
from tests.integration.test_round import QUICK
from tests.processes import ROOT, Cluster

PACKAGE = "opentelemetry-exporter-otlp-proto-http"


class Span(NamedTuple):
    """What a test looks at of a span."""

    service: str
    name: str
    trace_id: bytes
    span_id: bytes
    parent_id: bytes
    attributes: dict[str, str]


class Collector(ThreadingHTTPServer):
    """A collector of OpenTelemetry's on a port of loopback, which keeps what it is sent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.spans: list[Span] = []
        self.texts: list[bytes] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def variables(self) -> dict[str, str]:
        endpoint = f"http://127.0.0.1:{self.server_port}"
        return {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "OTEL_BSP_SCHEDULE_DELAY": "100"}

    def take(self, body: bytes) -> None:
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        self.texts.append(body)
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            names = {item.key: item.value.string_value for item in resource.resource.attributes}
            for scope in resource.scope_spans:
                self.spans += [_span(names["service.name"], span) for span in scope.spans]


class _Handler(BaseHTTPRequestHandler):
    server: Any

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.take(gzip.decompress(body) if self.headers["Content-Encoding"] == "gzip" else body)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


def _span(service: str, span: Any) -> Span:
    attributes = {item.key: str(item.value) for item in span.attributes}
    return Span(service, span.name, span.trace_id, span.span_id, span.parent_span_id, attributes)


@pytest.fixture
def collector() -> Iterator[Collector]:
    need("opentelemetry", find_spec("opentelemetry"), PACKAGE)
    with Collector() as collector:
        yield collector
        collector.shutdown()


def test_one_trace_follows_a_round_through_agents_server_and_trainer(
    cluster: Cluster, collector: Collector
) -> None:
    server = cluster.server("--min-agents", 2, "--rounds", 2, *QUICK, env=collector.variables)
    agents = [
        cluster.agent(name, "--partition", part, env=collector.variables)
        for name, part in (("secret-1", "1/2"), ("secret-2", "2/2"))
    ]
    assert [agent.wait() for agent in agents] == [0, 0]
    assert server.wait() == 0

    traces = defaultdict(list)
    for span in collector.spans:
        traces[span.trace_id].append(span)
    assert len(traces) == 2
    for spans in traces.values():
        by_id = {span.span_id: span for span in spans}
        tree = {
            (span.service, span.name, by_id[span.parent_id].name if span.parent_id else None)
            for span in spans
        }
        assert {
            ("ecavg-server", "round", None),
            ("ecavg-agent", "take part", "round"),
            ("ecavg-agent", "pre-train", "take part"),
            ("ecavg-agent", "upload weights", "take part"),
            ("ecavg-server", "Upload", "upload weights"),
            ("ecavg-agent", "contribute", "take part"),
            ("ecavg-server", "Contribute", "contribute"),
            ("ecavg-server", "collect", "round"),
            ("ecavg-server", "train", "round"),
            ("ecavg-trainer", "job", "train"),
            ("ecavg-trainer", "aggregate", "job"),
            ("ecavg-trainer", "select", "aggregate"),
            ("ecavg-trainer", "fine-tune", "job"),
            ("ecavg-trainer", "evaluate", "job"),
            ("ecavg-server", "publish", "train"),
            ("ecavg-agent", "take model", "round"),
            ("ecavg-agent", "report", "take model"),
            ("ecavg-server", "Report", "report"),
        } <= tree
    assert {name for span in collector.spans for name in span.attributes} == {"ecavg.round"}
    assert not [text for text in collector.texts if b"secret" in text or str(cluster.folder).encode() in text]


@pytest.mark.soak
def test_collector_that_is_down_disturbs_no_round_and_is_told_of_once(cluster: Cluster) -> None:
    need("opentelemetry", find_spec("opentelemetry"), PACKAGE)
    # Nothing listens on this port.
    down = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_BSP_SCHEDULE_DELAY": "100"}
    server = cluster.server("--min-agents", 1, *QUICK, env=down | {"OTEL_EXPORTER_OTLP_TIMEOUT": "1"})
    agent = cluster.agent("edge-1", "--partition", "1/1")
    assert agent.wait() == 0
    assert server.wait() == 0
    assert server.output.count("traces_not_sent") == 1
    assert "Traceback" not in server.output


@pytest.mark.parametrize(
    "variables", [{}, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_SDK_DISABLED": "true"}]
)
def test_nothing_is_imported_and_nothing_made_where_nobody_asks_for_traces(
    variables: dict[str, str],
) -> None:
    code = (
        "import sys; from ecavg.common import tracing; tracing.start('x')\n"
        "with tracing.round_span('a', 'run', 1), tracing.span('b'), tracing.remote_span('c', '00-x'):\n"
        "    assert tracing.current() is None\n"
        "tracing.end_round('run', 1, 0.0); tracing.flush()\n"
        "sys.exit(any(name.startswith(('opentelemetry', 'requests')) for name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, env=variables)
    assert done.returncode == 0
