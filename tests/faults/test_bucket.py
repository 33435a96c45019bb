"""Runs whose blobs are in a bucket publish what runs with files do, whatever dies or is away."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from ecavg.cloud_server.commands.check import main as check
from ecavg.cloud_server.disk.bucket import Bucket
from ecavg.common.faults import Point
from tests.buckets import SECRET, Service, s3_service
from tests.faults.runs import NUM_ROUNDS, SETTINGS, Run, armed_with
from tests.processes import Cluster, cluster_in
from tests.soak import others_soak

pytestmark = pytest.mark.timeout(300)

FINISH_SECONDS = 240.0
REFUSAL = "does not do what it is asked"
# The first blob is the model that the run begins with, then come two agents' shards and weights.
CASES = [
    (Point.SERVER_BLOB_IN_BUCKET, 2),
    (Point.SERVER_BLOB_IN_BUCKET, 1),
    (Point.SERVER_BLOB_IN_BUCKET, 6),
    (Point.SERVER_BLOB_LINKED, 1),
    (Point.SERVER_UPLOAD_RECORDED, 1),
    (Point.SERVER_MODEL_ADOPTED, 2),
]


class Outage:
    """The service goes away once the server is up after its death, and comes back when that is noticed."""

    def __init__(self, service: Service) -> None:
        self.is_over = False
        self._service = service
        self._is_away = False

    def take_place(self, run: Run) -> None:
        if self._is_away:
            noticed = [process for process in run.processes.values() if REFUSAL in process.output]
            if noticed:
                self._service.come_back()
                self._is_away, self.is_over = False, True
        elif not self.is_over and run.num_restarts and "ready:" in run.processes["server"].output:
            self._service.go_away()
            self._is_away = True


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with s3_service() as service:
        yield service


@pytest.fixture(scope="module")
def with_files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the digests that a run with files publishes."""
    with cluster_in(tmp_path_factory.mktemp("files")) as cluster:
        run = Run(cluster, SETTINGS)
        run.start()
        return run.finish(FINISH_SECONDS)


@pytest.mark.parametrize(
    ("point", "count"),
    others_soak(CASES, CASES[:1]),
)
def test_run_publishes_the_same_though_its_server_dies_and_its_bucket_is_out_of_reach(
    with_files: list[str],
    service: Service,
    cluster: Cluster,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    point: Point,
    count: int,
) -> None:
    url, died = service.new_bucket(), tmp_path / "died"
    # No blob stays here that is not in use.
    run = Run(cluster, (*SETTINGS, "--blobs", url, "--blob-cache-bytes", 0))
    run.start(*armed_with(point, count, died))
    outage = Outage(service)
    assert run.finish(FINISH_SECONDS, outage.take_place) == with_files
    assert outage.is_over
    assert died.exists()
    assert len(with_files) == NUM_ROUNDS
    assert check([str(cluster.state_dir)]) == 0
    # What the killed server has left in the bucket is there once: each object is in the records.
    assert f"blobs: {len(Bucket(url).list())} (" in capsys.readouterr().out
    assert not [path for path in (cluster.folder / "logs").iterdir() if SECRET in path.read_text("utf-8")]
