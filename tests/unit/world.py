"""A coordinator that runs, with a real store and real files; only the trainer is played by the test."""

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from ecavg.cloud_server.__main__ import open_service
from ecavg.cloud_server.config import ServerConfig
from ecavg.cloud_server.contribution import Contribution
from ecavg.cloud_server.coordinator import Coordinator
from ecavg.cloud_server.desk import Desk
from ecavg.cloud_server.disk.tables import ReportRow
from ecavg.cloud_server.jobs import (
    AgentAudit,
    Job,
    JobDirectory,
    Progress,
    Result,
    WeightsFile,
    pending_jobs,
)
from ecavg.cloud_server.ledger import Ledger
from ecavg.cloud_server.metrics import ServerMetrics
from ecavg.cloud_server.showing import presence
from ecavg.cloud_server.showing.reports import Reports
from ecavg.cloud_server.showing.standing import Standing
from ecavg.cloud_server.showing.status import Status
from ecavg.cloud_server.showing.traffic import Traffic
from ecavg.cloud_server.showing.viewers import Viewers
from ecavg.cloud_server.store import Store
from ecavg.cloud_server.tracking.thread import Tracking
from ecavg.cloud_server.tracking.to_webhook import Receiver
from ecavg.cloud_server.training import runner as job_runner
from ecavg.cloud_server.upkeep import caretaker
from ecavg.common.errors import (
    RunError,
)
from ecavg.common.run_state import Outcome
from ecavg.common.transfer import Blob

# What an agent reports on a model that it uses.
REPORT = ReportRow(
    agent_id="",
    score_local=0.5,
    score_before=0.5,
    score_after=0.6,
    num_held_out=10,
    applied=True,
    reason="",
    at=0.0,
)


def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what waits for a while wait for a moment."""
    monkeypatch.setattr(job_runner, "POLL_SECONDS", 0.001)
    monkeypatch.setattr(presence, "LIVENESS_SECONDS", 0.0)
    monkeypatch.setattr(caretaker, "FORGET_POLL_SECONDS", 0.001)


@dataclass
class PlayedTrainer:
    """Does the jobs as the test has them done."""

    state_dir: Path
    outcomes: list[Result | None] = field(default_factory=list)  # of round jobs, in order; None: a model
    num_exits: int = 0
    is_running: bool = True
    audit: tuple[AgentAudit, ...] = ()  # of each round
    audit_note: str = ""
    jobs: list[Job] = field(default_factory=list)

    is_slow: bool = False  # at its next round
    dropped: asyncio.Event = field(default_factory=asyncio.Event)

    async def restart(self) -> None:
        self.num_exits += 1
        self.dropped.set()

    async def work(self) -> None:
        while True:
            for directory in pending_jobs(self.state_dir / "jobs"):
                job = directory.read_job()
                self.jobs.append(job)
                outcome = self.outcomes.pop(0) if job.kind == "round" and self.outcomes else None
                if job.kind == "round" and self.is_slow:
                    self.is_slow = False  # and is restarted before it gets on
                    directory.append_progress(Progress(phase="fine_tuning", done=1, total=2))
                    await self.dropped.wait()
                    continue
                directory.append_progress(Progress(phase="aggregating", done=1, total=1))
                found = {"audit": self.audit, "audit_note": self.audit_note}
                model = model_in(directory, job.round).model_copy(update=found)
                directory.write_result(outcome or model)
            await asyncio.sleep(0.001)


def model_in(directory: JobDirectory, seed: int) -> Result:
    digest = write_weights(directory.weights_path, seed)
    size = directory.weights_path.stat().st_size
    return Result(
        weights=WeightsFile(sha256=digest, bytes=size), candidates={"average": 0.5}, start="average"
    )


def write_weights(path: Path, seed: int) -> str:
    save_file({"weight": np.full((2, 3), seed, np.float32)}, path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@dataclass
class World:
    """A coordinator that runs, and what it stands on."""

    coordinator: Coordinator
    desk: Desk
    ledger: Ledger
    standing: Standing
    status: Status
    reports: Reports
    traffic: Traffic
    tracking: Tracking
    store: Store
    trainer: PlayedTrainer
    config: ServerConfig
    metrics: ServerMetrics
    running: asyncio.Task[None]

    async def contribution_of(self, agent_id: str, seed: int = 7) -> Contribution:
        """Join and upload; what is left is to contribute."""
        path = self.config.state_dir / "upload"
        write_weights(path, seed)
        return await self.upload(agent_id, path)

    async def upload(self, agent_id: str, path: Path) -> Contribution:
        await self.desk.join(agent_id)
        content = await asyncio.to_thread(path.read_bytes)
        digest = hashlib.sha256(content).hexdigest()
        async with self.desk.receive(agent_id, "weights", Blob(digest, len(content)), 0) as upload:
            await upload.write(content)
        start = self.standing.state_for().initial_weights.digest
        return Contribution(agent_id, digest, (), 1, start, 0.5)

    async def contribute(self, agent_id: str, number: int = 1) -> Outcome:
        contribution = await self.contribution_of(agent_id)
        return (await self.desk.contribute(agent_id, number, contribution)).outcome

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not condition():
                if self.running.done():
                    self.running.result()
                await asyncio.sleep(0.001)

    def report(self, number: int = 1) -> dict[str, Any]:
        path = self.config.state_dir / f"rounds/{number:04d}/report.json"
        report: dict[str, Any] = json.loads(path.read_text("utf-8"))
        return report


@asynccontextmanager
async def world(
    state_dir: Path,
    outcomes: list[Result | None] | None = None,
    clock: Callable[[], float] = time.time,
    receiver: Receiver | None = None,
    **keys: Any,
) -> AsyncIterator[World]:
    config = ServerConfig(state_dir=state_dir, **{"min_agents": 1, "rounds": 0} | keys)
    with closing(Store(state_dir)) as store:
        trainer = PlayedTrainer(state_dir, outcomes or [])
        metrics = ServerMetrics(agent_labels=config.agent_labels)
        working = asyncio.create_task(trainer.work())
        service = await open_service(
            config, store, trainer, metrics, Viewers(), receiver=receiver, clock=clock
        )
        running = asyncio.create_task(service.coordinator.run())
        try:
            yield World(*service, store, trainer, config, metrics, running)
        finally:
            for task in (running, working):
                task.cancel()
                with suppress(asyncio.CancelledError, RunError):
                    await task
            service.tracking.stop()
