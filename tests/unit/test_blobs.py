"""Blobs: what files and a bucket have in common, and what only a bucket does."""

import asyncio
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from ecavg.cloud_server.commands.check import main as check
from ecavg.cloud_server.commands.doctor import checks
from ecavg.cloud_server.config import ServerConfig
from ecavg.cloud_server.disk import bucket as bucket_module
from ecavg.cloud_server.disk.bucket import Bucket
from ecavg.cloud_server.disk.tables import UploadRow
from ecavg.cloud_server.store import Store
from ecavg.cloud_server.upkeep import retired
from ecavg.common.errors import NotFoundError, StorageError, UsageError
from tests.buckets import SECRET, Service, s3_service
from tests.unit.states import digest_of

CONTENT, OTHER = b"some weights " * 100, b"other weights " * 90
DIGEST, OTHER_DIGEST = digest_of(CONTENT), digest_of(OTHER)

Open = Callable[..., Store]


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with s3_service() as service:
        yield service


@pytest.fixture
def url(service: Service) -> str:
    return service.new_bucket()


@pytest.fixture(params=["files", "bucket"])
def place(request: pytest.FixtureRequest) -> str:
    return "files" if request.param == "files" else request.getfixturevalue("url")


@pytest.fixture
def store(tmp_path: Path, place: str) -> Iterator[Store]:
    with closing(in_run(Store(tmp_path / "state", place=place))) as store:
        yield store


@pytest.fixture
def open_in_bucket(tmp_path: Path, url: str) -> Iterator[Open]:
    """Open the same state directory again and again, with its blobs in the same bucket."""
    opened: list[Store] = []

    def open_store(cache_bytes: int = 1 << 20, folder: str = "state") -> Store:
        for each in opened:
            each.close()
        opened.append(in_run(Store(tmp_path / folder, place=url, cache_bytes=cache_bytes)))
        return opened[-1]

    yield open_store
    for each in opened:
        each.close()


def in_run(store: Store) -> Store:
    if store.run() is None:
        store.create_run("run-1", "{}", "0" * 64, 0.0)
        store.join("a", 0.5)
    return store


async def upload(store: Store, content: bytes, agent_id: str = "a") -> str:
    digest = digest_of(content)
    partial = store.partial_path(agent_id, digest)
    partial.write_bytes(content)
    async with store.blobs.kept(partial, digest):
        (error,) = store.commit_uploads([UploadRow(agent_id, digest, "weights", 1.0)])
    assert error is None
    return digest


async def read(store: Store, digest: str) -> bytes:
    async with store.blobs.in_use([digest]):
        return store.blobs.path(digest).read_bytes()


def forget_uploads(store: Store) -> None:
    with store.transaction() as database:
        database.execute("DELETE FROM uploads")


# What files and a bucket have in common


async def test_upload_is_a_blob_that_is_read_back(store: Store) -> None:
    await upload(store, CONTENT)
    assert store.has_upload("a", DIGEST, "weights")
    assert store.blobs.size(DIGEST) == len(CONTENT)
    assert list(store.blobs.digests()) == [DIGEST]
    assert await read(store, DIGEST) == CONTENT
    assert not list(store.state_dir.partial.iterdir())


async def test_same_upload_again_changes_nothing(store: Store) -> None:
    for _ in range(2):
        await upload(store, CONTENT)
    assert list(store.blobs.digests()) == [DIGEST]
    assert await read(store, DIGEST) == CONTENT


async def test_model_that_was_made_is_adopted_once_and_again(store: Store) -> None:
    made = store.state_dir.jobs / "model.safetensors"
    made.write_bytes(CONTENT)
    for _ in range(2):
        async with store.blobs.kept(made, DIGEST):
            store.blobs.adopt(made, DIGEST)
    assert not made.exists()
    assert await read(store, DIGEST) == CONTENT


async def test_bytes_that_are_nowhere_make_no_blob(store: Store) -> None:
    missing = store.state_dir.jobs / "missing"
    with pytest.raises(NotFoundError):
        async with store.blobs.kept(missing, DIGEST):
            store.blobs.adopt(missing, DIGEST)
    (error,) = store.commit_uploads([UploadRow("a", DIGEST, "weights", 1.0)])
    assert isinstance(error, NotFoundError)
    assert store.blobs.size(DIGEST) is None


async def test_blob_that_no_record_names_goes_when_it_is_old(store: Store) -> None:
    await upload(store, CONTENT)
    assert retired.remove_blobs(store, stored_before=float("inf")) == 0
    forget_uploads(store)
    assert retired.remove_blobs(store, stored_before=store.blobs.stored_at(DIGEST) - 10) == 0
    assert retired.remove_blobs(store, stored_before=float("inf")) == 1
    assert store.blobs.size(DIGEST) is None
    assert not store.blobs.path(DIGEST).exists()
    with pytest.raises(FileNotFoundError):
        store.blobs.stored_at(DIGEST)


async def test_removed_blob_can_be_uploaded_again(store: Store) -> None:
    await upload(store, CONTENT)
    forget_uploads(store)
    retired.remove_blobs(store, stored_before=float("inf"))
    await upload(store, CONTENT)
    assert await read(store, DIGEST) == CONTENT


async def test_blobs_are_there_after_a_restart(tmp_path: Path, place: str) -> None:
    with closing(in_run(Store(tmp_path / "state", place=place))) as store:
        await upload(store, CONTENT)
    # Where no place is named, it is the one that it was.
    with closing(Store(tmp_path / "state")) as store:
        assert store.has_upload("a", DIGEST, "weights")
        assert await read(store, DIGEST) == CONTENT


@pytest.mark.parametrize("text", ["", "../../x", DIGEST.upper(), DIGEST[:-1]])
def test_only_digests_name_blobs(store: Store, text: str) -> None:
    for ask in (store.blobs.path, store.blobs.size):
        with pytest.raises(ValueError, match="no digest"):
            ask(text)


async def test_check_finds_nothing_and_then_a_missing_blob(
    store: Store, tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    await upload(store, CONTENT)
    forget_uploads(store)
    store.close()
    check([str(tmp_path / "state")])
    assert f"blobs: 1 ({len(CONTENT) / 1e6:.1f} MB)" in capsys.readouterr().out
    with closing(Store(tmp_path / "state")) as again:
        await upload(again, CONTENT)
        again.blobs.remove(DIGEST)
        again.blobs.finish_removals()
    assert check([str(tmp_path / "state")]) == 1
    where = "blobs" if place == "files" else place
    assert f"weights {where}/{DIGEST[:2]}/{DIGEST} is missing" in capsys.readouterr().out


# The bucket, and the files of it that are here


async def test_large_blob_travels_in_parts(open_in_bucket: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    content = os.urandom(6 << 20)
    # S3 takes no smaller parts than 5 MiB, but for the last one.
    monkeypatch.setattr(bucket_module, "PART_BYTES", 5 << 20)
    store = open_in_bucket(cache_bytes=0)
    digest = await upload(store, content)
    store = open_in_bucket(cache_bytes=0)
    assert not store.blobs.path(digest).exists()
    assert await read(store, digest) == content


async def test_files_that_were_used_last_stay_here_and_those_in_use_always(open_in_bucket: Open) -> None:
    store = open_in_bucket(cache_bytes=len(CONTENT) + len(OTHER))
    await upload(store, CONTENT)
    await upload(store, OTHER)
    await read(store, DIGEST)
    third = await upload(store, b"x")
    assert [store.blobs.path(each).exists() for each in (DIGEST, OTHER_DIGEST, third)] == [True, False, True]
    async with store.blobs.in_use([DIGEST]):
        await upload(store, OTHER * 2)
        assert store.blobs.path(DIGEST).read_bytes() == CONTENT
    store.blobs.finish_removals()
    assert not store.blobs.path(DIGEST).exists()
    assert await read(store, OTHER_DIGEST) == OTHER


async def test_many_readers_fetch_a_blob_once(open_in_bucket: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    await upload(open_in_bucket(), CONTENT)
    store, fetched = open_in_bucket(cache_bytes=0), []
    fetch = Bucket.fetch
    monkeypatch.setattr(Bucket, "fetch", lambda self, *args: fetched.append(args) or fetch(self, *args))
    assert set(await asyncio.gather(*(read(store, DIGEST) for _ in range(20)))) == {CONTENT}
    assert len(fetched) == 1


async def test_damaged_object_is_never_read(
    open_in_bucket: Open, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    await upload(open_in_bucket(), CONTENT)
    damaged = tmp_path / "damaged"
    damaged.write_bytes(CONTENT[::-1])
    Bucket(url).put(damaged, DIGEST)
    store = open_in_bucket(cache_bytes=0)
    with pytest.raises(StorageError, match="is damaged"):
        await read(store, DIGEST)
    assert not store.blobs.path(DIGEST).exists()
    assert not list(store.state_dir.incoming.iterdir())
    store.close()
    assert check([str(tmp_path / "state")]) == 1
    assert f"{url}/{DIGEST[:2]}/{DIGEST}: its" in capsys.readouterr().out


async def test_blob_that_is_being_put_into_the_bucket_is_not_removed(open_in_bucket: Open) -> None:
    store = open_in_bucket()
    await upload(store, CONTENT)
    forget_uploads(store)
    partial = store.partial_path("a", DIGEST)
    partial.write_bytes(CONTENT)
    async with store.blobs.kept(partial, DIGEST):
        assert retired.remove_blobs(store, stored_before=float("inf")) == 0
        store.commit_uploads([UploadRow("a", DIGEST, "weights", 1.0)])
    assert await read(open_in_bucket(cache_bytes=0), DIGEST) == CONTENT


async def test_blob_that_is_being_deleted_is_put_there_anew(
    open_in_bucket: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_in_bucket()
    await upload(store, CONTENT)
    forget_uploads(store)
    begun, go_on, delete = threading.Event(), threading.Event(), Bucket.delete

    def delete_slowly(bucket: Bucket, digests: list[str]) -> None:
        begun.set()
        assert go_on.wait(10)
        delete(bucket, digests)

    monkeypatch.setattr(Bucket, "delete", delete_slowly)
    put, really_put = threading.Event(), Bucket.put
    monkeypatch.setattr(Bucket, "put", lambda self, *args: put.set() or really_put(self, *args))
    removing = asyncio.create_task(asyncio.to_thread(retired.remove_blobs, store, float("inf")))
    await asyncio.to_thread(begun.wait, 10)
    uploading = asyncio.create_task(upload(store, CONTENT))
    # Nothing is put there while objects are deleted; if it were, it would be at once.
    assert not await asyncio.to_thread(put.wait, 0.3)
    go_on.set()
    await asyncio.gather(removing, uploading)
    assert await read(open_in_bucket(cache_bytes=0), DIGEST) == CONTENT


async def test_bucket_out_of_reach_refuses_like_a_full_disk(
    open_in_bucket: Open, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bucket_module, "_RETRY_SECONDS", 0.0)
    store = open_in_bucket()
    await upload(store, CONTENT)
    forget_uploads(store)
    partial = store.partial_path("a", OTHER_DIGEST)
    partial.write_bytes(OTHER)
    with away(store):
        with pytest.raises(StorageError, match="try again later") as refusal:
            async with store.blobs.kept(partial, OTHER_DIGEST):
                pass
        with pytest.raises(StorageError):
            retired.remove_blobs(store, stored_before=float("inf"))
    assert SECRET not in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert partial.read_bytes() == OTHER
    # All of it can be done again.
    async with store.blobs.kept(partial, OTHER_DIGEST):
        store.commit_uploads([UploadRow("a", OTHER_DIGEST, "weights", 1.0)])
    retired.remove_blobs(store, stored_before=0.0)
    assert list(open_in_bucket().blobs.digests()) == [OTHER_DIGEST]


@contextmanager
def away(store: Store) -> Iterator[None]:
    """Have the service out of the store's reach."""
    bucket = store.blobs._bucket
    with pytest.MonkeyPatch.context() as patch:
        # Nothing listens on this port.
        patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        patch.setattr(bucket, "_objects", Bucket(bucket.url)._objects)
        yield


async def test_files_of_an_earlier_server_go_into_its_bucket(tmp_path: Path, url: str) -> None:
    with closing(in_run(Store(tmp_path / "state"))) as store:
        await upload(store, CONTENT)
    with closing(Store(tmp_path / "state", place=url, cache_bytes=0)) as store:
        assert not store.blobs.path(DIGEST).exists()
        assert await read(store, DIGEST) == CONTENT


# What is refused at the start


def test_prefix_belongs_to_one_state_directory(open_in_bucket: Open) -> None:
    open_in_bucket()
    with pytest.raises(UsageError, match="another state directory keeps its blobs in s3://"):
        open_in_bucket(folder="other")


def test_place_of_blobs_does_not_change_unnoticed(open_in_bucket: Open, service: Service) -> None:
    store = open_in_bucket()
    store.close()
    for place in ("files", service.new_bucket()):
        with pytest.raises(UsageError, match="keeps its blobs in s3://"):
            Store(store.state_dir.path, place=place)


def test_wrong_bucket_is_said_in_one_line_and_can_be_put_right(tmp_path: Path, url: str) -> None:
    with pytest.raises(UsageError, match=r"s3://no-bucket.*NoSuchBucket.*AWS_") as refusal:
        Store(tmp_path / "state", place="s3://no-bucket/x")
    assert "\n" not in str(refusal.value)
    Store(tmp_path / "state", place=url).close()


def test_bucket_needs_a_package_that_is_named(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(UsageError, match=r"install ecavg\[s3\]"):
        Store(tmp_path / "state", place=url)


def test_damaged_note_of_the_bucket_is_said(tmp_path: Path) -> None:
    Store(tmp_path / "state").close()
    (tmp_path / "state/bucket.json").write_text(json.dumps([1]))
    with pytest.raises(UsageError, match=r"bucket\.json is damaged"):
        Store(tmp_path / "state")


@pytest.mark.parametrize("value", ["s3:/x", "s3://", "gs://x/y", "/srv", "s3://key@x/y", "s3://x/y?z", ""])
def test_place_is_files_or_the_url_of_a_bucket(value: str) -> None:
    with pytest.raises(ValueError, match="blobs"):
        ServerConfig(blobs=value)
    assert ServerConfig(blobs="s3://x/y/").blobs == "s3://x/y"


def test_doctor_looks_into_the_bucket(url: str) -> None:
    assert checks(ServerConfig(blobs=url))["blobs"]() == f"{url} has 0 blobs"
    with pytest.raises(StorageError, match="NoSuchBucket"):
        checks(ServerConfig(blobs="s3://no-bucket"))["blobs"]()
