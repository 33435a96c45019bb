"""What the server must not forget: the records in SQLite, and the blobs beside them.

The store knows the run, its agents, rounds, contributions, reports, uploads and encodings; the rules in
`upkeep/` have records of their own, which they read and write by `read` and `transaction`.

What a method has done is on disk when it returns: it survives the process, and the machine's power.
Where that takes several steps, each one leaves a state from which the whole can be done again.
"""

import json
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from threading import RLock
from typing import Any

from cloud_server.contribution import Contribution, Decision, Rejection
from cloud_server.disk.blobs import Blobs
from cloud_server.disk.database import connect, empty_log, migrate, version
from cloud_server.disk.failures import storage_errors
from cloud_server.disk.lock import locked
from cloud_server.disk.tables import (
    MIGRATIONS,
    AgentRow,
    EncodingRow,
    ReportRow,
    RoundRow,
    RunRow,
    UploadRow,
)
from cloud_server.state_dir import StateDir
from common.errors import NotFoundError, Reason, UsageError
from common.faults import Point, crash_point
from common.files import sync
from common.run_state import Outcome, Phase

# What is on record of a contribution of which nothing was kept.
_NOTHING = Contribution("", "", (), 0)


class Store:
    """The state directory of one server; every method may be called from any thread.

    Besides what each method says, those that write raise StorageError while the disk is full, read-only or
    failing, and sqlite3.IntegrityError for a round or an agent that was never recorded.

    Attributes:
        state_dir: where everything is.
        blobs: the files of weights and shards.
    """

    def __init__(self, path: Path, *, as_guest: bool = False) -> None:
        """Open the state directory at `path`, made if need be.

        Args:
            as_guest: open it beside the server that has it; what is asked of it here, that server does.

        Raises:
            InUseError: another server has it.
            UsageError: it is not usable.
        """
        self.state_dir = StateDir(path)
        self._lock = RLock()
        self.blobs = Blobs(self.state_dir, self._lock)
        with ExitStack() as resources:
            try:
                for folder in self.state_dir.folders:
                    folder.mkdir(parents=True, exist_ok=True)
                if not as_guest:
                    resources.enter_context(locked(self.state_dir))
                self._database = resources.enter_context(_database(self.state_dir, as_guest=as_guest))
                sync(path)
            except (OSError, sqlite3.DatabaseError) as error:
                what = error.strerror if isinstance(error, OSError) else error
                raise UsageError(
                    f"cannot use state directory {path} ({what}): choose a writable one with --state-dir"
                ) from error
            self._resources = resources.pop_all()

    def close(self) -> None:
        """Give the state directory back; harmless when done twice."""
        with self._lock:
            self._resources.close()

    # SQL, also for the rules in upkeep/

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Write records, all or none, durable when this ends; nobody else reads or writes meanwhile."""
        with self._lock, storage_errors(), self._database as database:
            database.execute("BEGIN IMMEDIATE")
            yield database

    def read(self, query: str, *values: object) -> list[dict[str, Any]]:
        """Return the rows that a query finds; inside a transaction, those that it has written so far."""
        with self._lock:
            return self._database.execute(query, values).fetchall()

    def empty_log(self) -> None:
        """Have the write-ahead log forget what was deleted."""
        with self._lock:
            empty_log(self._database)

    # The run and its agents

    def run(self) -> RunRow | None:
        """Return the run, once there is one."""
        rows = self.read("SELECT run_id, config_json, created_at FROM run")
        return RunRow(**rows[0]) if rows else None

    def create_run(self, run_id: str, config_json: str, initial_digest: str, now: float) -> None:
        """Record the run and its first round together; sqlite3.IntegrityError if there is a run."""
        with self.transaction() as database:
            database.execute(
                "INSERT INTO run (run_id, config_json, created_at) VALUES (?, ?, ?)",
                (run_id, config_json, now),
            )
            _insert_round(database, 1, initial_digest, now)

    def join(self, agent_id: str, now: float) -> int:
        """Return the agent's slot, from 1 on: at first the next free one, and ever after the same."""
        with self.transaction() as database:
            database.execute(
                "INSERT OR IGNORE INTO agents (agent_id, slot, joined_at)"
                " SELECT ?, coalesce(max(slot), 0) + 1, ? FROM agents",
                (agent_id, now),
            )
            return self.slot(agent_id)

    def slot(self, agent_id: str) -> int:
        """Return the slot that the agent has; NotFoundError if it never joined."""
        rows = self.read("SELECT slot FROM agents WHERE agent_id = ?", agent_id)
        if not rows:
            raise NotFoundError(f"agent {agent_id} has not joined this run: join first", Reason.UNKNOWN_AGENT)
        slot: int = rows[0]["slot"]
        return slot

    def agents(self) -> list[AgentRow]:
        """Return every agent that ever joined and is not forgotten, by slot."""
        rows = self.read("SELECT agent_id, slot, joined_at FROM agents ORDER BY slot")
        return [AgentRow(**row) for row in rows]

    # Rounds

    def open_round(self, number: int, initial_digest: str, now: float) -> None:
        """Record a new round, collecting; sqlite3.IntegrityError if the number is taken."""
        with self.transaction() as database:
            _insert_round(database, number, initial_digest, now)

    def set_phase(
        self,
        number: int,
        phase: str,
        now: float,
        *,
        failure: str = "",
        published_digest: str | None = None,
        left_out: Mapping[str, tuple[str, str]] | None = None,
    ) -> None:
        """Record that a round entered a phase, and how the round ended if it did.

        Args:
            published_digest: the digest of the published model.
            left_out: reason and message of the accepted contributions that were not used, by agent id.
        """
        with self.transaction() as database:
            database.execute(
                "UPDATE rounds SET phase = ?, failure = ?, published = ? WHERE number = ?",
                (phase, failure, published_digest, number),
            )
            database.executemany(
                "UPDATE contributions SET reason = ?, message = ? WHERE round = ? AND agent_id = ?",
                [(*why, number, agent_id) for agent_id, why in (left_out or {}).items()],
            )
            _append_phase(database, number, phase, now)

    def rounds(self, *, last: int = -1) -> list[RoundRow]:
        """Return every round, or so many of the last ones, by number."""
        return self._read_rounds(
            "SELECT * FROM (SELECT * FROM rounds ORDER BY number DESC LIMIT ?) ORDER BY number", last
        )

    def last_round(self) -> RoundRow | None:
        """Return the round with the highest number."""
        rounds = self._read_rounds("SELECT * FROM rounds ORDER BY number DESC LIMIT 1")
        return rounds[0] if rounds else None

    def has_published(self) -> bool:
        """Return True if any round has published a model."""
        return bool(self.read("SELECT 1 FROM rounds WHERE published IS NOT NULL LIMIT 1"))

    def round(self, number: int) -> RoundRow | None:
        """Return the round with this number."""
        rounds = self._read_rounds("SELECT * FROM rounds WHERE number = ?", number)
        return rounds[0] if rounds else None

    def _read_rounds(self, query: str, *values: object) -> list[RoundRow]:
        with self._lock:
            return [_round(row, self._phase_times(row["number"])) for row in self.read(query, *values)]

    def _phase_times(self, number: int) -> dict[str, float]:
        history = self.read("SELECT phase, at FROM phase_history WHERE round = ? ORDER BY entry", number)
        return {row["phase"]: row["at"] for row in reversed(history)}

    # Contributions and reports

    def record_contribution(self, number: int, decision: Decision) -> None:
        """Record how an agent's part in a round ended; the last record for an agent and round stands."""
        contribution = decision.contribution or _NOTHING
        reason, message = decision.why or ("", "")
        with self.transaction() as database:
            database.execute(
                "INSERT OR REPLACE INTO contributions (round, agent_id, outcome, weights, shards,"
                " num_examples, num_shared, initial_weights, accuracy_local, reason, message, at)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    number,
                    decision.agent_id,
                    decision.outcome,
                    contribution.weights_digest,
                    json.dumps(contribution.shard_digests),
                    contribution.num_examples,
                    contribution.num_shared,
                    contribution.initial_digest,
                    contribution.accuracy_local,
                    reason,
                    message,
                    decision.at,
                ),
            )

    def contributions(self, number: int) -> list[Decision]:
        """Return how every agent's part in a round ended, in agent-id order."""
        rows = self.read("SELECT * FROM contributions WHERE round = ? ORDER BY agent_id", number)
        return [_decision(row) for row in rows]

    def num_accepted(self) -> dict[int, int]:
        """Return how many contributions each round has accepted, of the rounds that have any."""
        rows = self.read(
            "SELECT round, count(*) AS number FROM contributions WHERE outcome = 'accepted' GROUP BY round"
        )
        return {row["round"]: row["number"] for row in rows}

    def counted_rounds(self) -> dict[str, int]:
        """Return the last published round that counted a contribution of an agent, by agent id."""
        rows = self.read(
            "SELECT agent_id, max(round) AS round FROM contributions JOIN rounds ON number = round"
            " WHERE outcome = 'accepted' AND reason = '' AND published IS NOT NULL GROUP BY agent_id"
        )
        return {row["agent_id"]: row["round"] for row in rows}

    def last_left_out(self) -> dict[str, tuple[int, str, str]]:
        """Return each agent's last accepted contribution that was not used: its round, reason and message."""
        # Reason and message are those of the row that has the maximum, as SQLite promises.
        rows = self.read(
            "SELECT agent_id, max(round) AS round, reason, message FROM contributions"
            " WHERE outcome = 'accepted' AND reason != '' GROUP BY agent_id"
        )
        return {row["agent_id"]: (row["round"], row["reason"], row["message"]) for row in rows}

    def record_report(self, number: int, report: ReportRow) -> bool:
        """Record what became of a round's model on a device; the last report of an agent stands.

        Returns:
            True if this is the agent's first report on that model.
        """
        with self.transaction() as database:
            is_first = not self.read(
                "SELECT 1 FROM reports WHERE round = ? AND agent_id = ?", number, report.agent_id
            )
            database.execute(
                "INSERT OR REPLACE INTO reports (round, agent_id, accuracy_local, accuracy_before,"
                " accuracy_after, accuracy_adapted, num_held_out, applied, reason, at) VALUES (:round,"
                " :agent_id, :accuracy_local, :accuracy_before, :accuracy_after, :accuracy_adapted,"
                " :num_held_out, :applied, :reason, :at)",
                {**vars(report), "round": number},
            )
        return is_first

    def reports(self, number: int) -> list[ReportRow]:
        """Return the reports on a round's model, in agent-id order."""
        rows = self.read(
            "SELECT agent_id, accuracy_local, accuracy_before, accuracy_after, accuracy_adapted,"
            " num_held_out, applied, reason, at FROM reports WHERE round = ? ORDER BY agent_id",
            number,
        )
        return [ReportRow(**{**row, "applied": bool(row["applied"])}) for row in rows]

    # Uploads

    def partial_path(self, agent_id: str, digest: str) -> Path:
        """Return where this agent's upload grows.

        Raises:
            NotFoundError: the agent never joined.
            ValueError: the digest is not 64 lower-case hex digits.
        """
        return self.blobs.partial_path(self.slot(agent_id), digest)

    def commit_upload(self, agent_id: str, digest: str, kind: str, now: float) -> None:
        """Make a whole, checked upload a blob, then record whose it is; NotFoundError without an upload."""
        partial = self.partial_path(agent_id, digest)
        # Under the lock, so that no blob is removed between the file and its record.
        with self._lock:
            self.blobs.link(partial, digest)
            crash_point(Point.SERVER_BLOB_LINKED)
            with self.transaction() as database:
                database.execute(
                    "INSERT INTO uploads (agent_id, digest, kind, at) VALUES (?, ?, ?, ?)"
                    " ON CONFLICT DO UPDATE SET at = excluded.at",
                    (agent_id, digest, kind, now),
                )
            crash_point(Point.SERVER_UPLOAD_RECORDED)
            self.blobs.seal(partial, digest)

    def has_upload(self, agent_id: str, digest: str, kind: str) -> bool:
        """Return True if this agent's upload was committed and its blob is stored.

        Raises:
            ValueError: the digest is not 64 lower-case hex digits.
        """
        recorded = self.read(
            "SELECT 1 FROM uploads WHERE agent_id = ? AND digest = ? AND kind = ?", agent_id, digest, kind
        )
        return bool(recorded) and self.blobs.path(digest).exists()

    def uploads(self) -> list[UploadRow]:
        """Return every upload that was committed and not given up since."""
        rows = self.read("SELECT agent_id, digest, kind, at FROM uploads ORDER BY agent_id, digest, kind")
        return [UploadRow(**row) for row in rows]

    def unused_sizes(self, agent_id: str) -> dict[str, int]:
        """Return the bytes, by digest, of what an agent has here and no kept round of its uses.

        Uploads count whether they are half sent or whole.

        Raises:
            NotFoundError: the agent never joined.
        """
        sizes = self.blobs.partial_sizes(self.slot(agent_id))
        unused = self.read(
            "WITH kept AS (SELECT weights, shards FROM contributions WHERE agent_id = ?1"
            " AND round IN (SELECT number FROM rounds WHERE NOT retired))"
            " SELECT DISTINCT digest FROM uploads WHERE agent_id = ?1 AND digest NOT IN"
            " (SELECT weights FROM kept UNION ALL SELECT value FROM kept, json_each(kept.shards))",
            agent_id,
        )
        return sizes | {row["digest"]: self.blobs.size(row["digest"]) or 0 for row in unused}

    # Encodings

    def record_encoding(self, weights_digest: str, encoding: EncodingRow) -> None:
        """Record what weights also travel as; both are blobs. The last record for the weights stands."""
        with self.transaction() as database:
            database.execute(
                "INSERT OR REPLACE INTO encodings (weights, digest, base) VALUES (?, ?, ?)",
                (weights_digest, encoding.digest, encoding.base),
            )

    def encoding(self, weights_digest: str) -> EncodingRow | None:
        """Return what the weights also travel as, if anything."""
        rows = self.read("SELECT digest, base FROM encodings WHERE weights = ?", weights_digest)
        return EncodingRow(**rows[0]) if rows else None

    def is_public(self, digest: str) -> bool:
        """Return True if agents may read the blob, and it is still stored.

        Public are each round's initial weights and published model, and what either is encoded as.
        """
        named = self.read(
            "WITH asked AS (SELECT ? AS digest UNION SELECT weights FROM encodings WHERE digest = ?)"
            " SELECT 1 FROM rounds, asked WHERE asked.digest IN (initial_weights, published) LIMIT 1",
            digest,
            digest,
        )
        return bool(named) and self.blobs.path(digest).exists()


def _insert_round(database: sqlite3.Connection, number: int, initial_digest: str, now: float) -> None:
    database.execute(
        "INSERT INTO rounds (number, phase, initial_weights, opened_at) VALUES (?, ?, ?, ?)",
        (number, Phase.COLLECTING, initial_digest, now),
    )
    _append_phase(database, number, Phase.COLLECTING, now)


def _append_phase(database: sqlite3.Connection, number: int, phase: str, now: float) -> None:
    database.execute("INSERT INTO phase_history (round, phase, at) VALUES (?, ?, ?)", (number, phase, now))


def _round(row: Mapping[str, Any], phase_times: dict[str, float]) -> RoundRow:
    return RoundRow(
        number=row["number"],
        phase=row["phase"],
        initial_digest=row["initial_weights"],
        published_digest=row["published"],
        failure=row["failure"],
        opened_at=row["opened_at"],
        phase_times=phase_times,
        retired=bool(row["retired"]),
        without_data=bool(row["without_data"]),
    )


def _decision(row: Mapping[str, Any]) -> Decision:
    outcome = Outcome(row["outcome"])
    contribution = Contribution(
        agent_id=row["agent_id"],
        weights_digest=row["weights"],
        shard_digests=tuple(json.loads(row["shards"])),
        num_examples=row["num_examples"],
        initial_digest=row["initial_weights"],
        accuracy_local=row["accuracy_local"],
        num_shared=row["num_shared"],
    )
    return Decision(
        agent_id=row["agent_id"],
        outcome=outcome,
        at=row["at"],
        contribution=contribution if outcome is Outcome.ACCEPTED else None,
        why=Rejection(Reason(row["reason"]), row["message"]) if row["reason"] else None,
    )


@contextmanager
def _database(state_dir: StateDir, *, as_guest: bool) -> Iterator[sqlite3.Connection]:
    path = state_dir.database
    with closing(connect(path)) as database:
        if as_guest and version(database) != len(MIGRATIONS):
            raise UsageError(f"a server of another version uses {path}: stop it first")
        migrate(database, path, MIGRATIONS)
        if not as_guest:
            # A server that was killed may have left a log.
            empty_log(database)
        yield database
