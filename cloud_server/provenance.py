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
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cloud_server.disk import storage_errors
from cloud_server.round import Outcome
from cloud_server.store import Store
from cloud_server.tables import ForgettingRow
from common.errors import RunError
from common.files import replacing, sync

Entry = Mapping[str, Any]


def path_in(state_dir: Path) -> Path:
    return state_dir / "provenance.jsonl"


def read(path: Path) -> list[dict[str, Any]]:
    """The entries, without one that is half written.

    Raises:
        RunError: the file is damaged.
    """
    try:
        lines, _, _ = path.read_bytes().rpartition(b"\n")
        entries = [json.loads(line) for line in lines.splitlines()]
    except FileNotFoundError:
        return []
    except ValueError:
        entries = [None]
    if not all(isinstance(entry, dict) for entry in entries):
        raise RunError(f"{path} is damaged: restore it from a backup, or remove it to have it made anew")
    return entries


def catch_up(store: Store, state_dir: Path) -> None:
    """Have a line for each model that has been published; durable when this returns.

    Raises:
        StorageError: the disk does not let it.
        RunError: the file is damaged.
    """
    path = path_in(state_dir)
    present = read(path)
    missing = list(entries_from(store, 1 + max((each.get("round", 0) for each in present), default=0)))
    known = {entry.get("forgotten") for entry in present}
    missing += [_forgotten(row) for row in store.forgettings() if row.done_at and row.pseudonym not in known]
    if not missing:
        return
    with storage_errors():
        is_new = not path.exists()
        with path.open("ab") as file:
            file.truncate(_whole_bytes(path))
            file.write("".join(map(_line, missing)).encode())
        sync(path)
        if is_new:
            sync(state_dir)


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
                        "weights": item.weights,
                        "shards": list(item.shards),
                        "num_examples": item.num_examples,
                    }
                    for item in store.contributions(row.number)
                    if item.outcome == Outcome.ACCEPTED
                    and not item.reason  # else the model has nothing of it
                ],
            }


def forget(state_dir: Path, row: ForgettingRow) -> None:
    """Put the pseudonym in the agent's place, and say what has been forgotten; again it changes nothing.

    Raises:
        StorageError: the disk does not let it.
        RunError: the file is damaged.
    """
    path = path_in(state_dir)
    entries = read(path)
    if any(entry.get("forgotten") == row.pseudonym for entry in entries):
        return
    for entry in entries:
        for item in entry.get("contributions", ()):
            if item["agent_id"] == row.agent_id:
                item["agent_id"] = row.pseudonym
    entries.append(_forgotten(row))
    with storage_errors(), replacing(path) as partial:
        partial.write_text("".join(map(_line, entries)), "utf-8")


def _forgotten(row: ForgettingRow) -> dict[str, Any]:
    models = [{"round": number, "model": digest} for number, digest in row.models]
    return {"forgotten": row.pseudonym, "at": row.asked_at, "models": models}


def _line(entry: Entry) -> str:
    return json.dumps(entry) + "\n"


def _whole_bytes(path: Path) -> int:
    """Up to where the file has whole lines."""
    content = path.read_bytes()
    return content.rfind(b"\n") + 1
