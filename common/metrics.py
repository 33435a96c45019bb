"""The metrics that every process has."""

import math
import shutil
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Literal

from prometheus_client import (
    CollectorRegistry,
    Gauge,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.metrics_core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from ecavg.common import streams
from ecavg.common.gpus import find_gpus


def make_registry() -> CollectorRegistry:
    """Return a registry with the metrics of any process.

    They are CPU seconds, memory, open files, lost log lines, the version, and the GPUs if there are any.
    """
    # Without this call, each counter would have a second series with the time of its creation.
    disable_created_metrics()  # type: ignore[no-untyped-call]
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    registry.register(_DroppedLines())
    build = Gauge("ecavg_build_info", "1, with the version of the program.", ["version"], registry=registry)
    build.labels(_version()).set(1)
    if gpus := find_gpus():
        registry.register(gpus)
    return registry


class MachineMetrics:
    """The metrics of what a process needs of its machine: room on the disk, and a certificate that is valid.

    Args:
        side: the middle of the metrics' names.
    """

    def __init__(self, registry: CollectorRegistry, side: Literal["server", "agent"]) -> None:
        self._disk_free = Gauge(
            f"ecavg_{side}_disk_free_bytes",
            "Bytes that may still be written to the disk of the state directory.",
            registry=registry,
        )
        self._certificate_left = Gauge(
            f"ecavg_{side}_certificate_left_seconds",
            "How long the certificate is still valid: the CA's at the server, the agent's own at an agent.",
            registry=registry,
        )
        self._disk_free.set(math.nan)
        self._certificate_left.set(math.nan)

    def watch(self, folder: Path, certificate_ends_at: Callable[[], float] | None) -> None:
        """Have disk and certificate looked at whenever somebody looks at the metrics.

        Args:
            folder: the state directory.
            certificate_ends_at: returns when the certificate ends, in seconds since the epoch; None: there is
                no certificate.
        """
        self._disk_free.set_function(lambda: _free_bytes(folder))
        if certificate_ends_at is not None:
            self._certificate_left.set_function(lambda: certificate_ends_at() - time.time())


def _free_bytes(folder: Path) -> float:
    """Return how many bytes may still be written to the disk of a folder; not a number if nobody knows."""
    try:
        return float(shutil.disk_usage(folder).free)
    except OSError:
        return math.nan


def _version() -> str:
    try:
        return metadata.version("ecavg")
    except metadata.PackageNotFoundError:
        return "unknown"


class _DroppedLines(Collector):
    """The metric of the log lines that this process could not write."""

    def collect(self) -> Iterator[Metric]:
        """Yield the metric with its present value."""
        yield CounterMetricFamily(
            "ecavg_log_lines_dropped_total",
            "Lines that could not be written to stdout or stderr: full disk, closed, or no reader.",
            value=streams.num_dropped(),
        )
