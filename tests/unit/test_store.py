"""The store: what it keeps, what it refuses, and what is left when its process is killed at any step.

Run as a module, this is the process that is killed; see its end.
"""

import errno
import hashlib
import itertools
import os
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from ecavg.cloud_server import records
from ecavg.cloud_server.contribution import Contribution, Decision, Rejection
from ecavg.cloud_server.disk.failures import storage_errors
from ecavg.cloud_server.disk.tables import AgentRow, ReportRow, RoundRow, RunRow, UploadRow
from ecavg.cloud_server.state_dir import blob_path
from ecavg.cloud_server.store import Store
from ecavg.common.errors import NotFoundError, Reason, StorageError
from ecavg.common.run_state import Outcome, Phase
from ecavg.common.schedule import Combined
from tests.processes import ROOT
from tests.unit.states import commit_upload

# There fsync costs nothing.
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
UPLOADED, TRAINED = b"an upload" * 1000, b"a global model" * 1000
DIGEST, TRAINED_DIGEST = (hashlib.sha256(content).hexdigest() for content in (UPLOADED, TRAINED))
CONTRIBUTION = Decision(
    "a",
    Outcome.ACCEPTED,
    12.5,
    Contribution("a", DIGEST, ("b" * 64, "c" * 64), 600, "e" * 64, score_local=0.1 + 0.2, num_shared=540),
)
REPORT = ReportRow("a", 0.91, None, 0.96, 120, True, "", 99.5, 0.1 + 0.7)


@pytest.fixture
def state_dir() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        yield Path(folder) / "state"


@pytest.fixture
def store(state_dir: Path) -> Iterator[Store]:
    with closing(Store(state_dir)) as store:
        yield store


@pytest.fixture
def run_store(store: Store) -> Store:
    """Return a store with an open round, the agents "a" and "b", and a whole upload of "a"."""
    populate(store)
    return store


def populate(store: Store) -> None:
    store.create_run("run-1", "{}", "0" * 64, 10.0)
    for agent_id in ("a", "b"):
        store.join(agent_id, 11.0)
    store.partial_path("a", DIGEST).write_bytes(UPLOADED)


# The run, its agents and its rounds


def test_new_store_is_empty(store):
    assert store.run() is None
    assert store.last_round() is None
    assert store.round(1) is None
    assert store.agents() == store.rounds() == store.contributions(1) == store.reports(1) == []


def test_there_is_one_run(store):
    store.create_run("run-1", '{"model": "mlp"}', "0" * 64, 1.5)
    with pytest.raises(sqlite3.IntegrityError):
        store.create_run("run-2", "{}", "0" * 64, 2.5)
    assert store.run() == RunRow("run-1", '{"model": "mlp"}', 1.5)


def test_agent_keeps_its_slot(store):
    assert [store.join(agent_id, now) for now, agent_id in enumerate("baba")] == [1, 2, 1, 2]
    assert store.agents() == [AgentRow("b", 1, 0.0), AgentRow("a", 2, 1.0)]


def test_agents_that_join_at_once_get_different_slots(store):
    names = [f"agent-{number}" for number in range(20)] * 2
    with ThreadPoolExecutor(8) as threads:
        slots = list(threads.map(lambda name: store.join(name, 1.0), names))
    assert slots[:20] == slots[20:]
    assert sorted(slots[:20]) == list(range(1, 21))


def test_round_opens_collecting(store):
    store.open_round(1, "0" * 64, 10.0)
    collecting = RoundRow(1, Phase.COLLECTING, "0" * 64, None, "", 10.0, {Phase.COLLECTING: 10.0})
    assert store.round(1) == store.last_round() == collecting


def test_round_number_is_taken_once(run_store):
    with pytest.raises(sqlite3.IntegrityError):
        run_store.open_round(1, "f" * 64, 20.0)
    assert [row.initial_digest for row in run_store.rounds()] == ["0" * 64]


def test_phase_times_are_those_of_the_first_entry(run_store):
    """A job that is done again does not change when the round closed."""
    run_store.set_phase(1, "aggregating", 20.0)
    run_store.set_phase(1, "fine_tuning", 30.0)
    run_store.set_phase(1, "aggregating", 40.0)
    assert run_store.round(1).phase == "aggregating"
    assert run_store.round(1).phase_times == {"collecting": 10.0, "aggregating": 20.0, "fine_tuning": 30.0}


def test_rounds_end_published_or_failed(run_store):
    run_store.set_phase(1, "published", 20.0, published_digest="e" * 64)
    run_store.open_round(2, "e" * 64, 21.0)
    run_store.set_phase(2, "failed", 22.0, failure="out of memory")
    assert [(row.number, row.phase, row.published_digest, row.failure) for row in run_store.rounds()] == [
        (1, "published", "e" * 64, ""),
        (2, "failed", None, "out of memory"),
    ]
    assert run_store.last_round() == run_store.round(2)


def test_run_has_published_from_its_first_model_on(run_store):
    run_store.set_phase(1, "failed", 20.0, failure="out of memory")
    run_store.open_round(2, "0" * 64, 21.0)
    assert not run_store.has_published()
    run_store.set_phase(2, "published", 22.0, published_digest="e" * 64)
    run_store.open_round(3, "e" * 64, 23.0)
    assert run_store.has_published()


def test_what_published_rounds_have_combined_is_counted(run_store):
    why = Rejection(Reason.LARGE_UPDATE, "too large")
    parts = (("a", 5, None), ("b", 7, None)), (("a", 5, None), ("b", 7, why)), (), (("a", 9, None),)
    for number, decisions in enumerate(parts, 1):
        if number > 1:
            run_store.open_round(number, "e" * 64, 20.0, has_full_curve=number == 2)
        for agent_id, num_shared, left_out in decisions:
            part = Contribution(agent_id, DIGEST, (), 9, num_shared=num_shared)
            decision = Decision(agent_id, Outcome.ACCEPTED, 20.0, part, left_out)
            run_store.record_contribution(number, decision)
        if number < 4:
            run_store.set_phase(number, "published", 21.0, published_digest="e" * 64)
    assert records.combined(run_store) == [Combined(12, False), Combined(5, True), Combined(0, False)]
    assert [row.has_full_curve for row in run_store.rounds()] == [False, True, False, False]


def test_phase_of_an_unknown_round_is_refused(run_store):
    with pytest.raises(sqlite3.IntegrityError):
        run_store.set_phase(7, "aggregating", 20.0)
    assert [row.number for row in run_store.rounds()] == [1]


# Contributions and reports


def test_contributions_come_back_as_they_were_in_agent_id_order(run_store):
    late = Decision("b", Outcome.LATE, 13.0, why=Rejection(Reason.ROUND_CLOSED, ""))
    run_store.record_contribution(1, late)
    run_store.record_contribution(1, CONTRIBUTION)
    assert run_store.contributions(1) == [CONTRIBUTION, late]


def test_last_record_of_an_agent_and_round_stands(run_store):
    why = Rejection(Reason.NON_FINITE, "NaN in fc.weight")
    rejected = Decision("a", Outcome.REJECTED, 12.5, why=why)
    run_store.record_contribution(1, rejected)
    assert run_store.contributions(1) == [rejected]
    run_store.record_contribution(1, CONTRIBUTION)
    assert run_store.contributions(1) == [CONTRIBUTION]


@pytest.mark.parametrize(
    ("number", "changes"), [(2, {}), (1, {"agent_id": "stranger"}), (1, {"outcome": "maybe"})]
)
def test_contribution_without_round_agent_or_outcome_is_refused(run_store, number, changes):
    with pytest.raises(sqlite3.IntegrityError):
        run_store.record_contribution(number, replace(CONTRIBUTION, **changes))
    assert run_store.contributions(number) == []


def test_reports_come_back_as_they_were_and_the_last_one_stands(run_store):
    reports = (replace(REPORT, agent_id="b"), replace(REPORT, applied=False, reason="worse"), REPORT)
    assert [run_store.record_report(1, report) for report in reports] == [True, True, False]
    assert run_store.reports(1) == [REPORT, replace(REPORT, agent_id="b")]
    assert run_store.reports(1)[0].applied is True


# Blobs


def test_blob_lies_under_its_first_two_digits(store, state_dir):
    assert store.blobs.path("ab" * 32) == state_dir / "blobs" / "ab" / ("ab" * 32)
    assert store.blobs.path("ab" * 32) == blob_path(state_dir / "blobs", "ab" * 32)


@pytest.mark.parametrize(
    "digest", ["", "a" * 63, "a" * 65, "A" * 64, "g" * 64, "a" * 64 + "\n", "../" * 21 + "x", "\u0661" * 64]
)
def test_what_is_no_digest_never_becomes_a_path(run_store, digest):
    for path_of in (
        run_store.blobs.path,
        run_store.blobs.size,
        lambda text: run_store.partial_path("a", text),
    ):
        with pytest.raises(ValueError, match="no digest"):
            path_of(digest)


def test_partial_uploads_are_named_by_slot(run_store, state_dir):
    assert run_store.partial_path("b", DIGEST) == state_dir / "partial" / f"2-{DIGEST}"


def test_agent_that_never_joined_cannot_upload(run_store):
    with pytest.raises(NotFoundError) as refusal:
        run_store.partial_path("stranger", DIGEST)
    assert refusal.value.reason is Reason.UNKNOWN_AGENT


def test_committed_upload_is_an_immutable_blob(run_store):
    assert run_store.blobs.size(DIGEST) is None
    commit_upload(run_store, "a", DIGEST, "weights", 12.0)
    blob = run_store.blobs.path(DIGEST)
    assert blob.read_bytes() == UPLOADED
    assert run_store.blobs.size(DIGEST) == len(UPLOADED)
    assert stat.S_IMODE(blob.stat().st_mode) == 0o444
    assert not run_store.partial_path("a", DIGEST).exists()


def test_upload_is_that_of_its_agent_and_kind_only(run_store):
    commit_upload(run_store, "a", DIGEST, "weights", 12.0)
    assert run_store.has_upload("a", DIGEST, "weights")
    assert not run_store.has_upload("b", DIGEST, "weights")
    assert not run_store.has_upload("a", DIGEST, "data")


def test_record_without_its_blob_is_no_upload(run_store):
    commit_upload(run_store, "a", DIGEST, "weights", 12.0)
    run_store.blobs.path(DIGEST).unlink()
    assert not run_store.has_upload("a", DIGEST, "weights")


def test_same_bytes_from_two_agents_are_one_blob_and_two_uploads(run_store):
    run_store.partial_path("b", DIGEST).write_bytes(UPLOADED)
    commit_upload(run_store, "a", DIGEST, "weights", 12.0)
    commit_upload(run_store, "b", DIGEST, "weights", 13.0)
    assert run_store.has_upload("a", DIGEST, "weights")
    assert run_store.has_upload("b", DIGEST, "weights")
    assert run_store.blobs.path(DIGEST).read_bytes() == UPLOADED
    assert not run_store.partial_path("b", DIGEST).exists()


def test_commit_again_changes_nothing(run_store):
    for now in (12.0, 13.0):
        commit_upload(run_store, "a", DIGEST, "weights", now)
    assert run_store.has_upload("a", DIGEST, "weights")


def test_uploads_that_are_committed_together_share_a_transaction_and_one_that_fails_harms_none(run_store):
    for agent_id in ("a", "b"):
        run_store.partial_path(agent_id, DIGEST).write_bytes(UPLOADED)
    statements = []
    run_store._database.set_trace_callback(lambda statement: statements.append(statement.split()[0]))
    first, missing, unknown, last = run_store.commit_uploads(
        [
            UploadRow("a", DIGEST, "weights", 12.0),
            UploadRow("a", TRAINED_DIGEST, "weights", 12.0),
            UploadRow("nobody", DIGEST, "weights", 12.0),
            UploadRow("b", DIGEST, "weights", 13.0),
        ]
    )
    run_store._database.set_trace_callback(None)
    assert (first, last) == (None, None)
    assert isinstance(missing, NotFoundError)
    assert isinstance(unknown, NotFoundError)
    assert statements.count("COMMIT") == 1
    assert [row.agent_id for row in run_store.uploads()] == ["a", "b"]


def test_commit_of_nothing_is_refused_and_leaves_no_record(run_store):
    with pytest.raises(NotFoundError):
        commit_upload(run_store, "b", DIGEST, "weights", 12.0)
    commit_upload(run_store, "a", DIGEST, "weights", 12.0)
    assert not run_store.has_upload("b", DIGEST, "weights")


def test_trained_file_becomes_a_blob_once(run_store, state_dir):
    trained = state_dir / "jobs" / "model.safetensors"
    trained.write_bytes(TRAINED)
    # The second time is as after a restart.
    for _ in range(2):
        run_store.blobs.adopt(trained, TRAINED_DIGEST)
    assert run_store.blobs.path(TRAINED_DIGEST).read_bytes() == TRAINED
    assert not trained.exists()


def test_missing_trained_file_is_refused(run_store, state_dir):
    with pytest.raises(NotFoundError, match=TRAINED_DIGEST):
        run_store.blobs.adopt(state_dir / "jobs" / "model.safetensors", TRAINED_DIGEST)


# Durable before acknowledged


def test_everything_is_there_after_a_restart(run_store, state_dir):
    commit_upload(run_store, "a", DIGEST, "weights", 12.0)
    run_store.record_contribution(1, CONTRIBUTION)
    run_store.set_phase(1, "published", 20.0, published_digest="e" * 64)
    run_store.record_report(1, REPORT)
    before = everything(run_store)
    run_store.close()
    with closing(Store(state_dir)) as reopened:
        assert everything(reopened) == before
        assert reopened.has_upload("a", DIGEST, "weights")


def everything(store: Store) -> list[Any]:
    return [store.run(), store.agents(), store.rounds(), store.contributions(1), store.reports(1)]


def test_commits_of_the_database_wait_for_the_disk(store):
    assert store._database.execute("PRAGMA journal_mode").fetchone() == {"journal_mode": "wal"}
    # 2 is FULL.
    assert store._database.execute("PRAGMA synchronous").fetchone() == {"synchronous": 2}


def test_upload_is_recorded_only_when_its_blob_is_on_disk(run_store, monkeypatch):
    steps = []
    fsync, link = os.fsync, os.link

    def noted_fsync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        steps.append(("fsync", path.parent.name, path.name))
        fsync(descriptor)

    def noted_link(source: Path, target: Path) -> None:
        steps.append(("link", source.name, target.name))
        link(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "link", noted_link)
    run_store._database.set_trace_callback(lambda statement: steps.append(statement.split()[0]))
    commit_upload(run_store, "a", DIGEST, "weights", 12.0)
    run_store._database.set_trace_callback(None)
    assert steps == [
        # The slot is read, for the path.
        "SELECT",
        ("fsync", "partial", f"1-{DIGEST}"),
        ("link", f"1-{DIGEST}", DIGEST),
        ("fsync", "blobs", DIGEST[:2]),
        ("fsync", "state", "blobs"),
        "BEGIN",
        "INSERT",
        "COMMIT",
    ]


def test_kill_at_any_step_loses_and_breaks_nothing(tmp_path, state_dir):
    with closing(Store(state_dir)) as store:
        populate(store)
        (state_dir / "jobs" / "model.safetensors").write_bytes(TRAINED)
    results = state_dir.parent / "results"
    results.mkdir()
    subprocess.run([sys.executable, "-m", __name__, state_dir, results], cwd=ROOT, check=True, timeout=60)
    survivors = sorted(results.iterdir())
    acknowledged = [check_survivor(survivor) for survivor in survivors]
    assert acknowledged == sorted(acknowledged)
    assert set(acknowledged) == {0, 1, 2, 3}
    assert len(survivors) > 30


def check_survivor(state_dir: Path) -> int:
    """Check all that must hold; return how many of the steps in `take_in` were acknowledged."""
    num_acknowledged = (state_dir / "acknowledged").read_bytes().count(b"\n")
    with closing(Store(state_dir)) as store:
        check_consistent(store, state_dir)
        done = [
            store.has_upload("a", DIGEST, "weights"),
            store.contributions(1) == [CONTRIBUTION],
            store.round(1).published_digest == TRAINED_DIGEST,
        ]
        assert done == sorted(done, reverse=True)
        assert sum(done) >= num_acknowledged
        for _ in take_in(store, state_dir):
            pass
        check_consistent(store, state_dir)
        assert store.has_upload("a", DIGEST, "weights")
        assert store.round(1).published_digest == TRAINED_DIGEST
        # What is left over is at most a second name of the blob.
        left_over = (state_dir / "partial").iterdir()
        assert {path.read_bytes() for path in left_over} <= {UPLOADED}
    return num_acknowledged


def check_consistent(store: Store, state_dir: Path) -> None:
    blobs = {path.name: path.read_bytes() for path in state_dir.glob("blobs/*/*")}
    assert {name: hashlib.sha256(content).hexdigest() for name, content in blobs.items()} == {
        name: name for name in blobs
    }
    needed = [each.contribution.weights_digest for each in store.contributions(1)] + [
        row.published_digest for row in store.rounds()
    ]
    assert set(filter(None, needed)) <= set(blobs)
    partial = store.partial_path("a", DIGEST)
    assert (partial if partial.exists() else store.blobs.path(DIGEST)).read_bytes() == UPLOADED


def test_part_of_a_transaction_that_fails_is_undone_alone(run_store):
    def fail() -> None:
        with run_store.savepoint():
            run_store.join("z", 12.0)
            raise ValueError("no")

    with run_store.transaction():
        run_store.record_contribution(1, CONTRIBUTION)
        with pytest.raises(ValueError, match="no"):
            fail()
        run_store.join("y", 13.0)
    assert run_store.contributions(1) == [CONTRIBUTION]
    assert [agent.agent_id for agent in run_store.agents()][-1] == "y"
    assert "z" not in [agent.agent_id for agent in run_store.agents()]


# A disk that takes nothing more


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO])
def test_disk_errors_become_one_clear_refusal(number):
    with pytest.raises(StorageError, match=os.strerror(number)) as refusal, storage_errors():
        raise OSError(number, os.strerror(number))
    assert refusal.value.reason is Reason.STORAGE_FULL
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("error", [OSError(errno.EBADF, "bad"), sqlite3.OperationalError("no such table")])
def test_other_errors_stay_what_they_are(error):
    with pytest.raises(type(error)) as raised, storage_errors():
        raise error
    assert raised.value is error


@pytest.mark.parametrize("step", ["mkdir", "fsync", "link"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_upload_that_the_disk_refused_can_be_committed_later(run_store, monkeypatch, step, number):
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as broken:
        broken.setattr(os, step, refuse)
        with pytest.raises(StorageError):
            commit_upload(run_store, "a", DIGEST, "weights", 12.0)
    assert not run_store.has_upload("a", DIGEST, "weights")
    commit_upload(run_store, "a", DIGEST, "weights", 13.0)
    assert run_store.has_upload("a", DIGEST, "weights")
    assert run_store.blobs.path(DIGEST).read_bytes() == UPLOADED


def test_full_disk_under_the_database_leaves_it_as_it_was(run_store):
    database = run_store._database
    num_pages = database.execute("PRAGMA page_count").fetchone()["page_count"]
    database.execute(f"PRAGMA max_page_count = {num_pages}")
    big = replace(CONTRIBUTION, why=Rejection(Reason.QUARANTINED, "x" * 100_000))
    with pytest.raises(StorageError, match="full"):
        run_store.record_contribution(1, big)
    assert run_store.contributions(1) == []
    database.execute("PRAGMA max_page_count = 1000000")
    run_store.record_contribution(1, big)
    assert run_store.contributions(1) == [big]


def test_read_only_database_is_a_storage_error(run_store):
    run_store._database.execute("PRAGMA query_only = ON")
    with pytest.raises(StorageError, match="readonly"):
        run_store.join("c", 12.0)


# The process that dies


def die_at_each_step(state_dir: Path, results: Path) -> None:
    """Go through `take_in` on copies of a state directory, killed one step later on each."""
    for step in itertools.count():
        copy = results / f"{step:04d}"
        shutil.copytree(state_dir, copy)
        process = os.fork()
        if process == 0:
            take_in_and_die(copy, step)
        _, status = os.waitpid(process, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            return
        assert os.WTERMSIG(status) == signal.SIGKILL


def take_in_and_die(state_dir: Path, step: int) -> None:
    """Die at a step: one ends wherever Python calls into C, so also between any two system calls."""
    steps = itertools.count()

    def kill_in_time(_frame: FrameType, event: str, _argument: Any) -> None:
        if event == "c_call" and next(steps) == step:
            os.kill(os.getpid(), signal.SIGKILL)

    store = Store(state_dir)
    acknowledged = os.open(state_dir / "acknowledged", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    sys.setprofile(kill_in_time)
    for _ in take_in(store, state_dir):
        os.write(acknowledged, b"\n")
    sys.setprofile(None)
    os._exit(0)


def take_in(store: Store, state_dir: Path) -> Iterator[None]:
    """Put into the store what a round leaves there; each step is acknowledged where this yields."""
    if not store.has_upload("a", DIGEST, "weights"):
        commit_upload(store, "a", DIGEST, "weights", 12.0)
    yield
    store.record_contribution(1, CONTRIBUTION)
    yield
    store.blobs.adopt(state_dir / "jobs" / "model.safetensors", TRAINED_DIGEST)
    store.set_phase(1, "published", 20.0, published_digest=TRAINED_DIGEST)
    yield


if __name__ == "__main__":
    die_at_each_step(*map(Path, sys.argv[1:]))
