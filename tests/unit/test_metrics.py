import math
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from ecavg.cloud_server.jobs import AgentAudit
from ecavg.cloud_server.metrics import ServerMetrics
from ecavg.cloud_server.showing.agent_metrics import AgentsProgress, OneAgent
from ecavg.common import metrics
from ecavg.common.run_state import Outcome
from ecavg.common.run_state import Phase as RoundPhase
from ecavg.common.tasks import KINDS
from ecavg.edge_agent.metrics import AgentMetrics
from ecavg.edge_agent.metrics import Phase as AgentPhase

SERVER_CONTRACT = {
    "ecavg_log_lines_dropped_total": set(),
    "ecavg_server_rounds_total": {"outcome"},
    "ecavg_server_round": set(),
    "ecavg_server_phase": {"phase"},
    "ecavg_server_phase_duration_seconds": {"phase"},
    "ecavg_server_agents": {"state"},
    "ecavg_server_uploads": {"state"},
    "ecavg_server_contributions_total": {"outcome"},
    "ecavg_server_reports_total": {"applied"},
    "ecavg_server_canaries_total": {"outcome"},
    "ecavg_server_received_bytes_total": {"kind"},
    "ecavg_server_refusals_total": {"reason"},
    "ecavg_server_connections_ended_total": set(),
    "ecavg_server_notifications_total": {"outcome"},
    "ecavg_server_sent_bytes_total": {"kind"},
    "ecavg_server_accuracy_ratio": {"stage"},
    "ecavg_server_score": {"stage"},
    "ecavg_build_info": {"version"},
    "ecavg_server_flagged_agents": set(),
    "ecavg_server_largest_update_norm_ratio": set(),
    "ecavg_server_selected_agents": {"selection"},
    "ecavg_server_downloads": set(),
    "ecavg_server_trainer": {"state"},
    "ecavg_server_disk_free_bytes": set(),
    "ecavg_server_certificate_left_seconds": set(),
    "grpc_server_handled_total": {"grpc_service", "grpc_method", "grpc_code"},
    "grpc_server_handling_seconds": {"grpc_service", "grpc_method"},
}
# These are there only with `agent_labels`.
AGENTS_CONTRACT = {
    "ecavg_server_agent_flagged": {"agent_id"},
    "ecavg_server_agent_update_norm_ratio": {"agent_id"},
}
AGENT_CONTRACT = {
    "ecavg_build_info": {"version"},
    "ecavg_agent_received_bytes_total": {"kind"},
    "ecavg_agent_progress_ratio": set(),
    "ecavg_agent_disk_free_bytes": set(),
    "ecavg_agent_certificate_left_seconds": set(),
    "ecavg_log_lines_dropped_total": set(),
    "ecavg_agent_phase": {"phase"},
    "ecavg_agent_pretrain_loss": set(),
    "ecavg_agent_accuracy_ratio": {"stage"},
    "ecavg_agent_score": {"stage"},
    "ecavg_agent_updates_total": {"result"},
    "ecavg_agent_sent_bytes_total": {"kind"},
    "ecavg_agent_reconnects_total": set(),
}


def scraped(registry: CollectorRegistry) -> dict[str, set[str]]:
    """Our metrics as a scrape shows them: name, with the suffix of a counter → its label names."""
    families = text_string_to_metric_families(generate_latest(registry).decode())
    return {
        family.name + ("_total" if family.type == "counter" else ""): {
            label for sample in family.samples for label in sample.labels
        }
        - {"le"}
        for family in families
        if family.name.startswith(("ecavg_", "grpc_"))
    }


def values(registry: CollectorRegistry, name: str) -> Mapping[str, float]:
    """Return the samples of a metric with one label, by the label's value."""
    return {
        next(iter(sample.labels.values())): sample.value
        for family in registry.collect()
        for sample in family.samples
        if sample.name == name
    }


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def server() -> ServerMetrics:
    return ServerMetrics()


@pytest.fixture
def labelled() -> ServerMetrics:
    return ServerMetrics(agent_labels=True)


@pytest.fixture
def agent() -> AgentMetrics:
    return AgentMetrics()


@pytest.fixture
def no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "find_gpus", lambda: None)


@pytest.mark.usefixtures("no_gpus")
@pytest.mark.parametrize("agent_labels", [False, True])
def test_server_metrics_have_the_names_and_labels_of_the_contract(agent_labels: bool) -> None:
    server = ServerMetrics(agent_labels=agent_labels)
    server.set_phase(1, "collecting")
    server.set_phase(1, "aggregating")
    server.set_scores(KINDS["classification"], {"average": 0.9})
    server.set_scores(KINDS["regression"], {"average": -0.9})
    server.set_audit([AgentAudit(agent_id="edge-1", update_norm=2.0, norm_ratio=1.0)])
    server.observe_rpc("ecavg.v1.ECAvg", "Join", "OK", 0.01)
    expected = SERVER_CONTRACT | (AGENTS_CONTRACT if agent_labels else {})
    assert scraped(server.registry) == expected
    assert ("edge-1" in generate_latest(server.registry).decode()) == agent_labels


@pytest.mark.usefixtures("no_gpus")
def test_agent_metrics_have_the_names_and_labels_of_the_contract(agent: AgentMetrics) -> None:
    agent.accuracy_ratio.labels("local").set(0.9)
    agent.score.labels("local").set(0.9)
    assert scraped(agent.registry) == AGENT_CONTRACT


def test_two_processes_in_one_do_not_share_metrics() -> None:
    first, second = ServerMetrics(), ServerMetrics()
    first.count_round("published")
    assert values(first.registry, "ecavg_server_rounds_total")["published"] == 1
    assert values(second.registry, "ecavg_server_rounds_total")["published"] == 0


def test_counters_are_there_before_they_count(server: ServerMetrics, agent: AgentMetrics) -> None:
    def zeros(*labels: Any) -> dict[str, float]:
        return dict.fromkeys(labels, 0.0)

    assert values(server.registry, "ecavg_server_rounds_total") == zeros("published", "failed")
    assert values(server.registry, "ecavg_server_contributions_total") == zeros(*map(str, Outcome))
    assert values(server.registry, "ecavg_server_reports_total") == zeros("true", "false")
    assert values(server.registry, "ecavg_server_received_bytes_total") == zeros("weights", "data")
    assert values(server.registry, "ecavg_server_sent_bytes_total") == zeros("model")
    assert values(agent.registry, "ecavg_agent_sent_bytes_total") == zeros("weights", "data")


def test_accuracy_is_absent_until_it_is_measured(server: ServerMetrics, agent: AgentMetrics) -> None:
    assert values(server.registry, "ecavg_server_accuracy_ratio") == {}
    assert values(agent.registry, "ecavg_agent_accuracy_ratio") == {}
    server.set_scores(KINDS["classification"], {"published": 0.5})
    assert values(server.registry, "ecavg_server_accuracy_ratio") == {"published": 0.5}


def test_accuracy_of_an_agent_is_of_one_round(agent: AgentMetrics) -> None:
    agent.set_scores(KINDS["classification"], local=0.9, before=0.9, after=0.7, adapted=0.95)
    agent.set_scores(KINDS["classification"], local=None, before=0.95, after=0.0, adapted=None)
    assert values(agent.registry, "ecavg_agent_accuracy_ratio") == {"before": 0.95, "after": 0.0}


def test_figure_of_an_agent_is_of_one_task(agent: AgentMetrics) -> None:
    agent.set_scores(KINDS["classification"], before=0.9, after=0.7)
    # The server has begun another run.
    agent.set_scores(KINDS["regression"], before=None, after=-0.3)
    assert values(agent.registry, "ecavg_agent_accuracy_ratio") == {}
    assert values(agent.registry, "ecavg_agent_score") == {"after": -0.3}


def test_accuracy_is_of_one_round(server: ServerMetrics) -> None:
    server.set_scores(KINDS["classification"], {"average": 0.7, "aligned": 0.8, "published": 0.9})
    server.set_scores(KINDS["classification"], {"average": 0.75, "published": 0.85})
    assert values(server.registry, "ecavg_server_accuracy_ratio") == {"average": 0.75, "published": 0.85}
    server.set_scores(KINDS["classification"], {})
    assert values(server.registry, "ecavg_server_accuracy_ratio") == {}


@pytest.mark.parametrize("phase", RoundPhase)
def test_server_is_in_one_phase(server: ServerMetrics, phase: RoundPhase) -> None:
    server.set_phase(3, "collecting")
    server.set_phase(3, phase)
    samples = values(server.registry, "ecavg_server_phase")
    assert samples == {each.value: float(each == phase) for each in RoundPhase}
    assert server.registry.get_sample_value("ecavg_server_round") == 3


@pytest.mark.parametrize("phase", AgentPhase)
def test_agent_is_in_one_phase(agent: AgentMetrics, phase: AgentPhase) -> None:
    agent.set_phase(phase)
    samples = values(agent.registry, "ecavg_agent_phase")
    assert samples == {each.value: float(each == phase) for each in AgentPhase}


def test_phase_duration_is_taken_when_the_phase_is_left() -> None:
    clock = Clock()
    server = ServerMetrics(clock)
    for now, number, phase in [
        (0, 1, "collecting"),
        (5, 1, "collecting"),  # told again: still the same stay
        (7, 1, "aggregating"),
        (8, 1, "published"),
        (10, 2, "collecting"),
        (13, 2, "aggregating"),
    ]:
        clock.now = now
        server.set_phase(number, phase)

    name = "ecavg_server_phase_duration_seconds"
    assert values(server.registry, f"{name}_sum") == {"collecting": 7 + 3, "aggregating": 1, "published": 2}
    assert values(server.registry, f"{name}_count") == {"collecting": 2, "aggregating": 1, "published": 1}


def test_agents_are_counted_by_state(server: ServerMetrics) -> None:
    server.watch_agents(lambda: {"watching": 0, "contributed": 2, "away": 1})
    assert values(server.registry, "ecavg_server_agents") == {"watching": 0, "contributed": 2, "away": 1}


def test_audit_is_of_one_round(labelled: ServerMetrics) -> None:
    server = labelled
    server.set_audit(
        [
            AgentAudit(agent_id="edge-1", update_norm=2.0, norm_ratio=1.0),
            AgentAudit(agent_id="edge-2", update_norm=9.0, norm_ratio=4.5, flags=("labels", "model")),
        ]
    )
    assert values(server.registry, "ecavg_server_agent_flagged") == {"edge-1": 0, "edge-2": 1}
    assert values(server.registry, "ecavg_server_agent_update_norm_ratio") == {"edge-1": 1.0, "edge-2": 4.5}
    sample = server.registry.get_sample_value
    assert sample("ecavg_server_flagged_agents") == 1
    assert sample("ecavg_server_largest_update_norm_ratio") == 4.5
    server.set_audit([AgentAudit(agent_id="edge-3", update_norm=0.0, norm_ratio=None)])
    assert sample("ecavg_server_flagged_agents") == sample("ecavg_server_largest_update_norm_ratio") == 0
    assert values(server.registry, "ecavg_server_agent_flagged") == {"edge-3": 0}
    assert values(server.registry, "ecavg_server_agent_update_norm_ratio") == {}


def test_no_series_is_of_a_forgotten_agent(labelled: ServerMetrics) -> None:
    server = labelled
    for agent_id in ("edge-1", "edge-2"):
        server.set_audit([AgentAudit(agent_id="edge-1", update_norm=2.0, norm_ratio=1.0)])
        server.forget(agent_id)
        expected = {} if agent_id == "edge-1" else {"edge-1": 1.0}
        assert values(server.registry, "ecavg_server_agent_update_norm_ratio") == expected
        assert values(server.registry, "ecavg_server_agent_flagged").keys() == expected.keys()


def test_progress_of_agents_is_looked_up_at_each_scrape(labelled: ServerMetrics) -> None:
    agents = [OneAgent("edge-1", True, "pre_training", 0.25), OneAgent("edge-2", False, "", None)]
    labelled.registry.register(AgentsProgress(lambda: agents))
    assert values(labelled.registry, "ecavg_server_agent_connected") == {"edge-1": 1, "edge-2": 0}
    labels = {"agent_id": "edge-1", "activity": "pre_training"}
    sample = labelled.registry.get_sample_value
    assert sample("ecavg_server_agent_progress_ratio", labels) == 0.25
    agents.clear()
    assert sample("ecavg_server_agent_progress_ratio", labels) is None


def test_sample_trainer_and_downloads_are_looked_up_at_each_scrape(server: ServerMetrics) -> None:
    assert set(values(server.registry, "ecavg_server_trainer").values()) == {0}
    states = ["working", "restarting"]
    server.watch_trainer(lambda: states[0])
    expected = {"idle": 0, "working": 1, "restarting": 0}
    assert values(server.registry, "ecavg_server_trainer") == expected
    states.pop(0)
    assert values(server.registry, "ecavg_server_trainer")["restarting"] == 1
    server.watch_selection(lambda: {"drawn": 3})
    expected = {"pending": 0, "drawn": 3, "not_drawn": 0}
    assert values(server.registry, "ecavg_server_selected_agents") == expected
    server.watch_downloads(lambda: 2)
    assert server.registry.get_sample_value("ecavg_server_downloads") == 2


def test_disk_and_certificate_are_those_of_the_moment(
    server: ServerMetrics, agent: AgentMetrics, tmp_path: Path
) -> None:
    for name, of in (("server", server), ("agent", agent)):
        sample = of.registry.get_sample_value
        assert math.isnan(sample(f"ecavg_{name}_disk_free_bytes"))
        of.machine.watch(tmp_path, None)
        assert sample(f"ecavg_{name}_disk_free_bytes") == pytest.approx(
            shutil.disk_usage(tmp_path).free, rel=0.2
        )
        assert math.isnan(sample(f"ecavg_{name}_certificate_left_seconds"))
        of.machine.watch(tmp_path / "gone", lambda: time.time() + 1000)
        assert math.isnan(sample(f"ecavg_{name}_disk_free_bytes"))
        assert sample(f"ecavg_{name}_certificate_left_seconds") == pytest.approx(1000, abs=60)


class Nvml:
    """Stands in for nvidia-ml-py on a machine with two GPUs, the second of which has fallen off the bus."""

    NVMLError = LookupError

    def __init__(self, num_gpus: int = 2) -> None:
        self.num_gpus = num_gpus

    def nvmlInit(self) -> None:
        if not self.num_gpus:
            raise self.NVMLError("no driver")

    def nvmlDeviceGetCount(self) -> int:
        return self.num_gpus

    def nvmlDeviceGetHandleByIndex(self, number: int) -> int:
        if number:
            raise self.NVMLError("GPU is lost")
        return number

    def nvmlDeviceGetMemoryInfo(self, _: int) -> SimpleNamespace:
        return SimpleNamespace(used=3e9, total=80e9)

    def nvmlDeviceGetUtilizationRates(self, _: int) -> SimpleNamespace:
        return SimpleNamespace(gpu=75)


def test_gpus_are_read_and_one_that_does_not_answer_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Nvml())
    registry = AgentMetrics().registry
    assert values(registry, "ecavg_gpu_memory_used_bytes") == {"0": 3e9}
    assert values(registry, "ecavg_gpu_memory_total_bytes") == {"0": 80e9}
    assert values(registry, "ecavg_gpu_utilization_ratio") == {"0": 0.75}


@pytest.mark.parametrize("nvml", [Nvml(0), None])
def test_machine_without_a_gpu_or_the_package_has_no_metrics_of_gpus(
    nvml: Nvml | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A module that is None cannot be imported.
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert not [name for name in scraped(ServerMetrics().registry) if "gpu" in name]


def test_bytes_and_contributions_add_up(server: ServerMetrics, agent: AgentMetrics) -> None:
    server.count_received("data", 1000)
    server.count_received("data", 24)
    server.count_sent("model", 7)
    server.count_contribution(Outcome.LATE)
    agent.sent_bytes_total.labels("weights").inc(512)
    agent.reconnects_total.inc()

    assert values(server.registry, "ecavg_server_received_bytes_total") == {"weights": 0, "data": 1024}
    assert values(server.registry, "ecavg_server_sent_bytes_total") == {"model": 7}
    assert values(server.registry, "ecavg_server_contributions_total") == {
        "accepted": 0,
        "rejected": 0,
        "late": 1,
    }
    assert values(agent.registry, "ecavg_agent_sent_bytes_total") == {"weights": 512, "data": 0}
    assert agent.registry.get_sample_value("ecavg_agent_reconnects_total") == 1


def test_rpcs_are_counted_by_status_and_timed_by_method(server: ServerMetrics) -> None:
    service = "ecavg.v1.ECAvg"
    server.observe_rpc(service, "Join", "OK", 0.5)
    server.observe_rpc(service, "Join", "UNAVAILABLE", 1.5)

    labels = {"grpc_service": service, "grpc_method": "Join"}
    sample = server.registry.get_sample_value
    assert sample("grpc_server_handled_total", labels | {"grpc_code": "OK"}) == 1
    assert sample("grpc_server_handled_total", labels | {"grpc_code": "UNAVAILABLE"}) == 1
    assert sample("grpc_server_handling_seconds_sum", labels) == 2
    assert sample("grpc_server_handling_seconds_bucket", labels | {"le": "0.5"}) == 1


def test_loss_is_not_a_number_until_there_is_one(agent: AgentMetrics) -> None:
    loss = agent.registry.get_sample_value("ecavg_agent_pretrain_loss")
    assert loss is not None
    assert math.isnan(loss)
    agent.pretrain_loss.set(0.25)
    assert agent.registry.get_sample_value("ecavg_agent_pretrain_loss") == 0.25
