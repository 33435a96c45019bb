import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from ecavg.common.proxy import EXEMPT_VARIABLES, PROXY_VARIABLES
from tests.processes import Cluster, cluster_in

_NUM_LEFT = pytest.StashKey[int]()

# A run of the tests is the same each time; `make soak` looks further, and elsewhere each time.
settings.register_profile("same-every-time", derandomize=True, deadline=None, database=None, print_blob=True)
settings.register_profile("soak", max_examples=1000, derandomize=False, deadline=None, print_blob=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", action="store_true", help="also run what is left for `make soak`")


def pytest_configure(config: pytest.Config) -> None:
    # The servers of the tests are on this machine, wherever the proxy of its network is.
    for name in (*PROXY_VARIABLES, *EXEMPT_VARIABLES):
        os.environ.pop(name, None)
        os.environ.pop(name.upper(), None)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # A shell starts background jobs like this, and commands that the tests interrupt would inherit it.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    settings.load_profile("soak" if config.getoption("--soak") else "same-every-time")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the long tail of cases for `make soak`."""
    if config.getoption("--soak"):
        return
    left = [item for item in items if item.get_closest_marker("soak")]
    items[:] = [item for item in items if item not in left]
    config.hook.pytest_deselected(items=left)
    config.stash[_NUM_LEFT] = len(left)
    if hasattr(config, "workeroutput"):
        config.workeroutput["num_left"] = len(left)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take over what a worker of pytest-xdist has counted: each of them collects all tests."""
    node.config.stash[_NUM_LEFT] = getattr(node, "workeroutput", {}).get("num_left", 0)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if num_left := config.stash.get(_NUM_LEFT, 0):
        terminalreporter.write_line(f"{num_left} more cases are left for `make soak`")


def need(what: str, is_there: object, package: str) -> None:
    """Skip a test that needs something which is not there.

    Continuous integration has it: there, `ECAVG_TESTS_NEED` names it, and the test fails.
    """
    if is_there:
        return
    reason = f"there is no {what}: install the package {package}"
    if what in os.environ.get("ECAVG_TESTS_NEED", "").split(","):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with cluster_in(tmp_path) as cluster:
        yield cluster
