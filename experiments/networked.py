"""A comparison of one round of real processes with the same round in one process, without a network."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ecavg.cloud_server.jobs import TRAINED
from ecavg.cloud_server.state_dir import StateDir
from ecavg.common.config import RunConfig
from ecavg.common.errors import RunError
from experiments import data
from experiments.cell import Cell, Record
from experiments.demo import describe, environment, free_ports, join_token
from experiments.round import agent_ids
from experiments.tables import figure, grid
from experiments.tasks import DEFAULT, VARIANTS, Setting

_DEADLINE_SECONDS = 86_400
_POLL_SECONDS = 0.2


def compare(cell: Cell, folder: Path, on_state: Callable[[str], None] = lambda _: None) -> str:
    """Do the cell's round with real processes, and compare the published models and all figures.

    Args:
        folder: the folder for the processes' files; an old folder is replaced.
        on_state: called now and then with one line about the state of the run.

    Returns:
        The comparison as Markdown.

    Raises:
        RunError: a process failed.
    """
    setting, here = cell.setting, cell.record(DEFAULT)
    assert here, f"{cell.path} lacks {DEFAULT}"
    run = setting.run_of(VARIANTS[DEFAULT])
    data.choose(setting.data, setting.num_examples, setting.num_test, run.seed)
    _run_round(setting, run, cell.device, folder, on_state)
    report = json.loads((StateDir(folder / "server").report(1)).read_text("utf-8"))
    return _in_words(setting, here["rounds"][0], report)


def _run_round(
    setting: Setting, run: RunConfig, device: str, folder: Path, on_state: Callable[[str], None]
) -> None:
    """Start the processes, and wait until all of them have ended; on an error, end them."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "run.toml").write_text(_toml(run), "utf-8")
    port, http_port = free_ports(2)
    agents, count = agent_ids(setting.num_agents), str(setting.num_agents)
    commands = {
        "server": [
            "ecavg.cloud_server", "--config", str(folder / "run.toml"), "--rounds", "1", "--device", device,
            "--host", "127.0.0.1", "--port", str(port), "--http-port", str(http_port),
            "--min-agents", count, "--deadline-seconds", str(_DEADLINE_SECONDS),
        ]
    }  # fmt: skip
    token = join_token(folder / "server", uses=setting.num_agents)
    for number, agent_id in enumerate(agents, 1):
        commands[agent_id] = [
            "ecavg.edge_agent", "--server", f"127.0.0.1:{port}", "--agent-id", agent_id, "--device", device,
            "--data", data.FACTORY, "--partition", f"{number}/{count}", "--join-token-file", str(token),
        ]  # fmt: skip
    with ExitStack() as stack:
        processes = {}
        for name, command in commands.items():
            log = stack.enter_context((folder / f"{name}.log").open("wb"))
            words = [sys.executable, "-m", *command, "--state-dir", str(folder / name)]
            process = stack.enter_context(
                subprocess.Popen(words, stdout=log, stderr=log, env=environment(), start_new_session=True)
            )
            stack.callback(process.terminate)
            processes[name] = process
        while any(process.poll() is None for process in processes.values()):
            if failed := [name for name, process in processes.items() if process.poll()]:
                raise RunError(f"{failed[0]} failed: see {folder}/{failed[0]}.log")
            on_state(describe(http_port))
            time.sleep(_POLL_SECONDS)


def _toml(run: RunConfig) -> str:
    """Return the `[run]` table as the text of a configuration file."""
    values: dict[str, Any] = run.model_dump(mode="json", exclude_none=True)
    names = [name for name, value in values.items() if isinstance(value, dict)]
    tables = {f"run.{name}": values.pop(name) for name in names}
    lines = []
    for name, table in {"run": values, **tables}.items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    # The JSON of such values is also valid TOML.
    return "\n".join(lines) + "\n"


def _in_words(setting: Setting, here: Record, report: Record) -> str:
    is_same = here["digest"] == report["weights"]["sha256"]
    agents = {agent["agent_id"]: agent for agent in report["agents"]}
    held_out = report["candidates"] | {name: report.get(f"accuracy_{name}") for name in TRAINED}
    rows = [
        ["published, SHA-256", here["digest"][:16], report["weights"]["sha256"][:16]],
        ["start", here["start"], report["start"]],
        *([name, figure(value), figure(held_out.get(name))] for name, value in here["held_out"].items()),
    ]
    for edge in here["edges"]:
        agent = agents[edge["agent_id"]]
        for name, key in (("before", "own_before"), ("after", "own_after")):
            values = edge[key], agent.get(f"accuracy_{name}")
            rows.append([f"{edge['agent_id']}, {name}", *map(figure, values)])
    seconds = ", ".join(f"{name} {value:.1f}" for name, value in report["seconds"].items())
    return "\n\n".join(
        [
            f"# {setting.task}: one round with real processes",
            f"The published models are {'the same, bit for bit' if is_same else 'NOT the same'}."
            f" Setting: {setting.name}. Candidates and fine-tuned: accuracy on the cloud's held-out part;"
            " agents: on their own.",
            grid(["", "without a network", "with"], rows),
            f"Seconds: {seconds}.",
        ]
    )
