"""A run with all that makes its weights special: parts, an encoding, stale starts, and a bucket for blobs."""

from collections.abc import Iterator

import pytest

from ecavg.cloud_server.__main__ import main
from ecavg.cloud_server.disk.bucket import Bucket
from ecavg.common.schema import read_header
from tests.buckets import Service, s3_service
from tests.integration.test_async import (
    AGENT,
    PATIENT,
    contributors,
    is_published,
    round_that_waits,
    start_agent,
    start_slow_agent,
)
from tests.processes import Cluster, until

pytestmark = pytest.mark.timeout(200)


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with s3_service() as service:
        yield service


def test_stale_parts_are_merged_whose_start_and_rest_are_in_the_bucket_alone(
    service: Service, cluster: Cluster
) -> None:
    url = service.new_bucket()
    # No blob stays here that is not in use.
    settings = (
        *PATIENT, "--set", 'run.share_parameters=["1.*"]', "--set", 'run.wire="int8"',
        "--blobs", url, "--blob-cache-bytes", 0,
    )  # fmt: skip
    server = cluster.server(*settings)
    start_slow_agent(cluster)
    fast = [start_agent(cluster, name) for name in ("edge-1", "edge-2")]
    until(lambda: is_published(cluster, 1), server)
    # From now on a round needs the slow agent, too.
    fast[1].kill()
    number = until(lambda: round_that_waits(cluster), server)
    cluster.agent("edge-3", *AGENT, "--partition", "3/3")
    until(lambda: is_published(cluster, number), server)
    assert contributors(cluster, number) == {"edge-1": 0, "edge-3": number - 1}
    server.kill()
    folder = cluster.state_dir / f"rounds/{number:04d}"
    assert read_header(folder / "model.safetensors").schema.keys() == {"1.weight", "1.bias"}
    assert read_header(folder / "rest.safetensors").schema.keys() == {"3.weight", "3.bias"}
    assert cluster.report(number)["rest"]["sha256"] in Bucket(url).list()
    assert main(["check", str(cluster.state_dir)]) == 0
