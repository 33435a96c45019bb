"""One round as a value: how far it is, who takes part in it, and what may happen next.

    COLLECTING ──▶ AGGREGATING ──▶ FINE_TUNING ──▶ EVALUATING ──▶ PUBLISHED
                        ▲               │               │
                        └───────────────┴───────────────┘  the trainer's job is run again
    any phase that is not over ──▶ FAILED

Nothing here reads a clock, a disk or a network: the ledger passes the time in, records the round that a
method returns, and only then acts on it. A round is never changed, only followed by another.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from cloud_server.contribution import Contribution, Rejection
from common.errors import ConflictError, InvalidError, Reason, second_device
from common.run_state import Outcome, Phase

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
class Policy:
    """The rule by which a round closes."""

    # So many contributions close the round once the deadline has passed.
    min_agents: int
    # So many contributions close the round at any time.
    max_agents: int
    # The deadline, counted from the opening; None: the round waits for max_agents.
    deadline_seconds: float | None
    # What happens when fewer than min_agents have contributed at the deadline.
    on_too_few: Literal["wait", "fail"] = "wait"


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
    # True if the learning rate takes a full curve in this round after the plan: see common/schedule.py.
    has_full_curve: bool = False
    phase: Phase = Phase.COLLECTING
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
            return "no agent shares images: the run begins without a warm-up"
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
            InvalidError: the pre-training did not start from this round's initial weights, or these are to
                be warmed up, and the contribution has others.
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
        self._check_initial_weights(contribution.initial_digest)
        self._check_not_trained(contribution.weights_digest)
        contributions = {**self.contributions, agent_id: contribution}
        return replace(self, rejections=others, contributions=contributions), Outcome.ACCEPTED

    def reject(self, agent_id: str, reason: Reason, message: str) -> "Round":
        """Return the round with this refusal, unless it has closed or a contribution of the agent stands."""
        if self.phase is not Phase.COLLECTING or agent_id in self.contributions:
            return self
        return replace(self, rejections={**self.rejections, agent_id: Rejection(reason, message)})

    def without(self, agent_id: str) -> "Round":
        """Return the round as if this agent had never been heard of."""
        if self.outcome_of(agent_id) is None:
            return self
        return replace(
            self,
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

    def _check_initial_weights(self, digest: str | None) -> None:
        if digest == self.initial_digest or (digest is None and self.may_be_independent):
            return
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
