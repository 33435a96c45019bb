"""The versions of the protocol: which ones this release speaks, and which one agent and server agree on.

A release that changes what a call means has a new version, and speaks the version before as well. So a fleet
need not be updated in one night: first the server, then one device after the other, or the other way round.
"""

from typing import NamedTuple

from ecavg.common.errors import InvalidError, Reason


class Versions(NamedTuple):
    """All versions from the oldest to the newest, both included."""

    oldest: int
    newest: int

    def __str__(self) -> str:
        return f"{self.oldest}" if self.oldest == self.newest else f"{self.oldest} to {self.newest}"


# What each version has brought is written in docs/protocol.md.
SPOKEN = Versions(oldest=1, newest=1)


def agree(agent: Versions, server: Versions) -> int:
    """Return the highest version that agent and server speak.

    Raises:
        InvalidError: PROTOCOL_MISMATCH, there is none. The message says which side to update.
    """
    version = min(agent.newest, server.newest)
    if version >= max(agent.oldest, server.oldest):
        return version
    behind = "agent" if agent.newest < server.oldest else "server"
    raise InvalidError(
        f"the agent speaks protocol {agent}, the server {server}: update the {behind}",
        Reason.PROTOCOL_MISMATCH,
    )
