"""An agent whose model is withdrawn goes back, wherever it is cut off; a pinned model is used in any case."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from ecavg.common.run_state import Outcome, Phase, PublishedModel, RunState, Verdict
from ecavg.common.transfer import Blob, blob_of
from ecavg.edge_agent import local
from ecavg.edge_agent.history import History, Source
from ecavg.edge_agent.state import AgentState, Progress
from tests.faults.test_agent_restart import RUN, Client, Cloud, Power, PowerCutError, live, run_state

# The model that the cloud publishes has not been trained, and is far worse than what the device has trained.
ALWAYS = RUN.model_copy(update={"apply": "always"})
IF_NOT_WORSE = RUN.model_copy(update={"adapt_epochs": 0})
WITHDRAWN = "the server has withdrawn the model"


class CloudThatWithdraws(Cloud):
    """It withdraws its model once the agent uses it, and is over once the agent has gone back."""

    # How many moments of the agent's life were over when the agent was told.
    told_at: int | None = None

    def __init__(self, folder: Path, power: Power) -> None:
        super().__init__(folder, ALWAYS)
        self._power = power

    def state(self) -> RunState:
        state = super().state()
        fields: dict[str, Any] = {"phase": state.phase, "outcome": state.outcome}
        if not self.reports:
            return state
        self.told_at = self.told_at or self._power.moments
        return run_state(
            1,
            self.initial,
            **fields,
            accepted_weights=state.accepted_weights,
            withdrawn_rounds=(1,),
            run_over=not self.reports[-1].applied,
        )


async def test_agent_goes_back_and_says_so_wherever_it_was_cut_off(tmp_path: Path) -> None:
    power = Power(None)
    undisturbed = CloudThatWithdraws(tmp_path / "cloud", power)
    progress = await live(undisturbed, tmp_path / "agent", power)
    assert [report.applied for report in undisturbed.reports] == [True, False]
    assert undisturbed.reports[1].reason == "the model is withdrawn"
    assert progress.avoided_rounds == (1,)
    assert progress.trained
    assert in_use(tmp_path / "agent") == progress.trained.weights

    # What goes before is in test_agent_restart.py.
    assert undisturbed.told_at
    moments = range(undisturbed.told_at - 1, power.moments)
    assert len(moments) > 5
    for moment in moments:
        power, folder = Power(moment), tmp_path / f"agent-{moment}"
        cloud = CloudThatWithdraws(tmp_path / f"cloud-{moment}", power)
        with pytest.raises((PowerCutError, ExceptionGroup)):
            await live(cloud, folder, power)
        await live(cloud, folder, Power(None))
        assert not cloud.reports[-1].applied, moment
        assert in_use(folder) == progress.trained.weights, moment
        uses = History(folder, 3).uses()
        assert [use.source for use in uses] == [Source.PRE_TRAINED, Source.PUBLISHED, Source.ROLLED_BACK]
        assert uses[1].failure == WITHDRAWN


class CloudWithSteps(Cloud):
    """It goes on to its next state with each report and each contribution."""

    def __init__(self, folder: Path, steps: list[dict[str, Any]]) -> None:
        super().__init__(folder, IF_NOT_WORSE)
        self._steps = steps
        self.num_contributions = 0

    def state(self) -> RunState:
        done = len(self.reports) + self.num_contributions
        step = {"round": 1} | (self._steps[done] if done < len(self._steps) else {"run_over": True})
        latest, number = step.pop("latest", 0), step.pop("round")
        model = PublishedModel(latest, self.published, None) if latest else None
        return run_state(number, self.initial, latest_model=model, **step)

    def take(self, number: int, contribution: dict[str, Any]) -> Verdict:
        self.num_contributions += 1
        return Verdict(Outcome.ACCEPTED)


def in_use(folder: Path) -> Blob:
    return blob_of(folder / "model.safetensors")


OVER = {"phase": Phase.PUBLISHED}


async def test_pinned_model_is_used_though_it_is_older_and_worse(tmp_path: Path) -> None:
    steps = [
        {"round": 2},
        {"round": 2, "latest": 2, **OVER},
        {"round": 2, "latest": 1, "is_pinned": True, **OVER},
        {"round": 3, "latest": 1, "is_pinned": True},
        {"round": 3, "latest": 2, **OVER},
    ]
    cloud = CloudWithSteps(tmp_path / "cloud", steps)
    progress = await live(cloud, tmp_path / "agent", Power(None))
    assert [(report.round, report.applied) for report in cloud.reports] == [(2, False), (1, True), (2, True)]
    worse, pinned, _ = cloud.reports
    assert worse.difference_total == pinned.difference_total
    assert worse.difference_total is not None
    assert worse.difference_total < 0
    # What the device has trained while the model was pinned did not come into use, though it is better.
    assert in_use(tmp_path / "agent") == cloud.published
    assert progress.trained
    assert progress.trained.round == 3
    assert progress.trained.score > pinned.score_after


async def test_model_that_the_device_did_not_want_is_used_once_it_is_pinned(tmp_path: Path) -> None:
    latest = {"round": 2, "latest": 2, **OVER}
    pinned = {**latest, "is_pinned": True}
    cloud = CloudWithSteps(tmp_path / "cloud", [{"round": 2}, latest, pinned])
    progress = await live(cloud, tmp_path / "agent", Power(None))
    assert [(report.round, report.applied) for report in cloud.reports] == [(2, False), (2, True)]
    assert progress.pinned_round == 2
    assert in_use(tmp_path / "agent") == cloud.published


async def test_withdrawn_model_is_reported_though_a_newer_one_was_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objections = ["", "worse"]
    monkeypatch.setattr(local, "objection", lambda *_: objections.pop(0))
    steps = [
        {"round": 1},
        {"round": 1, "latest": 1, **OVER},
        {"round": 2, "latest": 2, **OVER},
        {"round": 2, "latest": 2, "withdrawn_rounds": (1,), **OVER},
    ]
    cloud = CloudWithSteps(tmp_path / "cloud", steps)
    progress = await live(cloud, tmp_path / "agent", Power(None))
    assert [(report.round, report.applied) for report in cloud.reports] == [(1, True), (2, False), (1, False)]
    assert progress.applied_reports == ()
    assert progress.trained
    assert in_use(tmp_path / "agent") == progress.trained.weights


class CloudThatWithdrawsMeanwhile(Cloud):
    """It withdraws its model while the agent waits to upload for round 2, and is over when that has come."""

    num_contributions = 0
    is_awaited = False

    def state(self) -> RunState:
        latest = PublishedModel(1, self.published, None)
        if not self.reports:
            is_over = bool(self.num_contributions)
            return (
                run_state(1, self.initial, latest_model=latest, **OVER)
                if is_over
                else run_state(1, self.initial)
            )
        withdrawn = {"withdrawn_rounds": (1,)} if self.is_awaited else {"latest_model": latest}
        return run_state(2, self.initial, run_over=self.num_contributions == 2, **withdrawn)

    def take(self, number: int, contribution: dict[str, Any]) -> Verdict:
        self.num_contributions += 1
        return Verdict(Outcome.ACCEPTED)


@pytest.mark.parametrize("mode", ["sync", "async"])
async def test_agent_that_waits_for_something_else_goes_back_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    # What the device trains is as bad as what it starts from, and worse than what the cloud publishes.
    pretrain = RUN.pretrain.model_copy(update={"learning_rate": 1e-9})
    cloud = CloudThatWithdrawsMeanwhile(
        tmp_path / "cloud", ALWAYS.model_copy(update={"pretrain": pretrain, "mode": mode})
    )
    upload = Client.upload

    async def wait_or_upload(self: Client, *arguments: Any) -> None:
        if cloud.reports and cloud.reports[-1].applied:
            cloud.is_awaited = True
            self.tell()
            await asyncio.Event().wait()
        await upload(self, *arguments)

    monkeypatch.setattr(Client, "upload", wait_or_upload)
    await live(cloud, tmp_path / "agent", Power(None))
    assert [(report.round, report.applied) for report in cloud.reports] == [(1, True), (1, False)]
    assert cloud.num_contributions == 2
    assert in_use(tmp_path / "agent") != cloud.published


async def test_device_that_has_no_other_model_uses_the_next_one_in_any_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "objection", lambda *_: "every model is worse than the one before")
    disk = AgentState(tmp_path / "agent", "edge-1")
    disk.save(Progress(run_id="run", contributed_round=3))
    disk.close()
    steps = [
        {"round": 2, "latest": 2, **OVER},
        {"round": 2, "latest": 1, "withdrawn_rounds": (2,), **OVER},
    ]
    cloud = CloudWithSteps(tmp_path / "cloud", steps)
    await live(cloud, tmp_path / "agent", Power(None))
    assert [(report.round, report.applied) for report in cloud.reports] == [(2, True), (1, True)]
