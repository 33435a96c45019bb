"""How a command ends: an exit code and one line, whatever happened, and at once."""

import asyncio
import errno
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from ecavg.cloud_server.config import ServerConfig
from ecavg.common import cli, doctor
from ecavg.common.errors import InvalidError, RunError, UsageError, one_line
from ecavg.common.layers import preset_names, read_preset
from ecavg.edge_agent.config import AgentConfig, data_root
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
            MemoryError(), 1,
            "edge-agent: there is no memory left: end other programs, or use a smaller model or batch",
        ),
        (
            RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the documentation"), 1,
            "edge-agent: there is no memory left: end other programs, or use a smaller model or batch",
        ),
        (
            ImportError("libgomp.so.1: cannot open"), 1,
            "edge-agent: a library cannot be loaded (libgomp.so.1: cannot open): give it more memory, or"
            " install this program again",
        ),
        (
            RuntimeError("can't start new thread"), 1,
            "edge-agent: can't start new thread: raise the limit on the processes of this user or container",
        ),
        (
            sqlite3.DatabaseError("disk image is malformed"), 1,
            "edge-agent: the database cannot be used: disk image is malformed",
        ),
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
        "import sys\nfrom ecavg.common import cli, logs\n"
        f"logs.configure_logging(level={level!r})\n"
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
        "import asyncio, concurrent.futures, sys, time\nfrom ecavg.common import cli\n"
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


def test_interrupted_command_ends_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def body() -> int:
        raise KeyboardInterrupt

    assert cli.enter("cloud-server", body) == 130
    assert capsys.readouterr().err == ""


def test_empty_variables_count_as_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("HOME", "TORCH_LOGS", "XDG_CACHE_HOME", "CUDA_VISIBLE_DEVICES")
    for name in names:
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "/nowhere")

    def body() -> int:
        left = {*names, "PROMETHEUS_MULTIPROC_DIR"} & {*os.environ}
        assert left == {"XDG_CACHE_HOME", "CUDA_VISIBLE_DEVICES"}
        return 5

    assert cli.enter("cloud-server", body) == 5


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def server_config(*argv: str) -> ServerConfig:
    return cli.parse_command_line(
        cli.Parser(), ServerConfig, "ECAVG_SERVER_", argv, default_preset="digits-mlp"
    )


@pytest.mark.parametrize("preset", preset_names())
def test_preset_is_a_whole_configuration_of_the_server(preset: str) -> None:
    assert server_config("--preset", preset).rounds == read_preset(preset).get("rounds", 1)


def test_home_is_filled_in_wherever_a_path_comes_from(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "server.toml").write_text('state_dir = "~/file"\nhttp_token_file = "~/token"\n', "utf-8")
    monkeypatch.setenv("ECAVG_SERVER_TLS_DIR", "~/environment")
    config = server_config("--config", "~/server.toml", "--state-dir", "~/flag")
    paths = (config.state_dir, config.tls_dir, config.http_token_file)
    assert paths == (home / "flag", home / "environment", home / "token")
    (home / "images").mkdir()
    argv = ("--server", "a:1", "--data", "~/images")
    assert cli.parse_command_line(cli.Parser(), AgentConfig, "X_", argv).data == str(home / "images")
    assert data_root(None) == home / ".cache/ecavg"


@pytest.mark.parametrize("value", ["~nobody-of-this-name", "relative"])
def test_home_that_is_not_known_is_named(value: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", value)
    with pytest.raises(UsageError, match="the home folder in '~/x' is not known: set HOME"):
        server_config("--state-dir", "~/x")
    with pytest.raises(UsageError, match="name a folder for the datasets with --data-dir, or set HOME"):
        data_root(None)


def test_empty_values_count_as_not_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "server.toml"
    file.write_text('tls_dir = ""\nhost = ""\nhttp_host = "::1"\n', "utf-8")
    for name in ("STATE_DIR", "PORT", "HTTP_HOST", "RUN__SEED", "RUN"):
        monkeypatch.setenv(f"ECAVG_SERVER_{name}", "")
    config = server_config("--config", str(file), "--http-port", "", "--host", "")
    assert config == server_config("--http-host", "::1")
    argv = ("--server", "a:1", "--agent-id", "", "--data", "", "--allow-factory", "", "--share-data", "")
    given = cli.parse_command_line(cli.Parser(), AgentConfig, "X_", argv)
    assert given == cli.parse_command_line(cli.Parser(), AgentConfig, "X_", argv[:2])


def test_check_that_breaks_leaves_the_others_to_be_done(capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> str:
        raise KeyError("a thing\nthat nobody thought of")

    def wrong() -> str:
        raise UsageError("it is not there: get it")

    assert doctor.examine({"first": broken, "second": wrong, "third": lambda: "all is well"}) == 1
    first, *rest = capsys.readouterr().out.splitlines()
    assert first.startswith("wrong  first: KeyError: ")
    assert rest == ["wrong  second: it is not there: get it", "ok     third: all is well"]
    assert doctor.examine({"third": lambda: "all is well"}) == 0


def test_disk_with_little_room_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert re.fullmatch(r"[\d.]+ GB are free for \S+/not/yet", doctor.disk(tmp_path / "not/yet"))
    usage = shutil.disk_usage(tmp_path)._replace(free=300_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UsageError, match=r"only 0\.3 GB are free for \S+: make room, or choose"):
        doctor.disk(tmp_path)


def test_library_that_is_not_installed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_PACKAGES", ("ecavg", "no-such-library"))
    with pytest.raises(RunError, match="no-such-library is not installed: install this program again"):
        doctor.versions()


def test_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    parser = cli.Parser(prog="edge-agent")
    with pytest.raises(SystemExit) as ended:
        cli.parse_command_line(parser, AgentConfig, "ECAVG_AGENT_", ["--version"])
    assert ended.value.code == 0
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert capsys.readouterr().out == f"edge-agent {project['version']}\n"
