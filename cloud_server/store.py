"""The durable state of the server: the records in SQLite, and the blobs beside the database.

The store knows the run, its agents, rounds, contributions, reports, uploads and encodings. `records.py` and
the rules in `upkeep/` have records of their own, which they read and write by `read` and `transaction`.

When a method returns, its effect is on the disk and survives a crash of the process or the machine. A method
of several steps can be called again after a crash between any two of the steps.
"""

import json
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ecavg.cloud_server.contribution import Contribution, Decision, Rejection
from ecavg.cloud_server.disk.opened import OpenStateDir
from ecavg.cloud_server.disk.tables import AgentRow, EncodingRow, ReportRow, RoundRow, RunRow, UploadRow
from ecavg.common.errors import NotFoundError, Reason
from ecavg.common.faults import Point, crash_point
from ecavg.common.run_state import Outcome, Phase

# The values that are recorded for a decision that keeps no contribution.
_NOTHING = Contribution("", "", (), 0)


class Store(OpenStateDir):
    """The state directory of one server; every method may be called from any thread.

    Every method that writes raises StorageError while the disk is full, read-only or failing, and
    sqlite3.IntegrityError for a round or an agent that was never recorded.
    """

    # The run and its agents

    def run(self) -> RunRow | None:
        """Return the run; None if there is no run yet."""
        rows = self.read("SELECT * FROM run")
        return _run(rows[0]) if rows else None

    def create_run(
        self,
        run_id: str,
        config_json: str,
        initial_digest: str,
        now: float,
        probe: Sequence[float] = (),
        planned_rounds: int = 1,
        first_round: int = 1,
    ) -> None:
        """Record the run and its first round in one step.

        Raises:
            sqlite3.IntegrityError: there is a run already.
        """
        with self.transaction() as database:
            database.execute(
                "INSERT INTO run (run_id, config_json, created_at, probe, planned_rounds)"
                " VALUES (?, ?, ?, ?, ?)",
                (run_id, config_json, now, json.dumps(probe), planned_rounds),
            )
            _insert_round(database, first_round, initial_digest, now)

    def set_class_names(self, names: Sequence[str], agent_id: str) -> None:
        """Record the names that an agent has given the classes of the run, label 0 first."""
        with self.transaction() as database:
            database.execute(
                "UPDATE run SET class_names = ?, class_names_of = ?", (json.dumps(names), agent_id)
            )

    def join(self, agent_id: str, now: float) -> int:
        """Return the agent's slot, from 1 on; the first call gives the agent the next free slot."""
        with self.transaction() as database:
            database.execute(
                "INSERT OR IGNORE INTO agents (agent_id, slot, joined_at)"
                " SELECT ?, coalesce(max(slot), 0) + 1, ? FROM agents",
                (agent_id, now),
            )
            return self.slot(agent_id)

    def slot(self, agent_id: str) -> int:
        """Return the agent's slot.

        Raises:
            NotFoundError: the agent never joined.
        """
        rows = self.read("SELECT slot FROM agents WHERE agent_id = ?", agent_id)
        if not rows:
            raise NotFoundError(f"agent {agent_id} has not joined this run: join first", Reason.UNKNOWN_AGENT)
        slot: int = rows[0]["slot"]
        return slot

    def agents(self) -> list[AgentRow]:
        """Return every agent that has joined and was not forgotten since, sorted by slot."""
        rows = self.read("SELECT agent_id, slot, joined_at FROM agents ORDER BY slot")
        return [AgentRow(**row) for row in rows]

    def newest_record(self) -> float:
        """Return the latest time at which a round was opened or changed; 0 if there is no round."""
        return self.read("SELECT max(at) AS newest FROM phase_history")[0]["newest"] or 0.0

    # Rounds

    def open_round(
        self, number: int, initial_digest: str, now: float, *, has_full_curve: bool = False
    ) -> None:
        """Record a new round, in the phase COLLECTING.

        Args:
            number: the number of the round.
            initial_digest: the digest of the weights that the agents' pre-training starts from.
            now: seconds since the epoch.
            has_full_curve: whether the learning rate takes a full curve in this round after the plan.

        Raises:
            sqlite3.IntegrityError: the number is taken.
        """
        with self.transaction() as database:
            _insert_round(database, number, initial_digest, now, has_full_curve=has_full_curve)

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
        """Record that a round has entered a phase, and the outcome if the round has ended.

        Args:
            number: the number of the round.
            phase: the new phase.
            now: seconds since the epoch.
            failure: the reason why the round failed.
            published_digest: the digest of the published model.
            left_out: the reason and the message for each accepted, but unused contribution, by agent id.
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
        """Return the last `last` rounds, sorted by number; by default every round."""
        return self._read_rounds(
            "SELECT * FROM (SELECT * FROM rounds ORDER BY number DESC LIMIT ?) ORDER BY number", last
        )

    def last_round(self) -> RoundRow | None:
        """Return the round with the highest number; None if there is no round."""
        rounds = self._read_rounds("SELECT * FROM rounds ORDER BY number DESC LIMIT 1")
        return rounds[0] if rounds else None

    def has_published(self) -> bool:
        """Return True if any round has published a model that was not withdrawn."""
        return bool(
            self.read(
                "SELECT 1 FROM rounds WHERE published IS NOT NULL AND number NOT IN"
                " (SELECT round FROM rollouts WHERE state = 'withdrawn') LIMIT 1"
            )
        )

    def round(self, number: int) -> RoundRow | None:
        """Return the round with this number; None if there is no such round."""
        rounds = self._read_rounds("SELECT * FROM rounds WHERE number = ?", number)
        return rounds[0] if rounds else None

    def _read_rounds(self, query: str, *values: object) -> list[RoundRow]:
        """Return the rounds that the query finds, each with the times of its phases."""
        with self._lock:
            return [_round(row, self._phase_times(row["number"])) for row in self.read(query, *values)]

    def _phase_times(self, number: int) -> dict[str, float]:
        """Return the time at which the round first entered each phase, by phase."""
        history = self.read("SELECT phase, at FROM phase_history WHERE round = ? ORDER BY entry", number)
        return {row["phase"]: row["at"] for row in reversed(history)}

    # Contributions and reports

    def record_contribution(self, number: int, decision: Decision) -> None:
        """Record the decision on an agent's contribution to a round, in place of an earlier decision."""
        contribution = decision.contribution or _NOTHING
        reason, message = decision.why or ("", "")
        with self.transaction() as database:
            database.execute(
                "INSERT OR REPLACE INTO contributions (round, agent_id, outcome, weights, shards,"
                " num_examples, num_shared, initial_weights, staleness, score_local, reason, message, at)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    number,
                    decision.agent_id,
                    decision.outcome,
                    contribution.weights_digest,
                    json.dumps(contribution.shard_digests),
                    contribution.num_examples,
                    contribution.num_shared,
                    contribution.initial_digest,
                    contribution.staleness,
                    contribution.score_local,
                    reason,
                    message,
                    decision.at,
                ),
            )

    def contributions(self, number: int) -> list[Decision]:
        """Return the decision on every agent's contribution to a round, in agent-id order."""
        rows = self.read("SELECT * FROM contributions WHERE round = ? ORDER BY agent_id", number)
        return [_decision(row) for row in rows]

    def contribution(self, number: int, agent_id: str) -> Decision | None:
        """Return the decision on an agent's contribution to a round; None if there is none."""
        rows = self.read("SELECT * FROM contributions WHERE round = ? AND agent_id = ?", number, agent_id)
        return _decision(rows[0]) if rows else None

    def num_accepted(self) -> dict[int, int]:
        """Return the number of accepted contributions, by round; rounds without any are left out."""
        rows = self.read(
            "SELECT round, count(*) AS number FROM contributions WHERE outcome = 'accepted' GROUP BY round"
        )
        return {row["round"]: row["number"] for row in rows}

    def counted_rounds(self) -> dict[str, int]:
        """Return, by agent id, the last published round that used a contribution of the agent."""
        rows = self.read(
            "SELECT agent_id, max(round) AS round FROM contributions JOIN rounds ON number = round"
            " WHERE outcome = 'accepted' AND reason = '' AND published IS NOT NULL GROUP BY agent_id"
        )
        return {row["agent_id"]: row["round"] for row in rows}

    def last_left_out(self) -> dict[str, tuple[int, str, str]]:
        """Return, by agent id, the round, reason and message of the last accepted contribution not used."""
        # SQLite guarantees that reason and message come from the row that has the maximum.
        rows = self.read(
            "SELECT agent_id, max(round) AS round, reason, message FROM contributions"
            " WHERE outcome = 'accepted' AND reason != '' GROUP BY agent_id"
        )
        return {row["agent_id"]: (row["round"], row["reason"], row["message"]) for row in rows}

    def record_report(self, number: int, report: ReportRow) -> bool:
        """Record an agent's report on a round's model, in place of an earlier report of the agent.

        Returns:
            True if this is the agent's first report on that model.
        """
        with self.transaction() as database:
            is_first = not self.read(
                "SELECT 1 FROM reports WHERE round = ? AND agent_id = ?", number, report.agent_id
            )
            database.execute(
                "INSERT OR REPLACE INTO reports (round, agent_id, score_local, score_before,"
                " score_after, score_adapted, num_held_out, applied, reason, at, difference_total,"
                " difference_squares) VALUES (:round, :agent_id, :score_local, :score_before, :score_after,"
                " :score_adapted, :num_held_out, :applied, :reason, :at, :difference_total,"
                " :difference_squares)",
                {**vars(report), "round": number},
            )
        return is_first

    def reports(self, number: int) -> list[ReportRow]:
        """Return the reports on a round's model, in agent-id order."""
        rows = self.read(
            "SELECT agent_id, score_local, score_before, score_after, score_adapted, num_held_out, applied,"
            " reason, at, difference_total, difference_squares FROM reports WHERE round = ?"
            " ORDER BY agent_id",
            number,
        )
        return [ReportRow(**{**row, "applied": bool(row["applied"])}) for row in rows]

    def rounds_in_use(self, agent_id: str | None = None) -> dict[str, int]:
        """Return the round of the published model that each agent has reported to use last, by agent id.

        Args:
            agent_id: the only agent that is asked for; None: all are.
        """
        # SQLite guarantees that the round comes from the row that has the maximum.
        rows = self.read(
            "SELECT agent_id, round, max(at) FROM reports WHERE applied AND agent_id = coalesce(?, agent_id)"
            " GROUP BY agent_id",
            agent_id,
        )
        return {row["agent_id"]: row["round"] for row in rows}

    # Uploads

    def partial_path(self, agent_id: str, digest: str) -> Path:
        """Return the path of the file to which this agent's upload is appended.

        Raises:
            NotFoundError: the agent never joined.
            ValueError: the digest is not 64 lower-case hex digits.
        """
        return self.blobs.partial_path(self.slot(agent_id), digest)

    def commit_uploads(self, uploads: Sequence[UploadRow]) -> list[Exception | None]:
        """Turn complete, checked uploads into blobs, and record their agents as the owners, with one flush.

        Returns:
            For each upload None, or the error that concerns this upload alone.
        """
        # The lock keeps a blob from being removed before its record is written.
        with self._lock:
            linked = [self._link(upload) for upload in uploads]
            self.blobs.sync_folders({upload.digest for upload in uploads})
            for _ in linked:
                crash_point(Point.SERVER_BLOB_LINKED)
            with self.transaction():
                done = [
                    partial if isinstance(partial, Exception) else self._record_upload(upload) or partial
                    for upload, partial in zip(uploads, linked, strict=True)
                ]
            for upload, partial in zip(uploads, done, strict=True):
                crash_point(Point.SERVER_UPLOAD_RECORDED)
                if isinstance(partial, Path):
                    self.blobs.seal(partial, upload.digest)
        return [partial if isinstance(partial, Exception) else None for partial in done]

    def _link(self, upload: UploadRow) -> Path | Exception:
        """Return the file of an upload that is among the blobs now, or the error of one that cannot be."""
        try:
            partial = self.partial_path(upload.agent_id, upload.digest)
            self.blobs.link(partial, upload.digest)
            return partial
        except NotFoundError as error:
            return error

    def _record_upload(self, upload: UploadRow) -> Exception | None:
        try:
            self._database.execute(
                "INSERT INTO uploads (agent_id, digest, kind, at) VALUES (:agent_id, :digest, :kind, :at)"
                " ON CONFLICT DO UPDATE SET at = excluded.at",
                vars(upload),
            )
            return None
        # The agent has been forgotten meanwhile.
        except sqlite3.IntegrityError as error:
            return error

    def has_upload(self, agent_id: str, digest: str, kind: str) -> bool:
        """Return True if this agent's upload was committed and its blob is stored.

        Raises:
            ValueError: the digest is not 64 lower-case hex digits.
        """
        recorded = self.read(
            "SELECT 1 FROM uploads WHERE agent_id = ? AND digest = ? AND kind = ?", agent_id, digest, kind
        )
        return bool(recorded) and self.blobs.size(digest) is not None

    def uploads(self) -> list[UploadRow]:
        """Return the record of every committed upload."""
        rows = self.read("SELECT agent_id, digest, kind, at FROM uploads ORDER BY agent_id, digest, kind")
        return [UploadRow(**row) for row in rows]

    # Encodings

    def record_encoding(self, weights_digest: str, encoding: EncodingRow) -> None:
        """Record the encoding of weights, in place of an earlier record; weights and encoding are blobs."""
        with self.transaction() as database:
            database.execute(
                "INSERT OR REPLACE INTO encodings (weights, digest, base) VALUES (?, ?, ?)",
                (weights_digest, encoding.digest, encoding.base),
            )

    def encoding(self, weights_digest: str) -> EncodingRow | None:
        """Return the encoding of the weights; None if the weights have no encoding."""
        rows = self.read("SELECT digest, base FROM encodings WHERE weights = ?", weights_digest)
        return EncodingRow(**rows[0]) if rows else None

    def record_rest(self, weights_digest: str, rest_digest: str) -> None:
        """Record the rest of the model that weights are the shared part of; both are blobs.

        The first record stays, so that a job that starts from these weights is the same if it is done again.
        """
        with self.transaction() as database:
            database.execute(
                "INSERT OR IGNORE INTO rests (weights, digest) VALUES (?, ?)", (weights_digest, rest_digest)
            )

    def rest(self, weights_digest: str) -> str | None:
        """Return the digest of the rest that belongs to weights; None if the weights are a whole model."""
        rows = self.read("SELECT digest FROM rests WHERE weights = ?", weights_digest)
        return rows[0]["digest"] if rows else None

    def is_public(self, digest: str) -> bool:
        """Return True if agents may read the blob and the blob is stored.

        The public blobs are each round's initial weights and published model, the encodings of both, and the
        rests that belong to them.
        """
        named = self.read(
            "WITH asked AS (SELECT ?1 AS digest UNION SELECT weights FROM encodings WHERE digest = ?1"
            " UNION SELECT weights FROM rests WHERE digest = ?1)"
            " SELECT 1 FROM rounds, asked WHERE asked.digest IN (initial_weights, published) LIMIT 1",
            digest,
        )
        return bool(named) and self.blobs.size(digest) is not None


def _run(row: Mapping[str, Any]) -> RunRow:
    """Return the run that a row of the table `run` describes."""
    return RunRow(
        run_id=row["run_id"],
        config_json=row["config_json"],
        created_at=row["created_at"],
        probe=tuple(json.loads(row["probe"])),
        class_names=tuple(json.loads(row["class_names"])),
        class_names_of=row["class_names_of"],
        planned_rounds=row["planned_rounds"],
    )


def _insert_round(
    database: sqlite3.Connection,
    number: int,
    initial_digest: str,
    now: float,
    *,
    has_full_curve: bool = False,
) -> None:
    """Insert a new round, in the phase COLLECTING, and the first entry of its phase history."""
    database.execute(
        "INSERT INTO rounds (number, phase, initial_weights, opened_at, has_full_curve)"
        " VALUES (?, ?, ?, ?, ?)",
        (number, Phase.COLLECTING, initial_digest, now, has_full_curve),
    )
    _append_phase(database, number, Phase.COLLECTING, now)


def _append_phase(database: sqlite3.Connection, number: int, phase: str, now: float) -> None:
    """Append an entry to the phase history of a round."""
    database.execute("INSERT INTO phase_history (round, phase, at) VALUES (?, ?, ?)", (number, phase, now))


def _round(row: Mapping[str, Any], phase_times: dict[str, float]) -> RoundRow:
    """Return the round that a row of the table `rounds` describes."""
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
        has_full_curve=bool(row["has_full_curve"]),
    )


def _decision(row: Mapping[str, Any]) -> Decision:
    """Return the decision that a row of the table `contributions` describes."""
    outcome = Outcome(row["outcome"])
    contribution = Contribution(
        agent_id=row["agent_id"],
        weights_digest=row["weights"],
        shard_digests=tuple(json.loads(row["shards"])),
        num_examples=row["num_examples"],
        initial_digest=row["initial_weights"],
        score_local=row["score_local"],
        num_shared=row["num_shared"],
        staleness=row["staleness"],
    )
    return Decision(
        agent_id=row["agent_id"],
        outcome=outcome,
        at=row["at"],
        contribution=contribution if outcome is Outcome.ACCEPTED else None,
        why=Rejection(Reason(row["reason"]), row["message"]) if row["reason"] else None,
    )
