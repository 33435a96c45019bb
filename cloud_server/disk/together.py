"""What waits for the disk is done together: one flush serves everyone who waits at that moment."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

from ecavg.common.transfer import to_the_end

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class _Waiting(NamedTuple, Generic[_Item, _Result]):
    """An item, and the answer that its caller waits for."""

    item: _Item
    answer: "asyncio.Future[_Result]"

    def give(self, result: _Result | Exception) -> None:
        """Answer with the result, or raise the error where the caller waits."""
        if self.answer.done():
            return
        if isinstance(result, Exception):
            self.answer.set_exception(result)
        else:
            self.answer.set_result(result)


class Together(Generic[_Item, _Result]):
    """A piece of work that is done for many at once; whoever comes meanwhile waits for the next time.

    Args:
        work: does the work for all items, and returns for each of them its result, or an error that concerns
            this item alone. If it raises, the error is everyone's.
    """

    def __init__(self, work: Callable[[Sequence[_Item]], Awaitable[Sequence[_Result | Exception]]]) -> None:
        self._work = work
        self._waiting: list[_Waiting[_Item, _Result]] = []
        self._worker: asyncio.Task[None] | None = None

    async def do(self, item: _Item) -> _Result:
        """Return the item's result, or raise its error; a cancelled caller does not cut the work short."""
        waiting = _Waiting[_Item, _Result](item, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        if self._worker is None:
            self._worker = asyncio.create_task(self._work_off())
        return await to_the_end(waiting.answer)

    async def _work_off(self) -> None:
        """Do the work again and again until nobody waits."""
        try:
            while self._waiting:
                waiting, self._waiting = self._waiting, []
                await self._work_for(waiting)
        finally:
            self._worker = None
            # Only a worker that was cancelled leaves somebody without an answer, here and below.
            while self._waiting:
                self._waiting.pop().answer.cancel()

    async def _work_for(self, waiting: Sequence[_Waiting[_Item, _Result]]) -> None:
        try:
            results = await self._work([each.item for each in waiting])
            for each, result in zip(waiting, results, strict=True):
                each.give(result)
        except Exception as error:
            for each in waiting:
                each.give(error)
        finally:
            for each in waiting:
                each.answer.cancel()
