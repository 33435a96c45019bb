"""Keeps one trainer process alive, for as long as the server is.

The trainer's standard input is a pipe whose other end only the server holds. However the server
ends, the operating system closes it, and the trainer leaves at that end of file: none is ever left
behind, not even by SIGKILL.
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

FIRST_PAUSE_SECONDS = 0.2  # before a trainer that died is started again; doubled each time
LONGEST_PAUSE_SECONDS = 5.0
HEALTHY_SECONDS = 60.0  # a trainer that lived this long did not die of its start: pauses begin anew
STOP_SECONDS = 5.0  # from SIGTERM to SIGKILL
MAX_LOG_BYTES = 10 << 20  # a longer trainer.log becomes trainer.log.1
LOG_CHECK_SECONDS = 60.0

log = structlog.get_logger()


class TrainerProcess:
    """One trainer at a time, started again whenever it dies.

    Args:
        state_dir: where its jobs are; what it prints is added to `trainer.log` there.
        device: "auto", "cpu", "cuda" or "cuda:1".
        command: what to run instead of the trainer.
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
        """How often it has died, or could not be started."""
        return self._num_exits

    @property
    def pid(self) -> int | None:
        """Of the process that runs now, also the id of its process group; None: between two."""
        return self._process.pid if self._process else None

    async def start(self) -> None:
        """Start it, and from then on start it again."""
        self._task = asyncio.create_task(self._keep_alive())

    async def stop(self) -> None:
        """End it: by request at first, for certain after STOP_SECONDS. Harmless when done twice."""
        if self._task:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def restart(self) -> None:
        """Have it drop what it is at: when this returns it has left, and is started again."""
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
        """Run it from start to end; its return code."""
        try:
            async with self._running() as process:
                return await self._end_of(process)
        except OSError as error:  # no process or memory to be had, or the log is not writable
            log.error("trainer_not_started", reason=str(error))
            return os.EX_OSERR

    async def _end_of(self, process: Process) -> int:
        """Its return code; until then its log is kept from growing without bound."""
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
    """Have it, and what it started, leave; nothing when it has left already."""
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
    """Its reading and its writing end."""
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as reader, os.fdopen(writing, "wb") as writer:
        yield reader, writer


def _append_to(path: Path) -> BinaryIO:
    return path.open("ab")


def _rotate(log_path: Path) -> None:
    """Make room in a log that has become long.

    Copied and emptied, not renamed: who writes goes on with the file that it has open, at what is then
    its end. A line that is written in between is lost.
    """
    try:
        if log_path.stat().st_size > MAX_LOG_BYTES:
            shutil.copyfile(log_path, f"{log_path}.1")
            os.truncate(log_path, 0)
    except FileNotFoundError:
        pass
    except OSError as error:  # the disk's fault; trainer and server can do without
        log.warning("trainer_log_not_rotated", reason=str(error))
