"""The command `cloud-server doctor`: is all there that a server with this configuration needs?"""

import asyncio
import socket
import sys
import time
from asyncio.subprocess import PIPE
from collections.abc import Sequence
from pathlib import Path

from ecavg.cloud_server.config import DEFAULT_PRESET, ENV_PREFIX, ServerConfig
from ecavg.cloud_server.disk.bucket import Bucket
from ecavg.cloud_server.disk.lock import unused
from ecavg.cloud_server.disk.place import FILES
from ecavg.cloud_server.state_dir import StateDir
from ecavg.common import cli, clock, doctor, tls
from ecavg.common.addresses import Address
from ecavg.common.errors import RunError, UsageError

# PyTorch is imported in this time even where the disk is slow.
TRAINER_SECONDS = 120.0


def main(argv: Sequence[str]) -> int:
    """Do all checks, print a line about each, and return 0 if all is well, else 1.

    Raises:
        UsageError: the configuration is wrong.
        RunError: stdout cannot be written.
    """
    parser = cli.Parser(
        prog="cloud-server doctor",
        description="Check all that a server needs with these flags before it is started, and change nothing."
        " Each line says ok, or what is wrong and what to do."
        " Exits with 0 when all is well, 1 when anything is wrong.",
    )
    config = cli.parse_command_line(parser, ServerConfig, ENV_PREFIX, argv, default_preset=DEFAULT_PRESET)
    return doctor.examine(checks(config))


def checks(config: ServerConfig) -> dict[str, doctor.Check]:
    """Return the checks of a server by their names, in the order in which they are done."""
    return {
        "versions": doctor.versions,
        "configuration": lambda: _describe(config),
        "port": lambda: _bind(config.host, config.port, "--port"),
        "page": lambda: _bind(config.http_host, config.http_port, "--http-port"),
        "state": lambda: _find_state(StateDir(config.state_dir)),
        "disk": lambda: doctor.disk(config.state_dir),
        "blobs": lambda: _find_blobs(config.blobs),
        "tls": lambda: _look_at_authority(config),
        "clock": doctor.read_clock,
        "trainer": lambda: _start_trainer(config),
    }


def _describe(config: ServerConfig) -> str:
    return (
        f"rounds {config.rounds or 'without end'}, agents {config.min_agents} to {config.agents_to_close},"
        f" model {config.run.model}, dataset {config.run.dataset}"
    )


def _bind(host: str, port: int, flag: str) -> str:
    """Return that the port is free, after it was taken and given back without a connection to it."""
    address = Address(host, port)
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        # A port whose last connections have just ended is free for a server.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise UsageError(
                f"nobody can listen on {address} ({error.strerror or error}): end the process that does, or"
                f" choose another address or {flag}"
            ) from error
    return f"{address} is free" if port else f"a free port of {host} is taken"


def _find_state(state_dir: StateDir) -> str:
    """Return whether the state directory can be used; raise UsageError if a server is at work there."""
    if state_dir.lock.is_file() and state_dir.blobs.is_dir():
        with unused(state_dir):
            pass
    return doctor.writable(state_dir.path)


def _find_blobs(place: str) -> str:
    """Return how many blobs the bucket has; raise UsageError or StorageError if it cannot be used."""
    if place == FILES:
        return "files in the state directory"
    return f"{place} has {len(Bucket(place).list())} blobs"


def _look_at_authority(config: ServerConfig) -> str:
    """Return how long the certificates hold, and raise UsageError if a server could not start with them."""
    if config.insecure:
        return "none with --insecure: whoever reaches the port can join under any name"
    folder = config.tls_folder
    if not (folder / "ca.pem").exists():
        doctor.writable(folder)
        return f"{folder} has no CA yet, the server makes one at its first start"
    return _days_left(folder)


def _days_left(folder: Path) -> str:
    """Return how long the CA in the folder holds; the server's certificate ends with it."""
    path = folder / "ca.pem"
    try:
        ca, key = tls.read_certificates(path)[0], tls.read_key(folder / "ca.key")
    except FileNotFoundError as error:
        raise UsageError(f"{path} is there and {folder / 'ca.key'} is not: put the CA's key there") from error
    if not tls.is_key_of(key, ca):
        raise UsageError(f"{folder / 'ca.key'} is not the key of {path}: put the right one there")
    starts, ends = tls.validity(ca)
    if ends == tls.NEVER:
        return "the certificates of the CA and the server do not end"
    days = doctor.days_until(ends)
    if days < doctor.FEW_DAYS or starts.timestamp() > time.time():
        raise UsageError(
            f"{path} is valid from {starts:%Y-%m-%d} until {ends:%Y-%m-%d}, and this machine's clock says"
            f" {clock.day(time.time())}: put another CA there, or set the clock ({clock.HOW_TO_SET})"
        )
    return f"the certificates of the CA and the server hold for {days} days"


def _start_trainer(config: ServerConfig) -> str:
    """Return what a process of its own says, which imports PyTorch and builds the run's model."""
    if config.trainers == "external":
        return "started elsewhere, and not looked at"
    try:
        code, output, errors = asyncio.run(_look(config))
    except TimeoutError as error:
        raise RunError(
            f"PyTorch was not there after {TRAINER_SECONDS:g} seconds: look at what keeps this machine busy"
        ) from error
    if code:
        last = (errors.strip().splitlines() or [""])[-1].removeprefix("trainer: ")
        raise RunError(last or f"its process ended with code {code}: give it more memory")
    return output.strip().splitlines()[-1]


async def _look(config: ServerConfig) -> tuple[int | None, str, str]:
    """Return the exit code, stdout and stderr of `trainer.look`; raise TimeoutError if it takes too long."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "ecavg.cloud_server.trainer.look",
        config.device,
        stdin=PIPE,
        stdout=PIPE,
        stderr=PIPE,
    )
    try:
        async with asyncio.timeout(TRAINER_SECONDS):
            output, errors = await process.communicate(config.run.model_dump_json().encode())
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return process.returncode, output.decode(errors="replace"), errors.decode(errors="replace")
