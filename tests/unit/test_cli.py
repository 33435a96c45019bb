"""How a command ends: an exit code and one line, whatever happened, and at once."""

import asyncio
import errno
import os
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from common import cli
from common.errors import InvalidError, UsageError, one_line
from tests.processes import ROOT


def raising(error: Exception) -> Callable[[], int]:
    async def body() -> int:
        raise error

    return lambda: cli.run("edge-agent", body)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UsageError("name it"), 2, "edge-agent: name it"),
        (InvalidError("not so"), 1, "edge-agent: not so"),
        (OSError(errno.ENOSPC, "No space left", "/a/b"), 1, "edge-agent: No space left: /a/b"),
        (OSError(errno.EIO, "Input/output error"), 1, "edge-agent: Input/output error"),
        (OSError("cannot write /a:\nit broke"), 1, "edge-agent: cannot write /a: it broke"),
        (
            KeyError("x"), 1,
            "edge-agent: KeyError: 'x'; a fault of this program: --log-level debug shows more",
        ),
    ],
)  # fmt: skip
def test_every_error_is_one_line(
    error: Exception, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert raising(error)() == code
    assert capsys.readouterr().err == line + "\n"


def test_bytes_of_a_path_that_are_not_utf8_are_shown_as_numbers() -> None:
    path = os.fsdecode("/tmp/Übung\n\u202e.png".encode("latin-1", "replace"))
    assert one_line(path) == r"/tmp/\xdcbung ?.png"
    assert one_line("/tmp/Übung \ud800") == "/tmp/Übung ?"


@pytest.mark.parametrize(("level", "is_shown"), [("debug", True), ("info", False)])
def test_traceback_is_in_the_log_at_debug_level(level: str, is_shown: bool) -> None:
    code = (
        "import sys\nfrom common import cli, telemetry\n"
        f"telemetry.configure_logging(level={level!r})\n"
        "async def body(): return 1 // 0\n"
        "sys.exit(cli.run('edge-agent', body))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert ("Traceback" in done.stderr) == is_shown
    assert done.stderr.splitlines()[-1].startswith("edge-agent: ZeroDivisionError")


@pytest.mark.parametrize("executor", ["None", "concurrent.futures.ThreadPoolExecutor(1)"])
def test_command_does_not_wait_for_a_thread_that_is_busy(executor: str) -> None:
    code = (
        "import asyncio, concurrent.futures, sys, time\nfrom common import cli\n"
        "async def body():\n"
        f"    asyncio.get_running_loop().run_in_executor({executor}, time.sleep, 60)\n"
        "    print('said')\n"
        "    return 3\n"
        "sys.exit(cli.run('edge-agent', body))"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert time.monotonic() - started < 60
    assert (done.returncode, done.stdout, done.stderr) == (3, "said\n", "")


def test_threads_that_are_done_do_not_end_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.os, "_exit", lambda code: pytest.fail("not needed"))

    async def body() -> int:
        return await asyncio.to_thread(lambda: 4)

    assert cli.run("edge-agent", body) == 4
