"""`cloud-server forget AGENT`: what is removed, and in which order.

1. The authority revokes the agent: from now on the agent comes in only with a newer join token. (Not with
   `--insecure`, where there is no authority, and anybody may come back under any name.)
2. The intent is recorded, under a random pseudonym, in `STATE/ecavg.sqlite3`. What follows is done by the
   server that has STATE, or else by the command itself; if that dies half way, the next server or the same
   command again goes on with it, and each step may be taken again.
3. Work on a round that counts the agent is broken off; the trainer begins anew without it.
4. The records go, in one transaction (`forgotten.py`). It keeps under the pseudonym, by digest, what the
   agent contributed to published models, and notes which blobs nobody else names: the agent's weights and
   shards, and a model made of them that was never published.
5. Then files go: those blobs, begun uploads, the unfinished job, also where it was handed out. What names
   the agent in job and report files is taken out, and `provenance.jsonl` is written anew, with the pseudonym
   in the agent's place.
6. The id is struck from the intent, and what SQLite has deleted from its log.

Published models stay, and so does what other agents have uploaded too.
"""

import json
import math
from pathlib import Path
from typing import Any

import structlog

from ecavg.cloud_server.disk.bucket import Bucket
from ecavg.cloud_server.disk.failures import storage_errors
from ecavg.cloud_server.disk.place import known_bucket
from ecavg.cloud_server.disk.tables import ForgettingRow
from ecavg.cloud_server.jobs import JobDirectory, round_job, round_jobs
from ecavg.cloud_server.round import OVER
from ecavg.cloud_server.store import Store
from ecavg.cloud_server.training.handout import take_back
from ecavg.cloud_server.upkeep import forgotten, provenance, retired
from ecavg.cloud_server.upkeep.retention import unpublished_model
from ecavg.common.errors import RunError
from ecavg.common.faults import Point, crash_point
from ecavg.common.files import replacing

# The lists of agent ids in report.json and result.json.
_LISTS_OF_IDS = ("late", "vanished", "drawn", "not_ready", "soup", "canary")

log = structlog.get_logger()


def unfinished_work(store: Store, agent_id: str) -> JobDirectory | None:
    """Return the job of the round under way, if it counts the agent, or was broken off."""
    last = store.last_round()
    if last is None or last.phase in OVER:
        return None
    directory = round_job(store.state_dir, last.number)
    if not directory.path.exists():
        return None
    try:
        is_concerned = not directory.is_begun or any(
            item.agent_id == agent_id for item in directory.read_job().contributions
        )
    except RunError:
        # A damaged job is done again in any case.
        is_concerned = True
    return directory if is_concerned else None


def forget(store: Store, row: ForgettingRow, now: float) -> None:
    """Remove all that STATE has of the agent; nobody else writes there meanwhile, but uploads of others.

    Args:
        row: an intent that is not done.

    Raises:
        StorageError, OSError: the disk does not let it; do it again.
    """
    assert row.agent_id is not None
    assert row.slot is not None
    last, work = store.last_round(), unfinished_work(store, row.agent_id)
    made = unpublished_model(store.state_dir, last) if last and last.phase not in OVER else []
    if work:
        work.withdraw()
    forgotten.forget_records(store, row, also=made if work else ())
    crash_point(Point.SERVER_AGENT_RECORDS_REMOVED)
    store.blobs.remove_partials_of(row.slot)
    retired.remove_blobs(store, -math.inf, spare=() if work else made)
    crash_point(Point.SERVER_AGENT_BLOBS_REMOVED)
    if work:
        work.remove()
    if url := known_bucket(store.state_dir)[0]:
        # No server may be there to do it.
        take_back(store.state_dir, Bucket(url))
    with storage_errors():
        for number, directory in round_jobs(store.state_dir):
            if last is None or number != last.number or last.phase in OVER:
                # A trainer that was killed may have left some.
                directory.discard_scratch()
                directory.discard_checkpoint()
    files = [*store.state_dir.jobs.glob("*/*.json"), *store.state_dir.rounds.glob("*/report.json")]
    for path in files:
        _strike_out(row.agent_id, path)
    provenance.write(store)
    crash_point(Point.SERVER_AGENT_STRUCK_OUT)
    forgotten.note_forgotten(store, row.pseudonym, now)


def _strike_out(agent_id: str, path: Path) -> None:
    """Take what a JSON file says of an agent out of it."""
    try:
        before = dict(json.loads(path.read_text("utf-8")))
    except (ValueError, TypeError):
        # `cloud-server check` says more.
        log.warning("not_struck_out", path=str(path))
        return
    after = _without(agent_id, before)
    if after != before:
        with storage_errors(), replacing(path) as partial:
            partial.write_text(json.dumps(after, indent=2) + "\n", "utf-8")


def _without(agent_id: str, content: dict[str, Any]) -> dict[str, Any]:
    """Return the content without the agent in lists of agents, be they of objects or of ids."""

    def is_left(key: str, item: Any) -> bool:
        if isinstance(item, dict):
            return item.get("agent_id") != agent_id
        return key not in _LISTS_OF_IDS or item != agent_id

    return {
        key: [item for item in value if is_left(key, item)] if isinstance(value, list) else value
        for key, value in content.items()
    }
