"""One round as a value: how far it is, who takes part in it, and what may happen next.

    COLLECTING ──▶ AGGREGATING ──▶ FINE_TUNING ──▶ EVALUATING ──▶ PUBLISHED
                        ▲               │               │
                        └───────────────┴───────────────┘  the trainer's job is run again
    any phase that is not over ──▶ FAILED

Nothing here reads a clock, a disk or a network: the ledger passes the time in, records the round that a
method returns, and only then acts on it. A round is never changed, only followed by another.
"""

from collections.abc import Mapping, Set
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ecavg.cloud_server.contribution import Contribution, Rejection
from ecavg.common.errors import ConflictError, InvalidError, Reason, second_device
from ecavg.common.run_state import Outcome, Phase, Selection
from ecavg.common.seeds import derive_seed

TRANSITIONS: Mapping[Phase, frozenset[Phase]] = {
    Phase.COLLECTING: frozenset({Phase.AGGREGATING, Phase.FAILED}),
    Phase.AGGREGATING: frozenset({Phase.FINE_TUNING, Phase.FAILED}),
    Phase.FINE_TUNING: frozenset({Phase.AGGREGATING, Phase.EVALUATING, Phase.FAILED}),
    Phase.EVALUATING: frozenset({Phase.AGGREGATING, Phase.PUBLISHED, Phase.FAILED}),
    Phase.PUBLISHED: frozenset(),
    Phase.FAILED: frozenset(),
}
OVER = tuple(phase for phase, following in TRANSITIONS.items() if not following)


@dataclass(frozen=True)
class Sampling:
    """The rule by which the agents are drawn that take part in a round."""

    # The seed of the run, from which each agent has a lot in each round.
    seed: int
    # So many agents are drawn; at most `max_agents` of them contribute.
    size: int
    # So many agents must be connected and ready before a sample is drawn.
    min_connected: int


@dataclass(frozen=True)
class Policy:
    """The rule by which a round closes, and by which agents are drawn for it."""

    # So many contributions close the round once the deadline has passed.
    min_agents: int
    # So many contributions close the round at any time.
    max_agents: int
    # The deadline, counted from the opening; None: the round waits for max_agents.
    deadline_seconds: float | None
    # What happens when fewer than min_agents have contributed at the deadline.
    on_too_few: Literal["wait", "fail"] = "wait"
    # None: every agent takes part.
    sampling: Sampling | None = None
    # A contribution may be so many global models old; 0: it starts from the round's initial weights.
    max_staleness: int = 0


@dataclass(frozen=True)
class Round:
    """One round. Each agent is in at most one of `contributions`, `rejections` and `late`.

    Raises:
        ValueError: PUBLISHED without a global model, or a global model in another phase.
    """

    # Rounds are numbered from 1 on; round 0 is the warm-up of a run that has one.
    number: int
    policy: Policy
    # When the round opened, in seconds since the epoch.
    opened_at: float
    # The digest of the weights that the agents start from.
    initial_digest: str
    # True where agents may also start from weights of their own.
    may_be_independent: bool = False
    # The digests of earlier weights that agents may also have started from, the newest first; the length is
    # `max_staleness` of the policy at most.
    earlier_starts: tuple[str, ...] = ()
    # True if the learning rate takes a full curve in this round after the plan: see common/schedule.py.
    has_full_curve: bool = False
    phase: Phase = Phase.COLLECTING
    # The ids of the agents in the sample; empty: no sample is drawn, or not yet.
    drawn: frozenset[str] = frozenset()
    # The accepted contributions, by agent id.
    contributions: Mapping[str, Contribution] = field(default_factory=dict)
    # Why contributions were refused, by agent id.
    rejections: Mapping[str, Rejection] = field(default_factory=dict)
    # The ids of agents that came too late.
    late: frozenset[str] = frozenset()
    # Why accepted contributions are no part of the model, by agent id.
    left_out: Mapping[str, Rejection] = field(default_factory=dict)
    # The digest of the global model.
    published_digest: str | None = None
    # Why the round failed, in one line.
    failure: str = ""

    def __post_init__(self) -> None:
        if (self.phase is Phase.PUBLISHED) != (self.published_digest is not None):
            raise ValueError(
                f"round {self.number} is {self.phase} with the global model {self.published_digest}"
            )

    @property
    def is_warm_up(self) -> bool:
        """Return True in round 0, in which the cloud trains the initial weights on data that agents share."""
        return self.number == 0

    @property
    def obstacle(self) -> str:
        """Return why no model can be made of the contributions; empty: one can."""
        if not self.contributions:
            return "every agent that contributed is forgotten"
        if self.is_warm_up and not any(each.shard_digests for each in self.contributions.values()):
            return "no agent shares data: the run begins without a warm-up"
        return ""

    @property
    def counted(self) -> frozenset[str]:
        """Return the agents whose contributions are in the global model, once it is published."""
        return frozenset(self.contributions) - frozenset(self.left_out)

    @property
    def is_over(self) -> bool:
        """Return True if the round was published or has failed."""
        return self.phase in OVER

    @property
    def deadline_at(self) -> float | None:
        """Return the deadline in seconds since the epoch; None when the round waits for `max_agents`."""
        seconds = self.policy.deadline_seconds
        return None if seconds is None else self.opened_at + seconds

    def contribute(self, contribution: Contribution) -> tuple["Round", Outcome]:
        """Return the round with this contribution in it, or with its agent late if it has closed or is full.

        The same contribution again changes nothing and is accepted in any phase. The caller ticks next:
        this may have been the last contribution that the round waited for.

        Raises:
            ConflictError: a different contribution of this agent has been accepted.
            InvalidError: the agent is not in the sample of this round; the pre-training did not start from
                this round's initial weights, nor from earlier ones that are allowed; or the initial weights
                are to be warmed up, and the contribution has others.
        """
        agent_id = contribution.agent_id
        standing = self.contributions.get(agent_id)
        if standing == contribution:
            return self, Outcome.ACCEPTED
        if standing is not None:
            raise ConflictError(
                f"another contribution of {agent_id} to round {self.number} stands; {second_device(agent_id)}"
            )
        if agent_id in self.late:
            return self, Outcome.LATE
        others = {other: why for other, why in self.rejections.items() if other != agent_id}
        is_full = len(self.contributions) >= self.policy.max_agents
        if is_full or self.phase is not Phase.COLLECTING:
            return replace(self, rejections=others, late=self.late | {agent_id}), Outcome.LATE
        self._check_drawn(agent_id)
        staleness = self._staleness_of(contribution.initial_digest)
        self._check_not_trained(contribution.weights_digest)
        contributions = {**self.contributions, agent_id: replace(contribution, staleness=staleness)}
        return replace(self, rejections=others, contributions=contributions), Outcome.ACCEPTED

    def draw(self, ready: Set[str], now: float) -> "Round":
        """Return the round with a sample of these agents at `now` (seconds since the epoch), if it is time.

        A sample is drawn once, when `min_connected` agents are ready, or `min_agents` after half the time to
        the deadline. If it has fewer than `max_agents`, agents that become ready later fill it up. After the
        deadline, agents that are not ready and have not contributed no longer count here, so that others are
        drawn in their place.

        Each agent has a lot in each round, and the lowest lots are drawn. So the sample depends only on the
        seed and on who is ready, and whoever is drawn later is the next in line.
        """
        num_wanted = self._num_to_draw(ready, now)
        if num_wanted <= 0:
            return self
        others = [agent_id for agent_id in ready - self.drawn if self.outcome_of(agent_id) is None]
        chosen = sorted(others, key=self._lot)[:num_wanted]
        return replace(self, drawn=self.drawn.union(chosen)) if chosen else self

    def selection_of(self, agent_id: str) -> Selection | None:
        """Return whether the agent is in the sample; None: there is no sample, every agent takes part."""
        if self.policy.sampling is None:
            return None
        if agent_id in self.drawn:
            return Selection.DRAWN
        return Selection.NOT_DRAWN if self.drawn else Selection.PENDING

    @property
    def draws_with_fewer_at(self) -> float | None:
        """Return when `min_agents` are enough to draw a sample, in seconds since the epoch; None: never."""
        seconds = self.policy.deadline_seconds
        return None if seconds is None else self.opened_at + seconds / 2

    def reject(self, agent_id: str, reason: Reason, message: str) -> "Round":
        """Return the round with this refusal, unless it has closed or a contribution of the agent stands."""
        if self.phase is not Phase.COLLECTING or agent_id in self.contributions:
            return self
        return replace(self, rejections={**self.rejections, agent_id: Rejection(reason, message)})

    def without(self, agent_id: str) -> "Round":
        """Return the round as if this agent had never been heard of."""
        if self.outcome_of(agent_id) is None and agent_id not in self.drawn:
            return self
        return replace(
            self,
            drawn=self.drawn - {agent_id},
            contributions={key: value for key, value in self.contributions.items() if key != agent_id},
            rejections={key: value for key, value in self.rejections.items() if key != agent_id},
            late=self.late - {agent_id},
            left_out={key: value for key, value in self.left_out.items() if key != agent_id},
        )

    def outcome_of(self, agent_id: str) -> Outcome | None:
        """Return how the agent's part in the round stands; None: nothing has come from it yet."""
        if agent_id in self.contributions:
            return Outcome.ACCEPTED
        if agent_id in self.rejections:
            return Outcome.REJECTED
        return Outcome.LATE if agent_id in self.late else None

    def tick(self, now: float) -> "Round":
        """Return the round as the policy wants it at `now` (seconds since the epoch)."""
        if self.phase is not Phase.COLLECTING:
            return self
        num_accepted = len(self.contributions)
        is_overdue = self.deadline_at is not None and now >= self.deadline_at
        if num_accepted >= (self.policy.min_agents if is_overdue else self.policy.max_agents):
            return self.advance(Phase.AGGREGATING)
        if is_overdue and self.policy.on_too_few == "fail":
            return self.fail(
                f"too few agents: {num_accepted} of at least {self.policy.min_agents}"
                f" contributed within {self.policy.deadline_seconds:g} seconds"
            )
        return self

    def advance(self, phase: Phase) -> "Round":
        """Return the round in this phase; raise ValueError where TRANSITIONS has no such step."""
        return self._enter(phase)

    def publish(self, weights: str, left_out: Mapping[str, Rejection] | None = None) -> "Round":
        """Return the round over, with the digest of its global model; raise ValueError like `advance`.

        Args:
            weights: the digest of the global model.
            left_out: why accepted contributions are no part of the model, by agent id.
        """
        return self._enter(Phase.PUBLISHED, published_digest=weights, left_out=left_out or {})

    def fail(self, reason: str) -> "Round":
        """Return the round over without a model; raise ValueError like `advance`."""
        return self._enter(Phase.FAILED, failure=reason)

    def _num_to_draw(self, ready: Set[str], now: float) -> int:
        sampling = self.policy.sampling
        if sampling is None or self.phase is not Phase.COLLECTING:
            return 0
        if not self.drawn:
            is_late = self.draws_with_fewer_at is not None and now >= self.draws_with_fewer_at
            needed = self.policy.min_agents if is_late else sampling.min_connected
            return sampling.size - len(self.contributions) if len(ready) >= needed else 0
        is_overdue = self.deadline_at is not None and now >= self.deadline_at
        hoped_for = self.drawn & ready - self.rejections.keys() if is_overdue else self.drawn
        return self.policy.max_agents - len(hoped_for | self.contributions.keys())

    def _lot(self, agent_id: str) -> int:
        assert self.policy.sampling
        return derive_seed(self.policy.sampling.seed, "sample", self.number, agent_id)

    def _check_drawn(self, agent_id: str) -> None:
        if self.selection_of(agent_id) in (None, Selection.DRAWN):
            return
        raise InvalidError(
            f"{agent_id} is not drawn for round {self.number}: wait for the model of the round",
            Reason.NOT_DRAWN,
        )

    def _staleness_of(self, digest: str | None) -> int:
        """Return how many global models have followed the weights with this digest; 0 for initial weights.

        Raises:
            InvalidError: the round takes nothing that started from these weights.
        """
        if digest is None and self.may_be_independent:
            return 0
        starts = (self.initial_digest, *self.earlier_starts)
        if digest in starts:
            return starts.index(digest)
        start = f"from {digest[:16]}…" if digest else "from weights of the agent's own"
        raise InvalidError(
            f"pre-training started {start}, and that of round {self.number} starts from"
            f" {self.initial_digest[:16]}…: download these initial weights, and train again",
            Reason.INITIAL_WEIGHTS,
        )

    def _check_not_trained(self, digest: str) -> None:
        if self.is_warm_up and digest != self.initial_digest:
            raise InvalidError(
                "round 0 warms up the initial weights, and takes data alone: contribute the initial weights"
                " as they are",
                Reason.INITIAL_WEIGHTS,
            )

    def _enter(self, phase: Phase, **results: Any) -> "Round":
        if phase not in TRANSITIONS[self.phase]:
            raise ValueError(f"round {self.number} cannot go from {self.phase} to {phase}")
        return replace(self, phase=phase, **results)
