"""The records of who is to be forgotten, and who has been; forgetting.py has the order of what is done."""

import secrets
from collections.abc import Collection

from ecavg.cloud_server.disk.tables import ForgettingRow
from ecavg.cloud_server.store import Store
from ecavg.cloud_server.upkeep.retired import keep_needed, keep_uploaded


def ask_to_forget(store: Store, agent_id: str, now: float) -> str:
    """Record that the agent is to be forgotten; return the pseudonym under which that is found again.

    Raises:
        NotFoundError: the agent has not joined this run.
    """
    with store.transaction() as database:
        for row in forgettings(store):
            if row.agent_id == agent_id:
                return row.pseudonym
        pseudonym = f"forgotten-{secrets.token_hex(8)}"
        database.execute(
            "INSERT INTO forgettings (pseudonym, agent_id, slot, asked_at) VALUES (?, ?, ?, ?)",
            (pseudonym, agent_id, store.slot(agent_id), now),
        )
    return pseudonym


def forgettings(store: Store) -> list[ForgettingRow]:
    """Return who is to be forgotten, and who has been, in the order in which that was asked for."""
    return _forgettings(store, "SELECT * FROM forgettings")


def to_forget(store: Store) -> list[ForgettingRow]:
    """Return who is to be forgotten, and is not yet."""
    return _forgettings(store, "SELECT * FROM forgettings WHERE done_at IS NULL")


def forgetting_of(store: Store, pseudonym: str) -> ForgettingRow:
    """Return what is on record under a pseudonym that `ask_to_forget` has given."""
    (row,) = (row for row in forgettings(store) if row.pseudonym == pseudonym)
    return row


def _forgettings(store: Store, query: str) -> list[ForgettingRow]:
    known = "agent_id IS NOT NULL AND agent_id IN (SELECT agent_id FROM agents)"
    rows = store.read(f"SELECT *, {known} AS has_records FROM ({query}) ORDER BY asked_at, pseudonym")  # noqa: S608
    return [
        ForgettingRow(
            **{**row, "has_records": bool(row["has_records"])}, models=_models(store, row["pseudonym"])
        )
        for row in rows
    ]


def _models(store: Store, pseudonym: str) -> tuple[tuple[int, str], ...]:
    rows = store.read(
        "SELECT number, published FROM forgotten_contributions JOIN rounds ON number = round"
        " WHERE pseudonym = ? ORDER BY number",
        pseudonym,
    )
    return tuple((row["number"], row["published"]) for row in rows)


def forget_records(store: Store, row: ForgettingRow, also: Collection[str]) -> None:
    """Remove every record of the agent, and give up the blobs that nobody else names.

    What it contributed to published models stays on record, by digest, under its pseudonym.

    Args:
        also: digests of blobs to give up with them, where no record names them.
    """
    assert row.slot is not None
    with store.transaction() as database:
        agent = (row.agent_id,)
        if not store.read("SELECT 1 FROM agents WHERE agent_id = ?", *agent):
            # An earlier attempt has done it.
            return
        database.execute(
            "INSERT INTO forgotten_contributions (pseudonym, round, weights, shards, num_examples)"
            " SELECT ?, round, weights, shards, num_examples FROM contributions JOIN rounds ON number = round"
            " WHERE agent_id = ? AND outcome = 'accepted' AND reason = '' AND published IS NOT NULL",
            (row.pseudonym, row.agent_id),
        )
        for table in ("named_blobs", "uploads"):
            database.execute(
                f"INSERT OR IGNORE INTO removals SELECT digest FROM {table} WHERE agent_id = ?",  # noqa: S608
                agent,
            )
        begun = store.blobs.partial_sizes([row.slot])[row.slot]
        database.executemany(
            "INSERT OR IGNORE INTO removals VALUES (?)", [(digest,) for digest in (*begun, *also)]
        )
        for table in ("reports", "contributions", "selections", "canaries", "uploads", "agents"):
            database.execute(f"DELETE FROM {table} WHERE agent_id = ?", agent)  # noqa: S608
        database.execute("UPDATE run SET class_names_of = '' WHERE class_names_of = ?", agent)
        keep_needed(store, database)
        keep_uploaded(database)


def note_forgotten(store: Store, pseudonym: str, now: float) -> None:
    """Record that nothing of the agent is left, its id included."""
    with store.transaction() as database:
        database.execute(
            "UPDATE forgettings SET agent_id = NULL, slot = NULL, done_at = ? WHERE pseudonym = ?",
            (now, pseudonym),
        )
    store.empty_log()
