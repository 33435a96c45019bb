"""The dashboard and the alert rules, held against what a real run exports, and by a real Prometheus."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import need
from tests.integration.test_round import QUICK, get
from tests.processes import ROOT, Cluster, Command, cluster_in, free_port, until

DASHBOARD = ROOT / "deploy/grafana/dashboards/ecavg.json"
ALERTS = ROOT / "deploy/alerts.yml"
AGENTS = ("edge-1", "edge-2", "edge-3")
# These series come from Prometheus itself.
BY_PROMETHEUS = {"up", "ALERTS"}
# Labels that Prometheus adds to what it scrapes.
ADDED = {"job", "instance"}
_SERIES = re.compile(r"\b(up|ALERTS|(?:ecavg|grpc_server|process)_\w+)\b(?:\{(.*?)\})?")
_MATCHER = re.compile(r'(\w+)(=~|!=|=)"(.*?)"')
_LABELS = re.compile(r"\b(?:by|on|ignoring|without) ?\((.*?)\)")


class Watched:
    """A run of three agents that goes on for ever, after its first two rounds."""

    def __init__(self, cluster: Cluster) -> None:
        self.server = cluster.server("--min-agents", 3, "--rounds", 0, *QUICK)
        self.agents = [
            cluster.agent(name, "--partition", f"{number}/3", "--metrics-port", 0)
            for number, name in enumerate(AGENTS, 1)
        ]
        found = [agent.wait_for(r"metrics on (http://(\S+?))/metrics") for agent in self.agents]
        self.ports = {"cloud-server": [f"127.0.0.1:{cluster.http_port}"], "edge-agent": [m[2] for m in found]}
        until(lambda: self._value('ecavg_server_rounds_total{outcome="published"}') >= 2, self.server)
        until(lambda: self._value('ecavg_server_reports_total{applied="true"}') >= 1, self.server)

    def _value(self, series: str) -> float:
        found = re.search(rf"^{re.escape(series)} (\S+)$", self.text("cloud-server"), re.MULTILINE)
        return float(found[1]) if found else 0.0

    def text(self, job: str) -> str:
        return get(f"http://{self.ports[job][0]}/metrics")

    def samples(self) -> list[tuple[str, dict[str, str]]]:
        """Return name and labels of everything that the server and an agent export."""
        return [
            (sample.name, dict(sample.labels) | {"job": job})
            for job in self.ports
            for family in text_string_to_metric_families(self.text(job))
            for sample in family.samples
        ]


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    with cluster_in(tmp_path_factory.mktemp("watched")) as cluster:
        yield Watched(cluster)


def queries() -> list[str]:
    panels = json.loads(DASHBOARD.read_text("utf-8"))["panels"]
    expressions = [target["expr"] for panel in panels for target in panel.get("targets", [])]
    return [re.sub(r"\$__(rate_interval|range)", "1m", each) for each in expressions]


def rules() -> list[str]:
    """Return the expressions of the alert rules."""
    text = re.sub(r"expr: >\n", "expr: ", ALERTS.read_text("utf-8"))
    return [" ".join(each.split()) for each in re.findall(r"expr: (.*?)\n +(?:for|labels):", text, re.DOTALL)]


def unknown(query: str, samples: list[tuple[str, dict[str, str]]]) -> list[str]:
    """Return what a query asks for that no sample has: series with their matchers, and labels."""
    bare = _LABELS.sub(" ", query)
    wanted = [(name, _MATCHER.findall(matchers or "")) for name, matchers in _SERIES.findall(bare)]
    assert wanted, query
    own = [(name, matchers) for name, matchers in wanted if name not in BY_PROMETHEUS]
    missing = [
        name
        for name, matchers in own
        if not any(name == n and fits(labels, matchers) for n, labels in samples)
    ]
    if own:
        known = ADDED.union(*(labels for name, labels in samples if name in dict(own)))
        asked = {label for group in _LABELS.findall(query) for label in re.split(r", *", group)}
        missing += sorted(asked - known)
    return missing


def fits(labels: dict[str, str], matchers: list[tuple[str, str, str]]) -> bool:
    """Return True if a series with these labels has a value that each matcher names, or does not exclude."""
    return all(
        label in ADDED - {"job"}
        or (label in labels and (bool(re.fullmatch(value, labels[label])) or op == "!="))
        for label, op, value in matchers
    )


def test_every_query_of_the_dashboard_and_the_alerts_is_about_what_a_run_exports(watched: Watched) -> None:
    # gRPC's codes appear when there is such an error.
    samples = [*watched.samples(), ("grpc_server_handled_total", {"grpc_code": "INTERNAL"})]
    # The run is a classification; another task has a score at the same stages.
    samples += [(name.replace("accuracy_ratio", "score"), labels) for name, labels in samples]
    assert len(queries()) > 20
    assert len(rules()) == ALERTS.read_text("utf-8").count("- alert:")
    assert {
        query: unknown(query, samples) for query in [*queries(), *rules()] if unknown(query, samples)
    } == {}


def test_queries_about_what_is_not_there_are_found(watched: Watched) -> None:
    samples = watched.samples()
    assert unknown("sum(ecavg_server_made_up)", samples) == ["ecavg_server_made_up"]
    assert unknown('ecavg_server_agents{state="asleep"}', samples) == ["ecavg_server_agents"]
    assert unknown("sum by (made_up) (ecavg_server_agents)", samples) == ["made_up"]


def test_panels_have_places_of_their_own_and_the_provisioned_source() -> None:
    panels = json.loads(DASHBOARD.read_text("utf-8"))["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(places)) == len(places)
    source = (ROOT / "deploy/grafana/provisioning/datasources/prometheus.yml").read_text("utf-8")
    (uid,) = re.findall(r"uid: (\w+)", source)
    assert {panel["datasource"]["uid"] for panel in panels if "targets" in panel} == {uid}


def test_every_alert_has_a_case_in_the_tests_of_the_rules() -> None:
    alerts = set(re.findall(r"alert: (\w+)", ALERTS.read_text("utf-8")))
    tested = set(
        re.findall(r'alertname="(\w+)"', (ROOT / "tests/compose/alerts_test.yml").read_text("utf-8"))
    )
    assert alerts == tested


def test_alert_rules_do_what_their_own_tests_say() -> None:
    need("promtool", shutil.which("promtool"), "prometheus")
    done = subprocess.run(
        ["promtool", "test", "rules", "tests/compose/alerts_test.yml"],
        cwd=ROOT, check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


class Prometheus:
    """A real Prometheus that scrapes a run several times a second, with our rules and no patience."""

    def __init__(self, folder: Path, watched: Watched) -> None:
        rules_file = folder / "alerts.yml"
        rules_file.write_text(re.sub(r"for: \d+m", "for: 1s", ALERTS.read_text("utf-8")), "utf-8")
        jobs = [
            {"job_name": job, "static_configs": [{"targets": targets}]}
            for job, targets in watched.ports.items()
        ]
        often = {"scrape_interval": "250ms", "scrape_timeout": "250ms", "evaluation_interval": "250ms"}
        config = {"global": often, "rule_files": [str(rules_file)], "scrape_configs": jobs}
        # JSON is YAML as well.
        (folder / "prometheus.yml").write_text(json.dumps(config), "utf-8")
        self.url = f"http://127.0.0.1:{free_port()}"
        self.log = (folder / "prometheus.log").open("wb")
        self.process = subprocess.Popen(
            [
                "prometheus", f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address={self.url.removeprefix('http://')}",
            ],
            stdout=self.log, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Return what Prometheus makes of an expression; nothing while it is starting."""
        text = get(f"{self.url}/api/v1/query?query={quote(expression)}")
        found: list[dict[str, Any]] = json.loads(text)["data"]["result"] if text else []
        return found

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(30)
        self.log.close()


@pytest.fixture
def prometheus(tmp_path: Path, watched: Watched) -> Iterator[Prometheus]:
    need("prometheus", shutil.which("prometheus"), "prometheus")
    prometheus = Prometheus(tmp_path, watched)
    yield prometheus
    prometheus.close()


def test_real_prometheus_answers_every_query_and_fires_when_agents_stop(
    watched: Watched, prometheus: Prometheus
) -> None:
    server: Command = watched.server
    until(lambda: len(prometheus.query("count_over_time(up[1m]) > 4")) == 4, server)
    # There is nothing to refuse, and nothing to warn of.
    silent = {query for query in queries() if "refusals" in query or "ALERTS" in query}
    for query in queries():
        if query not in silent:
            until(lambda query=query: prometheus.query(query), server)
    firing = 'ALERTS{alertname="AgentDown", alertstate="firing"}'
    assert prometheus.query(firing) == []
    for agent in watched.agents:
        agent.kill()
    until(lambda: len(prometheus.query(firing)) == len(AGENTS), server)
