"""The metrics of an agent, under the names of the contract (Prometheus).

An attribute has the name of its metric, without the prefix `ecavg_agent_`.
"""

import math
from enum import StrEnum

from prometheus_client import Counter, Gauge

from ecavg.common.metrics import MachineMetrics, make_registry
from ecavg.common.tasks import Kind

SENT_KINDS = ("weights", "data")
RECEIVED_KINDS = ("model",)
UPDATE_RESULTS = ("done", "failed", "rolled_back")


class Phase(StrEnum):
    """The present work of an agent."""

    # The agent connects to a server that may not be up yet, or out of reach.
    CONNECTING = "connecting"
    # The agent trains on its own shard.
    PRE_TRAINING = "pre_training"
    # The agent uploads weights and data, then its contribution.
    UPLOADING = "uploading"
    # The agent waits for the other agents and for the cloud, or until it is drawn and ready.
    WAITING = "waiting"
    # The agent downloads the global model.
    DOWNLOADING = "downloading"
    # The agent measures the global model on its own held-out data, and adapts it where it does worse.
    EVALUATING = "evaluating"
    # The run is over.
    DONE = "done"


class AgentMetrics:
    """All metrics of one edge-agent, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = registry = make_registry()
        self._phase = Gauge(
            "ecavg_agent_phase", "1 on what the agent is doing.", ["phase"], registry=registry
        )
        self.pretrain_loss = Gauge(
            "ecavg_agent_pretrain_loss",
            "Training loss of the last steps, of pre-training or of local adaptation.",
            registry=registry,
        )
        self.accuracy_ratio = Gauge(
            "ecavg_agent_accuracy_ratio",
            "Accuracy on the agent's own held-out data, 0 to 1: of its pre-trained weights (local),"
            " of the model in use before the round, of the global model as it is (after), and of that"
            " after local adaptation (adapted), where the agent did adapt it.",
            ["stage"],
            registry=registry,
        )
        self.score = Gauge(
            "ecavg_agent_score",
            "The same as the accuracy, of the figure of a task that is not classification; higher is better.",
            ["stage"],
            registry=registry,
        )
        self.sent_bytes_total = Counter(
            "ecavg_agent_sent_bytes_total",
            "Blobs to the server; what a broken connection made travel twice counts twice.",
            ["kind"],
            registry=registry,
        )
        self.received_bytes_total = Counter(
            "ecavg_agent_received_bytes_total",
            "Initial weights and models from the server.",
            ["kind"],
            registry=registry,
        )
        self.progress_ratio = Gauge(
            "ecavg_agent_progress_ratio",
            "How much of its present or last training the agent has done, 0 to 1.",
            registry=registry,
        )
        self.machine = MachineMetrics(registry, "agent")
        self.reconnects_total = Counter(
            "ecavg_agent_reconnects_total", "Connections to the server that broke.", registry=registry
        )
        self.updates_total = Counter(
            "ecavg_agent_updates_total",
            "Models in use that were exported and told to on_update: done, failed and kept (failed),"
            " or failed and given up for the model before (rolled_back).",
            ["result"],
            registry=registry,
        )
        for result in UPDATE_RESULTS:
            self.updates_total.labels(result)
        for kind in SENT_KINDS:
            # A counter that first appears at 1 hides its first increase.
            self.sent_bytes_total.labels(kind)
        for kind in RECEIVED_KINDS:
            self.received_bytes_total.labels(kind)
        # There is no loss yet; 0 would be a perfect one.
        self.pretrain_loss.set(math.nan)
        self.set_phase(Phase.CONNECTING)

    def set_score(self, kind: Kind, stage: str, score: float) -> None:
        """Show what was measured of one stage of a round, beside the others."""
        self._gauge(kind).labels(stage).set(score)

    def set_scores(self, kind: Kind, **stages: float | None) -> None:
        """Show what was measured in a round, by stage, and nothing of another round or task."""
        self.accuracy_ratio.clear()
        self.score.clear()
        for stage, score in stages.items():
            if score is not None:
                self.set_score(kind, stage, score)

    def _gauge(self, kind: Kind) -> Gauge:
        return self.accuracy_ratio if kind.field == "accuracy" else self.score

    def set_phase(self, phase: Phase) -> None:
        """Show this phase, and no other."""
        for each in Phase:
            self._phase.labels(each).set(each == phase)
