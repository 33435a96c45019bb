"""The latest state of the run, for the one who waits for it to call for something."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from edge_agent.client import RunState


class News:
    """Where states come in, and where they are waited for."""

    def __init__(self) -> None:
        self.latest: RunState | None = None  # None: nothing has been heard of the run yet
        self._changed = asyncio.Event()

    @property
    def is_over(self) -> bool:
        return self.latest is not None and self.latest.run_over

    def tell(self, state: RunState) -> None:
        self.latest = state
        self.look_again()

    def look_again(self) -> None:
        """Have everyone who waits ask anew whether the latest state is the awaited one."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def next(self, is_awaited: Callable[[RunState], bool]) -> RunState:
        """The first state from now on that is awaited; states that were passed over are not seen."""
        while True:
            changed = self._changed
            if self.latest and is_awaited(self.latest):
                return self.latest
            await changed.wait()

    async def while_run_lasts(self, work: Coroutine[Any, Any, None]) -> None:
        """Do it, or leave it undone when the run ends."""
        working = asyncio.create_task(work)
        ending = asyncio.create_task(self.next(lambda state: state.run_over))
        try:
            await asyncio.wait((working, ending), return_when=asyncio.FIRST_COMPLETED)
        finally:
            working.cancel()
            ending.cancel()
            await asyncio.wait((working, ending))
        if not working.cancelled():
            working.result()
