"""An agent that is cut off between any two steps of its round and started again goes on where it was."""

import asyncio
import json
import shutil
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ecavg.common.config import RunConfig, TrainingConfig, Wire
from ecavg.common.errors import InvalidError, NotFoundError
from ecavg.common.models import build_model
from ecavg.common.run_state import Outcome, Phase, PublishedModel, RunState, Verdict, Wait
from ecavg.common.transfer import Blob, Encoded, blob_of
from ecavg.common.weights import write_state_dict
from ecavg.common.wire import Base, decode, encode
from ecavg.edge_agent import agent as agent_module
from ecavg.edge_agent.agent import EdgeAgent
from ecavg.edge_agent.client import Joined
from ecavg.edge_agent.config import AgentConfig
from ecavg.edge_agent.local import LocalModels, load_local_models
from ecavg.edge_agent.metrics import AgentMetrics
from ecavg.edge_agent.state import AgentState, Progress, Report, Trained
from tests.soak import others_soak

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


def run_state(number: int, initial: Blob, **fields: Any) -> RunState:
    """Return the state of a round that collects, but for these fields."""
    nothing: dict[str, Any] = {
        "phase": Phase.COLLECTING,
        "initial_encoded": None,
        "outcome": None,
        "progress": None,
        "latest_model": None,
        "failed_round": 0,
        "failure": "",
        "run_over": False,
        "num_contributions": 0,
        "max_contributions": 1,
        "counted_round": 0,
        "left_out": None,
        "accepted_weights": "",
    }
    return RunState(round=number, initial_weights=initial, **(nothing | fields))


class Cloud:
    """A server that publishes as soon as there is a contribution; it outlives the agent."""

    def __init__(self, folder: Path, run: RunConfig = RUN) -> None:
        folder.mkdir()
        self.run, self.run_id = run, "run"
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
        return run_state(
            1,
            self.initial,
            phase=Phase.PUBLISHED if done else Phase.COLLECTING,
            outcome=Outcome.ACCEPTED if done else None,
            accepted_weights=self.contribution["weights"].digest if done else "",
            latest_model=PublishedModel(1, self.published, None) if done else None,
            counted_round=int(done),
            run_over=bool(self.reports),
        )

    def keep(self, path: Path, kind: str) -> None: ...

    def copy(self, blob: Blob, path: Path) -> None:
        shutil.copy(self.files[blob == self.published], path)

    def take(self, number: int, contribution: dict[str, Any]) -> Verdict:
        self.counts["contributions"] += 1
        self.contribution = {"round": number, **contribution}
        return Verdict(Outcome.ACCEPTED)


class CloudThatEncodes(Cloud):
    """It offers the model as differences from the initial weights."""

    def __init__(self, folder: Path, fault: str) -> None:
        super().__init__(folder)
        self._fault = fault
        self._path = folder / "encoded"
        base = Base(self.files[0], self.initial.digest)
        encode(self.files[1], self._path, "int8", base=base)
        decode(self._path, self.files[1], base=base)
        self.published = blob_of(self.files[1])
        if fault == "other weights":
            encode(self.files[0], self._path, "int8", base=base)
        self.encoded = Encoded(blob_of(self._path), "5" * 64 if fault == "other base" else base.digest)

    def state(self) -> RunState:
        state = super().state()
        if state.latest_model is None:
            return state
        return replace(state, latest_model=state.latest_model._replace(encoded=self.encoded))

    def copy(self, blob: Blob, path: Path) -> None:
        if blob != self.encoded.blob:
            super().copy(blob, path)
        elif self._fault == "gone":
            raise NotFoundError("gone")
        else:
            shutil.copy(self._path, path)


class CloudOfManyRounds(Cloud):
    """It goes on at once, without a model: an agent that was cut off never hears what became of its round."""

    def __init__(self, folder: Path, wire: Wire, outcomes: list[str]) -> None:
        super().__init__(folder, RUN.model_copy(update={"wire": wire}))
        self._folder = folder
        self._outcomes = outcomes
        self._counted_round = 0
        self.sent: list[str] = []  # digests of the weights, round by round

    def state(self) -> RunState:
        number = len(self.sent) + 1
        is_over = number > len(self._outcomes)
        return run_state(number, self.initial, counted_round=self._counted_round, run_over=is_over)

    def keep(self, path: Path, kind: str) -> None:
        if kind == "weights":
            shutil.copy(path, self._folder / f"sent-{len(self.sent) + 1}")
            shutil.copy(path.with_name("local.safetensors"), self._folder / f"local-{len(self.sent) + 1}")

    def take(self, number: int, contribution: dict[str, Any]) -> Verdict:
        assert number == len(self.sent) + 1
        outcome = self._outcomes[number - 1]
        self.sent.append(contribution["weights"].digest)
        if outcome == "refused":
            raise InvalidError("no")
        if outcome == "counted":
            self._counted_round = number
        return Verdict(Outcome.LATE if outcome == "late" else Outcome.ACCEPTED)

    def expected(self) -> list[str]:
        """Return the digests that should have been sent, round by round.

        Each encoding adds the rounding residual of the last contribution that counted.
        """
        base, residual, digests = Base(self.files[0], self.initial.digest), None, []
        for number, outcome in enumerate(self._outcomes, 1):
            lost, sent = self._folder / f"lost-{number}", self._folder / "expected"
            encode(
                self._folder / f"local-{number}", sent, self.run.wire,
                base=base, residual=residual, next_residual=lost,
            )  # fmt: skip
            digests.append(blob_of(sent).digest)
            residual = lost if outcome == "counted" else residual
        return digests


class Client:
    """The connection of one life of the agent."""

    def __init__(self, cloud: Cloud, power: Power) -> None:
        self._cloud, self._power = cloud, power
        self._news = asyncio.Event()
        self.waits: list[Wait | None] = []
        self.upload_waits = False

    def say_ready(self, is_ready: bool, waits_for: Wait | None = None) -> None:
        self.waits.append(waits_for)

    def say_new_examples(self, number: int) -> None:
        """Do nothing: no round of this Cloud waits for examples."""

    async def join(self, class_names: Sequence[str]) -> Joined:
        return Joined(self._cloud.run_id, self._cloud.run, 1, 1)

    async def watch(self) -> AsyncIterator[RunState]:
        while True:
            self._news.clear()
            yield self._cloud.state()
            if self._cloud.state().run_over:
                return
            await self._news.wait()

    async def upload(self, path: Path, blob: Blob, kind: str, on_bytes: Any) -> None:
        self._power.moment()
        assert blob_of(path) == blob
        self._cloud.keep(path, kind)
        self._power.moment()

    async def contribute(self, number: int, **contribution: Any) -> Verdict:
        self._power.moment()
        try:
            verdict = self._cloud.take(number, contribution)
            self._power.moment()
        finally:
            # The end of the run would race with what the agent still does for this round: see `live`.
            if not self._cloud.state().run_over:
                self._news.set()
        return verdict

    def tell(self) -> None:
        """Have the agent hear how the run stands."""
        self._news.set()

    async def download(self, blob: Blob, path: Path, on_bytes: Any) -> None:
        self._power.moment()
        self._cloud.counts[f"download {blob.digest}"] += 1
        self._cloud.copy(blob, path)
        self._power.moment()

    async def report(self, report: Report) -> None:
        self._power.moment()
        self._cloud.reports.append(report)
        self._power.moment()
        self._news.set()


class Display:
    def update(self, *_: object, **__: object) -> None: ...

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
        # This is the last that an agent does for a round, so that the run may end now.
        client.tell()

    disk.save, disk.discard = cut_around_save, cut_after_discard  # type: ignore[method-assign]
    config = AgentConfig(server="localhost:1", device="cpu")
    client = Client(cloud, power)
    agent = EdgeAgent(config, disk, client, AgentMetrics(), Display())  # type: ignore[arg-type]
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(agent_module, "load_local_models", cut_after_apply(power))
            await asyncio.wait_for(agent.run(), 60)
    finally:
        disk.close()
    return disk.progress


def cut_after_apply(power: Power) -> Callable[..., LocalModels]:
    """Return what reads the data as the agent does; the power also fails when the model is replaced."""

    def loaded(*arguments: Any) -> LocalModels:
        models = load_local_models(*arguments)
        apply = models.apply

        def then_cut(*arguments: Any, **options: Any) -> None:
            apply(*arguments, **options)
            power.moment()

        models.apply = then_cut  # type: ignore[method-assign]
        return models

    return loaded


WAYS = (("if-not-worse", 5), ("if-not-worse", 0), ("always", 1))


@pytest.mark.parametrize(("apply", "adapt_epochs"), others_soak(WAYS, WAYS[:1]))
async def test_round_ends_the_same_wherever_the_agent_was_cut_off(
    tmp_path: Path, apply: str, adapt_epochs: int
) -> None:
    run = RUN.model_copy(update={"apply": apply, "adapt_epochs": adapt_epochs})
    undisturbed = Cloud(tmp_path / "cloud", run)
    power = Power(None)
    progress = await live(undisturbed, tmp_path / "agent", power)
    report = undisturbed.reports[0]
    assert report.score_before == report.score_local > report.score_after
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
    stale = Trained(round=1, weights=blob_of(disk.local_weights), score=0.5)
    disk.save(Progress(run_id="run", trained=stale))
    disk.close()
    progress = await live(cloud, tmp_path / "agent", Power(None))
    assert progress.trained.initial_weights == cloud.contribution["initial_weights"] == cloud.initial.digest
    assert cloud.contribution["weights"] == progress.trained.weights != stale.weights


@pytest.mark.parametrize("fault", ["", "gone", "other weights", "other base"])
async def test_model_that_cannot_be_decoded_is_downloaded_as_it_is(tmp_path: Path, fault: str) -> None:
    cloud = CloudThatEncodes(tmp_path / "cloud", fault)
    cloud.run = cloud.run.model_copy(update={"apply": "always"})
    await live(cloud, tmp_path / "agent", Power(None))
    assert blob_of(tmp_path / "agent/model.safetensors") == cloud.published
    assert cloud.counts[f"download {cloud.encoded.blob.digest}"] == (fault != "other base")
    assert cloud.counts[f"download {cloud.published.digest}"] == bool(fault)
    left = [path.name for path in (tmp_path / "agent/work").iterdir()]
    assert left == [f"{cloud.published.digest}.safetensors"]


OUTCOMES = ["counted", "late", "failed", "counted", "refused", "counted"]


@pytest.mark.parametrize("wire", ["bfloat16", "int8"])
async def test_what_the_last_contribution_that_counted_has_lost_is_added_to_the_next(
    tmp_path: Path, wire: Wire
) -> None:
    cloud = CloudOfManyRounds(tmp_path / "cloud", wire, OUTCOMES)
    await live(cloud, tmp_path / "agent", Power(None))
    assert cloud.sent == cloud.expected()
    left = {path.name for path in (tmp_path / "agent").glob("residual-*")}
    assert left == {"residual-0004.safetensors", "residual-0006.safetensors"}


async def test_the_same_is_sent_wherever_the_agent_was_cut_off(tmp_path: Path) -> None:
    outcomes = ["counted", "late", "counted"]
    undisturbed = CloudOfManyRounds(tmp_path / "cloud", "int8", outcomes)
    power = Power(None)
    await live(undisturbed, tmp_path / "agent", power)
    for moment in range(power.moments):
        cloud, folder = (
            CloudOfManyRounds(tmp_path / f"cloud-{moment}", "int8", outcomes),
            tmp_path / str(moment),
        )
        power = Power(moment)
        with suppress(PowerCutError, ExceptionGroup):
            await live(cloud, folder, power)
        assert power.moments > moment  # it has gone off
        await live(cloud, folder, Power(None))
        assert cloud.sent == undisturbed.sent, moment


async def test_another_run_has_nothing_to_make_up_for(tmp_path: Path) -> None:
    for name in ("one", "other"):
        cloud = CloudOfManyRounds(tmp_path / name, "int8", ["counted", "counted"])
        cloud.run_id = name
        await live(cloud, tmp_path / "agent", Power(None))
        assert cloud.sent == cloud.expected()
