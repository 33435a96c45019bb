"""Background work: it lasts as long as what it runs beside, and what it raises is not lost."""

import asyncio

import pytest

from ecavg.common.background import beside


async def for_ever(ended: list[str]) -> None:
    try:
        await asyncio.Event().wait()
    finally:
        ended.append("cancelled")


async def fail() -> None:
    await asyncio.sleep(0)
    raise RuntimeError("the disk is on fire")


async def test_work_is_cancelled_at_the_end_of_the_body() -> None:
    ended: list[str] = []
    async with beside(for_ever(ended)):
        await asyncio.sleep(0)
    assert ended == ["cancelled"]


async def test_what_the_work_raises_ends_the_body_and_is_raised_as_it_is() -> None:
    ended: list[str] = []
    with pytest.raises(RuntimeError, match="on fire"):
        async with beside(fail(), for_ever(ended)):
            await asyncio.Event().wait()
    assert ended == ["cancelled"]


async def test_what_the_body_raises_is_raised_as_it_is() -> None:
    with pytest.raises(ValueError, match="no"):
        async with beside(for_ever([])):
            raise ValueError("no")


async def test_work_that_has_ended_changes_nothing() -> None:
    async with beside(asyncio.sleep(0)):
        await asyncio.sleep(0)
        await asyncio.sleep(0)
