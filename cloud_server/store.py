"""What the server must not forget: records in SQLite, blobs beside them.

    STATE/lock                     held for as long as a server uses STATE; says who
    STATE/ecavg.sqlite3            every record, through a write-ahead log
    STATE/blobs/ab/abcdef…         weights and shards by digest, immutable
    STATE/partial/<slot>-<digest>  uploads that have begun
    STATE/jobs/  STATE/rounds/     the trainer's work, and what is left of each round

What a method has done is on disk when it returns: it survives the process, and the machine's power.
Where that takes several steps, each one leaves a state from which the whole can be done again.
"""

import fcntl
import json
import os
import secrets
import socket
import sqlite3
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from threading import RLock
from typing import Any, TextIO

from cloud_server.contribution import Contribution, Decision, Rejection
from cloud_server.disk.database import connect, migrate, version
from cloud_server.disk.failures import storage_errors
from cloud_server.disk.tables import (
    MIGRATIONS,
    AgentRow,
    EncodingRow,
    ForgettingRow,
    ReportRow,
    RoundRow,
    RunRow,
    UploadRow,
)
from common.errors import NotFoundError, Reason, UsageError
from common.faults import Point, crash_point
from common.files import sync
from common.run_state import Outcome, Phase
from common.transfer import checked_digest

_RETIRED, _CLEARED = 1, 2  # rounds.retired: its records are given up; and so are its files
# What is on record of a contribution of which nothing was kept.
_NOTHING = Contribution("", "", (), 0)


class InUseError(UsageError):
    """Another process has the state directory."""


class Store:
    """The state directory of one server; every method may be called from any thread.

    Besides what each method says, those that write raise StorageError while the disk is full, read-only or
    failing, and sqlite3.IntegrityError for a round or an agent that was never recorded.
    """

    def __init__(self, state_dir: Path, *, as_guest: bool = False) -> None:
        """Opens the state directory, made if need be.

        Args:
            as_guest: beside the server that has it; what is asked of it here, that one does.

        Raises:
            InUseError: another server has it.
            UsageError: it is not usable.
        """
        self._blobs_dir = state_dir / "blobs"
        self._partial_dir = state_dir / "partial"
        self._lock = RLock()
        with ExitStack() as resources:
            try:
                for folder in ("blobs", "partial", "jobs", "rounds"):
                    (state_dir / folder).mkdir(parents=True, exist_ok=True)
                if not as_guest:
                    resources.enter_context(_locked(state_dir))
                path = state_dir / "ecavg.sqlite3"
                self._database = resources.enter_context(_database(path, as_guest=as_guest))
                sync(state_dir)
            except (OSError, sqlite3.DatabaseError) as error:
                what = error.strerror if isinstance(error, OSError) else error
                raise UsageError(
                    f"cannot use state directory {state_dir} ({what}): choose a writable one with --state-dir"
                ) from error
            self._resources = resources.pop_all()

    def close(self) -> None:
        """Gives the state directory back; harmless when done twice."""
        with self._lock:
            self._resources.close()

    # The run and its agents

    def run(self) -> RunRow | None:
        """The run, once there is one."""
        rows = self._read("SELECT run_id, config_json, created_at FROM run")
        return RunRow(**rows[0]) if rows else None

    def create_run(self, run_id: str, config_json: str, initial_weights: str, now: float) -> None:
        """Records the run and its first round together; sqlite3.IntegrityError if there is a run."""
        with self._transaction() as database:
            database.execute(
                "INSERT INTO run (run_id, config_json, created_at) VALUES (?, ?, ?)",
                (run_id, config_json, now),
            )
            self._insert_round(1, initial_weights, now)

    def join(self, agent_id: str, now: float) -> int:
        """The agent's slot, from 1 on: the next free one, and ever after the same."""
        with self._transaction() as database:
            database.execute(
                "INSERT OR IGNORE INTO agents (agent_id, slot, joined_at)"
                " SELECT ?, coalesce(max(slot), 0) + 1, ? FROM agents",
                (agent_id, now),
            )
            return self._slot(agent_id)

    def agents(self) -> list[AgentRow]:
        """Every agent that ever joined, by slot."""
        rows = self._read("SELECT agent_id, slot, joined_at FROM agents ORDER BY slot")
        return [AgentRow(**row) for row in rows]

    # Rounds

    def open_round(self, number: int, initial_weights: str, now: float) -> None:
        """Records a new round, collecting; sqlite3.IntegrityError if the number is taken."""
        with self._transaction():
            self._insert_round(number, initial_weights, now)

    def set_phase(
        self,
        number: int,
        phase: str,
        now: float,
        *,
        failure: str = "",
        published: str | None = None,
        left_out: Mapping[str, tuple[str, str]] | None = None,
    ) -> None:
        """Records that a round entered a phase, and how it ended if it did.

        Args:
            left_out: reason and message of the accepted contributions that were not used, by agent id.
        """
        with self._transaction() as database:
            database.execute(
                "UPDATE rounds SET phase = ?, failure = ?, published = ? WHERE number = ?",
                (phase, failure, published, number),
            )
            database.executemany(
                "UPDATE contributions SET reason = ?, message = ? WHERE round = ? AND agent_id = ?",
                [(*why, number, agent_id) for agent_id, why in (left_out or {}).items()],
            )
            self._append_phase(number, phase, now)

    def rounds(self, *, last: int = -1) -> list[RoundRow]:
        """Every round, or so many of the last ones, by number."""
        return self._read_rounds(
            "SELECT * FROM (SELECT * FROM rounds ORDER BY number DESC LIMIT ?) ORDER BY number", last
        )

    def last_round(self) -> RoundRow | None:
        """The round with the highest number."""
        rounds = self._read_rounds("SELECT * FROM rounds ORDER BY number DESC LIMIT 1")
        return rounds[0] if rounds else None

    def has_published(self) -> bool:
        """Whether any round has published a model."""
        return bool(self._read("SELECT 1 FROM rounds WHERE published IS NOT NULL LIMIT 1"))

    def round(self, number: int) -> RoundRow | None:
        """The round with this number."""
        rounds = self._read_rounds("SELECT * FROM rounds WHERE number = ?", number)
        return rounds[0] if rounds else None

    def record_contribution(self, number: int, decision: Decision) -> None:
        """Record how an agent's part in a round ended; the last record for an agent and round stands."""
        contribution = decision.contribution or _NOTHING
        reason, message = decision.why or ("", "")
        with self._transaction() as database:
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
        rows = self._read("SELECT * FROM contributions WHERE round = ? ORDER BY agent_id", number)
        return [_decision(row) for row in rows]

    def num_accepted(self) -> dict[int, int]:
        """How many contributions each round has accepted, of the rounds that have any."""
        rows = self._read(
            "SELECT round, count(*) AS number FROM contributions WHERE outcome = 'accepted' GROUP BY round"
        )
        return {row["round"]: row["number"] for row in rows}

    def counted_rounds(self) -> dict[str, int]:
        """The last published round that counted a contribution of an agent, of those agents that have one."""
        rows = self._read(
            "SELECT agent_id, max(round) AS round FROM contributions JOIN rounds ON number = round"
            " WHERE outcome = 'accepted' AND reason = '' AND published IS NOT NULL GROUP BY agent_id"
        )
        return {row["agent_id"]: row["round"] for row in rows}

    def last_left_out(self) -> dict[str, tuple[int, str, str]]:
        """Round, reason and message of the last accepted contribution of an agent that was not used."""
        rows = self._read(  # reason and message are of the row that has the maximum, as SQLite promises
            "SELECT agent_id, max(round) AS round, reason, message FROM contributions"
            " WHERE outcome = 'accepted' AND reason != '' GROUP BY agent_id"
        )
        return {row["agent_id"]: (row["round"], row["reason"], row["message"]) for row in rows}

    def record_report(self, number: int, report: ReportRow) -> bool:
        """Records what became of a round's model on a device; whether it is the agent's first report on it.

        The last one stands.
        """
        with self._transaction() as database:
            is_first = not self._read(
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
        """The reports on a round's model, in agent-id order."""
        rows = self._read(
            "SELECT agent_id, accuracy_local, accuracy_before, accuracy_after, accuracy_adapted,"
            " num_held_out, applied, reason, at FROM reports WHERE round = ? ORDER BY agent_id",
            number,
        )
        return [ReportRow(**{**row, "applied": bool(row["applied"])}) for row in rows]

    # Blobs

    def blob_path(self, digest: str) -> Path:
        """Where the blob is, or would be; ValueError unless the digest is 64 lower-case hex digits."""
        return self._blobs_dir / checked_digest(digest)[:2] / digest

    def blob_size(self, digest: str) -> int | None:
        """Bytes of the blob, None if it is not stored; ValueError like `blob_path`."""
        try:
            return self.blob_path(digest).stat().st_size
        except FileNotFoundError:
            return None

    def partial_path(self, agent_id: str, digest: str) -> Path:
        """Where this agent's upload grows; NotFoundError if it never joined, ValueError like `blob_path`."""
        path = self._partial_dir / f"{self._slot(agent_id)}-{checked_digest(digest)}"
        with self._lock, storage_errors(), suppress(FileNotFoundError):
            os.utime(path)  # who asks is about to go on with it: `remove_partials` shall not come between
        return path

    def commit_upload(self, agent_id: str, digest: str, kind: str, now: float) -> None:
        """Makes a whole, checked upload a blob, then records whose it is; NotFoundError without an upload."""
        partial, blob = self.partial_path(agent_id, digest), self.blob_path(digest)
        with self._lock, storage_errors():  # `remove_blobs` shall not come between blob and record
            blob.parent.mkdir(exist_ok=True)
            # A second name, not another: killed before the record is there, the upload is still whole.
            with suppress(FileExistsError):  # the same bytes, of this agent or another
                self._link(partial, blob)
            sync(blob.parent)
            sync(self._blobs_dir)
            crash_point(Point.SERVER_BLOB_LINKED)
            with self._transaction() as database:
                database.execute(
                    "INSERT INTO uploads (agent_id, digest, kind, at) VALUES (?, ?, ?, ?)"
                    " ON CONFLICT DO UPDATE SET at = excluded.at",
                    (agent_id, digest, kind, now),
                )
            crash_point(Point.SERVER_UPLOAD_RECORDED)
            blob.chmod(0o444)  # not before: an upload that goes on after a failure must be able to write
            partial.unlink(missing_ok=True)

    def has_upload(self, agent_id: str, digest: str, kind: str) -> bool:
        """Whether this agent's upload was committed and its blob is stored; ValueError like `blob_path`."""
        recorded = self._read(
            "SELECT 1 FROM uploads WHERE agent_id = ? AND digest = ? AND kind = ?", agent_id, digest, kind
        )
        return bool(recorded) and self.blob_path(digest).exists()

    def unused_sizes(self, agent_id: str) -> dict[str, int]:
        """Bytes by digest of what an agent has here, half sent or whole, and no kept round of its uses.

        NotFoundError if it never joined.
        """
        sizes = {}
        prefix = f"{self._slot(agent_id)}-"
        with os.scandir(self._partial_dir) as entries:
            for entry in entries:
                if entry.name.startswith(prefix):
                    with suppress(FileNotFoundError):  # it has been completed meanwhile
                        sizes[entry.name.removeprefix(prefix)] = entry.stat().st_size
        unused = self._read(
            "WITH kept AS (SELECT weights, shards FROM contributions WHERE agent_id = ?1"
            " AND round IN (SELECT number FROM rounds WHERE NOT retired))"
            " SELECT DISTINCT digest FROM uploads WHERE agent_id = ?1 AND digest NOT IN"
            " (SELECT weights FROM kept UNION ALL SELECT value FROM kept, json_each(kept.shards))",
            agent_id,
        )
        return sizes | {row["digest"]: self.blob_size(row["digest"]) or 0 for row in unused}

    def uploads(self) -> list[UploadRow]:
        """Every upload that was committed and not given up since."""
        rows = self._read("SELECT agent_id, digest, kind, at FROM uploads ORDER BY agent_id, digest, kind")
        return [UploadRow(**row) for row in rows]

    def adopt_blob(self, path: Path, digest: str) -> None:
        """Moves a file of STATE that has this digest to the blobs; NotFoundError if it is in neither."""
        self._install(path, digest)

    def record_encoding(self, weights: str, encoding: EncodingRow) -> None:
        """Records as what these weights also travel; both are blobs. The last record for them stands."""
        with self._transaction() as database:
            database.execute(
                "INSERT OR REPLACE INTO encodings (weights, digest, base) VALUES (?, ?, ?)",
                (weights, encoding.digest, encoding.base),
            )

    def encoding(self, weights: str) -> EncodingRow | None:
        """As what these weights also travel, while that is stored."""
        rows = self._read("SELECT digest, base FROM encodings WHERE weights = ?", weights)
        return EncodingRow(**rows[0]) if rows else None

    def is_public(self, digest: str) -> bool:
        """Whether agents may read the blob, still stored.

        A round's initial weights or published model, or what either is encoded as.
        """
        named = self._read(
            "WITH asked AS (SELECT ? AS digest UNION SELECT weights FROM encodings WHERE digest = ?)"
            " SELECT 1 FROM rounds, asked WHERE asked.digest IN (initial_weights, published) LIMIT 1",
            digest,
            digest,
        )
        return bool(named) and self.blob_path(digest).exists()

    # What goes, by the rule in cloud_server/upkeep/retention.py

    def uncleared_rounds(self) -> list[int]:
        """The retired rounds that `note_cleared` has not been told of."""
        rows = self._read("SELECT number FROM rounds WHERE retired = ? ORDER BY number", _RETIRED)
        return [row["number"] for row in rows]

    def note_cleared(self, numbers: Collection[int]) -> None:
        """Records that no file of these retired rounds is left."""
        with self._transaction() as database:
            database.executemany(
                "UPDATE rounds SET retired = ? WHERE number = ?", [(_CLEARED, number) for number in numbers]
            )

    def retire_rounds(self, up_to: int, uploaded_before: float) -> None:
        """Gives up what only rounds up to this number need, and old uploads that none does; records only."""
        with self._transaction() as database:
            rounds = {"first": self._first_not_retired(), "up_to": up_to}
            database.execute(
                "UPDATE rounds SET retired = ? WHERE number <= ? AND NOT retired", (_RETIRED, up_to)
            )
            database.execute(
                "INSERT OR IGNORE INTO removals SELECT digest FROM named_blobs"
                " WHERE round BETWEEN :first AND :up_to",
                rounds,
            )
            database.execute(
                "INSERT OR IGNORE INTO removals SELECT digest FROM uploads WHERE at < ?", (uploaded_before,)
            )
            self._keep_needed(database)
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
            database.execute("DELETE FROM removals WHERE digest IN (SELECT digest FROM uploads)")

    def give_up_data(self, up_to: int, uploaded_before: float) -> None:
        """Gives up the shards of rounds up to this number, and all that were uploaded before; records only.

        Shards that a later round's contribution names stay.
        """
        with self._transaction() as database:
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
            self._keep_needed(database)
            database.execute(
                "DELETE FROM uploads WHERE kind = 'data' AND at < ?"
                " AND digest IN (SELECT digest FROM removals)",
                (uploaded_before,),
            )
            database.execute("DELETE FROM removals WHERE digest IN (SELECT digest FROM uploads)")

    def _keep_needed(self, database: sqlite3.Connection) -> None:
        database.executemany(
            "DELETE FROM removals WHERE digest = ?", [(digest,) for digest in self.needed_blobs()]
        )

    def needed_blobs(self) -> set[str]:
        """The digests that rounds which are not retired name, and the run's first initial weights."""
        rows = self._read(
            "SELECT digest FROM named_blobs WHERE round >= ?"
            " UNION SELECT initial_weights FROM rounds WHERE number = (SELECT min(number) FROM rounds)",
            self._first_not_retired(),
        )
        return {row["digest"] for row in rows}

    def remove_blobs(self, stored_before: float, *, spare: Collection[str] = ()) -> int:
        """Removes the blobs given up, and those stored before then that no record names; how many."""
        needed = self.needed_blobs() | set(spare)
        given_up = {row["digest"] for row in self._read("SELECT digest FROM removals")}
        num_removed = 0
        for path in self._blobs_dir.glob("??/*"):
            if path.name in needed:
                continue
            with self._lock, storage_errors():  # `commit_upload` shall not come between
                if self._read("SELECT 1 FROM uploads WHERE digest = ?", path.name):
                    continue
                if path.name in given_up or path.stat().st_mtime < stored_before:
                    path.unlink()
                    num_removed += 1
        with self._transaction() as database:
            database.executemany("DELETE FROM removals WHERE digest = ?", [(each,) for each in given_up])
        return num_removed

    def remove_partials(self, written_before: float, *, spare: Collection[Path] = ()) -> int:
        """Removes the uploads that were begun and have had no byte since; how many."""
        num_removed = 0
        for path in set(self._partial_dir.iterdir()) - set(spare):
            with self._lock, storage_errors(), suppress(FileNotFoundError):
                if path.stat().st_mtime < written_before:
                    path.unlink()
                    num_removed += 1
        return num_removed

    # Who is forgotten, in the order of cloud_server/upkeep/forgetting.py

    def ask_to_forget(self, agent_id: str, now: float) -> str:
        """Records that the agent is to be forgotten; the pseudonym under which that is found again.

        Raises:
            NotFoundError: it has not joined this run.
        """
        with self._transaction() as database:
            for row in self.forgettings():
                if row.agent_id == agent_id:
                    return row.pseudonym
            pseudonym = f"forgotten-{secrets.token_hex(8)}"
            database.execute(
                "INSERT INTO forgettings (pseudonym, agent_id, slot, asked_at) VALUES (?, ?, ?, ?)",
                (pseudonym, agent_id, self._slot(agent_id), now),
            )
        return pseudonym

    def forgettings(self) -> list[ForgettingRow]:
        """Who is to be forgotten, and who has been, in the order in which that was asked for."""
        rows = self._read("SELECT * FROM forgettings ORDER BY asked_at, pseudonym")
        return [
            ForgettingRow(**{**row, "models": tuple(map(tuple, json.loads(row["models"])))}) for row in rows
        ]

    def forget_records(self, row: ForgettingRow, also: Collection[str]) -> None:
        """Removes every record of the agent, and gives up the blobs that nobody else names.

        Args:
            also: digests of blobs to give up with them, where no record names them.
        """
        with self._transaction() as database:
            agent, prefix = (row.agent_id,), f"{row.slot}-"
            if not self._read("SELECT 1 FROM agents WHERE agent_id = ?", *agent):
                return  # it has been done before
            models = self._read(
                "SELECT number, published FROM rounds JOIN contributions ON round = number"
                " WHERE agent_id = ? AND outcome = 'accepted' AND reason = '' AND published IS NOT NULL"
                " ORDER BY number",
                *agent,
            )
            database.execute(
                "UPDATE forgettings SET models = ? WHERE pseudonym = ?",
                (json.dumps([list(model.values()) for model in models]), row.pseudonym),
            )
            begun = (path.name.removeprefix(prefix) for path in self._partial_dir.glob(f"{prefix}*"))
            database.execute(
                "INSERT OR IGNORE INTO removals SELECT digest FROM named_blobs WHERE agent_id = ?", agent
            )
            database.execute(
                "INSERT OR IGNORE INTO removals SELECT digest FROM uploads WHERE agent_id = ?", agent
            )
            database.executemany(
                "INSERT OR IGNORE INTO removals VALUES (?)", [(digest,) for digest in (*begun, *also)]
            )
            for table in ("reports", "contributions", "uploads", "agents"):
                database.execute(f"DELETE FROM {table} WHERE agent_id = ?", agent)  # noqa: S608
            self._keep_needed(database)
            database.execute("DELETE FROM removals WHERE digest IN (SELECT digest FROM uploads)")

    def remove_partials_of(self, slot: int) -> None:
        """Removes the uploads that this agent has begun."""
        with self._lock, storage_errors():
            for path in self._partial_dir.glob(f"{slot}-*"):
                path.unlink(missing_ok=True)
            sync(self._partial_dir)

    def note_forgotten(self, pseudonym: str, now: float) -> None:
        """Records that nothing of the agent is left, its id included."""
        with self._transaction() as database:
            database.execute(
                "UPDATE forgettings SET agent_id = NULL, slot = NULL, done_at = ? WHERE pseudonym = ?",
                (now, pseudonym),
            )
        with self._lock:
            _empty_log(self._database)

    def _first_not_retired(self) -> int:
        first: int = self._read("SELECT coalesce(max(number), 0) + 1 AS number FROM rounds WHERE retired")[0][
            "number"
        ]
        return first

    def _link(self, partial: Path, blob: Path) -> None:
        try:
            sync(partial)
            os.link(partial, blob)
        except FileNotFoundError:  # fine where an earlier call had got this far when the process died
            if not blob.exists():
                raise NotFoundError(f"the bytes of blob {blob.name} are not here: upload them") from None

    def _install(self, source: Path, digest: str) -> None:
        blob = self.blob_path(digest)
        with storage_errors():
            blob.parent.mkdir(exist_ok=True)
            try:
                sync(source)
                source.replace(blob)  # should one be there, its bytes are the same
            except FileNotFoundError:  # fine where an earlier call had got this far when the process died
                if not blob.exists():
                    raise NotFoundError(f"the bytes of blob {digest} are not here: upload them") from None
            blob.chmod(0o444)
            sync(blob.parent)
            sync(self._blobs_dir)

    # SQL

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock, storage_errors(), self._database as database:
            database.execute("BEGIN IMMEDIATE")
            yield database

    def _read(self, query: str, *values: object) -> list[dict[str, Any]]:
        with self._lock:
            return self._database.execute(query, values).fetchall()

    def _read_rounds(self, query: str, *values: object) -> list[RoundRow]:
        with self._lock:
            return [
                RoundRow(
                    **{**row, "retired": bool(row["retired"]), "without_data": bool(row["without_data"])},
                    phase_times=self._phase_times(row["number"]),
                )
                for row in self._read(query, *values)
            ]

    def _phase_times(self, number: int) -> dict[str, float]:
        history = self._read("SELECT phase, at FROM phase_history WHERE round = ? ORDER BY entry", number)
        return {row["phase"]: row["at"] for row in reversed(history)}

    def _insert_round(self, number: int, initial_weights: str, now: float) -> None:
        self._database.execute(
            "INSERT INTO rounds (number, phase, initial_weights, opened_at) VALUES (?, ?, ?, ?)",
            (number, Phase.COLLECTING, initial_weights, now),
        )
        self._append_phase(number, Phase.COLLECTING, now)

    def _append_phase(self, number: int, phase: str, now: float) -> None:
        self._database.execute(
            "INSERT INTO phase_history (round, phase, at) VALUES (?, ?, ?)", (number, phase, now)
        )

    def _slot(self, agent_id: str) -> int:
        rows = self._read("SELECT slot FROM agents WHERE agent_id = ?", agent_id)
        if not rows:
            raise NotFoundError(f"agent {agent_id} has not joined this run: join first", Reason.UNKNOWN_AGENT)
        slot: int = rows[0]["slot"]
        return slot


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
def _locked(state_dir: Path) -> Iterator[None]:
    # The kernel lets go of the lock when the process ends, however it ends; the text only tells who it was.
    with (state_dir / "lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InUseError(
                f"process {_holder(file)} uses state directory {state_dir}:"
                " stop it, or choose another --state-dir"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()} {socket.gethostname()}\n")
        file.flush()
        yield


def _holder(file: TextIO) -> str:
    """Who has the lock, as far as can be told.

    A server has left its name in the file. `cloud-server check` may not, it changes nothing: the kernel
    knows it, as the only one that shares the lock (https://man7.org/linux/man-pages/man5/proc_locks.5.html).
    """
    status = os.fstat(file.fileno())
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
    with suppress(OSError):  # it is Linux that has this file
        for line in Path("/proc/locks").read_text("ascii").splitlines():
            match line.split():
                case [_, "FLOCK", _, "READ", pid, where, *_] if where == f"{device}:{status.st_ino}":
                    return f"{pid} (cloud-server check)"
    file.seek(0)
    return " on ".join(file.read().split())


@contextmanager
def _database(path: Path, *, as_guest: bool) -> Iterator[sqlite3.Connection]:
    with closing(connect(path)) as database:
        if as_guest and version(database) != len(MIGRATIONS):
            raise UsageError(f"a server of another version uses {path}: stop it first")
        migrate(database, path, MIGRATIONS)
        if not as_guest:
            _empty_log(database)  # that of a server that was killed, maybe
        yield database


def _empty_log(database: sqlite3.Connection) -> None:
    """Have the write-ahead log forget what was deleted; where the disk does not let it, the next time."""
    with suppress(sqlite3.OperationalError):
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
