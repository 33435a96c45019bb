import logging
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import structlog

from ecavg.cloud_server.store import Store
from ecavg.common import cli, logs


@pytest.fixture(autouse=True)
def _restore_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)
    structlog.contextvars.clear_contextvars()
    structlog.reset_defaults()
    logs.unbind()
    cli.complain_by(None)


@pytest.fixture
def state_dir(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def store(state_dir: Path) -> Iterator[Store]:
    with closing(Store(state_dir)) as store:
        yield store
