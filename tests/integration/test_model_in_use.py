"""What a device does with the models that come into use, through its death and in the server's report."""

import json
import signal
from pathlib import Path

from ecavg.common.transfer import blob_of
from ecavg.edge_agent.history import History, Source
from tests.processes import Cluster

SETTINGS = ("--min-agents", 1, "--rounds", 1, "--set", "run.pretrain.epochs=1")
# The command kills the agent when it runs first, and fails for a published model.
SCRIPT = "; ".join(
    (
        'echo "$ECAVG_SOURCE $ECAVG_MODEL_SHA256" >> "$0"',
        'sha256sum "$ECAVG_MODEL" | grep -q $ECAVG_MODEL_SHA256 || exit 9',
        'test -e "$0.killed" || { touch "$0.killed"; kill -9 $PPID; }',
        "test $ECAVG_SOURCE != published",
    )
)


def on_update(calls: Path) -> list[str]:
    return [f"--on-update={word}" for word in ("sh", "-c", SCRIPT, calls)]


def test_killed_agent_tells_again_and_failing_model_is_rolled_back_and_reported(cluster: Cluster) -> None:
    server = cluster.server(*SETTINGS)
    calls = cluster.folder / "calls"
    keys = (*on_update(calls), "--on-update-failure", "roll-back", "--export", "torch-export")
    keys = (*keys, "--max-upload-rate", 200_000, "--max-download-rate", 200_000)
    assert cluster.agent("edge-1", *keys).wait() == -signal.SIGKILL
    agent = cluster.agent("edge-1", *keys)
    assert [agent.wait(), server.wait()] == [0, 0]

    history = History(cluster.folder / "edge-1", 3)
    own, published, restored = history.uses()
    assert (own.source, published.source, restored.source) == (
        Source.PRE_TRAINED,
        Source.PUBLISHED,
        Source.ROLLED_BACK,
    )
    assert calls.read_text("utf-8").splitlines() == [
        f"pre-trained {own.digest}",
        f"pre-trained {own.digest}",
        f"published {published.digest}",
        f"rolled-back {own.digest}",
    ]
    assert published.digest == cluster.report()["weights"]["sha256"]
    assert blob_of(cluster.folder / "edge-1" / "model.safetensors").digest == own.digest

    reason = "on_update: sh ended with exit code 1"
    agent.wait_for(f"round 1: {reason}; rolled back to the model of round 1")
    (reported,) = cluster.report()["agents"]
    own_report = json.loads((cluster.folder / "edge-1" / "report.json").read_text("utf-8"))
    for report in (reported, own_report):
        assert (report["applied"], report["reason"]) == (False, reason)
