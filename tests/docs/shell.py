"""The shell blocks of a page, run as a reader does: in order, one terminal for each command that stays."""

import os
import re
import signal
import subprocess
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from tests.processes import until

WHEN_ALL_HAVE_ENDED = "when all have ended"
NOT_RUN = "not run: "
# A server or an agent that has come this far stays in its terminal, and the reader goes on in another one.
STAYS = re.compile(r"cloud-server ready: |joined as edge")

_BLOCK = re.compile(
    r"(?:^ *<!-- (?P<note>[^\n]*) -->\n)?^(?P<indent> *)```sh\n(?P<text>.*?)^(?P=indent)```$",
    re.DOTALL | re.MULTILINE,
)


class Block(NamedTuple):
    """A block of commands."""

    text: str
    # Why it is not run; empty: it is.
    not_run: str
    # Whether the reader goes on only when the commands of all terminals have ended.
    waits: bool


def blocks_of(markdown: str) -> Iterator[Block]:
    """Yield the shell blocks of a page.

    Raises:
        ValueError: there is a comment before one that means nothing.
    """
    for found in _BLOCK.finditer(markdown):
        note = found["note"] or ""
        not_run = note.removeprefix(NOT_RUN) if note.startswith(NOT_RUN) else ""
        if note and not not_run and note != WHEN_ALL_HAVE_ENDED:
            raise ValueError(f"what is <!-- {note} --> before a shell block?")
        yield Block(textwrap.dedent(found["text"]), not_run, note == WHEN_ALL_HAVE_ENDED)


class Terminal:
    """A shell that runs one block."""

    def __init__(self, text: str, folder: Path, env: Mapping[str, str], output_path: Path) -> None:
        self.text = text
        self._output_path = output_path
        with output_path.open("wb") as output:
            self.process = subprocess.Popen(
                ["bash", "-euo", "pipefail", "-c", text],
                cwd=folder,
                env={**os.environ, **env},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return f"$ {self.text}{self._output_path.read_text('utf-8')}"

    def has_ended(self) -> bool:
        """Return True if the block has ended well.

        Raises:
            AssertionError: it has failed.
        """
        code = self.process.poll()
        assert code in (None, 0), f"exit code {code}:\n{self.output}"
        return code == 0

    def close(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


class Reader:
    """Someone who copies the blocks of a page, one after the other.

    Args:
        folder: where the reader works; `.venv` is there.
        env: environment variables of the commands.
        logs: an empty folder for what the commands print.
    """

    def __init__(self, folder: Path, env: Mapping[str, str], logs: Path) -> None:
        self._folder, self._env, self._logs = folder, env, logs
        self._terminals: list[Terminal] = []

    @property
    def output(self) -> str:
        return "".join(terminal.output for terminal in self._terminals)

    def copy(self, text: str) -> None:
        """Run a block until it has ended well, or stays."""
        log = self._logs / f"{len(self._terminals)}.log"
        terminal = Terminal(text, self._folder, self._env, log)
        self._terminals.append(terminal)
        until(lambda: terminal.has_ended() or STAYS.search(log.read_text("utf-8")), terminal)

    def wait(self) -> None:
        """Wait until what stays has ended well."""
        for terminal in self._terminals:
            until(terminal.has_ended, terminal)

    def close(self) -> None:
        for terminal in self._terminals:
            terminal.close()
