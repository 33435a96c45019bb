"""The thread in which an agent does what blocks, one thing after the other, and when there is room."""

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from ecavg.common.files import is_full
from ecavg.common.rpc import Backoff

_T = TypeVar("_T")


class Worker:
    """One thread, and patience with a full disk: a write that failed for it is tried again.

    Args:
        say: called once when the disk is full, and once when it no longer is.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._say = say
        self._is_waiting = False

    def close(self) -> None:
        """Begin nothing more; what is under way is not waited for."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def run(self, function: Callable[..., _T], *args: Any) -> _T:
        """Call the function in the thread; once begun, it goes on though this is cancelled."""
        loop = asyncio.get_running_loop()
        return await self.when_there_is_room(lambda: loop.run_in_executor(self._thread, function, *args))

    async def when_there_is_room(self, write: Callable[[], Awaitable[_T]]) -> _T:
        """Await `write()`, again and again while the disk is full."""
        backoff = Backoff()
        while True:
            try:
                done = await write()
            except OSError as error:
                if not is_full(error):
                    raise
                self._tell(True, f"waiting: this device's disk is full ({error}): make room on it")
            else:
                self._tell(False, "there is room on this device's disk again")
                return done
            await asyncio.sleep(backoff())

    def _tell(self, is_waiting: bool, text: str) -> None:
        if is_waiting != self._is_waiting:
            self._is_waiting = is_waiting
            self._say(text)
