"""What the two commands have in common: flags, one-line errors, exit codes, signals."""

import argparse
import asyncio
import ctypes
import os
import signal
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from common.config import ProcessConfig, deep_merge, load
from common.errors import ECAvgError, UsageError, one_line

Config = TypeVar("Config", bound=ProcessConfig)

BUSY_SECONDS = 0.3  # a thread that has not ended by then has something long to do
_M_ARENA_MAX = -8  # mallopt(3)


def parse_command_line(
    parser: argparse.ArgumentParser,
    config_class: type[Config],
    env_prefix: str,
    argv: Sequence[str] | None,
    *,
    default_preset: str | None = None,
) -> Config:
    """The configuration that preset, file, environment and flags add up to.

    Args:
        default_preset: its presence gives the command a `--preset`.

    Raises:
        UsageError: naming what is wrong; argparse itself exits with 2 on an unknown flag.
    """
    add_flags(parser, config_class, default_preset)
    flags = vars(parser.parse_args(argv))
    preset, config_file = flags.pop("preset", default_preset), flags.pop("config", None)
    assigned = _parse_assignments(flags.pop("set", []))
    return load(
        config_class,
        env_prefix=env_prefix,
        preset=preset,
        config_file=config_file,
        flags=deep_merge(assigned, flags),
        environ=os.environ,
    )


def add_flags(
    parser: argparse.ArgumentParser, config_class: type[ProcessConfig], default_preset: str | None
) -> None:
    """One flag for each key at the top of the configuration; `--set` reaches the tables below."""
    config_help = "TOML file with any of these keys"
    if default_preset:
        text = f"A complete configuration to start from (default: {default_preset})"
        parser.add_argument("--preset", metavar="NAME", default=default_preset, help=text)
        config_help += " and of [run], laid over the preset"
    parser.add_argument("--config", metavar="FILE", type=Path, help=config_help)
    for name, field in config_class.model_fields.items():
        if isinstance(field.default, BaseModel):
            text = f"Set any key of a table, for example {name}.seed=3; repeatable"
            parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help=text)
            continue
        text = _help_of(field)
        options: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": text}
        flag = f"--{name.replace('_', '-')}"
        if isinstance(field.default, bool):
            parser.add_argument(flag, action="store_true", **options)
        elif isinstance(field.default, tuple):
            parser.add_argument(flag, action="append", metavar="NAME", **options)
        else:
            parser.add_argument(flag, metavar=field.title or name.split("_")[-1].upper(), **options)


def _help_of(field: FieldInfo) -> str:
    """Return the first paragraph of a key's description, in one line, and its default."""
    paragraph = " ".join((field.description or "").partition("\n\n")[0].split())
    text = paragraph.removesuffix(".").replace("`", "").replace("%", "%%")
    if not (field.is_required() or field.default in (None, "", ()) or isinstance(field.default, bool)):
        text += f" (default: {field.default})"
    return text


def run(command: str, body: Callable[[], Coroutine[Any, Any, int]]) -> int:
    """Run a command's coroutine to its exit code; SIGINT and SIGTERM cancel it, and that is a clean stop.

    When the coroutine has ended, nothing is waited for that still works in a thread. After a signal the
    process ends at once: every file is whole at every moment, and taking PyTorch apart takes seconds.
    """
    _share_arenas()
    try:
        return asyncio.run(_to_exit_code(command, body))
    except KeyboardInterrupt:
        return 0


def fail(command: str, error: Exception) -> int:
    """One line on stderr; the traceback is in the log at debug level, once there is a log."""
    structlog = sys.modules.get("structlog")  # `--help` and configuration errors do without it
    if structlog and structlog.is_configured():
        structlog.get_logger().debug("failed", exc_info=error)
    print(f"{command}: {one_line(_in_one_line(error))}", file=sys.stderr)  # noqa: T201
    return error.exit_code if isinstance(error, ECAvgError) else 1


def warn(command: str, text: str) -> None:
    """One line on stderr that nobody overlooks."""
    print(f"{command}: WARNING: {text}", file=sys.stderr, flush=True)  # noqa: T201


def _in_one_line(error: Exception) -> str:
    if isinstance(error, ECAvgError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError):
        return text
    return f"{type(error).__name__}: {text}; a fault of this program: --log-level debug shows more"


def _share_arenas() -> None:
    """Have all threads take memory from the same two arenas.

    glibc gives every thread one of its own, and what the chunks of a transfer have taken there stays there:
    with eight agents at a server that was a third of its memory. Other C libraries have no arenas.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 2)


async def _to_exit_code(command: str, body: Callable[[], Coroutine[Any, Any, int]]) -> int:
    pool = ThreadPoolExecutor(thread_name_prefix="asyncio")
    asyncio.get_running_loop().set_default_executor(pool)
    try:
        code = await _until_signalled(body)
    except Exception as error:
        code = fail(command, error)
    pool.shutdown(wait=False, cancel_futures=True)
    _leave_if_busy(code)
    return code


def _leave_if_busy(code: int) -> None:
    """End the process here if a thread still works: asyncio, and then Python, would wait for it."""
    deadline = time.monotonic() + BUSY_SECONDS
    for thread in threading.enumerate():
        if thread is threading.current_thread() or thread.daemon:
            continue
        thread.join(max(0.0, deadline - time.monotonic()))
        if thread.is_alive():
            _leave(code)


def _leave(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


async def _until_signalled(body: Callable[[], Coroutine[Any, Any, int]]) -> int:
    task = asyncio.ensure_future(body())
    loop = asyncio.get_running_loop()
    stopped = False

    def stop() -> None:
        nonlocal stopped
        if stopped:  # asked twice: do not wait for anything
            os._exit(1)
        stopped = True
        task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    try:
        return await task
    except asyncio.CancelledError:
        if stopped:
            _leave(0)
        raise


def _parse_assignments(assignments: Sequence[str]) -> dict[str, Any]:
    """`["run.seed=3"]` → `{"run": {"seed": 3}}`; values are TOML, anything else is a string."""
    merged: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise UsageError(f"--set {assignment}: write KEY=VALUE, for example run.seed=3")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        for part in reversed(key.split(".")):
            value = {part: value}
        merged = deep_merge(merged, value)
    return merged
