"""The round ↔ its records: round.py and store.py do not know each other."""

from collections.abc import Sequence

from cloud_server.round import Contribution, Outcome, Phase, Policy, Rejection, Round
from cloud_server.store import ContributionRow, RoundRow
from common.errors import Reason


def round_from(row: RoundRow, contributions: Sequence[ContributionRow], policy: Policy) -> Round:
    """The round as the store remembers it."""
    by_outcome: dict[str, list[ContributionRow]] = {outcome.value: [] for outcome in Outcome}
    for contribution in contributions:
        by_outcome[contribution.outcome].append(contribution)
    return Round(
        number=row.number,
        policy=policy,
        opened_at=row.opened_at,
        initial_weights=row.initial_weights,
        phase=Phase(row.phase),
        contributions={
            item.agent_id: Contribution(
                agent_id=item.agent_id,
                weights=item.weights,
                shards=item.shards,
                num_examples=item.num_examples,
                accuracy_local=item.accuracy_local,
            )
            for item in by_outcome[Outcome.ACCEPTED.value]
        },
        rejections={
            item.agent_id: Rejection(Reason(item.reason), item.message)
            for item in by_outcome[Outcome.REJECTED.value]
        },
        late=frozenset(item.agent_id for item in by_outcome[Outcome.LATE.value]),
        published=row.published,
        failure=row.failure,
    )


def contribution_row(contribution: Contribution, outcome: Outcome, now: float) -> ContributionRow:
    """An accepted or a late contribution; `now` in seconds since the epoch."""
    return ContributionRow(
        agent_id=contribution.agent_id,
        outcome=outcome.value,
        weights=contribution.weights,
        shards=contribution.shards,
        num_examples=contribution.num_examples,
        accuracy_local=contribution.accuracy_local,
        reason=Reason.ROUND_CLOSED.value if outcome is Outcome.LATE else "",
        message="",
        at=now,
    )


def rejection_row(agent_id: str, rejection: Rejection, now: float) -> ContributionRow:
    """A refused one, of which nothing has been kept."""
    return ContributionRow(
        agent_id=agent_id,
        outcome=Outcome.REJECTED.value,
        weights="",
        shards=(),
        num_examples=0,
        accuracy_local=None,
        reason=rejection.reason.value,
        message=rejection.message,
        at=now,
    )
