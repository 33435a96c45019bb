"""The relay of a training machine: it brings jobs and their blobs from a bucket, and takes results there.

    python -m ecavg.cloud_server.training.relay --bucket s3://BUCKET/PREFIX --state-dir DIR
    torchrun --nnodes=1:4 … -m ecavg.cloud_server.trainer --state-dir DIR

Both run on each machine, and DIR is a folder of this machine alone. It holds the pending job, with the
blobs that the job reads. What the server withdraws disappears from DIR as well.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import structlog

from ecavg.cloud_server.disk.bucket import Bucket
from ecavg.cloud_server.jobs import Job, JobDirectory
from ecavg.cloud_server.state_dir import StateDir, blob_path
from ecavg.cloud_server.training.handout import JOBS, key_of
from ecavg.common import cli
from ecavg.common.errors import RunError, StorageError
from ecavg.common.files import sync
from ecavg.common.logs import configure_logging
from ecavg.common.transfer import Blob

STEP_SECONDS = 0.5
# The name of the object below a job's.
CHECKPOINT = "checkpoint"

log = structlog.get_logger()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the relay until the process is ended."""
    return cli.enter("relay", lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> int:
    parser = cli.Parser(
        prog="python -m ecavg.cloud_server.training.relay",
        description='Bring the jobs of a cloud-server with `trainers = "external"` to this machine.',
    )
    parser.add_argument("--bucket", required=True, metavar="URL", help="the server's `blobs`")
    parser.add_argument(
        "--state-dir",
        type=Path,
        required=True,
        metavar="DIR",
        help="a folder, which the trainer here has too",
    )
    arguments = parser.parse_args(argv)
    configure_logging()
    relay = Relay(StateDir(arguments.state_dir), Bucket(arguments.bucket.rstrip("/")))
    log.info("relay_ready", bucket=arguments.bucket)
    while True:
        relay.try_step()
        time.sleep(STEP_SECONDS)


class Relay:
    """One machine's folder, kept like the jobs in the bucket."""

    def __init__(self, state_dir: StateDir, bucket: Bucket) -> None:
        self._state_dir = state_dir
        self._bucket = bucket
        # When the checkpoint that the bucket has was written, in nanoseconds, by the name of its object.
        self._kept: dict[str, int] = {}
        for folder in (*state_dir.folders, state_dir.incoming):
            folder.mkdir(parents=True, exist_ok=True)

    def try_step(self) -> None:
        """Take a step; what fails is logged, and the next step tries it again."""
        try:
            self.step()
        except (StorageError, RunError, OSError, ValueError) as error:
            log.warning("relay_failed", reason=str(error))

    def step(self) -> None:
        """Bring new jobs, take progress and results back, and drop jobs that are not in the bucket any more.

        Raises:
            StorageError, OSError: the bucket or the disk does not let it; a later step goes on.
        """
        there = self._bucket.names(JOBS)
        asked_for = {name.rpartition("/")[0] for name in there if name.endswith("/job.json")}
        here = self._here()
        for key in here.keys() - asked_for:
            here.pop(key).remove()
        new = [self._read_job(key) for key in sorted(asked_for - here.keys())]
        self._drop_blobs([*new, *(directory.read_job() for directory in here.values())])
        for key, directory in here.items():
            self._take_back(key, directory, there)
        for job in new:
            self._bring(job, there)

    def _here(self) -> dict[str, JobDirectory]:
        directories = [JobDirectory(path) for path in self._state_dir.jobs.iterdir()]
        return {key_of(each.read_job()): each for each in directories if each.is_begun}

    def _read_job(self, key: str) -> Job:
        job = Job.model_validate_json(self._bucket.read(f"{key}/job.json"))
        # The name of a job becomes a path.
        if key_of(job) != key:
            raise RunError(f"{self._bucket.url}/{key} is no job of this version of cloud-server: update it")
        return job

    def _drop_blobs(self, jobs: Sequence[Job]) -> None:
        needed = {digest for job in jobs for digest in job.blobs}
        for path in self._state_dir.blobs.glob("??/*"):
            if path.name not in needed:
                path.unlink()

    def _bring(self, job: Job, there: dict[str, int]) -> None:
        """Bring the blobs of a job and its checkpoint, if it has one, then the job."""
        for digest in job.blobs:
            path = blob_path(self._state_dir.blobs, digest)
            if not path.exists():
                incoming = self._state_dir.incoming / digest
                self._bucket.fetch(Blob(digest, self._bucket.size(digest)), incoming)
                sync(incoming)
                path.parent.mkdir(exist_ok=True)
                incoming.replace(path)
        directory, checkpoint = JobDirectory(self._state_dir.job(job.name)), f"{key_of(job)}/{CHECKPOINT}"
        if checkpoint in there:
            path = directory.checkpoint_path
            path.parent.mkdir(parents=True, exist_ok=True)
            # A checkpoint that was replaced meanwhile is damaged, and the trainer ignores it.
            self._bucket.fetch_unchecked(checkpoint, there[checkpoint], path)
        directory.write_job(job)
        log.info("job_brought", job=job.name, attempt=job.attempt)

    def _take_back(self, key: str, directory: JobDirectory, there: dict[str, int]) -> None:
        """Take progress and result to the bucket; only the machine that has rank 0 has either."""
        progress, name = directory.progress_path, f"{key}/progress.jsonl"
        if progress.exists() and progress.stat().st_size != there.get(name):
            self._bucket.put_file(progress, name)
        if directory.result_path.exists() and f"{key}/result.json" not in there:
            for path in (*directory.model_paths, directory.result_path):
                if path.exists():
                    self._bucket.put_file(path, f"{key}/{path.name}")
            log.info("result_taken_back", job=directory.path.name)
        elif progress.exists():
            self._keep_checkpoint(f"{key}/{CHECKPOINT}", directory.checkpoint_path)

    def _keep_checkpoint(self, name: str, path: Path) -> None:
        """Put a new checkpoint into the bucket, where it outlives the machines."""
        try:
            written_at = path.stat().st_mtime_ns
            if self._kept.get(name) != written_at:
                self._bucket.put_file(path, name)
                self._kept = {name: written_at}
        except FileNotFoundError:
            # There is none yet, or the job is done and it is not needed any more.
            return


if __name__ == "__main__":
    sys.exit(main())
