"""The open round and the agents of the run: recorded first, then believed, then shown.

One lock guards both. Three locks are taken in this order, and never in another: the ledger's, the reports'
(showing/reports.py), the jobs' (training/runner.py).
"""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TypeVar

import structlog

from cloud_server import records
from cloud_server.classes import Classes
from cloud_server.contribution import Decision
from cloud_server.disk.failures import when_disk_allows
from cloud_server.metrics import ServerMetrics
from cloud_server.round import Policy, Round
from cloud_server.run import Run
from cloud_server.showing.standing import Standing
from cloud_server.store import Store
from common.errors import BudgetError, InvalidError, NotFoundError, Reason
from common.faults import Point, crash_point
from common.run_state import Outcome
from common.transfer import to_the_end

# More than it takes until the last call of an agent that was revoked has ended.
CUT_OFF_SECONDS = 5.0

_T = TypeVar("_T")

log = structlog.get_logger()


class Ledger:
    """The one holder of what changes: which round is open, what has come in, who has joined.

    Args:
        current: the round, as it is on record.
        slots: the slot of every agent that has joined, by agent id.
        classes: what the labels of the run stand for, as it is on record.
        max_joined: how many agents the run takes.
        clock: seconds since the epoch; deadlines outlive the process.
    """

    def __init__(
        self,
        run: Run,
        current: Round,
        slots: Mapping[str, int],
        classes: Classes,
        *,
        store: Store,
        standing: Standing,
        metrics: ServerMetrics,
        max_joined: int,
        clock: Callable[[], float],
    ) -> None:
        self._run = run
        self._round = current
        self._slots = dict(slots)
        self._classes = classes
        self._store = store
        self._standing = standing
        self._metrics = metrics
        self._max_joined = max_joined
        self._clock = clock
        self._lock = asyncio.Lock()
        # When agents were expelled, by the monotonic clock.
        self._expelled_at: dict[str, float] = {}

    @property
    def round(self) -> Round:
        """Return the round as it is on record."""
        return self._round

    @property
    def policy(self) -> Policy:
        """Return the rule by which rounds close."""
        return self._round.policy

    @property
    def planned_rounds(self) -> int:
        """Return how many rounds the learning-rate schedule of the run is for."""
        return self._run.planned_rounds

    @property
    def class_names(self) -> tuple[str, ...]:
        """Return the names of the classes, label 0 first; empty as long as nobody has named them."""
        return self._classes.names

    def has_joined(self, agent_id: str) -> bool:
        """Return True if the agent belongs to the run."""
        return agent_id in self._slots

    def check_joined(self, agent_id: str) -> None:
        """Raise NotFoundError unless the agent belongs to the run."""
        if agent_id not in self._slots:
            raise NotFoundError(f"agent {agent_id} has not joined this run", Reason.UNKNOWN_AGENT)

    # ------------------------------------------------------------------ changes, one at a time

    async def exclusively(self, change: Callable[[], Awaitable[_T]]) -> _T:
        """Await `change` while nobody else changes the ledger; a cancelled caller does not cut it short."""

        async def locked() -> _T:
            async with self._lock:
                return await change()

        return await to_the_end(locked())

    def believe(self, updated: Round) -> None:
        """Go on with a round that is on record, and show it to everyone; inside `exclusively` only."""
        self._round = updated
        self._standing.show(updated)

    async def transition(self, change: Callable[[Round], Round]) -> None:
        """Record the phase that `change` gives the round, then go on with it; wait while the disk is full."""

        async def record() -> None:
            updated = change(self._round)
            if updated is self._round:
                return
            await asyncio.to_thread(
                self._store.set_phase,
                updated.number,
                updated.phase.value,
                self._clock(),
                failure=updated.failure,
                published_digest=updated.published_digest,
                left_out={
                    agent_id: (why.reason.value, why.message) for agent_id, why in updated.left_out.items()
                },
            )
            crash_point(Point.SERVER_PHASE_RECORDED)
            self.believe(updated)
            log.info("phase", round=updated.number, phase=updated.phase.value)

        await when_disk_allows(lambda: self.exclusively(record))

    async def open_next_round(self) -> None:
        """Open the next round, from the last global model or from where a failed round started."""

        async def open_round() -> None:
            number = self._round.number + 1
            start = self._round.published_digest or self._round.initial_digest
            await asyncio.to_thread(self._store.open_round, number, start, self._clock())
            crash_point(Point.SERVER_ROUND_OPENED)
            self.believe(records.recorded_round(self._store, self._run.config, self.policy))

        await when_disk_allows(lambda: self.exclusively(open_round))

    async def record(self, number: int, decision: Decision, updated: Round | None = None) -> None:
        """Record how an agent's part in round `number` ended; inside `exclusively` only.

        Args:
            updated: the open round with that decision in it; None: the decision is about an older one.
        """
        await asyncio.to_thread(self._store.record_contribution, number, decision)
        crash_point(Point.SERVER_CONTRIBUTION_RECORDED)
        self._metrics.count_contribution(decision.outcome.value)
        told = {"round": number, "agent_id": decision.agent_id}
        if decision.outcome is Outcome.REJECTED and decision.why:
            log.warning("contribution_rejected", **told, reason=decision.why.reason.value)
        else:
            log.info("contribution", **told, outcome=decision.outcome.value)
        if updated:
            self.believe(updated)

    async def reject(self, agent_id: str, reason: Reason, message: str) -> None:
        """Record that what the agent has sent is unfit, unless a contribution of the agent stands."""

        async def record() -> None:
            updated = self._round.reject(agent_id, reason, message)
            if agent_id not in self._slots or updated is self._round:
                return
            why = updated.rejections[agent_id]
            await self.record(
                updated.number, Decision(agent_id, Outcome.REJECTED, self._clock(), why=why), updated
            )

        await self.exclusively(record)

    # ------------------------------------------------------------------ who belongs to the run

    async def join(self, agent_id: str, class_names: Sequence[str], on_joined: Callable[[str], None]) -> int:
        """Return the agent's slot, from 1 on, the same whenever it asks.

        Args:
            class_names: the classes of the agent's image folder; empty where it has none.
            on_joined: called with the id of an agent that is new, before anybody hears of it.

        Raises:
            BudgetError: the run takes no more agents.
            NotFoundError: the agent has just been forgotten.
            InvalidError: the classes are not those of the run.
        """

        async def enter() -> None:
            classes = await self._agreed(agent_id, class_names)
            await admit()
            if classes != self._classes:
                await asyncio.to_thread(self._store.set_class_names, classes.names, agent_id)
                self._classes = classes
                log.info("classes_named", agent_id=agent_id, class_names=classes.names)

        async def admit() -> None:
            if agent_id in self._slots:
                return
            if self._expelled_at.get(agent_id, -math.inf) > time.monotonic() - CUT_OFF_SECONDS:
                raise NotFoundError(f"agent {agent_id} has just been forgotten", Reason.UNKNOWN_AGENT)
            if len(self._slots) >= self._max_joined:
                raise BudgetError(
                    f"{len(self._slots)} agents have joined this run, and it takes no more: ask the server's"
                    " operator to raise max_joined",
                    Reason.RUN_FULL,
                )
            slot = await asyncio.to_thread(self._store.join, agent_id, self._clock())
            crash_point(Point.SERVER_AGENT_JOINED)
            on_joined(agent_id)
            self._slots[agent_id] = slot
            log.info("agent_joined", agent_id=agent_id, slot=slot)
            self._standing.show_agent(agent_id, slot)

        if agent_id not in self._slots or class_names:
            await self.exclusively(enter)
        return self._slots[agent_id]

    async def _agreed(self, agent_id: str, class_names: Sequence[str]) -> Classes:
        """Return the classes of the run after this agent has joined with these.

        The agent that has named the classes may correct them, until the first contribution counts.
        """
        classes = self._classes
        if class_names and agent_id == classes.named_by:
            is_in_use = await asyncio.to_thread(self._store.num_accepted)
            classes = classes if is_in_use else Classes()
        try:
            return classes.agree(agent_id, class_names, self._run.config.spec.num_classes)
        except InvalidError as error:
            log.warning("agent_refused", agent_id=agent_id, reason=error.reason.value, message=str(error))
            raise

    def expel(self, agent_id: str) -> None:
        """Treat the agent as one that never joined; inside `exclusively` only."""
        self._expelled_at[agent_id] = time.monotonic()
        if agent_id == self._classes.named_by:
            self._classes = Classes(self._classes.names)
        self._slots.pop(agent_id, None)
