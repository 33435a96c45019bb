"""The state of an agent on disk: who it is, the model in use, and how far it has come."""

import fcntl
import os
import re
import secrets
import socket
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError

from ecavg.common.config import AGENT_ID_PATTERN, FrozenModel, Scored
from ecavg.common.errors import RunError, UsageError, one_line
from ecavg.common.files import is_full, read_text, replacing
from ecavg.common.transfer import Blob

DEFAULT_STATE_DIR = "ecavg-agent"
# So many agents on one machine may share a working directory.
MAX_DEFAULTS = 1000


class Trained(Scored):
    """The weights that this agent has pre-trained last."""

    round: int
    weights: Blob
    # The score on the held-out data.
    score: float
    # The digest of the weights that pre-training started from; None: this agent's own.
    initial_weights: str | None = None
    # The digests of the files that it was trained on, shared or not.
    shards: tuple[str, ...] = ()
    # The parts of the model that stay on this device, as they were trained; None: all parts travel.
    rest: Blob | None = None


class Report(Scored):
    """The outcome of a published model on this device; scores are on the device's held-out data."""

    round: int
    # The initial weights of `Trained`; None also where the agent did not take part.
    initial_weights: str | None = None
    # The score of the weights that this agent had pre-trained for the round.
    score_local: float | None
    # The score of the model in use before; None: there was none.
    score_before: float | None
    # The score of the published model as it is.
    score_after: float
    # The score of the published model after local adaptation; None: it was not adapted.
    score_adapted: float | None = None
    num_held_out: int
    # True if the model in use now comes from the published one, adapted or not.
    applied: bool
    # Why it does not, or how `on_update` failed; empty if it does and nothing failed.
    reason: str
    # The sums of the comparison with the model in use before, see comparison.py; None: there was none.
    difference_total: float | None = None
    difference_squares: float | None = None

    @property
    def uses_adapted(self) -> bool:
        """Return True if the model in use now is the published one after local adaptation."""
        return self.applied and self.score_adapted is not None


class Arrived(FrozenModel):
    """A global model that has been measured: what is left is to use it or not, and to report it."""

    weights: Blob
    report: Report
    # The cloud's own parts of the model, for an agent that has none yet; None: all parts travel.
    rest: Blob | None = None
    # True if the model was pinned when it was measured.
    is_pinned: bool = False


class Begun(FrozenModel):
    """A pre-training that this agent finishes whatever rounds open meanwhile; see async_member.py."""

    # The round in which it was begun, and what it started from.
    round: int
    initial_weights: Blob
    # True if the learning rate takes a full curve in it.
    has_full_curve: bool
    # The cloud's own parts that belong to what it started from; None: all parts travel.
    initial_rest: Blob | None = None
    # The round to which the result was offered last, and the weights as they were named; None: to none yet.
    offered_to: int | None = None
    offered: Blob | None = None


class Progress(FrozenModel):
    """The progress of this agent in a run, which a restart must not lose."""

    run_id: str = ""
    trained: Trained | None = None
    # What this agent is to finish and to contribute, with `mode = "async"`.
    begun: Begun | None = None
    # The last round that this agent tried to contribute to; -1: none yet, not even the warm-up.
    contributed_round: int = -1
    # The digests of the weights that this agent has named in contributions to a later round.
    sent_weights: tuple[str, ...] = ()
    # The model that was measured, until its report is acknowledged.
    arrived: Arrived | None = None
    # The last round whose global model was evaluated and reported.
    evaluated_round: int = 0
    # Since when this agent waits for the next time of `pretrain_at`: the joining, or the last contribution.
    waits_since: float | None = None
    # How many examples there were when the data were read for the contribution under way, and for the last
    # one that was accepted.
    num_taken: int = 0
    num_contributed: int = 0
    # What `num_contributed` was before that one; None: its round has failed, and that is made good.
    num_contributed_before: int | None = None
    # The round whose model is in use because it was pinned; 0: another model may be in use by now.
    pinned_round: int = 0
    # The last acknowledged reports of models that came into use.
    applied_reports: tuple[Report, ...] = ()
    # The withdrawn rounds whose models this agent does not use any more.
    avoided_rounds: tuple[int, ...] = ()


class AgentState:
    """A locked state directory.

    Args:
        path: None picks `ecavg-agent`, or `ecavg-agent-2`, … when that one is in use by another agent.
        agent_id: None keeps the id that the directory remembers, or makes one.

    Raises:
        UsageError: the directory is not writable, in use by another agent, or another agent's.
        RunError: the disk has no room.
    """

    def __init__(self, path: Path | None, agent_id: str | None) -> None:
        candidates = [path] if path else default_directories(agent_id)
        for candidate in candidates:
            with _unwritable_is_named(candidate):
                descriptor = _lock(candidate)
            if descriptor is not None:
                break
        else:
            holder = (candidates[-1] / "lock").read_text("ascii", errors="replace")
            raise UsageError(
                f"state directory {candidates[-1]} is in use by the edge-agent with process id {holder};"
                " give this one another --state-dir"
            )
        self.path = candidate
        self._descriptor = descriptor
        with _unwritable_is_named(candidate):
            self.work.mkdir(exist_ok=True)
            self.agent_id = self._remember_id(agent_id)
        self.progress = self._read_progress()

    def close(self) -> None:
        """Let go of the directory."""
        os.close(self._descriptor)

    @property
    def model(self) -> Path:
        """Return the path of the model in use."""
        return self.path / "model.safetensors"

    @property
    def models(self) -> Path:
        """Return the folder of the models that were in use last; see edge_agent/history.py."""
        return self.path / "models"

    @property
    def report(self) -> Path:
        """Return the path of the report for the user."""
        return self.path / "report.json"

    @property
    def precision(self) -> Path:
        """Return the path of the file that keeps the fastest precision of this device."""
        return self.path / "precision.json"

    @property
    def tls(self) -> Path:
        """Return the folder of key and certificates; see edge_agent/identity.py."""
        return self.path / "tls"

    @property
    def work(self) -> Path:
        """Return the folder of files in the making, which can be lost, and are then made again."""
        return self.path / "work"

    @property
    def shards(self) -> Path:
        """Return the folder of this agent's shards; see edge_agent/shard_files.py."""
        return self.path / "shards"

    @property
    def private(self) -> Path:
        """Return the folder of the examples that are trained on and not shared, in files like the shards."""
        return self.path / "private"

    @property
    def checkpoint(self) -> Path:
        """Return the path of the checkpoint of the training under way."""
        return self.work / "checkpoint.safetensors"

    @property
    def local_weights(self) -> Path:
        """Return the path of the pre-trained weights, until they are contributed."""
        return self.work / "local.safetensors"

    @property
    def adapted(self) -> Path:
        """Return the path of the adapted global model, until it is in use and reported."""
        return self.work / "adapted.safetensors"

    @property
    def whole(self) -> Path:
        """Return the path of a model that was put together of what travels and what stays on this device."""
        return self.work / "whole.safetensors"

    def rest(self, digest: str) -> Path:
        """Return the path of this agent's own parts of the model, which do not travel and cannot be lost."""
        return self.path / f"rest-{digest}.safetensors"

    @property
    def encoded(self) -> Path:
        """Return the path of the local weights as they are uploaded, until they are contributed."""
        return self.work / "encoded.safetensors"

    def weights(self, digest: str) -> Path:
        """Return the path where weights from the server are kept."""
        return self.work / f"{digest}.safetensors"

    def residual(self, number: int) -> Path:
        """Return the path of what rounding has taken away from the contribution to a round.

        The residual is added to the next contribution if that one has counted, which the server knows: this
        agent may have been away. It cannot be made again, so it is not in `work`.
        """
        return self.path / f"residual-{number:04d}.safetensors"

    def discard(self, *paths: Path) -> None:
        """Remove files that the saved progress has no more use for."""
        for path in paths:
            path.unlink(missing_ok=True)

    def discard_all_but(self, needed: Collection[Path | None]) -> None:
        """Remove all other files from `work`, with what broken-off downloads have left."""
        self.discard(*(path for path in self.work.iterdir() if path not in needed))

    def discard_residuals_but(self, needed: Path) -> None:
        """Remove all other residuals: they did not count, or were made up for since."""
        self.discard(*(path for path in self.path.glob("residual-*") if path != needed))

    def discard_rests_but(self, needed: Path | None) -> None:
        """Remove the other models' parts that stay on this device."""
        self.discard(*(path for path in self.path.glob("rest-*") if path != needed))

    def save(self, progress: Progress) -> None:
        """Keep the progress, durably."""
        self.progress = progress
        _write(self.path / "progress.json", progress.model_dump_json())

    def _read_progress(self) -> Progress:
        try:
            return Progress.model_validate_json(_read(self.path / "progress.json") or "{}")
        except ValidationError as error:
            raise UsageError(self._why_unreadable(error)) from error
        except ValueError as error:
            raise UsageError(self._damaged()) from error

    def _why_unreadable(self, error: ValidationError) -> str:
        """Return the line about a progress that this version does not understand."""
        unknown = [each["loc"] for each in error.errors() if each["type"] == "extra_forbidden"]
        if not unknown:
            return self._damaged()
        field = one_line(".".join(map(str, unknown[0])))
        return (
            f"{self.path / 'progress.json'} has {field}, which a newer edge-agent has written: use that one,"
            f" or remove {self.path} to start afresh"
        )

    def _damaged(self) -> str:
        return f"{self.path / 'progress.json'} is damaged; remove {self.path} to start afresh"

    def _remember_id(self, agent_id: str | None) -> str:
        file = self.path / "agent-id"
        known = read_text(file, "file").strip() if file.exists() else ""
        if known and not re.fullmatch(AGENT_ID_PATTERN, known):
            raise UsageError(f"{file} is damaged; remove {self.path} to start afresh")
        if agent_id and known and agent_id != known:
            raise UsageError(
                f"state directory {self.path} belongs to agent {known}, not {agent_id};"
                " give this one another --state-dir"
            )
        if not known:
            known = agent_id or _new_agent_id()
            _write(file, known + "\n")
        return known


def default_directories(agent_id: str | None) -> list[Path]:
    """Return the state directories of an agent that is given none; the first one that is free is taken."""
    if agent_id:
        return [Path(f"{DEFAULT_STATE_DIR}-{agent_id}")]
    others = (Path(f"{DEFAULT_STATE_DIR}-{number}") for number in range(2, MAX_DEFAULTS))
    return [Path(DEFAULT_STATE_DIR), *others]


@contextmanager
def _unwritable_is_named(directory: Path) -> Iterator[None]:
    """Turn the errors of a directory that cannot be written into an error that names the directory."""
    try:
        yield
    except OSError as error:
        # A full disk may be over at the next start, so that a supervisor should start the agent again.
        kind = RunError if is_full(error) else UsageError
        raise kind(f"state directory {directory} cannot be written: {error.strerror}") from error


def _lock(directory: Path) -> int | None:
    """Return the descriptor that holds the lock as long as it is open; None: another process has the lock."""
    directory.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(directory / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    os.truncate(descriptor, 0)
    os.write(descriptor, str(os.getpid()).encode())
    return descriptor


def user_of(directory: Path) -> str:
    """Return the process id of the agent that uses the state directory; "": nobody does."""
    try:
        with (directory / "lock").open(encoding="ascii", errors="replace") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return file.read()
    except (FileNotFoundError, NotADirectoryError):
        pass
    return ""


def _new_agent_id() -> str:
    host = re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname()).strip("-")[:40]
    return f"{host or 'agent'}-{secrets.token_hex(3)}"


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except FileNotFoundError:
        return ""


def _write(path: Path, text: str) -> None:
    with replacing(path) as partial:
        partial.write_text(text, "utf-8")
