"""The transfer of a blob in chunks, with its offset, its byte budget and its SHA-256 digest.

The functions that are not async block on the disk, so a caller on an event loop runs them in a thread. A
switch to a thread and back takes longer than the writing of a chunk, so several chunks are written together.
"""

import asyncio
import hashlib
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, TypeVar

from ecavg.common.errors import CorruptError, InvalidError, OffsetError, Reason

CHUNK_BYTES = 256 * 1024
MAX_CHUNK_BYTES = 1024 * 1024
# The system is asked to write so many bytes to the disk at a time, while the next bytes arrive.
_FLUSH_BYTES = 8 * 1024 * 1024
# So many chunks may wait for the writing thread. Every stream needs memory for them.
_CHUNKS_AT_ONCE = 2

# A digest is a SHA-256 in 64 lower-case hex digits, everywhere in the project.
DIGEST = re.compile(r"[0-9a-f]{64}")

_T = TypeVar("_T")


class Blob(NamedTuple):
    """The digest and the size of a file, which name the file on the wire."""

    digest: str
    """The SHA-256 digest, hexadecimal."""
    size_bytes: int


class Encoded(NamedTuple):
    """Weights in fewer bytes than they have: the encoded file, and the base that decoding takes."""

    blob: Blob
    # The digest of the base; None: decoding takes no base.
    base: str | None


def checked_digest(text: str) -> str:
    """Return the text unchanged, if it is a digest and therefore safe as the name of a file.

    Raises:
        ValueError: the text is not a digest.
    """
    if not DIGEST.fullmatch(text):
        raise ValueError(f"{text[:80]!r} is no digest: 64 lower-case hex digits")
    return text


def blob_of(path: Path) -> Blob:
    """Return the digest and the size of the file at `path`."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return Blob(digest, file.tell())


async def chunks_of(path: Path, offset: int) -> AsyncIterator[bytes]:
    """Yield the file from `offset` on in chunks of at most CHUNK_BYTES, one of them in memory at a time.

    Bytes that the system holds in memory are read on the event loop, because a switch to a thread and back
    would take longer. Only bytes that must come from the disk are read in a thread.

    Raises:
        OffsetError: `offset` is beyond the end of the file.
        OSError: the file cannot be read.
    """
    with await asyncio.to_thread(path.open, "rb", buffering=0) as file:
        descriptor = file.fileno()
        size = os.fstat(descriptor).st_size
        if offset > size:
            raise OffsetError(f"offset {offset} is beyond the {size} bytes of the blob")
        while offset < size:
            num_bytes = min(CHUNK_BYTES, size - offset)
            chunk = _read_from_memory(descriptor, offset, num_bytes)
            if not chunk:
                chunk = await asyncio.to_thread(os.pread, descriptor, num_bytes, offset)
            if not chunk:
                # Somebody has cut the file short.
                return
            yield chunk
            offset += len(chunk)


def _read_from_memory(descriptor: int, offset: int, num_bytes: int) -> bytes:
    """Return up to `num_bytes` that the system holds in memory; b"" if the read would wait for the disk."""
    if not hasattr(os, "RWF_NOWAIT"):
        return b""
    buffer = bytearray(num_bytes)
    try:
        num_bytes = os.preadv(descriptor, [buffer], offset, os.RWF_NOWAIT)
    # The bytes are not in memory, or the file system does not support such reads. The caller then reads in
    # the usual way, and meets any real error again.
    except OSError:
        return b""
    return bytes(memoryview(buffer)[:num_bytes])


async def to_the_end(work: Awaitable[_T]) -> _T:
    """Await the work, and do not return before the work is done, even if the caller is cancelled.

    A broken connection cancels the call that it carried. A write in a thread goes on regardless, and the
    state in memory must agree with the disk in the end.
    """
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait([task])
        if not task.cancelled():
            # The caller is gone. asyncio would warn of an exception that nobody has retrieved.
            task.exception()
        raise


class WriteBehind:
    """A queue that writes chunks in a thread, in their order, while the next chunks arrive.

    At most a few chunks wait in the queue; `put` waits while the queue is full.

    Args:
        write: writes one chunk. If it raises, the waiting chunks are dropped.
    """

    def __init__(self, write: Callable[[bytes], None]) -> None:
        self._write = write
        self._waiting: list[bytes] = []
        self._writing: asyncio.Task[None] | None = None

    async def put(self, chunk: bytes) -> None:
        """Queue the chunk to be written; raise the error of an earlier write, if there was one."""
        self._waiting.append(chunk)
        if self._writing and (self._writing.done() or len(self._waiting) >= _CHUNKS_AT_ONCE):
            await self._finish_writing()
        if not self._writing:
            self._start_writing()

    async def flush(self) -> None:
        """Return when all chunks are written; raise the error of a write, if there was one."""
        while self._writing or self._waiting:
            if not self._writing:
                self._start_writing()
            await self._finish_writing()

    async def close(self) -> None:
        """Write the remaining chunks if possible; afterwards no thread uses the file any more."""
        # A caller that needs to know of errors has called `flush` before.
        with suppress(Exception):
            await to_the_end(self.flush())

    def _start_writing(self) -> None:
        chunks, self._waiting = self._waiting, []
        self._writing = asyncio.ensure_future(asyncio.to_thread(self._write_all, chunks))

    async def _finish_writing(self) -> None:
        """Wait for the thread, and raise the error of its write, if there was one."""
        assert self._writing
        # If the caller is cancelled here, the thread goes on, and `_writing` still refers to it.
        await asyncio.wait([self._writing])
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
    """The receiving end of one blob, which appends to a partial file and continues where that file ends.

    The constructor does not read the file, so that a reconnecting sender costs nothing. The bytes that an
    earlier attempt has stored are hashed by `finish`, after the last byte has arrived.

    Args:
        path: the partial file; the bytes that it already holds count as received.
        blob: the digest and the size of the blob to receive.
        gate: a check of the beginning of the blob, before any byte is stored. It is called with the bytes
            received so far, again and again with more of them, until it returns True. It raises if the blob
            must not be stored. The bytes that an earlier attempt has stored have passed the gate before.
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
        # These bytes wait for the gate. A bytearray grows in place, so that many small chunks cost no copies.
        self._gated = bytearray()
        self.is_discarded = False

    def close(self) -> None:
        """Close the partial file, and delete the file if it is empty."""
        if not self._file.closed and not os.fstat(self._file.fileno()).st_size:
            self._path.unlink(missing_ok=True)
        self._file.close()

    def write(self, chunk: bytes) -> None:
        """Append a chunk to the partial file, or hold it back until the gate lets the blob pass.

        Raises:
            InvalidError: the chunk is over MAX_CHUNK_BYTES, or more bytes than declared have arrived. The
                gate raises errors of its own.
            OSError: the file cannot be written.
        """
        if len(chunk) > MAX_CHUNK_BYTES:
            raise InvalidError(f"a chunk has {len(chunk)} bytes, at most {MAX_CHUNK_BYTES} are allowed")
        self.received_bytes += len(chunk)
        if self.received_bytes > self.blob.size_bytes:
            raise InvalidError(
                f"more than the declared {self.blob.size_bytes} bytes arrived", Reason.SIZE_MISMATCH
            )
        if self._gate:
            self._gated += chunk
            if not self._gate(self._gated):
                return
            chunk, self._gated, self._gate = bytes(self._gated), bytearray(), None
        if self._hash:
            self._hash.update(chunk)
        # An unbuffered file may write fewer bytes than it is given.
        while chunk:
            chunk = chunk[self._file.write(chunk) :]
        self._begin_flush()

    def finish(self) -> None:
        """Check that the partial file is the whole blob, and make the file durable.

        Raises:
            InvalidError: bytes are missing.
            CorruptError: the bytes do not have the blob's digest; the partial file is deleted.
            OSError: the file cannot be made durable; the partial file is deleted.
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
        # After a failed fsync nobody knows what the disk holds, and a second fsync would not report it.
        except OSError:
            self.discard()
            raise

    def discard(self) -> None:
        """Delete the partial file, because its bytes must not be stored."""
        self.is_discarded = True
        self._path.unlink(missing_ok=True)

    def _begin_flush(self) -> None:
        """Make the system begin to write to the disk, so that `finish` has little left to wait for.

        Linux begins to write when it gets this advice, and does not wait; PostgreSQL uses the same method.
        """
        num_bytes = self._file.tell() - self._flushed_bytes
        if num_bytes >= _FLUSH_BYTES and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), self._flushed_bytes, num_bytes, os.POSIX_FADV_DONTNEED)
            self._flushed_bytes += num_bytes
