"""What an agent keeps on disk: who it is, the model in use, and how far it got."""

import fcntl
import os
import re
import secrets
import socket
from collections.abc import Collection
from pathlib import Path

from common.config import AGENT_ID_PATTERN, FrozenModel
from common.errors import UsageError
from common.files import replacing
from common.transfer import Blob

DEFAULT_STATE_DIR = "ecavg-agent"
MAX_DEFAULTS = 1000  # agents on one machine that share a working directory


class Trained(FrozenModel):
    """The weights that this agent has pre-trained last."""

    round: int
    weights: Blob
    accuracy: float  # on the held-out data
    initial_weights: str | None = None  # digest of what it started from; None: this agent's own
    shards: tuple[str, ...] = ()  # digests of what it was trained on, shared or not


class Report(FrozenModel):
    """What became of a published model on this device; accuracies on its own held-out data."""

    round: int
    initial_weights: str | None = None  # those of `Trained`; None as well where it did not take part
    accuracy_local: float | None  # of the weights that this agent had pre-trained for the round
    accuracy_before: float | None  # of the model in use before; None: there was none
    accuracy_after: float  # of the published model as it is
    accuracy_adapted: float | None = None  # of that after local adaptation; None: it was not adapted
    num_held_out: int
    applied: bool  # the model in use now comes from the published one, adapted or not
    reason: str  # why it does not

    @property
    def uses_adapted(self) -> bool:
        """Whether the model in use now is the published one after local adaptation."""
        return self.applied and self.accuracy_adapted is not None


class Arrived(FrozenModel):
    """A global model that has been measured: what is left is to use it or not, and to report it."""

    weights: Blob
    report: Report


class Progress(FrozenModel):
    """How far this agent got in a run; what a restart must not do again."""

    run_id: str = ""
    trained: Trained | None = None
    contributed_round: int = 0  # the last round this agent tried to contribute to
    arrived: Arrived | None = None  # from its evaluation until its report is acknowledged
    evaluated_round: int = 0  # the last round whose global model was evaluated and reported


class AgentState:
    """A locked state directory.

    Args:
        path: None picks `ecavg-agent`, or `ecavg-agent-2`, … when that one is in use by another agent.
        agent_id: None keeps the id that the directory remembers, or makes one.

    Raises:
        UsageError: not writable, in use by another agent, or another agent's.
    """

    def __init__(self, path: Path | None, agent_id: str | None) -> None:
        candidates = [path] if path else _default_directories(agent_id)
        for candidate in candidates:
            descriptor = _lock(candidate)
            if descriptor is not None:
                break
        else:
            holder = _read(candidates[-1] / "lock")
            raise UsageError(
                f"state directory {candidates[-1]} is in use by the edge-agent with process id {holder};"
                " give this one another --state-dir"
            )
        self.path = candidate
        self._descriptor = descriptor
        self.work.mkdir(exist_ok=True)
        self.agent_id = self._remember_id(agent_id)
        self.progress = self._read_progress()

    def close(self) -> None:
        os.close(self._descriptor)

    @property
    def model(self) -> Path:
        """The model in use."""
        return self.path / "model.safetensors"

    @property
    def report(self) -> Path:
        return self.path / "report.json"

    @property
    def precision(self) -> Path:
        """What was found out about the precision in which this device trains fastest."""
        return self.path / "precision.json"

    @property
    def tls(self) -> Path:
        """Key and certificates; see edge_agent/identity.py."""
        return self.path / "tls"

    @property
    def work(self) -> Path:
        """What is in the making: it can be lost, and is then made again."""
        return self.path / "work"

    @property
    def shards(self) -> Path:
        """The folder of this agent's shards; see edge_agent/shard_files.py."""
        return self.path / "shards"

    @property
    def private(self) -> Path:
        """The folder of what this agent trains on and does not share, in files like its shards."""
        return self.path / "private"

    @property
    def checkpoint(self) -> Path:
        """Of the training under way."""
        return self.work / "checkpoint.safetensors"

    @property
    def local_weights(self) -> Path:
        """What was pre-trained, until it is contributed."""
        return self.work / "local.safetensors"

    @property
    def adapted(self) -> Path:
        """The global model after local adaptation, until that is in use and reported."""
        return self.work / "adapted.safetensors"

    @property
    def encoded(self) -> Path:
        """The local weights as they are uploaded, until they are contributed."""
        return self.work / "encoded.safetensors"

    def weights(self, digest: str) -> Path:
        """Where weights from the server are kept."""
        return self.work / f"{digest}.safetensors"

    def residual(self, number: int) -> Path:
        """What rounding took away from the contribution to a round.

        It is added to the next one if that contribution has counted: the server knows, this agent may have
        been away. It cannot be made again, so it is not in `work`.
        """
        return self.path / f"residual-{number:04d}.safetensors"

    def discard(self, *paths: Path) -> None:
        """Remove files that the saved progress has no more use for."""
        for path in paths:
            path.unlink(missing_ok=True)

    def discard_all_but(self, needed: Collection[Path]) -> None:
        """Remove all other files from `work`, with what broken-off downloads have left."""
        self.discard(*(path for path in self.work.iterdir() if path not in needed))

    def discard_residuals_but(self, needed: Path) -> None:
        """Remove what contributions have lost that did not count, or that were made up for since."""
        self.discard(*(path for path in self.path.glob("residual-*") if path != needed))

    def save(self, progress: Progress) -> None:
        self.progress = progress
        _write(self.path / "progress.json", progress.model_dump_json())

    def _read_progress(self) -> Progress:
        try:
            return Progress.model_validate_json(_read(self.path / "progress.json") or "{}")
        except ValueError as error:  # of pydantic, or no text at all
            raise UsageError(
                f"{self.path / 'progress.json'} is damaged; remove {self.path} to start afresh"
            ) from error

    def _remember_id(self, agent_id: str | None) -> str:
        file = self.path / "agent-id"
        try:
            known = _read(file).strip()
        except UnicodeDecodeError:
            known = "?"
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


def _default_directories(agent_id: str | None) -> list[Path]:
    if agent_id:
        return [Path(f"{DEFAULT_STATE_DIR}-{agent_id}")]
    others = (Path(f"{DEFAULT_STATE_DIR}-{number}") for number in range(2, MAX_DEFAULTS))
    return [Path(DEFAULT_STATE_DIR), *others]


def _lock(directory: Path) -> int | None:
    """The descriptor that holds the lock as long as it is open; None when another process has it."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(directory / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UsageError(f"state directory {directory} cannot be written: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    os.truncate(descriptor, 0)
    os.write(descriptor, str(os.getpid()).encode())
    return descriptor


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
