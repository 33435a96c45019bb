"""The store in which training machines find each other."""

import re
import socket

import pytest
from torch.distributed import TCPStore

from ecavg.cloud_server.trainer import rendezvous


def test_machines_find_in_the_store_what_others_have_put_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = []

    def meet() -> None:
        (port,) = re.findall(r"port\W+(\d+)", capsys.readouterr().err)
        TCPStore("127.0.0.1", int(port)).set("who", "first")
        found.append(TCPStore("127.0.0.1", int(port)).get("who"))

    monkeypatch.setattr(rendezvous.signal, "pause", meet)
    assert rendezvous.main(["--port", "0"]) == 0
    assert found == [b"first"]


def test_port_that_is_taken_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        assert rendezvous.main(["--port", str(port)]) == 2
    assert f"cannot listen on port {port}: choose another --port" in capsys.readouterr().err
