"""Real servers and agents for tests, as processes of their own, all of which end with the test."""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from ecavg.cloud_server.door.authority import Authority
from ecavg.cloud_server.state_dir import StateDir
from ecavg.common import tls
from ecavg.edge_agent.identity import Identity, find
from tests.zygote import IS_COLD, the_zygote

ROOT = Path(__file__).parent.parent
# This is several times what any wait takes, so that a test also passes on a machine that is busy.
WAIT_SECONDS = 120.0
NO_STREAMS: Mapping[int, str] = {}


class Command:
    """A process of `cloud-server` or `edge-agent`, whose output goes to a file.

    Args:
        env: environment variables beside those of the tests; None for one that is not to be set.
        forked: True to fork the process from a process that has imported the modules already.
        streams: standard streams of a forked process that are not as usual; see tests/zygote.py.
        prefix: words before the command, such as those of another program that runs it.
    """

    # A subprocess.Popen, or a tests.zygote.ForkedProcess.
    process: Any

    def __init__(
        self,
        module: str,
        *args: object,
        folder: Path,
        env: Mapping[str, str | None] | None = None,
        cwd: Path = ROOT,
        forked: bool = False,
        streams: Mapping[int, str] = NO_STREAMS,
        prefix: Sequence[str] = (),
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.output_path = folder / f"{module}.{time.monotonic_ns()}.log"
        self.output_path.touch()
        words = list(map(str, args))
        variables = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
        environment = {name: value for name, value in variables.items() if value is not None}
        if forked:
            self.process = the_zygote().start(
                module, words, output=self.output_path, env=environment, cwd=cwd, streams=streams
            )
            return
        with self.output_path.open("wb") as output:
            self.process = subprocess.Popen(
                [*prefix, sys.executable, "-m", module, *words],
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self.output_path.read_text("utf-8")

    def wait(self, seconds: float = WAIT_SECONDS) -> int:
        """Wait for the end of the process, and return its exit code."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s:\n{self.output}") from None

    def wait_for(self, pattern: str, seconds: float = WAIT_SECONDS) -> re.Match[str]:
        """Wait until `pattern` matches in the process's output, and return the first match."""
        return until(lambda: re.search(pattern, self.output), self, seconds)

    def terminate(self) -> int:
        self.process.terminate()
        return self.wait()

    def kill(self) -> None:
        """Send SIGKILL to the process alone; processes that it started must notice its end by themselves."""
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def until(condition: Callable[[], Any], command: Command, seconds: float = WAIT_SECONDS) -> Any:
    """Wait until the condition's value is true, and return the value.

    Raises:
        AssertionError: the command ended, or the time is over, and the condition is still not true.
    """
    deadline = time.monotonic() + seconds
    while True:
        ended = command.process.poll() is not None
        if value := condition():
            return value
        if ended or time.monotonic() > deadline:
            what = "ended" if ended else f"nothing came in {seconds} s"
            raise AssertionError(f"{what}; its output:\n{command.output}")
        time.sleep(0.02)


def free_port() -> int:
    """Return a port that nothing listens on, outside the range from which the system gives ports itself."""
    while True:
        port = random.SystemRandom().randrange(10_000, 30_000)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def enroll(tls_folder: Path, agent_folder: Path, agent_id: str) -> Identity:
    """Enroll an agent as `edge-agent enroll` does, but without a server, which need not have started yet."""
    if identity := find(agent_folder / "tls"):
        return identity
    key = tls.new_key()
    with closing(Authority(tls_folder)) as authority:
        token = tls.JoinToken.parse(authority.create_token(1, 3600))
        certificate = authority.enroll(token.token_id, tls.make_request(key, agent_id))
        both = certificate + authority.ca_certificate
    tls.make_private_folder(agent_folder / "tls")
    tls.write_private(agent_folder / "tls/key.pem", tls.pem(key))
    tls.write_private(agent_folder / "tls/identity.pem", both)
    return Identity(agent_folder / "tls")


class Cluster:
    """A server and its agents, with all their files below one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state_dir = folder / "server"
        self.port = 0
        self.http_port = 0
        self._commands: list[Command] = []

    def server(
        self,
        *args: object,
        env: Mapping[str, str] | None = None,
        ready: bool = True,
        streams: Mapping[int, str] = NO_STREAMS,
    ) -> Command:
        """Start the server; a later start uses the ports of the first start again."""
        command = self._start(
            "ecavg.cloud_server", "--host", "127.0.0.1", "--port", self.port, "--http-port", self.http_port,
            "--state-dir", self.state_dir, *args, folder=self.folder, env=env, streams=streams,
        )  # fmt: skip
        if ready:
            match = command.wait_for(r"ready: agents on \S+?:(\d+), status page on http://\S+?:(\d+)/")
            self.port, self.http_port = int(match[1]), int(match[2])
        return command

    def agent(
        self,
        name: str,
        *args: object,
        env: Mapping[str, str] | None = None,
        forked: bool = not IS_COLD,
        streams: Mapping[int, str] = NO_STREAMS,
    ) -> Command:
        """Start an agent; enroll it first, unless it does not need to be or enrolls itself."""
        if not {"--insecure", "--join-token-file"} & set(args):
            self.enroll(name)
        return self._start(
            "ecavg.edge_agent", "--server", f"127.0.0.1:{self.port}", "--agent-id", name,
            "--state-dir", self.folder / name, *args, folder=self.folder, env=env, forked=forked,
            streams=streams,
        )  # fmt: skip

    def enroll(self, name: str) -> Identity:
        return enroll(StateDir(self.state_dir).tls, self.folder / name, name)

    def forget(self, name: str, env: Mapping[str, str] | None = None) -> Command:
        """Start `cloud-server forget`, which ends after the server has forgotten the agent."""
        where = ("--state-dir", self.state_dir)
        return self._start("ecavg.cloud_server", "forget", name, *where, folder=self.folder, env=env)

    def join_token(self, uses: int) -> Path:
        """Return the path of a file with a join token; every call returns the same token."""
        file = self.folder / "join-token"
        if not file.exists():
            with closing(Authority(StateDir(self.state_dir).tls)) as authority:
                file.write_text(authority.create_token(uses, 3600), "utf-8")
        return file

    def report(self, number: int = 1) -> dict[str, Any]:
        path = StateDir(self.state_dir).report(number)
        report: dict[str, Any] = json.loads(path.read_text("utf-8"))
        return report

    def _start(
        self,
        module: str,
        *args: object,
        folder: Path,
        env: Mapping[str, str] | None,
        forked: bool = not IS_COLD,
        streams: Mapping[int, str] = NO_STREAMS,
    ) -> Command:
        command = Command(
            module, *args, folder=folder / "logs", env=env, forked=forked or bool(streams), streams=streams
        )
        self._commands.append(command)
        return command

    def close(self) -> None:
        """Kill every command that still runs, so that none outlives the cluster."""
        for command in self._commands:
            command.close()


@contextmanager
def cluster_in(folder: Path, kind: type[Cluster] = Cluster) -> Iterator[Cluster]:
    cluster = kind(folder)
    try:
        yield cluster
    finally:
        cluster.close()
