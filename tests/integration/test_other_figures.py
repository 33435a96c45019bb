"""A real run of a regression, as its operator sees it: page, terminal, metrics and a tracker."""

import json
import re
import urllib.request
from importlib.util import find_spec
from pathlib import Path

from tests.conftest import need
from tests.integration.test_round import QUICK
from tests.integration.test_status import status
from tests.processes import Cluster, until
from tests.unit.test_tracking import TensorBoardReader


def fetched(cluster: Cluster, path: str) -> bytes:
    with urllib.request.urlopen(f"http://127.0.0.1:{cluster.http_port}{path}") as reply:
        content: bytes = reply.read()
        return content


def test_regression_is_seen_by_its_figure_everywhere(cluster: Cluster, tmp_path: Path) -> None:
    need("tensorboard", find_spec("tensorboard"), "tensorboard")
    board = TensorBoardReader(tmp_path / "board")
    tracking = ("--set", f"tracking.tensorboard={board.where}")
    server = cluster.server(
        "--preset", "diabetes-mlp", "--min-agents", 1, "--rounds", 0, *QUICK, *tracking
    )  # fmt: skip
    agent = cluster.agent("edge-1", "--partition", "1/2")
    until((cluster.state_dir / "rounds/0002/report.json").exists, server)
    report = cluster.report(1)
    scores = {"published": report["score_published"], "start": report["candidates"][report["start"]]}
    assert json.dumps(f"local R² {report['agents'][0]['score_local']:.4f}")[1:-1] in agent.output
    metrics = fetched(cluster, "/metrics").decode()
    assert 'ecavg_server_score{stage="published"}' in metrics
    assert "ecavg_server_accuracy_ratio{" not in metrics
    shown = json.loads(fetched(cluster, "/api/status"))
    assert shown["metric"] == report["metric"] == "R²"
    assert shown["rounds"][0]["score_published"] == scores["published"]
    past = json.loads(fetched(cluster, "/api/history"))["rounds"][0]
    assert {name: past[name] for name in scores} == scores
    terminal = status(tmp_path, "--server-url", f"http://127.0.0.1:{cluster.http_port}")
    assert terminal.wait() == 0
    assert re.search(r"^Global model of round \d+: R² -?\d+\.\d{3} at the start", terminal.output, re.M)
    until(lambda: any(board.folder.glob("*/*")) and "score/published" in board.points(), server)
    told = board.points()
    assert {name: told[f"score/{name}"][0] for name in scores} == {
        name: (1, round(score, 6)) for name, score in scores.items()
    }
