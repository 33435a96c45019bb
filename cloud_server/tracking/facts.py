"""What trackers are told, made from the records and the reports of rounds that are over.

A round is told in two parts, because its agents report on the model after the round is over:

    round   what the cloud measured, its seconds and bytes, the report and the model
    edges   the means of what the agents measured before and after; told when the next round is over,
            or the run, so that it does not change any more
"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from ecavg.cloud_server.disk.tables import RoundRow
from ecavg.cloud_server.jobs import round_job
from ecavg.cloud_server.round import OVER
from ecavg.cloud_server.state_dir import StateDir
from ecavg.cloud_server.store import Store
from ecavg.common.tasks import kind_of

# The fields of a report that name agents; `num_agents` and its like stand there in their place.
_NAMING = ("agents", "rejected", "late", "vanished", "drawn", "not_ready")
_MAX_PARAMETER_CHARACTERS = 500


@dataclass(frozen=True)
class RunFacts:
    """What a tracker is told of a run."""

    run_id: str
    # For example "mlp-digits".
    name: str
    # The values of the configuration by dotted key, like "run.pretrain.epochs".
    parameters: Mapping[str, str]


@dataclass(frozen=True)
class Facts:
    """One of the two parts in which a tracker is told of a round."""

    round: int
    # When the round was over, in seconds since the epoch.
    at: float
    # Values by name, like "accuracy/published"; all of them are finite.
    metrics: Mapping[str, float]
    # Parts are told in this order: round 1 is 2, its edges are 3, round 2 is 4.
    order: int
    # The rest belongs to the first part alone. The report is without agent ids, unless they are asked for.
    report: Mapping[str, Any] | None = None
    # None: no model was published, or it has been given up.
    model: Path | None = None
    # The parts of the model that do not travel; None: all do.
    rest: Path | None = None
    digest: str | None = None
    provenance: Mapping[str, str] = field(default_factory=dict)


def of_run(store: Store) -> RunFacts:
    """Return what trackers are told of the run on record."""
    row = store.run()
    assert row is not None
    config = json.loads(row.config_json)
    name = f"{config['model']}-{config['dataset']}".replace(":", ".").replace("/", ".")
    return RunFacts(row.run_id, name, dict(_flat(config, "run")))


def of_rounds(
    store: Store, after: int, *, is_run_over: bool, with_agent_ids: bool = False
) -> Iterator[Facts]:
    """Yield what is to be told of the rounds that are over, in order.

    The figure of the run's task is told as "accuracy/…", or as "score/…" where it is no accuracy.

    Args:
        store: the records.
        after: the order of the last part that has been told.
        is_run_over: True if no agent will report any more.
        with_agent_ids: True to leave agent ids in the reports.
    """
    field = kind_of(_task_of(store)).field
    before: RoundRow | None = None
    for number in _over(store, after // 2, is_run_over):
        row = store.round(number)
        assert row is not None
        if before and 2 * before.number + 1 > after:
            yield _edges(store, before, field)
        if 2 * row.number > after:
            yield _round(store, row, field, with_agent_ids)
        before = row
    if before and is_run_over and 2 * before.number + 1 > after:
        yield _edges(store, before, field)


def _over(store: Store, first: int, is_run_over: bool) -> list[int]:
    """Return the numbers of the rounds that are over, from `first` on, without one that ends just now."""
    rows = store.read("SELECT number, phase FROM rounds WHERE number >= ? ORDER BY number", first)
    numbers = [row["number"] for row in rows if row["phase"] in OVER]
    # The report of a round is written soon after it is on record that the round is over.
    if numbers and not is_run_over and not store.state_dir.report(numbers[-1]).exists():
        numbers.pop()
    return numbers


def _round(store: Store, row: RoundRow, field: str, with_agent_ids: bool) -> Facts:
    report = _read_report(store.state_dir, row.number)
    model, rest = store.state_dir.model(row.number), store.state_dir.rest(row.number)
    agents = report.get("agents", [])
    metrics = {f"{field}/candidate/{name}": value for name, value in report.get("candidates", {}).items()}
    metrics |= {f"{field}/figure/{_tag(name)}": value for name, value in report.get("figures", {}).items()}
    metrics |= {
        f"{field}/start": report.get("candidates", {}).get(report.get("start")),
        f"{field}/fine_tuned": report.get(f"{field}_fine_tuned"),
        f"{field}/fine_tuned_average": report.get(f"{field}_fine_tuned_average"),
        f"{field}/published": report.get(f"{field}_published"),
        "loss/fine_tune": _last_loss(store.state_dir, row.number),
        "agents/contributed": len(agents),
        "agents/left_out": sum("left_out" in agent for agent in agents),
        "agents/flagged": sum(bool(agent["flags"]) for agent in report["audit"])
        if "audit" in report
        else None,
        "agents/rejected": len(report.get("rejected", [])),
        "bytes/model": report.get("weights", {}).get("bytes"),
        "bytes/contributions": _contributed_bytes(store, row.number),
    }
    metrics |= {f"seconds/{name}": value for name, value in report.get("seconds", {}).items()}
    return Facts(
        round=row.number,
        at=_ended_at(row),
        metrics=_finite(metrics),
        order=2 * row.number,
        report=report if with_agent_ids else _without_agent_ids(report),
        model=model if row.published_digest and model.exists() else None,
        rest=rest if row.published_digest and rest.exists() else None,
        digest=row.published_digest,
        provenance={
            "round": str(row.number),
            "sha256": row.published_digest or "",
            "initial_weights": row.initial_digest,
            "num_agents": str(sum("left_out" not in agent for agent in agents)),
        },
    )


def _edges(store: Store, row: RoundRow, field: str) -> Facts:
    reports = store.reports(row.number)
    metrics = {
        f"{field}/edges_before": _mean([each.score_before for each in reports]),
        f"{field}/edges_after": _mean([each.score_after for each in reports]),
        "agents/applied": sum(each.applied for each in reports) if reports else None,
    }
    return Facts(row.number, _ended_at(row), _finite(metrics), order=2 * row.number + 1)


def _task_of(store: Store) -> str:
    """Return the name of the run's task; a run of an earlier version has none on record."""
    row = store.run()
    assert row is not None
    task: str = json.loads(row.config_json).get("task", "classification")
    return task


def _tag(name: str) -> str:
    """Return a name that an own task has given, in the characters that MLflow allows."""
    return re.sub(r"[^0-9A-Za-z_.-]", "_", name)


def _ended_at(row: RoundRow) -> float:
    return row.phase_times.get(row.phase, row.opened_at)


def _read_report(state_dir: StateDir, number: int) -> dict[str, Any]:
    """Return the round's report; an empty one where it is missing or damaged."""
    try:
        report: dict[str, Any] = json.loads(state_dir.report(number).read_text("utf-8"))
        return report
    except (FileNotFoundError, ValueError):
        return {}


def _without_agent_ids(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the report with the number of agents in the place of each list of agents."""
    counts = {f"num_{name}": len(report[name]) for name in _NAMING if name in report}
    left = {name: value for name, value in report.items() if name not in (*_NAMING, "audit", "soup")}
    return left | counts


def _last_loss(state_dir: StateDir, number: int) -> float | None:
    """Return the last loss of the round's fine-tune; None where that is not known any more."""
    lines, _ = round_job(state_dir, number).read_progress(0)
    losses = [line.loss for line in lines if line.loss is not None]
    return losses[-1] if losses else None


def _contributed_bytes(store: Store, number: int) -> int | None:
    """Return the size of the weights that were contributed; None if some have been given up."""
    sizes = [
        store.blobs.size(each.contribution.weights_digest)
        for each in store.contributions(number)
        if each.contribution
    ]
    known = [size for size in sizes if size is not None]
    return sum(known) if len(known) == len(sizes) else None


def _mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are known; None if none is."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _finite(metrics: Mapping[str, float | None]) -> dict[str, float]:
    return {
        name: float(value) for name, value in metrics.items() if value is not None and math.isfinite(value)
    }


def _flat(table: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    """Yield the values of nested tables by dotted key."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}.{key}")
        else:
            yield f"{prefix}.{key}", str(value)[:_MAX_PARAMETER_CHARACTERS]
