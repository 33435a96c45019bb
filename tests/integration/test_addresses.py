"""Addresses as people write them, and a company's proxy between the agents and the server."""

import json
import socket
import urllib.request
from base64 import b64encode
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from socketserver import StreamRequestHandler, ThreadingTCPServer
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.processes import IS_COLD, Cluster, Command
from tests.soak import others_soak

QUICK = ("--min-agents", 1, "--set", "run.pretrain.epochs=1", "--set", "run.fine_tune.epochs=1")
# No resolver knows this name (RFC 6761), so whoever does not go through the proxy reaches nobody.
HIDDEN = "server.invalid:50051"
# On the port for "discard" nobody listens.
DEAD = "http://127.0.0.1:9"


class ConnectProxy(ThreadingTCPServer):
    """A proxy that connects everybody to one server, whatever the name they ask for.

    Args:
        credentials: the name and password that it asks for; "" for none.
        status: the answer to every request, if it is not 200.
    """

    daemon_threads = True

    def __init__(self, server: tuple[str, int], credentials: str = "", status: str = "") -> None:
        super().__init__(("127.0.0.1", 0), _Tunnel)
        self.server = server
        self.credentials = credentials
        self.status = status
        # The targets of all requests, in order.
        self.targets: list[str] = []
        self.port: int = self.server_address[1]

    def answer(self, target: str, headers: Mapping[str, str]) -> str:
        self.targets.append(target)
        wanted = f"Basic {b64encode(self.credentials.encode()).decode()}"
        if self.credentials and headers.get("proxy-authorization") != wanted:
            return "407 Proxy Authentication Required"
        return self.status or "200 Connection established"


class _Tunnel(StreamRequestHandler):
    server: ConnectProxy

    def handle(self) -> None:
        method, target, _ = self.rfile.readline().decode().split()
        assert method == "CONNECT"
        headers = {}
        while line := self.rfile.readline().decode().strip():
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        answer = self.server.answer(target, headers)
        self.wfile.write(f"HTTP/1.1 {answer}\r\n\r\n".encode())
        if answer.startswith("200"):
            with socket.create_connection(self.server.server) as other:
                back = Thread(target=_pass_on, args=(other, self.connection))
                back.start()
                _pass_on(self.connection, other)
                back.join()


def _pass_on(source: socket.socket, sink: socket.socket) -> None:
    try:
        while piece := source.recv(65536):
            sink.sendall(piece)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        pass


@contextmanager
def proxy_to(port: int, **kwargs: Any) -> Iterator[ConnectProxy]:
    with ConnectProxy(("127.0.0.1", port), **kwargs) as proxy:
        thread = Thread(target=proxy.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield proxy
        finally:
            proxy.shutdown()
            thread.join()


@contextmanager
def enrolling(cluster: Cluster, *args: object, env: Mapping[str, str]) -> Iterator[Command]:
    """Start `edge-agent enroll` for edge-1, with a token of the cluster's server."""
    command = Command(
        "ecavg.edge_agent", "enroll", "--agent-id", "edge-1", "--state-dir", cluster.folder / "edge-1",
        "--join-token-file", cluster.join_token(1), *args,
        folder=cluster.folder / "logs", env=env, forked=not IS_COLD,
    )  # fmt: skip
    try:
        yield command
    finally:
        command.close()


def refusal_of(tmp_path: Path, module: str, *args: object, env: Mapping[str, str] | None = None) -> str:
    """Return the one line with which the command ends at once, with exit code 2."""
    command = Command(module, *args, folder=tmp_path, env=env, cwd=tmp_path, forked=not IS_COLD)
    try:
        assert command.wait() == 2, command.output
    finally:
        command.close()
    lines = command.output.splitlines()
    assert len(lines) == 1, command.output
    return lines[0]


# ------------------------------------------------------------------ a company's proxy


@pytest.mark.parametrize(
    ("variable", "credentials", "user_info"),
    [("https_proxy", "", ""), ("GRPC_PROXY", "edge:p@ss wörd", "edge:p%40ss%20w%C3%B6rd@")],
)
def test_agent_that_only_the_proxy_connects_enrolls_and_finishes_a_round(
    cluster: Cluster, variable: str, credentials: str, user_info: str
) -> None:
    server = cluster.server(*QUICK)
    with proxy_to(cluster.port, credentials=credentials) as proxy:
        env = {variable: f"http://{user_info}127.0.0.1:{proxy.port}", "http_proxy": DEAD}
        token = ("--join-token-file", cluster.join_token(1))
        agent = cluster.agent("edge-1", *token, "--server", HIDDEN, env=env)
        assert agent.wait() == 0, agent.output
        assert server.wait() == 0
    # The three are the look at the server's certificate, the enrolment, and the agent itself.
    assert len(proxy.targets) >= 3
    assert set(proxy.targets) == {HIDDEN}
    assert [each["agent_id"] for each in cluster.report()["agents"]] == ["edge-1"]
    assert "p@ss" not in agent.output
    assert "%40ss" not in agent.output


def test_proxy_is_asked_for_an_ipv6_address_in_brackets(cluster: Cluster) -> None:
    cluster.server(*QUICK)
    # Nobody has this address, which is for documentation (RFC 3849).
    address = "[2001:db8::1]:50051"
    with proxy_to(cluster.port) as proxy:
        env = {"https_proxy": f"http://127.0.0.1:{proxy.port}"}
        with enrolling(cluster, "--server", address, env=env) as enrolment:
            assert enrolment.wait() == 0, enrolment.output
    assert set(proxy.targets) == {address}


def test_agent_without_tls_goes_through_the_proxy(cluster: Cluster) -> None:
    cluster.server("--insecure", *QUICK)
    with proxy_to(cluster.port) as proxy:
        env = {"http_proxy": f"http://127.0.0.1:{proxy.port}"}
        agent = cluster.agent("edge-1", "--insecure", "--server", HIDDEN, env=env)
        assert agent.wait() == 0, agent.output
    assert set(proxy.targets) == {HIDDEN}


EXEMPT = (("no_proxy", "localhost, 127.0.0.1"), ("no_grpc_proxy", "127.0.0.0/8"), ("NO_PROXY", "*"))


@pytest.mark.parametrize(("variable", "exempt"), others_soak(EXEMPT, EXEMPT[1:2]))
def test_listed_server_is_reached_without_the_proxy(cluster: Cluster, variable: str, exempt: str) -> None:
    server = cluster.server(*QUICK)
    address = f"127.0.0.1:{cluster.port}"
    env = {"https_proxy": DEAD, variable: exempt}
    with enrolling(cluster, "--server", address, env=env) as enrolment:
        assert enrolment.wait() == 0, enrolment.output
    assert "waiting" not in enrolment.output
    agent = cluster.agent("edge-1", env=env)
    agent.wait_for("joined as")
    server.terminate()


@pytest.mark.parametrize("variable", ["grpc_proxy", "https_proxy", "http_proxy", "HTTPS_PROXY"])
def test_dead_proxy_is_named_with_its_variable(cluster: Cluster, variable: str) -> None:
    where = rf"waiting for 127\.0\.0\.1:1 through the proxy http://127\.0\.0\.1:9 \({variable}\): "
    env = {variable: DEAD.replace("//", "//me:secret@")}
    with enrolling(cluster, "--server", "127.0.0.1:1", env=env) as enrolment:
        enrolment.wait_for(where + r".*[Cc]onnection refused")
    agent = cluster.agent("edge-2", "--server", "127.0.0.1:1", env=env)
    agent.wait_for(where + r".*[Cc]onnection refused")
    assert "secret" not in enrolment.output + agent.output


@pytest.mark.parametrize("status", ["403 Forbidden", "407 Proxy Authentication Required", "502 Bad\x1b[7m"])
def test_proxy_that_does_not_connect_is_named_with_its_answer(cluster: Cluster, status: str) -> None:
    with proxy_to(1, status=status) as proxy:
        env = {"https_proxy": f"http://me:secret@127.0.0.1:{proxy.port}"}
        where = rf"waiting for {HIDDEN} through the proxy http://127\.0\.0\.1:{proxy.port} \(https_proxy\): "
        with enrolling(cluster, "--server", HIDDEN, env=env) as enrolment:
            enrolment.wait_for(where + rf"the proxy answers {status[:7]}")
        agent = cluster.agent("edge-2", "--server", HIDDEN, env=env)
        agent.wait_for(where + rf".*HTTP proxy returned response code {status[:3]}")
        assert "secret" not in enrolment.output + agent.output
        assert "\x1b[7m" not in enrolment.output


@pytest.mark.parametrize("command", [("enroll", "--token", "x"), ()])
@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("https://me:secret@proxy.example:3128", "names a proxy of the kind https://"),
        ("socks5://me:secret@proxy.example:1080", "names a proxy of the kind socks5://"),
        ("proxy.example:3128", "is not the URL of a proxy"),
        ("http://me:secret/x@proxy.example:3128", "is not the URL of a proxy"),
        ("http://proxy.example:99999", "is not the URL of a proxy"),
        ("http://", "is not the URL of a proxy"),
    ],
)
def test_proxy_that_cannot_be_used_is_refused_at_once(
    tmp_path: Path, command: tuple[str, ...], url: str, reason: str
) -> None:
    server = ("--server", "server.example:50051", "--log-level", "debug")
    line = refusal_of(tmp_path, "ecavg.edge_agent", *command, *server, env={"https_proxy": url})
    assert f"https_proxy {reason}: write http://HOST:PORT" in line
    assert "secret" not in line


# ------------------------------------------------------------------ addresses as people write them

WRONG_SERVERS = {
    "https://cloud.example:50051": "cloud.example:50051",
    "http://cloud.example:50051/": "cloud.example:50051",
    "HTTPS://cloud.example": "cloud.example:50051",
    "dns:///cloud.example:50051": "cloud.example:50051",
    "ipv4:192.0.2.1:50051": "192.0.2.1:50051",
    "ipv6:[2001:db8::1]:50051": "[2001:db8::1]:50051",
    "cloud.example:50051/run": "cloud.example:50051",
    "pi@cloud.example:50051": "cloud.example:50051",
    "cloud.example : 50051": "cloud.example:50051",
    "cloud.example": "cloud.example:50051",
    "::1:50051": "[::1]:50051",
    "2001:db8::1": "[2001:db8::1]:50051",
    "unix:/run/ecavg.sock": None,
    "unix:///run/ecavg.sock": None,
    "cloud example:50051": None,
    ":50051": None,
    "cloud.example:": None,
    "cloud.example:0": None,
    "cloud.example:70000": None,
    "cloud.example:²": None,
    "192.0.2.300:50051": None,
    "cloud..example:50051": None,
    "c" * 64 + ".example:50051": None,
}


@pytest.mark.parametrize(
    ("command", "text"),
    [
        *(((), text) for text in WRONG_SERVERS),
        # The keys are the same for both commands, so a part of the table is enough for the second.
        *((("enroll", "--token", "x"), text) for text in list(WRONG_SERVERS)[::6]),
    ],
)
def test_server_that_is_not_host_and_port_is_refused_with_the_right_form(
    tmp_path: Path, command: tuple[str, ...], text: str
) -> None:
    line = refusal_of(tmp_path, "ecavg.edge_agent", *command, "--server", text)
    meant = WRONG_SERVERS[text]
    write = f"; write {meant}, not" if meant else " with a port from 1 to 65535, not"
    assert f"server: should be HOST:PORT{write} {text!r} (from the command line)" in line


WRONG_HOSTS = {
    "http://0.0.0.0:8080/": "0.0.0.0",
    "0.0.0.0:50051": "0.0.0.0",
    "[::]:50051": "::",
    "localhost:50051": "localhost",
    "tcp://localhost": "localhost",
    "localhost/": "localhost",
    " ": None,
    "*": None,
    "my host": None,
    "192.0.2.300": None,
    "unix:/run/ecavg.sock": None,
}


@pytest.mark.parametrize(
    ("key", "text"),
    [
        *(("host", text) for text in WRONG_HOSTS),
        *(("http_host", text) for text in list(WRONG_HOSTS)[::3]),
        *(("metrics_host", text) for text in list(WRONG_HOSTS)[::3]),
    ],
)
def test_host_that_is_more_than_a_host_is_refused_with_the_right_form(
    tmp_path: Path, key: str, text: str
) -> None:
    command = (
        ("ecavg.edge_agent", "--server", "127.0.0.1:1") if key == "metrics_host" else ("ecavg.cloud_server",)
    )
    line = refusal_of(tmp_path, *command, f"--{key.replace('_', '-')}", text)
    meant = WRONG_HOSTS[text]
    write = f"; write {meant}, not" if meant else ", such as 0.0.0.0, :: or localhost, not"
    assert f"{key}: should be a host alone{write} {text!r} (from the command line)" in line


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no ::1")


@needs_ipv6
@pytest.mark.parametrize("host", ["::1", " [::1] "])
def test_all_of_a_round_goes_over_ipv6(cluster: Cluster, host: str) -> None:
    server = cluster.server(*QUICK, "--host", host, "--http-host", host)
    assert f"agents on [::1]:{cluster.port}," in server.output
    token = ("--join-token-file", cluster.join_token(1))
    metrics = ("--metrics-host", host, "--metrics-port", 0)
    agent = cluster.agent("edge-1", *token, *metrics, "--server", f" [::1]:{cluster.port} ")
    shown = urlsplit(agent.wait_for(r"metrics on (http://\S+?/metrics)")[1])
    assert (shown.hostname, shown.path) == ("::1", "/metrics")
    assert shown.port
    assert agent.wait() == 0, agent.output
    assert server.wait() == 0


@needs_ipv6
def test_printed_url_of_the_status_page_opens_over_ipv6(cluster: Cluster) -> None:
    server = cluster.server(*QUICK, "--http-host", "::1")
    url = server.wait_for(r"status page on (\S+)")[1]
    assert urlsplit(url).hostname == "::1"
    with urllib.request.urlopen(f"{url}api/status") as reply:
        assert json.load(reply)["phase"] == "collecting"


@needs_ipv6
def test_ipv6_address_that_is_taken_is_named_as_an_address(tmp_path: Path) -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as taken:
        port = taken.getsockname()[1]
        state = ("--state-dir", tmp_path / "state")
        for ports in (
            ("--host", "::1", "--port", port, "--http-port", 0),
            ("--host", "127.0.0.1", "--port", 0, "--http-host", "[::1]", "--http-port", port),
        ):
            line = refusal_of(tmp_path, "ecavg.cloud_server", *ports, *state)
            assert f"cannot listen on [::1]:{port}: " in line


def test_server_may_have_the_name_of_a_scheme_of_grpc(cluster: Cluster) -> None:
    agent = cluster.agent("edge-1", "--server", "unix:50051")
    trouble = agent.wait_for("waiting for unix:50051: (.*)")[1]
    # gRPC would look for a file of this name otherwise.
    assert "No such file" not in trouble


def test_blanks_around_an_address_do_not_count(cluster: Cluster) -> None:
    server = cluster.server(*QUICK, "--host", " 127.0.0.1 ", "--http-host", " 127.0.0.1")
    assert f"agents on 127.0.0.1:{cluster.port}," in server.output
    cluster.agent("edge-1", "--server", f" 127.0.0.1:{cluster.port}\n").wait_for("joined as")
