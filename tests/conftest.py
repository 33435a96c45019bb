from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.processes import Cluster, cluster_in


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with cluster_in(tmp_path) as cluster:
        yield cluster
