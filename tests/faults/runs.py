"""Runs whose processes are killed, and that have to come to the same end all the same."""

import contextlib
import itertools
import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from ecavg.common.faults import Point
from tests.processes import Cluster, Command, free_port
from tests.zygote import TRAINER_NAME

AGENTS = ("edge-1", "edge-2")
NUM_ROUNDS = 2
# Wide enough that the weights travel in several chunks, short enough that most of the time is starting.
SETTINGS = (
    "--rounds", NUM_ROUNDS, "--min-agents", len(AGENTS), "--max-attempts", 100,
    "--set", "run.hidden_units=2048", "--set", "run.pretrain.epochs=2", "--set", "run.fine_tune.epochs=1",
)  # fmt: skip

# One agent's model for two agents with five classes each: the other has to adapt it.
ADAPTING = (
    *SETTINGS, "--rounds", 1,
    "--set", "run.partition_by=classes:5", "--set", 'run.candidates=["best_agent"]',
    "--set", "run.fine_tune.learning_rate=1e-6",
)  # fmt: skip

# The same, without adaptation: both agents try the model first, and for one of them it is far worse.
WITHDRAWN = (*ADAPTING, "--set", "run.adapt_epochs=0", "--canary", 1)

# Both agents are needed in each round, so that none is late.
ASYNC = (*SETTINGS, "--set", 'run.mode="async"')

# The second round's contributions make up for what was lost of the first one's.
INT8 = (*SETTINGS, "--set", 'run.wire="int8"')

# Each agent has a head of its own, which the second round's pre-training goes on with.
HEADS = (*SETTINGS, "--set", 'run.share_parameters=["1.*"]')


def blobs(split: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Return data that need no large library: digit-sized noise around one image for each class."""
    if split != "train":
        return None
    chance = np.random.default_rng(0)
    labels = np.arange(400) % 10
    images = chance.integers(0, 200, (10, 1, 8, 8))[labels] + chance.integers(0, 56, (400, 1, 8, 8))
    return images.astype(np.uint8), labels.astype(np.int64)


Environment = Mapping[str, str]


class Run:
    """One server and its agents, each started again whenever it is killed."""

    def __init__(self, cluster: Cluster, settings: tuple[object, ...] = SETTINGS) -> None:
        self.cluster = cluster
        self.num_restarts = 0
        # The processes that were killed and started again.
        self._restarted: set[str] = set()
        self._settings = settings
        cluster.port, cluster.http_port = free_port(), free_port()
        self.processes: dict[str, Command] = {}

    def start(self, armed: str = "", env: Environment | None = None) -> None:
        """Start everything, the process named `armed` with this environment."""
        for name in ("server", *AGENTS):
            self._start(name, env if name == armed else None)

    def finish(self, seconds: float, disturb: Callable[["Run"], None] = lambda _: None) -> list[str]:
        """Keep everything alive to the end; the digests that the rounds published.

        Args:
            disturb: called again and again while processes run; it may kill some.
        """
        deadline = time.monotonic() + seconds
        while not all(map(self._has_ended, self.processes)):
            for name, process in self.processes.items():
                code = process.process.poll()
                if code == -signal.SIGKILL and not self._has_ended(name):
                    self.num_restarts += 1
                    self._restarted.add(name)
                    self._start(name)
                assert code in (None, 0, -signal.SIGKILL), f"{name} failed:\n{process.output[-3000:]}"
            if time.monotonic() > deadline:
                outputs = (f"{name}:\n{process.output[-2000:]}" for name, process in self.processes.items())
                raise AssertionError(f"no end after {seconds} s; " + "\n".join(outputs))
            disturb(self)
            time.sleep(0.02)
        return [self.cluster.report(number)["weights"]["sha256"] for number in range(1, self._num_rounds + 1)]

    def _has_ended(self, name: str) -> bool:
        """Return True if the process needs no other life.

        An agent that is killed between hearing that the run is over and its own end would wait for a server
        that is gone, in its next life. A server that ends by itself has told all agents.
        """
        process = self.processes[name]
        code = process.process.poll()
        if code == 0:
            return True
        if name != "server" and self.processes["server"].process.poll() == 0:
            return code == -signal.SIGKILL or name in self._restarted
        return code == -signal.SIGKILL and "the run is over" in process.output

    def is_running(self, name: str) -> bool:
        return self.processes[name].process.poll() is None

    def kill(self, name: str) -> bool:
        """SIGKILL the process, or the server's trainer; False where there is none to kill."""
        if name == "trainer":
            pids = trainers_of(self.processes["server"].process.pid)
        else:
            process = self.processes[name].process
            pids = [process.pid] if process.poll() is None else []
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return bool(pids)

    @property
    def _num_rounds(self) -> int:
        """The last `--rounds` counts, as on the command line."""
        values = [value for flag, value in itertools.pairwise(self._settings) if flag == "--rounds"]
        return int(str(values[-1]))

    def _start(self, name: str, env: Environment | None = None) -> None:
        if name == "server":
            process = self.cluster.server(*self._settings, env=env, ready=False)
        else:
            part = f"{AGENTS.index(name) + 1}/{len(AGENTS)}"
            process = self.cluster.agent(
                name, "--data", "tests.faults.runs:blobs", "--partition", part, "--checkpoint-seconds", 0,
                "--join-token-file", self.cluster.join_token(uses=len(AGENTS)), env=env, forked=True,
            )  # fmt: skip
        self.processes[name] = process


def trainers_of(server_pid: int) -> list[int]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            parent_pid = int(process.joinpath("stat").read_text("utf-8").rpartition(")")[2].split()[1])
            is_trainer = (
                b"ecavg.cloud_server.trainer" in process.joinpath("cmdline").read_bytes()
                or process.joinpath("comm").read_text("utf-8").strip() == TRAINER_NAME
            )
            if parent_pid == server_pid and is_trainer:
                found.append(int(process.name))
    return found


def armed_with(point: Point, count: int, marker: Path) -> tuple[str, Environment]:
    """Which process to arm, and how, so that it dies when it comes to `point` for the `count`th time."""
    victim = "edge-1" if point.startswith("agent_") else "server"  # the trainer inherits the server's
    return victim, {"ECAVG_CRASH_AT": f"{point.value}:{count}:{marker}"}
