"""A real server that is killed between two rounds, and what its trackers have in the end."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.conftest import need
from tests.integration.test_round import QUICK
from tests.processes import Cluster, Command, until
from tests.unit.test_tracking import MLflowReader, TensorBoardReader


@pytest.mark.soak
def test_server_that_is_killed_between_rounds_leaves_no_point_out_and_none_twice(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("tensorboard", "mlflow"):
        need(module, find_spec(module), module)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    board, flow = TensorBoardReader(tmp_path / "board"), MLflowReader(tmp_path / "flow")
    where = ("--set", f"tracking.tensorboard={board.where}", "--set", f"tracking.mlflow={flow.where}")
    args = ("--min-agents", 1, "--rounds", 3, *QUICK, *where)
    server = cluster.server(*args)
    agent = cluster.agent("edge-1", "--partition", "1/1")
    until((cluster.state_dir / "rounds/0001/report.json").exists, server)
    server.kill()
    server = cluster.server(*args)
    assert agent.wait() == 0
    assert server.wait() == 0
    assert "tracker_failing" not in server.output
    for points in (board.points(), flow.points()):
        for name in ("accuracy/published", "accuracy/edges_after", "loss/fine_tune", "seconds/fine_tune"):
            assert [step for step, _ in points[name]] == [1, 2, 3], name
    versions = flow.client.search_model_versions("name = 'mlp-digits'")
    expected = {str(number): cluster.report(number)["weights"]["sha256"] for number in (1, 2, 3)}
    assert {version.tags["round"]: version.tags["sha256"] for version in versions} == expected
    assert len(versions) == 3


def test_server_without_the_package_says_in_one_line_what_to_install(
    tmp_path: Path,
) -> None:
    # A module that cannot be found stands for one that is not installed.
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u; found = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'mlflow' else found(name, *rest)\n"
    )
    env = {"PYTHONPATH": str(tmp_path)}
    server = Command(
        "ecavg.cloud_server", "--set", "tracking.mlflow=http://127.0.0.1:9", folder=tmp_path, env=env
    )
    assert server.wait() == 2
    assert server.output == (
        "cloud-server: tracking.mlflow needs another package: pip install 'ecavg[mlflow]'\n"
    )
