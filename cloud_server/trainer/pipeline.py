"""The steps of a round: screen → select the start → fine-tune → publish what that made, or the start.

The start is published only if it is better beyond chance; see `Selection.offer`.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import structlog
import torch
from torch import nn

from ecavg.cloud_server.jobs import TRAINED, ClassScore, Job, JobDirectory, Progress, Result, TrainedName
from ecavg.cloud_server.state_dir import blob_path
from ecavg.cloud_server.trainer.audit import MIN_AGENTS
from ecavg.cloud_server.trainer.finetune import (
    CombinedData,
    combine,
    fine_tune,
    pseudo_labels,
    read_unlabelled,
    with_pseudo_labels,
)
from ecavg.cloud_server.trainer.group import Group
from ecavg.cloud_server.trainer.measuring import Measuring
from ecavg.cloud_server.trainer.members import all_hold_base, base_of, common_start, make_weights, members_of
from ecavg.cloud_server.trainer.moving_average import MovingAverage
from ecavg.cloud_server.trainer.output import Written, num_parameters, write_model
from ecavg.cloud_server.trainer.screening import Screening, screen
from ecavg.cloud_server.trainer.selection import Best, Selection
from ecavg.common import tracing
from ecavg.common.checkpoint import CHECKPOINT_SECONDS, CheckpointFile
from ecavg.common.config import RunConfig
from ecavg.common.errors import InvalidError, RunError
from ecavg.common.evaluation import Evaluation
from ecavg.common.faults import Point, crash_point
from ecavg.common.mapped import in_memory
from ecavg.common.models import build_model, shared_part
from ecavg.common.sharding import gather, is_sharded, load, shard
from ecavg.common.training import Examples, StepReport
from ecavg.common.wire import Base, is_encoded, wire_of

log = structlog.get_logger()


class Workplace(NamedTuple):
    """Where a job is done."""

    directory: JobDirectory
    # The directory of the blobs.
    blobs_dir: Path
    device: torch.device
    # This process's place among the ranks.
    group: Group
    # The least time between two checkpoints of the fine-tune.
    checkpoint_seconds: float = CHECKPOINT_SECONDS


class RoundPipeline:
    """The work on one round, step by step; within a group, every rank has a pipeline of its own."""

    def __init__(self, job: Job, at: Workplace) -> None:
        self._job = job
        self._run = job.run if job.attempt == 1 else _without_graphs(job.run)
        # The members of the round; screening removes some of them from this list.
        self._members = members_of(job, at.blobs_dir, at.directory.scratch_path)
        # The round's initial weights, which are the base of differences.
        self._base = base_of(job, at.blobs_dir)
        self._is_encoded = is_encoded(job.run)
        # The cloud's values for the parts of the model that do not travel.
        self._rest = blob_path(at.blobs_dir, job.initial_rest) if job.initial_rest else None
        self._directory, self._blobs_dir, self._device, self._group, self._checkpoint_seconds = at
        self._is_first = self._group.rank == 0
        self._screening = Screening()
        self._seconds: dict[str, float] = {}

    def run(self) -> Result:
        """Make the round's model and return the result.

        Only rank 0 writes the weights; the results of the other ranks are empty.
        """
        if not self._is_first:
            return self._make_model()
        with self._directory.scratch():
            return self._make_model()

    def _make_model(self) -> Result:
        """Do the steps of the round in order; on rank 0, the folder for intermediate files must exist."""
        sharded = self._sharded()
        # With a sharded model, rank 0 alone has a whole one, in the memory of its processor.
        model = _network(self._run) if self._is_first or sharded is None else sharded
        self._tell("aggregating", 0, 1)
        with self._timed("aggregate"):
            self._make_weights()
        base = self._base_of_published()
        self._screen(model)
        data = combine(
            self._run,
            [member.contribution for member in self._members],
            self._blobs_dir,
            are_mapped=self._group.world_size > 1,
        )
        log.info("data", num_train=len(data.train.targets), num_held_out=len(data.held_out.targets))
        measuring = Measuring(model, self._run, data, self._device, self._group, sharded)
        with self._timed("aggregate"):
            selection = self._select(measuring) if self._is_first else None
            if selection is None:
                measuring.serve()
        self._tell("fine_tuning", 0, 1)
        start = selection.take_best() if selection else None
        average = self._train(model, sharded, data)
        crash_point(Point.TRAINER_FINE_TUNED)
        if selection is None or start is None:
            measuring.serve()
            return Result()
        self._tell("evaluating", 0, 1)
        with self._timed("evaluate"):
            result = self._publish(model, average, data, selection, start, base)
            selection.end()
        self._tell("evaluating", 1, 1)
        return self._timestamped(result)

    def _sharded(self) -> nn.Module | None:
        """Return the model that the ranks have a part of each; None: each rank has the whole model."""
        return _sharded_network(self._run, self._group, self._device) if self._is_sharded else None

    @property
    def _is_sharded(self) -> bool:
        """Return True if each rank has a part of the model on its device."""
        return self._group.world_size > 1 and self._run.fine_tune.parallel == "fsdp"

    @property
    def _may_keep_start(self) -> bool:
        """Return True if the weights that the round started from are a candidate: they have been trained."""
        return self._job.round > self._job.run.first_round

    # ------------------------------------------------------------------ the steps

    def _make_weights(self) -> None:
        """Decode the weights that were sent, and shift stale ones; the other ranks wait for rank 0."""
        if self._is_first:
            for member in self._members:
                make_weights(member, self._job, self._blobs_dir)
        self._group.share("decoded")

    def _base_of_published(self) -> Base | None:
        """Return the base of the published model's differences, if every member has it; on rank 0 only."""
        return self._base if self._is_first and all_hold_base(self._members, self._run) else None

    def _screen(self, model: nn.Module | None) -> None:
        """Screen the members, and keep those from which the model is made, some with clipped weights.

        Args:
            model: a model of the run's structure; None: nothing is audited.
        """
        if len(self._members) < MIN_AGENTS:
            return
        scratch = self._directory.scratch_path
        if self._is_first:
            start = common_start(self._members, self._job)
            with self._timed("audit"):
                self._screening = screen(
                    model,
                    self._members,
                    blob_path(self._blobs_dir, start) if start else None,
                    self._blobs_dir,
                    run=self._run,
                    # A model that is sharded elsewhere may not fit this rank's GPU.
                    device=torch.device("cpu") if self._is_sharded else self._device,
                    scratch=scratch,
                    rest=self._rest,
                )
        shared = self._group.share(self._screening.model_dump_json())
        self._screening = Screening.model_validate_json(shared)
        self._members = self._screening.kept(self._members, scratch)

    def _select(self, measuring: Measuring) -> Selection:
        """Make the candidates on rank 0, and measure them on all ranks, to which the start comes later."""
        selection = Selection(
            measuring,
            self._members,
            self._base.path if self._base and self._may_keep_start else None,
            scratch=self._directory.scratch_path,
            rest=self._rest,
            on_tensor=lambda *_: crash_point(Point.TRAINER_TENSOR_AVERAGED),
        )
        with tracing.span("select"):
            selection.run(lambda done, total: self._tell("aggregating", done, total))
        return selection

    def _with_pseudo_labels(self, model: nn.Module, labelled: Examples) -> Examples:
        """Return what the fine-tune trains on.

        The start labels examples. Only rank 0 has it in its model, and tells the others; a sharded model is
        run by all ranks.
        """
        config = self._run.fine_tune_of(self._job.round)
        if not config.pseudo_label_confidence or not len(labelled.targets):
            return labelled
        contributions = [member.contribution for member in self._members]
        unlabelled = read_unlabelled(self._run, contributions, self._blobs_dir)
        if not len(unlabelled.targets):
            return labelled
        labels: list[int] = []
        if self._is_first or is_sharded(model):
            labels = pseudo_labels(model, in_memory(unlabelled.inputs), self._run, self._device)
        labels = json.loads(self._group.share(json.dumps(labels)))
        examples = with_pseudo_labels(labelled, unlabelled, labels)
        log.info("pseudo_labels", num_labels=len(examples.targets) - len(labelled.targets))
        return examples

    def _train(self, model: nn.Module, sharded: nn.Module | None, data: CombinedData) -> MovingAverage | None:
        """Fine-tune what rank 0 has in its model, and return the average, if the run keeps one.

        With a sharded model, the weights go to the ranks, and then back to rank 0.
        """
        if sharded is None:
            return self._fine_tune(model, self._with_pseudo_labels(model, data.train))
        whole = model if self._is_first else None
        load(sharded, whole.state_dict() if whole else {}, self._group)
        average = self._fine_tune(sharded, self._with_pseudo_labels(sharded, data.train))
        gather(sharded, whole)
        return average.gathered(whole) if average else None

    def _fine_tune(self, model: nn.Module, examples: Examples) -> MovingAverage | None:
        """Fine-tune the model in place, if there are examples; return its average, if the run keeps one.

        All ranks have the same weights after each step, so that one of each machine keeps their average;
        of a sharded model, each rank keeps its part.
        """
        if not len(examples.targets):
            # No agent has shared any data.
            return None
        decay = self._run.fine_tune.ema_decay
        is_keeper = self._group.local_rank == 0 or is_sharded(model)
        average = MovingAverage(model, decay) if decay and is_keeper else None
        path = self._directory.checkpoint_path
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint = CheckpointFile(path, self._checkpoint_seconds, self._job.training_id, average)
        with self._timed("fine_tune"):
            fine_tune(
                model,
                examples,
                self._run,
                round_number=self._job.round,
                planned_rounds=self._job.planned_rounds,
                has_full_curve=self._job.has_full_curve,
                device=self._device,
                precision_path=self._directory.precision_path,
                on_step=self._tell_step if self._is_first else None,
                after_step=average.update if average else lambda: None,
                ranks=self._group,
                checkpoint=checkpoint,
            )
        return average

    def _publish(
        self,
        model: nn.Module,
        average: MovingAverage | None,
        data: CombinedData,
        selection: Selection,
        start: Best,
        base: Base | None,
    ) -> Result:
        """Write the best of the start and what the fine-tune has made; return the result with all scores."""
        written, latest, scores = None, "", {}
        for latest in _trained(average, data, selection):
            written = self._write_early(model, base)
            if measured := selection.offer(latest):
                scores[f"score_{latest}"] = measured.score
        published = selection.take_best()
        if not written or published.name != latest:
            written = self._write(model, base)
            if written.encoded:
                # Encoding has rounded the model since it was measured, so it is measured again.
                published = published._replace(evaluation=selection.measure())
        log.info("selected", start=start.name, published=published.name, scores=selection.scores)
        return Result(
            weights=written.weights,
            encoded=written.encoded,
            rest=written.rest,
            candidates=selection.scores,
            start=start.name,
            metric=selection.metric,
            soup=selection.soup,
            published=next((name for name in TRAINED if name == published.name), "start"),
            **scores,
            score_published=published.evaluation and published.evaluation.score,
            figures=dict(published.evaluation.figures) if published.evaluation else {},
            classes=_by_class(start.evaluation, published.evaluation),
            audit=self._screening.agents,
            audit_note=self._screening.note,
            num_parameters=num_parameters(model),
        )

    # ------------------------------------------------------------------ small parts

    def _timestamped(self, result: Result) -> Result:
        """Return the result with the seconds that the steps have taken."""
        return result.model_copy(update={"seconds": self._seconds, "finished_at": time.time()})

    def _write_early(self, model: nn.Module, base: Base | None) -> Written | None:
        """Write the files of a model that is not measured yet, where the weights travel encoded.

        So its score is that of the model which the agents will have. A model that is not finite cannot be
        encoded, and None is returned. Either another model is better, or it is written again, which raises
        the same error.
        """
        if self._is_encoded:
            with suppress(RunError, InvalidError):
                return self._write(model, base)
        return None

    def _write(self, model: nn.Module, base: Base | None) -> Written:
        """Write the files of the model."""
        wire, shared = wire_of(self._run.wire, base), shared_part(model, self._run)
        return write_model(model, self._directory, wire, base, shared)

    def _tell_step(self, report: StepReport) -> None:
        """Report a step of the fine-tune as progress."""
        self._tell("fine_tuning", report.step, report.num_steps, report.loss)
        crash_point(Point.TRAINER_STEP_DONE)

    def _tell(
        self,
        phase: Literal["aggregating", "fine_tuning", "evaluating"],
        done: int,
        total: int,
        loss: float | None = None,
    ) -> None:
        """Report progress, on rank 0 only."""
        if self._is_first:
            self._directory.append_progress(Progress(phase=phase, done=done, total=total, loss=loss))

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        """Add the duration of the context to the seconds of the step `what`."""
        started = time.perf_counter()
        with tracing.span(what.replace("_", "-")):
            yield
        self._seconds[what] = self._seconds.get(what, 0.0) + time.perf_counter() - started


def _without_graphs(run: RunConfig) -> RunConfig:
    """Return the run without CUDA graphs, with which it makes the same model.

    A first attempt may have failed because of them: an error that the GPU reports is not always to be caught.
    """
    fine_tune = run.fine_tune.model_copy(update={"graphs": "off"})
    return run.model_copy(update={"fine_tune": fine_tune})


def _trained(
    average: MovingAverage | None, data: CombinedData, selection: Selection
) -> Iterator[TrainedName]:
    """Yield the name of each model that the fine-tune has made; its weights are then in the model."""
    if not len(data.train.targets):
        return
    yield "fine_tuned"
    # Without held-out data nothing says whether the average is better.
    if average and len(data.held_out.targets) and average.load():
        selection.recompute_statistics()
        yield "fine_tuned_average"


@lru_cache(maxsize=1)
def _network(run: RunConfig) -> nn.Module:
    """Return the run's network, which is built once for all rounds; every round loads its own weights."""
    return build_model(run)


@lru_cache(maxsize=1)
def _sharded_network(run: RunConfig, group: Group, device: torch.device) -> nn.Module:
    """Return the run's network, sharded over the ranks; as `_network`, it is built once for all rounds."""
    return shard(build_model(run), group, device)


def _by_class(start: Evaluation | None, published: Evaluation | None) -> tuple[ClassScore, ...]:
    """Return the scores of start and published model for each class that has held-out examples."""
    if start is None or published is None:
        return ()
    return tuple(
        ClassScore(
            label=label,
            num_examples=before.num_examples,
            score_start=before.score,
            score_published=published.by_class[label].score,
        )
        for label, before in start.by_class.items()
    )
