"""Starts edge-agents by forking a process that has imported PyTorch already.

Importing it is nearly all of what a short run of an agent costs, and the crash matrix starts hundreds. The
agents are processes of their own all the same: with their own session, killed by SIGKILL like any other.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
POLL_SECONDS = 0.01


class Zygote:
    """The process that forks."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.zygote"],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, args: Sequence[str], output: Path, env: Mapping[str, str]) -> "ForkedProcess":
        return ForkedProcess(self, self.ask(start=list(args), output=str(output), env=dict(env)))

    def ask(self, **request: Any) -> Any:
        assert self._process.stdin
        assert self._process.stdout
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
    """As much of `subprocess.Popen` as tests use."""

    def __init__(self, zygote: Zygote, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._zygote = zygote

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._zygote.ask(poll=self.pid)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = time.monotonic() + (timeout or 60.0)
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("edge-agent", timeout or 60.0)
            time.sleep(POLL_SECONDS)
        return code


def serve() -> None:
    """Answer requests from stdin until it ends; what still runs then is killed by whoever started it."""
    import edge_agent.agent
    import edge_agent.client
    import edge_agent.state  # noqa: F401  imported for the agents to find

    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            answer: Any = fork(request["start"], request["output"], request["env"])
        else:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        print(json.dumps(answer), flush=True)


def fork(args: list[str], output: str, env: dict[str, str]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 70
    with contextlib.suppress(BaseException):
        os.setsid()
        null, log = os.open(os.devnull, os.O_RDONLY), os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for source, target in ((null, 0), (log, 1), (log, 2)):
            os.dup2(source, target)
        os.environ.update(env)
        code = run(args)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run(args: list[str]) -> int:
    from common import faults
    from edge_agent.__main__ import main

    faults._armed = faults._Armed(os.environ.get("ECAVG_CRASH_AT", ""))  # read when it was imported
    return main(args)


if __name__ == "__main__":
    serve()
