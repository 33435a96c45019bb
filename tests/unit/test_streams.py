"""Standard streams that cannot be written: nothing is raised, and every lost line is counted."""

import os
import subprocess
import sys

import pytest

from tests.processes import ROOT

PREPARED = "import os, sys\nfrom ecavg.common import cli, streams\nstreams.prepare()\n"


def run(code: str, redirection: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    """Run Python code after `prepare`, under a shell that redirects the standard streams."""
    return subprocess.run(
        ["sh", "-c", f'exec "$@" {redirection}', "sh", sys.executable, "-c", PREPARED + code],
        cwd=ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("redirection", ["2>/dev/full", "2>&-", "2>/dev/full <&- "])
def test_lost_lines_are_counted_and_the_process_ends_well(redirection: str) -> None:
    code = "for text in ('one', 'two\\nthree'): print(text, file=sys.stderr)\nprint(streams.num_dropped())"
    done = run(code, redirection)
    assert (done.returncode, done.stdout, done.stderr) == (0, "3\n", "")


def test_lines_are_written_as_soon_as_a_full_disk_has_room_again() -> None:
    code = (
        "print('lost', file=sys.stderr)\n"
        "os.dup2(1, 2)\n"
        "print('there', file=sys.stderr)\n"
        "print(streams.lost_by(sys.stderr), '|', streams.lost_by(sys.stderr))"
    )
    assert run(code, "2>/dev/full").stdout == "there\nNo space left on device | \n"


def test_pipe_that_is_full_and_does_not_block_loses_lines() -> None:
    code = (
        "reading, writing = os.pipe()\n"
        "os.set_blocking(writing, False)\n"
        "os.dup2(writing, 2)\n"
        "for _ in range(100): print('x' * 999, file=sys.stderr)\n"
        "print(streams.num_dropped() > 0, streams.lost_by(sys.stderr))"
    )
    assert run(code).stdout == "True its reader does not keep up\n"


def test_log_does_not_wait_for_ever_for_a_reader_that_has_stopped_to_read() -> None:
    code = (
        "reading, writing = os.pipe()\n"
        "os.dup2(writing, 2)\n"
        "for _ in range(1000): print('x' * 999, file=sys.stderr)\n"
        "print(streams.num_dropped() > 900, streams.lost_by(sys.stderr))\n"
        "os.read(reading, 65536)\n"
        "print('y' * 9999, file=sys.stderr)\n"
        "print(streams.lost_by(sys.stderr) or os.read(reading, 65536).endswith(b'y\\n'))"
    )
    assert run(code).stdout == "True its reader does not keep up\nTrue\n"


def test_result_waits_for_its_reader() -> None:
    code = "cli.print_result('\\n'.join(str(number) for number in range(30_000)))"
    done = run(code, "| (sleep 1.5; tail -n 1)")
    assert (done.stdout, done.stderr) == ("29999\n", "")


def test_closed_descriptors_keep_their_numbers() -> None:
    code = (
        "file = open('/dev/zero')\n"
        "numbers = [number for number in range(3) if os.get_inheritable(number)] + [file.fileno()]\n"
        "os.write(9, str(numbers).encode())"
    )
    assert run(code, "9>&1 <&- >&- 2>&-").stdout == "[0, 1, 2, 3]"


@pytest.mark.parametrize("redirection", [">&-", ">/dev/full"])
def test_result_that_is_lost_is_an_error_and_a_status_line_is_not(redirection: str) -> None:
    code = "cli.print_status('ready')\nsys.exit(cli.enter('x', lambda: cli.print_result('one\\ntwo') or 0))"
    done = run(code, redirection)
    assert done.returncode == 1
    assert done.stderr.startswith("x: stdout cannot be written: ")
    assert len(done.stderr.splitlines()) == 1


def test_character_that_the_encoding_does_not_have_is_escaped() -> None:
    code = "cli.print_result('☃')\ncli.warn('x', '☃')"
    assert run(code, PYTHONIOENCODING="utf-8").stdout == "☃\n"
    done = run(code, PYTHONIOENCODING="ascii")
    assert (done.stdout, done.stderr) == ("\\u2603\n", "x: WARNING: \\u2603\n")
