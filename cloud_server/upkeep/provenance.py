"""STATE/provenance.jsonl: which data and weights are in which published model.

A line for each published model, in the order of the rounds:

    {"round": 1, "model": DIGEST, "at": SECONDS, "contributions":
        [{"agent_id": "edge-1", "weights": DIGEST, "shards": [DIGEST, …], "num_examples": 600}, …]}

and one for each agent that was forgotten:

    {"forgotten": PSEUDONYM, "at": SECONDS, "models": [{"round": 1, "model": DIGEST}, …]}

In the lines above that one its pseudonym, which was drawn when it was forgotten, stands in place of its id;
the digests stay. Apart from that nothing in the file is ever changed. It follows from the records: what a
crash has kept from it is added at the next start, and a line half written is written again.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from cloud_server.disk.failures import storage_errors
from cloud_server.disk.tables import ForgettingRow
from cloud_server.store import Store
from cloud_server.upkeep.forgotten import forgettings
from common.errors import RunError
from common.files import replacing, sync

Entry = Mapping[str, Any]

_READ_BYTES = 1024 * 1024  # at a time; most lines have some kB, and a shard's digest adds 68 bytes


def read(path: Path) -> list[dict[str, Any]]:
    """The entries, without one that is half written.

    Raises:
        RunError: the file is damaged.
    """
    try:
        lines, _, _ = path.read_bytes().rpartition(b"\n")
    except FileNotFoundError:
        return []
    return [_entry(path, line) for line in lines.splitlines()]


def catch_up(store: Store) -> None:
    """Have a line for each model that has been published; durable when this returns.

    It is done at each round's end, and reads no more of a long file than the last round's line.

    Raises:
        StorageError: the disk does not let it.
        RunError: the end of the file is damaged.
    """
    path = store.state_dir.provenance
    with storage_errors():
        if not path.exists():
            # Whole or not at all: one that is there tells of all who were forgotten before.
            forgotten = (_forgotten(row) for row in forgettings(store) if row.done_at)
            _write(path, chain(entries_from(store, 1), forgotten))
            return
        last, num_half = _end_of(path)
        if missing := list(entries_from(store, last + 1)):
            with path.open("ab") as file:
                file.truncate(file.tell() - num_half)
                file.write("".join(map(_line, missing)).encode())
            sync(path)


def entries_from(store: Store, first: int) -> Iterator[dict[str, Any]]:
    """What the records say of each published model, from that of round `first` on."""
    last = store.last_round()
    for number in range(first, last.number + 1 if last else first):
        row = store.round(number)
        if row and row.published:
            yield {
                "round": row.number,
                "model": row.published,
                "at": row.phase_times["published"],
                "contributions": [
                    {
                        "agent_id": item.agent_id,
                        "weights": item.weights_digest,
                        "shards": list(item.shard_digests),
                        "num_examples": item.num_examples,
                    }
                    for decision in store.contributions(row.number)
                    if decision.is_counted and (item := decision.contribution)
                ],
            }


def forget(store: Store, row: ForgettingRow) -> None:
    """Put the pseudonym in the agent's place, and say what has been forgotten; again it changes nothing.

    Raises:
        StorageError: the disk does not let it.
        RunError: the file is damaged.
    """
    path = store.state_dir.provenance
    entries = read(path)
    if any(entry.get("forgotten") == row.pseudonym for entry in entries):
        return
    for entry in entries:
        for item in entry.get("contributions", ()):
            if item["agent_id"] == row.agent_id:
                item["agent_id"] = row.pseudonym
    entries.append(_forgotten(row))
    with storage_errors():
        _write(path, entries)


def _write(path: Path, entries: Iterable[Entry]) -> None:
    with replacing(path) as partial, partial.open("w", encoding="utf-8") as file:
        file.writelines(map(_line, entries))


def _end_of(path: Path) -> tuple[int, int]:
    """The last round that has a whole line, 0 if none has; and the bytes of a line half written."""
    pieces = _backwards(path)
    half = next(pieces)
    entries = (_entry(path, line) for line in pieces)
    return next((entry["round"] for entry in entries if "round" in entry), 0), len(half)


def _backwards(path: Path) -> Iterator[bytes]:
    """What newlines part, from the end of the file on: first what is after the last of them."""
    with path.open("rb") as file:
        position, piece = file.seek(0, os.SEEK_END), b""
        while position:
            start = max(0, position - _READ_BYTES)
            file.seek(start)
            piece, *others = (file.read(position - start) + piece).split(b"\n")
            yield from reversed(others)
            position = start
        yield piece


def _entry(path: Path, line: bytes) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError:
        entry = None
    if not isinstance(entry, dict):
        raise RunError(f"{path} is damaged: restore it from a backup, or remove it to have it made anew")
    return entry


def _forgotten(row: ForgettingRow) -> dict[str, Any]:
    models = [{"round": number, "model": digest} for number, digest in row.models]
    return {"forgotten": row.pseudonym, "at": row.asked_at, "models": models}


def _line(entry: Entry) -> str:
    return json.dumps(entry) + "\n"
