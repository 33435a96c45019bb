"""The warm-up: the initial weights are trained on the combined data, before the edges part from them."""

from dataclasses import replace

from torch import nn

from ecavg.cloud_server.jobs import Job
from ecavg.cloud_server.trainer.pipeline import RoundPipeline, Workplace


class WarmUp(RoundPipeline):
    """The work on round 0: agents have sent data alone, and the initial weights are the only start."""

    def __init__(self, job: Job, at: Workplace) -> None:
        super().__init__(job, at)
        assert self._base
        self._run = self._run.model_copy(update={"candidates": ("previous",)})
        self._members = [replace(member, weights_path=self._base.path) for member in self._members]

    @property
    def _may_keep_start(self) -> bool:
        """Return True: there is no other candidate."""
        return True

    def _make_weights(self) -> None:
        """Decode nothing, because the initial weights are here as they are."""

    def _screen(self, model: nn.Module | None) -> None:
        """Keep every member, because there are no updates to compare."""
