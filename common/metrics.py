"""The metrics that every process has."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector, disable_created_metrics
from prometheus_client.metrics_core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from common import streams


def make_registry() -> CollectorRegistry:
    """Return a registry with the metrics of any process: CPU seconds, memory, open files, lost log lines."""
    # Without this call, each counter would have a second series with the time of its creation.
    disable_created_metrics()  # type: ignore[no-untyped-call]
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    registry.register(_DroppedLines())
    return registry


class _DroppedLines(Collector):
    """The metric of the log lines that this process could not write."""

    def collect(self) -> Iterator[Metric]:
        """Yield the metric with its present value."""
        yield CounterMetricFamily(
            "ecavg_log_lines_dropped_total",
            "Lines that could not be written to stdout or stderr: full disk, closed, or no reader.",
            value=streams.num_dropped(),
        )
