"""The opening of a state directory: its lock, its database, and what older and newer programs have left.

Run as a module, this is the process that holds the lock; see its end.
"""

import errno
import os
import socket
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ecavg.cloud_server.contribution import Contribution, Decision
from ecavg.cloud_server.disk import opened
from ecavg.cloud_server.store import Store
from ecavg.common.errors import UsageError
from ecavg.common.run_state import Outcome
from tests.processes import ROOT
from tests.unit.test_store import CONTRIBUTION, REPORT, populate


@pytest.fixture
def run_store(store: Store) -> Store:
    """Return a store with an open round, and the agents "a" and "b"."""
    populate(store)
    return store


def test_second_server_is_refused_and_told_who_is_there(state_dir):
    with subprocess.Popen(
        [sys.executable, "-m", __name__, state_dir],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(UsageError, match=f"process {holder.pid} on {socket.gethostname()} uses"):
            Store(state_dir)
        holder.kill()
    Store(state_dir).close()


def test_lock_names_its_holder_after_a_longer_name_was_there(state_dir):
    state_dir.mkdir()
    (state_dir / "lock").write_text("99999999 a-host-with-a-very-long-name\n")
    with closing(Store(state_dir)):
        assert (state_dir / "lock").read_text() == f"{os.getpid()} {socket.gethostname()}\n"


def test_close_twice_is_harmless(store):
    store.close()
    store.close()


def test_state_directory_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for state_dir in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UsageError, match="--state-dir"):
            Store(state_dir)


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_state_directory_that_is_not_writable_is_refused(state_dir, monkeypatch, number):
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(UsageError, match=os.strerror(number)):
        Store(state_dir)


def test_file_that_is_no_database_is_refused_and_the_lock_given_back(state_dir):
    state_dir.mkdir()
    (state_dir / "ecavg.sqlite3").write_bytes(b"not a database" * 100)
    with pytest.raises(UsageError, match="not a database"):
        Store(state_dir)
    (state_dir / "ecavg.sqlite3").unlink()
    Store(state_dir).close()


def test_database_of_a_newer_program_is_refused(state_dir):
    Store(state_dir).close()
    with closing(sqlite3.connect(state_dir / "ecavg.sqlite3")) as database:
        database.execute("PRAGMA user_version = 99")
    with pytest.raises(UsageError, match="schema version 99"):
        Store(state_dir)


def test_database_of_an_older_program_is_upgraded_with_its_records(run_store, state_dir, monkeypatch):
    run_store.close()
    upgrade = "ALTER TABLE agents ADD COLUMN colour TEXT DEFAULT 'blue'; UPDATE agents SET slot = slot + 100"
    monkeypatch.setattr(opened, "MIGRATIONS", (*opened.MIGRATIONS, upgrade))
    # The upgrade is applied once.
    for _ in range(2):
        with closing(Store(state_dir)) as upgraded:
            assert [row.slot for row in upgraded.agents()] == [101, 102]


@pytest.fixture
def left_by_older_program(state_dir, monkeypatch):
    """Return what leaves a database of so many migrations, in which a statement has been executed."""

    def left_by_older_program(num_migrations: int, statement: str) -> None:
        with monkeypatch.context() as older:
            older.setattr(opened, "MIGRATIONS", opened.MIGRATIONS[:num_migrations])
            with closing(Store(state_dir)) as store, store.transaction() as database:
                database.execute(
                    "INSERT INTO run (run_id, config_json, created_at) VALUES ('run-1', '{}', 10)"
                )
                database.execute(
                    "INSERT INTO rounds (number, phase, initial_weights, opened_at)"
                    " VALUES (1, 'collecting', ?, 10)",
                    ("0" * 64,),
                )
                database.execute("INSERT INTO agents VALUES ('a', 1, 11), ('b', 2, 11)")
        with closing(sqlite3.connect(state_dir / "ecavg.sqlite3")) as database, database:
            database.execute(statement)

    return left_by_older_program


def test_contributions_of_an_older_program_started_from_nobody_knows_what(state_dir, left_by_older_program):
    left_by_older_program(
        2, "INSERT INTO contributions VALUES (1, 'a', 'accepted', 'd', '[\"s\"]', 600, 0.5, '', '', 12.5)"
    )
    with closing(Store(state_dir)) as upgraded:
        known = Decision("a", Outcome.ACCEPTED, 12.5, Contribution("a", "d", ("s",), 600, None))
        assert upgraded.contributions(1) == [known]
        upgraded.record_contribution(1, CONTRIBUTION)
        assert upgraded.contributions(1) == [CONTRIBUTION]


def test_reports_of_an_older_program_tell_of_no_adaptation(state_dir, left_by_older_program):
    left_by_older_program(3, "INSERT INTO reports VALUES (1, 'a', 0.91, NULL, 0.96, 120, 1, '', 99.5)")
    with closing(Store(state_dir)) as upgraded:
        assert upgraded.reports(1) == [replace(REPORT, score_adapted=None)]
        upgraded.record_report(1, REPORT)
        assert upgraded.reports(1) == [REPORT]


def test_upgrade_that_fails_changes_nothing(run_store, state_dir, monkeypatch):
    run_store.close()
    with monkeypatch.context() as newer:
        upgrade = "UPDATE agents SET slot = slot + 100; UPDATE nowhere SET slot = 1"
        newer.setattr(opened, "MIGRATIONS", (*opened.MIGRATIONS, upgrade))
        with pytest.raises(UsageError, match="nowhere"):
            Store(state_dir)
    with closing(Store(state_dir)) as store:
        assert [row.slot for row in store.agents()] == [1, 2]


# The process that holds the lock


if __name__ == "__main__":
    with closing(Store(Path(sys.argv[1]))):
        print("held", flush=True)
        sys.stdin.read()
