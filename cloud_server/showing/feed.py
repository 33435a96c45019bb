"""The status as a stream of events, for the status page: first the whole of it, then what has changed.

An event is one line of JSON:

    {"now": seconds since the epoch,
     "whole": true in the first event of a stream: what was shown before is void,
     "status": the fields of the status that have changed, without the agents,
     "agents": the agents that have changed,
     "gone": the ids of the agents that are no longer there}
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any

from ecavg.common.strict_json import to_json

# There is one event in this time, and the status is read no more often, however many watch.
EVENT_SECONDS = 1.0
# The page connects again after this time.
RETRY_SECONDS = 1.0

_Status = Mapping[str, Any]


class Feed:
    """The status as it changes, for any number of watchers.

    Args:
        read: returns the status.
    """

    def __init__(self, read: Callable[[], Awaitable[_Status]]) -> None:
        self._read = read
        self._reading = asyncio.Lock()
        self._latest: _Status = {}
        self._read_at = -EVENT_SECONDS
        self._closed = asyncio.Event()

    def close(self) -> None:
        """End all streams."""
        self._closed.set()

    async def events(self) -> AsyncIterator[bytes]:
        """Yield the events of one watcher, in the format text/event-stream, until `close`."""
        yield f"retry: {RETRY_SECONDS * 1000:.0f}\n\n".encode()
        shown: _Status | None = None
        while not self._closed.is_set():
            status = await self._status()
            yield f"data: {to_json(change(shown, status) | {'now': time.time()})}\n\n".encode()
            shown = status
            with suppress(TimeoutError):
                await asyncio.wait_for(self._closed.wait(), EVENT_SECONDS)

    async def _status(self) -> _Status:
        """Return the status, which may be EVENT_SECONDS old."""
        async with self._reading:
            # Watchers that wake a little early shall not see the same status twice.
            if time.monotonic() - self._read_at > 0.9 * EVENT_SECONDS:
                self._latest = await self._read()
                self._read_at = time.monotonic()
            return self._latest


def change(before: _Status | None, now: _Status) -> dict[str, Any]:
    """Return what turns one status into another; None stands for no status."""
    shown = before or {}
    known = {agent["agent_id"]: agent for agent in shown.get("agents", ())}
    agents = {agent["agent_id"]: agent for agent in now.get("agents", ())}
    fields = {name: value for name, value in now.items() if name != "agents" and shown.get(name) != value}
    # A field that was never shown may have the value None.
    fields |= {name: now[name] for name in now.keys() - shown.keys() - {"agents"}}
    return {
        **({} if before else {"whole": True}),
        "status": fields,
        "agents": [agent for agent_id, agent in agents.items() if known.get(agent_id) != agent],
        "gone": sorted(known.keys() - agents.keys()),
    }
