"""The supervisor of the trainer, which keeps one trainer process alive for as long as the server runs.

The trainer's standard input is a pipe whose other end only the server holds. However the server ends, the
operating system closes that end, and the trainer exits when it reads the end of the file. Therefore the
trainer does not outlive the server, even if the server is killed by SIGKILL.
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

from ecavg.cloud_server.state_dir import StateDir

# The pause before a trainer is started again doubles each time, from the first to the longest pause.
FIRST_PAUSE_SECONDS = 0.2
LONGEST_PAUSE_SECONDS = 5.0
# A trainer that has lived this long did not die of a failing start, so the pauses begin anew.
HEALTHY_SECONDS = 60.0
# A trainer that has not ended this long after SIGTERM gets SIGKILL.
STOP_SECONDS = 5.0
# A trainer.log that is longer than this becomes trainer.log.1.
MAX_LOG_BYTES = 10 << 20
LOG_CHECK_SECONDS = 60.0

log = structlog.get_logger()


class TrainerProcess:
    """One trainer process at a time, started again whenever it dies.

    Args:
        state_dir: the server's state directory, with the trainer's jobs. The output of the trainer is
            appended to the file `trainer.log` there.
        device: the device of the trainer: "auto", "cpu", "cuda" or "cuda:1".
        command: the command to run instead of the trainer, for tests.
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
        """Return how often the trainer has ended, or could not be started."""
        return self._num_exits

    @property
    def is_running(self) -> bool:
        """Return True while there is a trainer process."""
        return self._process is not None

    @property
    def pid(self) -> int | None:
        """Return the id of the trainer process, which is also the id of its process group.

        The id is None while no trainer runs.
        """
        return self._process.pid if self._process else None

    async def start(self) -> None:
        """Start the trainer, and from then on start it again whenever it dies."""
        self._task = asyncio.create_task(self._keep_alive())

    async def stop(self) -> None:
        """End the trainer with SIGTERM, and with SIGKILL after STOP_SECONDS; a second call does nothing."""
        if self._task:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def restart(self) -> None:
        """End the trainer process, so that it drops its work; the next process starts by itself.

        When this method returns, the process has ended, but the next one may not have started yet.
        """
        num_exits = self._num_exits
        if self._process:
            await _terminate(self._process)
            # The task that keeps the trainer alive has to notice the end, which takes a moment.
            while self._num_exits == num_exits:  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    async def _keep_alive(self) -> None:
        """Run one trainer after the other, with pauses between, until this task is cancelled."""
        pause = FIRST_PAUSE_SECONDS
        while True:
            started_at = time.monotonic()
            returncode = await self._run_once()
            self._num_exits += 1
            log.warning("trainer_died", returncode=returncode, see=str(self._log_path))
            if time.monotonic() - started_at >= HEALTHY_SECONDS:
                pause = FIRST_PAUSE_SECONDS
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    async def _run_once(self) -> int:
        """Run one trainer from its start to its end, and return its exit code."""
        try:
            async with self._started() as process:
                return await self._wait_for_exit(process)
        except OSError as error:
            # The system has no process or memory left.
            log.error("trainer_not_started", reason=str(error))
            return os.EX_OSERR

    async def _wait_for_exit(self, process: Process) -> int:
        """Wait for the end of the process and return its exit code; rotate its log meanwhile."""
        end = asyncio.ensure_future(process.wait())
        try:
            while not end.done():
                await asyncio.to_thread(_rotate, self._log_path)
                await asyncio.wait([end], timeout=LOG_CHECK_SECONDS)
            return end.result()
        finally:
            end.cancel()

    @asynccontextmanager
    async def _started(self) -> AsyncIterator[Process]:
        """Start a trainer, and end the trainer when the context ends."""
        with _pipe() as (stdin, server_end), _open_log(self._log_path) as output:
            process = await create_subprocess_exec(
                *self._command, stdin=stdin, stdout=output, stderr=output, process_group=0
            )
            self._process = process
            try:
                yield process
            finally:
                server_end.close()
                await _terminate(process)
                self._process = None


def _trainer_command(state_dir: Path, device: str) -> list[str]:
    return [
        sys.executable, "-m", "ecavg.cloud_server.trainer", "--state-dir", str(state_dir), "--device", device
    ]  # fmt: skip


async def _terminate(process: Process) -> None:
    """End the process and its group with SIGTERM, then SIGKILL; do nothing if the process has ended."""
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


def _open_log(path: Path) -> BinaryIO:
    """Open the log of the trainer; if it cannot be written, the trainer works without a log."""
    try:
        return path.open("ab")
    except OSError as error:
        log.warning("trainer_log_not_written", reason=str(error))
        return Path(os.devnull).open("ab")


def _rotate(log_path: Path) -> None:
    """Move the content of a log that is longer than MAX_LOG_BYTES to `trainer.log.1`.

    The log is copied and emptied, not renamed, because the trainer keeps the file open. The trainer then
    continues at the new end of the file. A line that is written between the two steps is lost.
    """
    try:
        if log_path.stat().st_size > MAX_LOG_BYTES:
            shutil.copyfile(log_path, f"{log_path}.1")
            os.truncate(log_path, 0)
    except FileNotFoundError:
        pass
    except OSError as error:
        # The trainer and the server work without the rotation.
        log.warning("trainer_log_not_rotated", reason=str(error))
