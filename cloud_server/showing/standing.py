"""The run as it stands: what watching agents, the terminal, the status page and the metrics are shown.

Whoever makes something true and durable shows it here: the ledger and the coordinator.
"""

import asyncio
import math
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from typing import Any

from cloud_server.disk.tables import ReportRow, RoundRow
from cloud_server.jobs import AgentAudit, Result
from cloud_server.metrics import ServerMetrics
from cloud_server.round import OVER, Round
from cloud_server.showing.presence import Presence
from cloud_server.showing.reports import Reports
from cloud_server.store import Store
from common.errors import Reason
from common.run_state import LeftOut, Phase, PublishedModel, RunState, WorkProgress
from common.tasks import Kind, published
from common.transfer import Blob, Encoded

# So many of the latest rounds are on the status page.
STATUS_ROUNDS = 50
# Agents hear of counts and progress so often at most, and so many of them in a second, so that a thousand
# agents hear of them every five seconds. Of everything else they hear at once.
COUNTS_SECONDS = 1.0
COUNTS_PER_SECOND = 200


class Standing:
    """The run as it is now, for everyone who looks at it or waits for news.

    Args:
        current: the round, as it is on record.
        slots: the slot of every agent that has joined, by agent id.
        clock: seconds since the epoch.
        on_change: called after every change, for a progress display.
        upload_places: returns the places in the queue, by agent id, of those that wait to upload.
    """

    def __init__(
        self,
        run_id: str,
        current: Round,
        slots: Mapping[str, int],
        presence: Presence,
        *,
        store: Store,
        reports: Reports,
        metrics: ServerMetrics,
        on_change: Callable[[RunState], None],
        clock: Callable[[], float],
        upload_places: Callable[[], Mapping[str, int]] = dict,
    ) -> None:
        self._run_id = run_id
        self._round = current
        self._slots = dict(slots)
        self._presence = presence
        self._store = store
        self._reports = reports
        self._metrics = metrics
        self._on_change = on_change
        self._clock = clock
        self._upload_places = upload_places
        self._changed = asyncio.Event()
        # One event for each open Watch, by agent id; an event that is set means that there is news.
        self._watches: defaultdict[str, set[asyncio.Event]] = defaultdict(set)
        # The next time at which everyone hears of counts and progress; None: there is nothing to tell.
        self._next_counts: asyncio.TimerHandle | None = None
        self._counts_told_at = -math.inf
        self._num_forgotten = 0
        # How far the trainer is in this phase.
        self._progress: WorkProgress | None = None
        self._run_over = False
        self._latest_model: PublishedModel | None = None
        self._counted = store.counted_rounds()
        self._left_out = {
            agent_id: LeftOut(number, Reason(reason), message)
            for agent_id, (number, reason, message) in store.last_left_out().items()
        }
        # The number of the last round that failed, and why.
        self._last_failure = (0, "")
        # The results of the rounds on the status page.
        self._results: dict[int, Result] = {}
        for row in store.rounds():
            self._note_end(row)
        # The agents that have reported on the model of this round.
        self._reported = {row.agent_id for row in store.reports(current.number)}
        metrics.watch_agents(self._num_agents)
        # These two are set by show().
        self._initial_weights = Blob("", 0)
        self._initial_encoded: Encoded | None = None
        self.show(current)

    # ------------------------------------------------------------------ what is shown

    def show(self, current: Round, concerned: Iterable[str] = ()) -> None:
        """Show the round as it is on record now.

        Args:
            concerned: the agents whose own part in the round has changed.
        """
        before, self._round = self._round, current
        if current.phase is not before.phase:
            self._progress = None
        if current.number != before.number:
            self._reported = set()
        if current.initial_digest != self._initial_weights.digest:
            self._initial_weights = self._blob(current.initial_digest)
            self._initial_encoded = self._encoded(current.initial_digest)
        if (current.number, current.phase) == (before.number, before.phase):
            self._tell(concerned)
            self._tell_all_soon()
        else:
            self._note_end(current)
            self._note_counted(current)
            self._tell_all()
        self._display()

    def show_agent(self, agent_id: str, slot: int) -> None:
        """Show an agent that has joined."""
        self._slots[agent_id] = slot
        self._note_change()

    def forget(self, agent_id: str) -> None:
        """Drop everything that is known of an agent."""
        self._num_forgotten += 1
        self._slots.pop(agent_id, None)
        self._counted.pop(agent_id, None)
        self._left_out.pop(agent_id, None)
        self._reported.discard(agent_id)
        self._results.clear()
        self._metrics.forget(agent_id)

    def show_report(self, agent_id: str, number: int) -> None:
        """Show that an agent has reported on the model of a round."""
        if number == self._round.number:
            self._reported.add(agent_id)
        self._note_change()

    def show_progress(self, progress: WorkProgress) -> None:
        """Show how far the trainer is in this phase."""
        self._progress = progress
        self._tell_all_soon()
        self._display()

    def show_run_over(self) -> None:
        """Tell every agent that the run is over."""
        self._run_over = True
        self._tell_all()
        self._display()

    def _tell(self, agent_ids: Iterable[str]) -> None:
        """Wake these agents' Watches."""
        for agent_id in agent_ids:
            for news in self._watches.get(agent_id, ()):
                news.set()

    def _tell_all(self) -> None:
        """Wake every Watch."""
        if self._next_counts:
            self._next_counts.cancel()
            self._next_counts = None
        self._tell(self._watches)

    def _tell_all_soon(self) -> None:
        """Wake every Watch at the next time for counts: a thousand watchers need not hear of each other."""
        if self._next_counts or not self._watches:
            return
        loop = asyncio.get_running_loop()

        def tell() -> None:
            self._counts_told_at = loop.time()
            self._tell_all()

        seconds = max(COUNTS_SECONDS, len(self._watches) / COUNTS_PER_SECOND)
        self._next_counts = loop.call_at(max(loop.time(), self._counts_told_at + seconds), tell)

    def _display(self) -> None:
        """Show the run to whoever sits at the server, and wake whoever waits inside the server."""
        self._metrics.set_phase(self._round.number, self._round.phase.value)
        self._note_change()
        self._on_change(self.state_for())

    def _note_change(self) -> None:
        """Wake whoever waits for a change inside the server; reports and agents' presence count as well."""
        self._changed.set()
        self._changed = asyncio.Event()

    # ------------------------------------------------------------------ who looks

    @property
    def next_change(self) -> asyncio.Event:
        """Return an event that the next change sets; take it before looking, so that no change is missed."""
        return self._changed

    @property
    def reported(self) -> Set[str]:
        """Return the agents that have reported on the model of the current round."""
        return self._reported

    async def watch(self, agent_id: str, *, is_ready: bool = True) -> AsyncIterator[RunState]:
        """Yield the state now, then after each change; slow readers skip states, never the latest.

        A change of counts or progress alone may come a little later, together with the next.

        Args:
            is_ready: True if the agent may be drawn for a round.
        """
        with self._counted_as_watching(agent_id, is_ready=is_ready) as news:
            while True:
                news.clear()
                state = self.state_for(agent_id)
                yield state
                if state.run_over:
                    self._presence.dismiss(agent_id)
                    return
                await news.wait()

    def state_for(self, agent_id: str | None = None) -> RunState:
        """Return the state of the run as this agent may see it; None: as nobody in particular."""
        failed_round, failure = self._last_failure
        is_news = failed_round >= self._round.number - 1
        left_out = self._left_out.get(agent_id or "")
        accepted = self._round.contributions.get(agent_id or "")
        return RunState(
            round=self._round.number,
            phase=self._round.phase,
            initial_weights=self._initial_weights,
            initial_encoded=self._initial_encoded,
            outcome=self._round.outcome_of(agent_id) if agent_id else None,
            accepted_weights=accepted.weights_digest if accepted else "",
            progress=self._progress,
            latest_model=self._latest_model,
            failed_round=failed_round if is_news else 0,
            failure=failure if is_news else "",
            run_over=self._run_over,
            num_contributions=len(self._round.contributions),
            max_contributions=self._round.policy.max_agents,
            counted_round=self._counted.get(agent_id or "", 0),
            left_out=left_out if left_out and left_out.round >= self._round.number - 1 else None,
            selection=self._round.selection_of(agent_id) if agent_id else None,
            has_full_curve=self._round.has_full_curve,
        )

    async def status(self) -> dict[str, Any]:
        """Return the JSON behind the status page; see common/telemetry.py for where it is served."""
        rows = await asyncio.to_thread(self._store.rounds, last=STATUS_ROUNDS)
        num_forgotten = self._num_forgotten
        results = await asyncio.to_thread(self._results_of, rows)
        # Results that were read before an agent was forgotten may name it, so they are not kept.
        if num_forgotten == self._num_forgotten:
            self._results = results
        num_accepted = await asyncio.to_thread(self._store.num_accepted)
        last_published = max((row.number for row in rows if row.published_digest), default=0)
        reported = {row.agent_id: row for row in await asyncio.to_thread(self._store.reports, last_published)}
        current, progress, here = self._round, self._progress, self._presence.here
        audited = results.get(last_published, Result()).audit
        audits = {agent.agent_id: _audit_status(agent) for agent in audited}
        places, kind = self._upload_places(), self._reports.kind
        return {
            "run_id": self._run_id,
            "metric": kind.metric,
            "round": current.number,
            "phase": current.phase.value,
            "phases": _phases(rows[-1], current, self._clock()),
            "progress": progress and {"done": progress.done, "total": progress.total, "loss": progress.loss},
            "agents": [
                _agent_status(kind, agent_id, slot, current, agent_id in here, reported.get(agent_id))
                | {
                    "audit": audits.get(agent_id),
                    "upload_place": places.get(agent_id),
                    "selection": current.selection_of(agent_id),
                    "is_ready": agent_id not in self._presence.not_ready,
                }
                for agent_id, slot in sorted(self._slots.items(), key=lambda item: item[1])
            ],
            "rounds": [
                _round_status(kind, row, num_accepted.get(row.number, 0), results.get(row.number))
                for row in rows
                if row.phase in OVER
            ],
            "run_over": self._run_over,
            "min_agents": current.policy.min_agents,
            "max_agents": current.policy.max_agents,
            "deadline_at": current.deadline_at,
        }

    # ------------------------------------------------------------------ small parts

    @contextmanager
    def _counted_as_watching(self, agent_id: str, *, is_ready: bool) -> Iterator[asyncio.Event]:
        """Count the agent as connected, and return the event that is set when there is news for it."""
        news = asyncio.Event()
        self._watches[agent_id].add(news)
        try:
            with self._presence.watching(agent_id, is_ready=is_ready):
                self._note_change()
                yield news
        finally:
            self._watches[agent_id].discard(news)
            if not self._watches[agent_id]:
                del self._watches[agent_id]
            self._note_change()

    def _num_agents(self) -> dict[str, int]:
        """Return the number of agents in each of AGENT_STATES."""
        here = self._presence.here
        contributed = len(here & self._round.contributions.keys())
        away = len(self._slots.keys() - here)
        return {"watching": len(here) - contributed, "contributed": contributed, "away": away}

    def _note_end(self, ended: Round | RoundRow) -> None:
        # Agents do not use the model of round 0: it is only where round 1 starts from.
        if ended.published_digest and ended.number:
            self._latest_model = PublishedModel(
                ended.number, self._blob(ended.published_digest), self._encoded(ended.published_digest)
            )
        if ended.failure:
            self._last_failure = (ended.number, ended.failure)

    def _note_counted(self, current: Round) -> None:
        if current.published_digest:
            self._counted |= dict.fromkeys(current.counted, current.number)
            self._left_out |= {
                agent_id: LeftOut(current.number, *why) for agent_id, why in current.left_out.items()
            }

    def _blob(self, digest: str) -> Blob:
        return Blob(digest, self._store.blobs.size(digest) or 0)

    def _encoded(self, digest: str) -> Encoded | None:
        encoding = self._store.encoding(digest)
        if encoding is None or self._store.blobs.size(encoding.digest) is None:
            return None
        return Encoded(self._blob(encoding.digest), encoding.base)

    def _results_of(self, rows: Sequence[RoundRow]) -> dict[int, Result]:
        known = {row.number: self._results.get(row.number) for row in rows if row.published_digest}
        read = {number: result or self._reports.result_of(number) for number, result in known.items()}
        return {number: result for number, result in read.items() if result}


async def wait_for(event: asyncio.Event, seconds: float | None) -> None:
    """Wait for the event, for so many seconds at most."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        pass


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


def _audit_status(audit: AgentAudit) -> dict[str, Any]:
    """Return what the last published round's audit says of an agent."""
    return {
        "norm_ratio": audit.norm_ratio,
        "is_clipped": audit.scale < 1,
        "flags": audit.flags,
        "left_out": audit.left_out,
    }


def _round_status(kind: Kind, row: RoundRow, num_contributions: int, result: Result | None) -> dict[str, Any]:
    ended_at = max(row.phase_times.values(), default=row.opened_at)
    result = result or Result()
    scores = {
        "score_start": result.candidates.get(result.start or ""),
        "score_fine_tuned": result.score_fine_tuned,
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


def _phases(row: RoundRow, current: Round, now: float) -> list[dict[str, Any]]:
    """Return how long the current round has been in each of its phases, in order."""
    starts = {Phase.COLLECTING.value: row.opened_at} | row.phase_times
    ordered = sorted(starts.items(), key=lambda item: item[1])
    ends = [start for _, start in ordered[1:]]
    ends.append(ordered[-1][1] if current.is_over else now)
    return [
        {"phase": phase, "seconds": round(max(0.0, end - start), 3)}
        for (phase, start), end in zip(ordered, ends, strict=True)
    ]
