"""Chunks read ahead and written behind: in order, whole, and nothing left running."""

import asyncio
import os
import threading
import time
from pathlib import Path

import pytest

from ecavg.common.errors import OffsetError
from ecavg.common.transfer import CHUNK_BYTES, WriteBehind, chunks_of

CHUNKS = [bytes([number]) * 1000 for number in range(100)]


async def test_chunks_of_a_file_are_the_file(tmp_path: Path) -> None:
    content = bytes(range(256)) * (20 * CHUNK_BYTES // 256) + b"and a part of a chunk"
    (tmp_path / "blob").write_bytes(content)
    chunks = [chunk async for chunk in chunks_of(tmp_path / "blob", 100)]
    assert b"".join(chunks) == content[100:]
    assert max(map(len, chunks)) <= CHUNK_BYTES
    assert [chunk async for chunk in chunks_of(tmp_path / "blob", len(content))] == []
    with pytest.raises(OffsetError, match="beyond"):
        await anext(chunks_of(tmp_path / "blob", len(content) + 1))


async def test_a_file_comes_from_the_disk_as_well_as_from_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = bytes(range(256)) * (20 * CHUNK_BYTES // 256)
    with (tmp_path / "blob").open("wb", buffering=0) as file:
        file.write(content)
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), CHUNK_BYTES, 0, os.POSIX_FADV_DONTNEED)
    assert b"".join([chunk async for chunk in chunks_of(tmp_path / "blob", 0)]) == content
    monkeypatch.delattr(os, "RWF_NOWAIT", raising=False)  # as on macOS
    assert b"".join([chunk async for chunk in chunks_of(tmp_path / "blob", 0)]) == content


async def test_everything_is_written_in_order() -> None:
    written: list[bytes] = []
    behind = WriteBehind(written.append)
    for chunk in CHUNKS:
        await behind.put(chunk)
    await behind.flush()
    assert written == CHUNKS


async def test_the_thread_writes_while_chunks_arrive_and_few_of_them_wait() -> None:
    may_write = threading.Semaphore(0)
    written: list[bytes] = []

    def write(chunk: bytes) -> None:
        may_write.acquire()
        written.append(chunk)

    behind = WriteBehind(write)
    putting = asyncio.ensure_future(put_all(behind, CHUNKS))
    await asyncio.sleep(0.1)
    assert not putting.done()  # held back by a disk that writes nothing
    for _ in CHUNKS:
        may_write.release()
    await putting
    await behind.flush()
    assert written == CHUNKS


async def test_what_writing_raises_is_raised_to_whoever_puts_or_flushes() -> None:
    written: list[bytes] = []

    def write(chunk: bytes) -> None:
        if chunk == CHUNKS[3]:
            raise OSError(28, "no space left")
        written.append(chunk)

    behind = WriteBehind(write)
    with pytest.raises(OSError, match="no space left"):
        await put_all(behind, CHUNKS)
    await behind.close()
    assert written == CHUNKS[:3]  # and nothing after it

    behind = WriteBehind(write)
    await behind.put(CHUNKS[3])
    with pytest.raises(OSError, match="no space left"):
        await behind.flush()


async def test_close_leaves_no_thread_in_the_file_though_it_is_cancelled() -> None:
    written: list[bytes] = []
    is_writing = threading.Event()

    def write(chunk: bytes) -> None:
        is_writing.set()
        time.sleep(0.02)
        written.append(chunk)

    behind = WriteBehind(write)

    async def receive() -> None:
        try:
            await put_all(behind, CHUNKS[:3])
            await asyncio.sleep(60)
        finally:
            await behind.close()

    receiving = asyncio.ensure_future(receive())
    await asyncio.to_thread(is_writing.wait)
    receiving.cancel()
    await asyncio.sleep(0.01)
    receiving.cancel()  # again, in the middle of closing
    with pytest.raises(asyncio.CancelledError):
        await receiving
    assert written == CHUNKS[:3]  # what had arrived is kept


async def put_all(behind: WriteBehind, chunks: list[bytes]) -> None:
    for chunk in chunks:
        await behind.put(chunk)
