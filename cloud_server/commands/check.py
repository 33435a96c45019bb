"""The command `cloud-server check STATE`, which verifies the files and records of a state directory.

The command changes nothing in STATE, so it works on a read-only folder, too. It reads the records from a
copy of the database, because SQLite writes files beside a database even for reading.
"""

import argparse
import json
import re
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator, Sequence, Set
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from ecavg.cloud_server import jobs
from ecavg.cloud_server.disk.bucket import Bucket
from ecavg.cloud_server.disk.lock import unused
from ecavg.cloud_server.disk.place import known_bucket
from ecavg.cloud_server.disk.tables import MIGRATIONS, RoundRow
from ecavg.cloud_server.rollout.offers import rollouts
from ecavg.cloud_server.round import OVER
from ecavg.cloud_server.state_dir import StateDir, blob_path
from ecavg.cloud_server.store import Store
from ecavg.cloud_server.upkeep import provenance
from ecavg.cloud_server.upkeep.forgotten import forgettings, to_forget
from ecavg.cloud_server.upkeep.retired import needed_blobs
from ecavg.common import cli
from ecavg.common.config import RunConfig, expand_home
from ecavg.common.errors import RunError, UsageError, one_line
from ecavg.common.run_state import Phase
from ecavg.common.transfer import DIGEST, Blob, blob_of

_PARTIAL_NAME = re.compile(rf"(\d+)-{DIGEST.pattern}")

_RESTORE = "restore it from a backup"
_RESTORE_DATABASE = "restore ecavg.sqlite3 from a backup, or begin anew in another --state-dir"
_SEND_AGAIN = "nothing to do, its agent sends it again"
_REMOVE = "remove it"


class Problem(NamedTuple):
    """One fault in a state directory, and how to repair it."""

    # The path of a file inside STATE, or the name of a record.
    where: str
    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}: {self.remedy}"


def main(argv: Sequence[str]) -> int:
    """Print the problems of a state directory and a summary; return 0 if there is no problem, else 1.

    Raises:
        UsageError: the folder is not a state directory, or a server uses it.
        StorageError: the bucket of its blobs does not answer.
        RunError: stdout cannot be written.
    """
    parser = cli.Parser(
        prog="cloud-server check",
        description="Verify every digest and record of a server that is stopped. Changes nothing."
        " Exits with 0 when all is well, 1 when anything is wrong, 2 when there is nothing to check.",
    )
    parser.add_argument("state", metavar="STATE", type=_folder, help="the server's --state-dir")
    state_dir: Path = parser.parse_args(argv).state
    with unused(StateDir(state_dir)):
        check = Check(StateDir(state_dir))
        for problem in check.problems():
            cli.print_result(one_line(str(problem)))
    cli.print_result(check.summary())
    return 1 if check.num_problems else 0


def _folder(text: str) -> Path:
    try:
        return expand_home(Path(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


class Check:
    """One check of a whole state directory.

    `num_problems` and `summary` are complete when the iterator of `problems` is exhausted.
    """

    def __init__(self, state_dir: StateDir) -> None:
        self.num_problems = 0
        self._state_dir = state_dir
        self._num_rounds = 0
        self._num_partials = 0
        # The size in bytes of every blob whose digest is right.
        self._blob_bytes: dict[str, int] = {}
        # The digests of the blobs that have been reported. A blob is reported once, however many records
        # name it.
        self._damaged: set[str] = set()
        # The numbers of the published rounds with a contribution of an agent that is forgotten since.
        self._used_by_forgotten: set[int] = set()
        url, _ = known_bucket(state_dir)
        self._bucket = Bucket(url) if url else None

    def problems(self) -> Iterator[Problem]:
        """Yield all problems of the state directory.

        Raises:
            UsageError: a newer version of this program has written the database.
        """
        for problem in self._all_problems():
            self.num_problems += 1
            yield problem

    def summary(self) -> str:
        """Return one line with the numbers of problems, rounds, blobs and begun uploads."""
        found = f"{self.num_problems} problem{'s' * (self.num_problems != 1)}" if self.num_problems else "ok"
        total = sum(self._blob_bytes.values())
        return (
            f"{self._state_dir}: {found}; checked rounds: {self._num_rounds},"
            f" blobs: {len(self._blob_bytes)} ({total / 1e6:.1f} MB), begun uploads: {self._num_partials}"
        )

    def _all_problems(self) -> Iterator[Problem]:
        with tempfile.TemporaryDirectory(prefix="ecavg-check-") as folder:
            copy = StateDir(Path(folder)).database
            for suffix in ("", "-wal"):
                _copy_if_there(Path(f"{self._state_dir.database}{suffix}"), Path(f"{copy}{suffix}"))
            damage = list(_database_problems(copy, self._state_dir))
            yield from damage
            if damage:
                # A damaged database does not tell which blobs are needed.
                yield from self._blobs(needed=None)
                return
            with closing(Store(Path(folder))) as records:
                yield from self._blobs(needed_blobs(records))
                yield from self._records(records)

    def _records(self, records: Store) -> Iterator[Problem]:
        rounds = records.rounds()
        self._num_rounds = len(rounds)
        self._used_by_forgotten = {number for row in forgettings(records) for number, _ in row.models}
        yield from self._run(records, rounds)
        withdrawn = {number for number, row in rollouts(records).items() if row.state == "withdrawn"}
        yield from self._sequence(rounds, withdrawn)
        for row in rounds:
            if not row.retired or row is rounds[0]:
                yield from self._blob(row.initial_digest, f"record of round {row.number}", "initial weights")
            if not row.retired:
                yield from self._kept_round(records, row)
            if row.phase in OVER:
                yield from self._files_of_round(records, row, may_be_missing=row is rounds[-1])
        for upload in records.uploads():
            where = f"record of an upload of {upload.agent_id}"
            yield from self._blob(upload.digest, where, upload.kind, _SEND_AGAIN)
        yield from self._jobs({row.number: row for row in rounds})
        yield from self._folders({row.number for row in rounds})
        yield from self._partials({agent.slot for agent in records.agents()})
        yield from self._provenance(records)

    def _where(self, path: Path) -> str:
        """Return the path relative to the state directory."""
        return str(path.relative_to(self._state_dir.path))

    # Blobs

    def _blobs(self, needed: set[str] | None) -> Iterator[Problem]:
        """Check the digest of every blob.

        A blob that no record names is not a problem, because the server's clean-up removes it.

        Args:
            needed: the digests that the records name; None if the records cannot be read.
        """
        for path in sorted(self._state_dir.blobs.glob("*/*")):
            where = self._where(path)
            if not DIGEST.fullmatch(path.name) or path.parent.name != path.name[:2]:
                yield Problem(where, "no blob has this name", _REMOVE)
            elif damage := self._damage_of(path):
                yield self._damaged_blob(path.name, where, damage, needed)
        if self._bucket:
            yield from self._objects(self._bucket, needed)

    def _objects(self, bucket: Bucket, needed: set[str] | None) -> Iterator[Problem]:
        """Check the digest of every object in the bucket; what the files of blobs hold does not count."""
        self._damaged.clear()
        self._blob_bytes.clear()
        for digest, stored in sorted(bucket.list().items()):
            if bucket.is_whole(Blob(digest, stored.size_bytes)):
                self._blob_bytes[digest] = stored.size_bytes
            else:
                damage = f"its {stored.size_bytes} bytes have another digest than its name's"
                yield self._damaged_blob(digest, bucket.where(digest), damage, needed)

    def _damaged_blob(self, digest: str, where: str, damage: str, needed: set[str] | None) -> Problem:
        self._damaged.add(digest)
        if self._bucket and where != self._bucket.where(digest):
            return Problem(where, damage, f"{_REMOVE}, it is fetched again")
        is_needed = needed is None or digest in needed
        return Problem(where, damage, _RESTORE if is_needed else f"{_REMOVE}, no round needs it")

    def _damage_of(self, path: Path) -> str:
        """Return what is wrong with the blob at `path`, or "" if its digest is right."""
        try:
            blob = blob_of(path)
        except OSError as error:
            return f"cannot be read ({error.strerror})"
        if blob.digest != path.name:
            return f"its {blob.size_bytes} bytes have the digest {blob.digest[:16]}…, not its name's"
        self._blob_bytes[blob.digest] = blob.size_bytes
        return ""

    def _blob(self, digest: str, where: str, kind: str, remedy: str = _RESTORE) -> Iterator[Problem]:
        """Check that a blob exists.

        Args:
            digest: the digest of the blob.
            where: the record that names the blob.
            kind: what the blob is, in words.
            remedy: how to repair a missing blob.
        """
        if not DIGEST.fullmatch(digest):
            yield Problem(where, f"its {kind} {digest[:80]!r} is no digest", _RESTORE_DATABASE)
        elif digest not in self._blob_bytes and digest not in self._damaged:
            self._damaged.add(digest)
            path = self._where(blob_path(self._state_dir.blobs, digest))
            blob = self._bucket.where(digest) if self._bucket else path
            yield Problem(where, f"its {kind} {blob} is missing", remedy)

    # Records

    def _run(self, records: Store, rounds: Sequence[RoundRow]) -> Iterator[Problem]:
        """Check that the run and its rounds are recorded together, with a readable configuration."""
        run = records.run()
        if run is None:
            if rounds:
                yield Problem("ecavg.sqlite3", "there are rounds but no run", _RESTORE_DATABASE)
            return
        if not rounds:
            yield Problem("ecavg.sqlite3", "the run has no round", _RESTORE_DATABASE)
        try:
            RunConfig.model_validate_json(run.config_json)
        except ValidationError:
            yield Problem("record of the run", "its configuration cannot be read", _RESTORE_DATABASE)

    def _sequence(self, rounds: Sequence[RoundRow], withdrawn: Set[int]) -> Iterator[Problem]:
        """Check that the rounds have no gap, and that each starts from the model before it.

        Args:
            withdrawn: the rounds whose models are withdrawn; a later round may start from an older model.
        """
        # A run that warms up its initial weights begins with round 0.
        first = 0 if rounds and rounds[0].number == 0 else 1
        for number, row in enumerate(rounds, first):
            if row.number != number:
                yield Problem(f"record of round {number}", "is missing", _RESTORE_DATABASE)
                return
        # The digests from which the next round may start.
        starts = {row.initial_digest for row in rounds[:1]}
        for before, after in pairwise(rounds):
            where = f"record of round {after.number}"
            if before.published_digest and before.number not in withdrawn:
                starts = {before.published_digest}
            elif before.published_digest:
                # The round after it may have begun before this model was withdrawn.
                starts.add(before.published_digest)
            if before.phase not in OVER:
                yield Problem(where, f"round {before.number} before it is not over", _RESTORE_DATABASE)
            elif after.initial_digest not in starts:
                what = f"it does not start from what round {before.number} left"
                yield Problem(where, what, _RESTORE_DATABASE)

    def _kept_round(self, records: Store, row: RoundRow) -> Iterator[Problem]:
        """Check the record of a round that is not retired, and the existence of the blobs that it names."""
        where = f"record of round {row.number}"
        if row.phase not in list(Phase):
            yield Problem(where, f"its phase {row.phase!r} is none", _RESTORE_DATABASE)
        elif row.phase not in row.phase_times:
            yield Problem(where, f"it is {row.phase}, and its history has no such phase", _RESTORE_DATABASE)
        if (row.published_digest is not None) != (row.phase == Phase.PUBLISHED):
            yield Problem(
                where, f"it is {row.phase}, with published {row.published_digest}", _RESTORE_DATABASE
            )
        if row.published_digest:
            yield from self._blob(row.published_digest, where, "published model")
        for digest in (row.initial_digest, row.published_digest):
            if digest and (encoding := records.encoding(digest)):
                yield from self._blob(encoding.digest, where, "encoded model")
            if digest and (rest := records.rest(digest)):
                yield from self._blob(rest, where, "rest of the model")
        decisions = records.contributions(row.number)
        accepted = [decision.contribution for decision in decisions if decision.contribution]
        if row.published_digest and not accepted and row.number not in self._used_by_forgotten:
            yield Problem(where, "it is published, of no contribution", _RESTORE_DATABASE)
        for item in accepted:
            named = [(item.weights_digest, "weights")]
            named += [(digest, "data") for digest in (() if row.without_data else item.shard_digests)]
            if item.staleness and item.initial_digest:
                named.append((item.initial_digest, "start"))
            for digest, kind in named:
                contribution = f"contribution of {item.agent_id} to round {row.number}"
                yield from self._blob(digest, contribution, kind)

    # The files of a round outside the database

    def _files_of_round(self, records: Store, row: RoundRow, *, may_be_missing: bool) -> Iterator[Problem]:
        """Check the report of a round that is over, and the model beside the report.

        Args:
            records: the records of the server.
            row: the record of the round.
            may_be_missing: True if a missing report is not a problem. A server that was killed before it
                wrote the report of the last round writes the report when it starts.
        """
        path = self._state_dir.report(row.number)
        where = self._where(path)
        if not path.exists():
            if not may_be_missing:
                yield Problem(where, "is missing", _RESTORE)
            return
        report = _read_json(path)
        if report is None:
            yield Problem(where, "is no JSON", _RESTORE)
            return
        outcome = Phase.PUBLISHED if row.published_digest else Phase.FAILED
        if (report.get("round"), report.get("outcome")) != (row.number, outcome):
            yield Problem(where, f"is not of round {row.number}, {outcome}", _RESTORE)
        elif row.published_digest and _reported_digest(report) not in (row.published_digest, None):
            yield Problem(where, "names another model than the record", _RESTORE)
        if row.published_digest and not row.retired:
            yield from self._model(self._state_dir.model(row.number), row.published_digest)
            if rest := records.rest(row.published_digest):
                yield from self._model(self._state_dir.rest(row.number), rest)

    def _provenance(self, records: Store) -> Iterator[Problem]:
        """Check that provenance.jsonl agrees with the records, and that no agent is still to be forgotten.

        The last line may be missing, and so may the mark of a model that was withdrawn while no server ran.
        A server that starts writes both.
        """
        path = self._state_dir.provenance
        written = (path.read_bytes() if path.exists() else b"").replace(provenance.WITHDRAWN, b"")
        lines = [line.replace(provenance.WITHDRAWN, b"") for line in provenance.lines(records)]
        is_right = b"".join(lines).startswith(written) and written.startswith(b"".join(lines[:-1]))
        if not is_right:
            what = "does not say what the records say of the published models"
            yield Problem(self._where(path), what, "start the server, it is written anew")
        for _ in to_forget(records):
            what = "an agent is to be forgotten, and is not yet"
            remedy = "start the server, or give the same command again"
            yield Problem(self._state_dir.database.name, what, remedy)

    def _model(self, path: Path, digest: str) -> Iterator[Problem]:
        """Check that the model in a round's folder is the published one."""
        where, blob = self._where(path), blob_path(self._state_dir.blobs, digest)
        remedy = f"{_REMOVE}, and start the server" if self._bucket else f"link it anew: ln -f {blob} {path}"
        if not path.exists():
            yield Problem(where, "is missing", remedy)
        elif blob.exists() and path.samefile(blob):
            # The blob has been checked, and the model is the same file.
            return
        elif blob_of(path).digest != digest:
            yield Problem(where, "is not the published model", remedy)

    def _jobs(self, rounds: dict[int, RoundRow]) -> Iterator[Problem]:
        """Check that all jobs and results can be read, and that the results are of the published models."""
        results: dict[int, jobs.Result] = {}
        # The job that makes the initial weights belongs to no round.
        for number, directory in sorted([*jobs.round_jobs(self._state_dir), (-1, self._initialise())]):
            where = self._where(directory.path)
            try:
                if directory.is_begun:
                    directory.read_job()
                if result := directory.read_result():
                    results[number] = result
            except (RunError, OSError):
                over = number in rounds and rounds[number].phase in OVER
                remedy = (
                    f"{_RESTORE}, or remove the folder" if over else "remove the folder: it is done again"
                )
                yield Problem(where, "its job or result cannot be read", remedy)
                rounds.pop(number, None)
                continue
            if number >= 0 and number not in rounds:
                yield Problem(where, "there is no record of its round", _REMOVE)
        for row in rounds.values():
            result = results.get(row.number)
            if row.published_digest and not row.retired and _made_digest(result) != row.published_digest:
                what = "is not of the published model" if result else "is missing"
                where = self._where(jobs.round_job(self._state_dir, row.number).path)
                remedy = f"{_RESTORE}; the round's report.json stays as it is"
                yield Problem(f"{where}/result.json", what, remedy)

    def _initialise(self) -> jobs.JobDirectory:
        return jobs.JobDirectory(self._state_dir.job("initialise"))

    def _folders(self, numbers: set[int]) -> Iterator[Problem]:
        """Check that there is a record for each folder of a round."""
        for path in _sorted_entries(self._state_dir.rounds):
            if not path.name.isdigit() or int(path.name) not in numbers:
                yield Problem(self._where(path), "there is no record of its round", _REMOVE)

    def _partials(self, slots: set[int]) -> Iterator[Problem]:
        """Check that each begun upload belongs to the slot of an agent, and count the begun uploads."""
        for path in _sorted_entries(self._state_dir.partial):
            match = _PARTIAL_NAME.fullmatch(path.name)
            if not match or int(match[1]) not in slots:
                yield Problem(self._where(path), "it is no agent's upload", _REMOVE)
            else:
                self._num_partials += 1


def _copy_if_there(source: Path, target: Path) -> None:
    """Copy a file; do nothing if it does not exist.

    Raises:
        UsageError: the file cannot be read, or the copy cannot be written.
    """
    try:
        shutil.copyfile(source, target)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise UsageError(
            f"cannot copy {source} to {target.parent}: {error.strerror}; the variable TMPDIR can name another"
            " folder for the copy"
        ) from error


def _database_problems(copy: Path, state_dir: StateDir) -> Iterator[Problem]:
    """Yield the problems that SQLite itself finds in the copy of the database.

    Raises:
        UsageError: a newer version of this program has written the database.
    """
    where = state_dir.database.name
    if not copy.exists():
        yield Problem(where, "is missing", _RESTORE_DATABASE)
        return
    try:
        with closing(sqlite3.connect(copy)) as database:
            (version,) = database.execute("PRAGMA user_version").fetchone()
            if version > len(MIGRATIONS):
                raise UsageError(f"a newer cloud-server has written {state_dir}: use that one to check it")
            for (message,) in database.execute("PRAGMA integrity_check"):
                if message != "ok":
                    yield Problem(where, " ".join(message.split()), _RESTORE_DATABASE)
            for table, row_id, parent, _ in database.execute("PRAGMA foreign_key_check"):
                what = f"row {row_id} of {table} names none of {parent}"
                yield Problem(where, what, _RESTORE_DATABASE)
    except sqlite3.DatabaseError as error:
        yield Problem(where, f"is damaged ({error})", _RESTORE_DATABASE)


def _read_json(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in the file, or None if the file does not contain one."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _reported_digest(report: dict[str, Any]) -> Any:
    """Return the digest of the published model that the report names, or None."""
    weights = report.get("weights")
    return weights.get("sha256") if isinstance(weights, dict) else None


def _made_digest(result: jobs.Result | None) -> str | None:
    """Return the digest of the weights that the job has made, or None."""
    return result.weights.sha256 if result and result.weights else None


def _sorted_entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []
