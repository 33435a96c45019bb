"""Round and run as records and as jobs: round.py, store.py and jobs.py do not know each other."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from cloud_server.disk.tables import ContributionRow, RoundRow
from cloud_server.jobs import AgentAudit, Job, JobContribution, Result, job_name
from cloud_server.round import Contribution, Outcome, Phase, Policy, Rejection, Round
from common.config import RunConfig
from common.errors import Reason


def round_from(
    row: RoundRow,
    contributions: Sequence[ContributionRow],
    policy: Policy,
    *,
    may_be_independent: bool = False,
) -> Round:
    """The round as the store remembers it."""
    by_outcome: dict[str, list[ContributionRow]] = {outcome.value: [] for outcome in Outcome}
    for contribution in contributions:
        by_outcome[contribution.outcome].append(contribution)
    return Round(
        number=row.number,
        policy=policy,
        opened_at=row.opened_at,
        initial_weights=row.initial_weights,
        may_be_independent=may_be_independent,
        phase=Phase(row.phase),
        contributions={
            item.agent_id: Contribution(
                agent_id=item.agent_id,
                weights=item.weights,
                shards=item.shards,
                num_examples=item.num_examples,
                initial_weights=item.initial_weights,
                accuracy_local=item.accuracy_local,
                num_shared=item.num_shared,
            )
            for item in by_outcome[Outcome.ACCEPTED.value]
        },
        rejections={
            item.agent_id: Rejection(Reason(item.reason), item.message)
            for item in by_outcome[Outcome.REJECTED.value]
        },
        late=frozenset(item.agent_id for item in by_outcome[Outcome.LATE.value]),
        left_out={
            item.agent_id: Rejection(Reason(item.reason), item.message)
            for item in by_outcome[Outcome.ACCEPTED.value]
            if item.reason
        },
        published=row.published,
        failure=row.failure,
    )


def accepted_row(contribution: Contribution, now: float) -> ContributionRow:
    """An accepted contribution; `now` in seconds since the epoch."""
    return ContributionRow(
        agent_id=contribution.agent_id,
        outcome=Outcome.ACCEPTED.value,
        weights=contribution.weights,
        shards=contribution.shards,
        num_examples=contribution.num_examples,
        initial_weights=contribution.initial_weights,
        accuracy_local=contribution.accuracy_local,
        num_shared=contribution.num_shared,
        reason="",
        message="",
        at=now,
    )


def late_row(agent_id: str, now: float) -> ContributionRow:
    """One that came too late, of which nothing is kept: nobody has looked whether what it names is here."""
    return _row_of_none(agent_id, Outcome.LATE, Rejection(Reason.ROUND_CLOSED, ""), now)


def rejection_row(agent_id: str, rejection: Rejection, now: float) -> ContributionRow:
    """A refused one, of which nothing has been kept."""
    return _row_of_none(agent_id, Outcome.REJECTED, rejection, now)


def _row_of_none(agent_id: str, outcome: Outcome, why: Rejection, now: float) -> ContributionRow:
    return ContributionRow(
        agent_id=agent_id,
        outcome=outcome.value,
        weights="",
        shards=(),
        num_examples=0,
        accuracy_local=None,
        reason=why.reason.value,
        message=why.message,
        at=now,
    )


def initialise_job(run: RunConfig, device: str) -> Job:
    """Before the first round: the run's initial weights."""
    return Job(kind="initialise", name="initialise", round=0, run=run, device=device, initial_weights=None)


def round_job(round_: Round, run: RunConfig, device: str) -> Job:
    """What the trainer has to do for a round that has closed."""
    return Job(
        kind="round",
        name=job_name(round_.number),
        round=round_.number,
        run=run,
        device=device,
        initial_weights=round_.initial_weights,
        contributions=tuple(
            JobContribution(
                agent_id=agent_id,
                weights=contribution.weights,
                shards=contribution.shards,
                num_examples=contribution.num_examples,
                initial_weights=contribution.initial_weights,
            )
            for agent_id, contribution in sorted(round_.contributions.items())
        ),
    )


def left_out(result: Result, run: RunConfig) -> dict[str, Rejection]:
    """The contributions that the trainer has left out, by agent id, and what to tell their agents."""
    return {
        agent.agent_id: Rejection(agent.left_out, _message(agent, run))
        for agent in result.audit
        if agent.left_out
    }


def _message(agent: AgentAudit, run: RunConfig) -> str:
    if agent.left_out is Reason.LARGE_UPDATE:
        ratio = f"{agent.norm_ratio:.3g} times" if agent.norm_ratio else "endlessly"
        return (
            f"the update is {ratio} as large as those of the others, {run.max_norm_ratio:g} times is allowed:"
            " lower the learning rate, or look for broken input data"
        )
    what = {"labels": "its labels contradict those of the others", "model": "its model fails on their images"}
    found = " and ".join(what[flag] for flag in agent.flags)
    return f"{found}: look for wrong labels or broken input data, or ask the server's operator"


def first_difference(recorded_json: str, run: RunConfig) -> str:
    """`"run.model: mlp there, resnet50 here"`, or nothing; a key that is new since has its default."""
    try:
        recorded = RunConfig.model_validate_json(recorded_json)
    except ValidationError:
        return "made by another version of this program"
    there, here = _flat(json.loads(recorded.model_dump_json())), _flat(json.loads(run.model_dump_json()))
    for key, value in here.items():
        if there.get(key) != value:
            return f"{key}: {there.get(key)} there, {value} here"
    return ""


def _flat(table: Mapping[str, Any], prefix: str = "run") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= _flat(value, f"{prefix}.{key}") if isinstance(value, dict) else {f"{prefix}.{key}": value}
    return flat
