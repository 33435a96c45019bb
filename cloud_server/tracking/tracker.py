"""What a tracker is to the thread that writes to it, and which trackers a configuration asks for."""

from importlib.util import find_spec
from typing import Protocol

from ecavg.cloud_server.config import TrackingConfig
from ecavg.cloud_server.tracking.facts import Facts, RunFacts
from ecavg.common.errors import UsageError

# Key of the configuration → the module that it needs, and the extra that brings it.
_NEEDS = {"tensorboard": "tensorboard", "mlflow": "mlflow"}


class Tracker(Protocol):
    """A place to which the facts of a run are written; every method may take long, and raise anything."""

    name: str

    def open(self, run: RunFacts) -> int:
        """Find the run there or begin it, and return the last round that is there, at least in part.

        It is -1 if there is none. All of the rounds before it is there, except perhaps the last one's edges.
        """
        ...

    def write(self, facts: Facts) -> None:
        """Write what is not there yet; a second call with the same facts changes nothing."""
        ...

    def finish(self) -> None:
        """Say that the run is over."""
        ...


def check_packages(config: TrackingConfig) -> None:
    """Raise UsageError if a tracker is configured whose package is not installed."""
    for key, module in _NEEDS.items():
        if getattr(config, key) is not None and find_spec(module) is None:
            raise UsageError(f"tracking.{key} needs another package: pip install 'ecavg[{key}]'")


def trackers_of(config: TrackingConfig) -> list[Tracker]:
    """Return the trackers that the configuration asks for; nothing is opened yet."""
    trackers: list[Tracker] = []
    # Imported here: each needs a package that not everybody has, and takes a second.
    if config.tensorboard is not None:
        from ecavg.cloud_server.tracking.to_tensorboard import TensorBoard

        trackers.append(TensorBoard(config.tensorboard))
    if config.mlflow is not None:
        from ecavg.cloud_server.tracking.to_mlflow import MLflow

        trackers.append(MLflow(config.mlflow))
    return trackers
