"""What an operator does with published models beside a running server, by real processes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from ecavg.common.transfer import blob_of
from tests.integration.test_round import get
from tests.processes import Cluster, until

QUICK = (
    "--min-agents", 1, "--rounds", 0, "--set", "run.pretrain.epochs=1", "--set", "run.fine_tune.epochs=1",
    "--set", 'run.apply="always"', "--set", 'run.candidates=["average"]',
    # So small that every fine-tuned model is published: a device keeps what it has itself trained.
    "--set", "run.fine_tune.learning_rate=0.005",
)  # fmt: skip


def models(cluster: Cluster, *words: object) -> str:
    """Run `cloud-server models`, and return what it prints."""
    command = [sys.executable, "-m", "ecavg.cloud_server", "models", *map(str, words)]
    command += ["--state-dir", str(cluster.state_dir)]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


def status(cluster: Cluster) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(get(f"http://127.0.0.1:{cluster.http_port}/api/status"))
    return found


def model_round(cluster: Cluster) -> int | None:
    """Return the round of the model that the server shows as the agent's."""
    number: int | None = status(cluster)["agents"][0]["model_round"]
    return number


def rests(cluster: Cluster) -> bool:
    """Return True if the agent is not ready, and uses the newest model."""
    now = status(cluster)
    (agent,) = now["agents"]
    is_done = now["phase"] == "collecting" and agent["model_round"] == now["round"] - 1
    return is_done and not agent["is_ready"] and not agent["progress"]


def in_use(cluster: Cluster) -> str:
    return blob_of(cluster.folder / "edge-1/model.safetensors").digest


def test_device_follows_a_withdrawal_a_pin_and_its_end(cluster: Cluster, tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    ready.touch()
    server = cluster.server(*QUICK)
    command = [f"--ready-command={word}" for word in ("test", "-e", ready)]
    agent = cluster.agent("edge-1", "--ready-seconds", 0.1, *command)
    agent.wait_for("round 3: .*applied")
    ready.unlink()
    # What it has begun it would finish, at any time; one that starts here begins nothing.
    assert agent.terminate() == 0
    calls = tmp_path / "calls"
    script = 'echo "$ECAVG_MODEL_SHA256" >> "$0"'
    told = [f"--on-update={word}" for word in ("sh", "-c", script, calls)]
    agent = cluster.agent("edge-1", "--ready-seconds", 0.1, *command, *told)
    until(lambda: rests(cluster), server)
    last = status(cluster)["round"] - 1
    digests = {each["round"]: each["sha256"] for each in json.loads(models(cluster, "list", "--json"))}
    assert in_use(cluster) == digests[last]

    assert "a server that runs" in models(cluster, "withdraw", last)
    agent.wait_for(r"the model is withdrawn; that of round \d+ is in use again")
    assert in_use(cluster) != digests[last]
    failure = f"it started from the model of round {last}, which is withdrawn"
    until(lambda: status(cluster)["rounds"][-1]["failure"] == failure, server)
    until(lambda: model_round(cluster) == last - 1, server)
    # The device's own program was told before the server was.
    assert calls.read_text("utf-8").split()[-1] == in_use(cluster)

    models(cluster, "pin", 1)
    until(lambda: model_round(cluster) == 1, server)
    assert in_use(cluster) == digests[1]
    models(cluster, "unpin")
    until(lambda: model_round(cluster) == last - 1, server)
    assert in_use(cluster) == digests[last - 1]
