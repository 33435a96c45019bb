"""The members of a round: the agents whose contributions its model is made of."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cloud_server.contribution import Contribution
from cloud_server.jobs import Job
from cloud_server.state_dir import blob_path
from cloud_server.trainer.aggregation import coefficients
from common.config import RunConfig
from common.schema import read_header
from common.wire import Base, encoding_of, is_encoded, needs_base


@dataclass(frozen=True)
class Member:
    """One agent's part in the round's model."""

    contribution: Contribution
    # The file of weights that the agent has sent, encoded as the run's `wire` says.
    sent_path: Path
    # The file of weights that the model is made of: decoded, and clipped or aligned where that was done.
    weights_path: Path
    # What the weights count in a mean, as a multiple of one example or one agent.
    coefficient: float

    @property
    def agent_id(self) -> str:
        """Return the agent's id."""
        return self.contribution.agent_id


def members_of(job: Job, blobs_dir: Path, scratch: Path) -> list[Member]:
    """Return a round's members in agent-id order, so that results do not depend on who came first.

    Args:
        scratch: the folder where weights that travelled encoded will be decoded to.

    Raises:
        RunError: there is nothing to weight the contributions by.
    """
    contributions = sorted(job.contributions, key=lambda contribution: contribution.agent_id)
    weighted = coefficients([item.num_examples for item in contributions], job.run.weights)
    members = []
    for item, coefficient in zip(contributions, weighted, strict=True):
        sent_path = blob_path(blobs_dir, item.weights_digest)
        decoded_path = scratch / f"decoded-{item.agent_id}.safetensors"
        weights_path = decoded_path if is_encoded(job.run) else sent_path
        members.append(Member(item, sent_path, weights_path, coefficient))
    return members


def common_start(members: Sequence[Member]) -> str | None:
    """Return the digest of the weights that every member started from; None: there are no such weights."""
    starts = {member.contribution.initial_digest for member in members}
    return starts.pop() if len(starts) == 1 else None


def base_of(job: Job, blobs_dir: Path) -> Base | None:
    """Return the base of differences in a round: its initial weights."""
    digest = job.initial_weights
    return Base(blob_path(blobs_dir, digest), digest) if digest else None


def all_hold_base(members: Sequence[Member], run: RunConfig) -> bool:
    """Return True if every member holds the base of differences, as one that has sent some does."""
    return needs_base(run) and all(
        encoding_of(read_header(member.sent_path)).wire == run.wire for member in members
    )
