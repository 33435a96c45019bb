"""Blobs as the objects of an S3-compatible bucket, which the network may keep away.

Objects have the names that the files would have: `PREFIX/ab/abcdef…`. Credentials, the region and the address
of the service come from the environment alone, as AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION and
AWS_ENDPOINT_URL, or from the machine's role.
"""

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from ecavg.common.errors import StorageError, UsageError, one_line
from ecavg.common.transfer import DIGEST, Blob, checked_digest

if TYPE_CHECKING:
    from obstore.store import S3Store

# A larger file is sent in parts of this size, four at a time, and fetched one part after the other.
PART_BYTES = 8 << 20
_PARTS_AT_ONCE = 4
# A multipart upload has 10,000 parts at most
# (https://docs.aws.amazon.com/AmazonS3/latest/userguide/qfacts.html).
_MAX_PARTS = 9_000
# What does not succeed in this time is tried again by whoever needs it, like a write to a full disk.
_RETRY_SECONDS = 5.0
_PART_SECONDS = 120.0
# The object that says which state directory uses the prefix.
_OWNER = "owner"

_CODE = re.compile(r"<Code>(\w+)</Code>")


class StoredObject(NamedTuple):
    """An object of the bucket, by its size and by the time of its upload in seconds since the epoch."""

    size_bytes: int
    at: float


class Bucket:
    """The objects below one prefix of a bucket; every method may be called from any thread, and blocks.

    Every method raises StorageError if the bucket does not do what it is asked.

    Args:
        url: `s3://BUCKET` or `s3://BUCKET/PREFIX`.

    Raises:
        UsageError: the package obstore is missing, or the environment has settings that it does not know.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._objects = _connect(url)

    def claim(self, owner: str) -> None:
        """Note who uses the prefix, unless it is noted already.

        Raises:
            UsageError: another state directory uses the prefix.
        """
        import obstore

        with bucket_errors(self.url):
            with suppress(obstore.exceptions.AlreadyExistsError):
                obstore.put(self._objects, _OWNER, owner.encode(), mode="create")
            found = bytes(obstore.get(self._objects, _OWNER).bytes())
        if found != owner.encode():
            raise UsageError(
                f"another state directory keeps its blobs in {self.url}: choose another prefix of the bucket"
            )

    def list(self) -> dict[str, StoredObject]:
        """Return every blob in the bucket, by its digest."""
        import obstore

        found = {}
        with bucket_errors(self.url):
            for page in obstore.list(self._objects):
                for each in page:
                    folder, _, digest = each["path"].rpartition("/")
                    if DIGEST.fullmatch(digest) and folder == digest[:2]:
                        found[digest] = StoredObject(each["size"], each["last_modified"].timestamp())
        return found

    def put(self, source: Path, digest: str) -> None:
        """Make a blob's object of the file; FileNotFoundError if there is no such file."""
        self.put_file(source, _key(digest))

    def put_file(self, source: Path, name: str) -> None:
        """Make an object of the file; it appears whole or not at all, and the service checks its bytes.

        Raises:
            FileNotFoundError: there is no such file.
        """
        import obstore

        part_bytes = max(PART_BYTES, source.stat().st_size // _MAX_PARTS)
        with bucket_errors(self.url):
            obstore.put(self._objects, name, source, chunk_size=part_bytes, max_concurrency=_PARTS_AT_ONCE)

    def fetch(self, blob: Blob, target: Path) -> None:
        """Write a blob's object to the file `target`; see `fetch_file`."""
        self.fetch_file(_key(blob.digest), blob, target)

    def fetch_file(self, name: str, blob: Blob, target: Path) -> None:
        """Write the object to the file `target`.

        Raises:
            StorageError: the bucket has other bytes than those of the digest, or none.
        """
        if self.fetch_unchecked(name, blob.size_bytes, target) != blob.digest:
            raise StorageError(
                f"the object {self.url}/{name} is damaged: the server's operator must restore it"
            )

    def fetch_unchecked(self, name: str, size_bytes: int, target: Path) -> str:
        """Write an object of this size to the file `target`, and return the digest of what has come."""
        hasher = hashlib.sha256()
        with target.open("wb") as file:
            for part in self._parts(name, size_bytes):
                hasher.update(part)
                file.write(part)
        return hasher.hexdigest()

    def is_whole(self, blob: Blob) -> bool:
        """Return True if the bytes of the object have its digest."""
        hasher = hashlib.sha256()
        for part in self._parts(_key(blob.digest), blob.size_bytes):
            hasher.update(part)
        return hasher.hexdigest() == blob.digest

    def where(self, digest: str) -> str:
        """Return the URL of the object of a blob."""
        return f"{self.url}/{_key(digest)}"

    def _parts(self, name: str, size_bytes: int) -> Iterator[bytes]:
        """Yield the bytes of the object, PART_BYTES at a time."""
        import obstore

        for start in range(0, size_bytes, PART_BYTES):
            end = min(start + PART_BYTES, size_bytes)
            with bucket_errors(self.url):
                part = obstore.get_range(self._objects, name, start=start, end=end).to_bytes()
            yield part

    def delete(self, digests: Sequence[str]) -> None:
        """Delete blobs' objects; those that are not there do not matter."""
        self.delete_files([_key(digest) for digest in digests])

    # Objects that are no blobs

    def names(self, prefix: str) -> dict[str, int]:
        """Return the sizes of the objects below the prefix, by name."""
        import obstore

        with bucket_errors(self.url):
            return {
                each["path"]: each["size"] for page in obstore.list(self._objects, prefix) for each in page
            }

    def size(self, digest: str) -> int:
        """Return how many bytes a blob's object has."""
        import obstore

        with bucket_errors(self.url):
            return obstore.head(self._objects, _key(digest))["size"]

    def read(self, name: str) -> bytes:
        """Return the bytes of a small object."""
        import obstore

        with bucket_errors(self.url):
            return bytes(obstore.get(self._objects, name).bytes())

    def delete_files(self, names: Sequence[str]) -> None:
        """Delete objects; those that are not there do not matter."""
        import obstore

        with bucket_errors(self.url):
            obstore.delete(self._objects, list(names))


@contextmanager
def bucket_errors(url: str) -> Iterator[None]:
    """Turn the errors of the client into StorageError."""
    import obstore

    try:
        yield
    except (obstore.exceptions.BaseError, OSError) as error:
        raise StorageError(
            f"the server's bucket {url} does not do what it is asked ({_reason(error)}): its operator must"
            " see to it; try again later"
        ) from error


def _reason(error: BaseException) -> str:
    """Return the S3 error code in the message of the client, or its first line."""
    text = str(error)
    if found := _CODE.search(text):
        return found[1]
    return one_line(text.partition("\n")[0])[:200]


def _key(digest: str) -> str:
    return f"{checked_digest(digest)[:2]}/{digest}"


def _connect(url: str) -> "S3Store":
    try:
        import obstore
        from obstore.store import S3Store
    except ImportError as error:
        raise UsageError(
            f"blobs in {url} need the package obstore: install ecavg[s3], or leave `blobs` out"
        ) from error
    parts = urlsplit(url)
    endpoint = os.environ.get("AWS_ENDPOINT_URL") or os.environ.get("AWS_ENDPOINT") or ""
    client: dict[str, Any] = {
        "timeout": timedelta(seconds=_PART_SECONDS),
        "allow_http": endpoint.startswith("http://"),
    }
    retries: Any = {
        "max_retries": 3,
        "retry_timeout": timedelta(seconds=_RETRY_SECONDS),
        "backoff": {
            "init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=1), "base": 2,
        },
    }  # fmt: skip
    try:
        return S3Store(
            parts.netloc,
            prefix=parts.path.strip("/") or None,
            config={"checksum_algorithm": "sha256"},
            client_options=client,  # type: ignore[arg-type]
            retry_config=retries,
        )
    except obstore.exceptions.BaseError as error:
        raise UsageError(
            f"cannot use {url} ({_reason(error)}): check the AWS_… variables in the environment"
        ) from error
