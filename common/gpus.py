"""The GPUs of the machine as metrics, where there are any and the package nvidia-ml-py is installed."""

import importlib
from collections.abc import Iterator
from typing import Any

import structlog
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

log = structlog.get_logger()


class GpuCollector(Collector):
    """The metrics of all GPUs, asked for whenever somebody looks at them.

    Args:
        nvml: the module pynvml, or what a test has in its place.
    """

    def __init__(self, nvml: Any) -> None:
        self._nvml = nvml

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics; a GPU that does not answer has none."""
        used = GaugeMetricFamily("ecavg_gpu_memory_used_bytes", "Memory in use, by anyone.", labels=["gpu"])
        total = GaugeMetricFamily("ecavg_gpu_memory_total_bytes", "Memory of the GPU.", labels=["gpu"])
        busy = GaugeMetricFamily(
            "ecavg_gpu_utilization_ratio",
            "Part of the last moment in which the GPU was at work, 0 to 1.",
            labels=["gpu"],
        )
        for number in range(self._count()):
            try:
                handle = self._nvml.nvmlDeviceGetHandleByIndex(number)
                memory = self._nvml.nvmlDeviceGetMemoryInfo(handle)
                percent = self._nvml.nvmlDeviceGetUtilizationRates(handle).gpu
            except self._nvml.NVMLError as error:
                log.debug("gpu_not_read", gpu=number, reason=str(error))
                continue
            used.add_metric([str(number)], memory.used)
            total.add_metric([str(number)], memory.total)
            busy.add_metric([str(number)], percent / 100)
        yield from (used, total, busy)

    def _count(self) -> int:
        try:
            return int(self._nvml.nvmlDeviceGetCount())
        except self._nvml.NVMLError:
            return 0


def find_gpus() -> GpuCollector | None:
    """Return the collector of this machine's GPUs; None: there are none, or nothing here can ask them."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    return GpuCollector(nvml)
