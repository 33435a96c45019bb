"""That the harness notices harm: else no attack here could fail."""

from pathlib import Path

import pytest

from tests.hostile.target import Agent, Target, chunk, header, refusal_of, shard

CONTENT = shard(2000, first_pixel=(1 << 22) + 1)


def test_upload_that_is_left_behind_is_noticed(server: Target, attacker: Agent) -> None:
    with pytest.raises(AssertionError, match=r"-[0-9a-f]{64}"), server.unharmed():
        refusal_of(lambda: attacker.send(header(CONTENT, "data"), chunk(CONTENT[:-1])))
    with server.unharmed():
        attacker.send(header(CONTENT, "data", offset=len(CONTENT) - 1), chunk(CONTENT[-1:]))


def test_memory_that_grows_is_noticed(server: Target, attacker: Agent) -> None:
    with pytest.raises(AssertionError, match="peak_bytes"), server.unharmed(growth_bytes=-(1 << 20)):
        attacker.join()


def test_line_of_a_crash_in_the_log_is_noticed(server: Target) -> None:
    log: Path = server.command.output_path
    with pytest.raises(AssertionError, match="Traceback"), server.unharmed(), log.open("a") as file:
        file.write("Traceback (most recent call last):\n")
