"""What is written to a log or a terminal, for tests."""

import io
import json
import re
import sys
from typing import Any

import pytest


def logged(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Replace stderr by a terminal, and return the terminal.

    This is no fixture, because pytest sets stderr anew between a fixture and its test.
    """
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm-256color")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    return terminal


def final_lines(terminal: Terminal) -> list[str]:
    """Return the lines that stay visible, without styles and without erased lines."""
    plain = re.sub(r"\x1b\[[0-9;?]*[mhl]", "", terminal.getvalue())
    shown = [line.split("\x1b[2K")[-1].split("\x1b[1A")[-1] for line in plain.split("\n")]
    return [line.strip("\r ") for line in shown]
