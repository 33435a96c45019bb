"""The report file of a round: how it is made, written, and read back."""

import asyncio
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import structlog

from ecavg.cloud_server import records
from ecavg.cloud_server.contribution import Decision
from ecavg.cloud_server.disk.failures import storage_errors, when_disk_allows
from ecavg.cloud_server.disk.tables import AgentRow, ReportRow, RolloutRow, RoundRow, SelectionRow
from ecavg.cloud_server.jobs import Result, round_job
from ecavg.cloud_server.rollout import offers
from ecavg.cloud_server.round import OVER
from ecavg.cloud_server.store import Store
from ecavg.common.config import CANDIDATES, RunConfig
from ecavg.common.errors import StorageError
from ecavg.common.faults import Point, crash_point
from ecavg.common.files import replacing
from ecavg.common.run_state import Outcome, Phase
from ecavg.common.tasks import Kind, kind_of, published, unpublished
from ecavg.common.transfer import to_the_end

# These fields are copied from the trainer's result, where there is one.
_MEASURED = (
    "candidates", "start", "soup", "published", "score_fine_tuned", "score_fine_tuned_average",
    "score_published", "figures", "audit", "audit_note",
)  # fmt: skip
# The trainer measures these parts of a round, under these names.
_TRAINER_SECONDS = ("audit", "aggregate", "fine_tune", "evaluate")
# While the records of rounds that are over change, their reports are written so often at most.
WRITE_SECONDS = 1.0

log = structlog.get_logger()


class Reports:
    """The report files of a run's rounds, `STATE/rounds/0001/report.json`."""

    def __init__(self, run: RunConfig, store: Store) -> None:
        # Held to write a report, and to remove what reports are made from; the second of the three locks.
        self.lock = asyncio.Lock()
        self._run = run
        self._store = store
        # The rounds whose records have changed since their reports were written.
        self._changed: set[int] = set()
        self._has_changed = asyncio.Event()

    @property
    def kind(self) -> Kind:
        """Return what is known of the run's task."""
        return kind_of(self._run.task)

    async def write(self, number: int) -> None:
        """Write the report of a round, from what is on record now; do nothing if the round is not over."""
        # The lock is let go between two tries, so that nobody waits for a full disk while holding it.
        await when_disk_allows(lambda: to_the_end(self._write_locked(number)))
        crash_point(Point.SERVER_REPORT_WRITTEN)

    def note_change(self, number: int) -> None:
        """Note that a round's records have changed, whose report is written soon if the round is over."""
        self._changed.add(number)
        self._has_changed.set()

    async def keep_up(self) -> None:
        """Write the reports of rounds whose records have changed, for as long as this runs."""
        while True:
            await self._has_changed.wait()
            try:
                await self.write_changed()
            except OSError:
                # The files do not hold up the run; they are tried again.
                log.exception("reports_not_written")
            await asyncio.sleep(WRITE_SECONDS)

    async def write_changed(self) -> None:
        """Write the reports of the rounds whose records have changed."""
        while self._changed:
            await self.write(min(self._changed))
        self._has_changed.clear()
        async with self.lock:
            # Another task may have been writing until now.
            return

    async def write_all(self) -> None:
        """Write the reports of all rounds that are over: the server may have been stopped before it did."""
        for row in await asyncio.to_thread(self._store.rounds):
            if row.phase in OVER and not row.retired:
                await self.write(row.number)

    async def write_if_possible(self) -> None:
        """Write the reports of the rounds whose records have changed, unless the disk does not allow it."""
        try:
            for number in sorted(self._changed):
                await self._write_locked(number)
        except (OSError, StorageError) as error:
            log.warning("reports_not_written", reason=str(error))

    async def _write_locked(self, number: int) -> None:
        async with self.lock:
            # Records that change from now on are for the next time.
            self._changed.discard(number)
            try:
                with storage_errors():
                    await self._write_with_model(number)
            except BaseException:
                self._changed.add(number)
                raise

    def result_of(self, number: int) -> Result | None:
        """Return what the trainer found in a round; None: that is not known any more."""
        return result_of(self._store, number)

    async def _write_with_model(self, number: int) -> None:
        needed = await asyncio.to_thread(self._unnamed, number)
        async with self._store.blobs.in_use(needed):
            await asyncio.to_thread(self._write, number)

    def _unnamed(self, number: int) -> list[str]:
        """Return the digests of the files of the round's model that have no second name yet."""
        row = self._store.round(number)
        digest = row.published_digest if row else None
        named = {
            self._store.state_dir.model(number): digest,
            self._store.state_dir.rest(number): self._store.rest(digest) if digest else None,
        }
        return [made for path, made in named.items() if made and not path.exists()]

    def _write(self, number: int) -> None:
        row = self._store.round(number)
        assert row is not None
        # What the report of a retired round was made from is gone.
        if row.retired or row.phase not in OVER:
            return
        digest = row.published_digest
        rest_digest = self._store.rest(digest) if digest else None
        weights = self._store.blobs.path(digest) if digest else None
        rest = self._store.blobs.path(rest_digest) if rest_digest else None
        run_row = self._store.run()
        assert run_row is not None
        report = build(
            self._run,
            self._run.class_names or run_row.class_names,
            row,
            self._store.contributions(number),
            self._store.reports(number),
            self._store.agents(),
            self.result_of(number),
            selection=records.selection_of(self._store, number),
            weights_bytes=self._store.blobs.size(row.published_digest) if row.published_digest else None,
        )
        if rollout := offers.rollout_of(self._store, number):
            report |= _roll_out(rollout)
        if rest_digest:
            report["rest"] = {"sha256": rest_digest, "bytes": self._store.blobs.size(rest_digest)}
        write(report, self._store.state_dir.round(number), weights, rest)


def build(
    run: RunConfig,
    class_names: Sequence[str],
    row: RoundRow,
    decisions: Sequence[Decision],
    agent_reports: Sequence[ReportRow],
    members: Sequence[AgentRow],
    result: Result | None,
    *,
    selection: SelectionRow,
    weights_bytes: int | None,
) -> dict[str, Any]:
    """Return the report of a round that has ended; what was not measured is absent."""
    kind = kind_of(run.task)
    report: dict[str, Any] = {
        "round": row.number,
        "outcome": "published" if row.published_digest else "failed",
        "model": run.model,
        "dataset": run.dataset,
        "num_shared": sum(each.contribution.num_shared for each in decisions if each.contribution),
        "agents": _agents(kind, decisions, agent_reports, with_staleness=run.mode == "async"),
        "rejected": [
            {"agent_id": each.agent_id} | each.why._asdict()
            for each in decisions
            if each.outcome is Outcome.REJECTED and each.why
        ],
        "late": [each.agent_id for each in decisions if each.outcome is Outcome.LATE],
        "vanished": _vanished(row, decisions, members, selection),
    }
    if kind.field != "accuracy":
        report |= {"task": run.task, "metric": (result and result.metric) or kind.metric}
    chosen = {"drawn": sorted(selection.drawn), "not_ready": sorted(selection.not_ready)}
    report |= {name: agent_ids for name, agent_ids in chosen.items() if selection.drawn or agent_ids}
    if row.failure:
        report["failure"] = row.failure
    seconds: dict[str, float] = {}
    times = row.phase_times
    if Phase.AGGREGATING.value in times:
        seconds["collect"] = times[Phase.AGGREGATING.value] - row.opened_at
    if result and row.published_digest:
        measured = published(kind, result.model_dump(mode="json", include=set(_MEASURED))) | {
            "classes": _classes(kind, result, class_names)
        }
        report |= {name: value for name, value in measured.items() if value not in (None, {}, [], "")}
        report["weights"] = {"sha256": row.published_digest, "bytes": weights_bytes}
        seconds |= {name: result.seconds[name] for name in _TRAINER_SECONDS if name in result.seconds}
        if result.finished_at is not None:
            seconds["publish"] = max(0.0, times[Phase.PUBLISHED.value] - result.finished_at)
    report["seconds"] = {name: round(value, 3) for name, value in seconds.items()}
    return report


def _roll_out(row: RolloutRow) -> dict[str, Any]:
    """Return what the report says of the roll-out of the round's model."""
    decided = {"reason": row.reason, "at": row.decided_at} if row.decided_at is not None else {}
    canary = {"canary": list(row.canary)} if row.canary else {}
    return {"roll_out": {"state": row.state, **decided}, **canary}


def write(report: Mapping[str, Any], folder: Path, weights: Path | None, rest: Path | None = None) -> None:
    """Write `report.json`, and second names of the blobs: `model.safetensors` and `rest.safetensors`."""
    folder.mkdir(parents=True, exist_ok=True)
    for blob, name in ((weights, "model.safetensors"), (rest, "rest.safetensors")):
        if blob and not (folder / name).exists():
            os.link(blob, folder / name)
    with replacing(folder / "report.json") as partial:
        partial.write_text(json.dumps(report, indent=2) + "\n", "utf-8")


def result_of(store: Store, number: int) -> Result | None:
    """Return what the trainer found in a round; None: that is not known any more."""
    result = round_job(store.state_dir, number).read_result()
    return result or read_result(store.state_dir.round(number))


def read_result(folder: Path) -> Result | None:
    """Return what a written report tells of a job whose own files are gone; None: nothing."""
    try:
        report = json.loads((folder / "report.json").read_text("utf-8"))
        fields = unpublished(report)
        kept = {name: fields[name] for name in (*_MEASURED, "metric", "seconds") if name in fields}
        classes = [unpublished(_without_name(item)) for item in report.get("classes", [])]
        return Result.model_validate(kept | {"classes": classes})
    except (OSError, ValueError):
        return None


def stages(result: Result) -> dict[str, float]:
    """Return the scores of a round by stage, those that were measured.

    A stage is one of CANDIDATES, "fine_tuned", "fine_tuned_average" or "published".
    """
    measured = {name: result.candidates.get(name) for name in CANDIDATES} | {
        "fine_tuned": result.score_fine_tuned,
        "fine_tuned_average": result.score_fine_tuned_average,
        "published": result.score_published,
    }
    return {stage: score for stage, score in measured.items() if score is not None}


def _classes(kind: Kind, result: Result, names: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {"label": item.label}
        | ({"name": names[item.label]} if names else {})
        | published(kind, item.model_dump())
        for item in result.classes
    ]


def _without_name(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name != "name"}


def _vanished(
    row: RoundRow, decisions: Sequence[Decision], members: Sequence[AgentRow], selection: SelectionRow
) -> list[str]:
    """Return the agents of which a round heard nothing, though they were drawn.

    Without a sample these are the agents that had joined before the round closed, and were ready.
    """
    heard = {each.agent_id for each in decisions}
    if selection.drawn:
        return sorted(selection.drawn - heard)
    heard |= selection.not_ready
    closed_at = row.phase_times.get(Phase.AGGREGATING.value, math.inf)
    return sorted(
        member.agent_id for member in members if member.joined_at < closed_at and member.agent_id not in heard
    )


def _agents(
    kind: Kind, decisions: Sequence[Decision], agent_reports: Sequence[ReportRow], *, with_staleness: bool
) -> list[dict[str, Any]]:
    reported = {row.agent_id: row for row in agent_reports}
    agents = []
    for decision in decisions:
        item = decision.contribution
        if item is None:
            continue
        agent = {
            "agent_id": item.agent_id,
            "num_examples": item.num_examples,
            "num_shared": item.num_shared,
            # null: the agent started from weights of its own.
            "initial_weights": item.initial_digest,
        }
        if with_staleness:
            agent["staleness"] = item.staleness
        if decision.why:
            agent["left_out"] = decision.why._asdict()
        if item.score_local is not None:
            agent["score_local"] = item.score_local
        if row := reported.get(item.agent_id):
            agent |= _report_fields(row)
        agents.append(published(kind, agent))
    return agents


def _report_fields(row: ReportRow) -> dict[str, Any]:
    fields = {
        "score_local": row.score_local,
        "score_before": row.score_before,
        "score_after": row.score_after,
        "score_adapted": row.score_adapted,
        "applied": row.applied,
        "reason": row.reason or None,
    }
    return {name: value for name, value in fields.items() if value is not None}
