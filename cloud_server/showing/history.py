"""The figures of all rounds that are over, and the course of a round's fine-tune, from what is on record."""

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeVar

from ecavg.cloud_server.disk.tables import RoundRow
from ecavg.cloud_server.jobs import Result, round_job
from ecavg.cloud_server.round import OVER
from ecavg.cloud_server.showing.reports import result_of
from ecavg.cloud_server.store import Store
from ecavg.common.run_state import Phase

# An answer has so many rounds at most, or points of one fine-tune.
MAX_POINTS = 300

_T = TypeVar("_T")

_FIRST_TO_LAST = "SELECT min(number) AS first, max(number) AS last FROM rounds WHERE phase IN (?, ?)"
# Mean and spread of a score that agents have measured on examples of their own.
_LOCAL = (
    "SELECT round, min(score_local) AS low, avg(score_local) AS mean, max(score_local) AS high"
    " FROM contributions WHERE outcome = 'accepted' AND score_local IS NOT NULL"
    " AND round IN (SELECT value FROM json_each(?)) GROUP BY round"
)
_AFTER = (
    "SELECT round, min(score) AS low, avg(score) AS mean, max(score) AS high"
    " FROM (SELECT round, coalesce(score_adapted, score_after) AS score FROM reports"
    " WHERE round IN (SELECT value FROM json_each(?))) GROUP BY round"
)
_ACCEPTED = (
    "SELECT round, count(*) AS number FROM contributions WHERE outcome = 'accepted'"
    " AND round IN (SELECT value FROM json_each(?)) GROUP BY round"
)
_TRAFFIC = "SELECT * FROM traffic WHERE round IN (SELECT value FROM json_each(?))"


class History:
    """What is on record of the rounds that are over; every method may be called from any thread."""

    def __init__(self, store: Store) -> None:
        self._store = store
        # The scores that the trainer has measured, by round: they never change.
        self._measured: dict[int, dict[str, float | None]] = {}

    def read(self, first: int | None = None, last: int | None = None) -> dict[str, Any]:
        """Return the figures of rounds that are over, at most MAX_POINTS of them, evenly spaced.

        Args:
            first: the number of the first round that is asked for; None: the first of all.
            last: the number of the last round that is asked for; None: the last of all.
        """
        ((lowest, highest),) = (
            (row["first"], row["last"]) for row in self._store.read(_FIRST_TO_LAST, *_OVER_VALUES)
        )
        if lowest is None:
            return {"first": None, "last": None, "every": 1, "rounds": []}
        start, end = max(lowest, _or(first, lowest)), min(highest, _or(last, highest))
        every = max(1, -(-(end - start + 1) // MAX_POINTS))
        # Counted from the end, so that the last round is there.
        numbers = list(range(end, start - 1, -every))[::-1]
        return {"first": lowest, "last": highest, "every": every, "rounds": self._figures(numbers)}

    def _figures(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        wanted = json.dumps(numbers)
        local, after = self._by_round(_LOCAL, wanted), self._by_round(_AFTER, wanted)
        accepted, traffic = self._by_round(_ACCEPTED, wanted), self._by_round(_TRAFFIC, wanted)
        rows = (self._store.round(number) for number in numbers)
        return [
            {
                "round": row.number,
                "outcome": row.phase,
                "num_contributions": accepted.get(row.number, {}).get("number", 0),
                "local": local.get(row.number),
                "after": after.get(row.number),
                **self._measured_in(row),
                "seconds": phase_seconds(row),
                "received_bytes": traffic.get(row.number, {}).get("received_bytes"),
                "sent_bytes": traffic.get(row.number, {}).get("sent_bytes"),
            }
            for row in rows
            if row
        ]

    def _by_round(self, query: str, numbers: str) -> dict[int, dict[str, Any]]:
        """Return the other columns of the rows that the query finds, by round."""
        rows = map(dict, self._store.read(query, numbers))
        return {row.pop("round"): row for row in rows}

    def _measured_in(self, row: RoundRow) -> Mapping[str, float | None]:
        if row.number not in self._measured:
            result = (result_of(self._store, row.number) if row.published_digest else None) or Result()
            self._measured[row.number] = {
                "average": result.candidates.get("average"),
                "start": result.candidates.get(result.start or ""),
                "fine_tuned": result.score_fine_tuned,
                "fine_tuned_average": result.score_fine_tuned_average,
                "published": result.score_published,
            }
        return self._measured[row.number]

    def losses(self, number: int) -> list[tuple[int, float | None]]:
        """Return step and loss of a round's fine-tune so far; nothing if that is not kept any more."""
        lines, _ = round_job(self._store.state_dir, number).read_progress(0)
        points = [(line.done, line.loss) for line in lines if line.phase == Phase.FINE_TUNING.value]
        return thinned(points, MAX_POINTS)


_OVER_VALUES = sorted(phase.value for phase in OVER)


def phase_seconds(row: RoundRow) -> dict[str, float]:
    """Return how long a round that is over was in each of its phases, in seconds."""
    return {phase: round(max(0.0, end - start), 3) for (phase, start), (_, end) in pairwise(row.phases)}


def thinned(points: Sequence[_T], most: int) -> list[_T]:
    """Return `most` of the points at most, evenly spaced, the last one among them."""
    every = max(1, -(-len(points) // most))
    return list(points[::-1][::every][::-1])


def _or(value: int | None, otherwise: int) -> int:
    return otherwise if value is None else value
