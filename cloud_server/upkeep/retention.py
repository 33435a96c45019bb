"""What goes, and when: so that a server that runs for ever does not fill its disk.

The rule. Kept are the round that is open and the last `keep_rounds` that are over, with all that they
name: initial weights and published model, with what either is encoded as, contributed weights and shards.
Older rounds are retired: the trainer's files and every blob that no kept round names are removed. An upload
that no contribution has named yet, and one that is not finished, stay for `keep_partial_seconds` from when
they were last touched.
With `run.retain_data = "round"` all shards go as soon as their round is over, published or failed, and with
them whatever else was uploaded before the next round begins, as a shard or half: agents send it again.
For ever stay the first round's initial weights, which fix the names and shapes of all weights, each round's
`report.json`, and the records of rounds and contributions, some hundred bytes for each agent and round.

Records go first, in one transaction that also notes which blobs shall follow; then the files. Whatever
a crash in between leaves is files that no record names, and the next clean-up removes them. A file that is
being read while it is removed is still read to its end: POSIX keeps what an open descriptor refers to.
"""

import math
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Literal

import structlog

from cloud_server.disk.failures import storage_errors
from cloud_server.disk.tables import RoundRow
from cloud_server.jobs import JobDirectory, job_name
from cloud_server.round import OVER
from cloud_server.store import Store

_JOB_NAME = re.compile(r"round-(\d+)")

log = structlog.get_logger()


def clean_up(
    store: Store,
    state_dir: Path,
    *,
    keep_rounds: int,
    keep_partial_seconds: float,
    now: float,
    retain_data: Literal["round", "run"] = "run",
    active: Collection[Path] = (),
) -> None:
    """Remove what the rule above gives up; no round may change meanwhile, uploads may go on.

    Args:
        active: the files of uploads under way.

    Raises:
        StorageError: the disk does not let it; what is left goes next time.
    """
    last = store.last_round()
    if last is None:
        return
    is_over = last.phase in OVER
    up_to = last.number - keep_rounds - (0 if is_over else 1)
    retired_before = store.uncleared_rounds()
    store.retire_rounds(up_to, uploaded_before=now - keep_partial_seconds)
    if retain_data == "round":
        last_over = last.number if is_over else last.number - 1
        store.give_up_data(last_over, uploaded_before=math.inf if is_over else last.opened_at)
    with storage_errors():
        for number, directory in round_jobs(state_dir):
            if is_over or number < last.number:
                directory.discard_scratch()  # of a trainer that was killed
        for number in store.uncleared_rounds():
            _remove_files_of_round(state_dir, number)
    # One clean-up late: a report that came in at the same time may have put the model there again.
    store.note_cleared(retired_before)
    num_blobs = store.remove_blobs(now - keep_partial_seconds, spare=unpublished_model(state_dir, last))
    is_cleared = retain_data == "round" and is_over
    num_partials = store.remove_partials(now if is_cleared else now - keep_partial_seconds, spare=active)
    if num_blobs or num_partials:
        log.info("cleaned_up", retired_up_to=max(0, up_to), num_blobs=num_blobs, num_uploads=num_partials)


def _remove_files_of_round(state_dir: Path, number: int) -> None:
    JobDirectory(state_dir / "jobs" / job_name(number)).remove()
    (state_dir / "rounds" / f"{number:04d}" / "model.safetensors").unlink(missing_ok=True)


def round_jobs(state_dir: Path) -> Iterator[tuple[int, JobDirectory]]:
    """The rounds whose jobs are on the disk, in no order."""
    for path in list((state_dir / "jobs").glob("round-*")):
        if match := _JOB_NAME.fullmatch(path.name):
            yield int(match[1]), JobDirectory(path)


def unpublished_model(state_dir: Path, last: RoundRow) -> list[str]:
    """The blobs of a model that a crash kept from being published: no round's record names them yet."""
    result = JobDirectory(state_dir / "jobs" / job_name(last.number)).read_result()
    return [made.sha256 for made in (result.weights, result.encoded) if made] if result else []
