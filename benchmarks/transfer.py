"""The speed of our upload and download of one large blob, compared with a bare gRPC stream of its chunks.

    python -m benchmarks.transfer --mib 512 --repeats 5

Ours is a cloud-server and the agent's CloudClient. The server streams an upload to disk, checks its digest
and that the weights are finite, makes the blob durable and records it. The client checks the digest of a
download and makes the file durable. Bare is a grpc.aio server that writes the chunks of an upload to a file
and flushes the file, and sends the chunks of a file as a download. The bare client reads a file to upload,
and drops the chunks of a "download", or writes and flushes them in a "download to disk". Ours and bare take
turns, and every pair gives a ratio.
"""

import argparse
import asyncio
import hashlib
import os
import secrets
import struct
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import numpy as np

from benchmarks import figures
from benchmarks.processes import Meter, Processes, peak_bytes, processes_in, reset_peak
from benchmarks.product import START_SECONDS, enrolled, start_server
from ecavg.cloud_server.door.authority import Authority
from ecavg.common import rpc
from ecavg.common.schema import read_header
from ecavg.common.tls import SERVER_NAME
from ecavg.common.transfer import CHUNK_BYTES, Blob, blob_of
from ecavg.edge_agent.client import CloudClient
from ecavg.edge_agent.identity import Identity
from ecavg.edge_agent.metrics import AgentMetrics

# Our transfers are compared with bare streams over the same transport.
TRANSPORTS = ("plaintext", "tls")
FACTORY = "benchmarks.workloads:blocks"

Way = Callable[[], Awaitable[None]]


class Took(NamedTuple):
    """The seconds that one transfer took."""

    wall_seconds: float
    client_cpu_seconds: float
    server_cpu_seconds: float


def main(argv: list[str] | None = None) -> int:
    arguments = _parse(argv)
    if arguments.serve:
        asyncio.run(_serve(arguments.serve))
        return 0
    machine = figures.machine()
    with tempfile.TemporaryDirectory(prefix="transfer-", dir=arguments.folder) as name:
        transports = {}
        for transport in TRANSPORTS:
            folder = Path(name) / transport
            folder.mkdir()
            with processes_in(folder) as processes:
                transports[transport] = asyncio.run(
                    _measure(processes, folder, arguments.mib, arguments.repeats)
                )
    result = {
        "benchmark": "transfer",
        "mib": arguments.mib,
        "chunk_bytes": CHUNK_BYTES,
        "transports": transports,
        "machine": machine,
    }
    columns = ("ours_mib_per_second", "bare_mib_per_second", "speed")
    rows = [
        (f"{direction}, {transport}", *(figure[column] for column in columns))
        for transport, each in transports.items()
        for direction, figure in each["directions"].items()
    ]
    rows += [
        (f"the client's memory, {direction}", f"+{mib:.1f} MiB", "", "")
        for each in transports.values()
        for direction, mib in each["client_added_mib"].items()
    ]
    headings = ("", "ours, MiB/s", "bare, MiB/s", "ours / bare")
    figures.emit(result, f"{arguments.mib} MiB over loopback", headings, rows)
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = figures.argument_parser(__doc__)
    parser.add_argument("--mib", type=int, default=512, metavar="N", help="size of the blob")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="pairs of each direction")
    parser.add_argument("--folder", type=Path, help="on the disk to write to (default: the temporary folder)")
    # With --serve, this command is the bare server of the folder.
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


async def _measure(processes: Processes, folder: Path, mib: int, repeats: int) -> dict[str, Any]:
    """Measure both directions, ours and bare in turn, over the transport that the folder is named after."""
    for name in ("server", "bare", "client"):
        (folder / name).mkdir()
    source, fetched = folder / "client/source", folder / "client/fetched"
    ours = await _ours(processes, folder, mib)
    bare = await _bare(processes, folder, ours.identity)
    num_bytes = ours.initial.size_bytes
    # The uploads send this file, too, because it has the header that the server expects.
    await ours.fetch(ours.initial, source)
    (folder / "bare/blob").write_bytes(source.read_bytes())

    ways: dict[str, tuple[Way, Way]] = {
        "upload": (lambda: ours.send(source), lambda: bare.send(source)),
        "download": (lambda: ours.fetch(ours.initial, fetched), lambda: bare.fetch(None)),
        "download to disk": (lambda: ours.fetch(ours.initial, fetched), lambda: bare.fetch(fetched)),
    }
    directions = {}
    for direction, (our_way, bare_way) in ways.items():
        took: dict[str, list[Took]] = {"ours": [], "bare": []}
        for index in range(repeats + 1):
            ours.blob = changed(source)
            our_took = await _timed(our_way, ours.server_pid)
            bare_took = await _timed(bare_way, bare.server_pid)
            # The first pair is a warm-up.
            if index:
                took["ours"].append(our_took)
                took["bare"].append(bare_took)
        directions[direction] = _figures(took, num_bytes)
    ours.blob = changed(source)
    added = {
        "upload": await _added_mib(lambda: ours.send(source)),
        "download": await _added_mib(lambda: ours.fetch(ours.initial, fetched)),
    }
    await ours.close()
    await bare.close()
    return {
        "directions": directions,
        "client_added_mib": added,
        "limits_mib_per_second": _limits(source, folder / "client/limit"),
    }


async def _timed(transfer: Way, server_pid: int) -> Took:
    meter = Meter(single={"server": server_pid})
    meter.begin()
    wall, cpu = time.perf_counter(), time.process_time()
    await transfer()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return Took(wall, cpu, meter.end()["server"].cpu_seconds)


async def _added_mib(transfer: Way) -> float:
    """Do the transfer, and return the peak memory of this process minus its memory before, in MiB."""
    before = reset_peak()
    await transfer()
    return (peak_bytes() - before) / 2**20


def _figures(took: dict[str, list[Took]], num_bytes: int) -> dict[str, Any]:
    wall = {side: [each.wall_seconds for each in measured] for side, measured in took.items()}
    figure: dict[str, Any] = {"speed": figures.ratios(wall["bare"], wall["ours"])}
    for side, measured in took.items():
        figure[f"{side}_mib_per_second"] = figures.spread([num_bytes / 2**20 / each for each in wall[side]])
        for key in ("client_cpu_seconds", "server_cpu_seconds"):
            figure[f"{side}_{key}"] = figures.spread([getattr(each, key) for each in measured])
    return figure


def _limits(source: Path, target: Path) -> dict[str, float]:
    """Return the speeds in MiB/s at which one core hashes the source file, and the disk takes its bytes."""
    data = source.read_bytes()
    started = time.perf_counter()
    hashlib.sha256(data).digest()
    hashed = time.perf_counter()
    with target.open("wb", buffering=0) as file:
        file.write(data)
        written = time.perf_counter()
        os.fsync(file.fileno())
    flushed = time.perf_counter()
    mib = len(data) / 2**20
    return {
        "sha256": mib / (hashed - started),
        "write": mib / (written - hashed),
        "write_and_fsync": mib / (flushed - hashed),
    }


def configuration(mib: int) -> str:
    """Return the TOML text of a `[run]` table whose model has `mib` MiB."""
    return f'model = "{FACTORY}"\ndataset = "made-up"\nnum_classes = 2\nimage_shape = [1, 1, {mib}]\n'


def changed(path: Path) -> Blob:
    """Change one number of the weights in the file, so that no server has them, and return the new blob."""
    header = read_header(path)
    with path.open("r+b") as file:
        file.seek(header.data_start)
        file.write(struct.pack("<f", np.float32(secrets.randbelow(2**24))))
    return blob_of(path)


# ---------------------------------------------------------------------- ours


@dataclass
class _Ours:
    client: CloudClient
    # None in plaintext.
    identity: Identity | None
    initial: Blob
    server_pid: int
    # The blob that the next upload sends.
    blob: Blob

    async def send(self, path: Path) -> None:
        await self.client.upload(path, self.blob, "weights", lambda *_: None)

    async def fetch(self, blob: Blob, path: Path) -> None:
        # The client downloads nothing if the file is there already.
        await asyncio.to_thread(path.unlink, missing_ok=True)
        await self.client.download(blob, path, lambda *_: None)

    async def close(self) -> None:
        await self.client.close()


async def _ours(processes: Processes, folder: Path, mib: int) -> _Ours:
    """Start a server whose run's model has `mib` MiB, and connect an agent to the server."""
    flags = ["--insecure"] * (folder.name == "plaintext")
    server = await asyncio.to_thread(start_server, processes, folder, configuration(mib), *flags)
    identity = None if flags else await enrolled(server, folder / "client", "agent-1")
    client = CloudClient(server.address, identity or "agent-1", AgentMetrics())
    await client.join()
    state = await anext(aiter(client.watch()))
    return _Ours(client, identity, state.initial_weights, server.pid, state.initial_weights)


# ---------------------------------------------------------------------- bare


class _Bare(NamedTuple):
    # A grpc.aio.Channel, whose stubs declare optional arguments as required.
    channel: Any
    server_pid: int

    async def send(self, path: Path) -> None:
        call = self.channel.stream_unary("/bare/Upload")()
        num_bytes = 0
        with path.open("rb", buffering=0) as file:
            while chunk := file.read(CHUNK_BYTES):
                await call.write(chunk)
                num_bytes += len(chunk)
        await call.done_writing()
        if int(await call) != num_bytes:
            raise RuntimeError("not all has arrived")

    async def fetch(self, path: Path | None) -> None:
        """Receive the file, and write and flush it if there is a path."""
        chunks = self.channel.unary_stream("/bare/Download")(b"")
        if path is None:
            async for _ in chunks:
                pass
            return
        with path.open("wb", buffering=0) as file:
            async for chunk in chunks:
                file.write(chunk)
            os.fsync(file.fileno())

    async def close(self) -> None:
        await self.channel.close()


async def _bare(processes: Processes, folder: Path, identity: Identity | None) -> _Bare:
    command = [sys.executable, "-m", "benchmarks.transfer", "--serve", folder / "bare"]
    pid = processes.start("bare-server", command)
    port = await asyncio.to_thread(
        processes.wait_for_output, "bare-server", r"(\d+)\n", seconds=START_SECONDS
    )
    address = f"127.0.0.1:{port}"
    if identity is None:
        return _Bare(grpc.aio.insecure_channel(address), pid)
    key, certificate, roots = identity.material
    credentials = grpc.ssl_channel_credentials(roots, key, certificate)
    name = ("grpc.ssl_target_name_override", SERVER_NAME)
    return _Bare(grpc.aio.secure_channel(address, credentials, options=[name]), pid)


async def _serve(folder: Path) -> None:
    """Serve as the bare server, which writes, flushes and sends on the event loop, and checks nothing."""
    numbers = count()

    async def upload(chunks: Any, _: object) -> bytes:
        num_bytes = 0
        # Our server writes a new file each time, so this one does, too. To overwrite an old file would be
        # cheaper, because the system would not have to find memory for the file.
        with (folder / f"upload-{next(numbers)}").open("wb", buffering=0) as file:
            async for chunk in chunks:
                num_bytes += file.write(chunk)
            os.fsync(file.fileno())
        return str(num_bytes).encode()

    async def download(_: bytes, __: object) -> Any:
        with (folder / "blob").open("rb", buffering=0) as file:
            while chunk := file.read(CHUNK_BYTES):
                yield chunk

    methods = {
        "Upload": grpc.stream_unary_rpc_method_handler(upload),
        "Download": grpc.unary_stream_rpc_method_handler(download),
    }
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bare", methods),))
    if folder.parent.name == "plaintext":
        port = server.add_insecure_port("127.0.0.1:0")
    # The bare server uses the certificates of our server.
    else:
        authority = Authority(folder.parent / "server/tls")
        port = server.add_secure_port("127.0.0.1:0", rpc.server_credentials(authority.material))
    print(port, flush=True)
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    sys.exit(main())
