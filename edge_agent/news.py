"""The latest state of the run, and waiting for a state that calls for something."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from ecavg.common.run_state import RunState


class News:
    """The place where states come in, and where they are waited for."""

    def __init__(self) -> None:
        # None: nothing has been heard of the run yet.
        self.latest: RunState | None = None
        self._changed = asyncio.Event()

    @property
    def is_over(self) -> bool:
        """Return True if the run is known to be over."""
        return self.latest is not None and self.latest.run_over

    def tell(self, state: RunState) -> None:
        """Make this the latest state."""
        self.latest = state
        self.ask_again()

    def ask_again(self) -> None:
        """Have everyone who waits ask again whether the latest state is the awaited one."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def next(self, is_awaited: Callable[[RunState], bool]) -> RunState:
        """Return the first state from now on that is awaited; states may be passed over unseen."""
        while True:
            changed = self._changed
            if self.latest and is_awaited(self.latest):
                return self.latest
            await changed.wait()

    async def unless(self, is_in_vain: Callable[[RunState], bool], work: Coroutine[Any, Any, None]) -> bool:
        """Await the work, or leave it undone when there is a state in which it is in vain.

        Returns:
            True if the work is done.
        """
        working = asyncio.create_task(work)
        ending = asyncio.create_task(self.next(is_in_vain))
        try:
            await asyncio.wait((working, ending), return_when=asyncio.FIRST_COMPLETED)
        finally:
            working.cancel()
            ending.cancel()
            await asyncio.wait((working, ending))
        if not working.cancelled():
            working.result()
        return not working.cancelled()
