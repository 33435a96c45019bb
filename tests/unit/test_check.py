"""`cloud-server check`: a healthy state passes, and each kind of damage is found and named."""

import os
import shutil
import sqlite3
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from ecavg.cloud_server.__main__ import main
from ecavg.cloud_server.disk.lock import unused
from ecavg.cloud_server.disk.tables import MIGRATIONS
from ecavg.cloud_server.state_dir import StateDir
from ecavg.cloud_server.store import Store
from ecavg.cloud_server.upkeep.retention import clean_up
from ecavg.common.errors import UsageError
from tests.unit.states import (
    AGENT,
    INITIAL,
    SHARD,
    contribute,
    digest_of,
    encoded_of,
    local_of,
    model_of,
    run_rounds,
    upload,
)

EXTRA = b"not contributed yet"


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a state with three rounds over, the first of them retired, and a fourth that collects."""
    path = tmp_path_factory.mktemp("template") / "state"
    with closing(Store(path)) as store:
        run_rounds(store, path, 3)
        clean_up(store, keep_rounds=2, keep_partial_seconds=1e9, now=10.0)
        contribute(store, 4)
        upload(store, EXTRA, "data", 11.0)
        store.partial_path(AGENT, "a" * 64).write_bytes(b"half")
    return path


@pytest.fixture
def state_dir(template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "state"))


def blob(state_dir: Path, content: bytes) -> Path:
    digest = digest_of(content)
    return state_dir / "blobs" / digest[:2] / digest


def overwrite(path: Path, content: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(content)


def sql(state_dir: Path, statement: str) -> None:
    with closing(sqlite3.connect(state_dir / "ecavg.sqlite3")) as database, database:
        database.execute(statement)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_healthy_state_passes(state_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(state_dir)]) == 0
    (summary,) = capsys.readouterr().out.splitlines()
    # Initial weights, shard, extra upload; local weights of rounds 2 to 4, models 1 to 3, also encoded.
    assert summary == f"{state_dir}: ok; checked rounds: 4, blobs: 12 (0.0 MB), begun uploads: 1"


def test_new_state_passes(tmp_path: Path) -> None:
    Store(tmp_path).close()
    assert main(["check", str(tmp_path)]) == 0


def test_last_round_may_be_without_its_report(state_dir: Path) -> None:
    # Round 4 has not been opened yet.
    for table, column in {"contributions": "round", "phase_history": "round", "rounds": "number"}.items():
        sql(state_dir, f"DELETE FROM {table} WHERE {column} = 4")
    shutil.rmtree(state_dir / "rounds/0003")
    assert main(["check", str(state_dir)]) == 0


def test_nothing_is_changed(state_dir: Path) -> None:
    before = snapshot(state_dir)
    main(["check", str(state_dir)])
    assert snapshot(state_dir) == before


def test_records_of_a_killed_server_are_read_from_its_write_ahead_log(
    state_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with closing(Store(state_dir)) as store:
        upload(store, b"in the log only", "data", 12.0)
        shutil.copytree(state_dir, tmp_path / "killed")
    assert (tmp_path / "killed/ecavg.sqlite3-wal").stat().st_size > 0
    blob(tmp_path / "killed", b"in the log only").unlink()
    assert main(["check", str(tmp_path / "killed")]) == 1
    assert "record of an upload of edge-1: its data blobs/" in capsys.readouterr().out


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped bytes in a model": (
        lambda s: overwrite(blob(s, model_of(3)), b"flipped"),
        f"{digest_of(model_of(3))}: its 7 bytes have the digest {digest_of(b'flipped')[:16]}…,"
        " not its name's: restore it",
    ),
    "flipped bytes in an upload": (
        lambda s: overwrite(blob(s, EXTRA), b"flipped"),
        f"{digest_of(EXTRA)}: its 7 bytes have the digest {digest_of(b'flipped')[:16]}…,"
        " not its name's: remove it",
    ),
    "unreadable blob": (
        lambda s: (blob(s, EXTRA).unlink(), blob(s, EXTRA).mkdir()),
        f"{digest_of(EXTRA)}: cannot be read (Is a directory): remove it",
    ),
    "stranger among the blobs": (
        lambda s: (s / "blobs/aa").mkdir() or (s / "blobs/aa/b").touch(),
        "blobs/aa/b: no blob",
    ),
    "first initial weights gone": (
        lambda s: blob(s, INITIAL).unlink(),
        "record of round 1: its initial weights blobs/",
    ),
    "start of a round gone": (
        lambda s: blob(s, model_of(1)).unlink(),
        "record of round 2: its initial weights",
    ),
    "published model gone": (
        lambda s: blob(s, model_of(2)).unlink(),
        "record of round 2: its published model",
    ),
    "encoded model gone": (
        lambda s: blob(s, encoded_of(2)).unlink(),
        "record of round 2: its encoded model",
    ),
    "contributed weights gone": (
        lambda s: blob(s, local_of(4)).unlink(),
        "contribution of edge-1 to round 4: its weights blobs/",
    ),
    "contributed data gone": (
        lambda s: blob(s, SHARD).unlink(),
        "contribution of edge-1 to round 2: its data blobs/",
    ),
    "start of stale weights gone": (
        lambda s: sql(
            s, f"UPDATE contributions SET staleness = 3, initial_weights = '{'f' * 64}' WHERE round = 4"
        ),
        "contribution of edge-1 to round 4: its start blobs/",
    ),
    "upload gone": (lambda s: blob(s, EXTRA).unlink(), "record of an upload of edge-1: its data blobs/"),
    "no digest": (
        lambda s: sql(s, "UPDATE contributions SET weights = '../../etc' WHERE round = 4"),
        "contribution of edge-1 to round 4: its weights '../../etc' is no digest",
    ),
    "no run": (lambda s: sql(s, "DELETE FROM run"), "ecavg.sqlite3: there are rounds but no run"),
    "run of another kind": (
        lambda s: sql(s, "UPDATE run SET config_json = '{}x'"),
        "record of the run: its configuration cannot be read",
    ),
    "round missing": (
        lambda s: (
            sql(s, "DELETE FROM phase_history WHERE round = 2"),
            sql(s, "DELETE FROM contributions WHERE round = 2"),
            sql(s, "DELETE FROM rounds WHERE number = 2"),
        ),
        "record of round 2: is missing",
    ),
    "round that is not over": (
        lambda s: sql(s, "UPDATE rounds SET phase = 'evaluating', published = NULL WHERE number = 3"),
        "record of round 4: round 3 before it is not over",
    ),
    "round from elsewhere": (
        lambda s: sql(s, f"UPDATE rounds SET initial_weights = '{digest_of(INITIAL)}' WHERE number = 3"),
        "record of round 3: it does not start from what round 2 left",
    ),
    "unknown phase": (
        lambda s: sql(s, "UPDATE rounds SET phase = 'x' WHERE number = 4"),
        "its phase 'x' is none",
    ),
    "phase without history": (
        lambda s: sql(s, "UPDATE rounds SET phase = 'failed' WHERE number = 4"),
        "record of round 4: it is failed, and its history has no such phase",
    ),
    "published nothing": (
        lambda s: sql(s, "UPDATE rounds SET published = NULL WHERE number = 3"),
        "record of round 3: it is published, with published None",
    ),
    "published of nothing": (
        lambda s: sql(s, "DELETE FROM contributions WHERE round = 3"),
        "record of round 3: it is published, of no contribution",
    ),
    "contribution of nobody": (
        lambda s: sql(s, "UPDATE contributions SET agent_id = 'nobody' WHERE round = 4"),
        "of contributions names none of agents",
    ),
    "broken database": (
        lambda s: overwrite(s / "ecavg.sqlite3", b"no database" * 999),
        "ecavg.sqlite3: is damaged",
    ),
    "no database": (lambda s: (s / "ecavg.sqlite3").unlink(), "ecavg.sqlite3: is missing"),
    "report gone": (
        lambda s: (s / "rounds/0001/report.json").unlink(),
        "rounds/0001/report.json: is missing",
    ),
    "report cut": (
        lambda s: (s / "rounds/0002/report.json").write_text('{"ro'),
        "0002/report.json: is no JSON",
    ),
    "report of another round": (
        lambda s: shutil.copy(s / "rounds/0002/report.json", s / "rounds/0001/report.json"),
        "rounds/0001/report.json: is not of round 1, published",
    ),
    "report of another model": (
        lambda s: (s / "rounds/0002/report.json").write_text(
            '{"round": 2, "outcome": "published", "weights": {"sha256": "x"}}'
        ),
        "rounds/0002/report.json: names another model",
    ),
    "model gone": (
        lambda s: (s / "rounds/0003/model.safetensors").unlink(),
        "0003/model.safetensors: is missing: link",
    ),
    "model replaced": (
        lambda s: (
            (s / "rounds/0003/model.safetensors").unlink(),
            (s / "rounds/0003/model.safetensors").touch(),
        ),
        "rounds/0003/model.safetensors: is not the published model: link it anew",
    ),
    "folder of no round": (
        lambda s: (s / "rounds/0009").mkdir(),
        "rounds/0009: there is no record of its round",
    ),
    "result cut": (
        lambda s: (s / "jobs/round-0003/result.json").write_text("{"),
        "jobs/round-0003: its job or result cannot be read: restore",
    ),
    "job cut": (
        lambda s: (s / "jobs/round-0003/job.json").write_text(""),
        "jobs/round-0003: its job or result",
    ),
    "result gone": (
        lambda s: shutil.rmtree(s / "jobs/round-0003"),
        "jobs/round-0003/result.json: is missing",
    ),
    "result of another model": (
        lambda s: shutil.copy(s / "jobs/round-0002/result.json", s / "jobs/round-0003/result.json"),
        "jobs/round-0003/result.json: is not of the published model",
    ),
    "job of no round": (
        lambda s: (s / "jobs/round-0009").mkdir(),
        "jobs/round-0009: there is no record of its round: remove it",
    ),
    "upload of nobody": (
        lambda s: (s / f"partial/7-{'a' * 64}").touch(),
        f"partial/7-{'a' * 64}: it is no agent's upload: remove it",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_and_named(state_dir: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    damage, expected = DAMAGE[kind]
    damage(state_dir)
    assert main(["check", str(state_dir)]) == 1
    *problems, summary = capsys.readouterr().out.splitlines()
    assert any(expected in line for line in problems), problems
    assert f"{len(problems)} problem" in summary


@pytest.mark.parametrize(("number", "is_fine"), [(3, True), (2, True), (1, False)])
def test_round_after_a_withdrawn_model_starts_from_it_or_from_the_one_before(
    state_dir: Path, capsys: pytest.CaptureFixture[str], number: int, is_fine: bool
) -> None:
    assert main(["models", "withdraw", "3", "--state-dir", str(state_dir)]) == 0
    capsys.readouterr()
    start = digest_of(model_of(number))
    sql(state_dir, f"UPDATE rounds SET initial_weights = '{start}' WHERE number = 4")
    assert main(["check", str(state_dir)]) == (0 if is_fine else 1)
    assert ("does not start from what round 3 left" in capsys.readouterr().out) is not is_fine


@pytest.mark.parametrize(
    "kind", ["published model gone", "contributed data gone", "upload gone", "model gone"]
)
def test_one_damage_is_one_line(state_dir: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    DAMAGE[kind][0](state_dir)
    main(["check", str(state_dir)])
    assert ": 1 problem; " in capsys.readouterr().out


def test_damaged_page_of_the_database_is_found(state_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = state_dir / "ecavg.sqlite3"
    content = bytearray(path.read_bytes())
    with closing(sqlite3.connect(path)) as database:
        (page,) = database.execute(
            "SELECT rootpage FROM sqlite_master WHERE name = 'contributions'"
        ).fetchone()
        (size,) = database.execute("PRAGMA page_size").fetchone()
    content[(page - 1) * size : (page - 1) * size + 8] = b"\xff" * 8
    path.write_bytes(content)
    assert main(["check", str(state_dir)]) == 1
    assert "ecavg.sqlite3: " in capsys.readouterr().out


def test_running_server_is_named(state_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with closing(Store(state_dir)):
        holder = " on ".join((state_dir / "lock").read_text().split())
        assert main(["check", str(state_dir)]) == 2
    assert f"process {holder} uses state directory {state_dir}: stop it first" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/proc/locks").exists(), reason="only Linux tells who shares a lock")
def test_running_check_is_named_to_a_server(state_dir: Path) -> None:
    (state_dir / "lock").write_text("99999999 of-the-last-server\n")
    with (
        unused(StateDir(state_dir)),
        pytest.raises(UsageError, match=rf"process {os.getpid()} \(cloud-server check\) uses"),
    ):
        Store(state_dir)


@pytest.mark.parametrize("name", [".", "nowhere"])
def test_folder_that_is_no_state_directory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert main(["check", str(tmp_path / name)]) == 2
    assert "is no state directory" in capsys.readouterr().err


def test_state_of_a_newer_server_is_left_alone(state_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sql(state_dir, f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    assert main(["check", str(state_dir)]) == 2
    assert "newer cloud-server" in capsys.readouterr().err


def test_help_mentions_the_check(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["cloud-server", "--help"])
    with pytest.raises(SystemExit):
        main()
    assert "cloud-server check STATE" in capsys.readouterr().out
