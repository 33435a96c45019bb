"""Where the blobs of a state directory are: files, or a bucket, whose URL the state directory remembers."""

import json
import uuid
from threading import RLock

from ecavg.cloud_server.disk.blobs import Blobs
from ecavg.cloud_server.disk.bucket import Bucket
from ecavg.cloud_server.disk.bucket_blobs import BucketBlobs
from ecavg.cloud_server.state_dir import StateDir
from ecavg.common.errors import StorageError, UsageError
from ecavg.common.files import read_text, replacing

FILES = "files"
DEFAULT_CACHE_BYTES = 10 * 2**30


def open_blobs(state_dir: StateDir, lock: RLock, place: str | None, cache_bytes: int) -> Blobs:
    """Return the blobs of a state directory.

    Args:
        place: "files" or the URL of a bucket; None: wherever they were last.
        cache_bytes: how many bytes of a bucket's blobs are kept as files.

    Raises:
        UsageError: the blobs are elsewhere, or the bucket cannot be used.
    """
    url, owner = known_bucket(state_dir)
    place = place or url or FILES
    if url and place != url:
        raise UsageError(
            f"{state_dir} keeps its blobs in {url}, not in {place}: give `blobs` that value, or choose"
            " another --state-dir"
        )
    if place == FILES:
        return Blobs(state_dir, lock)
    return _open_bucket(state_dir, lock, place, owner or uuid.uuid4().hex, cache_bytes)


def known_bucket(state_dir: StateDir) -> tuple[str | None, str]:
    """Return the URL of the bucket that has the blobs, and by which name this state directory uses it.

    Raises:
        UsageError: the file that says so is damaged.
    """
    if not state_dir.bucket.exists():
        return None, ""
    try:
        content = json.loads(read_text(state_dir.bucket, "file"))
        return str(content["url"]) or None, str(content["owner"])
    except (ValueError, TypeError, KeyError) as error:
        raise UsageError(f"{state_dir.bucket} is damaged: restore it from a backup") from error


def _open_bucket(state_dir: StateDir, lock: RLock, url: str, owner: str, cache_bytes: int) -> Blobs:
    """Return the blobs in a bucket, which this state directory remembers from now on."""
    is_new = known_bucket(state_dir)[0] is None
    try:
        bucket = Bucket(url)
        # Before the bucket hears of it: after a crash it is still known who has used the prefix.
        _write(state_dir, url, owner)
        bucket.claim(owner)
        is_new = False
        return BucketBlobs(state_dir, lock, bucket, cache_bytes)
    except StorageError as error:
        raise UsageError(f"{error}. Check `blobs`, and AWS_… variables in the environment") from error
    finally:
        if is_new:
            # It may be another bucket next time.
            _write(state_dir, "", owner)


def _write(state_dir: StateDir, url: str, owner: str) -> None:
    with replacing(state_dir.bucket) as partial:
        partial.write_text(json.dumps({"url": url, "owner": owner}) + "\n", "utf-8")
