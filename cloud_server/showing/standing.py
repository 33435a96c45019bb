"""The run as it stands: what watching agents, the terminal, the status page and the metrics are shown.

Whoever makes something true and durable shows it here: the ledger and the coordinator.
"""

import asyncio
import math
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager

from ecavg.cloud_server.disk.tables import RoundRow
from ecavg.cloud_server.metrics import ServerMetrics
from ecavg.cloud_server.rollout import offers
from ecavg.cloud_server.rollout.offers import Offers
from ecavg.cloud_server.round import Round
from ecavg.cloud_server.showing.offered import Offered, blob, encoded, rest
from ecavg.cloud_server.showing.opening import Opening
from ecavg.cloud_server.showing.presence import Presence
from ecavg.cloud_server.showing.progress import ProgressBoard
from ecavg.cloud_server.store import Store
from ecavg.common.errors import Reason
from ecavg.common.pace import Pace
from ecavg.common.run_state import AVAILABLE, Availability, LeftOut, RunState, WorkProgress
from ecavg.common.transfer import Blob, Encoded

# Agents hear of counts and progress so often at most, and so many of them in a second, so that a thousand
# agents hear of them every five seconds. Of everything else they hear at once.
COUNTS_SECONDS = 1.0
COUNTS_PER_SECOND = 200


class Standing:
    """The run as it is now, for everyone who looks at it or waits for news.

    Args:
        current: the round, as it is on record.
        slots: the slot of every agent that has joined, by agent id.
        on_change: called after every change, for a progress display.
    """

    def __init__(
        self,
        current: Round,
        slots: Mapping[str, int],
        presence: Presence,
        *,
        store: Store,
        board: ProgressBoard,
        metrics: ServerMetrics,
        on_change: Callable[[RunState], None],
    ) -> None:
        self._round = current
        self._slots = dict(slots)
        self._presence = presence
        self._store = store
        self._board = board
        self._metrics = metrics
        self._on_change = on_change
        self._changed = asyncio.Event()
        # One event for each open Watch, by agent id; an event that is set means that there is news.
        self._watches: defaultdict[str, set[asyncio.Event]] = defaultdict(set)
        # The next time at which everyone hears of counts and progress; None: there is nothing to tell.
        self._next_counts: asyncio.TimerHandle | None = None
        self._counts_told_at = -math.inf
        # How many agents have been forgotten in this life of the server.
        self.num_forgotten = 0
        # How far the trainer is in this phase, and its pace.
        self._progress: WorkProgress | None = None
        self._pace = Pace()
        # What the next round waits for, once this one is over.
        self._opening = Opening()
        self._last_round_over = False
        self._run_over = False
        self._offered = Offered(store)
        self._counted = store.counted_rounds()
        self._left_out = {
            agent_id: LeftOut(number, Reason(reason), message)
            for agent_id, (number, reason, message) in store.last_left_out().items()
        }
        # The number of the last round that failed, and why.
        self._last_failure = (0, "")
        for row in store.rounds():
            self._note_end(row)
        metrics.watch_agents(self._num_agents)
        metrics.watch_selection(self._num_selected)
        # These two are set by show().
        self._initial_weights = Blob("", 0)
        self._initial_encoded: Encoded | None = None
        self._initial_rest: Blob | None = None
        self.show(current)

    # ------------------------------------------------------------------ what is shown

    def show(self, current: Round, concerned: Iterable[str] = ()) -> None:
        """Show the round as it is on record now.

        Args:
            concerned: the agents whose own part in the round has changed.
        """
        before, self._round = self._round, current
        concerned = tuple(concerned)
        for agent_id in current.contributions.keys() & concerned:
            self._presence.note_contribution(agent_id)
        if current.phase is not before.phase:
            self._progress, self._pace = None, Pace()
        if current.number != before.number:
            self._opening = Opening()
        if current.initial_digest != self._initial_weights.digest:
            self._initial_weights = blob(self._store, current.initial_digest)
            self._initial_encoded = encoded(self._store, current.initial_digest)
            self._initial_rest = rest(self._store, current.initial_digest)
        if (current.number, current.phase) == (before.number, before.phase):
            self._tell(concerned)
            self._tell_all_soon()
        else:
            self._note_end(current)
            self._note_counted(current)
            if current.published_digest:
                self._offered.take(offers.read(self._store))
            self._tell_all()
        self._display()

    def show_agent(self, agent_id: str, slot: int) -> None:
        """Show an agent that has joined."""
        self._slots[agent_id] = slot
        self._note_change()

    def forget(self, agent_id: str) -> None:
        """Drop everything that is known of an agent."""
        self.num_forgotten += 1
        self._slots.pop(agent_id, None)
        self._counted.pop(agent_id, None)
        self._left_out.pop(agent_id, None)
        self._offered.forget(agent_id)
        self._board.forget(agent_id)
        self._metrics.forget(agent_id)

    def show_offers(self, offered: Offers) -> None:
        """Show which rounds' models agents are offered, as it is on record now."""
        if offered != self._offered.offers:
            self._offered.take(offered)
            self._tell_all()
            self._display()

    def show_report(self, agent_id: str, number: int, *, is_applied: bool) -> None:
        """Show that an agent has reported on the model of a round.

        Args:
            is_applied: whether the agent uses the model.
        """
        self._offered.note_report(agent_id, number, is_applied=is_applied)
        self._note_change()

    def show_progress(self, progress: WorkProgress) -> None:
        """Show how far the trainer is in this phase."""
        self._progress = progress
        self._pace.note(progress.done, time.monotonic())
        self._tell_all_soon()
        self._display()

    def show_opening(self, opening: Opening) -> None:
        """Show what the next round waits for."""
        if opening != self._opening:
            self._opening = opening
            self._tell_all()
            self._display()

    def show_last_round_over(self) -> None:
        """Tell every agent that no round will take a contribution any more."""
        self._last_round_over = True
        self._tell_all()

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
    def current(self) -> Round:
        """Return the round, as it is on record."""
        return self._round

    @property
    def slots(self) -> Mapping[str, int]:
        """Return the slot of every agent that has joined, by agent id."""
        return self._slots

    @property
    def progress(self) -> WorkProgress | None:
        """Return how far the trainer is in this phase; None if it has not said."""
        return self._progress

    @property
    def opening(self) -> Opening:
        """Return what the next round waits for; nothing as long as this round is not over."""
        return self._opening

    @property
    def work_seconds_left(self) -> float | None:
        """Return how long the trainer will take in this phase; None if that is unknown."""
        progress = self._progress
        return progress and self._pace.seconds_left(progress.total, time.monotonic())

    @property
    def run_over(self) -> bool:
        """Return True if every agent has been told that the run is over."""
        return self._run_over

    @property
    def next_change(self) -> asyncio.Event:
        """Return an event that the next change sets; take it before looking, so that no change is missed."""
        return self._changed

    @property
    def offers(self) -> Offers:
        """Return which rounds' models agents are offered."""
        return self._offered.offers

    @property
    def rounds_in_use(self) -> Mapping[str, int]:
        """Return the round of the published model that each agent has reported to use, by agent id."""
        return self._offered.rounds_in_use

    def still_awaited(self, agent_ids: Set[str]) -> Set[str]:
        """Return those of the agents that have not reported on what all are offered; see offered.py."""
        return self._offered.still_awaited(agent_ids)

    def is_watched_by(self, agent_id: str) -> bool:
        """Return True if the agent has an open Watch."""
        return agent_id in self._watches

    async def watch(self, agent_id: str, said: Availability = AVAILABLE) -> AsyncIterator[RunState]:
        """Yield the state now, then after each change; slow readers skip states, never the latest.

        A change of counts or progress alone may come a little later, together with the next.

        Args:
            said: what the agent says of itself.
        """
        with self._counted_as_watching(agent_id, said) as news:
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
            initial_rest=self._initial_rest,
            outcome=self._round.outcome_of(agent_id) if agent_id else None,
            accepted_weights=accepted.weights_digest if accepted else "",
            progress=self._progress,
            latest_model=self._offered.model_for(agent_id),
            failed_round=failed_round if is_news else 0,
            failure=failure if is_news else "",
            run_over=self._run_over,
            num_contributions=len(self._round.contributions),
            max_contributions=self._round.policy.max_agents,
            counted_round=self._counted.get(agent_id or "", 0),
            left_out=left_out if left_out and left_out.round >= self._round.number - 1 else None,
            selection=self._round.selection_of(agent_id) if agent_id else None,
            has_full_curve=self._round.has_full_curve,
            last_round_over=self._last_round_over,
            next_round_at=self._opening.at,
            num_examples_to_open=self._opening.num_examples,
            is_pinned=bool(self._offered.offers.pinned),
            withdrawn_rounds=self._offered.offers.withdrawn,
        )

    # ------------------------------------------------------------------ small parts

    @contextmanager
    def _counted_as_watching(self, agent_id: str, said: Availability) -> Iterator[asyncio.Event]:
        """Count the agent as connected, and return the event that is set when there is news for it."""
        news = asyncio.Event()
        self._watches[agent_id].add(news)
        try:
            with self._presence.watching(agent_id, said):
                self._note_change()
                yield news
        finally:
            self._watches[agent_id].discard(news)
            if not self._watches[agent_id]:
                del self._watches[agent_id]
                self._board.forget(agent_id)
            self._note_change()

    def _num_agents(self) -> dict[str, int]:
        """Return the number of agents in each of AGENT_STATES."""
        here = self._presence.here
        contributed = len(here & self._round.contributions.keys())
        away = len(self._slots.keys() - here)
        return {"watching": len(here) - contributed, "contributed": contributed, "away": away}

    def _num_selected(self) -> dict[str, int]:
        """Return the number of agents by Selection; nothing without a sample."""
        chosen = (self._round.selection_of(agent_id) for agent_id in self._slots)
        return Counter(each.value for each in chosen if each)

    def _note_end(self, ended: Round | RoundRow) -> None:
        if ended.failure:
            self._last_failure = (ended.number, ended.failure)

    def _note_counted(self, current: Round) -> None:
        if current.published_digest:
            self._counted |= dict.fromkeys(current.counted, current.number)
            self._left_out |= {
                agent_id: LeftOut(current.number, *why) for agent_id, why in current.left_out.items()
            }


async def wait_for(event: asyncio.Event, seconds: float | None) -> None:
    """Wait for the event, for so many seconds at most."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        pass
