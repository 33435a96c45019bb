"""The bytes of blobs that came from agents and went to them, round by round."""

import structlog

from ecavg.cloud_server.metrics import ServerMetrics
from ecavg.cloud_server.store import Store
from ecavg.common.errors import StorageError

log = structlog.get_logger()


class Traffic:
    """The bytes that move while a round is the current one, which are recorded from time to time.

    What has moved since the last record is lost if the process is killed.
    """

    def __init__(self, store: Store, metrics: ServerMetrics) -> None:
        self._store = store
        self._metrics = metrics
        self._recorded = (0, 0)

    def record(self, number: int) -> None:
        """Add to a round what has moved since the last call.

        Raises:
            StorageError: the disk takes no data now; the next call records these bytes as well.
        """
        moved = (self._metrics.received_bytes, self._metrics.sent_bytes)
        new = [total - recorded for total, recorded in zip(moved, self._recorded, strict=True)]
        with self._store.transaction() as database:
            database.execute(
                "INSERT INTO traffic (round, received_bytes, sent_bytes) VALUES (?, ?, ?)"
                " ON CONFLICT DO UPDATE SET received_bytes = received_bytes + excluded.received_bytes,"
                " sent_bytes = sent_bytes + excluded.sent_bytes",
                (number, *new),
            )
        self._recorded = moved

    def record_if_possible(self, number: int) -> None:
        """Add to a round what has moved since the last call, unless the disk does not allow it."""
        try:
            self.record(number)
        except StorageError as error:
            log.warning("traffic_not_recorded", reason=str(error))
