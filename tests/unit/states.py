"""State directories as a server leaves them, made without one."""

import hashlib
import json
import os
from pathlib import Path

from ecavg.cloud_server.contribution import Contribution, Decision
from ecavg.cloud_server.disk.tables import EncodingRow, UploadRow
from ecavg.cloud_server.jobs import EncodedWeightsFile, Job, JobDirectory, Result, WeightsFile
from ecavg.cloud_server.store import Store
from ecavg.cloud_server.upkeep import provenance
from ecavg.common.config import RunConfig
from ecavg.common.run_state import Outcome

RUN = RunConfig()
INITIAL = b"initial weights"
AGENT = "edge-1"
# The same shard is contributed in every round.
SHARD = b"shard"


def digest_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def model_of(number: int) -> bytes:
    return f"global model {number}".encode()


def encoded_of(number: int) -> bytes:
    return f"encoded model {number}".encode()


def local_of(number: int) -> bytes:
    return f"local weights {number}".encode()


def begin(store: Store, state_dir: Path, first_round: int = 1, run: RunConfig = RUN) -> None:
    made = state_dir / "jobs/made"
    made.write_bytes(INITIAL)
    store.blobs.adopt(made, digest_of(INITIAL))
    config_json = run.model_dump_json()
    store.create_run("run-1", config_json, digest_of(INITIAL), 0.0, first_round=first_round)
    store.join(AGENT, 0.5)


def upload(store: Store, content: bytes, kind: str, now: float, agent_id: str = AGENT) -> str:
    digest = digest_of(content)
    store.partial_path(agent_id, digest).write_bytes(content)
    commit_upload(store, agent_id, digest, kind, now)
    return digest


def commit_upload(store: Store, agent_id: str, digest: str, kind: str, now: float) -> None:
    (error,) = store.commit_uploads([UploadRow(agent_id, digest, kind, now)])
    if error:
        raise error


def contribute(store: Store, number: int, *shards: bytes) -> list[bytes]:
    """Have AGENT contribute at second `number` of the run; return the shards that it had to send."""
    shards = shards or (SHARD,)
    weights = upload(store, local_of(number), "weights", number + 0.1)
    sent = [shard for shard in shards if not store.has_upload(AGENT, digest_of(shard), "data")]
    for shard in sent:
        upload(store, shard, "data", number + 0.2)
    digests = tuple(map(digest_of, shards))
    contribution = Contribution(AGENT, weights, digests, 10, score_local=0.9)
    store.record_contribution(number, Decision(AGENT, Outcome.ACCEPTED, number + 0.3, contribution))
    return sent


def run_job(state_dir: Path, number: int, start: str) -> JobDirectory:
    directory = JobDirectory(state_dir / f"jobs/round-{number:04d}")
    name = directory.path.name
    directory.write_job(
        Job(kind="round", name=name, round=number, run=RunConfig(), device="cpu", initial_weights=start)
    )
    directory.weights_path.write_bytes(model_of(number))
    directory.encoded_path.write_bytes(encoded_of(number))
    weights = WeightsFile(sha256=digest_of(model_of(number)), bytes=len(model_of(number)))
    encoded = EncodedWeightsFile(
        sha256=digest_of(encoded_of(number)), bytes=len(encoded_of(number)), base=start
    )
    directory.write_result(
        Result(weights=weights, encoded=encoded, candidates={"average": 0.8}, score_published=0.9)
    )
    return directory


def publish(store: Store, state_dir: Path, number: int) -> None:
    row = store.round(number)
    assert row
    directory = run_job(state_dir, number, row.initial_digest)
    digest = digest_of(model_of(number))
    store.blobs.adopt(directory.weights_path, digest)
    encoding = EncodingRow(digest_of(encoded_of(number)), row.initial_digest)
    store.blobs.adopt(directory.encoded_path, encoding.digest)
    store.record_encoding(digest, encoding)
    store.set_phase(number, "published", number + 0.9, published_digest=digest)
    folder = state_dir / f"rounds/{number:04d}"
    folder.mkdir()
    os.link(store.blobs.path(digest), folder / "model.safetensors")
    report = {"round": number, "outcome": "published", "weights": {"sha256": digest}}
    (folder / "report.json").write_text(json.dumps(report), "utf-8")
    provenance.add_last_round(store)


def run_rounds(store: Store, state_dir: Path, count: int, *, first_round: int = 1) -> None:
    """Publish the rounds up to this number, and open the next one."""
    begin(store, state_dir, first_round)
    for number in range(first_round, count + 1):
        contribute(store, number)
        publish(store, state_dir, number)
        store.open_round(number + 1, digest_of(model_of(number)), number + 1)


def blobs(state_dir: Path) -> set[str]:
    return {path.name for path in (state_dir / "blobs").glob("*/*")}
