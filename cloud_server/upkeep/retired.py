"""The records of what is given up, by the rule in retention.py or because an agent is forgotten.

A blob is given up by a row in `removals`, written in the transaction that removes the records which named it;
`remove_blobs` removes the file afterwards.
"""

import sqlite3
from collections.abc import Collection

from ecavg.cloud_server.disk.failures import storage_errors
from ecavg.cloud_server.rollout.offers import next_start
from ecavg.cloud_server.store import Store

# The values of `rounds.retired`: a round's records are given up; and so are its files.
_RETIRED, _CLEARED = 1, 2


def uncleared_rounds(store: Store) -> list[int]:
    """Return the retired rounds that `note_cleared` has not been told of."""
    rows = store.read("SELECT number FROM rounds WHERE retired = ? ORDER BY number", _RETIRED)
    return [row["number"] for row in rows]


def note_cleared(store: Store, numbers: Collection[int]) -> None:
    """Record that no file of these retired rounds is left."""
    with store.transaction() as database:
        database.executemany(
            "UPDATE rounds SET retired = ? WHERE number = ?", [(_CLEARED, number) for number in numbers]
        )


def retire_rounds(store: Store, up_to: int, uploaded_before: float) -> None:
    """Give up what only rounds up to this number need, and old uploads that no round does; records only."""
    with store.transaction() as database:
        rounds = {"first": _first_not_retired(store), "up_to": up_to}
        database.execute("UPDATE rounds SET retired = ? WHERE number <= ? AND NOT retired", (_RETIRED, up_to))
        database.execute(
            "INSERT OR IGNORE INTO removals SELECT digest FROM named_blobs"
            " WHERE round BETWEEN :first AND :up_to",
            rounds,
        )
        database.execute(
            "INSERT OR IGNORE INTO removals SELECT digest FROM uploads WHERE at < ?", (uploaded_before,)
        )
        keep_needed(store, database)
        # An upload later than the contribution is for one that is still to come.
        database.execute(
            "DELETE FROM uploads WHERE rowid IN (SELECT uploads.rowid FROM uploads"
            " JOIN removals USING (digest) JOIN (SELECT agent_id, digest, max(at) AS at FROM named_blobs"
            " WHERE round BETWEEN :first AND :up_to GROUP BY agent_id, digest) AS spent"
            " USING (agent_id, digest) WHERE uploads.at <= spent.at)",
            rounds,
        )
        database.execute(
            "DELETE FROM uploads WHERE at < ? AND digest IN (SELECT digest FROM removals)",
            (uploaded_before,),
        )
        keep_uploaded(database)


def give_up_data(store: Store, up_to: int, uploaded_before: float) -> None:
    """Give up the shards of rounds up to this number, and all that were uploaded before; records only.

    Shards that a later round's contribution names stay.
    """
    with store.transaction() as database:
        database.execute(
            "INSERT OR IGNORE INTO removals SELECT value FROM contributions"
            " JOIN rounds ON number = round, json_each(shards) WHERE round <= ? AND NOT without_data",
            (up_to,),
        )
        database.execute("UPDATE rounds SET without_data = 1 WHERE number <= ?", (up_to,))
        database.execute(
            "INSERT OR IGNORE INTO removals SELECT digest FROM uploads WHERE kind = 'data' AND at < ?",
            (uploaded_before,),
        )
        keep_needed(store, database)
        database.execute(
            "DELETE FROM uploads WHERE kind = 'data' AND at < ? AND digest IN (SELECT digest FROM removals)",
            (uploaded_before,),
        )
        keep_uploaded(database)


def keep_needed(store: Store, database: sqlite3.Connection) -> None:
    """Take back, inside a transaction, the removal of every blob that a kept round names."""
    database.executemany(
        "DELETE FROM removals WHERE digest = ?", [(digest,) for digest in needed_blobs(store)]
    )


def keep_uploaded(database: sqlite3.Connection) -> None:
    """Take back, inside a transaction, the removal of every blob that an upload still names."""
    database.execute("DELETE FROM removals WHERE digest IN (SELECT digest FROM uploads)")


def needed_blobs(store: Store) -> set[str]:
    """Return the digests that rounds which are not retired name, and others that are always needed.

    These are the run's first initial weights, the model of a round that is pinned, and the model that the
    next round starts from, which may be older than the kept rounds where later ones are withdrawn.
    """
    rows = store.read(
        "SELECT digest FROM named_blobs WHERE round >= ?1"
        " UNION SELECT digest FROM named_blobs WHERE agent_id = '' AND round IN (SELECT round FROM pins)"
        " UNION SELECT initial_weights FROM rounds WHERE number = (SELECT min(number) FROM rounds)"
        " UNION SELECT ?2 UNION SELECT digest FROM rests WHERE weights = ?2"
        " UNION SELECT digest FROM encodings WHERE weights = ?2",
        _first_not_retired(store),
        next_start(store) if store.last_round() else "",
    )
    return {row["digest"] for row in rows}


def remove_blobs(store: Store, stored_before: float, *, spare: Collection[str] = ()) -> int:
    """Remove the blobs given up, and those stored before then that no record names; return how many."""
    needed = needed_blobs(store) | set(spare)
    given_up = {row["digest"] for row in store.read("SELECT digest FROM removals")}
    num_removed = 0
    for digest in store.blobs.digests():
        if digest in needed:
            continue
        # Under the lock, so that `commit_uploads` does not come between.
        with store.blobs.lock, storage_errors():
            if store.read("SELECT 1 FROM uploads WHERE digest = ?", digest):
                continue
            if digest in given_up or store.blobs.stored_at(digest) < stored_before:
                num_removed += store.blobs.remove(digest)
    store.blobs.finish_removals()
    with store.transaction() as database:
        database.executemany("DELETE FROM removals WHERE digest = ?", [(each,) for each in given_up])
    return num_removed


def _first_not_retired(store: Store) -> int:
    # The warm-up is round 0.
    rows = store.read("SELECT coalesce(max(number), -1) + 1 AS number FROM rounds WHERE retired")
    first: int = rows[0]["number"]
    return first
