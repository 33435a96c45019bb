"""The zygote: a process that has imported all modules, and from which the tests fork other processes.

The tests start hundreds of servers, trainers and agents, and the import of PyTorch takes nearly all of the
time of a short run. Each forked process is still a process of its own, with its own session and its own
output, and SIGKILL ends it like any other process. With `ECAVG_TESTS_COLD=1`, as in `make soak`, nothing is
forked, and every process is started as users start it.
"""

import asyncio
import atexit
import contextlib
import ctypes
import functools
import gc
import importlib
import json
import os
import pkgutil
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

ROOT = Path(__file__).parents[1]
POLL_SECONDS = 0.01
IS_COLD = os.environ.get("ECAVG_TESTS_COLD", "") not in ("", "0")
# Agents import these modules by name, so the zygote imports them, too.
LARGE = ("sklearn.datasets", "tests.faults.runs", "tests.integration.sources")
# These modules need packages that not everybody has.
OPTIONAL = ("ecavg.cloud_server.tracking.to_tensorboard", "ecavg.common.trace_export")
# The kernel allows at most 15 bytes for the name of a process: proc(5), comm.
TRAINER_NAME = "ecavg-trainer"
# The numbers of the options are those of prctl(2).
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


class Zygote:
    """The process from which the others are forked, as the tests see it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.zygote"],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(
        self,
        module: str,
        args: Sequence[str],
        *,
        output: Path,
        env: Mapping[str, str],
        cwd: Path,
        streams: Mapping[int, str],
    ) -> "ForkedProcess":
        """Start `python -m module args` with this environment, and nothing of the zygote's own.

        Args:
            streams: standard streams that are not as usual, by number; see `_spoil`.
        """
        pid = self.ask(
            start=[module, *args], output=str(output), env=dict(env), cwd=str(cwd), streams=dict(streams)
        )
        return ForkedProcess(self, pid)

    def ask(self, **request: Any) -> Any:
        assert self._process.stdin
        assert self._process.stdout
        with self._lock:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


class ForkedProcess:
    """A forked process, with the part of `subprocess.Popen` that tests use."""

    def __init__(self, zygote: Zygote, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._zygote = zygote

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._zygote.ask(poll=self.pid)
        return self.returncode

    def wait(self, timeout: float = 60.0) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("a forked process", timeout)
            time.sleep(POLL_SECONDS)
        return code

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


@functools.cache
def the_zygote() -> Zygote:
    """Return the zygote of this test process; the first call starts it."""
    zygote = Zygote()
    atexit.register(zygote.close)
    return zygote


# ---------------------------------------------------------------------- in the zygote


def serve() -> None:
    """Answer requests from stdin until stdin ends.

    The kernel kills the forked processes that still run then.
    """
    for package in ("common", "edge_agent", "cloud_server"):
        for module in pkgutil.walk_packages([str(ROOT / package)], f"ecavg.{package}."):
            if not module.name.endswith(".__main__") and module.name not in OPTIONAL:
                importlib.import_module(module.name)
    for name in LARGE:
        importlib.import_module(name)
    gc.collect()
    # A garbage collection writes to the objects that it looks through, so that each forked process would copy
    # the memory that all of them share. Frozen objects are left out of collections.
    gc.freeze()

    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            answer: Any = fork(functools.partial(_run_command, **request))
        else:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        print(json.dumps(answer), flush=True)


def fork(body: Callable[[], int]) -> int:
    """Fork a process that does the body and ends with the exit code that the body returns.

    Returns:
        The id of the new process.
    """
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        code = body()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(BaseException):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _run_command(
    start: list[str], output: str, env: Mapping[str, str], cwd: str, streams: Mapping[str, str]
) -> int:
    os.setsid()
    # A test process that is killed cannot end what it has started, which would go on training.
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    null, log = os.open(os.devnull, os.O_RDONLY), os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for source, target in ((null, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    # Python itself reads this variable only when it starts.
    sys.path[1:1] = filter(None, env.get("PYTHONPATH", "").split(os.pathsep))
    module, *args = start
    _arm()
    if module.startswith("ecavg.cloud_server") and args[:1] != ["forget"]:
        _take_trainers_from_a_nursery()
    for number, what in streams.items():
        _spoil(int(number), what)
    return _run_module(module, args)


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _spoil(number: int, what: str) -> None:
    """Make a standard stream one that cannot be written, as the shell or a supervisor might.

    Args:
        number: 0, 1 or 2.
        what: "closed", "no reader" for a pipe whose reader has gone, or the path of a file.
    """
    if what == "closed":
        os.close(number)
        name = ("stdin", "stdout", "stderr")[number]
        # Python's own start does the same with a descriptor that is closed.
        setattr(sys, name, None)
        setattr(sys, f"__{name}__", None)
        return
    reading, writing = os.pipe()
    os.close(reading)
    descriptor = writing if what == "no reader" else os.open(what, os.O_RDWR | os.O_NOCTTY)
    os.dup2(descriptor, number)
    for each in {writing, descriptor}:
        os.close(each)


def _arm() -> None:
    """Read the environment variable again that `ecavg.common.faults` has read when it was imported."""
    from ecavg.common import faults

    faults._armed = faults._Armed(os.environ.get("ECAVG_CRASH_AT", ""))


def _run_module(module: str, args: Sequence[str]) -> int:
    """Run a module as `python -m module args` does, and return the exit code 0."""
    sys.argv = [module, *args]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    return 0


# ---------------------------------------------------------------------- trainers


class _Nursery:
    """A child of the server from which the server's trainers are forked.

    The server itself must not fork, because it has threads. A trainer is forked twice. When the process in
    between has ended, the trainer becomes the server's own child, so that the kernel tells the server of the
    trainer's end.
    """

    def __init__(self) -> None:
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)
        self._line, its_end = socket.socketpair()

        def tend() -> int:
            self._line.close()
            while _take_order(its_end):
                pass
            return 0

        fork(tend)
        its_end.close()

    async def start(
        self, *command: str, stdin: BinaryIO, stdout: BinaryIO, stderr: BinaryIO, process_group: int
    ) -> "_Trainer":
        """Start a trainer, in place of `asyncio.create_subprocess_exec`."""
        assert (command[1:3], process_group) == (("-m", "ecavg.cloud_server.trainer"), 0)
        files = [each.fileno() for each in (stdin, stdout, stderr)]
        socket.send_fds(self._line, [json.dumps(command[2:]).encode()], files)
        pid, is_ours = self._line.recv(4, socket.MSG_WAITALL), self._line.recv(1)
        assert is_ours
        return _Trainer(int.from_bytes(pid))


class _Trainer:
    """A trainer process, with the part of `asyncio.subprocess.Process` that the server uses."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._ended = asyncio.Event()
        file = os.pidfd_open(pid)
        asyncio.get_running_loop().add_reader(file, self._reap, file)

    def _reap(self, file: int) -> None:
        asyncio.get_running_loop().remove_reader(file)
        os.close(file)
        _, status = os.waitpid(self.pid, 0)
        self.returncode = os.waitstatus_to_exitcode(status)
        self._ended.set()

    async def wait(self) -> int:
        await self._ended.wait()
        assert self.returncode is not None
        return self.returncode


def _take_order(line: socket.socket) -> bool:
    """Wait for an order, and fork one trainer; return False if the server has ended instead."""
    message, files, _, _ = socket.recv_fds(line, 1 << 16, 3)
    if not message:
        return False
    module, *args = json.loads(message)

    def trainer() -> int:
        line.close()
        os.setpgid(0, 0)
        for target, source in enumerate(files):
            os.dup2(source, target)
            os.close(source)
        Path("/proc/self/comm").write_text(TRAINER_NAME, "ascii")
        return _run_module(module, args)

    def between() -> NoReturn:
        line.sendall(fork(trainer).to_bytes(4))
        os._exit(0)

    os.waitpid(fork(between), 0)
    line.sendall(b"!")
    for file in files:
        os.close(file)
    return True


def _take_trainers_from_a_nursery() -> None:
    from ecavg.cloud_server.training import supervisor

    setattr(supervisor, "create_subprocess_exec", _Nursery().start)  # noqa: B010


if __name__ == "__main__":
    serve()
