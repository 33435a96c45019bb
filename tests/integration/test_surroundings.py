"""What the surroundings give: homes, environments, descriptors, disks and files of other systems.

No command may end with a traceback, nor blame itself: each says in one line what the user can mend, or works.
"""

import os
import pty
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from ecavg.cloud_server.door.authority import Authority
from ecavg.cloud_server.state_dir import StateDir
from tests.conftest import need
from tests.faults.test_disk import fill, mount
from tests.integration.test_round import QUICK
from tests.processes import ROOT, Cluster, Command, cluster_in, enroll, free_port, until
from tests.soak import others_soak

SERVER, AGENT, TRAINER = "ecavg.cloud_server", "ecavg.edge_agent", "ecavg.cloud_server.trainer"
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


NO_LOG = ({2: "/dev/full"}, {1: "no reader", 2: "no reader"}, {0: "closed", 1: "closed", 2: "closed"})


@pytest.mark.parametrize("streams", others_soak(NO_LOG, NO_LOG[:1]), ids=["full disk", "no reader", "closed"])
def test_run_goes_on_where_no_log_can_be_written(cluster: Cluster, streams: Mapping[int, str]) -> None:
    """Server, agent and trainer take six rounds to their end, and count what they could not say."""
    cluster.state_dir.mkdir()
    StateDir(cluster.state_dir).trainer_log.symlink_to("/dev/full")
    cluster.port, cluster.http_port, agent_port = free_port(), free_port(), free_port()
    server = cluster.server("--min-agents", 1, "--rounds", 6, *QUICK, ready=False, streams=streams)
    until(lambda: get(cluster.http_port, "/readyz") == "ready\n", server)
    assert no_file_has_a_standard_number(server, streams)
    agent = cluster.agent(
        "edge-1", "--partition", "1/1", "--metrics-port", agent_port, "--share-data", "none", streams=streams
    )
    until(lambda: num_dropped(agent_port), agent)
    assert num_dropped(cluster.http_port)
    assert no_file_has_a_standard_number(agent, streams)
    assert (agent.wait(), server.wait()) == (0, 0)
    assert [cluster.report(number)["outcome"] for number in range(1, 7)] == ["published"] * 6


def test_run_goes_on_when_the_terminal_with_its_bars_has_gone(cluster: Cluster) -> None:
    ours, theirs = pty.openpty()
    server = cluster.server("--min-agents", 1, *QUICK, streams={2: os.ttyname(theirs)})
    for each in (ours, theirs):
        os.close(each)
    agent = cluster.agent("edge-1", "--partition", "1/1")
    assert (agent.wait(), server.wait()) == (0, 0)
    assert cluster.report()["outcome"] == "published"


def no_file_has_a_standard_number(command: Command, streams: Mapping[int, str]) -> bool:
    """Return True if no other file has got the number of a stream that was closed."""
    folder = Path(f"/proc/{command.process.pid}/fd")
    closed = [number for number, what in streams.items() if what == "closed"]
    return all((folder / str(number)).readlink() == Path(os.devnull) for number in closed)


# ---------------------------------------------------------------------- output that is the result


TOKENS = (SERVER, "token", "list")


@pytest.mark.parametrize("stdout", ["/dev/full", "closed", "no reader"])
def test_token_that_nobody_has_seen_is_revoked(stdout: str, tmp_path: Path) -> None:
    where = ("--state-dir", tmp_path / "server")
    create = forked(SERVER, "token", "create", *where, folder=tmp_path, streams={1: stdout})
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
    """Return commands that end by themselves, and the exit code of each where nothing is odd.

    Those with the code 0 print a result on stdout, the others an error on stderr.
    """
    server, agent = ("--state-dir", used), ("--server", "127.0.0.1:1", "--state-dir", folder / "agent")
    return {
        (SERVER, "--help"): 0,
        (SERVER, "check", used): 0,
        (SERVER, "status", "--server-url", "nowhere"): 2,
        (SERVER, "token", "create", *server): 0,
        (SERVER, "token", "list", *server): 0,
        (SERVER, "agents", "list", *server): 0,
        (SERVER, "token", "revoke", "nobody", *server): 2,
        (SERVER, "forget", "nobody", *server): 2,
        (SERVER, "--host", "127.0.0.1", "--port", 1, "--state-dir", "/proc/server"): 2,
        (AGENT, "--help"): 0,
        (AGENT, *agent): 2,
        (AGENT, "enroll", *agent, "--token", "ecavg1.x"): 2,
        (TRAINER,): 2,
    }


def check_manners(output: str) -> None:
    """Check that a command has neither shown its inside nor blamed itself."""
    for text in ("Traceback", "a fault of this program", "Exception ignored", "Error: "):
        assert text not in output, output


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_commands_work_in_any_environment(name: str, used: Path, tmp_path: Path) -> None:
    started = [
        (forked(*words, folder=tmp_path, env=ENVIRONMENTS[name]), code)
        for words, code in commands(used, tmp_path).items()
    ]
    for command, code in started:
        assert command.wait() == code, command.output
        check_manners(command.output)
        if code:
            check_one_line(command.output)


def check_one_line(output: str) -> None:
    """Check that a command has said one line, beside the usage that argparse shows."""
    (line,) = (each for each in output.splitlines() if not each.startswith(("usage", " ")))
    assert line.startswith(("cloud-server", "edge-agent", "python -m ecavg.cloud_server.trainer"))


@pytest.mark.parametrize("name", STREAMS)
def test_commands_fail_only_where_a_result_is_lost(name: str, used: Path, tmp_path: Path) -> None:
    streams = STREAMS[name]
    started = [
        (forked(*words, folder=tmp_path, streams=streams), code or int(1 in streams))
        for words, code in commands(used, tmp_path).items()
    ]
    for command, code in started:
        assert command.wait() == code, command.output
        check_manners(command.output)
        if code == 1 and 2 not in streams:
            check_one_line(command.output)
            assert "stdout cannot be written" in command.output


# ---------------------------------------------------------------------- no home, odd names, other systems


# There is no home, no PATH and no LANG, but what other programs have set, and what Compose passes empty.
BARE = {
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "PROMETHEUS_MULTIPROC_DIR": "/nowhere",
    "SSLKEYLOGFILE": "/nowhere/keys",
    "WEB_CONCURRENCY": "auto",
    **dict.fromkeys(("HOME", "GRPC_VERBOSITY", "OMP_WAIT_POLICY", "TMPDIR", "TORCH_LOGS", "WORLD_SIZE"), ""),
}
# In a user namespace a process may have an id that no file knows, as with `docker run --user 12345`.
NOBODY = ("unshare", "--user", "--map-user=12345", "--map-group=12345")


@contextmanager
def cold(*words: object, cwd: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command as a user whom no file knows, and kill it at the end."""
    process = subprocess.Popen(
        [*NOBODY, sys.executable, "-m", *map(str, words)],
        cwd=cwd,
        env=BARE,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.soak
def test_user_without_a_home_takes_part_in_a_folder_of_any_name(tmp_path: Path) -> None:
    """Server, trainer and agent have default settings, and all files come from Windows."""
    need("user namespace", subprocess.run([*NOBODY, "true"], check=False).returncode == 0, "util-linux")
    folder = tmp_path / os.fsdecode(b"bl an\nk \xff \xe2\x98\x83")
    folder.mkdir()
    settings = 'min_agents = 1\r\nhost = "127.0.0.1"\r\nport = 0\r\nhttp_port = 0\r\nstate_dir = ""\r\n'
    settings += "[run.pretrain]\r\nepochs = 1\r\n"
    (tmp_path / "server.toml").write_bytes(settings.encode("utf-16"))
    with cold(SERVER, "--config", tmp_path / "server.toml", cwd=folder) as server:
        lines: list[str] = []
        while not (ready := re.search(r"ready: agents on (\S+),", line := server.stdout.readline().decode())):
            assert line, lines
            lines.append(line)
        token = re.search(r"ecavg1\.\S+", "".join(lines))[0]
        (tmp_path / "token").write_bytes(f"\r\n{token}\r\n\r\n".encode("utf-16"))
        agent_words = (
            AGENT, "--server", ready[1], "--join-token-file", tmp_path / "token", "--metrics-port", 0
        )  # fmt: skip
        with cold(*agent_words, cwd=folder) as agent:
            output = agent.stdout.read().decode()
            assert agent.wait(60) == 0, output
            check_manners(output)
        output = server.stdout.read().decode()
        assert server.wait(60) == 0, output
        check_manners(output)
    assert {path.name for path in folder.iterdir()} == {"ecavg-agent", "ecavg-server"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((SERVER, "--state-dir", "~/state"), "state_dir: the home folder in '~/state' is not known"),
        ((SERVER, "check", "~/state"), "the home folder in '~/state' is not known: set HOME"),
        ((SERVER, "--config", "~/c.toml"), "configuration file ~/c.toml: the home folder in"),
        ((AGENT, "--server", "a:1", "--data", "~/i"), "data: the home folder in '~/i' is not known"),
    ],
)  # fmt: skip
def test_home_that_is_not_known_is_named(words: tuple[str, ...], message: str, tmp_path: Path) -> None:
    need("user namespace", subprocess.run([*NOBODY, "true"], check=False).returncode == 0, "util-linux")
    with cold(*words, cwd=tmp_path) as process:
        output = process.stdout.read().decode()
        assert process.wait(60) == 2
    assert message in output
    check_one_line(output)
    assert list(tmp_path.iterdir()) == []


# An argument of bytes that are not UTF-8 reaches Python as a text that cannot be encoded.
ODD = os.fsdecode(b"\xff")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((SERVER, "--host", ODD), "host: should be at most 500 printable characters"),
        ((SERVER, "--http-host", ODD), "http_host: should be at most 500 printable characters"),
        ((SERVER, "--device", ODD), "device: should be at most 500 printable characters"),
        ((SERVER, "--tls-dir", "a\nb", "--http-token-file", "/proc", "--http-port", 0), "/proc"),
        ((SERVER, "token", "revoke", ODD), "argument ID: should be printable characters"),
        ((SERVER, "agents", "revoke", ODD), "argument AGENT: should be printable characters"),
        ((SERVER, "forget", ODD), "argument AGENT: should be printable characters"),
        ((SERVER, "check", f"/{ODD}\n"), "is no state directory"),
        ((AGENT, "--server", "a:1", "--data-dir", f"/{ODD}\n"), "does not exist: make it"),
        ((AGENT, "--server", "a:1", "--data", ODD), "is neither a folder nor a dataset"),
        ((AGENT, "--server", "a:1", "--device", ODD), "device: should be at most 500 printable"),
        ((AGENT, "enroll", "--server", "a:1", "--token", ODD), "should be at most 500 printable"),
        ((TRAINER, "--state-dir", "x", "--what", f"{ODD}\n"), "unrecognized arguments"),
    ],
)  # fmt: skip
def test_odd_names_are_named_in_one_line(words: tuple[object, ...], message: str, tmp_path: Path) -> None:
    command = forked(*words, folder=tmp_path, cwd=tmp_path)
    assert command.wait() == 2
    check_one_line(command.output)
    assert message in command.output


LOCALES = (
    {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    {"LANG": "C", "LC_ALL": "POSIX"},
    {"PYTHONIOENCODING": "ascii"},
    {"PYTHONIOENCODING": "latin-1:strict"},
)


@pytest.mark.parametrize(
    "env",
    others_soak(LOCALES, LOCALES[:1]),
    ids=lambda env: " ".join(f"{name}={value}" for name, value in env.items()),
)
def test_names_are_shown_in_any_locale(env: dict[str, str], tmp_path: Path) -> None:
    """Each command prints a path with a character that the encoding of its output does not have."""
    state = tmp_path / "☃"
    for words, code in (
        ((SERVER, "token", "create", "--state-dir", state), 0),
        ((SERVER, "agents", "list", "--state-dir", tmp_path / "❄"), 2),
        ((SERVER, "check", state), 2),
        ((AGENT, "--server", "127.0.0.1:1", "--state-dir", state), 2),
    ):
        command = Command(*map(str, words), folder=tmp_path / "logs", env=env)
        assert command.wait() == code, command.output
        check_manners(command.output)
        assert len(command.output.splitlines()) == (1 if code else 2)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("server.toml", "# Käse".encode("latin-1"), "is not UTF-8 text: save it as UTF-8"),
        ("server.toml", b"#" * (2**20 + 1), "has more than 1024 KiB: name the right file"),
        ("agent.toml", "# Käse".encode("latin-1"), "is not UTF-8 text: save it as UTF-8"),
        ("token", "ecavg1.ä".encode("latin-1"), "is not UTF-8 text: save it as UTF-8"),
        ("token", b"\r\n", "has no join tokens: write one there"),
        ("token", b"ecavg1.a\necavg1.b\n", "has 2 join tokens: write one there"),
        ("http-token", "geheimes Köfferchen".encode("latin-1"), "is not UTF-8 text: save it as UTF-8"),
        ("http-token", b"sixteen characters\nsixteen characters\n", "has 2 lines: write one token there"),
        ("identity.pem", "-----".encode("utf-16"), "cannot be used"),
    ],
)  # fmt: skip
def test_text_file_of_another_system_is_named(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    here = ("--server", "127.0.0.1:1", "--state-dir", tmp_path / "agent")
    if name == "identity.pem":
        enroll(tmp_path / "tls", tmp_path / "agent", "edge-1")
        (tmp_path / "agent/tls/identity.pem").write_bytes(content)
    words: tuple[object, ...] = {
        "server.toml": (SERVER, "--config", file),
        "agent.toml": (AGENT, *here, "--config", file),
        "token": (AGENT, "enroll", *here, "--join-token-file", file),
        "http-token": (SERVER, "--state-dir", tmp_path / "server", "--http-token-file", file),
        "identity.pem": (AGENT, *here),
    }[name]
    command = forked(*words, folder=tmp_path)
    assert command.wait() == 2, command.output
    check_one_line(command.output)
    assert name in command.output
    assert message in command.output


# ---------------------------------------------------------------------- no network, no room


@pytest.mark.parametrize("server", ["127.0.0.1:1", "nowhere.invalid:50051"])
@pytest.mark.parametrize("is_enrolled", [True, False])
def test_agent_without_a_network_waits_until_it_is_stopped(
    server: str, is_enrolled: bool, tmp_path: Path
) -> None:
    words: tuple[object, ...] = ("--server", server, "--state-dir", tmp_path / "agent")
    if is_enrolled:
        enroll(tmp_path / "tls", tmp_path / "agent", "edge-1")
    else:
        with closing(Authority(tmp_path / "tls")) as authority:
            words = ("enroll", *words, "--token", authority.create_token(1, 3600))
    agent = forked(AGENT, *words, folder=tmp_path)
    agent.wait_for(f"waiting for {re.escape(server)}: ")
    assert agent.terminate() == 0
    check_manners(agent.output)


@pytest.fixture
def small_disk(used: Path, tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 16 MiB that has a copy of the used state directory."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = mount("-t", "tmpfs", "-o", "size=16m", "tmpfs", disk)
    if mounted.returncode != 0:
        pytest.skip(f"mounting a small file system takes root: {mounted.stderr.strip()}")
    try:
        shutil.copytree(used, disk / "server")
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.mark.parametrize("what", ["full", "read-only"])
def test_disk_that_takes_nothing_is_named(what: str, small_disk: Path, tmp_path: Path) -> None:
    if what == "full":
        fill(small_disk)
    else:
        assert mount("-o", "remount,ro", small_disk).returncode == 0
    server = ("--state-dir", small_disk / "server")
    agent = ("--server", "127.0.0.1:1", "--state-dir", small_disk / "agent")
    token = "ecavg1." + "A" * 86
    started = [
        forked(*words, folder=tmp_path)
        for words in (
            (SERVER, *server, "--http-port", 0),
            (SERVER, "--state-dir", small_disk / "new", "--http-port", 0),
            (SERVER, "token", "create", *server),
            (SERVER, "agents", "list", *server),
            (SERVER, "forget", "edge-1", *server),
            (AGENT, *agent),
            (AGENT, "enroll", *agent, "--token", token),
        )
    ]
    for command in started:
        code = command.wait()
        check_manners(command.output)
        check_one_line(command.output)
        assert str(small_disk) in command.output
        # A full disk may have room at the next start, and a supervisor does not start again after a 2.
        assert code == 2 or (what == "full" and code == 1)
    check = forked(SERVER, "check", small_disk / "server", folder=tmp_path)
    assert check.wait() == 0, check.output


@pytest.mark.parametrize("words", [(SERVER,), (AGENT, "--server", "a:1")])
def test_working_folder_that_has_been_removed_is_named(words: tuple[str, ...], tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    done = subprocess.run(
        ["sh", "-c", 'rmdir "$PWD" && exec "$@"', "sh", sys.executable, "-m", *words],
        cwd=gone,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    check_one_line(done.stderr)
    assert "the working folder has been removed" in done.stderr


def test_agent_without_a_home_is_told_where_to_say_where_its_dataset_is(cluster: Cluster) -> None:
    cluster.server("--preset", "mnist-mlp", "--min-agents", 1)
    agent = cluster.agent("edge-1", env={"HOME": "relative"})
    assert agent.wait() == 2
    assert agent.output.splitlines()[-1] == (
        "edge-agent: there is no ~/.cache/ecavg, because this user has no home folder: name a folder for the"
        " datasets with --data-dir, or set HOME"
    )


def test_trainer_names_variables_that_are_not_those_of_torchrun(tmp_path: Path) -> None:
    words = (TRAINER, "--state-dir", tmp_path, "--device", "cpu")
    trainer = forked(*words, folder=tmp_path, env={"WORLD_SIZE": "2"})
    assert trainer.wait() == 2
    check_manners(trainer.output)
    assert (
        "trainer: the environment has WORLD_SIZE, but RANK, WORLD_SIZE, LOCAL_RANK are not" in trainer.output
    )


def test_certificate_without_its_ca_is_named(tmp_path: Path) -> None:
    enroll(tmp_path / "tls", tmp_path / "agent", "edge-1")
    file = tmp_path / "agent/tls/identity.pem"
    end = "-----END CERTIFICATE-----\n"
    file.write_text(file.read_text("utf-8").partition(end)[0] + end, "utf-8")
    agent = forked(AGENT, "--server", "a:1", "--state-dir", tmp_path / "agent", folder=tmp_path)
    assert agent.wait() == 2
    check_one_line(agent.output)
    assert f"{file} should have two certificates, and has 1" in agent.output


def test_host_whose_name_no_host_can_have_is_named(tmp_path: Path) -> None:
    words = (
        "--server",
        f"{'a' * 64}.b:1",
        "--state-dir",
        tmp_path / "agent",
        "--token",
        "ecavg1." + "A" * 86,
    )
    enrolment = forked(AGENT, "enroll", *words, folder=tmp_path)
    assert enrolment.wait() == 2
    check_one_line(enrolment.output)
