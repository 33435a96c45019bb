"""What is removed, and when, so that a server that runs for ever does not fill its disk.

The rule. Kept are the round that is open and the last `keep_rounds` that are over, with all that they
name: initial weights and published model, with what either is encoded as and the rest of its model,
contributed weights and shards, and the older global models that contributions started from.
Older rounds are retired: the trainer's files and every blob that no kept round names are removed. An upload
that no contribution has named yet, and one that is not finished, stay for `keep_partial_seconds` from when
they were last touched.
With `run.retain_data = "round"` all shards go as soon as their round is over, published or failed, and with
them whatever else was uploaded before the next round begins, as a shard or half: agents send it again.
The model that the next round starts from stays however old it is, and so does one that is pinned.
For ever stay the first round's initial weights, which fix the names and shapes of all weights, each round's
`report.json`, and the records of rounds and contributions, some hundred bytes for each agent and round.

Records go first, in one transaction that also notes which blobs shall follow (`retired.py`); then the files.
Whatever a crash in between leaves is files that no record names, and the next clean-up removes them. A file
that is being read while it is removed is still read to its end: POSIX keeps what an open descriptor names.
"""

import math
from collections.abc import Collection
from pathlib import Path
from typing import Literal

import structlog

from ecavg.cloud_server.disk.failures import storage_errors
from ecavg.cloud_server.disk.tables import RoundRow
from ecavg.cloud_server.jobs import round_job, round_jobs
from ecavg.cloud_server.round import OVER
from ecavg.cloud_server.state_dir import StateDir
from ecavg.cloud_server.store import Store
from ecavg.cloud_server.upkeep import retired

log = structlog.get_logger()


def clean_up(
    store: Store,
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
    retired_before = retired.uncleared_rounds(store)
    retired.retire_rounds(store, up_to, uploaded_before=now - keep_partial_seconds)
    if retain_data == "round":
        last_over = last.number if is_over else last.number - 1
        retired.give_up_data(store, last_over, uploaded_before=math.inf if is_over else last.opened_at)
    with storage_errors():
        for number, directory in round_jobs(store.state_dir):
            if is_over or number < last.number:
                # A trainer that was killed may have left some.
                directory.discard_scratch()
                directory.discard_checkpoint()
        for number in retired.uncleared_rounds(store):
            round_job(store.state_dir, number).remove()
            store.state_dir.model(number).unlink(missing_ok=True)
            store.state_dir.rest(number).unlink(missing_ok=True)
    # One clean-up late: a report that came in at the same time may have put the model there again.
    retired.note_cleared(store, retired_before)
    spare = unpublished_model(store.state_dir, last)
    num_blobs = retired.remove_blobs(store, now - keep_partial_seconds, spare=spare)
    is_cleared = retain_data == "round" and is_over
    written_before = now if is_cleared else now - keep_partial_seconds
    num_partials = store.blobs.remove_partials(written_before, spare=active)
    if num_blobs or num_partials:
        log.info("cleaned_up", retired_up_to=max(0, up_to), num_blobs=num_blobs, num_uploads=num_partials)


def unpublished_model(state_dir: StateDir, last: RoundRow) -> list[str]:
    """Return the blobs of a model that a crash kept from being published: no record names them yet."""
    directory = round_job(state_dir, last.number)
    result = directory.read_result()
    return [file.sha256 for file in directory.model_files(result).values()] if result else []
