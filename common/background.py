"""Background work, whose errors are never lost: they end the work that it runs beside."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any


@asynccontextmanager
async def beside(*work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run the work for as long as the body runs, and cancel it at the body's end.

    Raises:
        Exception: what a piece of the work raised; the body is cancelled then.
    """
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(each) for each in work]
            yield
            for task in tasks:
                task.cancel()
    except ExceptionGroup as raised:
        raise raised.exceptions[0] from None
