import asyncio
import signal
import socket
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import Counter
from prometheus_client.parser import text_string_to_metric_families
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse

from ecavg.common import endpoints
from ecavg.common.endpoints import Endpoint, make_app, serve_http
from ecavg.common.errors import UsageError
from ecavg.common.metrics import make_registry


async def say_hi(_: Request) -> Response:
    return PlainTextResponse("hi")


class Process:
    """Stands in for what a server or an agent tells about itself."""

    def __init__(self) -> None:
        self.registry = make_registry()
        self.is_ready = False
        self.status: dict[str, Any] = {"round": 1}

    async def read_status(self) -> dict[str, Any]:
        return self.status

    def app(self, more: Mapping[str, Endpoint] | None = None, token: str | None = None) -> Starlette:
        return make_app(
            self.registry,
            ready=lambda: self.is_ready,
            status=self.read_status,
            more={"/": say_hi} if more is None else more,
            token=token,
        )


@pytest.fixture
def process() -> Process:
    return Process()


@pytest.fixture
async def client(process: Process) -> AsyncIterator[httpx.AsyncClient]:
    server = await serve_http(process.app(), host="127.0.0.1", port=0)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", trust_env=False) as client:
        yield client
    await server.stop()


async def test_who_does_not_show_the_token_learns_only_that_the_process_lives(process: Process) -> None:
    server = await serve_http(process.app(token="correct horse battery"), host="127.0.0.1", port=0)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", trust_env=False) as client:
        bearer = {"Authorization": "Bearer correct horse battery"}
        wrong = [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "correct horse battery"}]
        wrong += [{"Authorization": "Basic ☃"}, {"Authorization": "Bearer"}]
        for path in ("/", "/api/status", "/metrics"):
            for headers in wrong:
                encoded = {name: value.encode() for name, value in headers.items()}
                reply = await client.get(path, headers=encoded)
                assert reply.status_code == 401
                assert reply.headers["www-authenticate"].startswith("Basic ")  # the browser asks for it
            assert (await client.get(path, headers=bearer)).status_code == 200
            assert (await client.get(path, auth=("anyone", "correct horse battery"))).status_code == 200
            assert (await client.get(path, auth=("anyone", "wrong"))).status_code == 401
        assert (await client.get("/healthz")).status_code == 200
        assert (await client.get("/readyz")).status_code == 503
    await server.stop()


def test_beyond_loopback_there_is_always_a_token(tmp_path: Path) -> None:
    default, file = tmp_path / "default", tmp_path / "file"
    for host in ("127.0.0.1", "::1", "localhost"):
        assert endpoints.http_token(host, None, default) is None
    made = {endpoints.http_token(host, None, default) for host in ("0.0.0.0", "::", "example.org")}
    assert made == {default.read_text("utf-8").strip()}  # it stays the same
    assert default.stat().st_mode & 0o777 == 0o600
    assert endpoints.http_token("127.0.0.1", file, default) == file.read_text("utf-8").strip()
    file.write_text("short\n", "utf-8")
    with pytest.raises(UsageError, match="is too short: write 16 characters"):
        endpoints.http_token("127.0.0.1", file, default)
    with pytest.raises(UsageError, match="cannot read token file"):
        endpoints.http_token("127.0.0.1", tmp_path, default)


async def test_readyz_answers_503_until_ready_and_healthz_at_once(
    process: Process, client: httpx.AsyncClient
) -> None:
    assert (await client.get("/healthz")).status_code == 200
    assert (await client.get("/readyz")).status_code == 503
    process.is_ready = True
    assert (await client.get("/readyz")).status_code == 200


async def test_status_is_asked_for_each_time_and_never_cached(
    process: Process, client: httpx.AsyncClient
) -> None:
    process.status = {"round": 1, "progress": {"loss": float("nan")}, "agents": ({"slot": 1},)}
    reply = await client.get("/api/status")
    assert reply.json() == {"round": 1, "progress": {"loss": None}, "agents": [{"slot": 1}]}
    assert reply.headers["content-type"] == "application/json"
    assert reply.headers["cache-control"] == "no-store"

    process.status = {"round": 2}
    assert (await client.get("/api/status")).json() == {"round": 2}


async def test_metrics_are_the_process_own_and_the_registry_s(
    process: Process, client: httpx.AsyncClient
) -> None:
    Counter("sent_bytes_total", "Sent.", registry=process.registry).inc(3)
    reply = await client.get("/metrics")

    families = {family.name: family for family in text_string_to_metric_families(reply.text)}
    (sample,) = families["sent_bytes"].samples
    assert (sample.name, sample.value) == ("sent_bytes_total", 3)
    assert families["process_resident_memory_bytes"].samples[0].value > 1e6
    assert "python_info" in families
    assert reply.headers["content-type"].startswith("text/plain; version=")


async def test_metrics_come_as_openmetrics_to_who_asks(client: httpx.AsyncClient) -> None:
    reply = await client.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    assert reply.headers["content-type"].startswith("application/openmetrics-text")
    assert reply.text.endswith("# EOF\n")


async def test_process_without_a_page_has_none(process: Process) -> None:
    transport = httpx.ASGITransport(process.app(more={}))
    async with httpx.AsyncClient(transport=transport, base_url="http://agent") as client:
        assert (await client.get("/")).status_code == 404
        assert (await client.get("/api/status")).status_code == 200


async def test_port_in_use_is_a_usage_error_that_names_it(process: Process) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        with pytest.raises(UsageError, match=rf"127\.0\.0\.1:{port}: Address already in use; choose another"):
            await serve_http(process.app(), host="127.0.0.1", port=port)


async def test_address_of_another_machine_is_a_usage_error(process: Process) -> None:
    with pytest.raises(UsageError, match=r"cannot listen on 192\.0\.2\.1:0"):
        await serve_http(process.app(), host="192.0.2.1", port=0)


async def test_stopped_server_frees_its_port_and_leaves_signals_alone(process: Process) -> None:
    before = signal.getsignal(signal.SIGTERM)
    server = await serve_http(process.app(), host="127.0.0.1", port=0)
    async with httpx.AsyncClient(trust_env=False) as client:  # its connection is still open at stop()
        await client.get(f"http://127.0.0.1:{server.port}/healthz")
        assert signal.getsignal(signal.SIGTERM) is before
        async with asyncio.timeout(5):
            await server.stop()
    again = await serve_http(process.app(), host="127.0.0.1", port=server.port)
    assert again.port == server.port
    await again.stop()


async def test_server_stopped_before_its_first_request_stops(process: Process) -> None:
    server = await serve_http(process.app(), host="127.0.0.1", port=0)
    async with asyncio.timeout(5):
        await server.stop()


async def test_answer_that_takes_long_goes_on_while_it_is_read(
    process: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoints, "REQUEST_SECONDS", 0.05)

    async def parts() -> AsyncIterator[bytes]:
        for number in range(8):
            yield b"%d" % number
            await asyncio.sleep(0.05)

    async def slow(_: Request) -> Response:
        return StreamingResponse(parts())

    server = await serve_http(process.app({"/slow": slow}), host="127.0.0.1", port=0)
    async with httpx.AsyncClient(trust_env=False) as client:
        reply = await client.get(f"http://127.0.0.1:{server.port}/slow")
    await server.stop()
    assert reply.text == "01234567"


async def test_answer_that_nobody_reads_is_cut_off(process: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoints, "REQUEST_SECONDS", 0.02)
    ended = asyncio.Event()

    async def parts() -> AsyncIterator[bytes]:
        try:
            while True:
                yield bytes(2**20)
                await asyncio.sleep(0)
        finally:
            ended.set()

    async def endless(_: Request) -> Response:
        return StreamingResponse(parts())

    server = await serve_http(process.app({"/endless": endless}), host="127.0.0.1", port=0)
    _, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(b"GET /endless HTTP/1.1\r\nHost: a\r\n\r\n")
    async with asyncio.timeout(10):
        await ended.wait()
    writer.transport.abort()
    await server.stop()
