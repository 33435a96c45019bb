"""The job directory: all that the server and the trainer say to each other, both ends of it.

    STATE/jobs/round-0003/
        job.json            what to do; written by the server
        progress.jsonl      how far it is, a line at a time; from here on written by the trainer
        scratch/            what it needs on the way
        encoded.safetensors the weights it made, encoded for the way to the agents; not for wire = "float32"
        model.safetensors   the weights it made: what decoding the former gives
        result.json         last of all: the job is over, well or badly

A job is pending while it has a job.json and no result.json. It may be killed at any moment: whoever
takes it up again starts from the beginning and gets the same bytes.
"""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import Field, ValidationError

from cloud_server.contribution import Contribution
from cloud_server.state_dir import StateDir
from common.config import FrozenModel, RunConfig
from common.errors import Reason, RunError
from common.files import replacing, sync

# What the audit holds against an agent: that others contradict its labels, or that its model fails.
Flag = Literal["labels", "model"]

_ROUND_JOB = re.compile(r"round-(\d+)")

_Model = TypeVar("_Model", bound=FrozenModel)


class Weights(FrozenModel):
    """A safetensors file of weights."""

    sha256: str
    bytes: int


class EncodedWeights(Weights):
    """The same weights, encoded (common/wire.py)."""

    base: str | None  # digest of the weights that differences were taken from; None: there are none


class Job(FrozenModel):
    """What the trainer is asked to do: make the run's initial weights, or a round's global model."""

    kind: Literal["initialise", "round"]
    name: str  # of the job's directory
    round: int  # from 1 on; 0: initialise
    attempt: int = 1
    run: RunConfig
    device: str  # "auto": the trainer's own
    initial_weights: str | None  # digest; what the agents' pre-training started from
    contributions: tuple[Contribution, ...] = ()


class Progress(FrozenModel):
    """How far the job is; the phases follow each other in this order and each appears at least once."""

    phase: Literal["aggregating", "fine_tuning", "evaluating"]
    done: int  # tensors, steps or evaluations
    total: int  # at least 1
    loss: float | None = None  # fine_tuning: mean since the line before; None where it is not finite


class JobError(FrozenModel):
    """Why a job gave no model."""

    # usage: it would fail the same way again; storage: the disk takes no data now
    kind: Literal["usage", "out_of_memory", "storage", "failed"]
    message: str  # one line


class ClassAccuracy(FrozenModel):
    """How well the models of a round know one class, on the held-out part of the combined data."""

    label: int
    num_examples: int  # held out
    accuracy_start: float
    accuracy_published: float


class AgentAudit(FrozenModel):
    """What a round of three agents or more has found out about one of them.

    The shares are explained in trainer/audit.py; None: there is nothing to compare.
    """

    agent_id: str
    update_norm: float  # Euclidean; as much as float64 can say, or more
    norm_ratio: float | None  # to the median of the round; None: that is 0, or beyond float64
    scale: float = 1.0  # what the update was multiplied with; below 1: it was clipped
    label_share: float | None = None  # of its labels, what the others agree with
    label_share_expected: float | None = None
    label_loss: float | None = None  # of what the others predict, nats
    model_share: float | None = None  # of the others' examples, what its model is right about
    model_share_expected: float | None = None
    flags: tuple[Flag, ...] = ()
    left_out: Reason | None = None  # LARGE_UPDATE or QUARANTINED: the round's model has nothing of it


class Result(FrozenModel):
    """How a job ended. Accuracies are of the held-out part of the combined data, None without one."""

    weights: Weights | None = None  # of model.safetensors; None: see error
    encoded: EncodedWeights | None = None  # of encoded.safetensors; None: weights travel as they are
    candidates: dict[str, float] = Field(default_factory=dict)  # accuracy of each possible start
    start: str | None = None  # the candidate that was fine-tuned
    soup: tuple[str, ...] = ()  # agent ids of the greedy soup
    published: Literal["start", "fine_tuned"] | None = None
    accuracy_fine_tuned: float | None = None
    accuracy_published: float | None = None
    classes: tuple[ClassAccuracy, ...] = ()  # those with examples, by label
    audit: tuple[AgentAudit, ...] = ()  # by agent id; none of fewer than three agents
    audit_note: str = ""  # why agents that were flagged are not left out, though they should be
    seconds: dict[str, float] = Field(default_factory=dict)  # "audit", "aggregate", "fine_tune", "evaluate"
    error: JobError | None = None
    num_parameters: int | None = None
    finished_at: float | None = None  # seconds since the epoch


@dataclass(frozen=True)
class JobDirectory:
    """One job's directory; see the top of this file."""

    path: Path

    @property
    def weights_path(self) -> Path:
        return self.path / "model.safetensors"

    @property
    def precision_path(self) -> Path:
        """Beside all jobs: in which precision this machine trains fastest."""
        return StateDir(self.path.parents[1]).precision

    @property
    def encoded_path(self) -> Path:
        return self.path / "encoded.safetensors"

    @property
    def scratch_path(self) -> Path:
        return self.path / "scratch"

    def write_job(self, job: Job) -> None:
        """Ask for the job, also when an earlier attempt at it has ended.

        Raises:
            OSError: the files cannot be written.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        sync(self.path.parent)
        self._progress_path.unlink(missing_ok=True)
        is_new_attempt = self._result_path.exists()  # otherwise a result is soon there: of this very job
        _write(self._job_path, job)
        # Only now may it be pending: no trainer shall take up a new attempt with the old job.json.
        if is_new_attempt:
            self._result_path.unlink()

    def withdraw(self) -> None:
        """Ask for the job no more: no trainer takes it up again.

        Raises:
            OSError: the folder does not let it.
        """
        self._job_path.unlink(missing_ok=True)
        sync(self.path)

    def remove(self) -> None:
        """Remove the job; one half removed is never pending.

        Raises:
            OSError: the folder does not let it.
        """
        if not self.path.exists():
            return
        self.withdraw()  # first: without its result it would be taken up again
        shutil.rmtree(self.path)

    def read_job(self) -> Job:
        """Raises: RunError, there is no readable job."""
        job = _read(Job, self._job_path)
        if job is None:
            raise RunError(f"{self._job_path} is missing")
        return job

    def discard_output(self) -> None:
        """Remove what an attempt that did not end may have left."""
        self._progress_path.unlink(missing_ok=True)
        for path in (self.weights_path, self.encoded_path):
            path.unlink(missing_ok=True)
        self.discard_scratch()

    def discard_scratch(self) -> None:
        """Remove what a trainer that was killed has left of its way."""
        shutil.rmtree(self.scratch_path, ignore_errors=True)

    @contextmanager
    def scratch(self) -> Iterator[None]:
        """Have an empty folder at `scratch_path`, for as long as it is needed."""
        self.scratch_path.mkdir()
        try:
            yield
        finally:
            self.discard_scratch()

    def append_progress(self, progress: Progress) -> None:
        """Not made durable: after a crash of the machine the job starts again anyway."""
        with self._progress_path.open("a", encoding="utf-8") as file:
            file.write(progress.model_dump_json() + "\n")

    def read_progress(self, offset: int) -> tuple[list[Progress], int]:
        """The complete lines from byte `offset` on, and the offset to go on from.

        Starts again at the first line when the file was begun anew since.
        """
        try:
            with self._progress_path.open("rb") as file:
                if file.seek(0, 2) < offset:
                    offset = 0
                file.seek(offset)
                lines, newline, _ = file.read().rpartition(b"\n")
        except FileNotFoundError:
            return [], 0
        return list(_parse_progress(lines)), offset + len(lines) + len(newline)

    def write_result(self, result: Result) -> None:
        """End the job; everything else must be in place.

        Raises:
            OSError: the file cannot be written.
        """
        _write(self._result_path, result)

    def read_result(self) -> Result | None:
        """None while the job is pending. Raises: RunError, the file is damaged."""
        return _read(Result, self._result_path)

    @property
    def is_begun(self) -> bool:
        return self._job_path.exists()

    @property
    def is_pending(self) -> bool:
        return not self._result_path.exists() and self._job_path.exists()

    @property
    def _job_path(self) -> Path:
        return self.path / "job.json"

    @property
    def _progress_path(self) -> Path:
        return self.path / "progress.jsonl"

    @property
    def _result_path(self) -> Path:
        return self.path / "result.json"


def job_name(number: int) -> str:
    """Of the directory of a round's job."""
    return f"round-{number:04d}"


def round_job(state_dir: StateDir, number: int) -> JobDirectory:
    """Return the directory of a round's job."""
    return JobDirectory(state_dir.job(job_name(number)))


def round_jobs(state_dir: StateDir) -> Iterator[tuple[int, JobDirectory]]:
    """Yield the rounds whose jobs are on the disk, in no order, each with its job."""
    for path in list(state_dir.jobs.glob("round-*")):
        if match := _ROUND_JOB.fullmatch(path.name):
            yield int(match[1]), JobDirectory(path)


def pending_jobs(jobs_dir: Path) -> list[JobDirectory]:
    """The jobs that wait to be done, or to be done again, by name; none when there is no such folder."""
    try:
        paths = sorted(jobs_dir.iterdir())
    except FileNotFoundError:
        return []
    return [directory for directory in map(JobDirectory, paths) if directory.is_pending]


def _write(path: Path, model: FrozenModel) -> None:
    with replacing(path) as partial:
        partial.write_text(model.model_dump_json(indent=2) + "\n", "utf-8")


def _read(model: type[_Model], path: Path) -> _Model | None:
    try:
        return model.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise RunError(f"{path} is damaged: remove its folder, and the job is done again") from error


def _parse_progress(lines: bytes) -> Iterator[Progress]:
    for line in lines.splitlines():
        try:
            yield Progress.model_validate_json(line)
        except ValidationError:
            continue  # the file was begun anew and has grown past the offset: a part of a line
