"""Several streams of one upload: what a broken one may still do, and what the next one finds."""

import asyncio
import hashlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from ecavg.cloud_server.intake.turns import Turns
from ecavg.cloud_server.intake.uploads import Uploads
from ecavg.cloud_server.store import Store
from ecavg.common.config import RunConfig, Wire
from ecavg.common.errors import CorruptError, InvalidError, OffsetError, Reason, UnavailableError
from ecavg.common.schema import read_header
from ecavg.common.shards import Shard, write_shard
from ecavg.common.transfer import Blob, Receiver, blob_of
from ecavg.common.wire import Base, encode


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "state")
    store.join("a", 0.0)
    yield store
    store.close()


@pytest.fixture
def received() -> list[tuple[str, int]]:
    """Return a list to which the uploads append what they count."""
    return []


@pytest.fixture
def uploads(store: Store, received: list[tuple[str, int]]) -> Uploads:
    return Uploads(
        store,
        weights_schema={},
        spec=RunConfig().spec,
        max_data_bytes=1 << 20,
        turns=Turns(2),
        on_received=lambda kind, num_bytes: received.append((kind, num_bytes)),
    )


@pytest.fixture
def shard(tmp_path: Path) -> bytes:
    path = tmp_path / "shard"
    write_shard(path, Shard(np.ones((9, 1, 8, 8), np.uint8), np.arange(9)))
    return path.read_bytes()


def blob_named(tmp_path: Path) -> Blob:
    return blob_of(tmp_path / "shard")


class Gate:
    """Holds a thread in a method until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: Any, method: str) -> None:
        self.entered = threading.Event()
        self.release = threading.Event()
        original = getattr(owner, method)

        def held(*args: Any) -> Any:
            self.entered.set()
            assert self.release.wait(10)
            return original(*args)

        monkeypatch.setattr(owner, method, held)


async def send(uploads: Uploads, blob: Blob, offset: int, *chunks: bytes, kind: str = "data") -> None:
    async with uploads.open("a", kind, blob, offset, 0.0) as upload:
        for chunk in chunks:
            await upload.write(chunk)


async def test_query_after_a_broken_stream_counts_its_last_write(
    uploads: Uploads, shard: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blob = blob_named(tmp_path)
    gate = Gate(monkeypatch, Receiver, "write")
    broken = asyncio.create_task(send(uploads, blob, 0, shard[:500]))
    await asyncio.to_thread(gate.entered.wait)
    broken.cancel()
    query = asyncio.create_task(uploads.query("a", "data", blob.digest))
    await asyncio.wait([broken, query], timeout=0.05)
    assert not broken.done()  # the thread still writes
    assert not query.done()
    gate.release.set()
    assert await query == (500, False)
    with pytest.raises(asyncio.CancelledError):
        await broken
    await send(uploads, blob, 500, shard[500:])
    assert await uploads.query("a", "data", blob.digest) == (blob.size_bytes, True)


async def test_query_waits_for_an_upload_that_is_being_completed(
    uploads: Uploads, store: Store, shard: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blob = blob_named(tmp_path)
    gate = Gate(monkeypatch, store, "commit_uploads")
    broken = asyncio.create_task(send(uploads, blob, 0, shard))
    await asyncio.to_thread(gate.entered.wait)
    broken.cancel()
    queries = [asyncio.create_task(uploads.query("a", "data", blob.digest)) for _ in range(2)]
    impatient = asyncio.create_task(uploads.query("a", "data", blob.digest))
    await asyncio.sleep(0)
    impatient.cancel()  # must not let the others pass
    gate.release.set()
    assert await asyncio.gather(*queries) == [(blob.size_bytes, True)] * 2
    await asyncio.gather(broken, impatient, return_exceptions=True)


async def test_uploads_wait_in_the_order_of_their_arrival() -> None:
    turns, order = Turns(2), []
    going_on = {name: asyncio.Event() for name in "abcde"}

    async def upload(name: str) -> None:
        async with turns.turn(name):
            order.append(name)
            await going_on[name].wait()

    tasks = {name: asyncio.create_task(upload(name)) for name in "abcde"}
    await asyncio.sleep(0)
    assert (order, turns.places, turns.num_taken) == (["a", "b"], {"c": 1, "d": 2, "e": 3}, 2)
    tasks["c"].cancel()
    await asyncio.wait([tasks["c"]])
    assert turns.places == {"d": 1, "e": 2}
    going_on["a"].set()
    await tasks["a"]
    await asyncio.sleep(0)
    assert (order, turns.places) == (["a", "b", "d"], {"e": 1})
    # The turn of one that is cancelled in the moment in which it has its turn goes to the next.
    going_on["b"].set()
    await tasks["b"]
    tasks["e"].cancel()
    await asyncio.wait([tasks["e"]])
    going_on["d"].set()
    await tasks["d"]
    assert (turns.num_taken, turns.num_waiting) == (0, 0)


async def test_stream_whose_agent_has_come_back_ends_its_turn(
    store: Store, shard: bytes, tmp_path: Path
) -> None:
    uploads = Uploads(store, weights_schema={}, spec=RunConfig().spec, max_data_bytes=1 << 20, turns=Turns(1))
    blob = blob_named(tmp_path)
    started = asyncio.Event()

    async def hang() -> None:
        async with uploads.open("a", "data", blob, 0, 0.0) as upload:
            await upload.write(shard[:500])
            started.set()
            # Nothing tells the server that this connection is gone.
            await asyncio.Event().wait()

    dead = asyncio.create_task(hang())
    await started.wait()
    assert await uploads.query("a", "data", blob.digest) == (500, False)
    async with asyncio.timeout(10):
        await send(uploads, blob, 500, shard[500:])
    dead.cancel()
    await asyncio.wait([dead])


async def test_newest_stream_wins(uploads: Uploads, shard: bytes, tmp_path: Path) -> None:
    blob = blob_named(tmp_path)
    pieces = [shard[:100], shard[100:]]
    started = [asyncio.Event() for _ in range(3)]
    going_on = asyncio.Event()

    async def stream(number: int) -> None:
        async with uploads.open("a", "data", blob, 0, 0.0) as upload:
            started[number].set()
            await going_on.wait()
            for piece in pieces:
                await upload.write(piece)

    first = asyncio.create_task(stream(0))
    await started[0].wait()
    later = [asyncio.create_task(stream(number)) for number in (1, 2)]  # both find the first one
    await asyncio.wait([asyncio.create_task(event.wait()) for event in started])
    going_on.set()
    results = await asyncio.gather(first, *later, return_exceptions=True)
    assert [type(result) for result in results].count(UnavailableError) == 2
    assert await uploads.query("a", "data", blob.digest) == (blob.size_bytes, True)


async def test_file_of_a_broken_stream_is_closed_after_its_last_write(
    uploads: Uploads, shard: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blob = blob_named(tmp_path)
    gate = Gate(monkeypatch, Receiver, "write")
    write, close, events = Receiver.write, Receiver.close, list[str]()

    def slowly(receiver: Receiver, chunk: bytes) -> None:
        write(receiver, chunk)
        time.sleep(0.05)
        events.append("written")

    def closed(receiver: Receiver) -> None:
        events.append("closed")
        close(receiver)

    monkeypatch.setattr(Receiver, "write", slowly)
    monkeypatch.setattr(Receiver, "close", closed)
    broken = asyncio.create_task(send(uploads, blob, 0, shard[:500], shard[500:600]))
    await asyncio.to_thread(gate.entered.wait)
    # The stream and the query both close the upload, while one chunk is written and another one waits.
    broken.cancel()
    query = asyncio.create_task(uploads.query("a", "data", blob.digest))
    await asyncio.wait([broken, query], timeout=0.05)
    gate.release.set()
    assert await query == (600, False)
    await asyncio.wait([broken])
    assert events == ["written", "written", "closed"]


async def break_off(uploads: Uploads, blob: Blob, *chunks: bytes) -> None:
    with pytest.raises(InvalidError, match="the stream ended"):
        await send(uploads, blob, 0, *chunks)


async def test_what_an_earlier_stream_stored_is_read_in_the_end_only(
    uploads: Uploads, store: Store, shard: bytes, tmp_path: Path
) -> None:
    """An agent may open streams as often as it likes: that must cost nothing, whatever is stored."""
    blob = blob_named(tmp_path)
    path = store.partial_path("a", blob.digest)
    await break_off(uploads, blob, shard[:500])
    path.write_bytes(bytes(500))
    with pytest.raises(OffsetError, match="goes on at 500, not at 400"):
        await send(uploads, blob, 400, shard[400:])
    async with uploads.open("a", "data", blob, 500, 0.0) as upload:
        path.write_bytes(shard[:500])
        await upload.write(shard[500:])
    assert await uploads.query("a", "data", blob.digest) == (blob.size_bytes, True)


async def test_what_an_earlier_stream_stored_is_held_against_the_digest(
    uploads: Uploads, store: Store, shard: bytes, tmp_path: Path
) -> None:
    blob = blob_named(tmp_path)
    await break_off(uploads, blob, shard[:500])
    store.partial_path("a", blob.digest).write_bytes(shard[:499] + b"\xff")
    with pytest.raises(CorruptError):
        await send(uploads, blob, 500, shard[500:])
    assert await uploads.query("a", "data", blob.digest) == (0, False)


async def test_kind_that_changes_on_the_way_does_not_pass_the_gate(
    uploads: Uploads, store: Store, shard: bytes, tmp_path: Path
) -> None:
    blob = blob_named(tmp_path)
    await break_off(uploads, blob, shard[:500])
    with pytest.raises(InvalidError) as refused:
        await send(uploads, blob, 500, shard[500:], kind="weights")
    assert refused.value.reason == Reason.SCHEMA_MISMATCH
    assert not store.has_upload("a", blob.digest, "weights")
    assert await uploads.query("a", "weights", blob.digest) == (0, False)


async def test_bytes_are_counted_as_they_come_in_whatever_becomes_of_the_upload(
    uploads: Uploads, shard: bytes, tmp_path: Path, received: list[tuple[str, int]]
) -> None:
    blob = blob_named(tmp_path)
    await break_off(uploads, blob, shard[:300], shard[300:500])
    assert received == [("data", 300), ("data", 200)]
    await send(uploads, blob, 500, shard[500:])
    assert received[2:] == [("data", blob.size_bytes - 500)]


async def test_num_examples_is_no_fewer_than_the_shards_hold(
    uploads: Uploads, shard: bytes, tmp_path: Path
) -> None:
    first = blob_named(tmp_path)
    await send(uploads, first, 0, shard)
    write_shard(tmp_path / "shard", Shard(np.ones((4, 1, 8, 8), np.uint8), np.arange(4)))
    second = blob_named(tmp_path)
    await send(uploads, second, 0, (tmp_path / "shard").read_bytes())

    for claimed in (13, 14, 2**40):
        assert uploads.count_shared([first.digest, second.digest], claimed) == 13
    for claimed in (1, 12):
        with pytest.raises(InvalidError, match=f"num_examples is {claimed}, .* 13 examples") as refused:
            uploads.count_shared([first.digest, second.digest], claimed)
        assert refused.value.reason == Reason.MALFORMED_REQUEST


async def test_agent_that_shares_nothing_is_believed(uploads: Uploads) -> None:
    assert uploads.count_shared([], 2**40) == 0


# Weights


def weights_in(path: Path, value: float) -> Base:
    save_file({"weight": np.full((16, 256), value, np.float32)}, path, metadata={"format": "pt"})
    return Base(path, blob_of(path).digest)


def taking(store: Store, base: Base, *wires: Wire) -> Uploads:
    schema = read_header(base.path).schema
    return Uploads(
        store, weights_schema=schema, wires=wires, spec=RunConfig().spec, max_data_bytes=1, turns=Turns(2)
    )


async def send_weights(uploads: Uploads, path: Path) -> Blob:
    content = await asyncio.to_thread(path.read_bytes)
    blob = Blob(hashlib.sha256(content).hexdigest(), len(content))
    await send(uploads, blob, 0, content, kind="weights")
    return blob


@pytest.mark.parametrize("wires", [("float32",), ("bfloat16",), ("int8",), ("int8", "bfloat16")])
@pytest.mark.parametrize("sent", ["float32", "bfloat16", "int8"])
async def test_weights_are_taken_as_the_run_encodes_them(
    store: Store, tmp_path: Path, sent: Wire, wires: tuple[Wire, ...]
) -> None:
    base = weights_in(tmp_path / "base", 0.25)
    uploads = taking(store, base, *wires)
    encode(weights_in(tmp_path / "weights", 0.5).path, tmp_path / "sent", sent, base=base)
    if sent in wires:
        blob = await send_weights(uploads, tmp_path / "sent")
        assert store.has_upload("a", blob.digest, "weights")
        return
    with pytest.raises(InvalidError, match=f'encoded as {sent}: set wire = "{wires[0]}"') as refused:
        await send_weights(uploads, tmp_path / "sent")
    assert refused.value.reason == Reason.SCHEMA_MISMATCH


async def test_no_more_bytes_are_taken_than_the_encoding_needs(store: Store, tmp_path: Path) -> None:
    base = Base(tmp_path / "base", "0" * 64)
    save_file({"weight": np.zeros((4, 1 << 20), np.float32)}, base.path)
    taking(store, base, "float32")._gates["weights"].check_size(16 << 20)
    for wire, most in (("bfloat16", 8 << 20), ("int8", 4 << 20)):
        gate = taking(store, base, wire)._gates["weights"]
        gate.check_size(most)
        with pytest.raises(InvalidError, match="the server takes at most") as refused:
            gate.check_size(most + (2 << 20))
        assert refused.value.reason == Reason.SIZE_LIMIT


async def test_differences_must_be_from_what_the_agent_says_it_started_from(
    store: Store, tmp_path: Path
) -> None:
    base = weights_in(tmp_path / "base", 0.25)
    uploads = taking(store, base, "int8", "bfloat16")
    encode(base.path, tmp_path / "int8", "int8", base=base)
    encode(base.path, tmp_path / "bfloat16", "bfloat16")
    int8, bfloat16 = [await send_weights(uploads, tmp_path / wire) for wire in ("int8", "bfloat16")]
    uploads.check_base(int8.digest, base.digest)
    uploads.check_base(bfloat16.digest, None)
    other = "5" * 64
    for blob, start, text in (
        (
            int8,
            other,
            f"differences from {base.digest[:16]}…, and pre-training started from 5555555555555555…",
        ),
        (int8, None, "pre-training started from weights of the agent's own"),
        (bfloat16, base.digest, f"no differences, and pre-training started from {base.digest[:16]}…"),
    ):
        with pytest.raises(InvalidError, match=text) as refused:
            uploads.check_base(blob.digest, start)
        assert refused.value.reason == Reason.INITIAL_WEIGHTS
