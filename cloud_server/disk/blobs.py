"""Files by their digest: blobs, and the uploads that are to become blobs. No records are kept here.

Each change leaves a state from which the whole can be done again, wherever the process is killed.
`bucket_blobs.py` keeps blobs in a bucket, with the same methods.
"""

import os
from collections.abc import AsyncIterator, Collection, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from threading import RLock

from ecavg.cloud_server.disk.failures import storage_errors
from ecavg.cloud_server.state_dir import StateDir, blob_path
from ecavg.common.errors import NotFoundError
from ecavg.common.files import sync
from ecavg.common.transfer import DIGEST, checked_digest


class Blobs:
    """The blobs of one state directory, and its begun uploads; every method may be called from any thread.

    Methods that write raise StorageError while the disk is full, read-only or failing.

    Args:
        lock: held by whoever changes a file and the record of it, which belong together.
    """

    def __init__(self, state_dir: StateDir, lock: RLock) -> None:
        self.lock = lock
        self._blobs_dir = state_dir.blobs
        self._partial_dir = state_dir.partial

    def close(self) -> None:
        """Let go of what the blobs need besides files; a second call does nothing."""

    def path(self, digest: str) -> Path:
        """Return where the blob is, or would be; ValueError unless the digest is 64 lower-case hex digits.

        The file is certainly there only inside `in_use`.
        """
        return blob_path(self._blobs_dir, digest)

    def size(self, digest: str) -> int | None:
        """Return the bytes of the blob, None if it is not stored; ValueError like `path`."""
        try:
            return self.path(digest).stat().st_size
        except FileNotFoundError:
            return None

    def digests(self) -> Iterator[str]:
        """Yield the digest of every blob, in no order."""
        return (path.name for path in self._blobs_dir.glob("??/*") if DIGEST.fullmatch(path.name))

    def stored_at(self, digest: str) -> float:
        """Return when the blob was stored, in seconds since the epoch; FileNotFoundError if it is not."""
        return self.path(digest).stat().st_mtime

    def remove(self, digest: str) -> bool:
        """Remove the blob, for good only after `finish_removals`; return False where it cannot go now.

        The caller holds the lock, and has seen in the records that nothing needs the blob.
        """
        with storage_errors():
            self.path(digest).unlink()
        return True

    def finish_removals(self) -> None:
        """Make sure that the removed blobs are gone."""

    @asynccontextmanager
    async def in_use(self, digests: Collection[str]) -> AsyncIterator[None]:  # noqa: ARG002
        """Have the files of those of these blobs that are stored at `path`, until the context ends."""
        yield

    @asynccontextmanager
    async def kept(self, source: Path, digest: str) -> AsyncIterator[None]:  # noqa: ARG002
        """Have the bytes of a whole, checked file where blobs are kept, before `link` or `adopt`.

        Until the context ends the blob is not removed, although no record names it yet.

        Raises:
            NotFoundError: there is neither the file nor the blob.
        """
        yield

    def adopt(self, source: Path, digest: str) -> None:
        """Move a file of the state directory that has this digest to the blobs.

        Raises:
            NotFoundError: the file is neither at its own place nor among the blobs.
        """
        blob = self.path(digest)
        with storage_errors():
            blob.parent.mkdir(exist_ok=True)
            try:
                sync(source)
                # Should a blob be there, its bytes are the same.
                source.replace(blob)
            except FileNotFoundError:
                self._check_stored(digest)
            blob.chmod(0o444)
        self.sync_folders([digest])

    # Uploads

    def partial_path(self, slot: int, digest: str) -> Path:
        """Return where an agent's upload grows, which counts as written to now; ValueError like `path`."""
        path = self._partial_dir / f"{slot}-{checked_digest(digest)}"
        # Whoever asks is about to go on with the upload: `remove_partials` shall not come between.
        with self.lock, storage_errors(), suppress(FileNotFoundError):
            os.utime(path)
        return path

    def partial_sizes(self, slots: Collection[int]) -> dict[int, dict[str, int]]:
        """Return the bytes that each begun upload of these agents has, by slot and digest."""
        sizes: dict[int, dict[str, int]] = {slot: {} for slot in slots}
        with os.scandir(self._partial_dir) as entries:
            for entry in entries:
                slot, _, digest = entry.name.partition("-")
                if slot.isdecimal() and int(slot) in sizes:
                    # An upload may be completed meanwhile.
                    with suppress(FileNotFoundError):
                        sizes[int(slot)][digest] = entry.stat().st_size
        return sizes

    def link(self, partial: Path, digest: str) -> None:
        """Make the blob a second name of a whole upload; do nothing if the blob is there already.

        The new name is durable after `sync_folders`. Killed before the record is there, the upload is still
        whole under its first name.

        Raises:
            NotFoundError: there is neither an upload nor a blob.
        """
        blob = self.path(digest)
        with storage_errors():
            blob.parent.mkdir(exist_ok=True)
            # A blob that is there has the same bytes, of this agent or another.
            with suppress(FileExistsError):
                try:
                    sync(partial)
                    os.link(partial, blob)
                except FileNotFoundError:
                    self._check_stored(digest)

    def sync_folders(self, digests: Collection[str]) -> None:
        """Make the names of these blobs durable."""
        with storage_errors():
            for folder in {self.path(digest).parent for digest in digests}:
                # There is no folder where nothing was linked.
                with suppress(FileNotFoundError):
                    sync(folder)
            sync(self._blobs_dir)

    def seal(self, partial: Path, digest: str) -> None:
        """Make the blob read-only, and take the upload's own name away."""
        with storage_errors():
            # Not before the record: an upload that goes on after a failure must be able to write.
            self.path(digest).chmod(0o444)
            partial.unlink(missing_ok=True)

    def remove_partials(self, written_before: float, *, spare: Collection[Path] = ()) -> int:
        """Remove the uploads that were begun and have had no byte since; return how many."""
        num_removed = 0
        for path in set(self._partial_dir.iterdir()) - set(spare):
            with self.lock, storage_errors(), suppress(FileNotFoundError):
                if path.stat().st_mtime < written_before:
                    path.unlink()
                    num_removed += 1
        return num_removed

    def remove_partials_of(self, slot: int) -> None:
        """Remove the uploads that this agent has begun."""
        with self.lock, storage_errors():
            for path in self._partial_dir.glob(f"{slot}-*"):
                path.unlink(missing_ok=True)
            sync(self._partial_dir)

    def _check_stored(self, digest: str) -> None:
        # An earlier call may have got as far as this when the process died.
        if self.size(digest) is None:
            raise NotFoundError(f"the bytes of blob {digest} are not here: upload them") from None
