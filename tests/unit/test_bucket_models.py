"""Models in a bucket that have a rest, and what else is read of blobs of which no file is here."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from cloud_server.jobs import JobDirectory, Result, WeightsFile
from cloud_server.run import adopt_model, kept_model
from cloud_server.showing.reports import Reports
from cloud_server.store import Store
from cloud_server.tracking.facts import of_rounds
from common.config import RunConfig
from tests.buckets import Service, s3_service
from tests.unit.states import begin, contribute, digest_of, upload

WEIGHTS, REST = b"the shared part", b"what does not travel"


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with s3_service() as service:
        yield service


@pytest.fixture
def store(tmp_path: Path, service: Service) -> Iterator[Store]:
    """A begun run, of whose blobs no file stays here that is not in use."""
    with closing(Store(tmp_path, place=service.new_bucket(), cache_bytes=0)) as store:
        yield store


def made(store: Store) -> tuple[JobDirectory, Result]:
    """Return a job that has made a model of two parts."""
    directory = JobDirectory(store.state_dir.job("round-0001"))
    directory.path.mkdir(parents=True, exist_ok=True)
    directory.weights_path.write_bytes(WEIGHTS)
    directory.rest_path.write_bytes(REST)
    files = [WeightsFile(sha256=digest_of(each), bytes=len(each)) for each in (WEIGHTS, REST)]
    return directory, Result(weights=files[0], rest=files[1])


async def adopt(store: Store) -> None:
    directory, result = made(store)
    async with kept_model(store, directory, result):
        adopt_model(store, directory, result)


async def test_model_with_a_rest_is_in_the_bucket(store: Store) -> None:
    await adopt(store)
    assert store.rest(digest_of(WEIGHTS)) == digest_of(REST)
    async with store.blobs.in_use([digest_of(REST)]):
        assert store.blobs.path(digest_of(REST)).read_bytes() == REST
