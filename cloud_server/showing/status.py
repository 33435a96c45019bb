"""The JSON behind the status page and `cloud-server status`: the run now, its agents, its latest rounds."""

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from ecavg.cloud_server.disk.tables import ReportRow, RolloutRow, RoundRow
from ecavg.cloud_server.jobs import AgentAudit, Result
from ecavg.cloud_server.rollout import offers
from ecavg.cloud_server.round import OVER, Round
from ecavg.cloud_server.showing.agent_metrics import OneAgent
from ecavg.cloud_server.showing.opening import Opening
from ecavg.cloud_server.showing.presence import Presence
from ecavg.cloud_server.showing.progress import ProgressBoard, Shown
from ecavg.cloud_server.showing.reports import Reports
from ecavg.cloud_server.showing.standing import Standing
from ecavg.cloud_server.showing.waiting import Pending, sentence, tried_sentence
from ecavg.cloud_server.store import Store
from ecavg.common.agent_progress import UNITS, Activity, AgentProgress
from ecavg.common.run_state import Outcome, Phase, Selection
from ecavg.common.tasks import Kind, published

# So many of the latest rounds are on the status page.
STATUS_ROUNDS = 50


class Status:
    """The maker of the status, which keeps the results of rounds that it has read.

    Args:
        run_name: the name of the run for people.
        board: how far each agent is.
        upload_places: returns the places in the queue, by agent id, of those that wait to upload.
        is_trainer_running: returns True while there is a trainer process.
        clock: seconds since the epoch.
    """

    def __init__(
        self,
        run_id: str,
        run_name: str,
        standing: Standing,
        presence: Presence,
        *,
        store: Store,
        reports: Reports,
        board: ProgressBoard,
        upload_places: Callable[[], Mapping[str, int]],
        is_trainer_running: Callable[[], bool],
        clock: Callable[[], float],
    ) -> None:
        self._run_id = run_id
        self._run_name = run_name
        self._standing = standing
        self._presence = presence
        self._store = store
        self._reports = reports
        self._board = board
        self._upload_places = upload_places
        self._is_trainer_running = is_trainer_running
        self._clock = clock
        # Results by round, and the number of agents that had been forgotten before they were read.
        self._results: dict[int, Result] = {}
        self._num_forgotten = 0

    @property
    def trainer_state(self) -> str:
        """Return how the trainer is, one of TRAINER_STATES."""
        if not self._is_trainer_running():
            return "restarting"
        is_working = self._standing.current.phase in (Phase.AGGREGATING, Phase.FINE_TUNING, Phase.EVALUATING)
        return "working" if is_working else "idle"

    def each_agent(self) -> Iterator[OneAgent]:
        """Yield every agent of the run, for the metrics that have their ids."""
        places, here = self._upload_places(), self._presence.here
        for agent_id in self._standing.slots:
            shown = self._doing(agent_id, places) if agent_id in here else None
            activity = shown.progress.activity.value if shown else ""
            ratio = shown.progress.done / shown.progress.total if shown and shown.progress.total else None
            yield OneAgent(agent_id, agent_id in here, activity, ratio)

    async def read(self) -> dict[str, Any]:
        """Return the status as JSON values; see docs/metrics.md for where it is served."""
        standing = self._standing
        rows = await asyncio.to_thread(self._store.rounds, last=STATUS_ROUNDS)
        results = await self._results_of(rows)
        num_accepted = await asyncio.to_thread(self._store.num_accepted)
        last_published = max((row.number for row in rows if row.published_digest), default=0)
        reported = await asyncio.to_thread(self._reports_on_offer)
        rollouts = await asyncio.to_thread(offers.rollouts, self._store, rows[0].number)
        current, progress = standing.current, standing.progress
        audited = results.get(last_published, Result()).audit
        audits = {agent.agent_id: _audit_status(agent) for agent in audited}
        places, presence = self._upload_places(), self._presence
        doing = {agent_id: self._doing(agent_id, places) for agent_id in presence.here}
        kind = self._reports.kind
        return {
            "run_id": self._run_id,
            "run_name": self._run_name,
            "metric": kind.metric,
            "round": current.number,
            "phase": current.phase.value,
            "phases": _phases(rows[-1], current, self._clock()),
            "progress": progress and {"done": progress.done, "total": progress.total, "loss": progress.loss},
            "trainer": {"state": self.trainer_state, "seconds_left": standing.work_seconds_left},
            "waiting": None if standing.run_over else self._waiting(doing, reported),
            "pinned_round": standing.offers.pinned or None,
            "next_round": _next_round(standing.opening, presence.num_new_examples),
            "agents": [
                _agent_status(
                    kind, agent_id, slot, current, agent_id in presence.here, reported.get(agent_id)
                )
                | {
                    "progress": _progress_status(doing.get(agent_id)),
                    "away_since": presence.away_since(agent_id),
                    "audit": audits.get(agent_id),
                    "upload_place": places.get(agent_id),
                    "selection": current.selection_of(agent_id),
                    "is_ready": agent_id not in presence.not_ready,
                    "waits_for": presence.waits_for(agent_id),
                    "model_round": standing.rounds_in_use.get(agent_id),
                    "is_canary": agent_id in standing.offers.canary_agents,
                }
                for agent_id, slot in sorted(standing.slots.items(), key=lambda item: item[1])
            ],
            "rounds": [
                _round_status(kind, row, num_accepted.get(row.number, 0), results.get(row.number))
                | {"roll_out": _roll_out_status(rollouts.get(row.number))}
                for row in rows
                if row.phase in OVER
            ],
            "run_over": standing.run_over,
            "min_agents": current.policy.min_agents,
            "max_agents": current.policy.max_agents,
            "deadline_at": current.deadline_at,
        }

    def _reports_on_offer(self) -> dict[str, ReportRow]:
        """Return each agent's report on the model that it is offered."""
        offered = self._standing.offers
        return {
            row.agent_id: row
            for number in offered.rounds
            for row in self._store.reports(number)
            if offered.for_agent(row.agent_id) == number
        }

    def _waiting(self, doing: Mapping[str, Shown | None], reported: Mapping[str, ReportRow]) -> str | None:
        """Return for whom or what the run waits, in a sentence; None: for nothing that needs one."""
        offered, now = self._standing.offers, self._clock()
        if offered.canary:
            return tried_sentence(offered.canary, offered.canary_agents, reported)
        if opens := self._standing.opening.sentence(now, self._presence.num_new_examples):
            return opens
        return sentence(self._standing.current, self._pending(doing), now)

    def _doing(self, agent_id: str, places: Mapping[str, int]) -> Shown | None:
        """Return what an agent that is here is doing; None: nobody knows."""
        shown = self._board.of(agent_id)
        if shown is None and agent_id in places:
            return Shown(AgentProgress(Activity.QUEUED), None, None)
        return shown

    def _pending(self, doing: Mapping[str, Shown | None]) -> list[Pending]:
        """Return the agents that may contribute to the round, and have not."""
        current, presence = self._standing.current, self._presence
        return [
            Pending(
                agent_id,
                presence.away_since(agent_id),
                agent_id not in presence.not_ready,
                doing.get(agent_id),
                presence.waits_for(agent_id),
            )
            for agent_id in self._standing.slots
            if current.outcome_of(agent_id) in (None, Outcome.REJECTED)
            and current.selection_of(agent_id) is not Selection.NOT_DRAWN
        ]

    async def _results_of(self, rows: Sequence[RoundRow]) -> dict[int, Result]:
        """Return the results of the published ones of these rounds, by the number of the round."""
        num_forgotten = self._standing.num_forgotten
        # Results that were read before an agent was forgotten may name it.
        known = self._results if num_forgotten == self._num_forgotten else {}
        results = await asyncio.to_thread(self._read_results, rows, known)
        self._results, self._num_forgotten = results, num_forgotten
        return results

    def _read_results(self, rows: Sequence[RoundRow], known: Mapping[int, Result]) -> dict[int, Result]:
        """Read the results that are not known yet."""
        numbers = [row.number for row in rows if row.published_digest]
        read = {number: known.get(number) or self._reports.result_of(number) for number in numbers}
        return {number: result for number, result in read.items() if result}


def _next_round(opening: Opening, num_new_examples: int) -> dict[str, Any] | None:
    """Return what the next round waits for; None: for nothing."""
    if opening.at is None and opening.num_examples is None:
        return None
    return {
        "at": opening.at,
        "num_examples": opening.num_examples,
        "num_new_examples": num_new_examples,
    }


def _agent_status(
    kind: Kind, agent_id: str, slot: int, current: Round, is_watching: bool, report: ReportRow | None
) -> dict[str, Any]:
    outcome = current.outcome_of(agent_id)
    rejection = current.rejections.get(agent_id)
    contribution = current.contributions.get(agent_id)
    state = "contributed" if contribution else "watching"
    scores = {
        "score_local": contribution and contribution.score_local,
        "score_before": report and report.score_before,
        "score_after": report and report.score_after,
        "score_adapted": report and report.score_adapted,
    }
    return {
        "agent_id": agent_id,
        "slot": slot,
        "state": state if is_watching else "away",
        "outcome": outcome and outcome.value,
        **published(kind, scores),
        "applied": report and report.applied,
        "message": rejection.message if rejection else (report.reason if report else ""),
    }


def _progress_status(shown: Shown | None) -> dict[str, Any] | None:
    """Return what an agent is doing; its rate is in units a second."""
    if shown is None:
        return None
    activity, done, total, loss = shown.progress
    return {
        "phase": activity.value,
        "done": done,
        "total": total,
        "unit": UNITS[activity].value,
        "rate": shown.rate,
        "seconds_left": shown.seconds_left,
        "loss": loss,
    }


def _audit_status(audit: AgentAudit) -> dict[str, Any]:
    """Return what the last published round's audit says of an agent."""
    return {
        "norm_ratio": audit.norm_ratio,
        "is_clipped": audit.scale < 1,
        "flags": audit.flags,
        "left_out": audit.left_out,
    }


def _round_status(kind: Kind, row: RoundRow, num_contributions: int, result: Result | None) -> dict[str, Any]:
    _, ended_at = row.phases[-1]
    result = result or Result()
    scores = {
        "score_start": result.candidates.get(result.start or ""),
        "score_fine_tuned": result.score_fine_tuned,
        "score_fine_tuned_average": result.score_fine_tuned_average,
        "score_published": result.score_published,
    }
    return {
        "round": row.number,
        "outcome": row.phase,
        "failure": row.failure or None,
        "num_contributions": num_contributions,
        "candidates": result.candidates,
        "soup": result.soup,
        "flagged": [agent.agent_id for agent in result.audit if agent.flags],
        "audit_note": result.audit_note or None,
        "start": result.start,
        "published": result.published,
        **published(kind, scores),
        "seconds": round(ended_at - row.opened_at, 3),
    }


def _roll_out_status(row: RolloutRow | None) -> dict[str, Any] | None:
    """Return how far the roll-out of a round's model is; None: it is for all agents, if there is one."""
    return {"state": row.state, "reason": row.reason or None} if row else None


def _phases(row: RoundRow, current: Round, now: float) -> list[dict[str, Any]]:
    """Return how long the current round has been in each of its phases, in order."""
    phases = row.phases
    ended = ("", phases[-1][1] if current.is_over else now)
    return [
        {"phase": phase, "seconds": round(max(0.0, end - start), 3)}
        for (phase, start), (_, end) in pairwise([*phases, ended])
    ]
