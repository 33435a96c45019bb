from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from ecavg.cloud_server.store import Store
from tests.browser.pages import need_browser


@pytest.fixture(autouse=True)
def _browser() -> None:
    need_browser()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with closing(Store(tmp_path)) as store:
        yield store
