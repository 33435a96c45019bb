"""Wall clocks that are wrong: real servers and devices, each with a clock of its own that the test sets."""

import re
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from ecavg.cloud_server.door.authority import Authority
from ecavg.cloud_server.state_dir import StateDir
from ecavg.common import tls
from tests.conftest import need
from tests.processes import ROOT, Cluster, Command, cluster_in, free_port
from tests.soak import others_soak
from tests.zygote import IS_COLD

DAY = 86400
YEAR = 365.25 * DAY
QUICK = ("--rounds", 1, "--set", "run.pretrain.epochs=1", "--set", "run.fine_tune.epochs=1")


class Clock:
    """The clock of the processes that get its environment; the test may set the clock while they run."""

    def __init__(self, library: Path, file: Path, ahead_seconds: float) -> None:
        self._file = file
        self.set(ahead_seconds)
        self.env = {"LD_PRELOAD": str(library), "SHIFT_FILE": str(file)}

    def set(self, ahead_seconds: float) -> None:
        # The file keeps its place in the memory of the processes, so it is overwritten and not replaced.
        with self._file.open("r+b" if self._file.exists() else "wb") as file:
            file.write(struct.pack("q", int(ahead_seconds)))


class Clocks:
    """The maker of clocks for the processes of one test."""

    def __init__(self, library: Path, folder: Path) -> None:
        self._library, self._folder = library, folder
        self._num_made = 0

    def ahead(self, seconds: float) -> Clock:
        self._num_made += 1
        return Clock(self._library, self._folder / f"clock-{self._num_made}", seconds)

    def in_1970(self) -> Clock:
        return self.ahead(1000 - time.time())


class TimedCluster(Cluster):
    """A cluster whose processes may have clocks of their own; such a process is started, not forked."""

    def _start(
        self,
        module: str,
        *args: object,
        env: Mapping[str, str] | None,
        forked: bool = not IS_COLD,
        **options: Any,
    ) -> Command:
        has_clock = "LD_PRELOAD" in (env or {})
        return super()._start(module, *args, env=env, forked=forked and not has_clock, **options)


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    need("C compiler", shutil.which("cc"), "gcc")
    made = tmp_path_factory.mktemp("shift") / "shift.so"
    source = ROOT / "tests/shift.c"
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", made, source, "-ldl"], check=True)
    return made


@pytest.fixture
def clocks(library: Path, tmp_path: Path) -> Clocks:
    return Clocks(library, tmp_path)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with cluster_in(tmp_path, TimedCluster) as cluster:
        yield cluster


def run(*command: object, clock: Clock | None = None) -> tuple[int, str, str]:
    """Run a command to its end, and return its exit code, its output and its errors."""
    words = [sys.executable, "-m", *map(str, command)]
    env = {"PATH": "/usr/bin:/bin", **(clock.env if clock else {})}
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def put_ca(folder: Path, *days: float) -> None:
    """Put a CA there as an operator does, valid from so many days from now until so many."""
    starts, ends = (datetime.now(UTC) + timedelta(days=each) for each in days)
    key = tls.new_key()
    extensions = tls._authority_extensions()
    ca = tls._sign("our own", key.public_key(), "our own", key, (starts, ends), *extensions)
    tls.make_private_folder(folder)
    tls.write_private(folder / "ca.key", tls.pem(key))
    tls.write_private(folder / "ca.pem", tls.pem(ca))


def enroll_before(cluster: Cluster, name: str, *, days: float) -> None:
    """Enroll an agent as it was done so many days ago."""
    key, at = tls.new_key(), time.time() - days * DAY
    with closing(Authority(StateDir(cluster.state_dir).tls, lambda: at)) as authority:
        token = tls.JoinToken.parse(authority.create_token(1, 3600))
        certificate = authority.enroll(token.token_id, tls.make_request(key, name))
        both = certificate + authority.ca_certificate
    folder = cluster.folder / name / "tls"
    tls.make_private_folder(folder)
    tls.write_private(folder / "key.pem", tls.pem(key))
    tls.write_private(folder / "identity.pem", both)


def day(ahead_days: float = 0) -> str:
    return f"{datetime.now(UTC) + timedelta(days=ahead_days):%Y-%m-%d}"


def assert_no_fault(*commands: Command) -> None:
    for command in commands:
        assert "Traceback" not in command.output
        assert "fault of this program" not in command.output


# ---------------------------------------------------------------------- a device's clock


@pytest.mark.soak
def test_device_with_a_wrong_clock_enrolls_takes_part_and_says_how_far_off(
    cluster: Cluster, clocks: Clocks
) -> None:
    server = cluster.server("--min-agents", 3, "--max-agents", 3, *QUICK)
    token = ("--join-token-file", cluster.join_token(3))
    behind = cluster.agent("behind", "--partition", "1/3", *token, env=clocks.ahead(-3 * DAY).env)
    epoch = cluster.agent("epoch", "--partition", "2/3", *token, env=clocks.in_1970().env)
    ahead = cluster.agent("ahead", "--partition", "3/3", *token, env=clocks.ahead(10 * YEAR).env)
    years = round(time.time() / YEAR)
    said_by = {behind: "3 days behind", epoch: f"{years} years behind", ahead: "10 years ahead of"}
    for agent, said in said_by.items():
        line = f"this device's clock is {said} the server's: set it (timedatectl set-ntp true)"
        agent.wait_for(re.escape(line))
        assert agent.wait() == 0
        assert agent.output.count("this device's clock") == 1
    assert server.wait() == 0
    assert "WARNING" not in server.output


def test_enrolment_says_how_far_off_the_clock_of_the_device_is(cluster: Cluster, clocks: Clocks) -> None:
    cluster.server("--min-agents", 1000)
    device = ("--server", f"127.0.0.1:{cluster.port}", "--state-dir", cluster.folder / "edge-1")
    token = ("--token", cluster.join_token(1).read_text("utf-8"))
    code, said, error = run("ecavg.edge_agent", "enroll", *device, *token, clock=clocks.ahead(-3 * DAY))
    assert (code, error) == (0, "")
    assert said.splitlines()[0] == (
        "this device's clock is 3 days behind the server's: set it (timedatectl set-ntp true)"
    )
    assert f"until {day(90)}; it renews itself" in said


@pytest.mark.soak
def test_device_whose_clock_is_past_the_end_of_the_ca_waits_until_it_is_set(
    cluster: Cluster, clocks: Clocks
) -> None:
    """An operator's CA ends, and with it the certificate of the server: nobody is told to enroll anew."""
    put_ca(StateDir(cluster.state_dir).tls, -100, 400)
    server = cluster.server("--min-agents", 2, "--max-agents", 2, *QUICK)
    clock = clocks.ahead(10 * YEAR)
    token = ("--join-token-file", cluster.join_token(1))
    newcomer = cluster.agent("newcomer", "--partition", "1/2", *token, env=clock.env)
    enrolled = cluster.agent("enrolled", "--partition", "2/2", env=clock.env)
    said = f"this device's clock says {day(10 * 365.25)}, and the server's certificate is valid from"
    for agent in (newcomer, enrolled):
        agent.wait_for(rf"{said} \S+ until {day(400)}: set the clock \(timedatectl set-ntp true\)")
        assert "enroll" not in agent.output.replace("enrolled", "")
    clock.set(0)
    assert (newcomer.wait(), enrolled.wait(), server.wait()) == (0, 0, 0)
    assert_no_fault(newcomer, enrolled, server)


def test_agent_whose_certificate_has_ended_says_how_to_enroll_or_does_so_with_its_token(
    cluster: Cluster,
) -> None:
    enroll_before(cluster, "edge-1", days=100)
    enroll_before(cluster, "edge-2", days=100)
    server = cluster.server("--min-agents", 1, "--max-agents", 1, *QUICK)
    agent = cluster.agent("edge-1", "--partition", "1/1")
    assert agent.wait() == 2
    assert agent.output.splitlines()[-1] == (
        f"edge-agent: this agent's certificate ended on {day(-10)}, by the server's clock and by this"
        f" device's ({day()}): run `edge-agent enroll --server 127.0.0.1:{cluster.port} --state-dir"
        f" {cluster.folder / 'edge-1'} --token TOKEN`, with a token of `cloud-server token create`"
    )
    again = cluster.agent("edge-2", "--partition", "1/1", "--join-token-file", cluster.join_token(1))
    assert (again.wait(), server.wait()) == (0, 0)


# ---------------------------------------------------------------------- the server's clock


@pytest.mark.soak
def test_agent_whose_certificate_has_ended_by_a_server_that_is_ahead_waits_for_it(
    cluster: Cluster, clocks: Clocks
) -> None:
    cluster.enroll("edge-1")
    clock = clocks.ahead(200 * DAY)
    server = cluster.server("--min-agents", 1, "--max-agents", 1, *QUICK, env=clock.env)
    agent = cluster.agent("edge-1", "--partition", "1/1")
    agent.wait_for(
        f"the server turns this agent's certificate away, which is valid until {day(90)}, while this device's"
        f" clock says {day()}: set the clock that is wrong"
    )
    clock.set(0)
    assert (agent.wait(), server.wait()) == (0, 0)


@pytest.mark.parametrize("first", others_soak(["1970", "ten years ahead"], ["1970"]))
def test_server_first_started_with_a_wrong_clock_serves_after_it_is_set(
    cluster: Cluster, clocks: Clocks, first: str
) -> None:
    flags = ("--deadline-seconds", 3600, "--on-too-few", "fail", "--min-agents", 2, "--max-agents", 2, *QUICK)
    clock = clocks.in_1970() if first == "1970" else clocks.ahead(10 * YEAR)
    server = cluster.server(*flags, env=clock.env)
    assert ("WARNING: this machine's clock says 1970-01-01" in server.output) == (first == "1970")
    assert server.terminate() == 0

    where = ("--state-dir", cluster.state_dir)
    code, token, said = run("ecavg.cloud_server", "token", "create", *where)
    assert (code, "records reach to" in said) == (0, first != "1970")
    (cluster.folder / "own-token").write_text(token, "utf-8")
    server = cluster.server(*flags)
    assert ("the server's records reach to" in server.output) == (first != "1970")
    printed = re.search(r"ecavg1\.\S+", server.output)
    assert printed
    (cluster.folder / "printed-token").write_text(printed[0], "utf-8")
    agents = [
        cluster.agent(name, "--partition", part, "--join-token-file", cluster.folder / f"{name}-token")
        for name, part in (("own", "1/2"), ("printed", "2/2"))
    ]
    assert [agent.wait() for agent in agents] == [0, 0]
    assert server.wait() == 0
    assert_no_fault(server, *agents)


@pytest.mark.soak
def test_ca_of_ones_own_that_is_not_valid_is_told_in_one_line_and_waited_for(
    cluster: Cluster, clocks: Clocks
) -> None:
    folder = StateDir(cluster.state_dir).tls
    put_ca(folder, 100, 400)
    line = (
        f"{folder / 'ca.pem'} is valid from {day(100)} until {day(400)}, and this machine's clock says"
        f" {day()}: set the clock (timedatectl set-ntp true), or put another CA there\n"
    )
    clock = clocks.ahead(0)
    server = cluster.server("--min-agents", 1, env=clock.env, ready=False)
    server.wait_for(re.escape(f"WARNING: waiting: {line}"))
    refused = run("ecavg.cloud_server", "token", "create", "--state-dir", cluster.state_dir)
    assert refused == (2, "", f"cloud-server: {line}")
    clock.set(200 * DAY)
    server.wait_for("cloud-server ready")
    assert server.terminate() == 0
    assert_no_fault(server)


def test_doctor_tells_a_clock_that_is_wrong(clocks: Clocks, tmp_path: Path) -> None:
    flags = ("--server", f"127.0.0.1:{free_port()}", "--state-dir", tmp_path / "edge-1")
    code, output, _ = run("ecavg.edge_agent", "doctor", *flags, clock=clocks.in_1970())
    (line,) = (line for line in output.splitlines() if " clock: " in line)
    assert code == 1
    assert re.fullmatch(
        r"wrong  clock: this machine's clock says 1970-01-01, and this version was made on \S+:"
        r" set the clock \(timedatectl set-ntp true\)",
        line,
    )
