"""The paths of a server's state directory: the one place that knows them.

    STATE/lock                     held for as long as a server uses STATE, and names that server
    STATE/ecavg.sqlite3            every record, through a write-ahead log
    STATE/blobs/ab/abcdef…         weights and shards by digest, immutable; with a bucket, those used last
    STATE/bucket.json              the bucket that has the blobs; missing where they are files
    STATE/incoming/<digest>        blobs that are being fetched from the bucket
    STATE/partial/<slot>-<digest>  uploads that have begun
    STATE/jobs/round-0003/         the trainer's work on a round; see cloud_server/jobs.py
    STATE/rounds/0003/             the report of a round, and a second name of its model
    STATE/provenance.jsonl         who is in which model; see cloud_server/upkeep/provenance.py
    STATE/precision.json           in which precision this machine trains fastest
    STATE/trainer.log              what the trainer has printed
    STATE/tls/  STATE/http-token   the certificate authority, and the token of the status page

The configuration may put the authority and the token elsewhere.
"""

from dataclasses import dataclass
from pathlib import Path

from ecavg.common.transfer import checked_digest


@dataclass(frozen=True)
class StateDir:
    """A state directory, by its path; nothing is read or made here."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    @property
    def lock(self) -> Path:
        """Return the path of the file whose lock a server holds."""
        return self.path / "lock"

    @property
    def database(self) -> Path:
        """Return the path of the SQLite file."""
        return self.path / "ecavg.sqlite3"

    @property
    def blobs(self) -> Path:
        """Return the folder of all blobs; see `blob_path`."""
        return self.path / "blobs"

    @property
    def partial(self) -> Path:
        """Return the folder of the uploads that have begun."""
        return self.path / "partial"

    @property
    def bucket(self) -> Path:
        """Return the path of the file that names the bucket of the blobs."""
        return self.path / "bucket.json"

    @property
    def incoming(self) -> Path:
        """Return the folder of the blobs that are being fetched from the bucket."""
        return self.path / "incoming"

    @property
    def jobs(self) -> Path:
        """Return the folder of all job directories."""
        return self.path / "jobs"

    @property
    def rounds(self) -> Path:
        """Return the folder that has a folder for each round."""
        return self.path / "rounds"

    @property
    def folders(self) -> tuple[Path, ...]:
        """Return the folders that a server makes at its start."""
        return self.blobs, self.partial, self.jobs, self.rounds

    @property
    def provenance(self) -> Path:
        """Return the path of the file that tells who is in which model."""
        return self.path / "provenance.jsonl"

    @property
    def notified(self) -> Path:
        """Return the path of the file that has what the webhook was told last."""
        return self.path / "notified.json"

    @property
    def precision(self) -> Path:
        """Return the path of the file that keeps this machine's fastest precision."""
        return self.path / "precision.json"

    @property
    def trainer_log(self) -> Path:
        """Return the path of the file that has what the trainer has printed."""
        return self.path / "trainer.log"

    @property
    def tls(self) -> Path:
        """Return the folder of the certificate authority, where no other is configured."""
        return self.path / "tls"

    @property
    def http_token(self) -> Path:
        """Return the path of the status page's token, where no other is configured."""
        return self.path / "http-token"

    def job(self, name: str) -> Path:
        """Return the directory of the job with this name."""
        return self.jobs / name

    def round(self, number: int) -> Path:
        """Return the folder of one round's report and model."""
        return self.rounds / f"{number:04d}"

    def report(self, number: int) -> Path:
        """Return the path of a round's report."""
        return self.round(number) / "report.json"

    def model(self, number: int) -> Path:
        """Return the path of the second name that a round's published blob has."""
        return self.round(number) / "model.safetensors"

    def rest(self, number: int) -> Path:
        """Return the path of the parts of a round's model that do not travel, if the run has such parts."""
        return self.round(number) / "rest.safetensors"


def blob_path(blobs_dir: Path, digest: str) -> Path:
    """Return where the blob with this digest is kept; ValueError unless it is 64 lower-case hex digits."""
    return blobs_dir / checked_digest(digest)[:2] / digest
