"""STATE/provenance.jsonl: which data and weights are in which published model.

The file is written from the records, for people and their tools; the server never reads what it says. A line
for each agent that was forgotten comes first, in the order in which that was asked for:

    {"forgotten": PSEUDONYM, "at": SECONDS, "models": [{"round": 1, "model": DIGEST}, …]}

Then comes one for each published model, in the order of the rounds:

    {"round": 1, "model": DIGEST, "at": SECONDS, "contributions":
        [{"agent_id": "edge-1", "weights": DIGEST, "shards": [DIGEST, …], "num_examples": 600}, …]}

The line of a model that was withdrawn has `"withdrawn": true` as well.

A forgotten agent's pseudonym, which was drawn when it was forgotten, stands there in place of its id; the
digests stay. (They are empty for agents that were forgotten before the records kept them.)
"""

import json
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

from ecavg.cloud_server.disk.failures import storage_errors
from ecavg.cloud_server.store import Store
from ecavg.cloud_server.upkeep.forgotten import forgettings
from ecavg.common.files import replacing, sync

# What a line says of a model that was withdrawn.
WITHDRAWN = b'"withdrawn": true, '

_PUBLISHED = (
    "SELECT number, published, number IN (SELECT round FROM rollouts WHERE state = 'withdrawn') AS withdrawn,"
    " (SELECT at FROM phase_history WHERE round = number AND phase = 'published'"
    " ORDER BY entry LIMIT 1) AS at FROM rounds WHERE published IS NOT NULL"
)


def write(store: Store) -> None:
    """Have the file say all that the records do, whatever is there; durable when this returns.

    Raises:
        StorageError: the disk does not let it.
    """
    path = store.state_dir.provenance
    with storage_errors():
        if not _says(path, lines(store)):
            with replacing(path) as partial, partial.open("wb") as file:
                file.writelines(lines(store))


def add_last_round(store: Store) -> None:
    """Have the file say what the last published round's records do; durable when this returns.

    No more than the end of the file is read and written where that is what the round before has left:
    a run may have many rounds.

    Raises:
        StorageError: the disk does not let it.
    """
    rows = store.read(f"{_PUBLISHED} ORDER BY number DESC LIMIT 2")
    last, *before = (_line_of_round(store, row) for row in rows) if rows else (b"",)
    path = store.state_dir.provenance
    with storage_errors():
        if _ends_with(path, last):
            return
        if before and _ends_with(path, before[0]):
            with path.open("ab") as file:
                file.write(last)
            sync(path)
            return
    write(store)


def lines(store: Store) -> Iterator[bytes]:
    """Yield the lines that the file should have."""
    for row in forgettings(store):
        if not row.has_records:
            models = [{"round": number, "model": digest} for number, digest in row.models]
            yield _line({"forgotten": row.pseudonym, "at": row.asked_at, "models": models})
    for round_row in store.read(f"{_PUBLISHED} ORDER BY number"):
        yield _line_of_round(store, round_row)


def _line_of_round(store: Store, row: dict[str, Any]) -> bytes:
    contributions = store.read(
        "SELECT agent_id, weights, shards, num_examples FROM contributions"
        " WHERE round = ?1 AND outcome = 'accepted' AND reason = ''"
        " UNION ALL SELECT pseudonym, weights, shards, num_examples FROM forgotten_contributions"
        " WHERE round = ?1 ORDER BY agent_id",
        row["number"],
    )
    return _line(
        {
            "round": row["number"],
            "model": row["published"],
            "at": row["at"],
            **({"withdrawn": True} if row["withdrawn"] else {}),
            "contributions": [item | {"shards": json.loads(item["shards"])} for item in contributions],
        }
    )


def _line(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry).encode() + b"\n"


def _says(path: Path, expected: Iterator[bytes]) -> bool:
    """Return True if the file has these lines, and no others; a missing file has none."""
    if not path.exists():
        return next(expected, None) is None
    with path.open("rb") as file:
        return all(found == line for found, line in zip_longest(file, expected))


def _ends_with(path: Path, line: bytes) -> bool:
    """Return True if the line is the last one of the file."""
    if not path.exists():
        return not line
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - len(line) - 1))
        return b"\n" + line == (b"" if file.tell() else b"\n") + file.read()
