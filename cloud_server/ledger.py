"""The open round and the agents of the run: recorded first, then believed, then shown.

One lock guards both. Three locks are taken in this order, and never in another: the ledger's, the reports'
(showing/reports.py), the jobs' (training/runner.py). The store's lock comes after them.

What agents change is recorded in groups: all changes that wait at a moment share one transaction, and so one
flush of the disk (see `Ledger.record`).
"""

import asyncio
import math
import sqlite3
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import structlog

from ecavg.cloud_server import records
from ecavg.cloud_server.classes import Classes
from ecavg.cloud_server.contribution import Decision
from ecavg.cloud_server.disk.failures import when_disk_allows
from ecavg.cloud_server.disk.tables import SelectionRow
from ecavg.cloud_server.disk.together import Together
from ecavg.cloud_server.metrics import ServerMetrics
from ecavg.cloud_server.rollout import offers
from ecavg.cloud_server.round import Policy, Round
from ecavg.cloud_server.run import Run
from ecavg.cloud_server.showing.standing import Standing
from ecavg.cloud_server.store import Store
from ecavg.common.errors import BudgetError, InvalidError, NotFoundError, Reason, StorageError
from ecavg.common.faults import Point, crash_point
from ecavg.common.run_state import Outcome
from ecavg.common.schedule import is_full_curve_due
from ecavg.common.transfer import to_the_end

# More than it takes until the last call of an agent that was revoked has ended.
CUT_OFF_SECONDS = 5.0

_T = TypeVar("_T")

log = structlog.get_logger()


@dataclass
class Group:
    """Changes that become durable together, and what they make of the ledger's memory then."""

    # The round with the changes that came before in it.
    round: Round
    # What the labels stand for, likewise.
    classes: Classes
    # The slots of the agents that join, by agent id.
    slots: dict[str, int] = field(default_factory=dict)
    # The agents whose own part in the round has changed.
    agents: list[str] = field(default_factory=list)
    # Done on the event loop, in this order, once all is durable.
    afterwards: list[Callable[[], None]] = field(default_factory=list)


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
        self._together = Together[Callable[[Group], Any], Any](self._record_together)
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
    def run_id(self) -> str:
        """Return the id of the run."""
        return self._run.run_id

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

    def believe(self, updated: Round, concerned: Iterable[str] = ()) -> None:
        """Go on with a round that is on record, and show it to everyone; inside `exclusively` only.

        Args:
            concerned: the agents whose own part in the round has changed.
        """
        self._round = updated
        self._standing.show(updated, concerned)

    async def transition(
        self, change: Callable[[Round], Round], also: Callable[[Round], None] = lambda _: None
    ) -> None:
        """Record the phase that `change` gives the round, then go on with it; wait while the disk is full.

        Args:
            also: records more about the round that `change` has returned, in the same transaction.
        """

        async def record() -> None:
            updated = change(self._round)
            if updated is self._round:
                return
            await asyncio.to_thread(self._record_phase, updated, also)
            crash_point(Point.SERVER_PHASE_RECORDED)
            self.believe(updated)
            log.info("phase", round=updated.number, phase=updated.phase.value)

        await when_disk_allows(lambda: self.exclusively(record))

    def _record_phase(self, updated: Round, also: Callable[[Round], None]) -> None:
        left_out = {agent_id: (why.reason.value, why.message) for agent_id, why in updated.left_out.items()}
        with self._store.transaction():
            self._store.set_phase(
                updated.number,
                updated.phase.value,
                self._clock(),
                failure=updated.failure,
                published_digest=updated.published_digest,
                left_out=left_out,
            )
            also(updated)

    async def open_next_round(self) -> None:
        """Open the next round, from the last global model that is for all agents."""

        async def open_round() -> None:
            number = self._round.number + 1
            start = await asyncio.to_thread(offers.next_start, self._store)
            is_planned = number <= self._run.planned_rounds
            combined = [] if is_planned else await asyncio.to_thread(records.combined, self._store)
            is_full = is_full_curve_due(self._run.config, combined)
            await asyncio.to_thread(
                self._store.open_round, number, start, self._clock(), has_full_curve=is_full
            )
            crash_point(Point.SERVER_ROUND_OPENED)
            if is_full:
                log.info("full_curve", round=number, reason="the shared data have grown by half")
            self.believe(records.recorded_round(self._store, self._run.config, self.policy))

        await when_disk_allows(lambda: self.exclusively(open_round))

    async def draw(self, ready: Set[str], not_ready: Set[str], now: float) -> None:
        """Record the agents that are drawn from these for the round, if any, then go on with them.

        Args:
            ready: the ids of the agents that may be drawn.
            not_ready: the ids of the agents that are passed over.
            now: how late it is for the round, in seconds since the epoch.
        """

        async def record() -> None:
            updated = self._round.draw(ready & self._slots.keys(), now)
            if updated is self._round:
                return
            drawn = updated.drawn - self._round.drawn
            selection = SelectionRow(drawn, frozenset(not_ready))
            await asyncio.to_thread(records.record_selection, self._store, updated.number, selection)
            crash_point(Point.SERVER_SAMPLE_DRAWN)
            self.believe(updated, concerned=drawn)
            log.info("agents_drawn", round=updated.number, drawn=sorted(drawn), not_ready=sorted(not_ready))

        await when_disk_allows(lambda: self.exclusively(record))

    async def note_not_ready(self, not_ready: Set[str]) -> None:
        """Record the agents that a round without a sample goes on without, because they are not ready."""
        selection = SelectionRow(not_ready=frozenset(not_ready))

        async def record() -> None:
            await asyncio.to_thread(records.record_selection, self._store, self._round.number, selection)

        await when_disk_allows(lambda: self.exclusively(record))

    async def record(self, change: Callable[[Group], _T]) -> _T:
        """Return what the change returns, once all that it has recorded is durable.

        The change runs in a thread, inside a transaction, together with all other changes that wait at that
        moment. A cancelled caller does not cut it short. It changes the group only after the last step that
        may fail.

        Raises:
            StorageError: the disk takes no data; nothing of the whole group is recorded.
            Exception: what the change raises; nothing of this change is recorded.
        """
        result: _T = await self._together.do(change)
        return result

    async def _record_together(self, changes: Sequence[Callable[[Group], Any]]) -> list[Any]:
        """Return what each change returned or raised, once all of them are durable, and believe them."""

        async def record() -> list[Any]:
            group = Group(self._round, self._classes)
            results = await asyncio.to_thread(self._in_one_transaction, group, changes)
            self._classes = group.classes
            if group.round is not self._round:
                self.believe(group.round, group.agents)
            for step in group.afterwards:
                step()
            return results

        return await self.exclusively(record)

    def _in_one_transaction(self, group: Group, changes: Sequence[Callable[[Group], Any]]) -> list[Any]:
        results = []
        with self._store.transaction():
            for change in changes:
                try:
                    with self._store.savepoint():
                        results.append(change(group))
                # A disk that takes no data fails the whole group.
                except (StorageError, sqlite3.OperationalError):
                    raise
                except Exception as error:
                    results.append(error)
        return results

    def count(self, group: Group, number: int, decision: Decision, updated: Round | None = None) -> None:
        """Record, as a part of a group, how an agent's part in round `number` ended.

        Args:
            updated: the open round with that decision in it; None: the decision is about an older one.
        """
        self._store.record_contribution(number, decision)
        group.afterwards.append(partial(self._tell_of, number, decision))
        if updated:
            group.round = updated
            group.agents.append(decision.agent_id)

    def _tell_of(self, number: int, decision: Decision) -> None:
        """Tell log and metrics of a decision that is on record."""
        crash_point(Point.SERVER_CONTRIBUTION_RECORDED)
        self._metrics.count_contribution(decision.outcome.value)
        told = {"round": number, "agent_id": decision.agent_id}
        if decision.outcome is Outcome.REJECTED and decision.why:
            log.warning("contribution_rejected", **told, reason=decision.why.reason.value)
        else:
            log.info("contribution", **told, outcome=decision.outcome.value)

    async def reject(self, agent_id: str, reason: Reason, message: str) -> None:
        """Record that what the agent has sent is unfit, unless a contribution of the agent stands."""

        def record(group: Group) -> None:
            updated = group.round.reject(agent_id, reason, message)
            if agent_id not in self._slots or updated is group.round:
                return
            why = updated.rejections[agent_id]
            decision = Decision(agent_id, Outcome.REJECTED, self._clock(), why=why)
            self.count(group, updated.number, decision, updated)

        await self.record(record)

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
        if agent_id not in self._slots or class_names:
            await self.record(lambda group: self._enter(group, agent_id, class_names, on_joined))
        return self._slots[agent_id]

    def _enter(
        self, group: Group, agent_id: str, class_names: Sequence[str], on_joined: Callable[[str], None]
    ) -> None:
        classes = self._agreed(group, agent_id, class_names)
        if agent_id not in self._slots and agent_id not in group.slots:
            self._check_admission(group, agent_id)
            group.slots[agent_id] = self._store.join(agent_id, self._clock())
            group.afterwards.append(lambda: self._let_in(agent_id, group.slots[agent_id], on_joined))
        if classes != group.classes:
            self._store.set_class_names(classes.names, agent_id)
            group.classes = classes
            group.afterwards.append(
                lambda: log.info("classes_named", agent_id=agent_id, class_names=classes.names)
            )

    def _check_admission(self, group: Group, agent_id: str) -> None:
        """Raise what `join` raises, unless the run takes one more agent."""
        if self._expelled_at.get(agent_id, -math.inf) > time.monotonic() - CUT_OFF_SECONDS:
            raise NotFoundError(f"agent {agent_id} has just been forgotten", Reason.UNKNOWN_AGENT)
        num_joined = len(self._slots) + len(group.slots)
        if num_joined >= self._max_joined:
            raise BudgetError(
                f"{num_joined} agents have joined this run, and it takes no more: ask the server's"
                " operator to raise max_joined",
                Reason.RUN_FULL,
            )

    def _let_in(self, agent_id: str, slot: int, on_joined: Callable[[str], None]) -> None:
        """Go on with an agent that is on record, and show it."""
        crash_point(Point.SERVER_AGENT_JOINED)
        on_joined(agent_id)
        self._slots[agent_id] = slot
        log.info("agent_joined", agent_id=agent_id, slot=slot)
        self._standing.show_agent(agent_id, slot)

    def _agreed(self, group: Group, agent_id: str, class_names: Sequence[str]) -> Classes:
        """Return the classes of the run after this agent has joined with these.

        The agent that has named the classes may correct them, until another one has joined, whose labels
        would then mean something else, or a contribution counts.
        """
        classes, is_alone = group.classes, self._slots.keys() | group.slots.keys() <= {agent_id}
        if class_names and is_alone and agent_id == classes.named_by and not self._store.num_accepted():
            classes = Classes()
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
