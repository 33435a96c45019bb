"""What there is to see of a run, with a real store; the coordinator is played by the test."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from ecavg.cloud_server.contribution import Contribution, Rejection
from ecavg.cloud_server.jobs import JobDirectory, Result
from ecavg.cloud_server.metrics import ServerMetrics
from ecavg.cloud_server.records import round_from
from ecavg.cloud_server.round import Policy, Round, Sampling
from ecavg.cloud_server.showing import standing
from ecavg.cloud_server.showing.presence import Presence
from ecavg.cloud_server.showing.progress import ProgressBoard
from ecavg.cloud_server.showing.reports import Reports
from ecavg.cloud_server.showing.standing import Standing
from ecavg.cloud_server.showing.status import Status
from ecavg.cloud_server.store import Store
from ecavg.common.agent_progress import Activity, AgentProgress
from ecavg.common.config import RunConfig
from ecavg.common.errors import Reason
from ecavg.common.run_state import LeftOut, Outcome, Phase, RunState, WorkProgress
from ecavg.common.transfer import Blob
from tests.unit.states import (
    AGENT,
    INITIAL,
    RUN,
    begin,
    contribute,
    digest_of,
    encoded_of,
    model_of,
    run_rounds,
)
from tests.unit.test_reports import RESULT


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with closing(Store(tmp_path)) as store:
        yield store


class Viewed:
    """A standing, and the states that were displayed."""

    def __init__(self, store: Store, state_dir: Path, run: RunConfig = RUN) -> None:
        self.round = current_round(store)
        self.displayed: list[RunState] = []
        self.metrics = ServerMetrics()
        presence = self.presence = Presence()
        self.board = ProgressBoard()
        self.places: dict[str, int] = {}
        self.is_trainer_running = True
        self.standing = Standing(
            self.round,
            {AGENT: 1, "edge-2": 2},
            presence,
            board=self.board,
            store=store,
            metrics=self.metrics,
            on_change=self.displayed.append,
        )
        self.status = Status(
            "run-1",
            "mlp on digits",
            self.standing,
            presence,
            store=store,
            reports=Reports(run, store),
            board=self.board,
            upload_places=lambda: self.places,
            is_trainer_running=lambda: self.is_trainer_running,
            clock=lambda: 10.0,
        )

    def show(self, changed: Round) -> None:
        self.round = changed
        self.standing.show(changed)


def current_round(store: Store) -> Round:
    row = store.last_round()
    assert row
    return round_from(row, store.contributions(row.number), Policy(1, 3, None))


@pytest.fixture
def viewed(store: Store, tmp_path: Path) -> Viewed:
    """In its first round."""
    begin(store, tmp_path)
    return Viewed(store, tmp_path)


async def test_page_shows_candidates_and_start_of_each_published_round(store: Store, tmp_path: Path) -> None:
    run_rounds(store, tmp_path, 2)
    JobDirectory(tmp_path / "jobs/round-0002").write_result(RESULT)
    status = await Viewed(store, tmp_path).status.read()
    first, second = status["rounds"]
    assert (first["round"], first["start"], first["accuracy_start"]) == (1, None, None)
    assert second == {
        "round": 2,
        "outcome": "published",
        "failure": None,
        "num_contributions": 1,
        "candidates": RESULT.candidates,
        "soup": ("edge-3", "edge-1"),
        "start": "greedy_soup",
        "published": "fine_tuned",
        "accuracy_start": 0.95,
        "accuracy_fine_tuned": 0.97,
        "accuracy_fine_tuned_average": None,
        "accuracy_published": 0.97,
        "flagged": ["edge-3"],
        "audit_note": "nobody knows",
        "seconds": pytest.approx(0.9),
        "roll_out": None,
    }


async def test_page_of_a_round_that_failed_shows_why(viewed: Viewed, store: Store) -> None:
    store.set_phase(1, "failed", 2.5, failure="it went wrong")
    viewed.show(viewed.round.fail("it went wrong"))
    status = await viewed.status.read()
    (failed,) = status["rounds"]
    assert (failed["failure"], failed["candidates"], failed["start"]) == ("it went wrong", {}, None)
    assert status["phases"] == [{"phase": "collecting", "seconds": 2.5}, {"phase": "failed", "seconds": 0.0}]


async def test_latest_model_and_failure_are_known_after_a_restart(store: Store, tmp_path: Path) -> None:
    run_rounds(store, tmp_path, 1)
    store.set_phase(2, "failed", 3.0, failure="it went wrong")
    store.open_round(3, digest_of(model_of(1)), 4.0)
    state = Viewed(store, tmp_path).standing.state_for(AGENT)
    assert state.latest_model
    assert state.latest_model.round == 1
    assert state.latest_model.weights == (digest_of(model_of(1)), len(model_of(1)))
    encoded = Blob(digest_of(encoded_of(1)), len(encoded_of(1)))
    assert state.latest_model.encoded == state.initial_encoded == (encoded, digest_of(INITIAL))
    assert (state.failed_round, state.failure) == (2, "it went wrong")
    store.open_round(4, digest_of(model_of(1)), 6.0)
    assert Viewed(store, tmp_path).standing.state_for(AGENT).failure == ""  # no news any more


async def test_model_of_a_warm_up_is_no_model_for_agents(store: Store, tmp_path: Path) -> None:
    run_rounds(store, tmp_path, 0, first_round=0)
    state = Viewed(store, tmp_path).standing.state_for(AGENT)
    assert (state.round, state.latest_model, state.counted_round) == (1, None, 0)
    assert state.initial_weights.digest == digest_of(model_of(0))
    page = await Viewed(store, tmp_path).status.read()
    assert [each["round"] for each in page["rounds"]] == [0]


async def test_progress_is_of_the_phase_that_it_was_made_in(viewed: Viewed) -> None:
    viewed.show(viewed.round.advance(Phase.AGGREGATING))
    viewed.standing.show_progress(WorkProgress(1, 2))
    viewed.show(viewed.round.advance(Phase.FINE_TUNING))
    shown = [(state.phase.value, state.progress and state.progress.done) for state in viewed.displayed]
    assert shown == [("collecting", None), ("aggregating", None), ("aggregating", 1), ("fine_tuning", None)]


async def test_watcher_is_counted_while_it_watches_and_skips_states_but_not_the_latest(
    viewed: Viewed,
) -> None:
    agents = "ecavg_server_agents"
    watching = viewed.standing.watch(AGENT)
    assert (await anext(watching)).phase is Phase.COLLECTING
    assert viewed.metrics.registry.get_sample_value(agents, {"state": "watching"}) == 1
    viewed.show(viewed.round.advance(Phase.AGGREGATING))
    viewed.show(viewed.round.advance(Phase.FINE_TUNING))
    state = await anext(watching)
    assert (state.phase, state.initial_weights) == (Phase.FINE_TUNING, (digest_of(INITIAL), len(INITIAL)))
    await watching.aclose()
    assert viewed.metrics.registry.get_sample_value(agents, {"state": "watching"}) == 0
    assert viewed.metrics.registry.get_sample_value(agents, {"state": "away"}) == 2


async def test_watchers_do_not_hear_of_who_comes_and_goes(viewed: Viewed) -> None:
    watching = viewed.standing.watch(AGENT)
    await anext(watching)
    following = asyncio.ensure_future(anext(watching))
    for _ in range(3):
        other = viewed.standing.watch("edge-2")
        await anext(other)
        await other.aclose()
        viewed.standing.show_report("edge-2", 1, is_applied=True)
        await asyncio.sleep(0)
    assert not following.done()
    viewed.standing.show_progress(WorkProgress(1, 2))
    assert (await following).progress
    await watching.aclose()


async def test_agent_hears_at_once_of_its_own_part_and_the_others_when_counts_are_due(
    viewed: Viewed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(standing, "COUNTS_SECONDS", 1000.0)
    first, second = (viewed.standing.watch(agent_id) for agent_id in (AGENT, "edge-2"))
    await anext(first), await anext(second)
    contributions = {"edge-3": Contribution("edge-3", "", (), 1)}
    viewed.show(replace(viewed.round, contributions=contributions))
    # These counts are the first, and the next are due much later.
    assert (await anext(first)).num_contributions == (await anext(second)).num_contributions == 1
    contributions |= {AGENT: Contribution(AGENT, "", (), 1)}
    waiting = asyncio.ensure_future(anext(second))
    viewed.standing.show(replace(viewed.round, contributions=contributions), [AGENT])
    assert (await anext(first)).outcome is Outcome.ACCEPTED
    assert not waiting.done()
    viewed.standing.show(viewed.round.advance(Phase.AGGREGATING))
    assert (await waiting).phase is Phase.AGGREGATING
    assert (await anext(first)).phase is Phase.AGGREGATING


async def test_page_that_is_made_while_somebody_is_forgotten_is_not_remembered(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_rounds(store, tmp_path, 1)
    viewed = Viewed(store, tmp_path)

    def result_of(reports: Reports, number: int) -> Result:
        monkeypatch.undo()  # from the next one on, the file says it
        viewed.standing.forget("edge-3")
        return RESULT

    monkeypatch.setattr(Reports, "result_of", result_of)
    (seen,) = (await viewed.status.read())["rounds"]
    assert seen["flagged"] == ["edge-3"]
    (now,) = (await viewed.status.read())["rounds"]
    assert not now["flagged"]


async def test_watch_ends_with_the_run(viewed: Viewed) -> None:
    viewed.standing.show_run_over()
    assert [state.run_over async for state in viewed.standing.watch(AGENT)] == [True]


async def test_encoded_model_that_is_gone_is_not_offered(store: Store, tmp_path: Path) -> None:
    run_rounds(store, tmp_path, 1)
    store.blobs.path(digest_of(encoded_of(1))).unlink()
    state = Viewed(store, tmp_path).standing.state_for(AGENT)
    assert state.latest_model
    assert state.latest_model.encoded is state.initial_encoded is None


async def test_agent_is_told_the_last_published_round_that_counted_it(store: Store, tmp_path: Path) -> None:
    run_rounds(store, tmp_path, 2)
    contribute(store, 3)
    store.set_phase(3, "failed", 4.0, failure="it went wrong")
    store.open_round(4, digest_of(model_of(2)), 4.0)
    viewed = Viewed(store, tmp_path)
    counted = [viewed.standing.state_for(agent_id).counted_round for agent_id in (AGENT, "other", None)]
    assert counted == [2, 0, 0]
    for phase in (Phase.AGGREGATING, Phase.FINE_TUNING, Phase.EVALUATING):
        viewed.show(viewed.round.advance(phase))
    mine = Contribution(AGENT, "d", (), 1, None, None)
    viewed.show(replace(viewed.round, contributions={AGENT: mine}).publish(digest_of(model_of(2))))
    assert viewed.standing.state_for(AGENT).counted_round == 4


LEFT_OUT = LeftOut(2, Reason.QUARANTINED, "its labels")


async def test_contribution_that_was_left_out_does_not_count_and_its_agent_is_told(
    store: Store, tmp_path: Path
) -> None:
    run_rounds(store, tmp_path, 1)
    contribute(store, 2)
    viewed = Viewed(store, tmp_path)
    for phase in (Phase.AGGREGATING, Phase.FINE_TUNING, Phase.EVALUATING):
        viewed.show(viewed.round.advance(phase))
    assert viewed.standing.state_for(AGENT).left_out is None
    left_out = {AGENT: Rejection(LEFT_OUT.reason, LEFT_OUT.message)}
    viewed.show(viewed.round.publish(digest_of(model_of(1)), left_out))
    state = viewed.standing.state_for(AGENT)
    assert (state.counted_round, state.left_out, state.outcome) == (1, LEFT_OUT, Outcome.ACCEPTED)
    assert viewed.standing.state_for("other").left_out is None


async def test_of_a_forgotten_agent_it_is_not_known_that_it_was_left_out(
    store: Store, tmp_path: Path
) -> None:
    run_rounds(store, tmp_path, 1)
    contribute(store, 2)
    viewed = Viewed(store, tmp_path)
    for phase in (Phase.AGGREGATING, Phase.FINE_TUNING, Phase.EVALUATING):
        viewed.show(viewed.round.advance(phase))
    viewed.show(viewed.round.publish(digest_of(model_of(1)), {AGENT: Rejection(*LEFT_OUT[1:])}))
    viewed.standing.forget(AGENT)
    viewed.show(viewed.round.without(AGENT))
    assert viewed.standing.state_for(AGENT).left_out is None


async def test_what_was_left_out_is_known_after_a_restart_and_news_for_one_round(
    store: Store, tmp_path: Path
) -> None:
    run_rounds(store, tmp_path, 1)
    contribute(store, 2)
    published, left_out = digest_of(model_of(1)), {AGENT: ("quarantined", "its labels")}
    store.set_phase(2, "published", 2.9, published_digest=published, left_out=left_out)
    for number, expected in ((2, LEFT_OUT), (3, LEFT_OUT), (4, None)):
        state = Viewed(store, tmp_path).standing.state_for(AGENT)
        assert (state.round, state.counted_round, state.left_out) == (number, 1, expected)
        store.open_round(number + 1, published, number + 1.0)


async def test_page_shows_what_the_audit_says_of_each_agent(store: Store, tmp_path: Path) -> None:
    run_rounds(store, tmp_path, 1)
    flagged = RESULT.audit[1].model_copy(update={"agent_id": AGENT})
    result = RESULT.model_copy(update={"audit": (flagged,)})
    JobDirectory(tmp_path / "jobs/round-0001").write_result(result)
    first, second = (await Viewed(store, tmp_path).status.read())["agents"]
    assert first["audit"] == {
        "norm_ratio": 4.5,
        "is_clipped": True,
        "flags": ("labels",),
        "left_out": Reason.QUARANTINED,
    }
    assert second["audit"] is None


async def test_status_shows_what_agents_do_and_forgets_it_when_they_leave(viewed: Viewed) -> None:
    watching = viewed.standing.watch(AGENT)
    await anext(watching)
    viewed.board.tell(AGENT, AgentProgress(Activity.PRE_TRAINING, 40, 100, 0.5))
    status = await viewed.status.read()
    first, second = status["agents"]
    assert first["progress"] == {
        "phase": "pre_training",
        "done": 40,
        "total": 100,
        "unit": "steps",
        "rate": None,
        "seconds_left": None,
        "loss": 0.5,
    }
    assert (first["away_since"], second["progress"]) == (None, None)
    # This server has never seen the other agent: it is away since the server's start.
    assert second["away_since"] == pytest.approx(time.time(), abs=60)
    assert status["waiting"].startswith("Waiting for 3 of 3: edge-2 has been away for ")
    assert status["waiting"].endswith(f"; {AGENT} trains, 40 % done; 1 has not joined.")
    await watching.aclose()
    first, _ = (await viewed.status.read())["agents"]
    assert first["progress"] is None
    assert first["away_since"] == pytest.approx(time.time(), abs=60)
    returned = viewed.standing.watch(AGENT)
    await anext(returned)
    first, _ = (await viewed.status.read())["agents"]
    assert (first["progress"], first["away_since"]) == (None, None)
    await returned.aclose()


async def test_status_shows_the_place_in_the_queue(viewed: Viewed) -> None:
    watching = viewed.standing.watch(AGENT)
    await anext(watching)
    viewed.places[AGENT] = 4
    agent, _ = (await viewed.status.read())["agents"]
    assert (agent["progress"]["phase"], agent["progress"]["total"], agent["upload_place"]) == (
        "queued",
        None,
        4,
    )
    await watching.aclose()


async def test_status_shows_how_the_trainer_is(viewed: Viewed) -> None:
    assert (await viewed.status.read())["trainer"] == {"state": "idle", "seconds_left": None}
    viewed.show(viewed.round.advance(Phase.AGGREGATING))
    viewed.standing.show_progress(WorkProgress(1, 2))
    assert (await viewed.status.read())["trainer"] == {"state": "working", "seconds_left": None}
    assert (await viewed.status.read())["waiting"] is None
    viewed.is_trainer_running = False
    assert (await viewed.status.read())["trainer"]["state"] == "restarting"


async def test_metrics_count_the_sample_of_the_round(viewed: Viewed) -> None:
    def counted() -> list[float | None]:
        name, sample = "ecavg_server_selected_agents", viewed.metrics.registry.get_sample_value
        return [sample(name, {"selection": each}) for each in ("pending", "drawn", "not_drawn")]

    assert counted() == [0, 0, 0]
    policy = replace(viewed.round.policy, sampling=Sampling(seed=0, size=1, min_connected=1))
    viewed.show(replace(viewed.round, policy=policy))
    assert counted() == [2, 0, 0]
    viewed.show(replace(viewed.round, drawn=frozenset({AGENT})))
    assert counted() == [0, 1, 1]
