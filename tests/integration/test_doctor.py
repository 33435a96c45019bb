"""`edge-agent doctor` and `cloud-server doctor`: each check has a case in which it is wrong."""

import re
from collections.abc import Iterator, Mapping
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from PIL import Image

from ecavg.cloud_server.door.authority import Authority
from ecavg.cloud_server.state_dir import StateDir
from ecavg.common import tls
from tests.processes import Cluster, Command, cluster_in, enroll, free_port

AGENT = ["versions", "name", "port", "identity", "tls", "clock", "state", "disk", "data", "device"]
SERVER = ["versions", "configuration", "port", "page", "state", "disk", "blobs", "tls", "clock", "trainer"]


def doctor(module: str, folder: Path, *args: object, env: Mapping[str, str] | None = None) -> Command:
    return Command(module, "doctor", *args, folder=folder / "logs", forked=True, env=env)


def wrong_lines(command: Command, names: list[str], code: int) -> dict[str, str]:
    """Check that there is one line for each check, and return those that say what is wrong."""
    assert command.wait() == code, command.output
    found = [re.fullmatch(r"(ok    |wrong ) (\w+): (.+)", line) for line in command.output.splitlines()]
    assert all(found), command.output
    matches = [match for match in found if match]
    assert [match[2] for match in matches] == names
    return {match[2]: match[3] for match in matches if match[1] == "wrong "}


def files_below(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path): (path.stat().st_mtime_ns, path.stat().st_size)
        for path in sorted(folder.rglob("*"))
        if "logs" not in path.parts
    }


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Return a server that waits for an agent, and an agent that has enrolled and has an image folder."""
    with cluster_in(tmp_path_factory.mktemp("running")) as cluster:
        cluster.server("--min-agents", 1)
        cluster.enroll("edge-1")
        for name in ("train/cat/1.png", "train/cat/2.png", "train/dog/1.png", "test/cat/1.png"):
            path = cluster.folder / "images" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(path)
        yield cluster


def agent_flags(cluster: Cluster, **changed: object) -> list[object]:
    """Return the flags of an agent that lacks nothing, with some of them changed; None leaves a flag away."""
    flags: dict[str, object] = {
        "server": f"127.0.0.1:{cluster.port}",
        "state_dir": cluster.folder / "edge-1",
        "data": cluster.folder / "images",
        **changed,
    }
    named = {f"--{name.replace('_', '-')}": value for name, value in flags.items() if value is not None}
    return [word for flag, value in named.items() for word in ((flag,) if value is True else (flag, value))]


def agent_trouble(
    cluster: Cluster, folder: Path, env: Mapping[str, str] | None = None, **changed: object
) -> dict[str, str]:
    return wrong_lines(
        doctor("ecavg.edge_agent", folder, *agent_flags(cluster, **changed), env=env), AGENT, 1
    )


# ---------------------------------------------------------------------- the agent's


def test_agent_that_lacks_nothing_is_well_and_nothing_is_changed(running: Cluster, tmp_path: Path) -> None:
    before = files_below(running.folder / "edge-1")
    command = doctor("ecavg.edge_agent", tmp_path, *agent_flags(running))
    assert wrong_lines(command, AGENT, 0) == {}
    assert files_below(running.folder / "edge-1") == before
    assert f"ok     port: 127.0.0.1:{running.port} is reached\n" in command.output
    assert "ok     identity: enrolled as edge-1, 89 days are left, the agent renews it\n" in command.output
    assert f"ok     data: {running.folder / 'images'} has 4 images of 2 classes\n" in command.output
    assert "when the server's certificate is valid\n" in command.output


def test_agent_that_is_at_work_is_well(cluster: Cluster, tmp_path: Path) -> None:
    cluster.server("--min-agents", 2)
    agent = cluster.agent("edge-1", "--partition", "1/1")
    agent.wait_for("joined as")
    command = doctor("ecavg.edge_agent", tmp_path, *agent_flags(cluster, data=None))
    assert wrong_lines(command, AGENT, 0) == {}
    assert f"is in use by the edge-agent with process id {agent.process.pid}\n" in command.output


def test_name_that_is_not_known_is_told(running: Cluster, tmp_path: Path) -> None:
    trouble = agent_trouble(running, tmp_path, server="nowhere.invalid:50051")
    assert re.fullmatch(
        r"nowhere\.invalid has no address \(.+\): correct --server, or the name service of this device",
        trouble.pop("name"),
    )
    assert set(trouble) == {"port", "tls"}


def test_port_that_nobody_listens_on_is_told(running: Cluster, tmp_path: Path) -> None:
    server = f"127.0.0.1:{free_port()}"
    assert agent_trouble(running, tmp_path, server=server) == {
        "port": f"nobody answers at {server} (Connection refused): start the cloud-server, correct --server,"
        " or have the firewalls in between let this port through",
        "tls": "not known, the server is not reached (Connection refused)",
    }


def test_proxy_that_is_dead_is_named_with_its_variable(running: Cluster, tmp_path: Path) -> None:
    proxy = f"http://127.0.0.1:{free_port()}"
    trouble = agent_trouble(running, tmp_path, env={"https_proxy": proxy})
    assert set(trouble) == {"port", "tls"}
    assert f"127.0.0.1:{running.port} through the proxy {proxy} (https_proxy) (Conn" in trouble["port"]


def test_agent_that_has_not_enrolled_is_told_how(running: Cluster, tmp_path: Path) -> None:
    server, state_dir = f"127.0.0.1:{running.port}", tmp_path / "new"
    how = (
        f"this agent has not enrolled: run `edge-agent enroll --server {server} --state-dir {state_dir}"
        " --token TOKEN`, with a token of `cloud-server token create`"
    )
    assert agent_trouble(running, tmp_path, state_dir=state_dir) == {
        "identity": how,
        "tls": f"the server speaks TLS, but {how}",
    }
    assert not state_dir.exists()


def test_agent_that_will_enroll_with_its_file_is_well(running: Cluster, tmp_path: Path) -> None:
    flags = agent_flags(running, state_dir=tmp_path / "new", join_token_file=running.join_token(1))
    assert wrong_lines(doctor("ecavg.edge_agent", tmp_path, *flags), AGENT, 0) == {}


def test_agent_of_another_server_is_told(running: Cluster, tmp_path: Path) -> None:
    enroll(tmp_path / "other", tmp_path / "edge-1", "edge-1")
    assert agent_trouble(running, tmp_path, state_dir=tmp_path / "edge-1") == {
        "tls": "the server is not the one that this agent enrolled with (its certificate is of another CA):"
        " check --server, or enroll anew"
    }


def test_agent_that_is_revoked_is_told(running: Cluster, tmp_path: Path) -> None:
    enroll(StateDir(running.state_dir).tls, tmp_path / "edge-2", "edge-2")
    with closing(Authority(StateDir(running.state_dir).tls)) as authority:
        authority.revoke_agent("edge-2")
    trouble = agent_trouble(running, tmp_path, state_dir=tmp_path / "edge-2")
    assert set(trouble) == {"tls"}
    assert "edge-2" in trouble["tls"]
    assert "revoked" in trouble["tls"]


def test_agent_with_tls_of_a_server_in_plaintext_is_told(cluster: Cluster, tmp_path: Path) -> None:
    cluster.server("--min-agents", 1, "--insecure")
    cluster.enroll("edge-1")
    assert agent_trouble(cluster, tmp_path, data=None) == {
        "tls": "the server speaks plaintext and this agent TLS: start the server without --insecure, or both"
        " with it"
    }
    flags = agent_flags(cluster, data=None, insecure=True)
    assert wrong_lines(doctor("ecavg.edge_agent", tmp_path, *flags), AGENT, 0) == {}


def test_agent_that_speaks_plaintext_to_a_server_with_tls_is_told(running: Cluster, tmp_path: Path) -> None:
    assert agent_trouble(running, tmp_path, insecure=True) == {
        "tls": "the server speaks TLS and this agent plaintext: leave --insecure away, after"
        " `edge-agent enroll`"
    }


def test_state_directory_that_cannot_be_written_is_told(running: Cluster, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    folder = tmp_path / "file/state"
    trouble = agent_trouble(running, tmp_path, state_dir=folder)
    assert trouble["state"] == (
        f"{folder} cannot be written (Not a directory): make it writable, or choose another --state-dir"
    )


@pytest.mark.parametrize("kind", ["damaged", "without train", "factory"])
def test_data_that_cannot_be_read_are_told(kind: str, running: Cluster, tmp_path: Path) -> None:
    picture = tmp_path / "data/train/cat/1.png"
    picture.parent.mkdir(parents=True)
    picture.write_bytes(b"no picture")
    (tmp_path / "empty").mkdir()
    data, told = {
        "damaged": (tmp_path / "data", f"{picture} cannot be read"),
        "without train": (tmp_path / "empty", f"no class folders in {tmp_path / 'empty/train'}: lay the"),
        "factory": ("tests.nowhere:data", "cannot import the factory 'tests.nowhere:data'"),
    }[kind]
    trouble = agent_trouble(running, tmp_path, data=data)
    assert set(trouble) == {"data"}
    assert trouble["data"].startswith(told)


def test_device_that_is_not_there_is_told(running: Cluster, tmp_path: Path) -> None:
    trouble = agent_trouble(running, tmp_path, device="cuda:77")
    assert set(trouble) == {"device"}
    assert trouble["device"].startswith("device 'cuda:77' is not there: choose auto, cpu")


def test_dataset_that_is_not_there_is_not_downloaded(running: Cluster, tmp_path: Path) -> None:
    (tmp_path / "sets").mkdir()
    flags = agent_flags(running, data="mnist", data_dir=tmp_path / "sets")
    command = doctor("ecavg.edge_agent", tmp_path, *flags)
    assert wrong_lines(command, AGENT, 0) == {}
    assert "ok     data: mnist is not here yet, the agent downloads it at its start\n" in command.output
    assert not list((tmp_path / "sets").iterdir())


@pytest.mark.parametrize(
    ("module", "flags"),
    [("ecavg.edge_agent", ("--server", "nowhere")), ("ecavg.cloud_server", ("--port", "70000"))],
)
def test_configuration_that_is_wrong_is_one_line_and_code_2(
    module: str, flags: tuple[str, ...], tmp_path: Path
) -> None:
    command = doctor(module, tmp_path, *flags)
    assert command.wait() == 2
    assert re.fullmatch(rf"(edge-agent|cloud-server) doctor: .*{flags[0][2:]}.*\n", command.output)


# ---------------------------------------------------------------------- the server's


def server_flags(folder: Path, *args: object) -> list[object]:
    ports = ("--host", "127.0.0.1", "--port", free_port(), "--http-port", free_port())
    return [*ports, "--state-dir", folder / "server", *args]


def test_server_that_lacks_nothing_is_well_and_nothing_is_made(tmp_path: Path) -> None:
    command = doctor("ecavg.cloud_server", tmp_path, *server_flags(tmp_path))
    assert wrong_lines(command, SERVER, 0) == {}
    assert not (tmp_path / "server").exists()
    assert re.search(r"^ok     trainer: .+; model mlp has \d+ parameters$", command.output, re.MULTILINE)


def test_server_that_is_at_work_is_named(running: Cluster, tmp_path: Path) -> None:
    flags = ("--host", "127.0.0.1", "--port", running.port, "--http-port", running.http_port)
    command = doctor("ecavg.cloud_server", tmp_path, *flags, "--state-dir", running.state_dir)
    trouble = wrong_lines(command, SERVER, 1)
    assert re.fullmatch(
        rf"process \d+ on \S+ uses state directory {running.state_dir}: stop it first", trouble.pop("state")
    )
    assert trouble == {
        name: f"nobody can listen on 127.0.0.1:{port} (Address already in use): end the process that does, or"
        f" choose another address or {flag}"
        for name, port, flag in (
            ("port", running.port, "--port"),
            ("page", running.http_port, "--http-port"),
        )
    }
    assert "ok     tls: the certificates of the CA and the server do not end\n" in command.output


def test_all_that_is_wrong_with_a_server_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "server").touch()
    key = tls.new_key()
    (tmp_path / "tls").mkdir()
    (tmp_path / "tls/ca.pem").write_bytes(tls.pem(tls.make_ca(key)))
    flags = server_flags(tmp_path, "--tls-dir", tmp_path / "tls", "--set", "run.model=no.module:here")
    trouble = wrong_lines(doctor("ecavg.cloud_server", tmp_path, *flags), SERVER, 1)
    assert trouble["state"] == (
        f"{tmp_path / 'server'} cannot be written (Not a directory): make it writable,"
        " or choose another --state-dir"
    )
    assert trouble["tls"].endswith(f"{tmp_path / 'tls/ca.key'} is not: put the CA's key there")
    assert trouble["trainer"].startswith("cannot import the factory 'no.module:here'")
    assert set(trouble) == {"state", "tls", "trainer"}


def test_ca_that_ends_soon_and_device_that_is_not_there_are_told(tmp_path: Path) -> None:
    folder, key, now = tmp_path / "server/tls", tls.new_key(), datetime.now(UTC)
    days = (now - timedelta(days=300), now + timedelta(days=5))
    ca = tls._sign("mine", key.public_key(), "mine", key, days, *tls._authority_extensions())
    folder.mkdir(parents=True)
    (folder / "ca.pem").write_bytes(tls.pem(ca))
    (folder / "ca.key").write_bytes(tls.pem(key))
    before = files_below(tmp_path)
    trouble = wrong_lines(
        doctor("ecavg.cloud_server", tmp_path, *server_flags(tmp_path, "--device", "cuda:77")), SERVER, 1
    )
    dates = f"from {days[0]:%Y-%m-%d} until {days[1]:%Y-%m-%d}"
    assert trouble["tls"].startswith(f"{folder / 'ca.pem'} is valid {dates}, and this machine's clock says")
    assert trouble["trainer"].startswith("device 'cuda:77' is not there: choose auto, cpu")
    assert set(trouble) == {"tls", "trainer"}
    assert files_below(tmp_path) == before
