"""The job directory, by which the server and the trainer exchange everything, with the code of both ends.

    STATE/jobs/round-0003/
        job.json            the job; the server writes this file, and the trainer writes all the others
        progress.jsonl      the progress of the job, one line for each report
        scratch/            intermediate files
        checkpoint/         the last finished epoch of the fine-tune
        encoded.safetensors the new weights, encoded for the agents; missing if wire = "float32"
        rest.safetensors    the parts of the cloud's model that do not travel; missing if all parts do
        model.safetensors   the new weights; if they are encoded, the result of decoding encoded.safetensors
        result.json         the result or the error; this file is written last

A job is pending while it has a job.json and no result.json. The trainer may be killed at any moment. The
next trainer then does the job again, but for the epochs that a checkpoint has, and makes the same bytes.
"""

import hashlib
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar, get_args

from pydantic import Field, ValidationError

from ecavg.cloud_server.contribution import Contribution
from ecavg.cloud_server.state_dir import StateDir
from ecavg.common.config import FrozenModel, RunConfig, Scored
from ecavg.common.errors import Reason, RunError
from ecavg.common.files import replacing, sync

# The objections of the audit to an agent: "labels", the other models contradict the agent's labels; "model",
# the agent's model fails on the images of the others.
Flag = Literal["labels", "model"]

_ROUND_JOB = re.compile(r"round-(\d+)")

_Model = TypeVar("_Model", bound=FrozenModel)


class WeightsFile(FrozenModel):
    """The digest and the size of a safetensors file of weights."""

    sha256: str
    bytes: int


class EncodedWeightsFile(WeightsFile):
    """The digest and the size of a file of encoded weights (common/wire.py), and the base of the encoding."""

    # The digest of the weights from which differences were taken; None: the encoding has no differences.
    base: str | None


class Job(FrozenModel):
    """A task for the trainer: to make or warm up the run's initial weights, or to make a global model."""

    kind: Literal["initialise", "warm_up", "round"]
    # The name of the job's directory.
    name: str
    # The number of the round, from 1 on; 0 for the warm-up, and for the job that makes the initial weights.
    round: int
    attempt: int = 1
    run: RunConfig
    # The device to train on; "auto" leaves the choice to the trainer.
    device: str
    # The digest of the weights from which the agents' pre-training started.
    initial_weights: str | None
    # The digest of the cloud's values for the parts of the model that do not travel; None: all parts do.
    initial_rest: str | None = None
    contributions: tuple[Contribution, ...] = ()
    # How many rounds the learning-rate schedule of the run is for.
    planned_rounds: int = 1
    # True if the learning rate takes a full curve in this round after the plan.
    has_full_curve: bool = False
    # The span of the server that the job belongs to; None: the round is not traced. See common/tracing.py.
    traceparent: str | None = None

    @property
    def id(self) -> str:
        """Return what tells the job from others of its name: another attempt, or other contributions.

        A server that starts again gives the same job below another span.
        """
        return hashlib.sha256(self.model_dump_json(exclude={"traceparent"}).encode()).hexdigest()[:16]

    @property
    def training_id(self) -> str:
        """Return what tells the job's fine-tune from others; it is the same in each attempt."""
        work = self.model_dump_json(exclude={"attempt", "device", "traceparent"})
        return hashlib.sha256(work.encode()).hexdigest()

    @property
    def blobs(self) -> list[str]:
        """Return the digests of all blobs that the job reads."""
        digests = [self.initial_weights, self.initial_rest]
        for item in self.contributions:
            # Stale weights are shifted from what they started from.
            digests += [*item.blob_digests, item.initial_digest if item.staleness else None]
        return [digest for digest in dict.fromkeys(digests) if digest]


class Progress(FrozenModel):
    """One report of a job's progress. The phases follow in this order, and each is reported at least once."""

    phase: Literal["aggregating", "fine_tuning", "evaluating"]
    # The number of candidates, steps or evaluations that are done.
    done: int
    # The number of all candidates, steps or evaluations of the phase, at least 1.
    total: int
    # The mean loss of the fine-tune since the previous report; None if the mean is not finite.
    loss: float | None = None


class JobError(FrozenModel):
    """The reason why a job made no model."""

    # "usage": every further attempt would fail in the same way; "storage": the disk takes no data now.
    kind: Literal["usage", "out_of_memory", "storage", "failed"]
    # One line for the person at the terminal.
    message: str
    # The attempt that has failed; None if the job could not be read.
    attempt: int | None = None


class ClassScore(Scored):
    """The scores of a round's models on one class, in the held-out part of the combined data."""

    label: int
    # The number of held-out examples of the class.
    num_examples: int
    score_start: float
    score_published: float


class AgentAudit(FrozenModel):
    """The findings about one agent, in a round of three agents or more.

    trainer/audit.py explains the shares. A share or loss is None if there is nothing to compare.
    """

    agent_id: str
    # The Euclidean norm of the update; a norm beyond float64 is recorded as the largest float64.
    update_norm: float
    # The norm divided by the median norm of the round; None if the median is 0 or beyond float64.
    norm_ratio: float | None
    # The factor by which the update was multiplied; below 1, the update was clipped.
    scale: float = 1.0
    # The share of the agent's labels with which the models of the others agree.
    label_share: float | None = None
    label_share_expected: float | None = None
    # The mean cross-entropy between the others' prediction and the agent's labels, in nats.
    label_loss: float | None = None
    # The share of the others' examples that the agent's model classifies correctly.
    model_share: float | None = None
    model_share_expected: float | None = None
    flags: tuple[Flag, ...] = ()
    # LARGE_UPDATE or QUARANTINED if the round's model was made without this agent's contribution.
    left_out: Reason | None = None


# The models that a fine-tune makes: as it ends, and the moving average of its weights.
TrainedName = Literal["fine_tuned", "fine_tuned_average"]
TRAINED: tuple[TrainedName, ...] = get_args(TrainedName)


class Result(Scored):
    """The outcome of a job.

    Scores are measured on the held-out part of the combined data; they are None if there is no such data.
    """

    # The file model.safetensors; None if the job failed, see `error`.
    weights: WeightsFile | None = None
    # The file encoded.safetensors; None if the weights travel without an encoding.
    encoded: EncodedWeightsFile | None = None
    # The file rest.safetensors; None if all parts of the model travel.
    rest: WeightsFile | None = None
    # The score of each candidate, by name.
    candidates: dict[str, float] = Field(default_factory=dict)
    # The name of the candidate that was fine-tuned.
    start: str | None = None
    # The name of the figure that the scores are; empty where nothing was measured.
    metric: str = ""
    # The ids of the agents in the greedy soup.
    soup: tuple[str, ...] = ()
    published: Literal["start"] | TrainedName | None = None
    score_fine_tuned: float | None = None
    # Of the moving average of the fine-tune's weights; None if the run keeps none.
    score_fine_tuned_average: float | None = None
    score_published: float | None = None
    # Further figures of the published model, by name, such as the mean absolute error.
    figures: dict[str, float] = Field(default_factory=dict)
    # The classes that have held-out examples, by label.
    classes: tuple[ClassScore, ...] = ()
    # The findings about each agent, by agent id; empty in a round of fewer than three agents.
    audit: tuple[AgentAudit, ...] = ()
    # The reason why flagged agents are not left out, although the run leaves flagged agents out; or why
    # labels and models were not audited.
    audit_note: str = ""
    # The duration of the steps "audit", "aggregate", "fine_tune" and "evaluate".
    seconds: dict[str, float] = Field(default_factory=dict)
    error: JobError | None = None
    # Outputs of the initial model, for the probe of common/rehearsal.py; empty in the result of a round.
    probe: tuple[float, ...] = ()
    num_parameters: int | None = None
    # Seconds since the epoch.
    finished_at: float | None = None


@dataclass(frozen=True)
class JobDirectory:
    """The directory of one job; the module's docstring lists the files in it."""

    path: Path

    @property
    def weights_path(self) -> Path:
        """Return the path of the new weights."""
        return self.path / "model.safetensors"

    @property
    def precision_path(self) -> Path:
        """Return the path of the file, shared by all jobs, that keeps the choice of the precision."""
        return StateDir(self.path.parents[1]).precision

    @property
    def encoded_path(self) -> Path:
        """Return the path of the new weights as they are encoded for the agents."""
        return self.path / "encoded.safetensors"

    @property
    def rest_path(self) -> Path:
        """Return the path of the parts of the cloud's model that do not travel."""
        return self.path / "rest.safetensors"

    @property
    def model_paths(self) -> tuple[Path, Path, Path]:
        """Return the paths of all files that a new model may have."""
        return self.weights_path, self.encoded_path, self.rest_path

    def model_files(self, result: Result) -> dict[Path, WeightsFile]:
        """Return the files of the model that the job has made, by path."""
        made = (result.weights, result.encoded, result.rest)
        return {path: file for path, file in zip(self.model_paths, made, strict=True) if file}

    @property
    def scratch_path(self) -> Path:
        """Return the path of the folder for intermediate files."""
        return self.path / "scratch"

    @property
    def checkpoint_path(self) -> Path:
        """Return the path of the checkpoint of the fine-tune, which has a folder for itself."""
        return self.path / "checkpoint" / "latest.safetensors"

    def write_job(self, job: Job) -> None:
        """Make the job pending, also if an earlier attempt at the job has ended.

        Raises:
            OSError: the files cannot be written.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        sync(self.path.parent)
        self.progress_path.unlink(missing_ok=True)
        # A result that exists now belongs to the earlier attempt. Without one, the job is pending as soon as
        # job.json is written, and a result that appears later belongs to the new job.
        is_new_attempt = self.result_path.exists()
        _write(self.job_path, job)
        # The old result is removed after the new job.json is written, so that no trainer starts the new
        # attempt with the old job.json.
        if is_new_attempt:
            self.result_path.unlink()

    def withdraw(self) -> None:
        """Delete job.json, so that no trainer starts the job again.

        Raises:
            OSError: the file cannot be deleted.
        """
        self.job_path.unlink(missing_ok=True)
        sync(self.path)

    def remove(self) -> None:
        """Delete the job's directory; a job that is deleted only in part is never pending.

        Raises:
            OSError: a file cannot be deleted.
        """
        if not self.path.exists():
            return
        # job.json is deleted first, because a job.json without a result would be pending.
        self.withdraw()
        shutil.rmtree(self.path)

    def read_job(self) -> Job:
        """Return the job.

        Raises:
            RunError: job.json is missing or damaged.
        """
        job = _read(Job, self.job_path)
        if job is None:
            raise RunError(f"{self.job_path} is missing")
        return job

    def discard_output(self) -> None:
        """Delete what an attempt that was cut off has made, but for its checkpoint.

        On several machines that share the folder each of them may do this at the same time.
        """
        self.progress_path.unlink(missing_ok=True)
        for path in self.model_paths:
            path.unlink(missing_ok=True)
        self.discard_scratch()

    def discard_checkpoint(self) -> None:
        """Delete the checkpoint."""
        shutil.rmtree(self.checkpoint_path.parent, ignore_errors=True)

    def discard_scratch(self) -> None:
        """Delete the folder for intermediate files, which a killed trainer leaves behind."""
        shutil.rmtree(self.scratch_path, ignore_errors=True)

    @contextmanager
    def scratch(self) -> Iterator[None]:
        """Make an empty folder at `scratch_path`, and delete the folder at the end of the context."""
        self.scratch_path.mkdir()
        try:
            yield
        finally:
            self.discard_scratch()

    def append_progress(self, progress: Progress) -> None:
        """Append one report to the progress file.

        The line is not flushed to the disk, because the job starts again after a crash of the machine anyway.
        """
        with self.progress_path.open("a", encoding="utf-8") as file:
            file.write(progress.model_dump_json() + "\n")

    def read_progress(self, offset: int) -> tuple[list[Progress], int]:
        """Return the reports in the complete lines from byte `offset` on, and the offset for the next call.

        If the file has become shorter than `offset`, a new attempt has begun the file again, and reading
        starts at the first line.
        """
        try:
            with self.progress_path.open("rb") as file:
                if file.seek(0, 2) < offset:
                    offset = 0
                file.seek(offset)
                lines, newline, _ = file.read().rpartition(b"\n")
        except FileNotFoundError:
            return [], 0
        return list(_parse_progress(lines)), offset + len(lines) + len(newline)

    def write_result(self, result: Result) -> None:
        """Write the result, which ends the job; all other files of the job must be complete.

        Raises:
            OSError: the file cannot be written.
        """
        _write(self.result_path, result)

    def read_result(self) -> Result | None:
        """Return the result; None while the job is pending.

        Raises:
            RunError: the file is damaged.
        """
        return _read(Result, self.result_path)

    @property
    def is_begun(self) -> bool:
        """Return True if the job was asked for and not withdrawn."""
        return self.job_path.exists()

    @property
    def is_pending(self) -> bool:
        """Return True if the job was asked for and has no result yet."""
        return not self.result_path.exists() and self.job_path.exists()

    @property
    def job_path(self) -> Path:
        """Return the path of job.json."""
        return self.path / "job.json"

    @property
    def progress_path(self) -> Path:
        """Return the path of progress.jsonl."""
        return self.path / "progress.jsonl"

    @property
    def result_path(self) -> Path:
        """Return the path of result.json."""
        return self.path / "result.json"


def job_name(number: int) -> str:
    """Return the name of a round's job and of the job's directory."""
    return f"round-{number:04d}"


def round_job(state_dir: StateDir, number: int) -> JobDirectory:
    """Return the directory of a round's job."""
    return JobDirectory(state_dir.job(job_name(number)))


def round_jobs(state_dir: StateDir) -> Iterator[tuple[int, JobDirectory]]:
    """Yield the number and the job directory of each round that has a job directory, in no fixed order."""
    for path in list(state_dir.jobs.glob("round-*")):
        if match := _ROUND_JOB.fullmatch(path.name):
            yield int(match[1]), JobDirectory(path)


def pending_jobs(jobs_dir: Path) -> list[JobDirectory]:
    """Return the directories of the pending jobs, sorted by name; there are none without the folder."""
    try:
        paths = sorted(jobs_dir.iterdir())
    except FileNotFoundError:
        return []
    return [directory for directory in map(JobDirectory, paths) if directory.is_pending]


def _write(path: Path, model: FrozenModel) -> None:
    """Write the record as JSON, replacing the file in one step."""
    with replacing(path) as partial:
        partial.write_text(model.model_dump_json(indent=2) + "\n", "utf-8")


def _read(model: type[_Model], path: Path) -> _Model | None:
    """Return the record in the JSON file; None if there is no file.

    Raises:
        RunError: the file is damaged.
    """
    try:
        return model.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise RunError(f"{path} is damaged: remove its folder, and the job is done again") from error


def _parse_progress(lines: bytes) -> Iterator[Progress]:
    """Yield the report of each line that can be read."""
    for line in lines.splitlines():
        try:
            yield Progress.model_validate_json(line)
        except ValidationError:
            # The file was begun again and has grown past the offset, so that this is a part of a line.
            continue
