from collections.abc import Iterator

import pytest

from tests.hostile.target import Agent, Target, target_in


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """One server for all attacks of a test process, each in `unharmed()`; `target` does that by itself."""
    with target_in(tmp_path_factory.mktemp("server")) as target:
        yield target


@pytest.fixture
def target(server: Target) -> Iterator[Target]:
    """Return the server, and check after the test that the server is unharmed."""
    with server.unharmed():
        yield server


@pytest.fixture
def attacker(server: Target) -> Agent:
    """Return an agent that is enrolled and has joined, like any other agent."""
    return server.agent("attacker")
