"""Several streams of one upload: what a broken one may still do, and what the next one finds."""

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cloud_server.store import Store
from cloud_server.uploads import Uploads
from common.config import RunConfig
from common.errors import UnavailableError
from common.shards import Shard, write_shard
from common.transfer import Blob, Receiver, blob_of


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "state")
    store.join("a", 0.0)
    yield store
    store.close()


@pytest.fixture
def uploads(store: Store) -> Uploads:
    return Uploads(store, weights_schema={}, spec=RunConfig().spec, max_data_bytes=1 << 20)


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


async def send(uploads: Uploads, blob: Blob, offset: int, *chunks: bytes) -> None:
    async with uploads.open("a", "data", blob, offset, 0.0) as upload:
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
    gate = Gate(monkeypatch, store, "commit_upload")
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
