"""The roll-out of models while the server serves: canaries, and what an operator asks for."""

import asyncio
import sqlite3
import time
from collections.abc import Callable

import structlog

from ecavg.cloud_server.disk.failures import when_disk_allows
from ecavg.cloud_server.ledger import Ledger
from ecavg.cloud_server.metrics import ServerMetrics
from ecavg.cloud_server.rollout import changes, offers
from ecavg.cloud_server.rollout.rule import CanaryRule, Verdict
from ecavg.cloud_server.round import Round
from ecavg.cloud_server.showing import presence
from ecavg.cloud_server.showing.presence import Presence
from ecavg.cloud_server.showing.reports import Reports
from ecavg.cloud_server.showing.standing import Standing, wait_for
from ecavg.cloud_server.store import Store
from ecavg.cloud_server.upkeep import provenance
from ecavg.common.errors import StorageError
from ecavg.common.faults import Point, crash_point
from ecavg.common.run_state import Phase

# `cloud-server models` writes records, which are looked at so often.
FOLLOW_SECONDS = 0.5

log = structlog.get_logger()


class RollOut:
    """The part of a server that decides who is offered which model.

    Args:
        rule: how new models are tried out; with the fraction 0 they are not.
        clock: seconds since the epoch.
    """

    def __init__(
        self,
        rule: CanaryRule,
        store: Store,
        ledger: Ledger,
        *,
        reports: Reports,
        standing: Standing,
        presence: Presence,
        metrics: ServerMetrics,
        clock: Callable[[], float],
    ) -> None:
        self._rule = rule
        self._store = store
        self._ledger = ledger
        self._reports = reports
        self._standing = standing
        self._presence = presence
        self._metrics = metrics
        self._clock = clock
        # The withdrawn rounds whose reports and provenance say so.
        self._noted = set(standing.offers.withdrawn)

    # ------------------------------------------------------------------ the canary

    def canary_of(self, current: Round) -> frozenset[str]:
        """Return the agents that are to have the model of a round first; none: all agents get it at once.

        They are drawn from the agents that are here, or were a moment ago, and those that have contributed.
        While a model is pinned there is no canary, as nobody would be offered the new model.
        """
        is_wanted = self._rule.fraction and not current.is_warm_up and not self._standing.offers.pinned
        candidates = (self._presence.live | current.contributions.keys()) & self._standing.slots.keys()
        return self._rule.draw(current.number, candidates) if is_wanted else frozenset()

    def begin(self, number: int, canary: frozenset[str]) -> None:
        """Record the canary of a round, inside the transaction that publishes its model."""
        if canary:
            changes.begin_canary(self._store, number, canary, self._clock())

    async def finish(self) -> None:
        """Wait until the canary that is under way is decided, if there is one."""
        number = self._standing.offers.canary
        if not number:
            return
        log.info("canary", round=number, agents=sorted(self._standing.offers.canary_agents))
        until = time.monotonic() + await asyncio.to_thread(self._seconds_left, number)
        while self._standing.offers.canary == number:
            changed = self._standing.next_change
            is_overdue = time.monotonic() >= until
            if verdict := await asyncio.to_thread(self._verdict, number, is_overdue=is_overdue):
                await self._decide(number, verdict)
                return
            await wait_for(changed, max(0.0, until - time.monotonic()))

    def _seconds_left(self, number: int) -> float:
        """Return how long reports are waited for; a clock that was set lets it begin anew, or end.

        A server that was away for so long waits at least for as long as it expects its agents back.
        """
        row = offers.rollout_of(self._store, number)
        assert row
        seconds = self._rule.seconds
        left = seconds - min(max(0.0, self._clock() - row.begun_at), seconds)
        return max(left, min(seconds, presence.LIVENESS_SECONDS))

    def _verdict(self, number: int, *, is_overdue: bool) -> Verdict | None:
        """Return how the canary ends; None: more reports are waited for. A forgotten agent does not count."""
        row = offers.rollout_of(self._store, number)
        assert row
        reports = [report for report in self._store.reports(number) if report.agent_id in row.canary]
        if len(reports) < len(row.canary) and not is_overdue:
            return None
        if row.canary and 2 * len(reports) >= len(row.canary):
            return self._rule.judge(reports)
        return self._rule.judge_too_few(len(reports), len(row.canary))

    async def _decide(self, number: int, verdict: Verdict) -> None:
        """Record how the canary has ended, then have the agents hear of it."""

        async def record() -> None:
            await asyncio.to_thread(
                changes.decide,
                self._store,
                number,
                is_released=verdict.is_released,
                reason=verdict.reason,
                now=self._clock(),
            )
            crash_point(Point.SERVER_CANARY_DECIDED)
            await self._show_offers()

        await when_disk_allows(lambda: self._ledger.exclusively(record))
        # An operator may have withdrawn the model meanwhile.
        outcome = "withdrawn" if number in self._standing.offers.withdrawn else "released"
        self._metrics.count_canary(outcome)
        log.info("canary_decided", round=number, outcome=outcome, reason=verdict.reason)
        self._reports.note_change(number)
        await when_disk_allows(self._note_withdrawals)

    # ------------------------------------------------------------------ what an operator asks for

    async def follow(self) -> None:
        """Follow the records that `cloud-server models` writes, for as long as this runs."""
        while True:
            try:
                await self._follow()
            except (OSError, StorageError, sqlite3.Error) as error:
                log.error("roll_out_failed", reason=str(error))
            await asyncio.sleep(FOLLOW_SECONDS)

    async def _follow(self) -> None:
        if await asyncio.to_thread(offers.read, self._store) != self._standing.offers:
            await self._ledger.exclusively(self._show_offers)
        await self._note_withdrawals()
        await self._break_off()

    async def _show_offers(self) -> None:
        """Show what is on record; inside `exclusively` only."""
        self._standing.show_offers(await asyncio.to_thread(offers.read, self._store))

    async def _note_withdrawals(self) -> None:
        """Have reports and provenance.jsonl tell of models that were withdrawn."""
        withdrawn = set(self._standing.offers.withdrawn)
        if withdrawn <= self._noted:
            return
        async with self._reports.lock:
            await asyncio.to_thread(provenance.write, self._store)
        for number in withdrawn - self._noted:
            log.warning("model_withdrawn", round=number)
            self._reports.note_change(number)
        self._noted = withdrawn

    async def _break_off(self) -> None:
        """End the open round if it started from a model that was withdrawn since."""
        if self._ledger.round.phase is Phase.COLLECTING and self.obstacle():
            await self._ledger.transition(self._without_withdrawn_start)

    def _without_withdrawn_start(self, current: Round) -> Round:
        obstacle = self.obstacle() if current.phase is Phase.COLLECTING else ""
        return current.fail(obstacle) if obstacle else current

    def obstacle(self) -> str:
        """Return why no model can come of the round; empty: it does not start from a withdrawn model."""
        if not self._standing.offers.withdrawn:
            return ""
        number = offers.withdrawn_round(self._store, self._ledger.round.initial_digest)
        return f"it started from the model of round {number}, which is withdrawn" if number else ""
