"""An agent that is cut off between any two steps of its round and started again goes on where it was."""

import asyncio
import json
import shutil
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from common.config import RunConfig, TrainingConfig
from common.models import build_model
from common.transfer import Blob, blob_of
from common.weights import write_state_dict
from edge_agent.agent import EdgeAgent
from edge_agent.client import Joined, RunState, Verdict
from edge_agent.config import AgentConfig
from edge_agent.metrics import AgentMetrics
from edge_agent.state import AgentState, Progress, Report, Trained

RUN = RunConfig(hidden_units=8, pretrain=TrainingConfig(epochs=2))


class PowerCutError(Exception):
    pass


class Power:
    """Goes off at one of the moments that are counted; None: never."""

    def __init__(self, off_at: int | None) -> None:
        self._off_at = off_at
        self.moments = 0

    def moment(self) -> None:
        self.moments += 1
        if self.moments - 1 == self._off_at:
            raise PowerCutError


class Cloud:
    """A server that publishes as soon as there is a contribution; it outlives the agent."""

    def __init__(self, folder: Path, run: RunConfig = RUN) -> None:
        folder.mkdir()
        self.run = run
        self.files = []
        for seed in range(2):
            path = folder / str(seed)
            write_state_dict(build_model(RUN, seed=seed).state_dict(), path)
            self.files.append(path)
        self.initial, self.published = map(blob_of, self.files)
        self.counts: Counter[str] = Counter()
        self.contribution: dict[str, Any] = {}
        self.reports: list[Report] = []

    def state(self) -> RunState:
        done = bool(self.contribution)
        return RunState(
            1, "published" if done else "collecting", self.initial, "accepted" if done else "", 0, 0,
            int(done), self.published if done else Blob("", 0), 0, "", bool(self.reports),
        )  # fmt: skip


class Client:
    """The connection of one life of the agent."""

    def __init__(self, cloud: Cloud, power: Power) -> None:
        self._cloud, self._power = cloud, power
        self._news = asyncio.Event()

    async def join(self) -> Joined:
        return Joined("run", self._cloud.run, 1, 1)

    async def watch(self) -> AsyncIterator[RunState]:
        while True:
            self._news.clear()
            yield self._cloud.state()
            if self._cloud.reports:
                return
            await self._news.wait()

    async def upload(self, path: Path, blob: Blob, kind: str, on_bytes: Any) -> None:
        self._power.moment()
        assert blob_of(path) == blob
        self._power.moment()

    async def contribute(self, number: int, **contribution: Any) -> Verdict:
        self._power.moment()
        self._cloud.counts["contributions"] += 1
        self._cloud.contribution = {"round": number, **contribution}
        self._power.moment()
        self._news.set()
        return Verdict("accepted", "")

    async def download(self, blob: Blob, path: Path, on_bytes: Any) -> None:
        self._power.moment()
        self._cloud.counts[f"download {blob.digest}"] += 1
        shutil.copy(self._cloud.files[blob == self._cloud.published], path)
        self._power.moment()

    async def report(self, report: Report) -> None:
        self._power.moment()
        self._cloud.reports.append(report)
        self._power.moment()
        self._news.set()


class Display:
    def update(self, *_: object) -> None: ...

    def message(self, text: str) -> None: ...


async def live(cloud: Cloud, folder: Path, power: Power) -> Progress:
    """One life of the agent, to its end."""
    disk = AgentState(folder, "edge-1")
    save, discard = disk.save, disk.discard

    def cut_around_save(progress: Progress) -> None:
        power.moment()
        save(progress)
        power.moment()

    def cut_after_discard(*paths: Path) -> None:
        discard(*paths)
        power.moment()

    disk.save, disk.discard = cut_around_save, cut_after_discard  # type: ignore[method-assign]
    config = AgentConfig(server="localhost:1", device="cpu")
    agent = EdgeAgent(config, disk, Client(cloud, power), AgentMetrics(), Display())  # type: ignore[arg-type]
    local_apply_cut(agent, power)
    try:
        await asyncio.wait_for(agent.run(), 60)
    finally:
        disk.close()
    return disk.progress


def local_apply_cut(agent: EdgeAgent, power: Power) -> None:
    """Also go off when the model file has been replaced."""
    load = agent._load_data

    def loaded() -> Any:
        local = load()
        apply = local.apply

        def cut_after_apply(*arguments: Any) -> None:
            apply(*arguments)
            power.moment()

        local.apply = cut_after_apply  # type: ignore[method-assign]
        return local

    agent._load_data = loaded  # type: ignore[method-assign]


@pytest.mark.parametrize(("apply", "adapt_epochs"), [("always", 1), ("if-not-worse", 0), ("if-not-worse", 5)])
async def test_round_ends_the_same_wherever_the_agent_was_cut_off(
    tmp_path: Path, apply: str, adapt_epochs: int
) -> None:
    run = RUN.model_copy(update={"apply": apply, "adapt_epochs": adapt_epochs})
    undisturbed = Cloud(tmp_path / "cloud", run)
    power = Power(None)
    progress = await live(undisturbed, tmp_path / "agent", power)
    report = undisturbed.reports[0]
    assert report.accuracy_before == report.accuracy_local > report.accuracy_after
    is_adapted = (apply, adapt_epochs) == ("if-not-worse", 5)
    assert (report.applied, report.uses_adapted) == (apply == "always" or is_adapted, is_adapted)
    in_use = blob_of(tmp_path / "agent/model.safetensors")
    if not is_adapted:
        assert in_use == (undisturbed.published if report.applied else progress.trained.weights)
    assert power.moments > 20

    for moment in range(power.moments):
        cloud, folder = Cloud(tmp_path / f"cloud-{moment}", run), tmp_path / f"agent-{moment}"
        with pytest.raises((PowerCutError, ExceptionGroup)):
            await live(cloud, folder, Power(moment))
        again = await live(cloud, folder, Power(None))

        assert (again.trained, again.arrived, again.evaluated_round) == (progress.trained, None, 1)
        assert set(map(repr, cloud.reports)) == {repr(report)}, moment
        assert cloud.contribution == undisturbed.contribution
        assert set(cloud.counts.values()) == {1}, (moment, cloud.counts)
        assert blob_of(folder / "model.safetensors") == in_use


@pytest.mark.parametrize("initial_weights", ["shared", "pretrained", "start.safetensors", "independent"])
async def test_pretraining_starts_from_the_initial_weights_unless_independent(
    tmp_path: Path, initial_weights: str
) -> None:
    cloud = Cloud(tmp_path / "cloud", RUN.model_copy(update={"initial_weights": initial_weights}))
    progress = await live(cloud, tmp_path / "agent", Power(None))
    start = None if initial_weights == "independent" else cloud.initial.digest
    assert cloud.counts[f"download {cloud.initial.digest}"] == (start is not None)
    assert progress.trained.initial_weights == cloud.contribution["initial_weights"] == start
    report = json.loads((tmp_path / "agent/report.json").read_text("utf-8"))
    assert report["initial_weights"] == start


async def test_weights_that_started_elsewhere_are_trained_again(tmp_path: Path) -> None:
    """As an older agent left them, which did not note where it had started."""
    cloud = Cloud(tmp_path / "cloud")
    disk = AgentState(tmp_path / "agent", "edge-1")
    shutil.copy(cloud.files[1], disk.local_weights)
    stale = Trained(round=1, weights=blob_of(disk.local_weights), accuracy=0.5)
    disk.save(Progress(run_id="run", trained=stale))
    disk.close()
    progress = await live(cloud, tmp_path / "agent", Power(None))
    assert progress.trained.initial_weights == cloud.contribution["initial_weights"] == cloud.initial.digest
    assert cloud.contribution["weights"] == progress.trained.weights != stale.weights
