"""The presence of agents: which are here, which are expected back, and which may be let go."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

# An agent that was here so recently is expected back: it is being restarted.
LIVENESS_SECONDS = 30.0


class Presence:
    """The agents that watch the run.

    Args:
        expected: agents of whom the last life of this server had heard; they are given time to come back.
        clock: seconds that only ever grow.
    """

    def __init__(self, expected: Iterable[str] = (), clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._watching: Counter[str] = Counter()
        self._last_seen = dict.fromkeys(expected, clock())
        self._dismissed: set[str] = set()
        self._forgotten: set[str] = set()

    @contextmanager
    def watching(self, agent_id: str) -> Iterator[None]:
        """Count the agent as here; it may be here twice while an old connection has not ended yet."""
        self._watching[agent_id] += 1
        self._forgotten.discard(agent_id)
        try:
            yield
        finally:
            self._watching[agent_id] -= 1
            if agent_id not in self._forgotten:
                self._last_seen[agent_id] = self._clock()

    def dismiss(self, agent_id: str) -> None:
        """Note that the agent has been told that the run is over."""
        self._dismissed.add(agent_id)

    def forget(self, agent_id: str) -> None:
        """Expect the agent no more; a connection that it still has is about to be cut."""
        self._forgotten.add(agent_id)
        self._last_seen.pop(agent_id, None)

    @property
    def here(self) -> set[str]:
        """Return the agents that watch now."""
        return set(+self._watching) - self._forgotten

    @property
    def live(self) -> set[str]:
        """Return the agents that watch now, and those that may be back in a moment."""
        recently = self._clock() - LIVENESS_SECONDS
        return self.here | {agent for agent, at in self._last_seen.items() if at > recently}

    @property
    def not_dismissed(self) -> set[str]:
        """Return the live agents that have not been told that the run is over."""
        return self.live - self._dismissed
