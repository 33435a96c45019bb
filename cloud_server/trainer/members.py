"""The members of a round, which are the agents whose contributions make the round's model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ecavg.cloud_server.contribution import Contribution
from ecavg.cloud_server.jobs import Job
from ecavg.cloud_server.state_dir import blob_path
from ecavg.cloud_server.trainer.aggregation import coefficients
from ecavg.cloud_server.trainer.staleness import discount, shift
from ecavg.common.config import RunConfig
from ecavg.common.schema import read_header
from ecavg.common.wire import Base, decode, encoding_of, is_encoded, needs_base


@dataclass(frozen=True)
class Member:
    """One agent's part in the round's model."""

    contribution: Contribution
    # The file of the weights that the agent has sent, in the encoding of the run's `wire`.
    sent_path: Path
    # The file of the weights from which the model is made: decoded, and shifted, clipped or aligned if
    # necessary.
    weights_path: Path
    # The coefficient of the weights in a mean, as a multiple of one example or one agent; it falls with the
    # staleness of the contribution.
    coefficient: float

    @property
    def agent_id(self) -> str:
        """Return the agent's id."""
        return self.contribution.agent_id


def members_of(job: Job, blobs_dir: Path, scratch: Path) -> list[Member]:
    """Return a round's members in agent-id order, so that results do not depend on the order of arrival.

    Args:
        job: the job of the round.
        blobs_dir: the directory of the blobs.
        scratch: the folder to which `make_weights` will write weights that are not used as they were sent.

    Raises:
        RunError: the mean is weighted by examples, and no contribution has any.
    """
    contributions = sorted(job.contributions, key=lambda contribution: contribution.agent_id)
    weighted = coefficients([item.num_examples for item in contributions], job.run.weights)
    members = []
    for item, coefficient in zip(contributions, weighted, strict=True):
        sent_path = blob_path(blobs_dir, item.weights_digest)
        own_path = scratch / f"own-{item.agent_id}.safetensors"
        weights_path = own_path if is_encoded(job.run) or item.staleness else sent_path
        members.append(Member(item, sent_path, weights_path, coefficient * discount(item.staleness)))
    return members


def make_weights(member: Member, job: Job, blobs_dir: Path) -> None:
    """Write the member's weights, if they are not used as they were sent: decode them, and shift stale ones.

    Raises:
        InvalidError, RunError: the weights cannot be decoded, or differ in names, shapes or dtypes.
        OSError: a file cannot be read or written.
    """
    contribution, base = member.contribution, base_of(job, blobs_dir)
    start = _base(contribution.initial_digest, blobs_dir) or base
    decoded_path = member.sent_path
    if is_encoded(job.run):
        decoded_path = member.weights_path
        decode(member.sent_path, decoded_path, base=start)
    if contribution.staleness:
        assert start
        assert base
        shift(decoded_path, start.path, base.path, member.weights_path)


def common_start(members: Sequence[Member], job: Job) -> str | None:
    """Return the digest of the weights from which every member started; None if members differ in that.

    The weights of stale members have been shifted, as if they had started from the round's initial weights.
    """
    starts = {
        job.initial_weights if member.contribution.staleness else member.contribution.initial_digest
        for member in members
    }
    return starts.pop() if len(starts) == 1 else None


def base_of(job: Job, blobs_dir: Path) -> Base | None:
    """Return the base of a round's differences, which are its initial weights; None if it has none."""
    return _base(job.initial_weights, blobs_dir)


def all_hold_base(members: Sequence[Member], run: RunConfig) -> bool:
    """Return True if every member has the base of the round's differences, or is stale.

    A member that has sent differences from the base must have it. A stale member may not have it, and gets
    the model as it is, so that the others need not.
    """
    return needs_base(run) and all(
        encoding_of(read_header(member.sent_path)).wire == run.wire for member in members
    )


def _base(digest: str | None, blobs_dir: Path) -> Base | None:
    return Base(blob_path(blobs_dir, digest), digest) if digest else None
