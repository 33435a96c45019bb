"""Models in a bucket that have a rest, and what else is read of blobs of which no file is here."""

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from ecavg.cloud_server import records
from ecavg.cloud_server.contribution import Contribution, Decision
from ecavg.cloud_server.disk.bucket import Bucket
from ecavg.cloud_server.disk.place import known_bucket
from ecavg.cloud_server.jobs import JobDirectory, Result, WeightsFile
from ecavg.cloud_server.records import round_job
from ecavg.cloud_server.round import Policy
from ecavg.cloud_server.run import adopt_model, kept_model
from ecavg.cloud_server.showing.reports import Reports
from ecavg.cloud_server.store import Store
from ecavg.cloud_server.tracking.facts import of_rounds
from ecavg.cloud_server.training.handout import HandOut
from ecavg.cloud_server.upkeep import forgotten
from ecavg.cloud_server.upkeep.forgetting import forget
from ecavg.common.config import RunConfig
from ecavg.common.run_state import Outcome
from tests.buckets import Service, s3_service
from tests.unit.states import AGENT, INITIAL, begin, digest_of

POLICY = Policy(min_agents=1, max_agents=1, deadline_seconds=None)
WEIGHTS, REST, SENT = b"the shared part", b"what does not travel", b"what an agent has sent"


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with s3_service() as service:
        yield service


@pytest.fixture
def store(tmp_path: Path, service: Service) -> Iterator[Store]:
    """Return a store in a bucket, of whose blobs no file stays here that is not in use."""
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


async def put(store: Store, content: bytes) -> str:
    """Have a blob in the bucket and not here."""
    made, digest = store.state_dir.jobs / "made", digest_of(content)
    made.write_bytes(content)
    async with store.blobs.kept(made, digest):
        store.blobs.adopt(made, digest)
    return digest


async def publish(store: Store) -> None:
    """Publish round 1, of whose blobs no file is left here."""
    async with store.blobs.kept(made(store)[0].path / "model.safetensors", digest_of(WEIGHTS)):
        await put(store, INITIAL)
        begin(store, store.state_dir.path)
    contribution = Contribution(AGENT, await put(store, SENT), (), 10)
    store.record_contribution(1, Decision(AGENT, Outcome.ACCEPTED, 1.0, contribution))
    await adopt(store)
    store.set_phase(1, "published", 2.0, published_digest=digest_of(WEIGHTS))
    # What is read makes room.
    async with store.blobs.in_use([digest_of(INITIAL)]):
        assert not store.blobs.path(digest_of(REST)).exists()
        assert not store.blobs.path(digest_of(SENT)).exists()


async def test_report_has_model_and_rest_that_are_in_the_bucket_alone(store: Store) -> None:
    await publish(store)
    reports = Reports(RunConfig(), store)
    # The second time is after the files of the blobs have gone again.
    for _ in range(2):
        await reports.write(1)
        async with store.blobs.in_use([digest_of(INITIAL)]):
            pass
        folder = store.state_dir.round(1)
        report = json.loads((folder / "report.json").read_text("utf-8"))
        assert report["rest"] == {"sha256": digest_of(REST), "bytes": len(REST)}
        assert (folder / "model.safetensors").read_bytes() == WEIGHTS
        assert (folder / "rest.safetensors").read_bytes() == REST


async def test_trackers_are_told_the_size_of_what_is_in_the_bucket_alone(store: Store) -> None:
    await publish(store)
    (facts,) = [
        each for each in of_rounds(store, -1, is_run_over=True) if "bytes/contributions" in each.metrics
    ]
    assert facts.metrics["bytes/contributions"] == len(SENT)


async def test_forgotten_agent_is_in_no_job_that_was_handed_out(store: Store) -> None:
    """The server was stopped in the middle of a round that machines elsewhere work on."""
    await put(store, INITIAL)
    begin(store, store.state_dir.path)
    contribution = Contribution(AGENT, await put(store, SENT), (), 10)
    store.record_contribution(1, Decision(AGENT, Outcome.ACCEPTED, 1.0, contribution))
    store.set_phase(1, "aggregating", 2.0)
    job = round_job(records.recorded_round(store, RunConfig(), POLICY), RunConfig(), "cpu", 1)
    JobDirectory(store.state_dir.job(job.name)).write_job(job)
    bucket = Bucket(known_bucket(store.state_dir)[0] or "")
    HandOut(store.state_dir, bucket).step()
    assert bucket.names("jobs")
    pseudonym = forgotten.ask_to_forget(store, AGENT, 3.0)
    forget(store, forgotten.forgetting_of(store, pseudonym), 4.0)
    assert not bucket.names("jobs")
    assert digest_of(SENT) not in bucket.list()
