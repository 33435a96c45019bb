"""One agent's part in a round: the one description that the round, its records and its job share."""

from dataclasses import dataclass, field
from typing import NamedTuple

from ecavg.common.errors import Reason
from ecavg.common.run_state import Outcome


@dataclass(frozen=True)
class Contribution:
    """What one agent commits in a round. The digests name blobs that are stored and checked."""

    agent_id: str
    # The digest of the weights, encoded as the run's `wire` says.
    weights_digest: str
    # The digests of the shards, in the agent's order; none: the agent shares no data.
    shard_digests: tuple[str, ...]
    # How many examples the agent has trained on.
    num_examples: int
    # The digest of the weights that pre-training started from; None: the agent's own.
    initial_digest: str | None = None
    # The figures below are for the report only: they do not make a contribution another one.
    score_local: float | None = field(default=None, compare=False)
    # How many examples the shards hold.
    num_shared: int = field(default=0, compare=False)
    # How many global models have been published since the one that pre-training started from.
    staleness: int = field(default=0, compare=False)

    @property
    def blob_digests(self) -> tuple[str, ...]:
        """Return the digests of all blobs that the contribution names."""
        return self.weights_digest, *self.shard_digests


class Rejection(NamedTuple):
    """Why a contribution was refused, or left out of the model, and what its agent can do about it."""

    reason: Reason
    message: str


@dataclass(frozen=True)
class Decision:
    """How one agent's part in a round ended, as it is on record."""

    agent_id: str
    outcome: Outcome
    # When it was decided, in seconds since the epoch.
    at: float
    # The accepted contribution; None for the others, of which nothing is kept.
    contribution: Contribution | None = None
    # Why it was refused, or is late, or (accepted) why the model contains nothing of it.
    why: Rejection | None = None

    @property
    def is_counted(self) -> bool:
        """Return True if the round's model, once published, contains the contribution."""
        return self.outcome is Outcome.ACCEPTED and self.why is None
