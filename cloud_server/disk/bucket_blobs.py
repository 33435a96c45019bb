"""Blobs whose place is a bucket; the folder of blobs is a cache of it, and uploads grow in files as ever.

A blob is put into the bucket before a record names it, and leaves the bucket after the last record has gone.
So a crash between the two leaves an object that no record names, which the next clean-up removes. The server
is the only one that writes below the prefix: what the bucket has is listed once, at the start.
"""

import asyncio
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from threading import Lock, RLock
from time import time
from typing import TypeVar
from weakref import WeakValueDictionary

from ecavg.cloud_server.disk.blobs import Blobs
from ecavg.cloud_server.disk.bucket import Bucket, StoredObject
from ecavg.cloud_server.disk.failures import storage_errors
from ecavg.cloud_server.state_dir import StateDir
from ecavg.common.faults import Point, crash_point
from ecavg.common.files import sync
from ecavg.common.transfer import DIGEST, Blob, blob_of

# Transfers have threads of their own, so that a slow bucket does not hold up what needs only the disk.
_NUM_THREADS = 8

_T = TypeVar("_T")


class BucketBlobs(Blobs):
    """The blobs of one state directory, in a bucket.

    Args:
        lock: held by whoever changes a file and the record of it, which belong together.
        cache_bytes: how many bytes of blobs are kept as files; what is in use stays beyond that.

    Raises:
        StorageError: the bucket cannot be listed, or does not take what it lacks.
    """

    def __init__(self, state_dir: StateDir, lock: RLock, bucket: Bucket, cache_bytes: int) -> None:
        super().__init__(state_dir, lock)
        self._bucket = bucket
        self._incoming_dir = state_dir.incoming
        self._cache_bytes = cache_bytes
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="bucket")
        # Held to read and change all that follows, and never during a transfer.
        self._mutex = Lock()
        self._in_use: Counter[str] = Counter()
        self._being_kept: Counter[str] = Counter()
        # The sizes of the files, those used last at the end.
        self._cached: OrderedDict[str, int] = OrderedDict()
        # The removed blobs whose objects are still to be deleted.
        self._going: set[str] = set()
        # Held while objects are deleted, so that none of them is put there meanwhile.
        self._deleting = Lock()
        self._fetches: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._objects = bucket.list()
        self._open_cache()

    def close(self) -> None:
        """End the threads of the transfers."""
        self._threads.shutdown(cancel_futures=True)

    def size(self, digest: str) -> int | None:
        """Return the bytes of the blob, None if it is not stored; ValueError like `path`."""
        self.path(digest)
        stored = self._objects.get(digest)
        return stored.size_bytes if stored else None

    def digests(self) -> Iterator[str]:
        """Yield the digest of every blob, in no order."""
        with self._mutex:
            return iter(list(self._objects))

    def stored_at(self, digest: str) -> float:
        """Return when the blob was stored, in seconds since the epoch; FileNotFoundError if it is not."""
        try:
            return self._objects[digest].at
        except KeyError:
            raise FileNotFoundError(digest) from None

    # What comes

    @asynccontextmanager
    async def kept(self, source: Path, digest: str) -> AsyncIterator[None]:
        """Have the bytes of a whole, checked file in the bucket, before `link` or `adopt`.

        Raises:
            NotFoundError: there is neither the file nor the blob.
            StorageError: the bucket takes no data now.
        """
        with self._mutex:
            self._being_kept[digest] += 1
        try:
            await self._in_thread(self._send, source, digest)
            crash_point(Point.SERVER_BLOB_IN_BUCKET)
            yield
        finally:
            self._let_go(self._being_kept, [digest])

    def _send(self, source: Path, digest: str) -> None:
        with self._deleting:
            self._going.discard(digest)
        if digest in self._objects:
            return
        try:
            size_bytes = source.stat().st_size
            self._bucket.put(source, digest)
        except FileNotFoundError:
            self._check_stored(digest)
            return
        with self._mutex:
            self._objects[digest] = StoredObject(size_bytes, time())

    def adopt(self, source: Path, digest: str) -> None:
        """Move a file of the state directory, whose blob is kept, to the files of blobs.

        Raises:
            NotFoundError: the blob is not in the bucket.
        """
        self._check_stored(digest)
        if source.exists():
            super().adopt(source, digest)
            self._note_file(digest)

    def link(self, partial: Path, digest: str) -> None:
        """Make the file of a blob, which is kept, a second name of a whole upload.

        Raises:
            NotFoundError: the blob is not in the bucket.
        """
        self._check_stored(digest)
        if partial.exists():
            super().link(partial, digest)

    def seal(self, partial: Path, digest: str) -> None:
        """Make the file of the blob read-only, and take the upload's own name away."""
        if self.path(digest).exists():
            super().seal(partial, digest)
            self._note_file(digest)
        else:
            partial.unlink(missing_ok=True)

    # What is read

    @asynccontextmanager
    async def in_use(self, digests: Collection[str]) -> AsyncIterator[None]:
        """Have the files of those of these blobs that are stored at `path`, until the context ends.

        Raises:
            StorageError: the bucket does not give one of them, or the disk has no room for it.
        """
        with self._mutex:
            self._in_use.update(digests)
        try:
            for digest in digests:
                lock = self._fetches.setdefault(digest, asyncio.Lock())
                async with lock:
                    await self._fetched(digest)
            yield
        finally:
            self._let_go(self._in_use, digests)

    async def _fetched(self, digest: str) -> None:
        with self._mutex:
            stored = self._objects.get(digest)
            if digest in self._cached:
                self._cached.move_to_end(digest)
                return
        if stored:
            await self._in_thread(self._fetch, Blob(digest, stored.size_bytes))

    def _fetch(self, blob: Blob) -> None:
        self._trim(blob.size_bytes)
        incoming, path = self._incoming_dir / blob.digest, self.path(blob.digest)
        with storage_errors(), _removed_on_error(incoming):
            self._bucket.fetch(blob, incoming)
            incoming.chmod(0o444)
            sync(incoming)
            path.parent.mkdir(exist_ok=True)
            # Under the lock: the blob may be removed meanwhile.
            with self.lock:
                if blob.digest in self._objects:
                    incoming.replace(path)
                    self._note_file(blob.digest)
                else:
                    incoming.unlink()

    # What goes

    def remove(self, digest: str) -> bool:
        """Remove the blob, for good only after `finish_removals`; return False where it is being put here."""
        with self._mutex:
            if digest in self._being_kept:
                return False
            self._objects.pop(digest, None)
            self._cached.pop(digest, None)
            self._going.add(digest)
        with storage_errors():
            self.path(digest).unlink(missing_ok=True)
        return True

    def finish_removals(self) -> None:
        """Delete the objects of the removed blobs.

        Raises:
            StorageError: the bucket does not let it; a later call goes on.
        """
        with self._deleting:
            with self._mutex:
                going = sorted(self._going)
            if going:
                self._bucket.delete(going)
            with self._mutex:
                self._going -= set(going)
        self._trim()

    # The cache

    def _open_cache(self) -> None:
        """Find the files that are here, and put into the bucket those that it lacks.

        It lacks files that were there before the bucket was, or objects that somebody else has deleted.
        """
        self._incoming_dir.mkdir(exist_ok=True)
        for left in self._incoming_dir.iterdir():
            left.unlink()
        used_at = {path: path.stat() for path in self._blobs_dir.glob("??/*") if DIGEST.fullmatch(path.name)}
        for path, stat in sorted(used_at.items(), key=lambda item: item[1].st_mtime):
            self._cached[path.name] = stat.st_size
            if path.name not in self._objects and blob_of(path).digest == path.name:
                self._send(path, path.name)
        self._trim()

    def _note_file(self, digest: str) -> None:
        """Note that the file of the blob is here, and was used just now."""
        with suppress(FileNotFoundError):
            num_bytes = self.path(digest).stat().st_size
            with self._mutex:
                self._cached[digest] = num_bytes
                self._cached.move_to_end(digest)
        self._trim()

    def _trim(self, num_bytes: int = 0) -> None:
        """Remove the files that were not used for longest, until so many bytes more have room."""
        with self._mutex:
            too_many = sum(self._cached.values()) + num_bytes - self._cache_bytes
            spared = self._in_use.keys() | self._being_kept.keys()
            for digest in list(self._cached) if too_many > 0 else ():
                if too_many > 0 and digest not in spared:
                    self.path(digest).unlink(missing_ok=True)
                    too_many -= self._cached.pop(digest)

    def _let_go(self, held: Counter[str], digests: Collection[str]) -> None:
        with self._mutex:
            held.subtract(digests)
            for digest in set(digests):
                if not held[digest]:
                    del held[digest]

    async def _in_thread(self, work: Callable[..., _T], *args: object) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *args)


@contextmanager
def _removed_on_error(path: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        path.unlink(missing_ok=True)
        raise
