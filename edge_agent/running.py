"""A command of the user's: run without a shell, within a time limit, and never left behind."""

import asyncio
import os
import signal
from asyncio.subprocess import DEVNULL, STDOUT, Process
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import IO


async def reason_of_failure(
    command: Sequence[str],
    seconds: float,
    *,
    environment: Mapping[str, str] | None = None,
    output: int | IO[bytes] = DEVNULL,
) -> str:
    """Run a command to its end, and return in one line why it failed; an empty text if its exit code is 0.

    A command that is cut off, by the limit or because this is cancelled, is killed with the processes that
    it has started.

    Args:
        command: the program and its arguments.
        seconds: the time that the command has.
        environment: variables that the command gets beside those of this process.
        output: where stdout and stderr of the command go.
    """
    name = command[0]
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=DEVNULL,
            stdout=output,
            stderr=STDOUT,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
    except OSError as error:
        return f"{name} cannot be run ({error.strerror})"
    try:
        async with asyncio.timeout(seconds):
            code = await process.wait()
    except TimeoutError:
        return f"{name} took longer than {seconds:g} seconds"
    finally:
        await _end(process)
    return f"{name} ended with exit code {code}" if code else ""


async def _end(process: Process) -> None:
    """Kill the command if it still runs, with the processes that it has started, and wait for its end."""
    if process.returncode is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
