"""The supervisor of the trainer: it keeps one trainer process alive for as long as the server runs.

The trainer's standard input is a pipe whose other end only the server holds. However the server ends, the
operating system closes that end, and the trainer leaves when it reads the end of the file. So no trainer is
left behind, not even by SIGKILL.
"""

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import time
from asyncio.subprocess import Process, create_subprocess_exec
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import BinaryIO

import structlog

from cloud_server.state_dir import StateDir

# A trainer that died is started again after so long; the pause doubles each time.
FIRST_PAUSE_SECONDS = 0.2
LONGEST_PAUSE_SECONDS = 5.0
# A trainer that lived for so long did not die of its start, so pauses begin anew.
HEALTHY_SECONDS = 60.0
# SIGKILL follows SIGTERM after so long.
STOP_SECONDS = 5.0
# A longer trainer.log becomes trainer.log.1.
MAX_LOG_BYTES = 10 << 20
LOG_CHECK_SECONDS = 60.0

log = structlog.get_logger()


class TrainerProcess:
    """One trainer process at a time, started again whenever it dies.

    Args:
        state_dir: the folder of the trainer's jobs; what the trainer prints is added to `trainer.log` there.
        device: "auto", "cpu", "cuda" or "cuda:1".
        command: what to run in place of the trainer.
    """

    def __init__(
        self,
        state_dir: Path,
        *,
        device: str = "auto",
        command: Sequence[str] = (),
    ) -> None:
        self._log_path = StateDir(state_dir).trainer_log
        self._command = command or _trainer_command(state_dir, device)
        self._process: Process | None = None
        self._task: asyncio.Task[None] | None = None
        self._num_exits = 0

    @property
    def num_exits(self) -> int:
        """Return how often the trainer has died, or could not be started."""
        return self._num_exits

    @property
    def pid(self) -> int | None:
        """Return the id of the present process, which is also that of its group; None: between two."""
        return self._process.pid if self._process else None

    async def start(self) -> None:
        """Start the trainer, and from then on start it again whenever it dies."""
        self._task = asyncio.create_task(self._keep_alive())

    async def stop(self) -> None:
        """End the trainer: by request at first, by force after STOP_SECONDS; twice is harmless."""
        if self._task:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def restart(self) -> None:
        """Have the trainer drop its work: when this returns, that process has left."""
        num_exits = self._num_exits
        if self._process:
            await _end(self._process)
            while self._num_exits == num_exits:  # noqa: ASYNC110  the task that sees it end has to come by
                await asyncio.sleep(0.01)

    async def _keep_alive(self) -> None:
        pause = FIRST_PAUSE_SECONDS
        while True:
            started_at = time.monotonic()
            returncode = await self._live()
            self._num_exits += 1
            log.warning("trainer_died", returncode=returncode, see=str(self._log_path))
            if time.monotonic() - started_at >= HEALTHY_SECONDS:
                pause = FIRST_PAUSE_SECONDS
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    async def _live(self) -> int:
        """Run the trainer from start to end, and return its exit code."""
        try:
            async with self._running() as process:
                return await self._end_of(process)
        except OSError as error:
            # There is no process or memory to be had, or the log is not writable.
            log.error("trainer_not_started", reason=str(error))
            return os.EX_OSERR

    async def _end_of(self, process: Process) -> int:
        """Return the process's exit code; until it ends, keep its log from growing without bound."""
        end = asyncio.ensure_future(process.wait())
        try:
            while not end.done():
                await asyncio.to_thread(_rotate, self._log_path)
                await asyncio.wait([end], timeout=LOG_CHECK_SECONDS)
            return end.result()
        finally:
            end.cancel()

    @asynccontextmanager
    async def _running(self) -> AsyncIterator[Process]:
        with _pipe() as (stdin, server_end), _append_to(self._log_path) as output:
            process = await create_subprocess_exec(
                *self._command, stdin=stdin, stdout=output, stderr=output, process_group=0
            )
            self._process = process
            try:
                yield process
            finally:
                server_end.close()
                await _end(process)
                self._process = None


def _trainer_command(state_dir: Path, device: str) -> list[str]:
    return [
        sys.executable, "-m", "cloud_server.trainer", "--state-dir", str(state_dir), "--device", device
    ]  # fmt: skip


async def _end(process: Process) -> None:
    """End the process and its group; do nothing if it has left already."""
    if process.returncode is not None:
        return
    _signal_group(process, signal.SIGTERM)
    try:
        async with asyncio.timeout(STOP_SECONDS):
            await process.wait()
    except TimeoutError:
        _signal_group(process, signal.SIGKILL)
        await process.wait()


def _signal_group(process: Process, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


@contextmanager
def _pipe() -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Yield the reading and the writing end of a pipe."""
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as reader, os.fdopen(writing, "wb") as writer:
        yield reader, writer


def _append_to(path: Path) -> BinaryIO:
    return path.open("ab")


def _rotate(log_path: Path) -> None:
    """Make room in a log that has become long.

    The log is copied and emptied, not renamed: whoever writes goes on with the file that it has open, at what
    is then its end. A line that is written in between is lost.
    """
    try:
        if log_path.stat().st_size > MAX_LOG_BYTES:
            shutil.copyfile(log_path, f"{log_path}.1")
            os.truncate(log_path, 0)
    except FileNotFoundError:
        pass
    except OSError as error:
        # It is the disk's fault, and trainer and server can do without.
        log.warning("trainer_log_not_rotated", reason=str(error))
