"""What is left of a round: its report file, and the status that the page shows."""

import json
import math
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from cloud_server.jobs import Progress, Result
from cloud_server.round import Outcome, Phase, Round
from cloud_server.store import AgentRow, ContributionRow, ReportRow, RoundRow
from common.config import RunConfig
from common.files import replacing

# The trainer's part of a round, under the names of its own clock.
_TRAINER_SECONDS = ("aggregate", "fine_tune", "evaluate")


def build(
    run: RunConfig,
    row: RoundRow,
    contributions: Sequence[ContributionRow],
    agent_reports: Sequence[ReportRow],
    members: Sequence[AgentRow],
    result: Result | None,
    *,
    weights_bytes: int | None,
) -> dict[str, Any]:
    """The report of one round that has ended; what was not measured is absent."""
    report: dict[str, Any] = {
        "round": row.number,
        "outcome": "published" if row.published else "failed",
        "model": run.model,
        "dataset": run.dataset,
        "agents": _agents(contributions, agent_reports),
        "rejected": [
            {"agent_id": item.agent_id, "reason": item.reason, "message": item.message}
            for item in contributions
            if item.outcome == Outcome.REJECTED
        ],
        "late": [item.agent_id for item in contributions if item.outcome == Outcome.LATE],
        "vanished": _vanished(row, contributions, members),
    }
    if row.failure:
        report["failure"] = row.failure
    seconds: dict[str, float] = {}
    times = row.phase_times
    if Phase.AGGREGATING.value in times:
        seconds["collect"] = times[Phase.AGGREGATING.value] - row.opened_at
    if result and row.published:
        measured = {
            "candidates": result.candidates or None,
            "start": result.start,
            "accuracy_fine_tuned": result.accuracy_fine_tuned,
            "accuracy_published": result.accuracy_published,
        }
        report |= {name: value for name, value in measured.items() if value is not None}
        report["weights"] = {"sha256": row.published, "bytes": weights_bytes}
        seconds |= {name: result.seconds[name] for name in _TRAINER_SECONDS if name in result.seconds}
        if result.finished_at is not None:
            seconds["publish"] = max(0.0, times[Phase.PUBLISHED.value] - result.finished_at)
    report["seconds"] = {name: round(value, 3) for name, value in seconds.items()}
    return report


def write(report: Mapping[str, Any], folder: Path, weights: Path | None) -> None:
    """Leave `report.json`, and `model.safetensors` as a second name of the published blob."""
    folder.mkdir(parents=True, exist_ok=True)
    model = folder / "model.safetensors"
    if weights and not model.exists():
        os.link(weights, model)
    with replacing(folder / "report.json") as partial:
        partial.write_text(json.dumps(report, indent=2) + "\n", "utf-8")


def read_result(folder: Path) -> Result | None:
    """What a written report still tells of a job whose own files are gone."""
    try:
        report = json.loads((folder / "report.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return Result(
        candidates=report.get("candidates", {}),
        start=report.get("start"),
        accuracy_fine_tuned=report.get("accuracy_fine_tuned"),
        accuracy_published=report.get("accuracy_published"),
        seconds=report.get("seconds", {}),
    )


def stages(result: Result) -> dict[str, float]:
    """The accuracies of a round by stage, those that were measured."""
    measured = {
        "average": result.candidates.get("average"),
        "fine_tuned": result.accuracy_fine_tuned,
        "published": result.accuracy_published,
    }
    return {stage: accuracy for stage, accuracy in measured.items() if accuracy is not None}


def status(
    *,
    run_id: str,
    current: Round,
    rows: Sequence[RoundRow],
    num_accepted: Mapping[int, int],
    results: Mapping[int, Result],
    slots: Mapping[str, int],
    watching: Collection[str],
    agent_reports: Sequence[ReportRow],
    progress: Progress | None,
    run_over: bool,
    now: float,
) -> dict[str, Any]:
    """The JSON behind the status page."""
    reported = {row.agent_id: row for row in agent_reports}
    return {
        "run_id": run_id,
        "round": current.number,
        "phase": current.phase.value,
        "phases": _phases(rows[-1], current, now),
        "progress": progress and {"done": progress.done, "total": progress.total, "loss": progress.loss},
        "agents": [
            _agent_status(agent_id, slot, current, agent_id in watching, reported.get(agent_id))
            for agent_id, slot in sorted(slots.items(), key=lambda item: item[1])
        ],
        "rounds": [
            _round_status(row, num_accepted.get(row.number, 0), results.get(row.number))
            for row in rows
            if _is_over(row)
        ],
        "run_over": run_over,
        "min_agents": current.policy.min_agents,
        "max_agents": current.policy.max_agents,
        "deadline_at": current.deadline_at,
    }


def _vanished(
    row: RoundRow, contributions: Sequence[ContributionRow], members: Sequence[AgentRow]
) -> list[str]:
    """Agents that had joined before the round closed, and of which it heard nothing."""
    heard = {item.agent_id for item in contributions}
    closed_at = row.phase_times.get(Phase.AGGREGATING.value, math.inf)
    return sorted(
        member.agent_id for member in members if member.joined_at < closed_at and member.agent_id not in heard
    )


def _agents(
    contributions: Sequence[ContributionRow], agent_reports: Sequence[ReportRow]
) -> list[dict[str, Any]]:
    reported = {row.agent_id: row for row in agent_reports}
    agents = []
    for item in contributions:
        if item.outcome != Outcome.ACCEPTED:
            continue
        agent = {"agent_id": item.agent_id, "num_examples": item.num_examples}
        if item.accuracy_local is not None:
            agent["accuracy_local"] = item.accuracy_local
        if row := reported.get(item.agent_id):
            agent |= _report_fields(row)
        agents.append(agent)
    return agents


def _report_fields(row: ReportRow) -> dict[str, Any]:
    fields = {
        "accuracy_local": row.accuracy_local,
        "accuracy_before": row.accuracy_before,
        "accuracy_after": row.accuracy_after,
        "applied": row.applied,
        "reason": row.reason or None,
    }
    return {name: value for name, value in fields.items() if value is not None}


def _agent_status(
    agent_id: str, slot: int, current: Round, is_watching: bool, report: ReportRow | None
) -> dict[str, Any]:
    outcome = current.outcome_of(agent_id)
    rejection = current.rejections.get(agent_id)
    contribution = current.contributions.get(agent_id)
    state = "contributed" if contribution else "watching"
    return {
        "agent_id": agent_id,
        "slot": slot,
        "state": state if is_watching else "away",
        "outcome": outcome and outcome.value,
        "accuracy_local": contribution and contribution.accuracy_local,
        "accuracy_before": report and report.accuracy_before,
        "accuracy_after": report and report.accuracy_after,
        "applied": report and report.applied,
        "message": rejection.message if rejection else (report.reason if report else ""),
    }


def _round_status(row: RoundRow, num_contributions: int, result: Result | None) -> dict[str, Any]:
    measured = stages(result) if result else {}
    ended_at = max(row.phase_times.values(), default=row.opened_at)
    return {
        "round": row.number,
        "outcome": row.phase,
        "failure": row.failure or None,
        "num_contributions": num_contributions,
        "accuracy_average": measured.get("average"),
        "accuracy_published": measured.get("published"),
        "seconds": round(ended_at - row.opened_at, 3),
    }


def _phases(row: RoundRow, current: Round, now: float) -> list[dict[str, Any]]:
    """How long the current round has been in each of its phases, in order."""
    starts = {Phase.COLLECTING.value: row.opened_at} | row.phase_times
    ordered = sorted(starts.items(), key=lambda item: item[1])
    ends = [start for _, start in ordered[1:]]
    ends.append(ordered[-1][1] if current.is_over else now)
    return [
        {"phase": phase, "seconds": round(max(0.0, end - start), 3)}
        for (phase, start), end in zip(ordered, ends, strict=True)
    ]


def _is_over(row: RoundRow) -> bool:
    return row.phase in (Phase.PUBLISHED, Phase.FAILED)
