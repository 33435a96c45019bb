"""What examples/ holds, run as its README says."""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ecavg.common.config import TrainingConfig
from tests.conftest import need
from tests.processes import ROOT, Cluster, Command

EXAMPLES = ROOT / "examples"


def write_letters(folder: Path, seed: int) -> None:
    """Write ten classes of four images each, as an image folder."""
    rng = np.random.default_rng(seed)
    for label in range(10):
        (folder / f"train/{label}").mkdir(parents=True)
        for number in range(4):
            pixels = rng.integers(0, 255, (16, 16), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"train/{label}/{number}.png")


def assert_published(cluster: Cluster, *commands: Command) -> None:
    for command in commands:
        assert command.wait() == 0, command.output
    report = cluster.report()
    assert report["outcome"] == "published"
    assert [agent["agent_id"] for agent in report["agents"]] == ["edge-1", "edge-2"]


def test_own_data_and_own_model_run_as_the_readme_says(cluster: Cluster) -> None:
    env = {"PYTHONPATH": str(EXAMPLES)}
    server = cluster.server("--config", EXAMPLES / "shapes.toml", env=env)
    agents = [
        cluster.agent(
            f"edge-{number}", "--data", "shapes:images", "--partition", f"{number}/2",
            "--allow-factory", "shapes:net", env=env,
        )
        for number in (1, 2)
    ]  # fmt: skip
    assert_published(cluster, *agents, server)
    assert cluster.report()["model"] == "shapes:net"


@pytest.mark.soak
def test_pictures_with_masks_run_as_the_readme_says(cluster: Cluster) -> None:
    env = {"PYTHONPATH": str(EXAMPLES)}
    server = cluster.server("--config", EXAMPLES / "masks.toml", env=env)
    agents = []
    for number in (1, 2):
        folder = cluster.folder / f"shapes-{number}"
        subprocess.run([sys.executable, EXAMPLES / "masks.py", folder, str(number)], check=True)
        agents.append(
            cluster.agent(f"edge-{number}", "--data", folder, "--allow-factory", "masks:net", env=env)
        )
    assert_published(cluster, *agents, server)
    report = cluster.report()
    assert report["metric"] == "mean intersection over union"
    assert report["score_published"] > 0.6


def report_of_own_task(cluster: Cluster, module: str, data: str, task: str) -> dict[str, Any]:
    """Run a round of an example with a task of its own, and return its report."""
    env = {"PYTHONPATH": str(EXAMPLES)}
    server = cluster.server("--config", EXAMPLES / f"{module}.toml", env=env)
    agents = [
        cluster.agent(
            f"edge-{number}", "--data", f"{module}:{data}", "--partition", f"{number}/2",
            "--allow-factory", f"{module}:net", "--allow-factory", f"{module}:{task}", env=env,
        )
        for number in (1, 2)
    ]  # fmt: skip
    assert_published(cluster, *agents, server)
    return cluster.report()


def test_own_task_runs_as_the_readme_says(cluster: Cluster) -> None:
    report = report_of_own_task(cluster, "two_heads", "windows", "TwoHeads")
    assert (report["task"], report["metric"]) == ("two_heads:TwoHeads", "half accuracy, half closeness")
    # A model that knows nothing is right in half of the cases, and mostly a quarter off.
    assert report["score_published"] > 0.75
    assert all("score_after" in agent for agent in report["agents"])


# A detector learns slowly, and other tests may be at work.
@pytest.mark.soak
@pytest.mark.timeout(300)
def test_detection_runs_as_the_readme_says(cluster: Cluster) -> None:
    report = report_of_own_task(cluster, "detection", "scenes", "Detection")
    assert report["metric"] == "mean average precision at IoU 0.5"
    # A detector that has learnt nothing has 0.
    assert report["score_published"] > 0.1


@pytest.mark.soak
def test_own_loops_run_as_the_readme_says(cluster: Cluster, tmp_path: Path) -> None:
    need("Lightning", find_spec("pytorch_lightning"), "pytorch-lightning")
    env = {"PYTHONPATH": f"{EXAMPLES}:{ROOT}"}
    server = cluster.server("--config", EXAMPLES / "shapes.toml", env=env)
    agents = []
    for number, example in enumerate(("own_loop", "lightning_loop"), start=1):
        cluster.enroll(f"edge-{number}")
        # The default state directory is below the working folder.
        (tmp_path / f"ecavg-agent-edge-{number}").symlink_to(tmp_path / f"edge-{number}")
        words = (f"127.0.0.1:{cluster.port}", f"edge-{number}", f"{number}/2")
        agents.append(Command(example, *words, folder=tmp_path / "logs", cwd=tmp_path, env=env))
    try:
        assert_published(cluster, *agents, server)
    finally:
        for agent in agents:
            agent.close()
    for agent in agents:
        # The batches of the examples are smaller than the run's, which holds all images of an agent.
        steps = re.findall(r'"round 1: pre-training", "done": \d+, "total": (\d+)', agent.output)
        assert {int(total) for total in steps} == {3 * TrainingConfig().epochs}


@pytest.mark.soak
def test_hugging_face_model_runs_as_the_readme_says(cluster: Cluster) -> None:
    need("transformers", find_spec("transformers"), "transformers")
    env = {"PYTHONPATH": str(EXAMPLES), "HF_HUB_OFFLINE": "1"}
    server = cluster.server("--config", EXAMPLES / "vision_transformer.toml", env=env)
    agents = [
        cluster.agent(
            f"edge-{number}", "--data", "shapes:images", "--partition", f"{number}/2",
            "--allow-factory", "vision_transformer:net", env=env,
        )
        for number in (1, 2)
    ]  # fmt: skip
    assert_published(cluster, *agents, server)
    assert cluster.report()["model"] == "vision_transformer:net"


def test_image_folders_run_as_the_readme_says(cluster: Cluster, tmp_path: Path) -> None:
    server = cluster.server("--config", EXAMPLES / "letters.toml")
    agents = []
    for number in (1, 2):
        write_letters(tmp_path / f"letters-{number}", seed=number)
        agents.append(cluster.agent(f"edge-{number}", "--data", tmp_path / f"letters-{number}"))
    assert_published(cluster, *agents, server)
    assert cluster.report()["dataset"] == "letters"
