"""Uploads that no good agent makes: what the messages say, and in which order they come."""

from common.errors import Reason
from tests.hostile.target import Agent, Target, chunk, header, refusal_of, shard


def test_chunk_before_header_is_refused(target: Target, attacker: Agent) -> None:
    refused = refusal_of(lambda: attacker.send(chunk(shard(4)), header(shard(4), "data")))
    assert refused.reason is Reason.MALFORMED_REQUEST
