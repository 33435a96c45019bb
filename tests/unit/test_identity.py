"""The probe by which an agent looks at a server's certificate, against servers that break it off."""

import gc
import select
import socket
import struct
import threading
import warnings
from collections.abc import Iterator

import pytest

from ecavg.common import proxy
from ecavg.edge_agent.identity import certificate_of

# The kernel resets a connection that is closed with a linger time of zero.
RESET = struct.pack("ii", 1, 0)


@pytest.fixture
def resetting_server() -> Iterator[str]:
    """Yield the address of a server that resets the first connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def reset() -> None:
            connection, _ = listener.accept()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            connection.close()

        thread = threading.Thread(target=reset)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        thread.join()


def test_connection_that_is_reset_before_the_handshake_is_closed(
    resetting_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python's own wrapping of the socket left it open."""
    connect = proxy.connect

    def connect_and_wait_for_the_reset(server: str, seconds: float) -> socket.socket:
        connection = connect(server, seconds)
        waiting = select.poll()
        waiting.register(connection, select.POLLHUP)
        assert waiting.poll(10_000), "the server should reset the connection"
        return connection

    monkeypatch.setattr(proxy, "connect", connect_and_wait_for_the_reset)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with pytest.raises(OSError, match=r"reset|Broken pipe"):
            certificate_of(resetting_server)
        gc.collect()
    assert [str(warning.message) for warning in seen] == []
