"""The order of things: rounds that open, close, train and are forgotten, see world.py."""

import asyncio
import hashlib
import time
from contextlib import AsyncExitStack, closing
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from safetensors.numpy import save_file
from structlog.testing import capture_logs

from ecavg.cloud_server.contribution import Contribution
from ecavg.cloud_server.intake.uploads import unused_sizes
from ecavg.cloud_server.jobs import (
    AgentAudit,
    Job,
    JobDirectory,
    JobError,
    Progress,
    Result,
)
from ecavg.cloud_server.showing import reports
from ecavg.cloud_server.showing.reports import Reports
from ecavg.cloud_server.store import Store
from ecavg.cloud_server.training.runner import JobRunner
from ecavg.cloud_server.upkeep.forgotten import ask_to_forget
from ecavg.common.config import RunConfig
from ecavg.common.errors import (
    InvalidError,
    Reason,
    RunError,
    UsageError,
)
from ecavg.common.run_state import Outcome, Phase
from ecavg.common.shards import Shard, write_shard
from ecavg.common.tasks import KINDS
from ecavg.common.transfer import Blob
from ecavg.common.wire import Base, encode
from tests.unit.test_metrics import values
from tests.unit.world import REPORT, PlayedTrainer, World, hurry, model_in, world, write_weights


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)


async def test_late_contribution_while_the_next_round_opens_harms_neither(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(tmp_path) as here:
        late = await here.contribution_of("late")
        assert await here.contribute("first") is Outcome.ACCEPTED
        opening = asyncio.Event()
        loop = asyncio.get_running_loop()
        open_round, record = here.store.open_round, here.store.record_contribution

        def slow_open_round(*args: Any, **kwargs: Any) -> None:
            loop.call_soon_threadsafe(opening.set)
            pause(0.05, loop)
            open_round(*args, **kwargs)

        def slow_record(*args: Any) -> None:
            pause(0.1, loop)
            record(*args)

        monkeypatch.setattr(here.store, "open_round", slow_open_round)
        monkeypatch.setattr(here.store, "record_contribution", slow_record)
        await opening.wait()
        verdict = await here.desk.contribute("late", 1, late)
        assert verdict.outcome is Outcome.LATE
        await here.until(lambda: here.standing.state_for().round == 2)
        assert here.store.last_round().number == 2
        assert here.store.contributions(2) == []
        assert await here.contribute("first", 2) is Outcome.ACCEPTED
        await here.until(lambda: here.standing.state_for().round == 3)


def pause(seconds: float, loop: asyncio.AbstractEventLoop) -> None:
    """Hold a thread of the store's up while the event loop goes on."""
    asyncio.run_coroutine_threadsafe(asyncio.sleep(seconds), loop).result()


async def test_cancelled_contribution_is_the_same_in_memory_and_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(tmp_path, min_agents=2) as here:
        await here.contribute("b")
        contribution = await here.contribution_of("a")
        recording = asyncio.Event()
        loop = asyncio.get_running_loop()
        record = here.store.record_contribution

        def slow_record(*args: Any) -> None:
            loop.call_soon_threadsafe(recording.set)
            pause(0.05, loop)
            record(*args)

        monkeypatch.setattr(here.store, "record_contribution", slow_record)
        call = asyncio.create_task(here.desk.contribute("a", 1, contribution))
        await recording.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert [row.agent_id for row in here.store.contributions(1)] == ["a", "b"]
        assert here.standing.state_for("a").outcome is Outcome.ACCEPTED
        await here.until(lambda: here.standing.state_for().round == 2)  # it was the last one wanted


async def test_late_agents_are_reported_as_late_and_silent_ones_as_vanished(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        await here.desk.join("silent")
        late = await here.contribution_of("late")
        assert await here.contribute("first") is Outcome.ACCEPTED
        await here.until(lambda: here.standing.state_for().round == 2)
        assert here.report()["vanished"] == ["late", "silent"]
        assert (await here.desk.contribute("late", 1, late)).outcome is Outcome.LATE
        await here.reports.write_changed()
        assert here.report()["late"] == ["late"]
        assert here.report()["vanished"] == ["silent"]
        await here.desk.join("newcomer")
        assert here.report()["vanished"] == ["silent"]


async def test_agent_that_is_not_drawn_is_refused_until_the_one_that_is_drawn_is_forgotten(
    tmp_path: Path,
) -> None:
    async with world(tmp_path, agents_per_round=1) as here, AsyncExitStack() as watches:
        for name in ("a", "b"):
            await here.desk.join(name)
            watch = here.desk.watch(name)
            watches.push_async_callback(watch.aclose)  # type: ignore[attr-defined]
            await anext(watch)
        await here.until(lambda: bool(here.ledger.round.drawn))
        (drawn,) = here.ledger.round.drawn
        (other,) = {"a", "b"} - {drawn}
        with pytest.raises(InvalidError) as refused:
            await here.contribute(other)
        assert refused.value.reason is Reason.NOT_DRAWN
        assert here.store.contributions(1) == []
        ask_to_forget(here.store, drawn, time.time())
        await here.until(lambda: here.ledger.round.drawn == {other})
        assert await here.contribute(other) is Outcome.ACCEPTED
        await here.until(lambda: here.standing.state_for().round == 2)
        assert here.report()["drawn"] == [other]


async def test_accepted_contribution_repeated_after_its_round_is_still_accepted(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        contribution = await here.contribution_of("a")
        for _ in range(2):
            verdict = await here.desk.contribute("a", 1, contribution)
            assert verdict.outcome is Outcome.ACCEPTED
            await here.until(lambda: here.standing.state_for().round == 2)
        assert [row.outcome for row in here.store.contributions(1)] == ["accepted"]


@pytest.mark.parametrize("num_rounds", [0, 1])
async def test_answer_after_the_round_does_not_depend_on_blobs_that_are_gone(
    tmp_path: Path, num_rounds: int
) -> None:
    async with world(tmp_path, rounds=num_rounds, run=RunConfig(retain_data="round")) as here:
        first, late = await contribution_with_data(here, "first"), await here.contribution_of("late")
        assert (await here.desk.contribute("first", 1, first)).outcome is Outcome.ACCEPTED
        await here.until(lambda: not here.store.has_upload("first", first.shard_digests[0], "data"))
        assert (await here.desk.contribute("first", 1, first)).outcome is Outcome.ACCEPTED
        late = replace(late, shard_digests=("e" * 64,))  # which it has not sent
        assert (await here.desk.contribute("late", 1, late)).outcome is Outcome.LATE
        assert [row.outcome for row in here.store.contributions(1)] == ["accepted", "late"]


async def test_nothing_is_kept_of_a_late_contribution(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        late = await here.contribution_of("late", seed=8)
        assert await here.contribute("first") is Outcome.ACCEPTED
        await here.until(lambda: here.standing.state_for().round == 2)
        await here.desk.contribute("late", 1, replace(late, shard_digests=("e" * 64,) * 1000))
        (row,) = (each for each in here.store.contributions(1) if each.agent_id == "late")
        assert (row.outcome, row.contribution) == ("late", None)
        assert list(unused_sizes(here.store, ["late"])["late"]) == [late.weights_digest]


async def test_result_of_a_job_that_was_withdrawn_is_not_the_next_ones(tmp_path: Path) -> None:
    runner = JobRunner(tmp_path / "jobs", trainer := PlayedTrainer(tmp_path), max_attempts=3)
    gone, stays = (Contribution(name, "", (), num_examples=1) for name in "ab")
    job = Job(kind="round", name="round-0001", round=1, run=RunConfig(), device="cpu", initial_weights=None)
    directory = runner.directory(job.name)
    directory.write_job(job.model_copy(update={"contributions": (gone, stays)}))
    directory.write_result(model_in(directory, 1))
    directory.withdraw()
    working = asyncio.create_task(trainer.work())
    await runner.finish(job.model_copy(update={"contributions": (stays,)}))
    working.cancel()
    assert [each.contributions for each in trainer.jobs] == [(stays,)]


async def test_contribution_to_a_round_that_is_not_open_yet_is_refused(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        contribution = await here.contribution_of("a")
        with pytest.raises(InvalidError, match="round 2 is not open; round 1 is"):
            await here.desk.contribute("a", 2, contribution)


def failure(kind: Any) -> Result:
    return Result(error=JobError(kind=kind, message=f"it went wrong: {kind}"))


async def test_training_that_runs_out_of_memory_is_tried_with_half_the_batch(tmp_path: Path) -> None:
    outcomes = [failure("out_of_memory"), failure("out_of_memory"), None]
    async with world(tmp_path, outcomes, run={"fine_tune": {"batch_size": 100}}) as here:
        await here.contribute("a")
        await here.until(lambda: here.standing.state_for().round == 2)
        rounds = [job for job in here.trainer.jobs if job.kind == "round"]
        assert [job.run.fine_tune.batch_size for job in rounds] == [100, 50, 25]
        assert [job.attempt for job in rounds] == [1, 2, 3]
        assert here.report()["outcome"] == "published"


async def test_round_that_cannot_be_trained_fails_with_its_reason_and_the_next_one_opens(
    tmp_path: Path,
) -> None:
    async with world(tmp_path, [failure("failed")] * 2, max_attempts=2) as here:
        initial = here.standing.state_for().initial_weights
        await here.contribute("a")
        await here.until(lambda: here.standing.state_for().round == 2)
        report = here.report()
        assert (report["outcome"], report["failure"]) == ("failed", "it went wrong: failed")
        state = here.standing.state_for("a")
        assert (state.failed_round, state.failure) == (1, "it went wrong: failed")
        assert (state.phase, state.initial_weights) == (Phase.COLLECTING, initial)
        sample = here.metrics.registry.get_sample_value("ecavg_server_rounds_total", {"outcome": "failed"})
        assert sample == 1
        await here.contribute("a", 2)
        await here.until(lambda: here.standing.state_for().round == 3)
        assert here.report(2)["outcome"] == "published"


def store_as_in_mid_round(state_dir: Path) -> None:
    """Leave the records as a server does that dies while round 1 is aggregated."""
    with closing(Store(state_dir)) as store:
        store.set_phase(1, "aggregating", 1.0)
        store._database.execute("DELETE FROM phase_history WHERE round = 2")
        store._database.execute("DELETE FROM rounds WHERE number = 2")
        store._database.commit()


async def test_attempts_and_the_smaller_batch_survive_a_restart(tmp_path: Path) -> None:
    run = {"fine_tune": {"batch_size": 100}}
    async with world(tmp_path, min_agents=1, run=run) as here:
        await here.contribute("a")
        await here.until(lambda: here.standing.state_for().round == 2)
        directory = JobDirectory(tmp_path / "jobs/round-0001")
        job = directory.read_job()
    store_as_in_mid_round(tmp_path)
    directory.write_job(job)
    directory.write_result(failure("out_of_memory"))
    async with world(tmp_path, [failure("failed")], run=run) as here:
        await here.until(lambda: here.standing.state_for().round == 2)
        again = [job for job in here.trainer.jobs if job.kind == "round"]
        assert [(job.attempt, job.run.fine_tune.batch_size) for job in again] == [(2, 50), (3, 50)]


async def test_result_of_the_attempt_before_costs_no_attempt(tmp_path: Path) -> None:
    async with world(tmp_path, min_agents=1) as here:
        await here.contribute("a")
        await here.until(lambda: here.standing.state_for().round == 2)
        directory = JobDirectory(tmp_path / "jobs/round-0001")
        job = directory.read_job()
    store_as_in_mid_round(tmp_path)
    # The server was killed between the job of attempt 3 and the removal of what attempt 2 had left.
    directory.write_job(job.model_copy(update={"attempt": 3}))
    failed = failure("failed").error
    assert failed
    directory.write_result(Result(error=failed.model_copy(update={"attempt": 2})))
    async with world(tmp_path, max_attempts=3) as here:
        await here.until(lambda: here.standing.state_for().round == 2)
        assert [job.attempt for job in here.trainer.jobs if job.kind == "round"] == [3]
        assert here.report()["outcome"] == "published"


async def test_trainer_that_dies_in_mid_job_costs_an_attempt_and_one_that_dies_idle_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(tmp_path, min_agents=2, max_attempts=2) as here:
        here.trainer.num_exits = 5  # idle
        monkeypatch.setattr(JobDirectory, "is_pending", property(lambda self: False))  # the trainer is dead
        await here.contribute("a")
        await here.contribute("b")
        directory = JobDirectory(tmp_path / "jobs/round-0001")
        for _ in range(2):
            await here.until(lambda: directory.is_begun and directory.read_result() is None)
            directory.append_progress(Progress(phase="fine_tuning", done=1, total=2))
            await here.until(lambda: here.standing.state_for().phase is Phase.FINE_TUNING)
            here.trainer.num_exits += 1
            await here.until(lambda: here.standing.state_for().phase is not Phase.FINE_TUNING
                             or directory.read_job().attempt == 2)  # fmt: skip
        await here.until(lambda: here.standing.state_for().round == 2)
        assert here.report()["failure"] == "the trainer died; see trainer.log"


async def test_failed_last_round_ends_the_run_with_its_reason(tmp_path: Path) -> None:
    async with world(tmp_path, [failure("failed")], max_attempts=1, rounds=1) as here:
        await here.contribute("a")
        with pytest.raises(RunError, match="round 1 failed: it went wrong: failed"):
            await asyncio.wait_for(here.running, 10)
    async with world(tmp_path, max_attempts=1, rounds=1) as here:
        with pytest.raises(RunError, match="round 1 failed"):
            await asyncio.wait_for(here.running, 10)
        sample = here.metrics.registry.get_sample_value("ecavg_server_rounds_total", {"outcome": "failed"})
        assert sample == 0  # it did not fail again


async def test_finished_run_ends_at_once_and_goes_on_when_more_rounds_are_wanted(tmp_path: Path) -> None:
    async with world(tmp_path, rounds=1) as here:
        await here.contribute("a")
        await asyncio.wait_for(here.running, 10)
    published = here.report()["weights"]["sha256"]
    async with world(tmp_path, rounds=1) as here:
        await asyncio.wait_for(here.running, 10)
        assert here.standing.state_for().run_over
    async with world(tmp_path, rounds=2) as here:
        await here.until(lambda: here.standing.state_for().round == 2)
        assert here.standing.state_for().initial_weights.digest == published


@pytest.mark.parametrize("wrong", [1000.0, time.time() + 3e8], ids=["1970", "ten years ahead"])
@pytest.mark.parametrize("restarts", [False, True])
async def test_clock_that_is_set_neither_ends_a_round_nor_keeps_it_open(
    tmp_path: Path, wrong: float, restarts: bool
) -> None:
    """Not while the server runs, and not while it is stopped."""
    now = wrong
    long = {"min_agents": 2, "max_agents": 2, "deadline_seconds": 3600, "on_too_few": "fail"}
    short = {"min_agents": 1, "max_agents": 2, "deadline_seconds": 0.3}
    keys = long if wrong < time.time() else short
    async with AsyncExitStack() as stack:
        here = await stack.enter_async_context(world(tmp_path, clock=lambda: now, **keys))
        await here.until(lambda: here.ledger.round.phase is Phase.COLLECTING)
        if restarts:
            await stack.aclose()
        now = time.time()
        if restarts:
            here = await stack.enter_async_context(world(tmp_path, clock=lambda: now, **keys))
        for number in range(here.ledger.policy.min_agents):
            assert await here.contribute(f"edge-{number}") is Outcome.ACCEPTED
        await here.until(lambda: here.ledger.round.number > 1)
        first = here.store.round(1)
        assert first
        assert first.phase == Phase.PUBLISHED


async def test_too_few_agents_at_the_deadline_fail_the_round_if_so_configured(tmp_path: Path) -> None:
    async with world(tmp_path, min_agents=2, deadline_seconds=0.05, on_too_few="fail", rounds=1) as here:
        with pytest.raises(RunError, match=r"too few agents: 0 of at least 2 contributed"):
            await asyncio.wait_for(here.running, 10)


async def test_deadline_closes_a_round_with_enough_agents(tmp_path: Path) -> None:
    async with world(tmp_path, min_agents=1, max_agents=3, deadline_seconds=0.3, rounds=1) as here:
        await here.contribute("a")
        assert here.standing.state_for().phase is Phase.COLLECTING
        await asyncio.wait_for(here.running, 10)
        assert [agent["agent_id"] for agent in here.report()["agents"]] == ["a"]


async def test_other_configuration_of_the_run_is_refused_and_named(tmp_path: Path) -> None:
    async with world(tmp_path):
        pass
    with pytest.raises(UsageError, match=r"run\.pretrain\.epochs: 5 there, 9 here"):
        async with world(tmp_path, run={"pretrain": {"epochs": 9}}):
            pass


async def test_rejection_is_reported_with_its_reason(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        await here.desk.join("bad")
        path = tmp_path / "bad"
        save_file({"weight": np.full((2, 3), np.nan, np.float32)}, path)
        blob = Blob(hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size)
        with pytest.raises(InvalidError):
            async with here.desk.receive("bad", "weights", blob, 0) as upload:
                await upload.write(path.read_bytes())
        await here.contribute("good")
        await here.until(lambda: here.standing.state_for().round == 2)
        (rejected,) = here.report()["rejected"]
        assert (rejected["agent_id"], rejected["reason"]) == ("bad", Reason.NON_FINITE)
        assert here.report()["vanished"] == []


async def test_contribution_from_other_initial_weights_is_rejected_and_a_better_one_accepted(
    tmp_path: Path,
) -> None:
    async with world(tmp_path) as here:
        contribution = await here.contribution_of("a")
        for other in ("f" * 64, None):
            with pytest.raises(InvalidError, match="pre-training started from"):
                await here.desk.contribute("a", 1, replace(contribution, initial_digest=other))
            assert here.standing.state_for("a").outcome is Outcome.REJECTED
        (row,) = here.store.contributions(1)
        assert (row.outcome, row.why.reason) == ("rejected", Reason.INITIAL_WEIGHTS)
        assert (await here.desk.contribute("a", 1, contribution)).outcome is Outcome.ACCEPTED
        await here.until(lambda: here.standing.state_for().round == 2)
        (agent,) = here.report()["agents"]
        assert agent["initial_weights"] == here.store.round(1).initial_digest


async def test_differences_from_other_weights_are_rejected_and_better_ones_accepted(tmp_path: Path) -> None:
    async with world(tmp_path / "state", run={"wire": "int8"}) as here:
        initial = here.standing.state_for().initial_weights.digest
        write_weights(tmp_path / "weights", 7)
        contributions = []
        for digest in ("5" * 64, initial):
            base = Base(here.store.blobs.path(initial), digest)
            encode(tmp_path / "weights", tmp_path / "sent", "int8", base=base)
            contributions.append(await here.upload("a", tmp_path / "sent"))
        other, right = contributions
        with pytest.raises(InvalidError, match="the weights are differences from 5555555555555555…"):
            await here.desk.contribute("a", 1, other)
        assert here.standing.state_for("a").outcome is Outcome.REJECTED
        assert (await here.desk.contribute("a", 1, right)).outcome is Outcome.ACCEPTED


async def test_independent_agents_start_from_their_own_weights_until_a_model_is_published(
    tmp_path: Path,
) -> None:
    run = {"initial_weights": "independent"}

    async def contribute_own(here: World, number: int) -> Outcome:
        contribution = replace(await here.contribution_of("a"), initial_digest=None)
        return (await here.desk.contribute("a", number, contribution)).outcome

    async with world(tmp_path, [failure("failed")] * 9, max_attempts=1, run=run) as here:
        assert await contribute_own(here, 1) is Outcome.ACCEPTED
        await here.until(lambda: here.standing.state_for().round == 2)
        assert here.report()["agents"][0]["initial_weights"] is None
    async with world(tmp_path, run=run) as here:
        assert await contribute_own(here, 2) is Outcome.ACCEPTED  # round 1 failed
        await here.until(lambda: here.standing.state_for().round == 3)
        with pytest.raises(InvalidError, match="from weights of the agent's own"):
            await contribute_own(here, 3)
    async with world(tmp_path, run=run) as here:
        with pytest.raises(InvalidError, match="from weights of the agent's own"):
            await contribute_own(here, 3)
        assert await here.contribute("a", 3) is Outcome.ACCEPTED


async def test_accuracies_are_those_of_the_last_published_round(tmp_path: Path) -> None:
    async with world(tmp_path, [None, failure("failed")], max_attempts=1) as here:
        here.metrics.set_scores(
            KINDS["classification"], {"average": 0.3, "best_agent": 0.4}
        )  # as of a round before
        for number in (1, 2):
            await here.contribute("a", number)
            await here.until(lambda number=number: here.standing.state_for().round > number)
        (family,) = [each for each in here.metrics.registry.collect() if each.name.endswith("accuracy_ratio")]
        assert {sample.labels["stage"]: sample.value for sample in family.samples} == {"average": 0.5}


@pytest.mark.parametrize(
    ("flags", "event", "level"), [(("labels",), "quarantine_refused", "warning"), ((), "not_audited", "info")]
)
async def test_log_says_why_flagged_agents_are_kept_and_why_nobody_is_audited(
    tmp_path: Path, flags: tuple[Literal["labels"], ...], event: str, level: str
) -> None:
    async with world(tmp_path) as here:
        here.trainer.audit = (AgentAudit(agent_id="a", update_norm=1.0, norm_ratio=1.0, flags=flags),)
        here.trainer.audit_note = "the reason"
        with capture_logs() as logs:
            await here.contribute("a")
            await here.until(lambda: here.standing.state_for().round == 2)
    noted = [(entry["event"], entry["log_level"]) for entry in logs if entry.get("reason") == "the reason"]
    assert noted == [(event, level)]


async def test_contribution_that_the_trainer_leaves_out_was_accepted_and_does_not_count(
    tmp_path: Path,
) -> None:
    flagged = AgentAudit(
        agent_id="a", update_norm=1.0, norm_ratio=1.0, flags=("labels",), left_out=Reason.QUARANTINED
    )
    large = AgentAudit(agent_id="b", update_norm=9.0, norm_ratio=90.0, left_out=Reason.LARGE_UPDATE)
    fine = AgentAudit(agent_id="c", update_norm=1.0, norm_ratio=1.0)
    async with world(tmp_path, min_agents=3, agent_labels=True) as here:
        here.trainer.audit = (flagged, large, fine)
        offered = {agent_id: await here.contribution_of(agent_id) for agent_id in ("a", "b", "c")}
        for agent_id, contribution in offered.items():
            assert (await here.desk.contribute(agent_id, 1, contribution)).outcome is Outcome.ACCEPTED
        await here.until(lambda: here.standing.state_for().round == 2)
        states = {agent_id: here.standing.state_for(agent_id) for agent_id in offered}
        assert {agent_id: state.counted_round for agent_id, state in states.items()} == {
            "a": 0,
            "b": 0,
            "c": 1,
        }
        told = {agent_id: state.left_out and state.left_out.reason for agent_id, state in states.items()}
        assert told == {"a": Reason.QUARANTINED, "b": Reason.LARGE_UPDATE, "c": None}
        assert states["a"].left_out
        assert states["a"].left_out.message.startswith("its labels contradict those of the others: look for")
        assert states["b"].left_out
        assert "90 times as large as those of the others, 3 times is allowed" in states["b"].left_out.message
        again = await here.desk.contribute("a", 1, offered["a"])
        assert again.outcome is Outcome.ACCEPTED
        left_out = {item["agent_id"]: item.get("left_out") for item in here.report()["agents"]}
        assert left_out["a"] == {"reason": "quarantined", "message": states["a"].left_out.message}
        assert left_out["c"] is None
        sample = here.metrics.registry.get_sample_value
        assert [sample("ecavg_server_agent_flagged", {"agent_id": each}) for each in "abc"] == [1, 0, 0]


async def test_bytes_that_moved_in_a_round_are_on_record_when_it_ends(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        here.metrics.count_sent("model", 70)
        await here.contribute("a")
        await here.until(lambda: here.standing.state_for().round == 2)
        (row,) = here.store.read("SELECT * FROM traffic")
        assert dict(row) == {"round": 1, "received_bytes": here.metrics.received_bytes, "sent_bytes": 70}
        assert row["received_bytes"] > 0


async def test_run_has_a_name_for_people(tmp_path: Path) -> None:
    began_at = datetime(2026, 2, 10, 23, 30, tzinfo=UTC).timestamp()
    async with world(tmp_path, clock=lambda: began_at) as here:
        assert (await here.status.read())["run_name"] == "mlp on digits, 2026-02-10"
    async with world(tmp_path, run_name="the north field") as here:
        assert (await here.status.read())["run_name"] == "the north field"
    async with world(tmp_path) as here:
        assert (await here.status.read())["run_name"] == "mlp on digits, 2026-02-10"


async def test_repeated_report_is_counted_once(tmp_path: Path) -> None:
    def count(applied: str) -> float | None:
        return here.metrics.registry.get_sample_value("ecavg_server_reports_total", {"applied": applied})

    async with world(tmp_path, min_agents=2) as here:
        for agent_id in ("a", "b"):
            await here.contribute(agent_id)
        await here.until(lambda: here.standing.state_for().round == 2)
        kept = replace(REPORT, applied=False, reason="accuracy 0.91 → 0.84")
        for _ in range(3):
            await here.desk.report("a", 1, replace(REPORT, agent_id="a"))
            await here.desk.report("b", 1, replace(kept, agent_id="b"))
        assert (count("true"), count("false")) == (1, 1)
        first, second = (await here.status.read())["agents"]
        assert (first["applied"], first["message"]) == (True, "")
        assert (second["applied"], second["message"]) == (False, kept.reason)
    async with world(tmp_path, min_agents=2) as here:
        await here.desk.report("b", 1, replace(kept, agent_id="b"))
        assert (count("true"), count("false")) == (0, 0)  # counted in the life before


async def test_reports_of_agents_end_up_in_the_report(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        await here.contribute("a")
        await here.until(lambda: here.standing.state_for().round == 2)
        row = replace(REPORT, agent_id="a", score_after=0.3, score_adapted=0.6)
        await asyncio.gather(*(here.desk.report("a", 1, row) for _ in range(5)))
        await here.reports.write_changed()
        (agent,) = here.report()["agents"]
        measured = [agent[f"accuracy_{stage}"] for stage in ("before", "after", "adapted")]
        assert (measured, agent["applied"]) == ([0.5, 0.3, 0.6], True)
        (shown,) = (await here.status.read())["agents"]
        assert (shown["accuracy_after"], shown["accuracy_adapted"]) == (0.3, 0.6)


async def test_reports_that_come_at_once_are_written_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agents = [f"agent-{number}" for number in range(10)]
    async with world(tmp_path, min_agents=10) as here:
        for agent_id in agents:
            await here.contribute(agent_id)
        await here.until(lambda: here.standing.state_for().round == 2)
        written, write = [], reports.write
        monkeypatch.setattr(reports, "write", lambda *args: (written.append(args), write(*args)))
        rows = [replace(REPORT, agent_id=agent_id) for agent_id in agents]
        await asyncio.gather(*(here.desk.report(row.agent_id, 1, row) for row in rows))
        await here.until(lambda: all("applied" in agent for agent in here.report()["agents"]))
        assert len(written) == 1


async def test_report_that_was_not_written_any_more_is_written_by_the_next_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(tmp_path, min_agents=1) as here:
        await here.contribute("a")
        await here.until(lambda: here.standing.state_for().round == 2)
        monkeypatch.setattr(here.reports, "note_change", lambda _: None)
        await here.desk.report("a", 1, replace(REPORT, agent_id="a"))
        assert "applied" not in here.report()["agents"][0]
    async with world(tmp_path, min_agents=1) as here:
        await here.until(lambda: "applied" in here.report()["agents"][0])


async def test_report_is_written_before_what_it_is_made_from_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Reports, "keep_up", lambda _: asyncio.sleep(1000))
    async with world(tmp_path, keep_rounds=1) as here:
        for number in (1, 2):
            assert await here.contribute("a", number) is Outcome.ACCEPTED
            await here.until(lambda number=number: here.standing.state_for().round == number + 1)
            await here.desk.report("a", number, replace(REPORT, agent_id="a"))
        assert await here.contribute("a", 3) is Outcome.ACCEPTED
        await here.until(lambda: here.standing.state_for().round == 4)
        assert [here.report(number)["agents"][0].get("applied") for number in (1, 2)] == [True, True]


# What comes at once becomes durable at once


async def test_agent_that_waits_to_upload_is_told_its_place_on_the_page(tmp_path: Path) -> None:
    async with world(tmp_path, min_agents=2, max_concurrent_uploads=1) as here:
        await here.desk.join("a")

        def uploads() -> dict[str, float]:
            return values(here.metrics.registry, "ecavg_server_uploads")

        release = asyncio.Event()

        async def hold() -> None:
            async with here.desk.receive("a", "weights", Blob("e" * 64, 1000), 0):
                await release.wait()

        first = asyncio.create_task(hold())
        await here.until(lambda: uploads()["receiving"] == 1)
        second = asyncio.create_task(here.contribute("b"))
        await here.until(lambda: uploads()["waiting"] == 1)
        agents = (await here.status.read())["agents"]
        assert [agent["upload_place"] for agent in agents] == [None, 1]
        release.set()
        assert await second is Outcome.ACCEPTED
        assert uploads() == {"receiving": 0, "waiting": 0}
        with pytest.raises(InvalidError, match="the stream ended after 0 of 1000 bytes"):
            await first


async def contribution_with_data(here: World, agent_id: str) -> Contribution:
    """Eight examples, five of which are shared."""
    start, path = await here.contribution_of(agent_id), here.config.state_dir / "shard"
    write_shard(path, Shard(np.zeros((5, 1, 8, 8), np.uint8), np.zeros(5, np.int64)))
    content = path.read_bytes()
    blob = Blob(hashlib.sha256(content).hexdigest(), len(content))
    async with here.desk.receive(agent_id, "data", blob, 0) as upload:
        await upload.write(content)
    return replace(start, shard_digests=(blob.digest,), num_examples=8)


async def test_data_kept_for_a_round_go_when_it_is_over(tmp_path: Path) -> None:
    async with world(tmp_path, run=RunConfig(retain_data="round")) as here:
        whole = await contribution_with_data(here, "first")
        (digest,) = whole.shard_digests
        assert (await here.desk.query_upload("first", "data", digest))[1]
        assert (await here.desk.contribute("first", 1, whole)).outcome is Outcome.ACCEPTED
        await here.until(lambda: here.standing.state_for().round == 2)
        assert await here.desk.query_upload("first", "data", digest) == (0, False)
        (agent,) = here.report()["agents"]
        assert (agent["num_examples"], agent["num_shared"], here.report()["num_shared"]) == (8, 5, 5)
