"""The parts that the experiments' commands share: options, exit codes, and the text of a command."""

import argparse
import os
import shlex
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ecavg.common.config import RunConfig
from ecavg.common.errors import ECAvgError, UsageError
from ecavg.common.files import replacing
from ecavg.common.layers import deep_merge

console = Console()


def set_up_process() -> None:
    """Set this process to one thread, deterministic results, and the product's log to warnings and errors."""
    # PyTorch reads the variable when it is imported.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from ecavg.common.devices import make_deterministic
    from ecavg.common.logs import configure_logging

    make_deterministic()
    configure_logging(level="warning")


def exit_code_of(name: str, work: Callable[[], None]) -> int:
    """Do the work, and return the exit code; an error is printed in one line."""
    set_up_process()
    try:
        work()
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on from here")
        return 130
    except ECAvgError as error:
        console.print(f"{name}: {error}", markup=False)
        return error.exit_code
    return 0


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that every command has: data, seeds, settings, and folders."""
    add = parser.add_argument
    add("--data-dir", type=Path, metavar="DIR", help="where the dataset is, as for edge-agent")
    add("--seeds", type=int, default=3, metavar="N", help="how many (default: 3)")
    add(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="in the [run] table; TOML; repeatable"
    )
    add("--work-dir", type=Path, default=Path(".experiments"), metavar="DIR", help="default: .experiments")
    add("--out-dir", type=Path, default=Path("experiments/results"), metavar="DIR")


def run_config(run: Mapping[str, Any], assignments: Sequence[str]) -> RunConfig:
    """Return the configuration of a `[run]` table with the changes of `--set`.

    Raises:
        UsageError: a change is not TOML, or the changed table is not valid.
    """
    for assignment in assignments:
        try:
            run = deep_merge(run, tomllib.loads(assignment))
        except tomllib.TOMLDecodeError as error:
            raise UsageError(f"--set {assignment} is not TOML: {error}") from error
    try:
        return RunConfig(**run)
    except ValueError as error:
        raise UsageError(" ".join(str(error).split())) from error


def progress_bars() -> Progress:
    """Return progress bars that show the count of finished steps and the elapsed time."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console)


def in_words(
    module: str, arguments: argparse.Namespace, names: Sequence[str], defaults: Mapping[str, Any]
) -> str:
    """Return the command that makes these figures, without options that have their default.

    The folders of this machine do not appear in the command.
    """
    words = ["python", "-m", module, "--data-dir", "DIR"]
    for name in names:
        value = getattr(arguments, name)
        if value not in (None, defaults.get(name)):
            words += [f"--{name.replace('_', '-')}", str(value)]
    for assignment in arguments.set:
        words += ["--set", assignment]
    return shlex.join(words)


def write_text(path: Path, text: str) -> None:
    """Write the file atomically."""
    with replacing(path) as partial:
        partial.write_text(text + "\n", "utf-8")
