"""The parts that both commands share: flags, one-line errors, exit codes and signals."""

import argparse
import asyncio
import ctypes
import io
import os
import signal
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, NoReturn, TextIO, TypeVar

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ecavg.common import streams
from ecavg.common.config import ProcessConfig
from ecavg.common.errors import ECAvgError, RunError, UsageError, is_out_of_memory, one_line
from ecavg.common.layers import deep_merge, load

Config = TypeVar("Config", bound=ProcessConfig)

# The exit code of a command that was interrupted at the terminal: 128 and the number of the signal.
INTERRUPTED = 128 + signal.SIGINT
# CUDA_VISIBLE_DEVICES and its kind, which hide all GPUs when they are empty.
_MAY_BE_EMPTY = "_VISIBLE_DEVICES"
# The text of the error that Python raises where the system has no room for another thread.
_NO_MORE_THREADS = "can't start new thread"
# A thread that is still alive after this time is taken to be busy for long.
BUSY_SECONDS = 0.3
# The number of the parameter M_ARENA_MAX of mallopt(3).
_M_ARENA_MAX = -8


class Parser(argparse.ArgumentParser):
    """A parser of a command line whose help is a result of the command."""

    def print_help(self, file: Any = None) -> None:
        """Print the help; raise RunError if it cannot be printed."""
        if file is None:
            print_result(self.format_help().rstrip("\n"))
        else:
            super().print_help(file)

    def error(self, message: str) -> NoReturn:
        """Print the usage and what is wrong, and exit with code 2."""
        super().error(one_line(message))


# Where errors and warnings go instead of being printed; None: nowhere else.
_log_line: Callable[[str, str], None] | None = None


def enter(command: str, body: Callable[[], int]) -> int:
    """Run a command from its beginning to its end, and return its exit code.

    This function first makes the process independent of its standard streams, and of environment variables
    that are not meant for it. Whatever the command raises becomes one line on stderr.
    """
    streams.prepare()
    _clean_environment()
    try:
        _check_working_folder()
        return body()
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        return fail(command, error)


def _clean_environment() -> None:
    """Remove what is meant for other programs from the environment, and what is empty.

    Libraries take an empty HOME for the root, an empty TORCH_HOME for the working folder, and cannot be
    imported with an empty TORCH_LOGS. Compose passes variables that are not set as empty ones.
    """
    # With this variable prometheus_client writes files, which only a server of several processes needs.
    os.environ.pop("PROMETHEUS_MULTIPROC_DIR", None)
    for name, value in list(os.environ.items()):
        if not value and not name.endswith(_MAY_BE_EMPTY):
            del os.environ[name]


def _check_working_folder() -> None:
    """Raise UsageError if the working folder has been removed, because PyTorch cannot be imported there."""
    try:
        os.getcwd()  # noqa: PTH109
    except OSError as error:
        raise UsageError("the working folder has been removed: change to another folder first") from error


def parse_command_line(
    parser: Parser,
    config_class: type[Config],
    env_prefix: str,
    argv: Sequence[str] | None,
    *,
    default_preset: str | None = None,
) -> Config:
    """Return the configuration that results from preset, file, environment and flags, where the later win.

    Args:
        parser: the parser of the command, to which this function adds the flags.
        config_class: the class of the configuration.
        env_prefix: the prefix of the environment variables that count.
        argv: the arguments of the command; None takes those of this process.
        default_preset: the preset to start from. A command without it has no flag `--preset`.

    Raises:
        UsageError: a value, key or file is wrong. For an unknown flag, argparse itself exits with code 2.
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
    """Add one flag for each key at the top of the configuration, and `--set` for the keys of its tables."""
    config_help = "TOML file with any of these keys"
    if default_preset:
        text = f"A complete configuration to start from (default: {default_preset})"
        parser.add_argument("--preset", metavar="NAME", default=default_preset, help=text)
        config_help += " and of [run], laid over the preset"
    parser.add_argument("--config", metavar="FILE", help=config_help)
    fields = config_class.model_fields.items()
    if any(isinstance(field.default, BaseModel) for _, field in fields):
        text = "Set any key of a table, for example run.seed=3; repeatable"
        parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help=text)
    for name, field in fields:
        if isinstance(field.default, BaseModel):
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
    """Run a command's coroutine and return its exit code.

    SIGINT and SIGTERM cancel the coroutine, which counts as a clean stop with exit code 0.

    When the coroutine has ended, the process does not wait for threads that are still busy. After a signal
    the process exits at once: every file is complete at every moment, and an orderly end of PyTorch would
    take seconds.
    """
    _limit_arenas()
    try:
        return asyncio.run(_to_exit_code(command, body))
    except KeyboardInterrupt:
        return 0


def fail(command: str, error: Exception) -> int:
    """Print the error as one line on stderr, and return the exit code.

    The traceback goes to the log at debug level, if the log is configured already.
    """
    # `--help` and configuration errors come before the import of structlog, which is slow.
    structlog = sys.modules.get("structlog")
    if structlog and structlog.is_configured():
        structlog.get_logger().debug("failed", exc_info=error)
    _complain("error", f"{command}: {describe(error)}")
    return error.exit_code if isinstance(error, ECAvgError) else 1


def warn(command: str, text: str) -> None:
    """Print a warning as one line on stderr."""
    _complain("warning", f"{command}: WARNING: {text}")


def complain_by(log: Callable[[str, str], None] | None) -> None:
    """Have errors and warnings logged, for a stderr where every line is a log event; None: print them.

    Args:
        log: called with a log level and a line.
    """
    global _log_line
    _log_line = log


def _complain(level: str, text: str) -> None:
    if _log_line:
        _log_line(level, text)
    else:
        _print_line(text, sys.stderr)


def print_note(text: str) -> None:
    """Print one line on stderr, beside the result on stdout."""
    _print_line(text, sys.stderr)


def print_status(text: str) -> None:
    """Print one line on stdout that says how things are; the line is dropped if it cannot be written."""
    _print_line(text, sys.stdout)


def rendered(renderable: Any, width: int) -> str:
    """Return what rich makes of a renderable where there is no terminal, in lines of so many characters."""
    # Imported here, because --help does without.
    from rich.console import Console

    text = io.StringIO()
    Console(file=text, width=width, markup=False, highlight=False).print(renderable)
    return text.getvalue().rstrip("\n")


def print_result(text: str) -> None:
    """Print on stdout what the command was asked for, in one line or several.

    Raises:
        RunError: stdout cannot be written.
    """
    streams.lost_by(sys.stdout)
    for line in text.split("\n"):
        _print_line(line, sys.stdout)
    if reason := streams.lost_by(sys.stdout):
        raise RunError(f"stdout cannot be written: {reason}")


def print_done(text: str, details: str = "") -> None:
    """Print on stdout what the command has done, and the details.

    Raises:
        RunError: stdout cannot be written; the message says what has been done.
    """
    try:
        print_result(f"{text}\n{details}" if details else text)
    except RunError as error:
        raise RunError(f"{text}; but {error}") from error


def _print_line(text: str, stream: TextIO) -> None:
    print(one_line(text), file=stream, flush=True)


def describe(error: Exception) -> str:
    """Return the message for the user: an ECAvgError's own, or one made from the kind of the error."""
    if isinstance(error, ECAvgError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError):
        return text
    if is_out_of_memory(error):
        return "there is no memory left: end other programs, or use a smaller model or batch"
    if isinstance(error, ImportError):
        return (
            f"a library cannot be loaded ({text[:300]}): give it more memory, or install this program again"
        )
    if isinstance(error, RuntimeError) and text == _NO_MORE_THREADS:
        return f"{text}: raise the limit on the processes of this user or container"
    if type(error).__module__ == "sqlite3":
        return f"the database cannot be used: {text}"
    return f"{type(error).__name__}: {text}; a fault of this program: --log-level debug shows more"


def _limit_arenas() -> None:
    """Make all threads allocate their memory from the same two arenas of glibc.

    By default glibc gives every thread an arena of its own, which keeps the memory that the chunks of a
    transfer have used. In a server with eight agents this was a third of the memory. Other C libraries have
    no arenas, and the function then does nothing.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 2)


async def _to_exit_code(command: str, body: Callable[[], Coroutine[Any, Any, int]]) -> int:
    """Run the coroutine, turn an error into its exit code, and do not wait for busy threads."""
    pool = ThreadPoolExecutor(thread_name_prefix="asyncio")
    asyncio.get_running_loop().set_default_executor(pool)
    try:
        code = await _until_signalled(body)
    except Exception as error:
        code = fail(command, error)
    pool.shutdown(wait=False, cancel_futures=True)
    _exit_if_threads_are_busy(code)
    return code


def _exit_if_threads_are_busy(code: int) -> None:
    """Exit from the process if a thread is still busy, because asyncio and Python would wait for the thread.

    The threads have BUSY_SECONDS together to end by themselves.
    """
    deadline = time.monotonic() + BUSY_SECONDS
    for thread in threading.enumerate():
        if thread is threading.current_thread() or thread.daemon:
            continue
        thread.join(max(0.0, deadline - time.monotonic()))
        if thread.is_alive():
            _exit_now(code)


def _exit_now(code: int) -> NoReturn:
    """Exit from the process without waiting for threads or running exit handlers."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


async def _until_signalled(body: Callable[[], Coroutine[Any, Any, int]]) -> int:
    """Run the coroutine to its result; exit from the process if SIGINT or SIGTERM cancels the coroutine."""
    task = asyncio.ensure_future(body())
    loop = asyncio.get_running_loop()
    stopped = False

    def stop() -> None:
        nonlocal stopped
        # With a second signal the user asks for an end without any clean-up.
        if stopped:
            os._exit(1)
        stopped = True
        task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    try:
        return await task
    except asyncio.CancelledError:
        if stopped:
            _exit_now(0)
        raise


def _parse_assignments(assignments: Sequence[str]) -> dict[str, Any]:
    """Return the values of `--set` as nested tables: `["run.seed=3"]` becomes `{"run": {"seed": 3}}`.

    A value is read as TOML. A text that is not valid TOML is taken as a string.

    Raises:
        UsageError: an assignment is not of the form KEY=VALUE.
    """
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
