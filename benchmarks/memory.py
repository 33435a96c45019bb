"""The memory of the serving process while K agents upload and download a model at the same time.

    python -m benchmarks.memory --agents 2,8,32 --mib 64

For each K there is one cloud-server, and this process opens K connections with the agent's CloudClient. All
connections upload, then all download. The figures are peaks of the serving process since its start, with the
memory of its imports.
"""

import asyncio
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import figures
from benchmarks.processes import peak_bytes, processes_in
from benchmarks.product import enrolled, start_server
from benchmarks.transfer import changed, configuration
from ecavg.edge_agent.client import CloudClient
from ecavg.edge_agent.metrics import AgentMetrics


def main(argv: list[str] | None = None) -> int:
    parser = figures.argument_parser(__doc__)
    parser.add_argument("--agents", default="2,8,32", metavar="K,…", help="numbers of agents")
    parser.add_argument("--mib", type=int, default=64, metavar="N", help="size of the model")
    parser.add_argument("--folder", type=Path, help="on the disk to write to (default: the temporary folder)")
    arguments = parser.parse_args(argv)
    machine = figures.machine()
    peaks = {
        int(number): asyncio.run(_measure(int(number), arguments.mib, arguments.folder))
        for number in arguments.agents.split(",")
    }
    result = {"benchmark": "memory", "mib": arguments.mib, "serving_process": peaks, "machine": machine}
    rows = [(number, *peak.values()) for number, peak in peaks.items()]
    headings = ("agents", "idle, MiB", "uploads", "downloads", "upload, s", "download, s")
    figures.emit(result, f"the serving process and a model of {arguments.mib} MiB", headings, rows)
    return 0


async def _measure(num_agents: int, mib: int, parent: Path | None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=parent) as name, processes_in(Path(name)) as processes:
        folder = Path(name)
        flags = ("--min-agents", num_agents)
        server = await asyncio.to_thread(start_server, processes, folder, configuration(mib), *flags)
        names = [f"agent-{index}" for index in range(num_agents)]
        identities = [await enrolled(server, folder / name, name) for name in names]
        clients = [CloudClient(server.address, identity, AgentMetrics()) for identity in identities]
        for client in clients:
            await client.join()
        initial = (await anext(aiter(clients[0].watch()))).initial_weights
        idle = _peak_mib(server.pid)
        source = folder / "source"
        await clients[0].download(initial, source, lambda *_: None)
        blob = changed(source)

        started = time.perf_counter()
        uploads = (client.upload(source, blob, "weights", lambda *_: None) for client in clients)
        await asyncio.gather(*uploads)
        sent, uploading = time.perf_counter(), _peak_mib(server.pid)
        downloads = (
            client.download(initial, folder / f"fetched-{index}", lambda *_: None)
            for index, client in enumerate(clients)
        )
        await asyncio.gather(*downloads)
        fetched, downloading = time.perf_counter(), _peak_mib(server.pid)
        for client in clients:
            await client.close()
    return {
        "idle_mib": idle,
        "uploads_mib": uploading,
        "downloads_mib": downloading,
        "upload_seconds": sent - started,
        "download_seconds": fetched - sent,
    }


def _peak_mib(pid: int) -> float:
    return peak_bytes(pid) / 2**20


if __name__ == "__main__":
    sys.exit(main())
