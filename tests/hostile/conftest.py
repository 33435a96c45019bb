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
    """The server, which must be as well after the test as before."""
    with server.unharmed():
        yield server


@pytest.fixture
def attacker(server: Target) -> Agent:
    """An agent that is enrolled and has joined, like any other."""
    return server.agent("attacker")
