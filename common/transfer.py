"""Bytes ↔ chunks: a blob on its way, with its offset, its byte budget and its SHA-256.

What is not async blocks on the disk: callers on an event loop use a thread. Going there and back for each
chunk takes longer than to write it, so several chunks go together.
"""

import asyncio
import hashlib
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, TypeVar

from common.errors import CorruptError, InvalidError, OffsetError, Reason

CHUNK_BYTES = 256 * 1024
MAX_CHUNK_BYTES = 1024 * 1024
_FLUSH_BYTES = 8 * 1024 * 1024  # are given to the disk at a time, while the next ones arrive
_CHUNKS_AT_ONCE = 2  # waiting to be written: the memory of every stream

DIGEST = re.compile(r"[0-9a-f]{64}")  # SHA-256, hexadecimal, as it is named everywhere

_T = TypeVar("_T")


class Blob(NamedTuple):
    """A file as it is named on the wire."""

    digest: str  # SHA-256, hexadecimal
    size_bytes: int


class Encoded(NamedTuple):
    """Weights in fewer bytes than they have: the encoded file, and the base that decoding takes."""

    blob: Blob
    # The digest of the base; None: decoding takes no base.
    base: str | None


def checked_digest(text: str) -> str:
    """The text, before it becomes the name of a file; ValueError unless it is a digest."""
    if not DIGEST.fullmatch(text):
        raise ValueError(f"{text[:80]!r} is no digest: 64 lower-case hex digits")
    return text


def blob_of(path: Path) -> Blob:
    """The digest and size of the file at `path`."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return Blob(digest, file.tell())


async def chunks_of(path: Path, offset: int) -> AsyncIterator[bytes]:
    """The file from `offset` on, in pieces of at most CHUNK_BYTES; one piece is in memory at a time.

    What the system has in memory is read right here: going to a thread and back would take longer. Only
    what has to come from the disk is waited for in one.

    Raises:
        OffsetError: `offset` is beyond the end of the file.
    """
    with await asyncio.to_thread(path.open, "rb", buffering=0) as file:
        descriptor = file.fileno()
        size = os.fstat(descriptor).st_size
        if offset > size:
            raise OffsetError(f"offset {offset} is beyond the {size} bytes of the blob")
        while chunk := (
            _read_from_memory(descriptor, offset)
            or await asyncio.to_thread(os.pread, descriptor, CHUNK_BYTES, offset)
        ):
            yield chunk
            offset += len(chunk)


def _read_from_memory(descriptor: int, offset: int) -> bytes:
    """Up to CHUNK_BYTES, if they can be had without waiting for the disk; else nothing."""
    if not hasattr(os, "RWF_NOWAIT"):
        return b""
    buffer = bytearray(CHUNK_BYTES)
    try:
        num_bytes = os.preadv(descriptor, [buffer], offset, os.RWF_NOWAIT)
    except OSError:  # not in memory, or no such reads on this file system; a real trouble shows again
        return b""
    return bytes(memoryview(buffer)[:num_bytes])


async def to_the_end(work: Awaitable[_T]) -> _T:
    """Await it, and return only once it is done, cancelled or not.

    A broken connection cancels the call that it carried; what was being written goes on in its thread,
    and memory must come to agree with the disk all the same.
    """
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait([task])
        if not task.cancelled():
            task.exception()  # nobody is left to tell
        raise


class WriteBehind:
    """Writes chunks in a thread, in their order, while the next ones arrive; a few of them wait at most.

    Args:
        write: may raise; what waits is dropped then.
    """

    def __init__(self, write: Callable[[bytes], None]) -> None:
        self._write = write
        self._waiting: list[bytes] = []
        self._writing: asyncio.Task[None] | None = None

    async def put(self, chunk: bytes) -> None:
        """Have the chunk written soon; raises what writing an earlier one has raised."""
        self._waiting.append(chunk)
        if self._writing and (self._writing.done() or len(self._waiting) >= _CHUNKS_AT_ONCE):
            await self._settle()
        if not self._writing:
            self._begin()

    async def flush(self) -> None:
        """Return once everything is written; raises what writing it has raised."""
        while self._writing or self._waiting:
            if not self._writing:
                self._begin()
            await self._settle()

    async def close(self) -> None:
        """Write what has arrived, as far as that goes. Afterwards the thread is out of the file."""
        with suppress(Exception):  # whoever cared has called flush
            await to_the_end(self.flush())

    def _begin(self) -> None:
        chunks, self._waiting = self._waiting, []
        self._writing = asyncio.ensure_future(asyncio.to_thread(self._write_all, chunks))

    async def _settle(self) -> None:
        assert self._writing
        await asyncio.wait([self._writing])  # cancelled, we leave the thread alone
        writing, self._writing = self._writing, None
        try:
            writing.result()
        except BaseException:
            self._waiting.clear()
            raise

    def _write_all(self, chunks: list[bytes]) -> None:
        for chunk in chunks:
            self._write(chunk)


class Receiver:
    """The receiving end of one blob: appends to a partial file, and goes on where that file ends.

    To open one reads nothing of the file, so that anybody may as often as connections break: what an earlier
    attempt stored is hashed by `finish`, once all of it has been sent.

    Args:
        path: the partial file; what it already holds counts as received.
        blob: what is to be received.
        gate: given the first bytes, more and more, until it says True, before any byte is stored; it raises
            if the blob must not be stored. Bytes that an earlier attempt stored have passed it.
    """

    def __init__(
        self, path: Path, blob: Blob, gate: Callable[[bytes | bytearray], bool] | None = None
    ) -> None:
        self.blob = blob
        self._path = path
        self._file = path.open("ab", buffering=0)
        self.received_bytes = self._flushed_bytes = self._file.tell()
        self._hash = None if self.received_bytes else hashlib.sha256()
        self._gate = None if self.received_bytes else gate
        self._held = bytearray()  # waits for the gate; grows in place, however small the chunks
        self.is_discarded = False

    def close(self) -> None:
        """What was received stays; where that is nothing, nothing does."""
        if not self._file.closed and not os.fstat(self._file.fileno()).st_size:
            self._path.unlink(missing_ok=True)
        self._file.close()

    def write(self, chunk: bytes) -> None:
        """Append a chunk.

        Raises:
            InvalidError: more bytes than declared, or an oversized chunk; or what the gate raises.
        """
        if len(chunk) > MAX_CHUNK_BYTES:
            raise InvalidError(f"a chunk has {len(chunk)} bytes, at most {MAX_CHUNK_BYTES} are allowed")
        self.received_bytes += len(chunk)
        if self.received_bytes > self.blob.size_bytes:
            raise InvalidError(
                f"more than the declared {self.blob.size_bytes} bytes arrived", Reason.SIZE_MISMATCH
            )
        if self._gate:
            self._held += chunk
            if not self._gate(self._held):
                return
            chunk, self._held, self._gate = bytes(self._held), bytearray(), None
        if self._hash:
            self._hash.update(chunk)
        while chunk:  # a raw file may write less than it was given
            chunk = chunk[self._file.write(chunk) :]
        self._begin_flush()

    def finish(self) -> None:
        """Make the partial file durable once it is whole and right.

        Raises:
            InvalidError: bytes are missing.
            CorruptError: the bytes are not the digest's; the partial file is gone.
        """
        if self.received_bytes < self.blob.size_bytes or self._gate:
            raise InvalidError(
                f"the stream ended after {self.received_bytes} of {self.blob.size_bytes} bytes",
                Reason.SIZE_MISMATCH,
            )
        digest = self._hash.hexdigest() if self._hash else blob_of(self._path).digest
        if digest != self.blob.digest:
            self.discard()
            raise CorruptError("the bytes received do not match their SHA-256 digest; send them again")
        try:
            os.fsync(self._file.fileno())
        except OSError:
            self.discard()  # what the disk has is unknown, and a retry would not tell
            raise

    def discard(self) -> None:
        """Forget what was received: it must not be stored."""
        self.is_discarded = True
        self._path.unlink(missing_ok=True)

    def _begin_flush(self) -> None:
        """Have the disk begin with what was written, so that little is left for `finish` to wait for.

        Linux takes this advice for a request to write (PostgreSQL uses it so); it waits for nothing.
        """
        num_bytes = self._file.tell() - self._flushed_bytes
        if num_bytes >= _FLUSH_BYTES and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), self._flushed_bytes, num_bytes, os.POSIX_FADV_DONTNEED)
            self._flushed_bytes += num_bytes
