"""What comes at once is recorded at once: the groups of the ledger, with a real store."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from ecavg.cloud_server.contribution import Decision
from ecavg.cloud_server.store import Store
from ecavg.common.errors import InvalidError, NotFoundError, StorageError
from ecavg.common.run_state import Outcome, Verdict
from tests.unit.world import hurry, world


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)


def transactions_of(store: Store) -> list[str]:
    """Return a list that grows with every transaction of the store from now on."""
    seen: list[str] = []
    store._database.set_trace_callback(lambda sql: seen.append(sql) if sql == "BEGIN IMMEDIATE" else None)
    return seen


async def test_contributions_that_come_at_once_share_a_transaction(tmp_path: Path) -> None:
    async with world(tmp_path, min_agents=20) as here:
        contributions = [await here.contribution_of(f"agent-{number}") for number in range(10)]
        transactions = transactions_of(here.store)
        verdicts = await asyncio.gather(
            *(here.desk.contribute(each.agent_id, 1, each) for each in contributions)
        )
        assert {verdict.outcome for verdict in verdicts} == {Outcome.ACCEPTED}
        assert len(transactions) == 1
        assert len(here.store.contributions(1)) == len(here.ledger.round.contributions) == 10


async def test_contribution_that_is_refused_harms_none_that_came_with_it(tmp_path: Path) -> None:
    async with world(tmp_path, min_agents=9) as here:
        good = [await here.contribution_of(f"agent-{number}") for number in range(3)]
        missing = replace(await here.contribution_of("bad"), weights_digest="e" * 64)
        calls = [
            here.desk.contribute(each.agent_id, number, each)
            for each, number in [(good[0], 1), (missing, 1), (good[1], 7), (good[2], 1)]
        ]
        first, second, third, fourth = await asyncio.gather(*calls, return_exceptions=True)
        assert isinstance(second, NotFoundError)
        assert isinstance(third, InvalidError)
        assert isinstance(first, Verdict)
        assert first == fourth == Verdict(Outcome.ACCEPTED)
        recorded = [row.agent_id for row in here.store.contributions(1)]
        assert recorded == list(here.ledger.round.contributions) == ["agent-0", "agent-2"]


async def test_disk_that_refuses_a_group_refuses_all_of_it_and_takes_it_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(tmp_path, min_agents=9) as here:
        contributions = [await here.contribution_of(f"agent-{number}") for number in range(3)]

        async def contribute_all() -> list[Verdict | BaseException]:
            calls = (here.desk.contribute(each.agent_id, 1, each) for each in contributions)
            return await asyncio.gather(*calls, return_exceptions=True)

        record = here.store.record_contribution

        def refuse(number: int, decision: Decision) -> None:
            record(number, decision)
            if decision.agent_id == "agent-1":
                raise StorageError("full")

        monkeypatch.setattr(here.store, "record_contribution", refuse)
        assert all(isinstance(answer, StorageError) for answer in await contribute_all())
        assert here.store.contributions(1) == []
        assert here.ledger.round.contributions == {}
        monkeypatch.undo()
        assert await contribute_all() == [Verdict(Outcome.ACCEPTED)] * 3
        assert len(here.store.contributions(1)) == 3
