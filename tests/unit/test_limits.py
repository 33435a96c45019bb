"""Calls in a second and at once, of one caller; bytes of one agent and of all."""

import asyncio
import random
import threading
import time
from collections.abc import Callable, Collection

import pytest

from ecavg.cloud_server.door import limits
from ecavg.cloud_server.door.limits import BURST_SECONDS, OPEN_CALLS, CallLimits
from ecavg.cloud_server.intake.budgets import LEAST_BYTES, MAX_FILES, Budgets
from ecavg.common.errors import BudgetError, BusyError, Reason


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def num_calls(calls: CallLimits, caller: str) -> int:
    """How many the caller can make now, one after the other."""
    number = 0
    while True:
        try:
            with calls.call(caller):
                number += 1
        except BusyError:
            return number


def test_caller_has_a_burst_and_then_its_rate() -> None:
    clock = Clock()
    calls = CallLimits(5, clock)
    assert num_calls(calls, "a") == 5 * BURST_SECONDS
    clock.now += 0.1
    assert num_calls(calls, "a") == 0
    with pytest.raises(BusyError, match="more than 5 calls a second") as refused, calls.call("a"):
        pass
    assert refused.value.reason is Reason.CALL_RATE
    clock.now += 0.5
    assert num_calls(calls, "a") == 3
    assert num_calls(calls, "b") == 5 * BURST_SECONDS
    clock.now += 1e9
    assert num_calls(calls, "a") == 5 * BURST_SECONDS


def test_caller_has_so_many_calls_open_and_a_refused_one_costs_nothing() -> None:
    calls = CallLimits(1000, Clock())
    entered = [calls.call("a") for _ in range(OPEN_CALLS)]
    for call in entered:
        call.__enter__()
    for _ in range(3):
        with pytest.raises(BusyError) as refused, calls.call("a"):
            pass
        assert refused.value.reason is Reason.OPEN_CALLS
    with calls.call("b"):
        pass
    entered[0].__exit__(None, None, None)
    with calls.call("a"):
        pass


def test_slow_rate_still_lets_a_call_through() -> None:
    clock = Clock()
    calls = CallLimits(0.01, clock)
    assert num_calls(calls, "a") == 1
    clock.now += 100
    assert num_calls(calls, "a") == 1


def test_any_number_of_names_takes_bounded_memory_and_no_open_call_is_forgotten() -> None:
    calls = CallLimits(1000, Clock())
    entered = [calls.call("watching") for _ in range(OPEN_CALLS)]
    for call in entered:
        call.__enter__()
    for number in range(3 * limits._KEPT_CALLERS):
        with calls.call(f"name {number}"):
            pass
    assert len(calls._callers) <= limits._KEPT_CALLERS + 1
    with pytest.raises(BusyError), calls.call("watching"):
        pass


def budgets(agent_bytes: int, round_bytes: int, files: dict[str, int] | None = None) -> Budgets:
    return Budgets(agent_bytes, round_bytes, lambda agents: {agent: dict(files or {}) for agent in agents})


def test_agent_may_send_twice_its_budget_in_a_round() -> None:
    book = budgets(1 << 20, 1 << 30)
    for _ in range(8):
        book.spend("a", 1 << 18)
    book.check_sent("a")
    with pytest.raises(BudgetError) as refused:
        book.check_sent("a", 1)
    assert refused.value.reason is Reason.AGENT_BUDGET
    with pytest.raises(BudgetError, match="max_agent_bytes"):
        book.spend("a", 1)
    book.spend("b", 1 << 18)
    book.begin_round()
    book.spend("a", 1 << 18)


def test_all_agents_share_the_rounds_budget() -> None:
    book = budgets(1 << 20, 3 << 20)
    for name in "abc":
        book.spend(name, 1 << 20)
    with pytest.raises(BudgetError, match="max_round_bytes") as refused:
        book.spend("d", 1)
    assert refused.value.reason is Reason.ROUND_BUDGET
    book.begin_round()
    book.spend("d", 1)


def test_small_messages_count_for_more_than_their_bytes() -> None:
    book = budgets(10 * LEAST_BYTES, 1 << 30)
    for _ in range(20):
        book.spend("a", 1)
    with pytest.raises(BudgetError):
        book.spend("a", 1)


async def test_what_waits_to_be_contributed_is_bounded() -> None:
    book = budgets(1 << 20, 1 << 30, {"there": 1 << 19})
    await book.check_files("a", {"coming": 1 << 19})
    with pytest.raises(BudgetError, match=r"1048577 bytes of agent a would wait .*1048576 may") as refused:
        await book.check_files("a", {"coming": (1 << 19) + 1})
    assert refused.value.reason is Reason.AGENT_BUDGET
    book.note_file("a", "coming", LEAST_BYTES)  # it broke off there
    await book.check_files("a", {"coming": 1 << 19})
    with pytest.raises(BudgetError):
        await book.check_files("a", {"other": 1 << 19})
    book.note_file("a", "coming", None)
    await book.check_files("a", {"other": 1 << 19})


async def test_files_are_counted_anew_after_a_contribution() -> None:
    files = {"there": 1 << 20}
    book = Budgets(1 << 20, 1 << 30, lambda agents: {agent: dict(files) for agent in agents})
    with pytest.raises(BudgetError):
        await book.check_files("a", {"coming": 1})
    files.clear()
    with pytest.raises(BudgetError):  # nobody has said that anything changed
        await book.check_files("a", {"coming": 1})
    book.forget_sizes_of("a")
    await book.check_files("a", {"coming": 1})


class Disk:
    """Files of an agent; who looks at them is held until it is let go."""

    def __init__(self, **sizes: int) -> None:
        self.sizes = sizes
        self.looked = asyncio.Event()
        self.release = threading.Event()
        self._loop = asyncio.get_running_loop()

    def look(self, agents: Collection[str]) -> dict[str, dict[str, int]]:
        found = {agent: dict(self.sizes) for agent in agents}
        self._loop.call_soon_threadsafe(self.looked.set)
        assert self.release.wait(10)
        return found


@pytest.mark.parametrize("forget", [Budgets.forget_sizes, lambda book: book.forget_sizes_of("a")])
async def test_files_removed_while_they_are_looked_at_are_not_counted(
    forget: Callable[[Budgets], None],
) -> None:
    disk = Disk(there=1 << 20)
    book = Budgets(1 << 20, 1 << 30, disk.look)
    checking = asyncio.create_task(book.check_files("a", {"coming": 1 << 20}))
    await disk.looked.wait()
    disk.sizes.clear()
    forget(book)
    disk.release.set()
    await checking


async def test_what_is_noted_while_files_are_looked_at_is_newer() -> None:
    disk = Disk(kept=LEAST_BYTES, discarded=1 << 20)
    book = Budgets(1 << 20, 1 << 30, disk.look)
    checking = asyncio.create_task(book.check_files("a", {}))
    await disk.looked.wait()
    book.note_file("a", "kept", 1 << 19)
    book.note_file("a", "discarded", None)
    disk.release.set()
    await checking
    await book.check_files("a", {"coming": 1 << 19})
    with pytest.raises(BudgetError):
        await book.check_files("a", {"coming": (1 << 19) + 1})


async def test_number_of_files_is_bounded() -> None:
    book = budgets(1 << 40, 1 << 50, {str(number): 0 for number in range(MAX_FILES)})
    with pytest.raises(BudgetError, match="fewer shards"):
        await book.check_files("a", {"one more": 1})


async def least_seconds(book: Budgets) -> float:
    """Return the least seconds that one check of known files takes of the event loop's thread."""
    took = []
    for _ in range(20):
        started = time.thread_time()
        await book.check_files("a", {"coming": 1})
        took.append(time.thread_time() - started)
    return min(took)


async def test_check_takes_no_longer_where_many_files_are() -> None:
    few = budgets(1 << 40, 1 << 50, {"there": 0})
    many = budgets(1 << 40, 1 << 50, {str(number): 0 for number in range(MAX_FILES - 1)})
    assert await least_seconds(many) < 20 * await least_seconds(few)  # it was 500 times as long


async def test_sum_is_that_of_the_files_whatever_comes_and_goes() -> None:
    draw = random.Random(1)
    files = {name: draw.randrange(1 << 16) for name in "abcdef"}
    there, book = dict(files), budgets(1 << 20, 1 << 30, files)
    await book.check_files("a", {})
    for _ in range(200):
        name, size = draw.choice("abcdefgh"), draw.choice([None, draw.randrange(1 << 16)])
        book.note_file("a", name, size)
        there.pop(name, None)
        if size is not None:
            there[name] = size
        others = sum(max(there[each], LEAST_BYTES) for each in there if each != "a")
        await book.check_files("a", {"a": (1 << 20) - others})
        with pytest.raises(BudgetError, match=str((1 << 20) + 1)):
            await book.check_files("a", {"a": (1 << 20) - others + 1})
