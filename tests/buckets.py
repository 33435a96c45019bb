"""A bucket on this machine, behind the real S3 protocol, for tests."""

import itertools
import os
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import pytest

from tests.conftest import need

try:
    from moto.server import ThreadedMotoServer
except ImportError:
    ThreadedMotoServer = None

# All services of a process have the same buckets.
_numbers = itertools.count(1)

KEY_ID, SECRET = "AKIAEXAMPLE", "not-to-be-seen"


class Service:
    """An S3 service on loopback, which can be out of reach for a while at the same address.

    Args:
        address: another address of this machine to listen on.
    """

    def __init__(self, address: str = "127.0.0.1") -> None:
        self._address = address
        self._server = ThreadedMotoServer(ip_address=address, port=0, verbose=False)
        self._server.start()
        self.port = self._server.get_host_and_port()[1]

    @property
    def env(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": f"http://{self._address}:{self.port}",
            "AWS_ACCESS_KEY_ID": KEY_ID,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
        }

    def new_bucket(self) -> str:
        """Make a bucket, and return the URL of a prefix in it."""
        name = f"bucket-{next(_numbers)}"
        request = urllib.request.Request(f"{self.env['AWS_ENDPOINT_URL']}/{name}", method="PUT")
        with urllib.request.urlopen(request):
            return f"s3://{name}/some/prefix"

    def go_away(self) -> None:
        self._server.stop()

    def come_back(self) -> None:
        self._server = ThreadedMotoServer(ip_address=self._address, port=self.port, verbose=False)
        self._server.start()

    def close(self) -> None:
        self._server.stop()


@contextmanager
def s3_service(address: str = "127.0.0.1") -> Iterator[Service]:
    need("S3 service", ThreadedMotoServer, "moto[server]")
    need("S3 client", find_spec("obstore"), "obstore")
    service = Service(address)
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        for name, value in service.env.items():
            patch.setenv(name, value)
        try:
            yield service
        finally:
            service.close()
