"""Transfers between this device and the server: blobs fetched once, decoded, and uploaded if need be."""

import asyncio
from pathlib import Path

import structlog

from ecavg.common.errors import InvalidError, NotFoundError, RunError
from ecavg.common.faults import Point, crash_point
from ecavg.common.progress import ProgressDisplay
from ecavg.common.transfer import Blob, Encoded, blob_of
from ecavg.common.wire import Base, decode
from ecavg.edge_agent.client import CloudClient, Kind, OnBytes
from ecavg.edge_agent.local_data import LocalData
from ecavg.edge_agent.state import AgentState
from ecavg.edge_agent.worker import Worker

log = structlog.get_logger()


class Transfers:
    """What this device sends and fetches in a run, with a bar for each transfer."""

    def __init__(
        self,
        client: CloudClient,
        disk: AgentState,
        worker: Worker,
        display: ProgressDisplay,
        data: LocalData,
    ) -> None:
        self._client = client
        self._disk = disk
        self._worker = worker
        self._display = display
        self._data = data
        # The last download, which is known to be whole.
        self._fetched: Blob | None = None

    async def download(self, blob: Blob, label: str, encoded: Encoded | None = None) -> Path:
        """Return the blob as a file; the same blob is fetched once.

        Args:
            encoded: the same weights in fewer bytes, if the server offers that.

        Raises:
            NotFoundError: the server does not keep the blob any more.
            RunError: the server offers more than the run's model can have.
        """
        path = self._disk.weights(blob.digest)
        is_here = blob == self._fetched and path.exists()
        if not is_here and not await asyncio.to_thread(is_whole, path, blob):
            if not (encoded and await self._download_encoded(encoded, blob, label)):
                await self._fetch(blob, label)
            crash_point(Point.AGENT_DOWNLOADED)
        self._fetched = blob
        return path

    async def fetch_rest(self, blob: Blob) -> Path:
        """Return the cloud's parts of the model that do not travel, which this device may be able to make.

        Raises:
            NotFoundError: the server does not keep the blob any more.
            RunError: the server offers more than the run's model can have.
        """
        path = self._disk.weights(blob.digest)
        if await asyncio.to_thread(is_whole, path, blob):
            return path
        models = await self._data.models()
        if not await self._worker.run(models.make_rest, blob):
            await self._fetch(blob, "rest of the model")
        return path

    async def upload_weights(self, path: Path, blob: Blob) -> None:
        """Upload a file of weights, unless the server has it."""
        await self._upload(path, blob, "weights", self._bar("upload weights"))

    async def upload_shards(self) -> None:
        """Upload those shards that the server does not have yet: it is asked for each."""
        shards, bar = (await self._data.models()).shards, self._bar("upload data")
        before, total = 0, sum(blob.size_bytes for blob in shards.values())

        def show(done: int, _: int) -> None:
            bar(before + done, total)

        for path, blob in shards.items():
            await self._upload(path, blob, "data", show)
            before += blob.size_bytes

    async def _download_encoded(self, encoded: Encoded, blob: Blob, label: str) -> bool:
        """Make the blob of a smaller one; return False if the base is not here, or the decoding fails."""
        base = Base(self._disk.weights(encoded.base), encoded.base) if encoded.base else None
        if base and not base.path.exists():
            # This agent was not here when the round began.
            return False
        try:
            path = await self._fetch(encoded.blob, label)
            await self._worker.run(_decode, path, base, blob, self._disk.weights(blob.digest))
        except (InvalidError, NotFoundError, RunError) as error:
            log.warning("downloaded_as_it_is", blob=blob.digest, reason=str(error))
            return False
        self._disk.discard(path)
        return True

    async def _fetch(self, blob: Blob, label: str) -> Path:
        """Download the blob; a server that is out of its mind shall not fill this device's disk."""
        most = await self._worker.run((await self._data.models()).most_weights_bytes)
        if not 0 < blob.size_bytes <= most:
            raise RunError(
                f"the server offers weights of {blob.size_bytes} bytes, and those of the run's model have"
                f" {most} at most: the server is not to be trusted, or the model another one there"
            )
        path, show = self._disk.weights(blob.digest), self._bar(f"download {label}")
        await self._worker.when_there_is_room(lambda: self._client.download(blob, path, show))
        return path

    async def _upload(self, path: Path, blob: Blob, kind: Kind, on_bytes: OnBytes) -> None:
        await self._client.upload(path, blob, kind, on_bytes)
        crash_point(Point.AGENT_UPLOADED)

    def _bar(self, label: str) -> OnBytes:
        return lambda done, total: self._display.update(label, done, total, unit="bytes")


def is_whole(path: Path, blob: Blob) -> bool:
    """Return True if the file is there and is the blob."""
    return path.exists() and blob_of(path) == blob


def _decode(encoded_path: Path, base: Base | None, blob: Blob, target_path: Path) -> None:
    """Write the blob to `target_path`.

    Raises:
        InvalidError: decoding gives another blob.
        RunError: the base is not usable.
    """
    decoded_path = target_path.with_name("decoded.safetensors")
    decode(encoded_path, decoded_path, base=base)
    crash_point(Point.AGENT_DECODED)
    if blob_of(decoded_path) != blob:
        raise InvalidError("decoding it gives other weights than the server's")
    decoded_path.replace(target_path)
