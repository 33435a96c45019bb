"""What TensorBoard and MLflow are told: read back by their own readers, from runs of world.py."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from ecavg.cloud_server.config import TrackingConfig
from ecavg.cloud_server.store import Store
from ecavg.cloud_server.tracking import facts, thread, tracker
from ecavg.cloud_server.tracking.facts import Facts, RunFacts
from ecavg.cloud_server.tracking.thread import Tracking
from ecavg.common.errors import UsageError
from tests.conftest import need
from tests.unit.states import begin, contribute, digest_of, model_of, publish, run_rounds
from tests.unit.world import REPORT, World, hurry, world


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)
    monkeypatch.setattr(thread, "RETRY_SECONDS", 0.01)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


class PlayedTracker:
    """Keeps what it is told, and fails while it is down."""

    name = "played"

    def __init__(self) -> None:
        self.parts: list[Facts] = []
        self.is_down = False
        self.is_finished = False
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.tried = threading.Event()

    def open(self, run: RunFacts) -> int:
        self._fail()
        return max((part.round for part in self.parts), default=-1)

    def write(self, part: Facts) -> None:
        self._fail()
        if part.order not in [each.order for each in self.parts]:
            self.parts.append(part)

    def finish(self) -> None:
        self.is_finished = True

    def _fail(self) -> None:
        self.tried.set()
        self.may_go_on.wait()
        if self.is_down:
            raise OSError("http://me:secret@tracker is down\nfor good")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with closing(Store(tmp_path / "state")) as store:
        yield store


@pytest.fixture
def played(store: Store) -> Iterator[tuple[PlayedTracker, Tracking]]:
    """With a run of two rounds that are over."""
    run_rounds(store, store.state_dir.path, 2)
    played = PlayedTracker()
    tracking = Tracking([played], store)
    yield played, tracking
    played.may_go_on.set()
    tracking.stop()


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110  it is a thread that changes it
            await asyncio.sleep(0.005)


def orders(played: PlayedTracker) -> list[int]:
    return [part.order for part in played.parts]


async def test_edges_of_a_round_are_told_when_the_next_is_over_or_the_run(
    played: tuple[PlayedTracker, Tracking],
) -> None:
    tracker, tracking = played
    tracking.note_round_over()
    await until(lambda: orders(tracker) == [2, 3, 4])
    await tracking.finish()
    assert orders(tracker) == [2, 3, 4, 5]
    assert tracker.is_finished


async def test_what_a_tracker_missed_while_it_was_down_is_told_later_with_two_log_lines(
    played: tuple[PlayedTracker, Tracking], store: Store
) -> None:
    tracker, tracking = played
    tracker.is_down = True
    with capture_logs() as logs:
        tracking.note_round_over()
        await until(lambda: logs)
        for _ in range(3):
            tracker.tried.clear()
            tracking.note_round_over()
            await until(tracker.tried.is_set)
        tracker.is_down = False
        await until(lambda: len(logs) == 2)
    assert [line["event"] for line in logs] == ["tracker_failing", "tracker_works_again"]
    assert "secret" not in logs[0]["reason"]
    assert "\n" not in logs[0]["reason"]
    assert orders(tracker) == [2, 3, 4]


async def test_tracker_that_never_answers_holds_up_neither_a_round_nor_the_end(
    played: tuple[PlayedTracker, Tracking], monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker, tracking = played
    monkeypatch.setattr(thread, "FINISH_SECONDS", 0.01)
    monkeypatch.setattr(thread, "STOP_SECONDS", 0.01)
    tracker.may_go_on.clear()
    tracking.note_round_over()
    await until(tracker.tried.is_set)
    with capture_logs() as logs:
        async with asyncio.timeout(5):
            await tracking.finish()
            await asyncio.to_thread(tracking.stop)
    assert [line["event"] for line in logs] == ["tracker_left_behind"]


def test_report_is_told_without_agent_ids_unless_they_are_asked_for(store: Store) -> None:
    begin(store, store.state_dir.path)
    contribute(store, 1)
    publish(store, store.state_dir.path, 1)
    report = {"outcome": "published", "agents": [{"agent_id": "edge-1"}], "soup": ["edge-1"], "late": []}
    store.state_dir.report(1).write_text(json.dumps(report), "utf-8")
    without, _ = facts.of_rounds(store, -4, is_run_over=True)
    assert without.report == {"outcome": "published", "num_agents": 1, "num_late": 0}
    with_ids, _ = facts.of_rounds(store, -4, is_run_over=True, with_agent_ids=True)
    assert with_ids.report == report


@pytest.mark.parametrize("key", ["tensorboard", "mlflow"])
def test_missing_package_is_an_error_that_says_what_to_install(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracker, "find_spec", lambda name: None)
    tracker.check_packages(TrackingConfig())
    with pytest.raises(UsageError, match=rf"^tracking\.{key} needs .*pip install 'ecavg\[{key}\]'$"):
        tracker.check_packages(TrackingConfig(**{key: "somewhere"}))


@pytest.mark.parametrize("key", ["tensorboard", "mlflow"])
def test_tracker_brings_no_torch_into_the_serving_process(key: str) -> None:
    need(key, find_spec(key), key)
    code = f"import sys, ecavg.cloud_server.tracking.to_{key}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---------------------------------------------------------------------- their own readers


class TensorBoardReader:
    """TensorBoard's own reader."""

    key = "tensorboard"

    def __init__(self, folder: Path) -> None:
        self.where = self.folder = folder

    def points(self) -> dict[str, list[tuple[int, float]]]:
        """Return step and value of each point, by tag."""
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        (folder,) = self.folder.iterdir()
        reader = EventAccumulator(str(folder), {"scalars": 0, "tensors": 0})
        reader.Reload()
        # Its reader hands values over as tensors of one number.
        return {
            tag: [(each.step, round(each.value, 6)) for each in reader.Scalars(tag)]
            for tag in reader.Tags()["scalars"]
        }


class MLflowReader:
    """MLflow's own client."""

    key = "mlflow"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.where = f"file://{folder}"

    def run(self) -> Any:
        experiment = self.client.get_experiment_by_name("ecavg")
        (run,) = self.client.search_runs([experiment.experiment_id])
        return run

    @property
    def client(self) -> Any:
        from mlflow.tracking import MlflowClient

        return MlflowClient(tracking_uri=self.where, registry_uri=self.where)

    def points(self) -> dict[str, list[tuple[int, float]]]:
        run = self.run()
        return {
            name: sorted(
                (point.step, point.value) for point in self.client.get_metric_history(run.info.run_id, name)
            )
            for name in run.data.metrics
        }


@pytest.fixture(params=[TensorBoardReader, MLflowReader], ids=lambda kind: kind.key)
def reader(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    name = {"tensorboard": "tensorboard", "mlflow": "mlflow-skinny"}[request.param.key]
    need(request.param.key, find_spec(request.param.key), name)
    return request.param(tmp_path / "tracked")


async def a_round(here: World, number: int) -> None:
    """Have two agents do a round, and report on its model."""
    await here.until(lambda: here.standing.state_for().round == number)
    for name in ("a", "b"):
        await here.contribute(name, number)
    await here.until(lambda: here.store.round(number).phase == "published")
    for name, accuracy in (("a", 0.5), ("b", 0.75)):
        row = replace(REPORT, agent_id=name, score_local=0.4, score_before=0.4, score_after=accuracy)
        await here.desk.report(name, number, row)


async def test_their_own_reader_finds_each_point_once_though_the_server_starts_again(
    reader: Any, tmp_path: Path
) -> None:
    keys = {"min_agents": 2, "tracking": TrackingConfig(**{reader.key: reader.where})}
    async with world(tmp_path / "state", **keys) as here:
        await a_round(here, 1)
        await here.until((tmp_path / "tracked").exists)
    # This life of the server ended between two rounds, wherever its tracker was.
    async with world(tmp_path / "state", rounds=3, **keys) as here:
        await a_round(here, 2)
        await a_round(here, 3)
        await asyncio.wait_for(here.running, 20)
    points = reader.points()
    assert points["accuracy/candidate/average"] == points["accuracy/start"] == [(1, 0.5), (2, 0.5), (3, 0.5)]
    assert points["accuracy/edges_after"][:2] == [(1, 0.625), (2, 0.625)]
    assert points["agents/contributed"] == [(1, 2.0), (2, 2.0), (3, 2.0)]
    assert points["bytes/model"][0][1] > 0
    steps = {tuple(step for step, _ in each) for each in points.values()}
    assert steps <= {(1, 2, 3), (1, 2)}


async def test_mlflow_has_parameters_report_model_and_a_version_with_provenance_for_each_round(
    tmp_path: Path,
) -> None:
    need("mlflow", find_spec("mlflow"), "mlflow-skinny")
    reader = MLflowReader(tmp_path / "tracked")
    tracking = TrackingConfig(mlflow=reader.where)
    async with world(tmp_path / "state", min_agents=2, rounds=2, tracking=tracking) as here:
        await a_round(here, 1)
        await a_round(here, 2)
        await asyncio.wait_for(here.running, 20)
    run = reader.run()
    assert run.info.status == "FINISHED"
    assert run.data.params["run.model"] == "mlp"
    assert run.data.params["run.pretrain.epochs"] == "5"
    versions = reader.client.search_model_versions("name = 'mlp-digits'")
    assert sorted(version.tags["round"] for version in versions) == ["1", "2"]
    for version in versions:
        assert version.tags["num_agents"] == "2"
        folder = Path(reader.client.download_artifacts(run.info.run_id, f"rounds/000{version.tags['round']}"))
        assert version.source.endswith(f"/artifacts/rounds/000{version.tags['round']}")
        assert digest_of((folder / "model.safetensors").read_bytes()) == version.tags["sha256"]
        report = json.loads((folder / "report.json").read_text("utf-8"))
        assert report["num_agents"] == 2
        assert "agents" not in report


def test_mlflow_has_the_rest_of_a_model_of_which_a_part_travels(store: Store, tmp_path: Path) -> None:
    need("mlflow", find_spec("mlflow"), "mlflow-skinny")
    run_rounds(store, store.state_dir.path, 1)
    store.state_dir.rest(1).write_bytes(b"what does not travel")
    reader = MLflowReader(tmp_path / "tracked")
    (mlflow,) = tracker.trackers_of(TrackingConfig(mlflow=reader.where))
    mlflow.open(facts.of_run(store))
    for part in facts.of_rounds(store, -4, is_run_over=True):
        mlflow.write(part)
    folder = Path(reader.client.download_artifacts(reader.run().info.run_id, "rounds/0001"))
    assert (folder / "rest.safetensors").read_bytes() == b"what does not travel"
    assert (folder / "model.safetensors").read_bytes() == model_of(1)


async def test_tracker_that_is_down_during_a_round_has_it_when_it_is_back(
    reader: Any, tmp_path: Path
) -> None:
    tracked = tmp_path / "tracked"
    tracked.write_text("in the way")
    keys = {"min_agents": 2, "tracking": TrackingConfig(**{reader.key: reader.where})}
    # It is tried, and fails, as soon as the server starts.
    with capture_logs() as logs:
        async with world(tmp_path / "state", rounds=2, **keys) as here:
            await a_round(here, 1)
            await here.until(lambda: any(line["event"] == "tracker_failing" for line in logs))
            tracked.unlink()
            await here.until(lambda: any(line["event"] == "tracker_works_again" for line in logs))
            await a_round(here, 2)
            await asyncio.wait_for(here.running, 20)
    assert [step for step, _ in reader.points()["accuracy/start"]] == [1, 2]


def test_record_that_was_cut_off_by_a_kill_is_written_again(store: Store, tmp_path: Path) -> None:
    need("tensorboard", find_spec("tensorboard"), "tensorboard")
    from ecavg.cloud_server.tracking.to_tensorboard import TensorBoard

    run_rounds(store, store.state_dir.path, 2)
    parts = list(facts.of_rounds(store, -4, is_run_over=True))
    board = TensorBoard(tmp_path / "tracked")
    assert board.open(facts.of_run(store)) == -1
    for part in parts:
        board.write(part)
    board.finish()
    reader = TensorBoardReader(tmp_path / "tracked")
    whole = reader.points()
    (file,) = tmp_path.glob("tracked/*/events*")
    # The last part has nothing to say here: this cuts the record of round 2.
    os.truncate(file, file.stat().st_size - 3)
    again = TensorBoard(tmp_path / "tracked")
    assert again.open(facts.of_run(store)) == 1
    for part in parts:
        again.write(part)
    again.finish()
    assert reader.points() == whole


def test_round_is_told_once_its_report_is_written(store: Store) -> None:
    run_rounds(store, store.state_dir.path, 2)
    report = store.state_dir.report(2)
    written = report.read_bytes()
    report.unlink()
    assert [part.order for part in facts.of_rounds(store, -4, is_run_over=False)] == [2]
    report.write_bytes(written)
    assert [part.order for part in facts.of_rounds(store, -4, is_run_over=False)] == [2, 3, 4]


def test_model_that_has_been_given_up_is_left_out(store: Store) -> None:
    run_rounds(store, store.state_dir.path, 1)
    assert digest_of(model_of(1)) == store.round(1).published_digest
    shutil.rmtree(store.state_dir.round(1))
    part, _ = facts.of_rounds(store, -4, is_run_over=True)
    assert part.model is None
    assert part.digest == store.round(1).published_digest
