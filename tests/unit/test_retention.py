"""What a clean-up keeps and removes, and that it may die anywhere; the state is written out by hand."""

import errno
import os
import shutil
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from ecavg.cloud_server import jobs
from ecavg.cloud_server.commands import check
from ecavg.cloud_server.config import ServerConfig
from ecavg.cloud_server.contribution import Decision
from ecavg.cloud_server.jobs import JobDirectory
from ecavg.cloud_server.showing import reports
from ecavg.cloud_server.store import Store
from ecavg.cloud_server.upkeep import retention, retired
from ecavg.common.errors import StorageError
from ecavg.common.run_state import Outcome
from tests.unit.states import (
    AGENT,
    INITIAL,
    SHARD,
    begin,
    blobs,
    contribute,
    digest_of,
    encoded_of,
    local_of,
    model_of,
    publish,
    run_job,
    run_rounds,
    upload,
)

WEEK = 7 * 24 * 3600.0
# The rounds' own times are near zero: only files are young.
NOW = time.time()


def clean_up(
    store: Store, state_dir: Path, *, keep_rounds: int = 2, keep: float = WEEK, now: float = 10.0, **more: Any
) -> None:
    retention.clean_up(store, keep_rounds=keep_rounds, keep_partial_seconds=keep, now=now, **more)


def expected_blobs(kept: range) -> set[str]:
    contents = [INITIAL, SHARD]
    if kept[0] > 1:
        contents += [model_of(kept[0] - 1), encoded_of(kept[0] - 1)]
    for number in kept:
        contents += [local_of(number), model_of(number), encoded_of(number)]
    return {digest_of(content) for content in contents}


def is_healthy(state_dir: Path) -> bool:
    return check.main([str(state_dir)]) == 0


# What stays and what goes


@pytest.mark.parametrize("keep_rounds", [1, 2, 4, 5, 10])
def test_blobs_of_the_open_and_the_last_rounds_stay(store: Store, state_dir: Path, keep_rounds: int) -> None:
    run_rounds(store, state_dir, 5)
    clean_up(store, state_dir, keep_rounds=keep_rounds)
    kept = range(max(1, 6 - keep_rounds), 6)
    assert blobs(state_dir) == expected_blobs(kept)
    models = {int(path.parent.name) for path in (state_dir / "rounds").glob("*/model.safetensors")}
    assert models == {number for number, _ in jobs.round_jobs(store.state_dir)} == set(kept)
    assert len(list((state_dir / "rounds").glob("*/report.json"))) == 5
    assert [row.number for row in store.rounds() if row.retired] == list(range(1, kept[0]))


def test_warm_up_is_given_up_like_any_round(store: Store, state_dir: Path) -> None:
    run_rounds(store, state_dir, 1, first_round=0)
    clean_up(store, state_dir, keep_rounds=2)
    assert digest_of(local_of(0)) in blobs(state_dir)
    clean_up(store, state_dir, keep_rounds=1)
    assert blobs(state_dir) == {
        digest_of(content)
        for content in (INITIAL, SHARD, model_of(0), encoded_of(0), local_of(1), model_of(1), encoded_of(1))
    }
    assert [number for number, _ in jobs.round_jobs(store.state_dir)] == [1]
    store.close()
    assert is_healthy(state_dir)


def test_cleaned_up_state_passes_the_check(store: Store, state_dir: Path) -> None:
    run_rounds(store, state_dir, 5)
    clean_up(store, state_dir)
    store.close()
    assert is_healthy(state_dir)


def test_nothing_grows_over_many_rounds(store: Store, state_dir: Path) -> None:
    begin(store, state_dir)
    for number in range(1, 9):
        contribute(store, number)
        publish(store, state_dir, number)
        clean_up(store, state_dir)
        store.open_round(number + 1, digest_of(model_of(number)), number + 1)
        assert len(blobs(state_dir)) <= 10
        assert len(store.uploads()) <= 3


def test_round_that_is_over_counts_before_the_next_one_opens(store: Store, state_dir: Path) -> None:
    begin(store, state_dir)
    contribute(store, 1)
    publish(store, state_dir, 1)
    clean_up(store, state_dir, keep_rounds=1)
    assert blobs(state_dir) == expected_blobs(range(1, 2))


def test_records_of_contributions_stay(store: Store, state_dir: Path) -> None:
    run_rounds(store, state_dir, 5)
    before = [store.contributions(number) for number in range(1, 6)]
    clean_up(store, state_dir)
    assert [store.contributions(number) for number in range(1, 6)] == before


def test_an_old_shard_can_be_sent_again(store: Store, state_dir: Path) -> None:
    run_rounds(store, state_dir, 1)
    for number in range(2, 6):
        contribute(store, number, b"another shard")
        publish(store, state_dir, number)
        store.open_round(number + 1, digest_of(model_of(number)), number + 1)
    clean_up(store, state_dir)
    assert not store.has_upload(AGENT, digest_of(SHARD), "data")
    contribute(store, 6)
    clean_up(store, state_dir)
    assert store.has_upload(AGENT, digest_of(SHARD), "data")


@pytest.mark.parametrize("keep_rounds", [1, 3])
def test_shards_that_are_contributed_again_and_again_are_sent_once(
    store: Store, state_dir: Path, keep_rounds: int
) -> None:
    """Contribute a shard more in each round, and another first one in the last rounds."""
    begin(store, state_dir)
    shards: list[bytes] = []
    for number in range(1, 9):
        shards.append(f"shard {number}".encode())
        assert contribute(store, number, *shards) == shards[-1:]
        publish(store, state_dir, number)
        clean_up(store, state_dir, keep_rounds=keep_rounds)
        store.open_round(number + 1, digest_of(model_of(number)), number + 1)
        clean_up(store, state_dir, keep_rounds=keep_rounds)
        assert set(map(digest_of, shards)) <= blobs(state_dir)
    for number in range(9, 13):
        contribute(store, number, *shards[1:], b"anew")
        publish(store, state_dir, number)
        store.open_round(number + 1, digest_of(model_of(number)), number + 1)
    clean_up(store, state_dir, keep_rounds=keep_rounds)
    assert blobs(state_dir) & set(map(digest_of, shards)) == set(map(digest_of, shards[1:]))
    store.close()
    assert is_healthy(state_dir)


# retain_data = "round"


@pytest.mark.parametrize("is_published", [True, False])
def test_data_kept_for_a_round_go_when_it_is_over(store: Store, state_dir: Path, is_published: bool) -> None:
    begin(store, state_dir)
    contribute(store, 1)
    upload(store, b"never contributed", "data", NOW)
    upload(store, b"weights to come", "weights", NOW)
    begun, active = (store.partial_path(AGENT, digit * 64) for digit in "ab")
    for path in (begun, active):
        path.write_bytes(b"half")
    clean_up(store, state_dir, retain_data="round", now=NOW)
    # The round is not over yet.
    assert digest_of(SHARD) in blobs(state_dir)
    publish(store, state_dir, 1) if is_published else store.set_phase(1, "failed", 1.5, failure="why")
    (state_dir / "jobs/round-0001/scratch").mkdir(parents=True, exist_ok=True)
    clean_up(store, state_dir, retain_data="round", now=time.time() + 1, active=[active])
    left = {INITIAL, local_of(1), b"weights to come"}
    left |= {model_of(1), encoded_of(1)} if is_published else set()
    assert blobs(state_dir) == set(map(digest_of, left))
    assert (begun.exists(), active.exists()) == (False, True)
    assert not (state_dir / "jobs/round-0001/scratch").exists()
    assert not store.has_upload(AGENT, digest_of(SHARD), "data")
    store.close()
    (state_dir / "rounds/0001").mkdir(exist_ok=True)
    assert is_healthy(state_dir)


def test_data_of_an_open_round_stay_whatever_the_clock_says(store: Store, state_dir: Path) -> None:
    run_rounds(store, state_dir, 1)
    upload(store, b"left of round 1", "data", 1.5)
    contribute(store, 2, b"of round 2")
    # It comes after the clock was set back.
    upload(store, b"of round 2", "data", -5.0)
    upload(store, b"to be contributed", "data", 2.5)
    clean_up(store, state_dir, retain_data="round")
    data = {digest_of(SHARD), *map(digest_of, (b"left of round 1", b"of round 2", b"to be contributed"))}
    assert blobs(state_dir) & data == {digest_of(b"of round 2"), digest_of(b"to be contributed")}
    assert store.has_upload(AGENT, digest_of(b"of round 2"), "data")
    store.close()
    assert is_healthy(state_dir)


def test_data_sent_again_are_kept_for_their_round(store: Store, state_dir: Path) -> None:
    begin(store, state_dir)
    for number in range(1, 4):
        assert contribute(store, number) == [SHARD]
        clean_up(store, state_dir, retain_data="round")
        assert store.has_upload(AGENT, digest_of(SHARD), "data")
        publish(store, state_dir, number)
        clean_up(store, state_dir, retain_data="round")
        assert not store.has_upload(AGENT, digest_of(SHARD), "data")
        assert digest_of(SHARD) not in blobs(state_dir)
        store.open_round(number + 1, digest_of(model_of(number)), number + 1)
    store.close()
    assert is_healthy(state_dir)


def test_late_contribution_keeps_its_data_for_the_next_round_only(store: Store, state_dir: Path) -> None:
    run_rounds(store, state_dir, 1)
    digest = upload(store, b"late", "data", 2.1)
    store.record_contribution(1, Decision(AGENT, Outcome.LATE, 2.2))
    clean_up(store, state_dir, retain_data="round")
    assert store.has_upload(AGENT, digest, "data")
    publish(store, state_dir, 2)
    clean_up(store, state_dir, retain_data="round")
    assert digest not in blobs(state_dir)


def test_upload_for_a_contribution_to_come_stays_though_an_old_round_named_it(
    store: Store, state_dir: Path
) -> None:
    run_rounds(store, state_dir, 5)
    # It has been uploaded before, for round 1.
    upload(store, local_of(1), "weights", 9.0)
    clean_up(store, state_dir, keep=5.0)
    assert store.has_upload(AGENT, digest_of(local_of(1)), "weights")


@pytest.mark.parametrize(("age", "stays"), [(99.0, True), (101.0, False)])
def test_upload_that_was_never_contributed_stays_for_keep_partial_seconds(
    store: Store, state_dir: Path, age: float, stays: bool
) -> None:
    begin(store, state_dir)
    digest = upload(store, b"never contributed", "data", NOW - age)
    clean_up(store, state_dir, keep=100.0, now=NOW)
    assert store.has_upload(AGENT, digest, "data") == stays
    assert (digest in blobs(state_dir)) == stays


@pytest.mark.parametrize(("age", "stays"), [(99.0, True), (101.0, False)])
def test_partial_upload_stays_for_keep_partial_seconds(
    store: Store, state_dir: Path, age: float, stays: bool
) -> None:
    begin(store, state_dir)
    partial = store.partial_path(AGENT, "a" * 64)
    partial.write_bytes(b"half")
    os.utime(partial, (NOW - age, NOW - age))
    clean_up(store, state_dir, keep=100.0, now=NOW)
    assert partial.exists() == stays


def test_partial_upload_that_is_asked_for_is_young_again(store: Store, state_dir: Path) -> None:
    begin(store, state_dir)
    partial = store.partial_path(AGENT, "a" * 64)
    partial.write_bytes(b"half")
    os.utime(partial, (0, 0))
    store.partial_path(AGENT, "a" * 64)
    clean_up(store, state_dir, keep=100.0, now=NOW)
    assert partial.exists()


@pytest.mark.parametrize(("age", "stays"), [(99.0, True), (101.0, False)])
def test_blob_without_a_record_stays_as_long_as_an_upload(
    store: Store, state_dir: Path, age: float, stays: bool
) -> None:
    begin(store, state_dir)
    orphan = store.blobs.path("b" * 64)
    orphan.parent.mkdir()
    orphan.write_bytes(b"committed, and then the power went")
    os.utime(orphan, (NOW - age, NOW - age))
    clean_up(store, state_dir, keep=100.0, now=NOW)
    assert orphan.exists() == stays


def test_model_that_a_crash_kept_from_being_published_stays(store: Store, state_dir: Path) -> None:
    begin(store, state_dir)
    directory = run_job(state_dir, 1, digest_of(INITIAL))
    made = {directory.weights_path: model_of(1), directory.encoded_path: encoded_of(1)}
    for path, content in made.items():
        store.blobs.adopt(path, digest_of(content))
        os.utime(store.blobs.path(digest_of(content)), (0, 0))
    clean_up(store, state_dir, now=NOW)
    assert blobs(state_dir) == {digest_of(content) for content in (INITIAL, *made.values())}


def test_download_in_progress_reads_to_its_end(store: Store, state_dir: Path) -> None:
    run_rounds(store, state_dir, 5)
    with store.blobs.path(digest_of(model_of(1))).open("rb") as download:
        clean_up(store, state_dir)
        assert not store.is_public(digest_of(model_of(1)))
        assert download.read() == model_of(1)


def test_agents_may_read_initial_weights_and_models_only(store: Store, state_dir: Path) -> None:
    run_rounds(store, state_dir, 2)
    assert store.is_public(digest_of(INITIAL))
    assert store.is_public(digest_of(model_of(2)))
    assert store.is_public(digest_of(encoded_of(2)))
    store.blobs.path(digest_of(encoded_of(2))).unlink()
    assert not store.is_public(digest_of(encoded_of(2)))
    assert not store.is_public(digest_of(local_of(2)))


def test_accuracies_of_a_round_are_read_from_its_report_when_its_job_is_gone(tmp_path: Path) -> None:
    assert reports.read_result(tmp_path) is None
    (tmp_path / "report.json").write_text('{"candidates": {"average": 0.5}, "accuracy_published": 0.75}')
    result = reports.read_result(tmp_path)
    assert result
    assert reports.stages(result) == {"average": 0.5, "published": 0.75}


@pytest.mark.parametrize("values", [{"keep_rounds": 0}, {"keep_partial_seconds": 0}])
def test_limits_of_the_keys(values: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="greater than"):
        ServerConfig(**values)


def test_files_of_long_retired_rounds_are_not_looked_for_again(
    store: Store, state_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_rounds(store, state_dir, 5)
    clean_up(store, state_dir)
    looked_for: list[str] = []
    monkeypatch.setattr(JobDirectory, "remove", lambda directory: looked_for.append(directory.path.name))
    clean_up(store, state_dir)
    assert looked_for == ["round-0001", "round-0002", "round-0003"]
    looked_for.clear()
    clean_up(store, state_dir)
    assert looked_for == []
    clean_up(store, state_dir, keep_rounds=1)
    assert looked_for == ["round-0004"]


def test_model_that_a_report_puts_back_while_its_round_is_retired_goes(store: Store, state_dir: Path) -> None:
    run_rounds(store, state_dir, 5)
    clean_up(store, state_dir)
    model = state_dir / "rounds/0003/model.safetensors"
    model.write_bytes(b"put back")
    clean_up(store, state_dir)
    assert not model.exists()


# Crashes


class Killed(BaseException):
    pass


def dying_at(monkeypatch: pytest.MonkeyPatch, steps: int, changes: list[tuple[object, str]]) -> None:
    """Die at the change on the disk with this number: before it where `steps` is odd, after it where even."""
    left = steps

    def dying(function):
        def step(*args, **kwargs):
            nonlocal left
            left -= 1
            if left == 0:
                raise Killed
            result = function(*args, **kwargs)
            left -= 1
            if left == 0:
                raise Killed
            return result

        return step

    for owner, name in changes:
        monkeypatch.setattr(owner, name, dying(getattr(owner, name)))


@pytest.mark.parametrize("retain_data", ["run", "round"])
def test_clean_up_may_die_at_any_step(tmp_path: Path, retain_data: str) -> None:
    template = tmp_path / "template"
    with closing(Store(template)) as store:
        run_rounds(store, template, 4)
    for steps in range(1, 1000):
        state_dir = tmp_path / str(steps)
        shutil.copytree(template, state_dir)
        with closing(Store(state_dir)) as store, pytest.MonkeyPatch.context() as monkeypatch:
            changes = [(Path, "unlink"), (shutil, "rmtree"), (jobs, "sync")]
            changes += [(retired, "retire_rounds"), (retired, "give_up_data")]
            dying_at(monkeypatch, steps, changes)
            try:
                clean_up(store, state_dir, retain_data=retain_data)
                break
            except Killed:
                pass
        assert not jobs.pending_jobs(state_dir / "jobs")
        assert is_healthy(state_dir)
        with closing(Store(state_dir)) as store:
            clean_up(store, state_dir, retain_data=retain_data)
        assert is_healthy(state_dir)
        data = {digest_of(SHARD)} if retain_data == "round" else set()
        assert blobs(state_dir) == expected_blobs(range(3, 5)) - data
        assert len(list((state_dir / "rounds").glob("*/model.safetensors"))) == 2
    assert 20 < steps < 1000


def test_records_go_all_or_none(store: Store, state_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_rounds(store, state_dir, 5)
    before = (store.rounds(), store.uploads())

    def killed(self: Store) -> set[str]:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(retired, "needed_blobs", killed)
        with pytest.raises(Killed):
            clean_up(store, state_dir)
    assert (store.rounds(), store.uploads()) == before


def test_read_only_disk_leaves_the_rest_for_next_time(
    store: Store, state_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_rounds(store, state_dir, 5)

    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EROFS, "read-only")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", refuse)
        with pytest.raises(StorageError):
            clean_up(store, state_dir)
    clean_up(store, state_dir)
    assert blobs(state_dir) == expected_blobs(range(4, 6))


def test_job_that_is_half_removed_is_never_pending(state_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = run_job(state_dir, 1, "0" * 64)

    def remove_result_and_die(path: Path) -> None:
        (path / "result.json").unlink()
        raise Killed

    monkeypatch.setattr(shutil, "rmtree", remove_result_and_die)
    with pytest.raises(Killed):
        directory.remove()
    assert not directory.is_pending


def test_job_that_never_was_is_removed(state_dir: Path) -> None:
    JobDirectory(state_dir / "jobs/round-0001").remove()


def test_state_of_a_first_version_upgrades_itself(state_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ecavg.cloud_server.disk import opened

    with monkeypatch.context() as older:
        older.setattr(opened, "MIGRATIONS", opened.MIGRATIONS[:1])
        with closing(Store(state_dir)) as store:
            store.join(AGENT, 1.0)
            upload(store, b"from before", "data", 1.0)
    with closing(Store(state_dir)) as store:
        assert [row.digest for row in store.uploads()] == [digest_of(b"from before")]
        retired.retire_rounds(store, 0, 0.0)
