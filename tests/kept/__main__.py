"""Makes the archive of a release: a server after one round, in the middle of the next, and its two agents.

The first agent has contributed to the open round. The second one died after the server had acknowledged its
report on the first round, and before it had noted that.
"""

import argparse
import json
import sqlite3
import tarfile
import tempfile
from contextlib import closing
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

from ecavg.cloud_server.state_dir import StateDir
from ecavg.common import tls
from ecavg.common.faults import Point
from tests.kept import AGENTS, FOLDER
from tests.processes import Cluster, cluster_in, until

SERVER_TOML = """\
min_agents = 2
rounds = 2

[run]
model = "mlp"
hidden_units = 8
dataset = "digits"
num_partitions = 6

[run.pretrain]
epochs = 2

[run.fine_tune]
epochs = 2
"""
# What a start makes by itself, or what depends on the machine.
LEFT_OUT = {"lock", "trainer.log", "precision.json"}


def main() -> None:
    """Make the archive of the version that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m tests.kept", description=__doc__)
    parser.add_argument("version", help="must be that of the installed package")
    asked, installed = parser.parse_args().version, version("ecavg")
    if asked != installed:
        parser.error(f"{installed} is installed here")
    archive = FOLDER / f"{asked}.tar.gz"
    if archive.exists():
        parser.error(f"{archive} is there, and stays as it is")
    with tempfile.TemporaryDirectory() as folder, cluster_in(Path(folder)) as cluster:
        (cluster.folder / "server.toml").write_text(SERVER_TOML, "utf-8")
        fill(cluster)
        pack(cluster.folder, archive)
    print(f"{archive}: {archive.stat().st_size} bytes")


def fill(cluster: Cluster) -> None:
    """Run the server and both agents until their folders are as this module says."""
    # The certificates hold for as long as there may be releases.
    tls.AGENT_LIFETIME = timedelta(days=365 * 100)
    for name in AGENTS:
        cluster.enroll(name)
    server = cluster.server("--config", cluster.folder / "server.toml")
    first, second = AGENTS
    staying = cluster.agent(first)
    dying = cluster.agent(
        second, env={"ECAVG_CRASH_AT": f"{Point.AGENT_REPORTED}:1:{cluster.folder / 'died'}"}
    )
    dying.process.wait()
    progress = cluster.folder / first / "progress.json"
    until(lambda: json.loads(progress.read_text("utf-8"))["contributed_round"] == 2, staying)
    staying.terminate()
    server.terminate()
    with closing(sqlite3.connect(StateDir(cluster.state_dir).database)) as database:
        assert database.execute("SELECT agent_id FROM contributions WHERE round = 2").fetchall() == [(first,)]


def pack(folder: Path, archive: Path) -> None:
    """Write the folders of server and agents, and the configuration, to an archive."""

    def kept(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        member.uid = member.gid = 0
        member.uname = member.gname = ""
        return None if Path(member.name).name in LEFT_OUT else member

    with tarfile.open(archive, "w:gz") as tar:
        for name in ("server.toml", "server", *AGENTS):
            tar.add(folder / name, name, filter=kept)


if __name__ == "__main__":
    main()
