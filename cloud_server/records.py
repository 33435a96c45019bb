"""The translation of rounds and runs into records and jobs, and back.

round.py, store.py and jobs.py do not import each other; this module imports all three.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from ecavg.cloud_server.classes import Classes
from ecavg.cloud_server.contribution import Decision, Rejection
from ecavg.cloud_server.disk.tables import RoundRow, SelectionRow
from ecavg.cloud_server.jobs import AgentAudit, Job, Result, job_name
from ecavg.cloud_server.round import Policy, Round
from ecavg.cloud_server.store import Store
from ecavg.common.config import RunConfig
from ecavg.common.errors import Reason
from ecavg.common.run_state import Outcome, Phase
from ecavg.common.schedule import Combined


def recorded_round(store: Store, run: RunConfig, policy: Policy) -> Round:
    """Return the last round on record."""
    row = store.last_round()
    assert row is not None
    is_independent = run.initial_weights == "independent" and not store.has_published()
    return round_from(
        row,
        store.contributions(row.number),
        policy,
        may_be_independent=is_independent,
        drawn=selection_of(store, row.number).drawn,
        earlier_starts=earlier_starts(store, row, policy.max_staleness),
    )


def earlier_starts(store: Store, row: RoundRow, number: int) -> tuple[str, ...]:
    """Return the digests of the weights that rounds before this one started from, the newest first.

    A round after a failed one starts from the same weights, which count once. Weights that the server has
    given up or withdrawn do not count.

    Args:
        number: how many digests are returned at most.
    """
    rows = store.read(
        "SELECT initial_weights FROM rounds WHERE number < ? AND NOT retired AND initial_weights NOT IN"
        " (SELECT published FROM rounds JOIN rollouts ON round = number"
        " WHERE state = 'withdrawn' AND published IS NOT NULL) ORDER BY number DESC",
        row.number,
    )
    different = dict.fromkeys([row.initial_digest, *(each["initial_weights"] for each in rows)])
    return tuple(different)[1 : number + 1]


def round_from(
    row: RoundRow,
    decisions: Sequence[Decision],
    policy: Policy,
    *,
    may_be_independent: bool = False,
    drawn: frozenset[str] = frozenset(),
    earlier_starts: tuple[str, ...] = (),
) -> Round:
    """Return the round that the records of the store describe."""
    accepted = [decision for decision in decisions if decision.outcome is Outcome.ACCEPTED]
    return Round(
        number=row.number,
        policy=policy,
        opened_at=row.opened_at,
        initial_digest=row.initial_digest,
        may_be_independent=may_be_independent,
        earlier_starts=earlier_starts,
        has_full_curve=row.has_full_curve,
        phase=Phase(row.phase),
        drawn=drawn,
        contributions={each.agent_id: each.contribution for each in accepted if each.contribution},
        rejections={
            each.agent_id: each.why for each in decisions if each.outcome is Outcome.REJECTED and each.why
        },
        late=frozenset(each.agent_id for each in decisions if each.outcome is Outcome.LATE),
        left_out={each.agent_id: each.why for each in accepted if each.why},
        published_digest=row.published_digest,
        failure=row.failure,
    )


def recorded_classes(store: Store, run: RunConfig) -> Classes:
    """Return the classes that the labels stand for: the configuration's, or those on record."""
    if run.class_names:
        return Classes(run.class_names)
    row = store.run()
    assert row is not None
    return Classes(row.class_names, row.class_names_of)


def initialise_job(run: RunConfig, device: str) -> Job:
    """Return the job that makes the run's initial weights, before the first round."""
    return Job(kind="initialise", name="initialise", round=0, run=run, device=device, initial_weights=None)


def round_job(
    round_: Round, run: RunConfig, device: str, planned_rounds: int, rest_digest: str | None = None
) -> Job:
    """Return the job that makes the global model of a round that has closed.

    Args:
        rest_digest: the digest of the rest that belongs to the round's initial weights.
    """
    return Job(
        kind="warm_up" if round_.is_warm_up else "round",
        name=job_name(round_.number),
        round=round_.number,
        run=run,
        device=device,
        initial_weights=round_.initial_digest,
        initial_rest=rest_digest,
        contributions=tuple(contribution for _, contribution in sorted(round_.contributions.items())),
        planned_rounds=planned_rounds,
        has_full_curve=round_.has_full_curve,
    )


def left_out(result: Result, run: RunConfig) -> dict[str, Rejection]:
    """Return, by agent id, why contributions were left out of the model; the messages go to the agents."""
    return {
        agent.agent_id: Rejection(agent.left_out, _message(agent, run))
        for agent in result.audit
        if agent.left_out
    }


def _message(agent: AgentAudit, run: RunConfig) -> str:
    """Return the message that tells an agent why its contribution was left out, and what to do about it."""
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
    """Return the first difference between the recorded and this configuration, or an empty text.

    The text reads like `"run.model: mlp there, resnet50 here"`. A key that is missing in the recorded
    configuration counts there with its default.
    """
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
    """Return the values of nested tables by dotted key, like `"run.fine_tune.epochs"`."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= _flat(value, f"{prefix}.{key}") if isinstance(value, dict) else {f"{prefix}.{key}": value}
    return flat


def record_selection(store: Store, number: int, selection: SelectionRow) -> None:
    """Record agents that are drawn for a round, and those that are not ready, beside earlier ones.

    An agent that was not ready before may be drawn, and stays drawn. Agents that have not joined, or were
    forgotten since, are passed over.
    """
    rows = [(number, "not_ready", agent_id) for agent_id in sorted(selection.not_ready)]
    rows += [(number, "drawn", agent_id) for agent_id in sorted(selection.drawn)]
    with store.transaction() as database:
        database.executemany(
            "INSERT INTO selections (round, selection, agent_id)"
            " SELECT ?, ?, agent_id FROM agents WHERE agent_id = ?"
            " ON CONFLICT DO UPDATE SET selection = 'drawn' WHERE excluded.selection = 'drawn'",
            rows,
        )


def selection_of(store: Store, number: int) -> SelectionRow:
    """Return who was drawn for a round, and who was not ready."""
    rows = store.read("SELECT agent_id, selection FROM selections WHERE round = ?", number)
    return SelectionRow(
        drawn=frozenset(row["agent_id"] for row in rows if row["selection"] == "drawn"),
        not_ready=frozenset(row["agent_id"] for row in rows if row["selection"] == "not_ready"),
    )


def combined(store: Store) -> list[Combined]:
    """Return how many shared examples each published round's model is made of, sorted by round."""
    rows = store.read(
        "SELECT coalesce(sum(num_shared), 0) AS num_shared, has_full_curve FROM rounds"
        " LEFT JOIN contributions ON round = number AND outcome = 'accepted' AND reason = ''"
        " WHERE published IS NOT NULL GROUP BY number ORDER BY number"
    )
    return [Combined(row["num_shared"], bool(row["has_full_curve"])) for row in rows]
