"""The enrolment of a device: it gets a certificate from the server that its join token belongs to."""

import asyncio
from collections.abc import Callable
from pathlib import Path

from ecavg.common import rpc, tls
from ecavg.common.errors import ECAvgError, UnavailableError, UsageError
from ecavg.common.faults import Point, crash_point
from ecavg.common.proxy import route
from ecavg.edge_agent.client import ask_for_certificate
from ecavg.edge_agent.identity import Identity, certificate_of, is_outside, wrong_clock
from ecavg.edge_agent.server_clock import ServerClock

# Where the server breaks off so many handshakes, the token is at fault, not the network.
MAX_UNTAKEN = 3


class WrongClockError(ECAvgError):
    """An error for a device that cannot believe the server's certificate before its clock is set."""


class Enrolment:
    """An enrolment under way; begun again after a crash, it goes on with the same key.

    Args:
        server: host and port.
    """

    def __init__(self, folder: Path, agent_id: str, token: tls.JoinToken, server: str) -> None:
        tls.make_private_folder(folder)
        self._folder = folder
        self._key = tls.read_or_make_key(folder / "key.pem")
        crash_point(Point.AGENT_KEY_WRITTEN)
        self._agent_id = agent_id
        self._token = token
        self._server = server
        self.request = tls.make_request(self._key, agent_id)
        self._leaf: tls.Certificate

    def material(self) -> tls.TlsMaterial:
        """Return the TLS material for a connection to whoever answers now; only `finish` makes it believed.

        Raises:
            OSError: nobody answers.
            UnavailableError: the proxy on the way does not connect.
            UsageError: whoever answers speaks plaintext, or shows something else than a certificate.
            WrongClockError: the certificate is not valid by this device's clock.
        """
        try:
            self._leaf = tls.load_certificate(certificate_of(self._server))
        except ValueError as error:
            raise UsageError(f"{self._server} shows no certificate of a server: check the address") from error
        if is_outside(tls.validity(self._leaf)):
            raise WrongClockError(wrong_clock(tls.validity(self._leaf)))
        leaf = self._token.leaf(self._key)
        return tls.TlsMaterial(tls.pem(self._key), tls.pem(leaf), tls.pem(self._leaf))

    def finish(self, certificate: bytes, ca_certificate: bytes) -> Identity:
        """Keep what the server has answered.

        Raises:
            UsageError: it is not the server that the token belongs to; nothing is kept.
        """
        try:
            ca, own = tls.load_certificate(ca_certificate), tls.load_certificate(certificate)
            is_ours = tls.fingerprint(ca) == self._token.fingerprint and tls.is_issued_by(self._leaf, ca)
        except ValueError:
            is_ours = False
        if not is_ours:
            raise UsageError(
                f"{route(self._server)} is not the server that the join token is of: check the address,"
                " and that nobody stands in between"
            )
        is_own = tls.is_key_of(self._key, own) and tls.common_name(own) == self._agent_id
        if not (is_own and tls.is_issued_by(own, ca)):
            raise UsageError(f"{self._server} sent a certificate that is not for this agent's key")
        crash_point(Point.AGENT_ENROLLED)
        tls.write_private(self._folder / "identity.pem", tls.pem(own) + tls.pem(ca))
        return Identity(self._folder)


async def enroll(
    enrolment: Enrolment,
    server: str,
    on_waiting: Callable[[str], None],
    on_wrong_clock: Callable[[str], None] = lambda _: None,
) -> Identity:
    """Have the device enrolled; a server that is out of reach is waited for.

    Args:
        on_waiting: as for CloudClient.
        on_wrong_clock: as for CloudClient.

    Raises:
        UsageError: the server is not the token's, speaks plaintext, or does not take the token.
        Refusal: the server says no.
    """
    num_untaken = 0
    told = ""

    async def attempt() -> Identity:
        nonlocal num_untaken
        try:
            material = await asyncio.to_thread(enrolment.material)
        except OSError as error:
            num_untaken = 0
            raise UnavailableError(f"nobody answers there ({error.strerror or error})") from error
        except WrongClockError as error:
            raise UnavailableError(str(error)) from error
        try:
            reply = await ask_for_certificate(server, material, enrolment.request)
        except UnavailableError as error:
            num_untaken += "closed" in str(error) or "reset" in str(error)
            if num_untaken < MAX_UNTAKEN:
                raise
            raise UsageError(
                f"{route(server)} does not take this join token: it has expired, was revoked, or is another"
                " server's; ask for another one (`cloud-server token create`)"
            ) from error
        identity = await asyncio.to_thread(enrolment.finish, reply.certificate, reply.ca_certificate)
        ServerClock(on_wrong_clock).heard(reply.server_time)
        return identity

    async def before_retry(error: BaseException, _: float) -> None:
        nonlocal told
        # A wrong clock is told even while the server is waited for already, because only a person mends it.
        if not told or (isinstance(error.__cause__, WrongClockError) and str(error) != told):
            told = str(error)
            on_waiting(told)

    identity: Identity = await rpc.retrying(before_retry)(attempt)
    if told:
        on_waiting("")
    return identity
