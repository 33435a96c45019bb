"""The manifests of deploy/kubernetes: Kubernetes' own schemas, what they say to our commands, hardening."""

import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from torch.distributed.run import get_args_parser

from ecavg.cloud_server.config import ENV_PREFIX as SERVER_PREFIX
from ecavg.cloud_server.config import ServerConfig
from ecavg.cloud_server.trainer import __main__ as trainer_main
from ecavg.cloud_server.trainer.group import OWN_STORE
from ecavg.common.layers import load
from ecavg.edge_agent.config import ENV_PREFIX as AGENT_PREFIX
from ecavg.edge_agent.config import AgentConfig
from tests.deploy.kustomize import Resource, build

DEPLOY = Path(__file__).parents[2] / "deploy"
FOLDERS = ["base", "gpu", "trainers", "monitoring", "edge"]
# The oldest version of Kubernetes that still gets fixes when this was written, and the newest.
VERSIONS = ["1.34", "1.37"]
# The schemas of these are not Kubernetes' own, but those of the Prometheus operator.
CONFIG_NAME = re.compile(r"run-[0-9a-z]{10}")
BUCKET = "s3://ecavg/blobs"
OPERATOR_KINDS = {"ServiceMonitor", "PodMonitor", "PrometheusRule"}


def resources(folder: str) -> list[Resource]:
    return build(DEPLOY / "kubernetes" / folder)


def one(folder: str, kind: str, name: str = "") -> Resource:
    """Return the resource of this kind; where there are several, the one with this name."""
    (resource,) = [
        resource
        for resource in resources(folder)
        if resource["kind"] == kind and name in ("", resource["metadata"]["name"])
    ]
    return resource


def workloads() -> list[Any]:
    kinds = {"StatefulSet", "DaemonSet", "Deployment"}
    return [
        pytest.param(resource, id=f"{folder}-{resource['metadata']['name']}")
        for folder in FOLDERS
        for resource in resources(folder)
        if resource["kind"] in kinds
    ]


def environment(container: Resource) -> dict[str, str]:
    return {item["name"]: item.get("value", "node-1") for item in container["env"]}


def words(folder: str, kind: str, name: str, container: str) -> list[str]:
    """Return the words of the command that a container runs, as a shell would have them."""
    containers = one(folder, kind, name)["spec"]["template"]["spec"]["containers"]
    (found,) = [each for each in containers if each["name"] == container]
    return [*found["command"], *found["args"]]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("folder", FOLDERS)
def test_resources_fit_the_schemas(folder: str, version: str) -> None:
    checked = [item for item in resources(folder) if item["kind"] not in OPERATOR_KINDS]
    assert checked or folder == "monitoring"
    for resource in checked:
        kubernetes_validate.validate(resource, version, strict=True)


def _id(resource: Resource) -> tuple[str, str]:
    name = CONFIG_NAME.sub("run", resource["metadata"]["name"])
    return resource["kind"], name


def without_digest(spec: Resource) -> Resource:
    """Return the specification without the digest in a ConfigMap's name, of which kustomize has its own."""
    renamed: Resource = json.loads(CONFIG_NAME.sub("run", json.dumps(spec)))
    return renamed


@pytest.mark.skipif(not shutil.which("kustomize"), reason="kustomize is not installed")
@pytest.mark.parametrize("folder", FOLDERS)
def test_kustomize_builds_the_same(folder: str) -> None:
    built = subprocess.run(
        ["kustomize", "build", DEPLOY / "kubernetes" / folder], check=True, capture_output=True, text=True
    ).stdout
    others = list(yaml.safe_load_all(built))
    ours = resources(folder)
    assert len(ours) == len(others)
    for resource in ours:
        (other,) = [item for item in others if _id(item) == _id(resource)]
        if resource["kind"] == "ConfigMap":
            assert resource["data"] == other["data"]
        else:
            assert without_digest(resource["spec"]) == without_digest(other["spec"])


@pytest.mark.parametrize("workload", workloads())
def test_pods_are_hardened(workload: Resource) -> None:
    spec = workload["spec"]["template"]["spec"]
    assert spec["automountServiceAccountToken"] is False
    assert spec["securityContext"]["runAsNonRoot"]
    assert spec["securityContext"]["seccompProfile"]
    for container in [*spec["containers"], *spec.get("initContainers", [])]:
        security = container["securityContext"]
        assert security["readOnlyRootFilesystem"]
        assert not security["allowPrivilegeEscalation"]
        assert security["capabilities"]["drop"] == ["ALL"]


@pytest.mark.parametrize("workload", workloads())
def test_what_is_mounted_is_a_volume(workload: Resource) -> None:
    spec = workload["spec"]["template"]["spec"]
    names = {volume["name"] for volume in spec["volumes"]}
    claimed = {claim["metadata"]["name"] for claim in workload["spec"].get("volumeClaimTemplates", [])}
    for container in [*spec["containers"], *spec.get("initContainers", [])]:
        assert {mount["name"] for mount in container["volumeMounts"]} <= names | claimed


@pytest.mark.parametrize("folder", ["base", "gpu", "trainers"])
def test_server_takes_the_configuration(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (container,) = one(folder, "StatefulSet", "cloud-server")["spec"]["template"]["spec"]["containers"]
    (text,) = one(folder, "ConfigMap")["data"].values()
    _, preset, _, file = container["args"]
    path = tmp_path / Path(file).name
    path.write_text(text, "utf-8")
    for name, value in environment(container).items():
        monkeypatch.setenv(name, value)
    config = load(ServerConfig, env_prefix=SERVER_PREFIX, preset=preset, config_file=str(path), flags={})
    assert config.rounds == tomllib.loads(text)["rounds"]
    assert str(config.http_token_file) == "/etc/ecavg-http/token"
    has_own_trainer = folder != "trainers"
    assert config.trainers == ("own" if has_own_trainer else "external")
    assert config.blobs == ("files" if has_own_trainer else BUCKET)


def test_agent_takes_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    (container,) = one("edge", "DaemonSet")["spec"]["template"]["spec"]["containers"]
    for name, value in environment(container).items():
        monkeypatch.setenv(name, value)
    config = load(AgentConfig, env_prefix=AGENT_PREFIX, flags={})
    (service,) = [item for item in resources("base") if item["kind"] == "Service"]
    port = service["spec"]["ports"][0]["port"]
    assert (config.server, config.agent_id) == (f"{service['metadata']['name']}:{port}", "node-1")


def test_ports_have_the_names_that_others_use() -> None:
    (server,) = one("base", "StatefulSet")["spec"]["template"]["spec"]["containers"]
    (agent,) = one("edge", "DaemonSet")["spec"]["template"]["spec"]["containers"]
    service_ports = {port["name"] for port in one("base", "Service")["spec"]["ports"]}
    assert service_ports == {port["name"] for port in server["ports"]}
    assert {
        item["port"] for item in one("monitoring", "ServiceMonitor")["spec"]["endpoints"]
    } <= service_ports
    pod_ports = {item["port"] for item in one("monitoring", "PodMonitor")["spec"]["podMetricsEndpoints"]}
    assert pod_ports <= {port["name"] for port in agent["ports"]}


def test_alert_rules_are_those_of_compose() -> None:
    rules = yaml.safe_load((DEPLOY / "alerts.yml").read_text("utf-8"))
    assert one("monitoring", "PrometheusRule")["spec"] == rules


def test_trainers_meet_where_the_rendezvous_is() -> None:
    command = words("trainers", "StatefulSet", "trainers", "trainer")
    launcher, trainer = get_args_parser().parse_args(command[1:]), command[command.index("-m") + 2 :]
    service = one("trainers", "Service", "rendezvous")
    port = service["spec"]["ports"][0]["port"]
    assert launcher.rdzv_endpoint == f"{service['metadata']['name']}:{port}"
    assert words("trainers", "Deployment", "rendezvous", "rendezvous")[-2:] == ["--port", str(port)]
    smallest, largest = map(int, launcher.nnodes.split(":"))
    replicas = one("trainers", "StatefulSet", "trainers")["spec"]["replicas"]
    assert smallest <= replicas <= largest
    assert launcher.training_script == "ecavg.cloud_server.trainer"
    assert str(trainer_main._parser().parse_args(trainer).state_dir) == "/work"
    containers = one("trainers", "StatefulSet", "trainers")["spec"]["template"]["spec"]["containers"]
    assert environment(containers[1])[OWN_STORE] == "1"


def test_relays_bring_the_jobs_of_the_servers_bucket() -> None:
    relay = words("trainers", "StatefulSet", "trainers", "relay")
    assert relay[3:] == ["--bucket", BUCKET, "--state-dir", "/work"]


def test_only_trainers_reach_trainers_and_their_rendezvous() -> None:
    for name in ("trainers", "rendezvous"):
        policy = one("trainers", "NetworkPolicy", name)["spec"]
        assert policy["podSelector"]["matchLabels"] == {"app.kubernetes.io/name": name}
        (rule,) = policy["ingress"]
        assert rule["from"] == [{"podSelector": {"matchLabels": {"app.kubernetes.io/name": "trainers"}}}]
