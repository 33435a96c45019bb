"""What the surroundings give: homes, environments, descriptors, disks and files of other systems.

No command may end with a traceback, nor blame itself: each says in one line what the user can mend, or works.
"""

import os
import re
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from cloud_server.state_dir import StateDir
from tests.integration.test_round import QUICK
from tests.processes import Cluster, Command, cluster_in, free_port, until

DROPPED = re.compile(r"^ecavg_log_lines_dropped_total (\S+)", re.MULTILINE)


def get(port: int, path: str) -> str:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as reply:
            return reply.read().decode()
    except OSError:
        return ""


def num_dropped(port: int) -> float:
    match = DROPPED.search(get(port, "/metrics"))
    return float(match[1]) if match else 0.0


# ---------------------------------------------------------------------- a log that cannot be written


@pytest.mark.parametrize(
    "streams",
    [
        {2: "/dev/full"},
        {1: "no reader", 2: "no reader"},
        {0: "closed", 1: "closed", 2: "closed"},
    ],
    ids=["full disk", "no reader", "closed"],
)  # fmt: skip
def test_run_goes_on_where_no_log_can_be_written(cluster: Cluster, streams: Mapping[int, str]) -> None:
    """Server, agent and trainer take two rounds to their end, and count what they could not say."""
    cluster.state_dir.mkdir()
    StateDir(cluster.state_dir).trainer_log.symlink_to("/dev/full")
    cluster.port, cluster.http_port, agent_port = free_port(), free_port(), free_port()
    server = cluster.server("--min-agents", 1, "--rounds", 2, *QUICK, ready=False, streams=streams)
    until(lambda: get(cluster.http_port, "/readyz") == "ready\n", server)
    assert no_file_has_a_standard_number(server, streams)
    agent = cluster.agent(
        "edge-1", "--partition", "1/1", "--metrics-port", agent_port, "--share-data", "none", streams=streams
    )
    until(lambda: num_dropped(agent_port), agent)
    assert num_dropped(cluster.http_port)
    assert no_file_has_a_standard_number(agent, streams)
    assert (agent.wait(), server.wait()) == (0, 0)
    assert [cluster.report(number)["outcome"] for number in (1, 2)] == ["published", "published"]


def no_file_has_a_standard_number(command: Command, streams: Mapping[int, str]) -> bool:
    """Return True if no other file has got the number of a stream that was closed."""
    folder = Path(f"/proc/{command.process.pid}/fd")
    closed = [number for number, what in streams.items() if what == "closed"]
    return all((folder / str(number)).readlink() == Path(os.devnull) for number in closed)


# ---------------------------------------------------------------------- output that is the result


TOKENS = ("cloud_server", "token", "list")


@pytest.mark.parametrize("stdout", ["/dev/full", "closed", "no reader"])
def test_token_that_nobody_has_seen_is_revoked(stdout: str, tmp_path: Path) -> None:
    where = ("--state-dir", tmp_path / "server")
    create = forked("cloud_server", "token", "create", *where, folder=tmp_path, streams={1: stdout})
    assert create.wait() == 1
    (made, line) = create.output.splitlines()
    assert made.startswith("made a CA in ")
    assert line.startswith("cloud-server: stdout cannot be written: ")
    assert line.endswith("; the new token, which nobody has seen, is revoked")
    listed = forked(*TOKENS, *where, folder=tmp_path)
    assert listed.wait() == 0
    assert [row.split()[-1] for row in listed.output.splitlines()] == ["state", "revoked"]


def test_server_whose_first_token_nobody_has_seen_says_how_to_make_another(cluster: Cluster) -> None:
    cluster.http_port = free_port()
    server = cluster.server(*QUICK, "--min-agents", 1, ready=False, streams={1: "/dev/full"})
    until(lambda: get(cluster.http_port, "/readyz") == "ready\n", server)
    (line,) = (line for line in server.output.splitlines() if "join_token_not_shown" in line)
    assert f"cloud-server token create --uses 1 --state-dir {cluster.state_dir}" in line
    assert "ecavg1." not in server.output
    listed = forked(*TOKENS, "--state-dir", cluster.state_dir, folder=cluster.folder)
    assert (listed.wait(), "revoked" in listed.output) == (0, True)
    assert server.terminate() == 0


# ---------------------------------------------------------------------- the sweep


# None stands for a variable that is not set.
ENVIRONMENTS: dict[str, dict[str, str | None]] = {
    "as usual": {},
    "no HOME": {"HOME": None},
    "empty HOME": {"HOME": ""},
    "HOME that is not there": {"HOME": "/nowhere"},
    "HOME that cannot be written": {"HOME": "/proc"},
    "TMPDIR that is not there": {"TMPDIR": "/nowhere"},
    "TMPDIR that cannot be written": {"TMPDIR": "/proc"},
    "empty variables": {
        "ECAVG_SERVER_STATE_DIR": "", "ECAVG_SERVER_TLS_DIR": "", "ECAVG_SERVER_HTTP_TOKEN_FILE": "",
        "ECAVG_SERVER_PORT": "", "ECAVG_SERVER_RUN__SEED": "", "ECAVG_AGENT_STATE_DIR": "",
        "ECAVG_AGENT_AGENT_ID": "", "ECAVG_AGENT_DATA": "", "ECAVG_AGENT_JOIN_TOKEN_FILE": "",
        "ECAVG_AGENT_ALLOW_FACTORY": "", "ECAVG_AGENT_METRICS_PORT": "", "ECAVG_CRASH_AT": "",
        "TMPDIR": "", "XDG_CACHE_HOME": "", "TORCH_HOME": "",
    },
}  # fmt: skip
STREAMS: dict[str, dict[int, str]] = {
    **{f"closed {number}": {number: "closed"} for number in (0, 1, 2)},
    "closed 1 and 2": {1: "closed", 2: "closed"},
    "closed all": {0: "closed", 1: "closed", 2: "closed"},
    "full stdout": {1: "/dev/full"},
    "full stderr": {2: "/dev/full"},
    "full both": {1: "/dev/full", 2: "/dev/full"},
    "stdout without reader": {1: "no reader"},
    "both without reader": {1: "no reader", 2: "no reader"},
}


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return the folder of a server that has published a round of one agent."""
    with cluster_in(tmp_path_factory.mktemp("used")) as cluster:
        server = cluster.server("--min-agents", 1, *QUICK)
        agent = cluster.agent("edge-1", "--partition", "1/1")
        assert (agent.wait(), server.wait()) == (0, 0)
        yield cluster.state_dir


def forked(*words: object, folder: Path, **options: Any) -> Command:
    module, *args = words
    return Command(str(module), *args, folder=folder / "logs", forked=True, **options)


def commands(used: Path, folder: Path) -> dict[tuple[object, ...], int]:
    """Return commands that end by themselves, and the exit codes that each has where nothing is odd."""
    server, agent = ("--state-dir", used), ("--server", "127.0.0.1:1", "--state-dir", folder / "agent")
    return {
        ("cloud_server", "--help"): 0,
        ("cloud_server", "check", used): 0,
        ("cloud_server", "token", "create", *server): 0,
        ("cloud_server", "token", "list", *server): 0,
        ("cloud_server", "agents", "list", *server): 0,
        ("cloud_server", "token", "revoke", "nobody", *server): 2,
        ("cloud_server", "forget", "nobody", *server): 2,
        ("cloud_server", "--host", "127.0.0.1", "--port", 1, "--state-dir", "/proc/server"): 2,
        ("edge_agent", "--help"): 0,
        ("edge_agent", *agent): 2,
        ("edge_agent", "enroll", *agent, "--token", "ecavg1.x"): 2,
        ("cloud_server.trainer",): 2,
    }


def check_manners(output: str) -> None:
    """Check that a command has neither shown its inside nor blamed itself."""
    for text in ("Traceback", "a fault of this program", "Exception ignored", "Error: "):
        assert text not in output, output


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_commands_work_in_any_environment(name: str, used: Path, tmp_path: Path) -> None:
    env = ENVIRONMENTS[name]
    started = {
        command: (forked(*words, folder=tmp_path, env=env), code)
        for command, (words, code) in enumerate(commands(used, tmp_path).items())
    }
    for command, code in started.values():
        assert command.wait() == code, command.output
        check_manners(command.output)
        if code:
            (line,) = (each for each in command.output.splitlines() if not each.startswith(("usage", " ")))
            assert line.startswith(("cloud-server", "edge-agent", "python -m cloud_server.trainer"))
