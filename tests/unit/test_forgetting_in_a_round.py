"""Agents that are forgotten while the server serves: what becomes of the round, its job and the uploads."""

import asyncio
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ecavg.cloud_server import ledger
from ecavg.cloud_server.jobs import (
    AgentAudit,
)
from ecavg.cloud_server.upkeep import retired
from ecavg.cloud_server.upkeep.forgotten import ask_to_forget, forgettings
from ecavg.common.errors import (
    NotFoundError,
    Reason,
    StorageError,
    UnavailableError,
)
from ecavg.common.run_state import Outcome, Phase
from ecavg.common.transfer import Blob
from tests.unit.test_metrics import values
from tests.unit.world import World, hurry, world, write_weights


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)


async def forgotten(here: World, agent_id: str) -> None:
    pseudonym = ask_to_forget(here.store, agent_id, 1.0)
    await here.until(
        lambda: any(row.pseudonym == pseudonym and row.done_at for row in forgettings(here.store))
    )


async def test_open_round_goes_on_without_an_agent_that_is_forgotten(tmp_path: Path) -> None:
    async with world(tmp_path, min_agents=2) as here:
        assert await here.contribute("gone") is Outcome.ACCEPTED
        await forgotten(here, "gone")
        assert here.standing.state_for("gone").outcome is None
        assert here.standing.state_for().num_contributions == 0
        assert (await here.status.read())["agents"] == []
        with pytest.raises(NotFoundError) as refused:
            await here.desk.query_upload("gone", "weights", "a" * 64)
        assert refused.value.reason is Reason.UNKNOWN_AGENT
        for name in ("first", "second"):
            assert await here.contribute(name) is Outcome.ACCEPTED
        await here.until(lambda: here.standing.state_for().round == 2)
        assert [each["agent_id"] for each in here.report()["agents"]] == ["first", "second"]


async def test_job_is_done_again_without_an_agent_that_is_forgotten(tmp_path: Path) -> None:
    async with world(tmp_path, min_agents=2) as here:
        here.trainer.is_slow = True
        for name in ("gone", "stays"):
            assert await here.contribute(name) is Outcome.ACCEPTED
        await here.until(lambda: here.standing.state_for().phase is Phase.FINE_TUNING)
        await forgotten(here, "gone")
        await here.until(lambda: here.standing.state_for().round == 2)
        jobs = [[item.agent_id for item in job.contributions] for job in here.trainer.jobs[1:]]
        assert jobs == [["gone", "stays"], ["stays"]]
        assert here.trainer.jobs[-1].attempt == 1
        assert [each["agent_id"] for each in here.report()["agents"]] == ["stays"]


async def test_round_of_which_nobody_is_left_fails_and_the_next_one_opens(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        here.trainer.is_slow = True
        assert await here.contribute("gone") is Outcome.ACCEPTED
        await here.until(lambda: here.standing.state_for().phase is Phase.FINE_TUNING)
        await forgotten(here, "gone")
        await here.until(lambda: here.standing.state_for().round == 2)
        assert here.report()["failure"] == "every agent that contributed is forgotten"


async def test_upload_under_way_of_an_agent_that_is_forgotten_ends_and_leaves_nothing(tmp_path: Path) -> None:
    async with world(tmp_path) as here:
        await here.desk.join("gone")
        write_weights(tmp_path / "upload", 1)
        content = await asyncio.to_thread((tmp_path / "upload").read_bytes)
        blob = Blob(hashlib.sha256(content).hexdigest(), len(content))

        async def receive() -> None:
            async with here.desk.receive("gone", "weights", blob, 0) as upload:
                await upload.write(content[:50])
                await forgotten(here, "gone")
                await upload.write(content[50:])

        with pytest.raises(UnavailableError):
            await receive()
        assert list((tmp_path / "partial").iterdir()) == []
        with pytest.raises(NotFoundError):
            await receive()


async def test_who_is_forgotten_as_a_model_is_published_is_in_no_metric(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(tmp_path, min_agents=2, agent_labels=True) as here:
        names = ("gone", "stays")
        here.trainer.audit = tuple(
            AgentAudit(agent_id=name, update_norm=1.0, norm_ratio=1.0) for name in names
        )
        set_audit = here.metrics.set_audit

        def after_somebody_left(audit: Sequence[AgentAudit]) -> None:
            set_audit(audit)
            assert values(here.metrics.registry, "ecavg_server_agent_flagged") == {"stays": 0.0}

        def leave(*_: object) -> None:  # published, and the lock is free again
            here.ledger.expel("gone")

        monkeypatch.setattr(here.metrics, "set_scores", leave)
        monkeypatch.setattr(here.metrics, "set_audit", after_somebody_left)
        for name in names:
            assert await here.contribute(name) is Outcome.ACCEPTED
        await here.until(lambda: here.standing.state_for().round == 2)


async def test_forgotten_agent_may_join_anew_a_little_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(tmp_path) as here:
        assert (await here.desk.join("gone")).slot == 1
        await forgotten(here, "gone")
        with pytest.raises(NotFoundError, match="just been forgotten"):  # a call that was under way
            await here.desk.join("gone")
        monkeypatch.setattr(ledger, "CUT_OFF_SECONDS", 0.0)
        assert await here.contribute("gone") is Outcome.ACCEPTED


@pytest.mark.parametrize(
    "error", [StorageError("no space left on device"), KeyError("a fault that nobody foresaw")]
)
async def test_forgetting_is_tried_again_after_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    async with world(tmp_path, min_agents=2) as here:
        assert await here.contribute("gone") is Outcome.ACCEPTED
        remove, fails = retired.remove_blobs, True

        def failing_at_first(*args: Any, **kwargs: Any) -> int:
            nonlocal fails
            if fails:
                fails = False
                raise error
            return remove(*args, **kwargs)

        monkeypatch.setattr(retired, "remove_blobs", failing_at_first)
        await forgotten(here, "gone")
        assert not fails
        assert here.store.agents() == []
