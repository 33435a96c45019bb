"""One job, from job.json to result.json."""

import errno
import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import structlog
import torch
from torch import Tensor, nn

from cloud_server.jobs import (
    ClassAccuracy,
    EncodedWeights,
    Job,
    JobDirectory,
    JobError,
    Progress,
    Result,
    Weights,
)
from cloud_server.state_dir import blob_path
from cloud_server.trainer.aggregation import coefficients
from cloud_server.trainer.audit import MIN_AGENTS
from cloud_server.trainer.finetune import CombinedData, Examples, combine, fine_tune, soft_labels
from cloud_server.trainer.group import Group
from cloud_server.trainer.initial import initial_model
from cloud_server.trainer.screening import Screening, clipped_path, screen
from cloud_server.trainer.selection import Contributed, OnCandidate, Selection
from common.config import RunConfig, Wire
from common.errors import ECAvgError, InvalidError, RunError, UsageError
from common.faults import Point, crash_point
from common.models import build_model
from common.schema import read_header
from common.training import Evaluation, StepReport
from common.transfer import blob_of
from common.weights import load_into, write_state_dict
from common.wire import Base, decode, encode, encoding_of, wire_of, wire_schema

log = structlog.get_logger()


def run_job(directory: JobDirectory, *, blobs_dir: Path, device_name: str, group: Group) -> None:
    """Do the job and write its result; that something went wrong is a result, too.

    Within a group every rank calls this, and rank 0 writes. But whichever rank fails writes why, and
    raises: the others may be waiting for it in the middle of a step, so that only a new group can go on.

    Args:
        device_name: where to train when the job leaves it open.

    Raises:
        OSError: the result cannot be written.
        Exception: what went wrong, when this process cannot do another job.
    """
    with structlog.contextvars.bound_contextvars(job=directory.path.name, rank=group.rank):
        try:
            result = _do(directory, blobs_dir, device_name, group)
            if group.rank == 0:
                directory.write_result(result)
                crash_point(Point.TRAINER_RESULT_WRITTEN)
            log.info("job_done", seconds=result.seconds, accuracy=result.accuracy_published)
        except Exception as error:  # model and data are the user's: anything can be raised
            log.exception("job_failed")
            if directory.read_result() is None:
                directory.write_result(Result(error=_describe(error)))
            # After a CUDA error (other than out of memory) nothing works on that GPU any more.
            if group.world_size > 1 or isinstance(error, torch.AcceleratorError):
                raise
    gc.collect()
    torch.cuda.empty_cache()


def _do(directory: JobDirectory, blobs_dir: Path, device_name: str, group: Group) -> Result:
    job = directory.read_job()
    device = group.device(device_name if job.device == "auto" else job.device)
    log.info("job_started", round=job.round, attempt=job.attempt, device=str(device))
    if group.rank == 0:
        directory.discard_output()
    crash_point(Point.TRAINER_JOB_TAKEN)
    if job.kind == "round":
        return RoundJob(job, directory, blobs_dir, device, group).run()
    return _initialise(job, directory, group)


def _initialise(job: Job, directory: JobDirectory, group: Group) -> Result:
    """Make the run's initial weights."""
    if group.rank != 0:
        return Result()
    model = initial_model(job.run)
    with directory.scratch():
        written = _write(model, directory, wire_of(job.run.wire, None), None)
    wire_schema(read_header(directory.weights_path).schema, job.run.wire)  # later it would be too late
    return Result(weights=written.weights, encoded=written.encoded, num_parameters=_num_parameters(model))


class Written(NamedTuple):
    """The files of a model."""

    weights: Weights
    encoded: EncodedWeights | None


class RoundJob:
    """Makes a round's global model: screen → select the start → fine-tune → publish the better of the two.

    Args:
        on_candidate: called on rank 0 with the name and the model of each candidate, and of the
            fine-tuned model; for experiments.
    """

    def __init__(
        self,
        job: Job,
        directory: JobDirectory,
        blobs_dir: Path,
        device: torch.device,
        group: Group,
        on_candidate: OnCandidate | None = None,
    ) -> None:
        self._job = job
        self._run: RunConfig = job.run
        contributions = sorted(job.contributions, key=lambda contribution: contribution.agent_id)
        self._contributions = contributions
        weighted = coefficients([item.num_examples for item in contributions], job.run.weights)
        self._sent = [blob_path(blobs_dir, item.weights_digest) for item in contributions]
        self._is_encoded = job.run.wire != "float32"
        self._contributed = [
            Contributed(
                item.agent_id,
                directory.scratch_path / f"decoded-{index}.safetensors" if self._is_encoded else sent,
                coefficient,
            )
            for index, (item, sent, coefficient) in enumerate(
                zip(contributions, self._sent, weighted, strict=True)
            )
        ]
        self._directory = directory
        self._blobs_dir = blobs_dir
        self._device = device
        self._group = group
        self._is_first = group.rank == 0
        self._screening = Screening()
        self._on_candidate = on_candidate
        self._seconds: dict[str, float] = {}

    def run(self) -> Result:
        """The result; it means something on rank 0 only, which also writes the weights."""
        if not self._is_first:
            return self._make_model()
        with self._directory.scratch():
            return self._make_model()

    def _make_model(self) -> Result:
        model = _network(self._run)
        self._tell("aggregating", 0, 1)
        with self._timed("aggregate"):
            self._decode()
        self._screen(model)
        data = combine(self._run, self._contributions, self._blobs_dir)
        log.info("data", num_train=len(data.train.labels), num_held_out=len(data.held_out.labels))
        with self._timed("aggregate"):
            selection = self._select(model, data) if self._is_first else None
        self._tell("fine_tuning", 0, 1)
        teaching = self._teach(model, data.train)
        start = selection.take_best() if selection else None  # now: the teachers have been in the model
        self._fine_tune(model, data.train, teaching)
        crash_point(Point.TRAINER_FINE_TUNED)
        if selection is None or start is None:
            return Result()

        self._tell("evaluating", 0, 1)
        with self._timed("evaluate"):
            written, fine_tuned = None, None
            if len(data.train.labels):
                if self._is_encoded:  # now: it is measured as the agents will have it
                    with suppress(RunError, InvalidError):  # not finite: it will lose, or be told of below
                        written = self._write(model)
                fine_tuned = selection.offer("fine_tuned")
                if self._on_candidate:
                    self._on_candidate("fine_tuned", model)
            published = selection.take_best()
            if not written or published.name != "fine_tuned":
                written = self._write(model)
                if written.encoded:  # it is not quite the same model
                    published = published._replace(evaluation=selection.measure())
        self._tell("evaluating", 1, 1)
        log.info("selected", start=start.name, published=published.name, accuracies=selection.accuracies)
        classes: tuple[ClassAccuracy, ...] = ()
        if start.evaluation and published.evaluation:
            classes = tuple(_by_class(data.held_out.labels, start.evaluation, published.evaluation))
        return Result(
            weights=written.weights,
            encoded=written.encoded,
            candidates=selection.accuracies,
            start=start.name,
            soup=selection.soup,
            published="fine_tuned" if published.name == "fine_tuned" else "start",
            accuracy_fine_tuned=fine_tuned and fine_tuned.accuracy,
            accuracy_published=published.evaluation and published.evaluation.accuracy,
            classes=classes,
            audit=self._screening.agents,
            audit_note=self._screening.note,
            seconds=self._seconds,
            num_parameters=_num_parameters(model),
            finished_at=time.time(),
        )

    def _select(self, model: nn.Module, data: CombinedData) -> Selection:
        """Rank 0's part: the others get the start's weights when the fine-tune begins."""
        previous = None
        if self._job.initial_weights and self._job.round > 1:
            previous = blob_path(self._blobs_dir, self._job.initial_weights)
        selection = Selection(
            model,
            self._run,
            self._contributed,
            previous,
            data,
            device=self._device,
            scratch=self._directory.scratch_path,
            on_candidate=self._on_candidate,
            on_tensor=lambda *_: crash_point(Point.TRAINER_TENSOR_AVERAGED),
        )
        selection.run(lambda done, total: self._tell("aggregating", done, total))
        return selection

    def _decode(self) -> None:
        """Leave what the agents have sent decoded in files; the other ranks wait for them."""
        if not self._is_encoded:
            return
        if self._is_first:
            for sent, contributed in zip(self._sent, self._contributed, strict=True):
                decode(sent, contributed.weights, base=self._base)
        self._group.share("decoded")

    def _screen(self, model: nn.Module) -> None:
        """Leave in `_contributions` and `_contributed` what the model shall be made of."""
        if len(self._contributions) < MIN_AGENTS:
            return
        if self._is_first:
            with self._timed("audit"):
                self._screening = screen(
                    model,
                    [item.weights for item in self._contributed],
                    self._common_start,
                    self._contributions,
                    self._blobs_dir,
                    run=self._run,
                    device=self._device,
                    scratch=self._directory.scratch_path,
                )
        shared = self._group.share(self._screening.model_dump_json())
        self._screening = Screening.model_validate_json(shared)
        kept = [number for number, agent in enumerate(self._screening.agents) if not agent.left_out]
        for number in kept:
            if self._screening.agents[number].scale < 1:
                clipped = clipped_path(self._directory.scratch_path, number)
                self._contributed[number] = self._contributed[number]._replace(weights=clipped)
        self._contributions = [self._contributions[number] for number in kept]
        self._contributed = [self._contributed[number] for number in kept]

    @property
    def _common_start(self) -> Path | None:
        """The weights that every agent's pre-training began with; None: there are no such weights."""
        starts = {item.initial_digest for item in self._contributions}
        digest = starts.pop() if len(starts) == 1 else None
        return blob_path(self._blobs_dir, digest) if digest else None

    def _write(self, model: nn.Module) -> Written:
        """The difference is taken from what all agents hold, as those know who have sent one themselves."""
        base = self._base if self._hold_base() else None
        return _write(model, self._directory, wire_of(self._run.wire, base), base)

    def _hold_base(self) -> bool:
        return self._run.wire == "int8" and all(
            encoding_of(read_header(sent)).wire == "int8" for sent in self._sent
        )

    @property
    def _base(self) -> Base | None:
        """The round's initial weights."""
        digest = self._job.initial_weights
        return Base(blob_path(self._blobs_dir, digest), digest) if digest else None

    def _fine_tune(self, model: nn.Module, examples: Examples, teaching: Tensor | None) -> None:
        if not len(examples.labels):
            return  # no agent has shared any
        with self._timed("fine_tune"):
            fine_tune(
                model,
                examples,
                self._run,
                round_number=self._job.round,
                device=self._device,
                precision_file=self._directory.precision_path,
                soft_labels=teaching,
                on_step=self._tell_step if self._is_first else None,
                rank=self._group.rank,
                world_size=self._group.world_size,
            )

    def _teach(self, model: nn.Module, examples: Examples) -> Tensor | None:
        """What the agents' models make of the examples; every rank finds out for itself."""
        if not self._run.fine_tune.distill or not len(examples.labels):
            return None
        with self._timed("fine_tune"):
            return soft_labels(
                model,
                [item.weights for item in self._contributed],
                [item.coefficient for item in self._contributed],
                examples.images,
                spec=self._run.spec,
                device=self._device,
            )

    def _tell_step(self, report: StepReport) -> None:
        self._tell("fine_tuning", report.step, report.num_steps, report.loss)
        crash_point(Point.TRAINER_STEP_DONE)

    def _tell(
        self,
        phase: Literal["aggregating", "fine_tuning", "evaluating"],
        done: int,
        total: int,
        loss: float | None = None,
    ) -> None:
        if self._is_first:
            self._directory.append_progress(Progress(phase=phase, done=done, total=total, loss=loss))

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._seconds[what] = self._seconds.get(what, 0.0) + time.perf_counter() - started


@lru_cache(maxsize=1)
def _network(run: RunConfig) -> nn.Module:
    """The run's model, built once for all rounds: a model is its state_dict, and that is replaced."""
    return build_model(run, seed=run.seed)


def _by_class(labels: Tensor, start: Evaluation, published: Evaluation) -> Iterator[ClassAccuracy]:
    """How well each class among the labels (int64 [N]) is known, before and after."""
    counts = torch.bincount(labels)
    before, after = (
        torch.bincount(labels[evaluation.correct], minlength=len(counts)) for evaluation in (start, published)
    )
    for label, count in enumerate(counts.tolist()):
        if count:
            yield ClassAccuracy(
                label=label,
                num_examples=count,
                accuracy_start=before[label].item() / count,
                accuracy_published=after[label].item() / count,
            )


def _write(model: nn.Module, directory: JobDirectory, wire: Wire, base: Base | None) -> Written:
    """Write the model as the agents will have it, who decode it; it is left with the same weights.

    What rounding takes away is not fed back in the next round, as the agents do it. What they send becomes a
    part of a mean, and what they have lost is nowhere else. Here a whole model is sent, and the next round's
    pre-training and fine-tune begin with the weights that have arrived: what these lack, they learn again.
    """
    state_dict = model.state_dict()
    for name, tensor in state_dict.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise RunError(f"tensor {name} of the new model is not finite: lower run.fine_tune.learning_rate")
    if wire == "float32":
        write_state_dict(state_dict, directory.weights_path)
        encoded = None
    else:
        exact = directory.scratch_path / "exact.safetensors"
        write_state_dict(state_dict, exact)
        encode(exact, directory.encoded_path, wire, base=base)
        decode(directory.encoded_path, directory.weights_path, base=base)
        load_into(model, directory.weights_path)
        described = _described(directory.encoded_path)
        encoded = EncodedWeights(**described.model_dump(), base=base.digest if base else None)
    crash_point(Point.TRAINER_WEIGHTS_WRITTEN)
    return Written(_described(directory.weights_path), encoded)


def _described(path: Path) -> Weights:
    digest, size_bytes = blob_of(path)
    return Weights(sha256=digest, bytes=size_bytes)


def _num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _describe(error: Exception) -> JobError:
    """One line for whoever waits for the model; the log has the rest."""
    text = str(error).partition("\n")[0]
    if isinstance(error, UsageError):
        return JobError(kind="usage", message=text)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text:
        return JobError(kind="out_of_memory", message=f"training ran out of memory: {text}")
    if _is_full_disk(error):
        return JobError(kind="storage", message=f"the server's disk takes no data: {text}")
    if isinstance(error, ECAvgError):
        return JobError(kind="failed", message=text)
    return JobError(kind="failed", message=f"{type(error).__name__}: {text}; see trainer.log")


def _is_full_disk(error: Exception) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return True
    return f"os error {errno.ENOSPC})" in str(error)  # how safetensors says it
