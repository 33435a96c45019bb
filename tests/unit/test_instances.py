import asyncio

import pytest

from ecavg.cloud_server.door import admission
from ecavg.cloud_server.door.admission import Admission
from ecavg.cloud_server.door.instances import MAX_SEEN, Instances
from ecavg.cloud_server.door.limits import CallLimits
from ecavg.common.errors import ConflictError, InvalidError
from ecavg.common.rpc import Peer


def test_one_process_stays_however_often_it_comes() -> None:
    instances = Instances()
    assert all(instances.enter("a") for _ in range(5))


def test_restarted_agent_takes_the_place_of_the_process_before() -> None:
    instances = Instances()
    for number in range(3 * MAX_SEEN):
        assert instances.enter(f"{number}")


def test_of_two_processes_that_both_come_back_the_later_one_is_refused() -> None:
    instances = Instances()
    assert instances.enter("first")
    assert instances.enter("second")
    assert instances.enter("first")
    assert not instances.enter("second")
    assert instances.is_refused("second")
    assert instances.enter("first")
    assert not instances.enter("second")


def test_it_is_the_later_one_whichever_comes_back_last() -> None:
    instances = Instances()
    for name in ("first", "second", "first"):
        assert instances.enter(name)
    instances.leave("first")
    assert instances.enter("second")
    assert instances.enter("first")
    assert instances.is_refused("second")


def test_word_of_a_process_that_is_gone_proves_nothing() -> None:
    """Its Watch may come late, on a slow way; but then it does not stay open."""
    instances = Instances()
    for name in ("gone", "new", "gone"):
        assert instances.enter(name)
    instances.leave("gone")
    assert instances.enter("new")
    assert instances.enter("new")


def test_every_further_device_is_refused() -> None:
    instances = Instances()
    for name in ("first", "second", "first"):
        instances.enter(name)
    assert not instances.enter("second")
    assert instances.enter("third")
    assert instances.enter("first")
    assert not instances.enter("third")


@pytest.fixture
def gate() -> Admission:
    return Admission(None, CallLimits(1e9))


async def watch(gate: Admission, agent_id: str, instance_id: str) -> None:
    """Open a Watch that stays until it is cut off."""
    with gate("Watch", Peer(None, agent_id, instance_id=instance_id)):
        await asyncio.Event().wait()


async def opened(gate: Admission, agent_id: str, instance_id: str) -> asyncio.Task[None]:
    task = asyncio.create_task(watch(gate, agent_id, instance_id))
    await asyncio.sleep(0)
    return task


async def closed(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task])


async def test_second_device_is_known_after_a_time_without_any_watch(gate: Admission) -> None:
    await closed(await opened(gate, "a", "first"))
    second = await opened(gate, "a", "second")
    first = await opened(gate, "a", "first")
    again = await opened(gate, "a", "second")
    with pytest.raises(ConflictError):
        await again
    assert not first.done()
    for task in (first, second):
        await closed(task)
    with pytest.raises(ConflictError):
        await watch(gate, "a", "second")


async def test_what_strangers_call_themselves_takes_no_more_and_more_memory(
    gate: Admission, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission, "_MAX_ABSENT", 10)
    stays = await opened(gate, "stays", "it")
    for number in range(50):
        await closed(await opened(gate, f"stranger-{number}", "it"))
    assert set(gate._watches) == set(gate._instances) == {"stays"}
    assert list(gate._instances_of_absent) == [f"stranger-{number}" for number in range(40, 50)]
    await closed(stays)
    with pytest.raises(InvalidError, match="at most 64 characters"):
        await watch(gate, "a", 65 * "x")
