"""Data as devices in the field have them, by real processes: tables with bad rows, and recordings."""

from pathlib import Path
from typing import Any

import numpy as np

from tests.conftest import need
from tests.integration.test_pictures import events_of
from tests.processes import Cluster

TRAINED = """
epochs = 3
batch_size = 16
optimizer = "adam"
learning_rate = 0.01
"""
RATE = 800


def config(folder: Path, run: str) -> Path:
    """Write a server's configuration with this [run] table."""
    path = folder / "server.toml"
    path.write_text(f"[run]\n{run}\n[run.pretrain]{TRAINED}\n[run.fine_tune]{TRAINED}")
    return path


def skipped(events: list[dict[str, Any]], event: str) -> list[tuple[int, str]]:
    return [(each["num_skipped"], each["first"]) for each in events if each["event"] == event]


def write_pumps(path: Path, seed: int, bad: str) -> Path:
    """Write a table of pumps that are worn where it is hot; its eighth line is bad."""
    rng = np.random.default_rng(seed)
    pumps = rng.normal(size=(200, 2))
    rows = [f"{flow:.3f},{heat:.3f},{'worn' if heat > 0 else 'fine'}" for flow, heat in pumps]
    rows.insert(6, bad)
    path.write_text("\n".join(["flow,heat,state", *rows]) + "\n")
    return path


def test_tables_of_two_devices_are_learnt_and_bad_rows_are_named(cluster: Cluster) -> None:
    run = 'dataset = "pumps"\nnum_classes = 2\nmodel = "mlp"\ninputs = { shape = [2] }'
    server = cluster.server("--min-agents", 2, "--config", config(cluster.folder, run))
    columns = ("--data-inputs", "heat", "--data-inputs", "flow", "--data-target", "state")
    tables = [
        write_pumps(cluster.folder / "pumps-1.csv", 1, "0.5,,worn"),
        write_pumps(cluster.folder / "pumps-2.csv", 2, "0.5,1.5"),
    ]
    agents = [
        cluster.agent(f"edge-{number}", "--data", table, *columns) for number, table in enumerate(tables, 1)
    ]
    assert [agent.wait() for agent in agents] == [0, 0]
    assert server.wait() == 0
    report = cluster.report()
    assert report["outcome"] == "published"
    assert [each["name"] for each in report["classes"]] == ["fine", "worn"]
    assert report["accuracy_published"] > 0.8
    reasons = ("heat is '', which is no number", "it has more or fewer cells than the first line")
    for agent, table, reason in zip(agents, tables, reasons, strict=True):
        found = skipped(events_of(agent), "rows_skipped")
        assert found == [(1, f"{table}, line 8: {reason}")]


def write_sounds(folder: Path) -> Path:
    """Write recordings of a low and of a high tone, one of which is too short."""
    import soundfile

    rng = np.random.default_rng(0)
    for name, hertz in (("high", 90), ("low", 30)):
        (folder / f"train/{name}").mkdir(parents=True)
        for number in range(20):
            time = np.arange(RATE // 2) / RATE + rng.random()
            sound = np.sin(2 * np.pi * hertz * time) * 0.5 + rng.normal(0, 0.1, len(time))
            soundfile.write(folder / f"train/{name}/{number}.wav", sound, RATE, "PCM_16")
    soundfile.write(folder / "train/low/short.wav", np.zeros(7), RATE)
    return folder


def test_recordings_are_learnt_where_their_package_is_installed(cluster: Cluster) -> None:
    try:
        import soundfile
    except (ImportError, OSError):
        soundfile = None
    need("soundfile", soundfile, "soundfile")
    run = (
        'dataset = "tones"\nnum_classes = 2\nmodel = "cnn1d"\n'
        "inputs = { shape = [1, 100], overlap = 1, low = -1, high = 1 }"
    )
    server = cluster.server("--min-agents", 1, "--config", config(cluster.folder, run))
    folder = write_sounds(cluster.folder / "tones")
    form = ("--data-sample-rate", RATE, "--data-window", 100, "--data-stride", 50, "--max-bad-rows", 0.1)
    absent = cluster.folder / "absent"
    absent.mkdir()
    (absent / "soundfile.py").write_text("raise ImportError")
    refused = cluster.agent("edge-1", "--data", folder, *form, env={"PYTHONPATH": str(absent)})
    assert refused.wait() == 2
    assert refused.output.splitlines()[-1] == (
        f"edge-agent: data source {folder} needs soundfile: pip install 'ecavg[audio]'"
    )
    agent = cluster.agent("edge-1", "--data", folder, *form)
    assert (agent.wait(), server.wait()) == (0, 0)
    assert cluster.report()["accuracy_published"] > 0.8
    assert skipped(events_of(agent), "recordings_skipped") == [
        (1, f"{folder}/train/low/short.wav: it has 7 samples, a window 100")
    ]
