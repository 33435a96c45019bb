"""The presence of agents: which agents are connected, expected back, or dismissed."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Set
from contextlib import contextmanager

from ecavg.common.run_state import AVAILABLE, Availability, Wait

# An agent that has disconnected is expected back for this time, because it may be restarting.
LIVENESS_SECONDS = 30.0


class Presence:
    """The agents that watch the run.

    Args:
        expected: the agents that the previous process of this server knew; they have time to come back.
        clock: returns seconds that never decrease.
        wall_clock: returns seconds since the epoch.
    """

    def __init__(
        self,
        expected: Iterable[str] = (),
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._clock = clock
        self._wall_clock = wall_clock
        # When agents have left last, in seconds since the epoch; the others have not come since the start.
        self._away_since: dict[str, float] = {}
        self._started_at = wall_clock()
        self._num_connections: Counter[str] = Counter()
        # The agents with a connection, without those that were forgotten.
        self._here: set[str] = set()
        # The agents among them that are not to be drawn.
        self._not_ready: set[str] = set()
        # What the agents with a connection have said of themselves.
        self._said: dict[str, Availability] = {}
        # When agents that are not here have disconnected.
        self._last_seen = dict.fromkeys(expected, clock())
        self._dismissed: set[str] = set()

    @contextmanager
    def watching(self, agent_id: str, said: Availability = AVAILABLE) -> Iterator[None]:
        """Count the agent as connected.

        The agent may be counted twice, while an old connection has not ended yet. What the newest connection
        says of the agent counts.
        """
        self._said[agent_id] = said
        self._num_connections[agent_id] += 1
        self._here.add(agent_id)
        (self._not_ready.discard if said.is_ready else self._not_ready.add)(agent_id)
        self._last_seen.pop(agent_id, None)
        try:
            yield
        finally:
            self._num_connections[agent_id] -= 1
            if not self._num_connections[agent_id]:
                del self._num_connections[agent_id]
                self._leave(agent_id)

    def _leave(self, agent_id: str) -> None:
        """Expect the agent back, unless it was forgotten."""
        self._not_ready.discard(agent_id)
        self._said.pop(agent_id, None)
        if agent_id in self._here:
            self._here.discard(agent_id)
            self._last_seen[agent_id] = self._clock()
            self._away_since[agent_id] = self._wall_clock()

    def note_contribution(self, agent_id: str) -> None:
        """Note that what the agent had is new no more; it says next what is."""
        if said := self._said.get(agent_id):
            self._said[agent_id] = said._replace(num_new_examples=0)

    def dismiss(self, agent_id: str) -> None:
        """Note that the agent has been told that the run is over."""
        self._dismissed.add(agent_id)

    def forget(self, agent_id: str) -> None:
        """Cease to count and to expect the agent, even if it still has a connection that is about to end."""
        self._here.discard(agent_id)
        self._not_ready.discard(agent_id)
        self._said.pop(agent_id, None)
        self._last_seen.pop(agent_id, None)
        self._away_since.pop(agent_id, None)

    def away_since(self, agent_id: str) -> float | None:
        """Return since when an agent is away, in seconds since the epoch; None: it is here.

        An agent that has not come since this server's start is away since then.
        """
        return None if agent_id in self._here else self._away_since.get(agent_id, self._started_at)

    @property
    def here(self) -> Set[str]:
        """Return the agents that are connected."""
        return self._here

    @property
    def not_ready(self) -> Set[str]:
        """Return the agents that are connected, and not to be drawn."""
        return self._not_ready

    def waits_for(self, agent_id: str) -> Wait | None:
        """Return what an agent waits for; None: for nothing, or it has not said."""
        return self._said.get(agent_id, AVAILABLE).waits_for

    @property
    def num_new_examples(self) -> int:
        """Return how many new examples the agents have that are connected."""
        return sum(said.num_new_examples for said in self._said.values())

    @property
    def ready(self) -> Set[str]:
        """Return the agents that are connected, and may be drawn."""
        return self._here - self._not_ready

    @property
    def live(self) -> set[str]:
        """Return the agents that are connected, and those that are expected back."""
        recently = self._clock() - LIVENESS_SECONDS
        return self._here | {agent for agent, at in self._last_seen.items() if at > recently}

    @property
    def not_dismissed(self) -> set[str]:
        """Return the live agents that have not been told that the run is over."""
        return self.live - self._dismissed
