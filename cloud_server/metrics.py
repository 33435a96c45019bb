"""The metrics of a server in Prometheus format, under the names that the reference documents.

The number of series is bounded. The values of labels are those of the constants and enums in this module, and
the RPCs and status codes of the server. Only where it is asked for are there series with the id of an agent.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from ecavg.cloud_server.jobs import AgentAudit
from ecavg.cloud_server.round import OVER
from ecavg.common.errors import Reason
from ecavg.common.metrics import MachineMetrics, make_registry
from ecavg.common.run_state import Outcome, Phase, Selection
from ecavg.common.tasks import Kind

RECEIVED_KINDS = ("weights", "data")
SENT_KINDS = ("model",)
UPLOAD_STATES = ("receiving", "waiting")
# The trainer has no job, or has one, or its process has ended and is started again.
TRAINER_STATES = ("idle", "working", "restarting")
# A message of the webhook was taken, or an attempt to send it failed, or it is not sent any more.
NOTIFICATION_OUTCOMES = ("delivered", "failed", "given_up")
# Connected and still to contribute, connected and done, or not connected.
AGENT_STATES = ("watching", "contributed", "away")
CANARY_OUTCOMES = ("released", "withdrawn")
# A phase takes between milliseconds (digits) and hours (collecting, a long fine-tune).
PHASE_SECONDS = (0.1, 0.3, 1, 3, 10, 30, 60, 180, 600, 1800, 3600, 10800, 36000)
# A call takes between a millisecond (a small message) and hours (Watch, which is open for the whole run).
RPC_SECONDS = (0.001, 0.005, 0.02, 0.1, 0.5, 2, 10, 60, 300, 1800, 10800)


class ServerMetrics:
    """All metrics of one cloud-server, in a registry of its own.

    Args:
        clock: returns seconds that never decrease.
        agent_labels: True for series with the id of an agent as well.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, *, agent_labels: bool = False) -> None:
        self.registry = registry = make_registry()
        self._clock = clock
        # The number of the current round, its phase, and the time at which the phase began.
        self._current: tuple[int, Phase, float] | None = None
        self._rounds = Counter(
            "ecavg_server_rounds_total", "Rounds that ended, by how.", ["outcome"], registry=registry
        )
        self._round = Gauge("ecavg_server_round", "Number of the current round.", registry=registry)
        self._phase = Gauge("ecavg_server_phase", "1 on the round's phase.", ["phase"], registry=registry)
        self._phase_duration = Histogram(
            "ecavg_server_phase_duration_seconds",
            "How long rounds stayed in a phase.",
            ["phase"],
            buckets=PHASE_SECONDS,
            registry=registry,
        )
        self._agents = Gauge(
            "ecavg_server_agents",
            "Agents of the run: connected and still to contribute (watching), connected and"
            " contributed, or away.",
            ["state"],
            registry=registry,
        )
        self._uploads = Gauge(
            "ecavg_server_uploads",
            "Uploads that are taken in, or that wait for their turn.",
            ["state"],
            registry=registry,
        )
        self._contributions = Counter(
            "ecavg_server_contributions_total", "Contributions, by how.", ["outcome"], registry=registry
        )
        self._reports = Counter(
            "ecavg_server_reports_total",
            "Agents that reported on a round's global model, by whether they use it.",
            ["applied"],
            registry=registry,
        )
        self._canaries = Counter(
            "ecavg_server_canaries_total",
            "Models that were tried out by a part of the agents, by how that ended.",
            ["outcome"],
            registry=registry,
        )
        # The sums over all kinds of blobs, since the process has started.
        self.received_bytes = self.sent_bytes = 0
        self._received = Counter(
            "ecavg_server_received_bytes_total", "Blobs from agents.", ["kind"], registry=registry
        )
        self._sent = Counter("ecavg_server_sent_bytes_total", "Blobs to agents.", ["kind"], registry=registry)
        self._accuracy = Gauge(
            "ecavg_server_accuracy_ratio",
            "Accuracy on the held-out part of the combined data, 0 to 1, in the last published round.",
            ["stage"],
            registry=registry,
        )
        self._score = Gauge(
            "ecavg_server_score",
            "Figure of the run's task, where that is not classification, on the held-out part of the combined"
            " data in the last published round; higher is better.",
            ["stage"],
            registry=registry,
        )
        self._audit = _AuditMetrics(registry, agent_labels=agent_labels)
        self._selected = Gauge(
            "ecavg_server_selected_agents",
            "Agents by whether they are in the sample of the current round.",
            ["selection"],
            registry=registry,
        )
        self._downloads = Gauge("ecavg_server_downloads", "Downloads under way.", registry=registry)
        self._trainer = Gauge(
            "ecavg_server_trainer", "1 on the trainer's state.", ["state"], registry=registry
        )
        self.machine = MachineMetrics(registry, "server")
        self._handled = Counter(
            "grpc_server_handled_total",
            "RPCs that ended, by status.",
            ["grpc_service", "grpc_method", "grpc_code"],
            registry=registry,
        )
        self._handling = Histogram(
            "grpc_server_handling_seconds",
            "How long RPCs took, a stream to its end.",
            ["grpc_service", "grpc_method"],
            buckets=RPC_SECONDS,
            registry=registry,
        )
        self._refusals = Counter(
            "ecavg_server_refusals_total", "RPCs that were refused, by why.", ["reason"], registry=registry
        )
        self._connections_ended = Counter(
            "ecavg_server_connections_ended_total",
            "Connections without a call that were ended to make room.",
            registry=registry,
        )
        self._notifications = Counter(
            "ecavg_server_notifications_total",
            "Messages of the webhook that were taken (delivered) or not sent any more (given_up), and"
            " attempts that failed.",
            ["outcome"],
            registry=registry,
        )
        self._start_at_zero()

    def _start_at_zero(self) -> None:
        """Create all series of the counters with the value 0.

        A series that first appears with the value 1 hides its first increase from `rate()` of Prometheus.
        """
        for phase in OVER:
            self.count_round(phase, 0)
        for outcome in Outcome:
            self.count_contribution(outcome, 0)
        for applied in (True, False):
            self.count_report(applied, 0)
        for became in NOTIFICATION_OUTCOMES:
            self.count_notification(became, 0)
        for ending in CANARY_OUTCOMES:
            self.count_canary(ending, 0)
        for kind in RECEIVED_KINDS:
            self.count_received(kind, 0)
        for kind in SENT_KINDS:
            self.count_sent(kind, 0)
        for reason in Reason:
            self._refusals.labels(reason.value)
        self.watch_agents(lambda: dict.fromkeys(AGENT_STATES, 0))
        self.watch_uploads(lambda: dict.fromkeys(UPLOAD_STATES, 0))
        self.watch_selection(lambda: {})
        self.watch_trainer(lambda: "")

    def set_phase(self, number: int, phase: str) -> None:
        """Show that the round `number` is in `phase`; a repeated call with the same values has no effect."""
        if self._current and self._current[:2] == (number, phase):
            return
        now = self._clock()
        if self._current:
            _, left, since = self._current
            self._phase_duration.labels(left).observe(now - since)
        self._current = (number, Phase(phase), now)
        self._round.set(number)
        for each in Phase:
            self._phase.labels(each).set(each == phase)

    def watch_agents(self, count: Callable[[], Mapping[str, int]]) -> None:
        """Have the numbers of agents counted whenever somebody looks at the metrics.

        Args:
            count: returns the number of agents in each of AGENT_STATES.
        """
        for state in AGENT_STATES:
            self._agents.labels(state).set_function(lambda state=state: count()[state])  # type: ignore[misc]

    def watch_uploads(self, count: Callable[[], Mapping[str, int]]) -> None:
        """Have the numbers of uploads counted whenever somebody looks at the metrics.

        Args:
            count: returns the number of uploads in each of UPLOAD_STATES.
        """
        for state in UPLOAD_STATES:
            self._uploads.labels(state).set_function(lambda state=state: count()[state])  # type: ignore[misc]

    def set_scores(self, kind: Kind, scores: Mapping[str, float]) -> None:
        """Replace the scores by those of a published round.

        Args:
            kind: what is known of the run's task.
            scores: the scores by stage.
        """
        gauge = self._accuracy if kind.field == "accuracy" else self._score
        gauge.clear()
        for stage, score in scores.items():
            gauge.labels(stage).set(score)

    def watch_selection(self, count: Callable[[], Mapping[str, int]]) -> None:
        """Have the agents of the current sample counted whenever somebody looks at the metrics.

        Args:
            count: returns the number of agents by Selection, where there is a sample.
        """
        for each in Selection:
            self._selected.labels(each).set_function(lambda each=each: count().get(each, 0))  # type: ignore[misc]

    def watch_downloads(self, count: Callable[[], int]) -> None:
        """Have the downloads under way counted whenever somebody looks at the metrics."""
        self._downloads.set_function(count)

    def watch_trainer(self, state_of: Callable[[], str]) -> None:
        """Have the trainer's state, of TRAINER_STATES, asked for whenever somebody looks at the metrics."""
        for state in TRAINER_STATES:
            self._trainer.labels(state).set_function(lambda state=state: state_of() == state)  # type: ignore[misc]

    def set_audit(self, audit: Sequence[AgentAudit]) -> None:
        """Replace the flags and norm ratios of agents by those of a published round."""
        self._audit.set(audit)

    def forget(self, agent_id: str) -> None:
        """Remove every series that has this agent's id."""
        self._audit.forget(agent_id)

    def count_round(self, outcome: str, num_rounds: int = 1) -> None:
        """Count a round by the phase in which it has ended, "published" or "failed"."""
        self._rounds.labels(outcome).inc(num_rounds)

    def count_contribution(self, outcome: str, num_contributions: int = 1) -> None:
        """Count a contribution by its outcome."""
        self._contributions.labels(outcome).inc(num_contributions)

    def count_report(self, applied: bool, num_reports: int = 1) -> None:
        """Count an agent's first report on a round; `applied` is True if the agent uses the model."""
        self._reports.labels(str(applied).lower()).inc(num_reports)

    def count_notification(self, outcome: str, num_notifications: int = 1) -> None:
        """Count what became of a message; `outcome` is one of NOTIFICATION_OUTCOMES."""
        self._notifications.labels(outcome).inc(num_notifications)

    def count_canary(self, outcome: str, num_canaries: int = 1) -> None:
        """Count a canary by how it has ended, one of CANARY_OUTCOMES."""
        self._canaries.labels(outcome).inc(num_canaries)

    def count_received(self, kind: str, num_bytes: int) -> None:
        """Count received bytes; `kind` is one of RECEIVED_KINDS."""
        self._received.labels(kind).inc(num_bytes)
        self.received_bytes += num_bytes

    def count_sent(self, kind: str, num_bytes: int) -> None:
        """Count sent bytes; `kind` is one of SENT_KINDS."""
        self._sent.labels(kind).inc(num_bytes)
        self.sent_bytes += num_bytes

    def count_connections_ended(self, num_connections: int) -> None:
        """Count connections that were ended to make room."""
        self._connections_ended.inc(num_connections)

    def observe_rpc(
        self, service: str, method: str, code: str, seconds: float, refusal: Reason | None = None
    ) -> None:
        """Count and measure an RPC that has ended.

        Args:
            service: the name of the gRPC service.
            method: the name of a method that this server has.
            code: the name of the status, for example "OK".
            seconds: the duration of the RPC.
            refusal: the reason if the RPC was refused.
        """
        if refusal:
            self._refusals.labels(refusal.value).inc()
        self._handled.labels(service, method, code).inc()
        self._handling.labels(service, method).observe(seconds)


class _AuditMetrics:
    """What the audit of the last published round found.

    Args:
        agent_labels: True for the figures of each agent as well.
    """

    def __init__(self, registry: CollectorRegistry, *, agent_labels: bool) -> None:
        self._num_flagged = Gauge(
            "ecavg_server_flagged_agents",
            "Agents that the audit of the last published round has flagged.",
            registry=registry,
        )
        self._largest = Gauge(
            "ecavg_server_largest_update_norm_ratio",
            "Norm of the largest update in the last published round, as a multiple of the median.",
            registry=registry,
        )
        # The gauges with an agent's id are made in any case, and shown only where that is wanted.
        shown_in = registry if agent_labels else None
        self._flagged = Gauge(
            "ecavg_server_agent_flagged",
            "1 on agents that the audit of the last published round has flagged.",
            ["agent_id"],
            registry=shown_in,
        )
        self._norm_ratio = Gauge(
            "ecavg_server_agent_update_norm_ratio",
            "Norm of an agent's update in the last published round, as a multiple of the median.",
            ["agent_id"],
            registry=shown_in,
        )

    def set(self, audit: Sequence[AgentAudit]) -> None:
        """Replace all figures by those of a published round."""
        self._num_flagged.set(sum(bool(agent.flags) for agent in audit))
        self._largest.set(max((agent.norm_ratio or 0.0 for agent in audit), default=0.0))
        self._flagged.clear()
        self._norm_ratio.clear()
        for agent in audit:
            self._flagged.labels(agent.agent_id).set(bool(agent.flags))
            if agent.norm_ratio is not None:
                self._norm_ratio.labels(agent.agent_id).set(agent.norm_ratio)

    def forget(self, agent_id: str) -> None:
        """Remove every series that has this agent's id."""
        for gauge in (self._flagged, self._norm_ratio):
            with suppress(KeyError):
                # An agent that took no part in the last published round has no series.
                gauge.remove(agent_id)
