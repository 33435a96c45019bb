"""What is done to a state directory beside the rounds: clean-ups, provenance, and forgetting agents."""

import asyncio
import math
import sqlite3
import time
from collections.abc import Callable, Collection
from pathlib import Path

import structlog

from ecavg.cloud_server.config import ServerConfig
from ecavg.cloud_server.disk.failures import when_disk_allows
from ecavg.cloud_server.disk.tables import ForgettingRow
from ecavg.cloud_server.intake.uploads import Uploads
from ecavg.cloud_server.ledger import Ledger
from ecavg.cloud_server.showing.presence import Presence
from ecavg.cloud_server.showing.reports import Reports
from ecavg.cloud_server.showing.standing import Standing
from ecavg.cloud_server.store import Store
from ecavg.cloud_server.upkeep import provenance, retention
from ecavg.cloud_server.upkeep.eraser import Eraser
from ecavg.common.errors import StorageError

FORGET_POLL_SECONDS = 0.5
# The longest time between two clean-ups while a round collects.
CLEAN_UP_SECONDS = 3600.0

log = structlog.get_logger()


class Caretaker:
    """The part of a server that removes what is no longer wanted, while the server serves.

    Args:
        clock: seconds since the epoch.
    """

    def __init__(
        self,
        config: ServerConfig,
        store: Store,
        ledger: Ledger,
        *,
        uploads: Uploads,
        eraser: Eraser,
        reports: Reports,
        standing: Standing,
        presence: Presence,
        clock: Callable[[], float],
    ) -> None:
        self._config = config
        self._store = store
        self._ledger = ledger
        self._uploads = uploads
        self._eraser = eraser
        self._reports = reports
        self._standing = standing
        self._presence = presence
        self._clock = clock
        # By the monotonic clock.
        self._clean_up_at = -math.inf

    # ------------------------------------------------------------------ what old rounds leave

    @property
    def seconds_to_clean_up(self) -> float:
        """Return how long it is until the next clean-up is due; 0: it is due now."""
        return max(0.0, self._clean_up_at - time.monotonic())

    async def clean_up(self) -> None:
        """Remove what old rounds have left; a disk that does not let it is no reason to stop."""

        async def remove() -> None:
            # What they are made from may go now. No agent can report while the ledger is locked.
            await self._reports.write_if_possible()
            async with self._reports.lock:
                await asyncio.to_thread(self._clean_up, self._uploads.active)

        try:
            await self._ledger.exclusively(remove)
        except (OSError, StorageError) as error:
            log.warning("clean_up_failed", reason=str(error))
        seconds = max(1.0, min(CLEAN_UP_SECONDS, self._config.keep_partial_seconds))
        self._clean_up_at = time.monotonic() + seconds
        self._uploads.forget_sizes()

    def _clean_up(self, active: Collection[Path]) -> None:
        retention.clean_up(
            self._store,
            keep_rounds=self._config.keep_rounds,
            keep_partial_seconds=self._config.keep_partial_seconds,
            now=self._clock(),
            retain_data=self._config.run.retain_data,
            active=active,
        )

    async def note_provenance(self) -> None:
        """Have provenance.jsonl tell of the last published model."""

        async def note() -> None:
            async with self._reports.lock:
                await asyncio.to_thread(provenance.add_last_round, self._store)

        await when_disk_allows(note)

    # ------------------------------------------------------------------ who is forgotten

    async def forget_those_asked_for(self) -> None:
        """Forget the agents that another process wants forgotten, for as long as this runs."""
        while True:
            try:
                for row in await self._eraser.waiting():
                    await self._forget(row)
            except (OSError, StorageError, sqlite3.Error) as error:
                log.error("forgetting_failed", reason=str(error))
            except Exception:
                # It is tried again: a deletion that was promised must not end in silence.
                log.exception("forgetting_failed")
            await asyncio.sleep(FORGET_POLL_SECONDS)

    async def _forget(self, row: ForgettingRow) -> None:
        agent_id = row.agent_id
        assert agent_id is not None

        async def change() -> None:
            self._ledger.expel(agent_id)
            self._presence.forget(agent_id)
            self._standing.forget(agent_id)
            await self._uploads.shut_out(agent_id)
            async with self._reports.lock:
                # The contribution does not count from now on, whatever fails below.
                self._ledger.believe(self._ledger.round.without(agent_id))
                await self._eraser.erase(row)
                # Results that were read from the files meanwhile may name the agent.
                self._standing.forget(agent_id)

        await self._ledger.exclusively(change)
