"""What counts as an address, and which way an agent takes to a server."""

import socket
from threading import Thread
from urllib.parse import urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ecavg.common import addresses, proxy
from ecavg.common.addresses import Address
from ecavg.common.errors import UnavailableError

PROXY = "http://proxy.example:3128"


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("cloud.example:50051", Address("cloud.example", 50051)),
        (" 192.0.2.1:1\n", Address("192.0.2.1", 1)),
        ("[2001:db8::1]:65535", Address("2001:db8::1", 65535)),
        ("[fe80::1%eth0]:5", Address("fe80::1%eth0", 5)),
        ("my_server-2.:5", Address("my_server-2.", 5)),
        ("dns:50051", Address("dns", 50051)),
        ("bücher.example:5", Address("xn--bcher-kva.example", 5)),
    ],
)
def test_host_and_port_are_taken_as_they_are(text: str, address: Address) -> None:
    assert addresses.parse(text) == address
    assert addresses.parse(str(address)) == address


@given(st.text(max_size=40) | st.from_regex(r"(\w+:)?/*(\w+@)?[\[\]\w.:%-]+(/\w*)?", fullmatch=True))
def test_whatever_is_written_is_an_address_or_refused_with_one(text: str) -> None:
    try:
        shown = str(addresses.parse(text))
    except ValueError as error:
        shown = str(error).partition("; write ")[2]
    if shown:
        assert str(addresses.parse(shown)) == shown


@given(st.ip_addresses(), st.integers(1, 65535))
def test_url_of_any_address_is_read_back(host: object, port: int) -> None:
    parts = urlsplit(addresses.http_url(str(host), port, "/metrics"))
    assert (parts.hostname, parts.port, parts.path) == (str(host), port, "/metrics")


def test_interface_of_an_address_is_escaped_in_a_url() -> None:
    assert addresses.http_url("fe80::1%eth0", 80) == "http://[fe80::1%25eth0]:80/"


@pytest.mark.parametrize(
    ("environ", "variable"),
    [
        ({}, None),
        ({"http_proxy": PROXY}, "http_proxy"),
        ({"http_proxy": "http://other:1", "https_proxy": PROXY}, "https_proxy"),
        ({"https_proxy": "http://other:1", "grpc_proxy": PROXY}, "grpc_proxy"),
        ({"HTTP_PROXY": PROXY}, "HTTP_PROXY"),
        ({"HTTPS_PROXY": "http://other:1", "https_proxy": PROXY}, "https_proxy"),
        ({"http_proxy": "http://other:1", "HTTPS_PROXY": PROXY}, "HTTPS_PROXY"),
        ({"grpc_proxy": "", "https_proxy": " ", "http_proxy": f" {PROXY} "}, "http_proxy"),
        ({"all_proxy": PROXY}, None),
    ],
)
def test_first_variable_with_a_value_names_the_proxy(environ: dict[str, str], variable: str | None) -> None:
    found = proxy.find("cloud.example:50051", environ)
    assert (found and found.variable) == variable
    if found:
        assert str(found) == f"the proxy {PROXY} ({variable})"


@pytest.mark.parametrize(
    ("server", "entries", "is_exempt"),
    [
        ("cloud.example:1", "cloud.example", True),
        ("cloud.example:1", "a, CLOUD.example.,b", True),
        ("cloud.example:1", "a b cloud.example", True),
        ("eu.cloud.example:1", "cloud.example", True),
        ("eu.cloud.example:1", ".cloud.example", True),
        ("eu.cloud.example.:1", "*.cloud.example", True),
        ("mycloud.example:1", "cloud.example", False),
        ("cloud.example:1", "eu.cloud.example", False),
        ("cloud.example:1", "*", True),
        ("cloud.example:1", "10.0.0.0/8, , .", False),
        ("10.1.2.3:1", "10.0.0.0/8", True),
        ("11.1.2.3:1", "10.0.0.0/8", False),
        ("10.1.2.3:1", "10.1.2.3", True),
        ("10.1.2.3:1", "2.3", False),
        ("[2001:db8::1]:1", "2001:DB8:0::1", True),
        ("[2001:db8::1]:1", "[2001:db8::]/32", True),
        ("[fe80::1%eth0]:1", "fe80::/10", True),
        ("[2001:db8::1]:1", "0.0.0.0/0", False),
    ],
)
def test_entries_of_no_proxy_exempt_hosts_domains_and_networks(
    server: str, entries: str, is_exempt: bool
) -> None:
    assert (proxy.find(server, {"https_proxy": PROXY, "no_proxy": entries}) is None) == is_exempt


def test_exempt_server_needs_no_proxy_that_can_be_used() -> None:
    assert proxy.find("10.1.2.3:1", {"https_proxy": "socks5://x:1", "NO_PROXY": "10.0.0.0/8"}) is None


@pytest.mark.parametrize(
    ("environ", "is_exempt"),
    [
        ({"no_grpc_proxy": "other", "no_proxy": "cloud"}, False),
        ({"no_grpc_proxy": "cloud", "no_proxy": "other"}, True),
        ({"no_grpc_proxy": "", "no_proxy": "cloud"}, True),
    ],
)
def test_list_for_grpc_takes_the_place_of_the_general_one(environ: dict[str, str], is_exempt: bool) -> None:
    assert (proxy.find("cloud:1", {"https_proxy": PROXY} | environ) is None) == is_exempt


@pytest.mark.parametrize(
    ("url", "address", "credentials"),
    [
        ("http://proxy.example", Address("proxy.example", 80), ""),
        ("HTTP://Proxy.example:3128/", Address("proxy.example", 3128), ""),
        ("http://[2001:db8::2]:3128", Address("2001:db8::2", 3128), ""),
        ("http://me:p%40ss%3A@proxy.example:1", Address("proxy.example", 1), "me:p@ss:"),
        ("http://me@proxy.example:1", Address("proxy.example", 1), "me:"),
    ],
)
def test_url_of_a_proxy_is_taken_apart(url: str, address: Address, credentials: str) -> None:
    found = proxy.find("cloud:1", {"https_proxy": url})
    assert found
    assert (found.address, found.credentials) == (address, credentials)


def test_something_else_than_a_proxy_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{listener.getsockname()[1]}")

        def greet() -> None:
            with listener.accept()[0] as connection:
                connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")
                connection.recv(4096)

        thread = Thread(target=greet)
        thread.start()
        with pytest.raises(UnavailableError, match="the proxy does not speak HTTP"):
            proxy.connect("cloud.example:50051", 5)
        thread.join()
