"""What forgetting removes and keeps, and that it may die anywhere; the state is written out by hand."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from ecavg.cloud_server import jobs, records
from ecavg.cloud_server.commands import check
from ecavg.cloud_server.contribution import Contribution, Decision
from ecavg.cloud_server.disk import opened
from ecavg.cloud_server.disk.lock import InUseError
from ecavg.cloud_server.disk.tables import ReportRow, SelectionRow
from ecavg.cloud_server.jobs import JobDirectory
from ecavg.cloud_server.store import Store
from ecavg.cloud_server.upkeep import forgetting, forgotten, provenance
from ecavg.common.config import RunConfig
from ecavg.common.errors import NotFoundError, UsageError
from ecavg.common.run_state import Outcome
from tests.unit.states import (
    AGENT,
    INITIAL,
    SHARD,
    begin,
    blobs,
    commit_upload,
    contribute,
    digest_of,
    encoded_of,
    local_of,
    model_of,
    publish,
    run_job,
)
from tests.unit.test_retention import Killed, dying_at

OTHER = "edge-2"
SECRET = b"what only the other has"
NOW = 100.0
CHOSEN = {"drawn": [AGENT, OTHER], "not_ready": [OTHER]}


def upload(store: Store, agent_id: str, content: bytes, kind: str) -> str:
    digest = digest_of(content)
    store.partial_path(agent_id, digest).write_bytes(content)
    commit_upload(store, agent_id, digest, kind, 1.0)
    return digest


def contribute_other(store: Store, number: int, outcome: Outcome = Outcome.ACCEPTED) -> None:
    """Have the other contribute weights, a shard of its own, and the one that AGENT has as well."""
    weights = upload(store, OTHER, f"weights of the other {number}".encode(), "weights")
    shards = tuple(upload(store, OTHER, content, "data") for content in (SECRET, SHARD))
    contribution = Contribution(OTHER, weights, shards, 10, score_local=0.9)
    is_accepted = outcome is Outcome.ACCEPTED
    decision = Decision(OTHER, outcome, number + 0.3, contribution if is_accepted else None)
    store.record_contribution(number, decision)


@pytest.fixture
def store(state_dir: Path) -> Iterator[Store]:
    with closing(Store(state_dir)) as store:
        make(store, state_dir)
        yield store


def make(store: Store, state_dir: Path) -> None:
    """Make two published rounds, the first with both agents, and a third that the trainer has worked on."""
    begin(store, state_dir)
    assert store.join(OTHER, 0.6) == 2
    store.set_class_names(("cat", "dog"), OTHER)
    for number in (1, 2):
        records.record_selection(store, number, SelectionRow(frozenset({AGENT}), frozenset({OTHER})))
        contribute(store, number)
        contribute_other(store, number, Outcome.ACCEPTED if number == 1 else Outcome.LATE)
        publish(store, state_dir, number)
        store.record_report(number, ReportRow(OTHER, 0.5, 0.5, 0.6, 10, applied=True, reason="", at=1.0))
        path = state_dir / f"rounds/{number:04d}/report.json"
        report_json = json.loads(path.read_text("utf-8"))
        report_json |= {"agents": [{"agent_id": AGENT}, {"agent_id": OTHER}], "soup": [OTHER, AGENT]}
        path.write_text(
            json.dumps(report_json | {"late": [OTHER], "rejected": [{"agent_id": OTHER}]} | CHOSEN)
        )
        store.open_round(number + 1, digest_of(model_of(number)), number + 1)
    contribute(store, 3)
    contribute_other(store, 3)
    store.partial_path(OTHER, "a" * 64).write_bytes(b"begun by the other")
    store.partial_path(AGENT, "b" * 64).write_bytes(b"begun")
    store.set_phase(3, "aggregating", 3.5)
    directory = run_job(state_dir, 3, digest_of(model_of(2)))
    work = directory.read_job().model_copy(
        update={"contributions": tuple(Contribution(name, "0" * 64, (), 1) for name in (AGENT, OTHER))}
    )
    directory.write_job(work)
    directory.write_result(jobs.Result(weights=jobs.WeightsFile(sha256=digest_of(model_of(3)), bytes=1)))
    # This model was made of the other's weights, too, and is not published yet.
    store.blobs.adopt(directory.weights_path, digest_of(model_of(3)))


def forget(store: Store, state_dir: Path, agent_id: str = OTHER) -> str:
    pseudonym = forgotten.ask_to_forget(store, agent_id, NOW)
    (row,) = (row for row in forgotten.forgettings(store) if row.pseudonym == pseudonym)
    if row.done_at is None:
        forgetting.forget(store, row, NOW)
    return pseudonym


def is_healthy(state_dir: Path) -> bool:
    return check.main([str(state_dir)]) == 0


def expected_blobs() -> set[str]:
    contents = [INITIAL, SHARD, local_of(1), local_of(2), local_of(3)]
    contents += [content for number in (1, 2) for content in (model_of(number), encoded_of(number))]
    return set(map(digest_of, contents))


def check_forgotten(state_dir: Path, pseudonym: str) -> None:
    assert blobs(state_dir) == expected_blobs()
    assert [path.name for path in (state_dir / "partial").iterdir()] == ["1-" + "b" * 64]
    assert not (state_dir / "jobs/round-0003").exists()
    for path in state_dir.rglob("*"):
        assert not path.is_file() or OTHER.encode() not in path.read_bytes(), path
    gone, *rounds = written(state_dir)
    assert [line["round"] for line in rounds] == [1, 2]
    ids = [[item["agent_id"] for item in line["contributions"]] for line in rounds]
    assert ids == [[AGENT, pseudonym], [AGENT]]
    assert rounds[0]["contributions"][1]["shards"] == [digest_of(SECRET), digest_of(SHARD)]
    models = [{"round": 1, "model": digest_of(model_of(1))}]
    assert gone == {"forgotten": pseudonym, "at": NOW, "models": models}
    assert is_healthy(state_dir)


def test_nothing_of_a_forgotten_agent_is_left_and_all_of_the_others(store: Store, state_dir: Path) -> None:
    pseudonym = forget(store, state_dir)
    store.close()
    check_forgotten(state_dir, pseudonym)
    report = json.loads((state_dir / "rounds/0001/report.json").read_text("utf-8"))
    assert report["agents"] == [{"agent_id": AGENT}]
    assert (report["soup"], report["late"], report["rejected"]) == ([AGENT], [], [])
    assert (report["drawn"], report["not_ready"]) == ([AGENT], [])


def test_the_models_that_had_used_its_data_are_told(store: Store, state_dir: Path) -> None:
    forget(store, state_dir)
    (row,) = forgotten.forgettings(store)
    assert row.models == ((1, digest_of(model_of(1))),)
    assert (row.agent_id, row.slot, row.done_at) == (None, None, NOW)


def test_a_model_that_has_nothing_of_it_had_not_used_its_data(tmp_path: Path) -> None:
    with closing(Store(tmp_path)) as store:
        begin(store, tmp_path)
        store.join(OTHER, 0.6)
        contribute(store, 1)
        contribute_other(store, 1)
        why = {OTHER: ("quarantined", "its labels contradict those of the others")}
        store.set_phase(1, "published", 1.9, published_digest=digest_of(INITIAL), left_out=why)
        entry = json.loads(next(provenance.lines(store)))
        assert [item["agent_id"] for item in entry["contributions"]] == [AGENT]
        pseudonym = forget(store, tmp_path)
        (row,) = (row for row in forgotten.forgettings(store) if row.pseudonym == pseudonym)
        assert row.models == ()


def test_round_goes_on_without_it(store: Store, state_dir: Path) -> None:
    forget(store, state_dir)
    assert [row.agent_id for row in store.contributions(3)] == [AGENT]
    assert store.round(3).phase == "aggregating"


def test_agent_that_nobody_knows_cannot_be_forgotten(store: Store, state_dir: Path) -> None:
    with pytest.raises(NotFoundError):
        forgotten.ask_to_forget(store, "nobody", NOW)
    forget(store, state_dir)
    with pytest.raises(NotFoundError):
        forgotten.ask_to_forget(store, OTHER, NOW)


def test_asking_twice_is_asking_once(store: Store) -> None:
    assert forgotten.ask_to_forget(store, OTHER, NOW) == forgotten.ask_to_forget(store, OTHER, NOW + 1)


def test_agent_whose_weights_were_published_as_they_are_leaves_them(store: Store, state_dir: Path) -> None:
    """Keep a blob that is the model as well, as where the best agent's weights are published."""
    (weights,) = (
        each.contribution.weights_digest for each in store.contributions(1) if each.agent_id == OTHER
    )
    store.set_phase(1, "published", 2.0, published_digest=weights)
    (state_dir / "provenance.jsonl").unlink()
    forget(store, state_dir)
    assert weights in blobs(state_dir)
    assert digest_of(SECRET) not in blobs(state_dir)


def test_both_can_be_forgotten(store: Store, state_dir: Path) -> None:
    forget(store, state_dir)
    forget(store, state_dir, AGENT)
    assert store.agents() == []
    assert blobs(state_dir) == expected_blobs() - set(map(digest_of, [SHARD, *map(local_of, (1, 2, 3))]))
    store.close()
    assert is_healthy(state_dir)


def test_job_that_does_not_count_it_is_left_alone(store: Store, state_dir: Path) -> None:
    directory = JobDirectory(state_dir / "jobs/round-0003")
    job = directory.read_job()
    directory.write_job(job.model_copy(update={"contributions": job.contributions[:1]}))
    directory.write_result(jobs.Result(weights=jobs.WeightsFile(sha256=digest_of(model_of(3)), bytes=1)))
    forget(store, state_dir)
    assert directory.read_result()
    assert blobs(state_dir) == expected_blobs() | {digest_of(model_of(3))}


@pytest.mark.parametrize("agent_id", ["round", "outcome", "weights", "aligned", "mlp", "published"])
def test_agent_named_like_something_else_takes_nothing_else_with_it(tmp_path: Path, agent_id: str) -> None:
    path = tmp_path / "report.json"
    content = {
        "round": 1,
        "outcome": "published",
        "published": "start",
        "weights": {"sha256": "ab"},
        "candidates": {"aligned": 0.5},
        "run": {"candidates": ["aligned"], "model": "mlp"},
        "soup": [agent_id],
        "agents": [{"agent_id": agent_id}],
    }
    path.write_text(json.dumps(content))
    forgetting._strike_out(agent_id, path)
    assert json.loads(path.read_text()) == content | {"soup": [], "agents": []}


def test_guest_asks_while_another_has_the_state(store: Store, state_dir: Path) -> None:
    with pytest.raises(InUseError, match="uses state directory"):
        Store(state_dir)
    with closing(Store(state_dir, as_guest=True)) as guest:
        pseudonym = forgotten.ask_to_forget(guest, OTHER, NOW)
    assert [row.pseudonym for row in forgotten.forgettings(store)] == [pseudonym]


def test_guest_leaves_the_state_of_a_server_of_another_version_as_it_is(
    store: Store, state_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opened, "MIGRATIONS", (*opened.MIGRATIONS, "CREATE TABLE new (a)"))
    with pytest.raises(UsageError, match=r"a server of another version uses .*: stop it first"):
        Store(state_dir, as_guest=True)


def test_damaged_report_keeps_nobody_from_being_forgotten(store: Store, state_dir: Path) -> None:
    for content in ("not JSON", "[]", "3"):
        (state_dir / "rounds/0001/report.json").write_text(content, "utf-8")
        forgetting._strike_out(OTHER, state_dir / "rounds/0001/report.json")
    forget(store, state_dir)
    assert [row.agent_id for row in store.agents()] == [AGENT]


def test_check_tells_of_who_is_to_be_forgotten(
    store: Store, state_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    forgotten.ask_to_forget(store, OTHER, NOW)
    store.close()
    assert not is_healthy(state_dir)
    assert "an agent is to be forgotten, and is not yet: start the server" in capsys.readouterr().out


def test_forgetting_may_die_at_any_step(tmp_path: Path) -> None:
    template = tmp_path / "template"
    with closing(Store(template)) as store:
        make(store, template)
        forgotten.ask_to_forget(store, OTHER, NOW)
    for steps in range(1, 1000):
        state_dir = tmp_path / str(steps)
        shutil.copytree(template, state_dir)
        with closing(Store(state_dir)) as store, pytest.MonkeyPatch.context() as monkeypatch:
            dying_at(
                monkeypatch,
                steps,
                [
                    (Path, "unlink"),
                    (Path, "replace"),
                    (os, "replace"),
                    (shutil, "rmtree"),
                    (jobs, "sync"),
                    (forgotten, "forget_records"),
                    (forgotten, "note_forgotten"),
                ],
            )
            try:
                forget(store, state_dir)
                break
            except Killed:
                pass
        assert not jobs.pending_jobs(state_dir / "jobs")
        with closing(Store(state_dir)) as store:
            (row,) = forgotten.forgettings(store)
            if row.done_at is None:
                forgetting.forget(store, row, NOW)
        check_forgotten(state_dir, row.pseudonym)
    assert 20 < steps < 1000


# Provenance


def written(state_dir: Path) -> list[dict[str, Any]]:
    lines = (state_dir / "provenance.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_line_half_written_is_written_again(store: Store, state_dir: Path) -> None:
    path = state_dir / "provenance.jsonl"
    whole = path.read_bytes()
    for size in range(len(whole)):
        for note in (provenance.write, provenance.add_last_round):
            path.write_bytes(whole[:size])
            note(store)
            assert path.read_bytes() == whole


@pytest.mark.parametrize("is_forgotten", [False, True])
def test_line_of_a_round_is_added_at_the_end(store: Store, state_dir: Path, is_forgotten: bool) -> None:
    if is_forgotten:
        forget(store, state_dir)
    path = state_dir / "provenance.jsonl"
    before, file = path.read_bytes(), path.stat().st_ino
    publish(store, state_dir, 3)
    whole = path.read_bytes()
    assert whole.startswith(before)
    assert path.stat().st_ino == file
    provenance.write(store)
    assert path.read_bytes() == whole
    assert [line["round"] for line in written(state_dir) if "round" in line] == [1, 2, 3]


def test_file_that_says_all_is_left_alone(store: Store, state_dir: Path) -> None:
    path = state_dir / "provenance.jsonl"
    file = path.stat()
    provenance.write(store)
    provenance.add_last_round(store)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (file.st_ino, file.st_mtime_ns)


def test_end_of_the_file_is_all_that_a_round_reads(store: Store, state_dir: Path) -> None:
    path = state_dir / "provenance.jsonl"
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"nobody has read this\n" + first)
    provenance.add_last_round(store)
    assert path.read_bytes() == b"nobody has read this\n" + first + second
    provenance.write(store)
    assert path.read_bytes() == first + second


def test_round_that_failed_adds_nothing(store: Store, state_dir: Path) -> None:
    before = (state_dir / "provenance.jsonl").read_bytes()
    store.set_phase(3, "failed", 4.0, failure="it went wrong")
    provenance.add_last_round(store)
    assert (state_dir / "provenance.jsonl").read_bytes() == before


def test_run_that_has_published_nothing_has_no_file(tmp_path: Path) -> None:
    with closing(Store(tmp_path)) as store:
        begin(store, tmp_path)
        provenance.write(store)
        provenance.add_last_round(store)
    assert not (tmp_path / "provenance.jsonl").exists()


def test_lost_provenance_is_written_anew_with_who_was_forgotten(store: Store, state_dir: Path) -> None:
    pseudonym = forget(store, state_dir)
    path = state_dir / "provenance.jsonl"
    before = path.read_bytes()
    path.unlink()
    provenance.write(store)
    assert path.read_bytes() == before
    store.close()
    check_forgotten(state_dir, pseudonym)


def test_provenance_is_replaced_whole_or_not_at_all(
    store: Store, state_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = state_dir / "provenance.jsonl"
    path.write_bytes(b"damaged\n")
    with monkeypatch.context() as dying:
        dying_at(dying, 1, [(Path, "replace")])
        with pytest.raises(Killed):
            provenance.write(store)
    assert path.read_bytes() == b"damaged\n"


DAMAGE = [b"not JSON\n", b"[1]\n", b"\xff\n", b"\n", b"no end"]


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("is_first", [False, True])
def test_damaged_provenance_is_told_of_and_written_anew(
    store: Store, state_dir: Path, damage: bytes, is_first: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    path = state_dir / "provenance.jsonl"
    whole = path.read_bytes()
    path.write_bytes(damage + whole if is_first else whole + damage)
    store.close()
    assert not is_healthy(state_dir)
    expected = "provenance.jsonl: does not say what the records say of the published models: start the server"
    assert expected in capsys.readouterr().out
    with closing(Store(state_dir)) as store:
        provenance.write(store)
    assert path.read_bytes() == whole
    assert is_healthy(state_dir)


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_provenance_keeps_nobody_from_being_forgotten(
    store: Store, state_dir: Path, damage: bytes
) -> None:
    (state_dir / "provenance.jsonl").write_bytes(damage)
    pseudonym = forget(store, state_dir)
    store.close()
    check_forgotten(state_dir, pseudonym)


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: [lines[1]],
        lambda lines: [lines[0], lines[0], lines[1]],
        lambda lines: [lines[0].replace(digest_of(SECRET), digest_of(SHARD)), lines[1]],
        lambda lines: [lines[0].replace(OTHER, "edge-3"), lines[1]],
        lambda lines: [],
    ],
)
def test_check_finds_what_provenance_says_wrong(store: Store, state_dir: Path, change) -> None:  # type: ignore[no-untyped-def]
    path = state_dir / "provenance.jsonl"
    path.write_text("".join(change(path.read_text("utf-8").splitlines(keepends=True))))
    store.close()
    assert not is_healthy(state_dir)


def test_publication_that_a_crash_kept_from_the_file_is_no_problem(store: Store, state_dir: Path) -> None:
    path = state_dir / "provenance.jsonl"
    first, second = path.read_bytes().splitlines(keepends=True)
    store.close()
    for half in (b"", second[:20]):
        path.write_bytes(first + half)
        assert is_healthy(state_dir)


def test_who_was_forgotten_by_an_older_program_is_known_without_digests(
    state_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as older:
        older.setattr(opened, "MIGRATIONS", opened.MIGRATIONS[:6])
        with closing(Store(state_dir)) as store:
            made = state_dir / "jobs/made"
            made.write_bytes(INITIAL)
            store.blobs.adopt(made, digest_of(INITIAL))
            store.join(AGENT, 0.5)
            with store.transaction() as database:
                run = RunConfig().model_dump_json()
                database.execute("INSERT INTO run VALUES (1, 'run-1', ?, 0.0)", (run,))
                database.execute(
                    "INSERT INTO rounds (number, phase, initial_weights, opened_at)"
                    " VALUES (1, 'collecting', ?, 0.0)",
                    (digest_of(INITIAL),),
                )
            store.set_phase(1, "published", 2.0, published_digest=digest_of(INITIAL))
            with store.transaction() as database:
                models = json.dumps([[1, digest_of(INITIAL)]])
                database.execute("INSERT INTO forgettings VALUES ('x', NULL, NULL, ?, 3.0, 4.0)", (models,))
    with closing(Store(state_dir)) as store:
        assert forgotten.forgetting_of(store, "x").models == ((1, digest_of(INITIAL)),)
        provenance.write(store)
    models = [{"round": 1, "model": digest_of(INITIAL)}]
    contribution = {"agent_id": "x", "weights": "", "shards": [], "num_examples": 0}
    assert written(state_dir) == [
        {"forgotten": "x", "at": 3.0, "models": models},
        {"round": 1, "model": digest_of(INITIAL), "at": 2.0, "contributions": [contribution]},
    ]
