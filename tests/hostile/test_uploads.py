"""Uploads that no good agent makes: what their messages say, and in which order they come."""

from collections.abc import Callable, Sequence
from typing import Any

import grpc
import numpy as np
import pytest
from safetensors.numpy import save

from ecavg.common.errors import Reason
from ecavg.common.pb import ecavg_pb2 as pb
from ecavg.common.transfer import MAX_CHUNK_BYTES
from tests.hostile.target import IMAGE_SHAPE, Agent, Target, chunk, digest_of, header, refusal_of, shard

CONTENT = shard(1000, first_pixel=1 << 20)
HALF = len(CONTENT) // 2
LARGEST = 2**64 - 1


def varied(name: str) -> bytes:
    """Return a shard of random pixels, as large as CONTENT, that no other test has."""
    generator = np.random.default_rng(list(name.encode()))
    images = generator.integers(0, 256, (1000, *IMAGE_SHAPE), np.uint8)
    return save({"images": images, "labels": generator.integers(0, 10, 1000)})


Attack = Callable[[], Sequence[Any]]

ATTACKS: dict[str, tuple[Attack, Reason]] = {
    "empty stream": (list, Reason.MALFORMED_REQUEST),
    "empty message": (lambda: [pb.UploadRequest()], Reason.MALFORMED_REQUEST),
    "chunk before header": (lambda: [chunk(CONTENT), header(CONTENT, "data")], Reason.MALFORMED_REQUEST),
    "header twice": (lambda: [header(CONTENT, "data")] * 2, Reason.MALFORMED_REQUEST),
    "header after a chunk": (
        lambda: [header(CONTENT, "data"), chunk(CONTENT[:8]), header(CONTENT, "data")],
        Reason.MALFORMED_REQUEST,
    ),
    "empty message among chunks": (
        lambda: [header(CONTENT, "data"), chunk(CONTENT[:8]), pb.UploadRequest(), chunk(CONTENT[8:])],
        Reason.MALFORMED_REQUEST,
    ),
    "header alone": (lambda: [header(CONTENT, "data")], Reason.SIZE_MISMATCH),
    "chunk over 1 MiB": (
        lambda: [header(CONTENT, "data", size_bytes=1 << 30), chunk(bytes(MAX_CHUNK_BYTES + 1))],
        Reason.MALFORMED_REQUEST,
    ),
    "no kind": (lambda: [header(CONTENT, "data", kind=0), chunk(CONTENT)], Reason.MALFORMED_REQUEST),
    "unknown kind": (lambda: [header(CONTENT, "data", kind=99), chunk(CONTENT)], Reason.MALFORMED_REQUEST),
    "negative kind": (lambda: [header(CONTENT, "data", kind=-1), chunk(CONTENT)], Reason.MALFORMED_REQUEST),
    "no size": (lambda: [header(CONTENT, "data", size_bytes=0), chunk(CONTENT)], Reason.SIZE_LIMIT),
    "size of 2^64-1": (
        lambda: [header(CONTENT, "data", size_bytes=LARGEST), chunk(CONTENT)],
        Reason.SIZE_LIMIT,
    ),
    "weights larger than the model's": (
        lambda: [header(CONTENT, "weights", size_bytes=64 << 20), chunk(CONTENT)],
        Reason.SIZE_LIMIT,
    ),
    "offset without a beginning": (
        lambda: [header(CONTENT, "data", offset=HALF), chunk(CONTENT[HALF:])],
        Reason.OFFSET_MISMATCH,
    ),
    "offset beyond the size": (
        lambda: [header(CONTENT, "data", offset=len(CONTENT) + 1), chunk(CONTENT)],
        Reason.OFFSET_MISMATCH,
    ),
    "offset of 2^64-1": (
        lambda: [header(CONTENT, "data", offset=LARGEST), chunk(CONTENT)],
        Reason.OFFSET_MISMATCH,
    ),
    "digest of something else": (
        lambda: [header(CONTENT, "data", digest=digest_of(b"")), chunk(CONTENT)],
        Reason.DIGEST_MISMATCH,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_senseless_upload_is_refused_and_leaves_nothing(target: Target, attacker: Agent, name: str) -> None:
    messages, reason = ATTACKS[name]
    held = target.partials()
    assert refusal_of(lambda: attacker.send(*messages())).reason is reason
    left = target.partials() - held
    for partial in left:  # bytes that have passed the gate are kept, for an agent that lost its connection
        assert reason is Reason.MALFORMED_REQUEST
        assert "after" in name or "among" in name
        (target.state_dir / "partial" / partial).unlink()


def test_message_that_no_chunk_needs_does_not_get_into_the_process(target: Target, attacker: Agent) -> None:
    """Check that gRPC itself refuses the message before reading it, with a status of its own."""
    with pytest.raises(grpc.RpcError) as refused:
        attacker.send(header(CONTENT, "data", size_bytes=1 << 30), chunk(bytes(32 << 20)))
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def twice(content: bytes) -> Sequence[bytes]:
    return content, content


def one_chunk_twice(content: bytes) -> Sequence[bytes]:
    return content[:HALF], content[:HALF], content[HALF:]


def overlapping(content: bytes) -> Sequence[bytes]:
    return content[: HALF + 100], content[HALF:]


def exchanged(content: bytes) -> Sequence[bytes]:
    return content[HALF:], content[:HALF]


def exchanged_behind_the_header(content: bytes) -> Sequence[bytes]:
    return content[:HALF], content[-7:], content[HALF:-7]


def cut_off(content: bytes) -> Sequence[bytes]:
    return (content[:HALF],)


@pytest.mark.parametrize(
    ("chunks_of", "reason", "num_kept"),
    [
        (twice, Reason.SIZE_MISMATCH, len(CONTENT)),
        (one_chunk_twice, Reason.SIZE_MISMATCH, 2 * HALF),
        (overlapping, Reason.SIZE_MISMATCH, HALF + 100),
        (exchanged, Reason.INVALID_FILE, 0),
        (exchanged_behind_the_header, Reason.DIGEST_MISMATCH, 0),
        (cut_off, Reason.SIZE_MISMATCH, HALF),
    ],
)
def test_duplicate_and_overlapping_chunks_are_refused(
    target: Target, attacker: Agent, chunks_of: Any, reason: Reason, num_kept: int
) -> None:
    content = varied(chunks_of.__name__)
    refused = refusal_of(lambda: attacker.send(header(content, "data"), *map(chunk, chunks_of(content))))
    assert refused.reason is reason
    # What arrived before it is kept: it goes on only where it ends, and does not pass as what it is not.
    assert attacker.query(digest_of(content), "data") == (num_kept, False)
    if num_kept:
        assert refusal_of(lambda: attacker.upload(content, "data")).reason is Reason.OFFSET_MISMATCH
        chunks = [chunk(content[num_kept:])] if num_kept < len(content) else []
        rest = header(content, "data", offset=num_kept), *chunks
        if content[:num_kept] == b"".join(chunks_of(content))[:num_kept]:
            assert attacker.send(*rest).received_bytes == len(content)
        else:
            assert refusal_of(lambda: attacker.send(*rest)).reason is Reason.DIGEST_MISMATCH


def test_size_that_shrinks_on_the_way_is_refused(target: Target, attacker: Agent) -> None:
    content = varied("shrinking")
    refusal_of(lambda: attacker.send(header(content, "data"), chunk(content[:HALF])))
    assert attacker.query(digest_of(content), "data") == (HALF, False)
    smaller = header(content, "data", size_bytes=HALF - 1, offset=HALF)
    assert refusal_of(lambda: attacker.send(smaller)).reason is Reason.SIZE_MISMATCH
    assert attacker.query(digest_of(content), "data") == (0, False)


def test_bytes_that_passed_as_one_kind_do_not_pass_as_another(target: Target, attacker: Agent) -> None:
    small = shard(40, first_pixel=1 << 21)
    refusal_of(lambda: attacker.send(header(small, "data"), chunk(small[:-100])))
    rest = header(small, "weights", offset=len(small) - 100)
    assert refusal_of(lambda: attacker.send(rest, chunk(small[-100:]))).reason is Reason.SCHEMA_MISMATCH
    assert attacker.query(digest_of(small), "data") == (0, False)
