"""What changes a roll-out on record: its beginning, its decision, and what an operator asks for.

An operator's command writes these records beside a running server, which follows them (upkeep/rollout.py).
"""

from collections.abc import Collection

from ecavg.cloud_server.disk.tables import RoundRow
from ecavg.cloud_server.rollout.offers import next_start, read
from ecavg.cloud_server.store import Store
from ecavg.common.errors import ConflictError, NotFoundError


def begin_canary(store: Store, number: int, agent_ids: Collection[str], now: float) -> None:
    """Record that a round's model is for these agents alone, inside the transaction that publishes it.

    Nothing is recorded where an operator has pinned a model since the agents were drawn.
    """
    with store.transaction() as database:
        if read(store).pinned:
            return
        database.execute(
            "INSERT INTO rollouts (round, state, begun_at) VALUES (?, 'canary', ?)", (number, now)
        )
        database.executemany(
            "INSERT INTO canaries (round, agent_id) SELECT ?, agent_id FROM agents WHERE agent_id = ?",
            [(number, agent_id) for agent_id in sorted(agent_ids)],
        )


def decide(store: Store, number: int, *, is_released: bool, reason: str, now: float) -> None:
    """Record how a canary has ended, unless an operator has withdrawn the model meanwhile."""
    with store.transaction() as database:
        database.execute(
            "UPDATE rollouts SET state = ?, reason = ?, decided_at = ? WHERE round = ? AND state = 'canary'",
            ("released" if is_released else "withdrawn", reason, now, number),
        )


def withdraw(store: Store, number: int, now: float) -> None:
    """Record that no agent shall use a round's model any more; again changes nothing.

    Raises:
        NotFoundError: the round has published no model that agents use.
        ConflictError: the model is pinned, or there would be no weights that the next round can start from.
    """
    with store.transaction() as database:
        _published(store, number)
        offers, start_before = read(store), next_start(store)
        if number == offers.pinned:
            raise ConflictError(f"the model of round {number} is pinned: `cloud-server models unpin` first")
        database.execute(
            "INSERT INTO rollouts (round, state, reason, begun_at, decided_at)"
            " VALUES (:round, 'withdrawn', :reason, :at, :at) ON CONFLICT DO UPDATE"
            " SET state = 'withdrawn', reason = :reason, decided_at = :at WHERE state != 'withdrawn'",
            {"round": number, "reason": "by the operator", "at": now},
        )
        # The exception undoes the record.
        start = next_start(store)
        if start != start_before and not _is_kept(store, start):
            raise ConflictError(
                f"no model before round {number} is kept, so the next round could not start from one:"
                " raise keep_rounds, and withdraw the next model"
            )


def pin(store: Store, number: int, now: float) -> None:
    """Record that all agents are offered this round's model, in the place of another that was pinned.

    Raises:
        NotFoundError: the round has published no model that agents use, or it is not kept any more.
        ConflictError: the model is withdrawn, or a canary is under way.
    """
    with store.transaction() as database:
        row = _published(store, number)
        offers = read(store)
        if offers.canary:
            raise ConflictError(
                f"the canary of round {offers.canary} is under way: wait for its end, or withdraw its model"
            )
        if store.read("SELECT 1 FROM rollouts WHERE round = ? AND state = 'withdrawn'", number):
            raise ConflictError(f"the model of round {number} is withdrawn: pin another one")
        digest = row.published_digest or ""
        if digest != next_start(store) and not _is_kept(store, digest):
            raise NotFoundError(f"the model of round {number} is not kept any more: pin a newer one")
        database.execute("INSERT OR REPLACE INTO pins (only, round, at) VALUES (1, ?, ?)", (number, now))


def unpin(store: Store) -> int:
    """Record that no model is pinned, and return the round of the one that was.

    Raises:
        NotFoundError: none was pinned.
    """
    with store.transaction() as database:
        rows = store.read("SELECT round FROM pins")
        if not rows:
            raise NotFoundError("no model is pinned: `cloud-server models list` shows what is in use")
        database.execute("DELETE FROM pins")
    return int(rows[0]["round"])


def _published(store: Store, number: int) -> RoundRow:
    """Return the record of a round that has published a model for agents.

    Raises:
        NotFoundError: the round has not.
    """
    row = store.round(number) if number else None
    if row is None or row.published_digest is None:
        raise NotFoundError(
            f"round {number} has published no model: `cloud-server models list` shows those that there are"
        )
    return row


def _is_kept(store: Store, digest: str) -> bool:
    """Return True if the weights are among the blobs, or will be: a kept round names them."""
    return bool(
        store.read(
            "SELECT 1 FROM named_blobs JOIN rounds ON round = number"
            " WHERE digest = ?1 AND agent_id = '' AND (NOT retired OR number IN (SELECT round FROM pins))"
            " UNION SELECT 1 FROM rounds WHERE initial_weights = ?1"
            " AND number = (SELECT min(number) FROM rounds)",
            digest,
        )
    )
