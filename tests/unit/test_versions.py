"""The version of the protocol that an agent and a server agree on, and what they say where there is none."""

from pathlib import Path

import pytest

from ecavg.cloud_server import desk
from ecavg.common.config import RunConfig
from ecavg.common.errors import InvalidError, Reason, RunError
from ecavg.common.layers import preset_names, read_preset
from ecavg.common.pb import ecavg_pb2 as pb
from ecavg.common.protocol import SPOKEN, Versions, agree
from tests.unit.test_agent_client import client_of, unary
from tests.unit.world import world

ONE = Versions(1, 1)


@pytest.mark.parametrize(
    ("agent", "server", "version"),
    [
        (ONE, ONE, 1),
        (Versions(1, 2), ONE, 1),
        (ONE, Versions(1, 2), 1),
        (Versions(1, 2), Versions(1, 2), 2),
        (Versions(2, 3), Versions(1, 2), 2),
        (Versions(1, 2), Versions(2, 3), 2),
        (Versions(1, 4), Versions(2, 3), 3),
    ],
)
def test_highest_common_version_is_used(agent: Versions, server: Versions, version: int) -> None:
    assert agree(agent, server) == version


@pytest.mark.parametrize(
    ("agent", "server", "line"),
    [
        (Versions(2, 3), ONE, "the agent speaks protocol 2 to 3, the server 1: update the server"),
        (ONE, Versions(2, 3), "the agent speaks protocol 1, the server 2 to 3: update the agent"),
        (Versions(0, 0), ONE, "the agent speaks protocol 0, the server 1: update the agent"),
    ],
)
def test_none_in_common_says_which_side_to_update(agent: Versions, server: Versions, line: str) -> None:
    with pytest.raises(InvalidError) as refused:
        agree(agent, server)
    assert (str(refused.value), refused.value.reason) == (line, Reason.PROTOCOL_MISMATCH)


@pytest.mark.parametrize("preset", preset_names())
def test_what_an_agent_is_told_of_a_run_leaves_out_no_value(preset: str) -> None:
    run = RunConfig.model_validate(read_preset(preset)["run"])
    assert RunConfig.model_validate_json(run.model_dump_json(exclude_defaults=True)) == run


async def test_agents_of_the_version_before_are_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(tmp_path) as here:
        monkeypatch.setattr(desk, "SPOKEN", Versions(1, 2))
        assert (await here.desk.join("of-before", (), Versions(1, 1))).protocol_version == 1
        assert (await here.desk.join("of-now", (), Versions(1, 2))).protocol_version == 2
        monkeypatch.setattr(desk, "SPOKEN", Versions(2, 3))
        with pytest.raises(InvalidError, match="update the agent"):
            await here.desk.join("of-before", (), Versions(1, 1))


async def test_version_that_was_not_offered_is_not_taken() -> None:
    reply = pb.JoinReply(run_id="r", run_json="{}", slot=1, num_partitions=1)
    assert (await client_of(Join=unary(reply)).join()).run_id == "r"
    reply.protocol_version = SPOKEN.newest + 1
    with pytest.raises(RunError, match="a protocol version that was not offered"):
        await client_of(Join=unary(reply)).join()
