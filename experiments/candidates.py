"""The candidates and the fine-tuned model of a round, made again from the agents' contributions.

The product's trainer keeps only the model that it publishes, and the accuracies of the other models. An
experiment measures all models on its test set. The experiment makes the models again with the trainer's own
functions from the same files, so that they are the same models, on the CPU bit for bit.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from torch import nn

from ecavg.cloud_server.jobs import Job, JobDirectory, Result
from ecavg.cloud_server.state_dir import blob_path
from ecavg.cloud_server.trainer.finetune import combine, fine_tune
from ecavg.cloud_server.trainer.measuring import Measuring
from ecavg.cloud_server.trainer.members import (
    Member,
    all_hold_base,
    base_of,
    common_start,
    make_weights,
    members_of,
)
from ecavg.cloud_server.trainer.moving_average import MovingAverage
from ecavg.cloud_server.trainer.norms import clip
from ecavg.cloud_server.trainer.output import write_model
from ecavg.cloud_server.trainer.screening import Screening, clipped_path
from ecavg.cloud_server.trainer.selection import Selection
from ecavg.common.config import CandidateName
from ecavg.common.errors import InvalidError, RunError
from ecavg.common.models import build_model, shared_part
from ecavg.common.training import AfterStep
from ecavg.common.weights import load_into
from ecavg.common.wire import wire_of


class Made(NamedTuple):
    """A model that has been made again, and its name."""

    # The name of the candidate, or one of TRAINED.
    name: str
    # The same object each time, with other weights.
    model: nn.Module


def held_out_scores(result: Result) -> dict[str, float | None]:
    """Return the score of every model that a round has weighed, by name; None: there was no data."""
    scores = {**result.candidates, "fine_tuned": result.score_fine_tuned}
    if result.score_fine_tuned_average is not None:
        scores["fine_tuned_average"] = result.score_fine_tuned_average
    return scores


def make_candidates(
    job: Job, result: Result, blobs_dir: Path, device: torch.device, names: Sequence[CandidateName]
) -> Iterator[Made]:
    """Make these candidates of a finished round, one after the other.

    Args:
        result: the trainer's result, which says which agents were left out and whose updates were clipped.
    """
    with TemporaryDirectory() as scratch:
        yield from _Again(job, result, blobs_dir, device, Path(scratch)).candidates(names)


def make_weighed(
    job: Job, result: Result, blobs_dir: Path, device: torch.device, precision_path: Path
) -> Iterator[Made]:
    """Make all candidates of a finished round, and what its fine-tune has made, if there was one.

    Args:
        result: the trainer's result, as for `make_candidates`.
        precision_path: the file with the trainer's choice of the precision.
    """
    # If none of the run's candidates can be made, the trainer starts from a model that is none of them.
    names = dict.fromkeys([*job.run.candidates, result.start])
    with TemporaryDirectory() as scratch:
        again = _Again(job, result, blobs_dir, device, Path(scratch))
        yield from again.candidates([name for name in names if name])
        yield from again.fine_tuned(precision_path)


class _Again:
    """A second execution of a round's job, which makes the models that are asked for."""

    def __init__(
        self, job: Job, result: Result, blobs_dir: Path, device: torch.device, scratch: Path
    ) -> None:
        self._job = job
        self._run = job.run
        self._result = result
        self._blobs_dir = blobs_dir
        self._device = device
        self._scratch = scratch
        self._model = build_model(job.run, seed=job.run.seed)
        self._sent = members_of(job, blobs_dir, scratch)
        self._members = self._screened()
        contributions = [member.contribution for member in self._members]
        self._data = combine(job.run, contributions, blobs_dir)

    def candidates(self, names: Sequence[str]) -> Iterator[Made]:
        """Make the candidates with these names; leave out candidates that cannot be made."""
        for name in names:
            selection = self._selection(name)
            selection.run()
            if selection.take_best().name == name:
                yield Made(name, self._model)

    def fine_tuned(self, precision_path: Path) -> Iterator[Made]:
        """Make what the fine-tune makes, as it would be sent; make none if no agent has shared data."""
        if not len(self._data.train.targets):
            return
        decay = self._run.fine_tune.ema_decay
        if self._result.published == "fine_tuned" and self._result.weights and not decay:
            load_into(self._model, blob_path(self._blobs_dir, self._result.weights.sha256))
            yield Made("fine_tuned", self._model)
            return
        selection = self._selection(self._result.start)
        selection.run()
        selection.take_best()
        average = MovingAverage(self._model, decay)
        self._fine_tune(precision_path, average.update if decay else lambda: None)
        self._send_if_finite()
        yield Made("fine_tuned", self._model)
        if len(self._data.held_out.targets) and average.load():
            selection.recompute_statistics()
            self._send_if_finite()
            yield Made("fine_tuned_average", self._model)

    def _fine_tune(self, precision_path: Path, after_step: AfterStep) -> None:
        fine_tune(
            self._model,
            self._data.train,
            self._run,
            round_number=self._job.round,
            planned_rounds=self._job.planned_rounds,
            device=self._device,
            precision_path=precision_path,
            after_step=after_step,
        )

    def _selection(self, name: str | None) -> Selection:
        """Return a selection with this candidate alone, which makes the candidate the best one."""
        previous = self._job.initial_weights if self._job.round > self._run.first_round else None
        run = self._run.model_copy(update={"candidates": (name,)})
        return Selection(
            Measuring(self._model, run, self._data, self._device),
            self._members,
            blob_path(self._blobs_dir, previous) if previous else None,
            scratch=self._scratch,
        )

    def _screened(self) -> list[Member]:
        """Decode all weights, clip the same updates as the trainer, and return the members that it kept."""
        for member in self._sent:
            make_weights(member, self._job, self._blobs_dir)
        if not self._result.audit:
            return self._sent
        start = common_start(self._sent, self._job)
        base_path = blob_path(self._blobs_dir, start) if start else None
        for member, agent in zip(self._sent, self._result.audit, strict=True):
            if agent.scale < 1:
                clip(member.weights_path, base_path, agent.scale, clipped_path(self._scratch, member))
        return Screening(agents=self._result.audit).kept(self._sent, self._scratch)

    def _send_if_finite(self) -> None:
        """Do what `_send` does; weights that are not finite cannot be sent, and are measured as they are."""
        with suppress(RunError, InvalidError):
            self._send()

    def _send(self) -> None:
        """Load the weights that would arrive at the agents, after encoding and decoding, into the model."""
        holds_base = all_hold_base(self._sent, self._run)
        base = base_of(self._job, self._blobs_dir) if holds_base else None
        directory = JobDirectory(self._scratch)
        with directory.scratch():
            wire, shared = wire_of(self._run.wire, base), shared_part(self._model, self._run)
            write_model(self._model, directory, wire, base, shared)
