"""Which model is for which agent: canaries, pins and withdrawals, see world.py and states.py."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest

from ecavg.cloud_server.__main__ import main
from ecavg.cloud_server.config import ServerConfig
from ecavg.cloud_server.disk.tables import ReportRow
from ecavg.cloud_server.rollout import changes, offers
from ecavg.cloud_server.rollout.offers import Offers
from ecavg.cloud_server.rollout.rule import CanaryRule
from ecavg.cloud_server.servicer import _differences
from ecavg.cloud_server.showing import presence
from ecavg.cloud_server.store import Store
from ecavg.cloud_server.upkeep import forgotten, provenance, retention, rollout
from ecavg.common.errors import ConflictError, InvalidError, NotFoundError
from ecavg.common.pb import ecavg_pb2 as pb
from ecavg.common.run_state import Phase, RunState
from tests.unit.states import (
    AGENT,
    INITIAL,
    begin,
    contribute,
    digest_of,
    encoded_of,
    model_of,
    run_rounds,
    upload,
)
from tests.unit.test_metrics import values
from tests.unit.world import REPORT, World, hurry, world

AGENTS = ("edge-1", "edge-2", "edge-3", "edge-4")
# Of 18 examples that the two models disagree on.
WORSE = {"difference_total": -12.0, "difference_squares": 18.0}
ABOUT_EQUAL = {"difference_total": -4.0, "difference_squares": 18.0}
ALL_FOUR = {"min_agents": 4, "canary": 0.5}


def rule(on_too_few: Literal["withdraw", "release"] = "withdraw", level: float = 0.05) -> CanaryRule:
    return CanaryRule(seed=1, fraction=0.1, level=level, seconds=60.0, on_too_few=on_too_few)


def report(agent_id: str, total: float | None, squares: float | None) -> ReportRow:
    return replace(REPORT, agent_id=agent_id, difference_total=total, difference_squares=squares)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)
    monkeypatch.setattr(rollout, "FOLLOW_SECONDS", 0.001)


# ---------------------------------------------------------------------- the rule


def test_canary_is_the_named_part_of_the_agents_and_one_at_least() -> None:
    agent_ids = [f"edge-{number}" for number in range(25)]
    drawn = rule().draw(3, agent_ids)
    assert len(drawn) == 3
    assert drawn == rule().draw(3, agent_ids[::-1])
    assert drawn != rule().draw(4, agent_ids)
    assert len(rule().draw(3, agent_ids[:2])) == 1


@pytest.mark.parametrize(
    ("gained", "lost", "is_released"),
    [(0, 0, True), (20, 5, True), (8, 12, True), (5, 13, False), (3, 15, False), (1, 0, True), (0, 3, False)],
)
def test_model_is_worse_where_mcnemars_one_sided_test_says_so(
    gained: int, lost: int, is_released: bool
) -> None:
    # One-sided at 5 %: gained - lost < -1.6449 √(gained + lost).
    assert is_released == (not (gained + lost and (gained - lost) < -1.6449 * (gained + lost) ** 0.5))
    reports = [report("edge-1", gained - 1, gained + 1), report("edge-2", 1 - lost, max(0, lost - 1))]
    assert rule().judge(reports).is_released == is_released


def test_stricter_level_withdraws_less_and_the_reason_has_the_figures() -> None:
    # The second device has compared nothing.
    reports = [replace(report("edge-1", -8.0, 18.0), num_held_out=40), report("edge-2", None, None)]
    assert rule().judge(reports) == (
        False,
        "worse for the canary: z = -1.89, and -1.64 is allowed, on 40 held-out examples of 2 agents",
    )
    assert rule(level=0.01).judge(reports).is_released


def test_devices_without_a_model_before_say_nothing_against_a_model() -> None:
    assert rule().judge([report("edge-1", None, None)]).is_released


# ---------------------------------------------------------------------- the canary of a run


@asynccontextmanager
async def canary_of_four(state_dir: Path, **keys: object) -> AsyncIterator[tuple[World, list[str]]]:
    """Have four agents contribute; half of them are the canary of round 1, which is published."""
    async with world(state_dir, **(ALL_FOUR | keys)) as it:
        for agent_id in AGENTS:
            await it.contribute(agent_id)
        await it.until(lambda: bool(it.standing.offers.canary))
        yield it, sorted(it.standing.offers.canary_agents)


def offered(it: World) -> dict[str, int]:
    return {agent_id: it.standing.state_for(agent_id).latest_round for agent_id in AGENTS}


async def tell(it: World, agent_id: str, number: int = 1, **fields: object) -> None:
    await it.desk.report(agent_id, number, replace(REPORT, agent_id=agent_id, **fields))


async def test_model_that_is_not_worse_for_the_canary_is_for_all(tmp_path: Path) -> None:
    async with canary_of_four(tmp_path) as (it, canary):
        assert len(canary) == 2
        assert offered(it) == {agent_id: int(agent_id in canary) for agent_id in AGENTS}
        await tell(it, canary[0], **ABOUT_EQUAL)
        status = await it.status.read()
        assert status["waiting"] == (
            "The model of round 1 is tried out: 1 of 2 agents of the canary have reported;"
            f" waiting for {canary[1]}."
        )
        assert status["rounds"][0]["roll_out"] == {"state": "canary", "reason": None}
        shown = {agent["agent_id"]: agent for agent in status["agents"]}
        assert [name for name in AGENTS if shown[name]["is_canary"]] == canary
        assert {name: shown[name]["model_round"] for name in AGENTS} == dict.fromkeys(AGENTS) | {canary[0]: 1}
        others = [agent_id for agent_id in AGENTS if agent_id not in canary]
        # What others say does not count.
        await tell(it, others[0], **WORSE)
        assert it.standing.current.number == 1
        await tell(it, canary[1])
        await it.until(lambda: it.standing.current.number == 2)
        assert offered(it) == dict.fromkeys(AGENTS, 1)
        # The others have reported on the model, too, but for one.
        assert it.standing.still_awaited(set(AGENTS)) == {others[1]}
        assert it.ledger.round.initial_digest == digest_in(it.store, 1)
        await it.until(lambda: it.report().get("roll_out", {}).get("state") == "released")
        assert it.report()["canary"] == canary
        assert values(it.metrics.registry, "ecavg_server_canaries_total") == {"released": 1, "withdrawn": 0}


async def test_model_that_is_worse_for_the_canary_is_withdrawn_and_the_next_round_starts_before_it(
    tmp_path: Path,
) -> None:
    async with canary_of_four(tmp_path) as (it, canary):
        start = it.ledger.round.initial_digest
        for agent_id in canary:
            await tell(it, agent_id, **WORSE)
        await it.until(lambda: it.standing.current.number == 2)
        state = it.standing.state_for(canary[0])
        assert (state.latest_round, state.withdrawn_rounds) == (0, (1,))
        assert it.ledger.round.initial_digest == start
        await it.until(lambda: it.report().get("roll_out", {}).get("state") == "withdrawn")
        assert it.report()["roll_out"]["reason"].startswith("worse for the canary: z = -4.00,")
        (line,) = provenance.lines(it.store)
        assert json.loads(line)["withdrawn"]
        assert it.store.state_dir.provenance.read_bytes() == line
        status = await it.status.read()
        assert status["rounds"][0]["roll_out"]["state"] == "withdrawn"
        # The canary goes back, and says so.
        assert it.standing.still_awaited(set(AGENTS)) == set(canary)
        for agent_id in canary:
            assert it.standing.rounds_in_use[agent_id] == 1
            await tell(it, agent_id, **WORSE, applied=False)
        assert not it.standing.still_awaited(set(AGENTS))
        assert not it.standing.rounds_in_use


async def test_nobody_waits_for_agents_that_will_not_report_on_an_older_model(tmp_path: Path) -> None:
    async with world(tmp_path) as it:
        await publish_round(it, 1)
        await it.desk.join("edge-2")
        await publish_round(it, 2)
        # Only edge-2, which was not here before, has reported on the model that is withdrawn.
        await tell(it, "edge-2", 2)
        await asyncio.to_thread(changes.withdraw, it.store, 2, 5.0)
        await it.until(lambda: it.standing.offers.released == 1)
        assert it.standing.still_awaited({"edge-1", "edge-2"}) == {"edge-1", "edge-2"}
        await tell(it, "edge-2", 2, applied=False)
        assert it.standing.still_awaited({"edge-1", "edge-2"}) == {"edge-1"}


async def test_agent_that_kept_no_other_model_has_gone_back_once_it_takes_another(tmp_path: Path) -> None:
    async with world(tmp_path) as it:
        await publish_round(it, 1)
        await publish_round(it, 2)
        await tell(it, "edge-1", 2)
        await asyncio.to_thread(changes.withdraw, it.store, 2, 5.0)
        await it.until(lambda: it.standing.offers.released == 1)
        assert it.standing.still_awaited({"edge-1"}) == {"edge-1"}
        await tell(it, "edge-1", 1)
        assert not it.standing.still_awaited({"edge-1"})


@pytest.mark.parametrize(("on_too_few", "latest_round"), [("withdraw", 0), ("release", 1)])
async def test_canary_that_does_not_report_in_time_is_decided_by_the_key(
    tmp_path: Path, on_too_few: str, latest_round: int
) -> None:
    async with canary_of_four(tmp_path, canary_seconds=0.01, canary_on_too_few=on_too_few) as (it, _):
        await it.until(lambda: it.standing.current.number == 2)
        assert offered(it) == dict.fromkeys(AGENTS, latest_round)
        (row,) = offers.rollouts(it.store).values()
        assert row.reason == "0 of 2 agents of the canary have reported within 0.01 seconds"


async def test_half_of_the_canary_is_enough_after_the_deadline(tmp_path: Path) -> None:
    async with canary_of_four(tmp_path, canary_seconds=0.3) as (it, canary):
        await tell(it, canary[1], **ABOUT_EQUAL)
        await it.until(lambda: it.standing.current.number == 2)
        assert offered(it) == dict.fromkeys(AGENTS, 1)
        (row,) = offers.rollouts(it.store).values()
        assert row.reason.endswith("of 1 agents")


async def test_forgotten_agents_are_no_part_of_the_canary_any_more(tmp_path: Path) -> None:
    async with canary_of_four(tmp_path) as (it, canary):
        await tell(it, canary[0], **ABOUT_EQUAL)
        await asyncio.to_thread(forgotten.ask_to_forget, it.store, canary[1], 1.0)
        await it.until(lambda: it.standing.current.number == 2)
        await it.until(lambda: it.report().get("roll_out", {}).get("state") == "released")
        assert it.report()["canary"] == [canary[0]]
        assert it.standing.state_for(canary[0]).latest_round == 1


async def test_server_that_was_stopped_in_a_canary_goes_on_with_it(tmp_path: Path) -> None:
    async with canary_of_four(tmp_path) as (it, canary):
        await tell(it, canary[0], **WORSE)
    async with world(tmp_path, **ALL_FOUR) as it:
        assert sorted(it.standing.offers.canary_agents) == canary
        assert offered(it) == {agent_id: int(agent_id in canary) for agent_id in AGENTS}
        await tell(it, canary[1], **WORSE)
        await it.until(lambda: it.standing.current.number == 2)
        assert it.standing.offers.withdrawn == (1,)


async def test_canary_has_time_to_report_after_a_server_was_away_for_longer_than_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with canary_of_four(tmp_path, canary_seconds=60) as (_, canary):
        pass
    monkeypatch.setattr(presence, "LIVENESS_SECONDS", 30.0)
    hour_later = {"clock": lambda: time.time() + 3600, "canary_seconds": 60}
    async with world(tmp_path, **ALL_FOUR, **hour_later) as it:
        assert it.coordinator._roll_out._seconds_left(1) == 30.0
        for agent_id in canary:
            await tell(it, agent_id, **ABOUT_EQUAL)
        await it.until(lambda: not it.standing.offers.canary)
        assert it.standing.offers.released == 1


async def test_without_the_key_there_is_no_canary(tmp_path: Path) -> None:
    async with world(tmp_path) as it:
        await it.contribute("edge-1")
        await it.until(lambda: it.standing.current.number == 2)
        assert offers.rollouts(it.store) == {}
        assert "roll_out" not in it.report()
        assert it.standing.state_for("edge-9").latest_round == 1


async def test_last_model_is_decided_on_before_the_run_is_over(tmp_path: Path) -> None:
    async with canary_of_four(tmp_path, rounds=1) as (it, canary):
        for agent_id in canary:
            await tell(it, agent_id, **WORSE)
        async with asyncio.timeout(10):
            await it.running
        assert it.standing.run_over
        assert it.standing.offers.withdrawn == (1,)


def test_async_rounds_have_no_canary() -> None:
    with pytest.raises(ValueError, match=r'canary is for run\.mode = "sync"'):
        ServerConfig(canary=0.1, run={"mode": "async"})


# ---------------------------------------------------------------------- what an operator asks for


def digest_in(store: Store, number: int) -> str:
    row = store.round(number)
    assert row
    assert row.published_digest
    return row.published_digest


def as_operator(state_dir: Path, *words: object) -> int:
    return main(["models", *map(str, words), "--state-dir", str(state_dir)])


async def publish_round(it: World, number: int) -> None:
    await it.contribute("edge-1", number)
    await it.until(lambda: it.standing.current.number == number + 1)


async def state_in_which(it: World, is_wanted: object) -> RunState:
    assert callable(is_wanted)
    await it.until(lambda: is_wanted(it.standing.state_for("edge-1")))
    return it.standing.state_for("edge-1")


async def test_pinned_model_is_offered_whatever_is_published_later(tmp_path: Path) -> None:
    async with world(tmp_path, canary=1.0, canary_on_too_few="release", canary_seconds=0.001) as it:
        await publish_round(it, 1)
        await publish_round(it, 2)
        assert await asyncio.to_thread(as_operator, tmp_path, "pin", 1) == 0
        state = await state_in_which(it, lambda state: state.is_pinned)
        assert state.latest_round == 1
        assert (await it.status.read())["pinned_round"] == 1
        await publish_round(it, 3)
        assert it.standing.state_for("edge-1").latest_round == 1
        # Training goes on from the newest model, which nobody has tried.
        assert it.ledger.round.initial_digest == digest_in(it.store, 3)
        assert list(offers.rollouts(it.store)) == [1, 2]
        assert await asyncio.to_thread(as_operator, tmp_path, "unpin") == 0
        state = await state_in_which(it, lambda state: not state.is_pinned)
        assert state.latest_round == 3


async def test_round_that_started_from_a_withdrawn_model_is_broken_off(tmp_path: Path) -> None:
    async with world(tmp_path) as it:
        await publish_round(it, 1)
        await publish_round(it, 2)
        assert await asyncio.to_thread(as_operator, tmp_path, "withdraw", 2) == 0
        await it.until(lambda: it.standing.current.number == 4)
        row = it.store.round(3)
        assert row
        assert row.failure == "it started from the model of round 2, which is withdrawn"
        state = it.standing.state_for("edge-1")
        assert (state.latest_round, state.withdrawn_rounds, state.phase) == (1, (2,), Phase.COLLECTING)
        assert it.ledger.round.initial_digest == digest_in(it.store, 1)


async def test_model_that_is_withdrawn_while_the_trainer_works_fails_the_round(tmp_path: Path) -> None:
    async with world(tmp_path) as it:
        await publish_round(it, 1)
        it.trainer.is_slow = True
        await it.contribute("edge-1", 2)
        await it.until(lambda: it.standing.current.phase is Phase.FINE_TUNING)
        await asyncio.to_thread(changes.withdraw, it.store, 1, 5.0)
        await it.until(lambda: it.standing.offers.withdrawn == (1,))
        it.trainer.dropped.set()
        await it.until(lambda: it.standing.current.number == 3)
        assert it.report(2)["failure"] == "it started from the model of round 1, which is withdrawn"


async def test_operator_can_withdraw_a_model_in_its_canary(tmp_path: Path) -> None:
    async with canary_of_four(tmp_path) as (it, _):
        with pytest.raises(ConflictError, match="the canary of round 1 is under way"):
            changes.pin(it.store, 1, 1.0)
        await asyncio.to_thread(changes.withdraw, it.store, 1, 1.0)
        await it.until(lambda: it.standing.current.number == 2)
        assert offered(it) == dict.fromkeys(AGENTS, 0)
        (row,) = offers.rollouts(it.store).values()
        assert (row.state, row.reason) == ("withdrawn", "by the operator")


async def test_decision_does_not_undo_a_withdrawal(tmp_path: Path) -> None:
    async with canary_of_four(tmp_path) as (it, _):
        changes.withdraw(it.store, 1, 1.0)
        changes.decide(it.store, 1, is_released=True, reason="", now=2.0)
        assert offers.read(it.store).withdrawn == (1,)


# ---------------------------------------------------------------------- a state directory at rest


@pytest.fixture
def store(state_dir: Path) -> Iterator[Store]:
    with closing(Store(state_dir)) as store:
        run_rounds(store, state_dir, 3)
        yield store


def test_offers_are_the_newest_model_that_is_not_withdrawn(store: Store) -> None:
    assert offers.read(store) == Offers(released=3)
    changes.withdraw(store, 3, 9.0)
    changes.withdraw(store, 3, 10.0)
    changes.withdraw(store, 2, 9.0)
    assert offers.read(store) == Offers(released=1, withdrawn=(2, 3))
    assert offers.next_start(store) == digest_of(model_of(1))
    changes.withdraw(store, 1, 9.0)
    assert offers.next_start(store) == digest_of(INITIAL)
    assert not store.has_published()
    assert [row.decided_at for row in offers.rollouts(store).values()] == [9.0, 9.0, 9.0]


def test_what_cannot_be_pinned_or_withdrawn_is_said(store: Store) -> None:
    for number in (0, 4, 5):
        with pytest.raises(NotFoundError, match=f"round {number} has published no model"):
            changes.pin(store, number, 9.0)
        with pytest.raises(NotFoundError, match=f"round {number} has published no model"):
            changes.withdraw(store, number, 9.0)
    with pytest.raises(NotFoundError, match="no model is pinned"):
        changes.unpin(store)
    changes.pin(store, 1, 9.0)
    changes.pin(store, 2, 9.0)
    with pytest.raises(ConflictError, match="round 2 is pinned"):
        changes.withdraw(store, 2, 9.0)
    changes.withdraw(store, 1, 9.0)
    with pytest.raises(ConflictError, match="round 1 is withdrawn"):
        changes.pin(store, 1, 9.0)
    assert changes.unpin(store) == 2


def test_model_that_is_pinned_while_a_round_is_published_has_no_canary_beside_it(store: Store) -> None:
    changes.pin(store, 1, 9.0)
    changes.begin_canary(store, 3, [AGENT], 9.0)
    assert offers.read(store) == Offers(released=3, pinned=1)


def test_pinned_model_outlives_its_round_and_no_longer(store: Store, state_dir: Path) -> None:
    changes.pin(store, 1, 9.0)
    for keep in range(2):
        retention.clean_up(store, keep_rounds=1, keep_partial_seconds=1, now=100.0)
        assert store.is_public(digest_of(model_of(1))), keep
        assert not store.blobs.size(digest_of(b"local weights 1"))
    changes.unpin(store)
    retention.clean_up(store, keep_rounds=1, keep_partial_seconds=1, now=9e9)
    assert not store.is_public(digest_of(model_of(1)))
    with pytest.raises(NotFoundError, match="round 1 is not kept any more"):
        changes.pin(store, 1, 9.0)


def test_model_that_the_next_round_starts_from_outlives_its_rounds(store: Store, state_dir: Path) -> None:
    changes.withdraw(store, 3, 9.0)
    changes.withdraw(store, 2, 9.0)
    store.record_rest(digest_of(model_of(1)), upload(store, b"its rest", "weights", 9.0))
    store.set_phase(4, "failed", 9.5, failure="it started from the model of round 3, which is withdrawn")
    retention.clean_up(store, keep_rounds=1, keep_partial_seconds=1, now=9e9)
    for content in (model_of(1), encoded_of(1), b"its rest"):
        assert store.is_public(digest_of(content)), content
    assert not store.blobs.size(digest_of(model_of(2)))
    # No round that is kept names it, and yet it is there.
    changes.withdraw(store, 3, 10.0)
    changes.pin(store, 1, 10.0)


def test_last_model_that_is_kept_stays(store: Store) -> None:
    retention.clean_up(store, keep_rounds=1, keep_partial_seconds=1, now=100.0)
    changes.withdraw(store, 3, 9.0)
    with pytest.raises(ConflictError, match="no model before round 2 is kept"):
        changes.withdraw(store, 2, 9.0)
    assert offers.read(store).withdrawn == (3,)


def test_withdrawn_weights_are_no_start_but_where_another_round_has_the_same(store: Store) -> None:
    changes.withdraw(store, 2, 9.0)
    assert offers.withdrawn_round(store, digest_of(model_of(2))) == 2
    assert offers.withdrawn_round(store, digest_of(model_of(1))) == 0
    changes.withdraw(store, 1, 9.0)
    contribute(store, 4)
    store.set_phase(4, "published", 4.9, published_digest=digest_of(model_of(1)))
    assert offers.withdrawn_round(store, digest_of(model_of(1))) == 0


def test_list_shows_each_model_and_who_uses_it(
    store: Store, state_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store.record_report(2, replace(REPORT, agent_id=AGENT, at=9.0))
    changes.withdraw(store, 3, 9.0)
    changes.pin(store, 1, 9.0)
    assert as_operator(state_dir, "list", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    fields = ("round", "state", "is_pinned", "is_offered", "num_agents", "reason")
    assert [tuple(model[field] for field in fields) for model in shown] == [
        (1, "released", True, True, 0, None),
        (2, "released", False, False, 1, None),
        (3, "withdrawn", False, False, 0, "by the operator"),
    ]
    assert as_operator(state_dir, "list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["round", "state", "agents", "model", "why"]
    assert lines[1].split() == ["1", "released,", "pinned", "0", digest_of(model_of(1))[:12]]
    assert lines[3].split()[:2] == ["3", "withdrawn"]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("withdraw", 7), "round 7 has published no model"),
        (("unpin",), "no model is pinned"),
    ],
)
def test_command_that_cannot_be_done_is_one_line(
    store: Store,
    state_dir: Path,
    words: tuple[object, ...],
    reason: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert as_operator(state_dir, *words) == 2
    error = capsys.readouterr().err
    assert reason in error
    assert "Traceback" not in error


def test_folder_without_a_server_is_told_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert as_operator(tmp_path / "none", "list") == 2
    assert "no cloud-server has been in" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_run_without_a_model_has_none_to_list(state_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with closing(Store(state_dir)) as store:
        begin(store, state_dir)
    assert as_operator(state_dir, "list") == 0
    assert capsys.readouterr().out == "no round has published a model yet\n"


def test_sums_that_no_differences_have_are_refused() -> None:
    fine = pb.ReportRequest(num_held_out=10, difference_total=-4, difference_squares=6)
    assert _differences(fine) == {"difference_total": -4.0, "difference_squares": 6.0}
    assert set(_differences(pb.ReportRequest(num_held_out=10)).values()) == {None}
    nan, infinite = float("nan"), float("inf")
    sums = ((-4, 1), (1e300, 1), (0, infinite), (nan, 1), (0, nan), (1, -1), (0, -1), (-4, -1), (0, 1.7e308))
    for total, squares in sums:
        with pytest.raises(InvalidError, match="these two sums"):
            _differences(
                pb.ReportRequest(num_held_out=10, difference_total=total, difference_squares=squares)
            )
