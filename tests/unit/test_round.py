"""The round by itself, and, by Hypothesis, a round over a real store that is closed and opened again."""

import os
import tempfile
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ecavg.cloud_server.contribution import Contribution, Decision, Rejection
from ecavg.cloud_server.records import round_from
from ecavg.cloud_server.round import TRANSITIONS, Policy, Round, Sampling
from ecavg.cloud_server.store import Store
from ecavg.common.errors import ConflictError, InvalidError, Reason
from ecavg.common.run_state import Outcome, Phase, Selection

POLICY = Policy(min_agents=2, max_agents=3, deadline_seconds=60)
OPENED_AT = 1_000.0
IN_TIME, OVERDUE = OPENED_AT + 59.9, OPENED_AT + 60
INITIAL = "0" * 64
NOT_COLLECTING = [phase for phase in Phase if phase is not Phase.COLLECTING]


def contribution(agent_id: str, **changes: Any) -> Contribution:
    return replace(Contribution(agent_id, "a" * 64, ("b" * 64,), 100, INITIAL, 0.5), **changes)


def round_of(*agent_ids: str, policy: Policy = POLICY, phase: Phase = Phase.COLLECTING) -> Round:
    """Return a round that these agents have contributed to."""
    return Round(
        number=1,
        policy=policy,
        opened_at=OPENED_AT,
        initial_digest=INITIAL,
        phase=phase,
        contributions={agent_id: contribution(agent_id) for agent_id in agent_ids},
        published_digest="f" * 64 if phase is Phase.PUBLISHED else None,
        failure="out of memory" if phase is Phase.FAILED else "",
    )


# Samples

FLEET = frozenset(f"edge-{number}" for number in range(20))
SAMPLED = Policy(1, 2, deadline_seconds=60, sampling=Sampling(seed=0, size=3, min_connected=5))


def sampled_round(*agent_ids: str) -> Round:
    return round_of(*agent_ids, policy=SAMPLED)


def test_nobody_is_drawn_before_enough_agents_are_ready():
    few = frozenset(sorted(FLEET)[:4])
    waiting = sampled_round()
    assert waiting.draw(few, OPENED_AT + 29) is waiting
    assert waiting.selection_of("edge-1") is Selection.PENDING
    with pytest.raises(InvalidError, match="not drawn for round 1"):
        waiting.contribute(contribution("edge-1"))
    assert len(waiting.draw(FLEET, OPENED_AT).drawn) == 3
    # After half the time to the deadline fewer are enough.
    assert len(waiting.draw(few, OPENED_AT + 30).drawn) == 3
    assert waiting.draw(frozenset(), OPENED_AT + 30) is waiting


def test_sample_depends_on_seed_round_and_who_is_ready_alone():
    drawn = sampled_round().draw(FLEET, OPENED_AT).drawn
    assert drawn < FLEET
    assert sampled_round().draw(frozenset(sorted(FLEET, reverse=True)), OPENED_AT + 5).drawn == drawn
    assert replace(sampled_round(), number=2).draw(FLEET, OPENED_AT).drawn != drawn
    other_seed = replace(SAMPLED, sampling=Sampling(1, 3, 5))
    assert round_of(policy=other_seed).draw(FLEET, OPENED_AT).drawn != drawn


def test_every_agent_is_drawn_equally_often():
    rounds = [replace(sampled_round(), number=number).draw(FLEET, OPENED_AT) for number in range(1, 2001)]
    times = [sum(agent_id in each.drawn for each in rounds) for agent_id in FLEET]
    # 300 on average, with a standard deviation of 16.
    assert all(240 < number < 360 for number in times)


def test_those_that_are_not_drawn_do_not_contribute_and_those_that_are_do():
    drawn = sampled_round().draw(FLEET, OPENED_AT)
    first, second, third = sorted(drawn.drawn)
    other = min(FLEET - drawn.drawn)
    assert drawn.selection_of(other) is Selection.NOT_DRAWN
    with pytest.raises(InvalidError) as refused:
        drawn.contribute(contribution(other))
    assert refused.value.reason is Reason.NOT_DRAWN
    one, _ = drawn.contribute(contribution(first))
    two, outcome = one.contribute(contribution(second))
    assert outcome is Outcome.ACCEPTED
    assert two.tick(IN_TIME).phase is Phase.AGGREGATING
    assert two.contribute(contribution(third))[1] is Outcome.LATE


def test_draw_that_is_large_enough_stands_until_the_deadline():
    drawn = sampled_round().draw(FLEET, OPENED_AT)
    assert drawn.draw(FLEET - drawn.drawn, IN_TIME) is drawn


def test_after_the_deadline_others_are_drawn_in_the_place_of_those_that_are_gone():
    drawn = sampled_round().draw(FLEET, OPENED_AT)
    first, second, _ = sorted(drawn.drawn)
    # One that is still there, and one that another takes the place of.
    again = drawn.draw(FLEET - drawn.drawn | {first}, OVERDUE)
    assert len(again.drawn - drawn.drawn) == 1
    assert drawn.drawn < again.drawn
    # A contribution counts, wherever its agent is; a refused one does not.
    contributed, _ = drawn.contribute(contribution(second))
    assert contributed.draw(FLEET - {second}, OVERDUE) is contributed
    refused = contributed.reject(first, Reason.NON_FINITE, "NaN")
    assert len(refused.draw(FLEET - drawn.drawn | {first}, OVERDUE).drawn) == 4


def test_draw_that_is_too_small_is_filled_up_by_who_comes_later():
    small = sampled_round().draw(frozenset({"edge-1"}), OPENED_AT + 30)
    assert small.drawn == {"edge-1"}
    full = small.draw(frozenset({"edge-1", "edge-2"}), OPENED_AT + 31)
    assert full.drawn == {"edge-1", "edge-2"}
    assert full.draw(FLEET, OPENED_AT + 32) is full


def test_round_without_a_sample_takes_everyone():
    anyone = round_of()
    assert anyone.draw(FLEET, OVERDUE) is anyone
    assert anyone.selection_of("edge-1") is None


# Contributions


def test_contribution_is_accepted_while_collecting():
    contributed, outcome = round_of().contribute(contribution("a"))
    assert outcome is Outcome.ACCEPTED
    assert contributed.contributions == {"a": contribution("a")}
    assert contributed.outcome_of("a") is Outcome.ACCEPTED


def test_contribute_leaves_the_round_before_as_it_was():
    before = round_of("a")
    before.contribute(contribution("b"))
    assert before == round_of("a")


@pytest.mark.parametrize("phase", Phase)
def test_same_contribution_again_is_accepted_and_changes_nothing(phase):
    before = round_of("a", phase=phase)
    assert before.contribute(contribution("a")) == (before, Outcome.ACCEPTED)


def test_local_accuracy_does_not_make_it_another_contribution():
    before = round_of("a")
    assert before.contribute(contribution("a", score_local=None)) == (before, Outcome.ACCEPTED)


@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize(
    "change",
    [{"weights_digest": "c" * 64}, {"shard_digests": ()}, {"num_examples": 7}, {"initial_digest": None}],
)
def test_accepted_contribution_stands_against_a_different_one(phase, change):
    with pytest.raises(ConflictError) as refusal:
        round_of("a", phase=phase).contribute(contribution("a", **change))
    assert refusal.value.reason is Reason.ALREADY_CONTRIBUTED


@pytest.mark.parametrize("initial_weights", [INITIAL, None])
def test_independent_agents_may_start_from_weights_of_their_own(initial_weights):
    offered = contribution("a", initial_digest=initial_weights)
    _, outcome = replace(round_of(), may_be_independent=True).contribute(offered)
    assert outcome is Outcome.ACCEPTED


@pytest.mark.parametrize(
    ("may_be_independent", "initial_weights", "start"),
    [
        (False, None, "weights of the agent's own"),
        (False, "1" * 64, "1111111111111111…"),
        (True, "1" * 64, "1111111111111111…"),
    ],
)
def test_pretraining_from_other_weights_than_the_initial_is_refused(
    may_be_independent, initial_weights, start
):
    collecting = replace(round_of(), may_be_independent=may_be_independent)
    with pytest.raises(
        InvalidError, match=f"started from {start}, .* starts from 0000000000000000…"
    ) as refusal:
        collecting.contribute(contribution("a", initial_digest=initial_weights))
    assert refusal.value.reason is Reason.INITIAL_WEIGHTS


def test_warm_up_takes_the_initial_weights_as_they_are_and_no_others():
    warm_up = replace(round_of(), number=0)
    _, outcome = warm_up.contribute(contribution("a", weights_digest=INITIAL))
    assert outcome is Outcome.ACCEPTED
    with pytest.raises(InvalidError, match="takes data alone") as refusal:
        warm_up.contribute(contribution("a"))
    assert refusal.value.reason is Reason.INITIAL_WEIGHTS


def test_only_a_warm_up_needs_somebody_who_shares():
    for number, obstacle in ((0, "no agent shares data: the run begins without a warm-up"), (1, "")):
        unshared = {name: contribution(name, shard_digests=()) for name in ("a", "b")}
        round_ = replace(round_of(), number=number, contributions=unshared)
        assert round_.obstacle == obstacle
        one_shares = replace(round_, contributions={**unshared, "c": contribution("c")})
        assert one_shares.obstacle == ""
    assert round_of().obstacle == "every agent that contributed is forgotten"


@pytest.mark.parametrize("phase", NOT_COLLECTING)
def test_late_contribution_is_late_whatever_it_started_from(phase):
    _, outcome = round_of(phase=phase).contribute(contribution("a", initial_digest="1" * 64))
    assert outcome is Outcome.LATE


@pytest.mark.parametrize("phase", NOT_COLLECTING)
def test_contribution_after_the_close_is_late_and_remembered(phase):
    after, outcome = round_of("a", phase=phase).contribute(contribution("b"))
    assert outcome is Outcome.LATE
    assert after == replace(round_of("a", phase=phase), late=frozenset({"b"}))
    assert after.outcome_of("b") is Outcome.LATE
    assert after.contribute(contribution("b")) == (after, Outcome.LATE)


def test_full_round_takes_no_more_even_before_its_close_is_recorded():
    after, outcome = round_of("a", "b", "c").contribute(contribution("d"))
    assert outcome is after.outcome_of("d") is Outcome.LATE
    assert after.tick(OPENED_AT).contributions == round_of("a", "b", "c").contributions


def test_rejection_is_remembered_with_its_reason():
    rejected = round_of("a").reject("b", Reason.NON_FINITE, "NaN in fc.weight")
    assert rejected.rejections == {"b": Rejection(Reason.NON_FINITE, "NaN in fc.weight")}
    assert rejected.outcome_of("b") is Outcome.REJECTED
    assert rejected.outcome_of("c") is None


def test_rejected_agent_may_contribute_well_in_the_same_round():
    rejected = round_of().reject("a", Reason.NON_FINITE, "NaN").reject("b", Reason.NON_FINITE, "NaN")
    accepted, outcome = rejected.contribute(contribution("a"))
    assert outcome is Outcome.ACCEPTED
    assert accepted.outcome_of("a") is Outcome.ACCEPTED
    assert set(accepted.rejections) == {"b"}


def test_rejected_agent_that_comes_back_too_late_is_late_only():
    rejected = round_of("b", "c").reject("a", Reason.NON_FINITE, "NaN").advance(Phase.AGGREGATING)
    late, outcome = rejected.contribute(contribution("a"))
    assert outcome is late.outcome_of("a") is Outcome.LATE
    assert not late.rejections


def test_rejection_does_not_undo_an_accepted_contribution():
    assert round_of("a").reject("a", Reason.NON_FINITE, "NaN") == round_of("a")


@pytest.mark.parametrize("phase", NOT_COLLECTING)
def test_rejection_after_the_close_changes_nothing(phase):
    assert round_of(phase=phase).reject("a", Reason.NON_FINITE, "NaN") == round_of(phase=phase)


# Time


@pytest.mark.parametrize(
    ("agent_ids", "now", "on_too_few", "phase"),
    [
        ("", IN_TIME, "fail", Phase.COLLECTING),
        ("ab", IN_TIME, "wait", Phase.COLLECTING),
        ("abc", OPENED_AT, "wait", Phase.AGGREGATING),
        ("ab", OVERDUE, "wait", Phase.AGGREGATING),
        ("ab", OVERDUE, "fail", Phase.AGGREGATING),
        ("a", OVERDUE, "wait", Phase.COLLECTING),
        ("a", OVERDUE, "fail", Phase.FAILED),
        ("", OVERDUE, "fail", Phase.FAILED),
    ],
)
def test_round_closes_by_number_or_by_deadline(agent_ids, now, on_too_few, phase):
    policy = replace(POLICY, on_too_few=on_too_few)
    assert round_of(*agent_ids, policy=policy).tick(now).phase is phase


def test_round_that_waited_past_its_deadline_closes_when_enough_have_come():
    waiting = round_of("a").tick(OVERDUE + 1_000)
    contributed, _ = waiting.contribute(contribution("b"))
    assert contributed.tick(OVERDUE + 1_000).phase is Phase.AGGREGATING


def test_round_without_deadline_waits_for_all():
    policy = replace(POLICY, deadline_seconds=None, on_too_few="fail")
    assert round_of("a", "b", policy=policy).deadline_at is None
    assert round_of("a", "b", policy=policy).tick(1e12).phase is Phase.COLLECTING
    assert round_of("a", "b", "c", policy=policy).tick(OPENED_AT).phase is Phase.AGGREGATING


def test_failure_by_deadline_says_how_many_were_missing():
    failed = round_of("a", policy=replace(POLICY, on_too_few="fail")).tick(OVERDUE)
    assert failed.failure == "too few agents: 1 of at least 2 contributed within 60 seconds"


@pytest.mark.parametrize("phase", NOT_COLLECTING)
def test_time_does_not_move_a_round_that_has_closed(phase):
    assert round_of("a", phase=phase).tick(OVERDUE) == round_of("a", phase=phase)


# Phases


def test_life_of_a_round():
    phases = [round_of("a", "b", "c")]
    phases.append(phases[-1].tick(OPENED_AT))
    phases.append(phases[-1].advance(Phase.FINE_TUNING))
    phases.append(phases[-1].advance(Phase.EVALUATING))
    phases.append(phases[-1].publish("e" * 64))
    assert [each.phase.name for each in phases] == [
        "COLLECTING",
        "AGGREGATING",
        "FINE_TUNING",
        "EVALUATING",
        "PUBLISHED",
    ]
    assert [each.is_over for each in phases] == [False, False, False, False, True]
    assert phases[-1].published_digest == "e" * 64


@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize("following", Phase)
def test_round_takes_exactly_the_listed_steps(phase, following):
    before = round_of("a", phase=phase)
    step = {
        Phase.PUBLISHED: lambda: before.publish("e" * 64),
        Phase.FAILED: lambda: before.fail("out of memory"),
    }.get(following, lambda: before.advance(following))
    if following in TRANSITIONS[phase]:
        assert step().phase is following
        assert step().contributions == before.contributions
    else:
        with pytest.raises(ValueError, match=f"from {phase} to {following}"):
            step()


@pytest.mark.parametrize("phase", Phase)
def test_round_that_is_not_over_can_fail_and_one_that_is_over_stays(phase):
    is_over = phase in {Phase.PUBLISHED, Phase.FAILED}
    assert round_of(phase=phase).is_over is is_over
    assert TRANSITIONS[phase] >= ({Phase.FAILED} if not is_over else set())
    assert is_over == (TRANSITIONS[phase] == frozenset())


@pytest.mark.parametrize("phase", [Phase.FINE_TUNING, Phase.EVALUATING])
def test_job_can_be_run_again_from_each_of_its_phases(phase):
    assert round_of("a", phase=phase).advance(Phase.AGGREGATING).phase is Phase.AGGREGATING


def test_nothing_is_published_without_a_model():
    with pytest.raises(ValueError, match="published"):
        round_of(phase=Phase.EVALUATING).advance(Phase.PUBLISHED)


# A run of rounds over a store that dies and comes back


class Crash(Enum):
    """Where the server dies while it takes something in."""

    NEVER = "never"
    BEFORE_RECORD = "before the record"
    AFTER_RECORD = "after the record, before the answer"


@dataclass(frozen=True)
class Published:
    """A published round as its agents came to know it."""

    weights: str
    contributions: tuple[Contribution, ...]


MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # where fsync costs nothing
WORK = [Phase.AGGREGATING, Phase.FINE_TUNING, Phase.EVALUATING]
AGENT_IDS = st.sampled_from(["a", "b", "c"])
CRASHES = st.sampled_from([Crash.NEVER, Crash.NEVER, *Crash])


class Run(RuleBasedStateMachine):
    """What the coordinator does, in small: record first, then believe it, then answer."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory(dir=MEMORY)
        self.now = OPENED_AT
        self.store = Store(Path(self.folder.name))
        self.store.open_round(1, "0" * 64, self.now)
        self.slots: dict[str, int] = {}
        self.acknowledged: dict[tuple[int, str], Contribution] = {}
        self.published: dict[int, Published] = {}

    @initialize(min_agents=st.sampled_from([1, 1, 2]), on_too_few=st.sampled_from(["wait", "wait", "fail"]))
    def begin(self, min_agents: int, on_too_few: Literal["wait", "fail"]) -> None:
        self.policy = Policy(min_agents, max_agents=2, deadline_seconds=60, on_too_few=on_too_few)
        self.round = self.remembered_round()

    def teardown(self) -> None:
        self.store.close()
        self.folder.cleanup()

    # What happens to a run

    @rule(agent_id=AGENT_IDS)
    def join(self, agent_id: str) -> None:
        slot = self.store.join(agent_id, self.now)
        assert slot == self.slots.setdefault(agent_id, len(self.slots) + 1)

    @rule(agent_id=AGENT_IDS, weights=st.sampled_from("12"), crash=CRASHES)
    def contribute(self, agent_id: str, weights: str, crash: Crash) -> None:
        self.join(agent_id)
        offered = contribution(
            agent_id, weights_digest=weights * 64, initial_digest=self.round.initial_digest
        )
        try:
            updated, outcome = self.round.contribute(offered)
        except ConflictError:
            assert self.round.contributions[agent_id] != offered
            return
        if self.acknowledged.get((self.round.number, agent_id)) == offered:
            assert (updated, outcome) == (self.round, Outcome.ACCEPTED)
        if updated is not self.round and crash is not Crash.BEFORE_RECORD:
            self.store.record_contribution(self.round.number, decision_on(offered, outcome, self.now))
        if crash is not Crash.NEVER:
            self.restart()
            return
        self.round = updated
        if outcome is Outcome.ACCEPTED:
            self.acknowledged[self.round.number, agent_id] = offered
        self.tick()

    @rule(agent_id=AGENT_IDS, crash=CRASHES)
    def reject(self, agent_id: str, crash: Crash) -> None:
        self.join(agent_id)
        updated = self.round.reject(agent_id, Reason.NON_FINITE, "NaN in fc.weight")
        if updated is not self.round and crash is not Crash.BEFORE_RECORD:
            why = Rejection(Reason.NON_FINITE, "NaN in fc.weight")
            decision = Decision(agent_id, Outcome.REJECTED, self.now, why=why)
            self.store.record_contribution(self.round.number, decision)
        if crash is Crash.NEVER:
            self.round = updated
        else:
            self.restart()

    @rule(seconds=st.sampled_from([1.0, 59.0, 60.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.tick()

    @precondition(lambda self: self.job_is_running())
    @rule(phase=st.sampled_from(WORK), crash=CRASHES)
    def job_goes_on(self, phase: Phase, crash: Crash) -> None:
        if phase in TRANSITIONS[self.round.phase]:
            self.enter(self.round.advance(phase), crash)

    @precondition(lambda self: self.job_is_running())
    @rule(succeeds=st.sampled_from([True, True, False]), leaves_out=st.booleans(), crash=CRASHES)
    def job_ends(self, succeeds: bool, leaves_out: bool, crash: Crash) -> None:
        if not succeeds:
            self.enter(self.round.fail("out of memory"), crash)
            return
        for phase in WORK[WORK.index(self.round.phase) + 1 :]:
            self.enter(self.round.advance(phase), Crash.NEVER)
        first = sorted(self.round.contributions)[: int(leaves_out)]
        left_out = dict.fromkeys(first, Rejection(Reason.QUARANTINED, "its labels"))
        self.enter(self.round.publish(f"{self.round.number:064x}", left_out), crash)

    @precondition(lambda self: self.round.is_over)
    @rule()
    def next_round(self) -> None:
        start = self.round.published_digest or self.round.initial_digest
        self.store.open_round(self.round.number + 1, start, self.now)
        self.round = self.remembered_round()

    @rule()
    def restart(self) -> None:
        self.store.close()
        self.store = Store(Path(self.folder.name))
        self.round = self.remembered_round()

    # What must hold after each of these

    @invariant()
    def what_is_remembered_is_what_is_believed(self) -> None:
        assert self.remembered_round() == self.round

    @invariant()
    def every_acknowledged_contribution_is_there_once(self) -> None:
        for (number, agent_id), offered in self.acknowledged.items():
            decisions = [each for each in self.store.contributions(number) if each.agent_id == agent_id]
            assert [(each.outcome, each.contribution) for each in decisions] == [("accepted", offered)]

    @invariant()
    def what_is_left_out_does_not_count(self) -> None:
        counted = self.store.counted_rounds()
        for agent_id in self.round.contributions if self.round.published_digest else ():
            assert (counted.get(agent_id) == self.round.number) == (agent_id in self.round.counted)

    @invariant()
    def every_agent_has_one_outcome_at_most(self) -> None:
        groups = [set(self.round.contributions), set(self.round.rejections), set(self.round.late)]
        assert sum(map(len, groups)) == len(set.union(*groups))
        assert len(self.round.contributions) <= self.policy.max_agents

    @invariant()
    def published_rounds_never_change(self) -> None:
        for number, published in self.published.items():
            row = self.store.round(number)
            assert row is not None
            assert (row.phase, row.published_digest) == ("published", published.weights)
            assert accepted(self.store, number) == published.contributions

    @invariant()
    def only_the_last_round_is_open(self) -> None:
        *earlier, last = self.store.rounds()
        assert [row.number for row in (*earlier, last)] == list(range(1, self.round.number + 1))
        assert all(row.phase in {"published", "failed"} for row in earlier)

    # How the coordinator goes about it

    def job_is_running(self) -> bool:
        return self.round.phase is not Phase.COLLECTING and not self.round.is_over

    def tick(self) -> None:
        ticked = self.round.tick(self.now)
        if ticked is not self.round:
            self.enter(ticked, Crash.NEVER)

    def enter(self, updated: Round, crash: Crash) -> None:
        if crash is not Crash.BEFORE_RECORD:
            self.store.set_phase(
                updated.number,
                updated.phase,
                self.now,
                failure=updated.failure,
                published_digest=updated.published_digest,
                left_out={
                    agent_id: (why.reason.value, why.message) for agent_id, why in updated.left_out.items()
                },
            )
            if updated.published_digest:
                contributions = accepted(self.store, updated.number)
                self.published[updated.number] = Published(updated.published_digest, contributions)
        if crash is Crash.NEVER:
            self.round = updated
        else:
            self.restart()

    def remembered_round(self) -> Round:
        row = self.store.last_round()
        assert row is not None
        return round_from(row, self.store.contributions(row.number), self.policy)


def decision_on(offered: Contribution, outcome: Outcome, now: float) -> Decision:
    kept = offered if outcome is Outcome.ACCEPTED else None
    return Decision(offered.agent_id, outcome, now, kept)


def accepted(store: Store, number: int) -> tuple[Contribution, ...]:
    return tuple(each.contribution for each in store.contributions(number) if each.contribution)


TestRun = Run.TestCase
TestRun.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
