"""Each benchmark runs at its smallest, and what measures them measures."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks import figures
from benchmarks.processes import Meter, children, processes_in
from tests.processes import ROOT

pytestmark = pytest.mark.timeout(300)  # they start servers and agents, each of which imports PyTorch

SPREAD = {"median", "min", "max"}


def run(module: str, *args: object) -> dict[str, Any]:
    """Run a benchmark, and return the line of JSON that it prints.

    Some benchmarks leave their network namespace, so each runs in a process of its own.
    """
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{module}", *map(str, args)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    result: dict[str, Any] = json.loads(line)
    assert result["machine"]["cores"] >= 1
    return result


@pytest.mark.soak
def test_round_trip_measures_every_process_and_the_wire() -> None:
    result = run("round_trip", "--model", "tiny", "--agents", 1, "--rounds", 3)
    assert result["steady_rounds"] == 2
    assert set(result["processes"]) == {"cloud-server", "trainer", "agent-1"}
    assert all(usage["peak_mib"] > 10 for usage in result["processes"].values())
    assert 0 < result["wall_seconds"]["min"] <= result["wall_seconds"]["median"]
    if result["wire_bytes"] is not None:  # not everyone may make a network
        assert result["wire_bytes"] > 2 * result["model_bytes"]  # weights travel in every round, both ways


@pytest.mark.soak
def test_transfer_compares_both_directions() -> None:
    result = run("transfer", "--mib", 1, "--repeats", 1)
    assert set(result["transports"]) == {"plaintext", "tls"}
    directions = [each["directions"] for each in result["transports"].values()]
    assert all(set(each) == {"upload", "download", "download to disk"} for each in directions)
    for figure in (figure for each in directions for figure in each.values()):
        assert set(figure["speed"]) == SPREAD
        ours, bare = (figure[f"{side}_mib_per_second"]["median"] for side in ("ours", "bare"))
        assert figure["speed"]["median"] == pytest.approx(ours / bare, rel=1e-3)
    assert set(result["transports"]["plaintext"]["client_added_mib"]) == {"upload", "download"}


@pytest.mark.soak
def test_memory_is_measured_for_each_number_of_agents() -> None:
    result = run("memory", "--agents", "1,3", "--mib", 2)
    assert list(result["serving_process"]) == ["1", "3"]
    for peaks in result["serving_process"].values():
        # The kernel counts pages for each processor apart, so that a peak may seem to fall a little.
        assert 10 < peaks["idle_mib"] < peaks["uploads_mib"] + 1 < peaks["downloads_mib"] + 2


@pytest.mark.soak
def test_waiting_is_measured_from_the_rounds_own_times() -> None:
    result = run("waiting", "--rounds", 4, "--repeats", 1)
    assert set(result["help"]) == {"cloud_server", "edge_agent"}
    assert all(seconds["min"] > 0 for seconds in result["help"].values())
    for waited in (result["job_taken"], result["publication_known"]):
        assert 0 < waited["min"] <= waited["max"]
        assert waited["min"] < result["first_model"]


@pytest.mark.soak
def test_agents_counts_what_each_of_a_crowd_costs_and_what_was_lost() -> None:
    result = run("agents", "--agents", 6, "--rounds", 2, "--leaving", 0.5, "--tls")
    assert set(result["faults"].values()) == {0}
    assert result["comebacks"] > 0
    assert result["server_cpu_ms_per_contribution"] == pytest.approx(
        1000 * result["server_cpu_seconds"] / 12, rel=1e-3
    )
    assert result["server_peak_mib"] > 10
    assert all(0 < call["p50"] <= call["p99"] <= call["max"] for call in result["calls"].values())
    assert result["news_known"]["p50"] > 0


def test_aggregate_compares_every_aggregator() -> None:
    result = run("aggregate", "--model", "squeezenet1_1", "--agents", 2, "--repeats", 1)
    assert set(result["aggregators"]) == {"mean", "trimmed_mean", "median", "geometric_median"}
    for figure in result["aggregators"].values():
        assert figure["speed"]["median"] > 0
        assert figure["memory_in_models"]["median"] < 3


@pytest.mark.soak
def test_align_measures_what_takes_the_time() -> None:
    arguments = ("--model", "squeezenet1_1", "--agents", 2, "--weights", "permuted")
    seconds = run("align", *arguments)["seconds"]
    parts = ("reading", "similarities", "assignments", "permuting")
    assert all(seconds[part]["median"] > 0 for part in parts)
    assert sum(seconds[part]["median"] for part in parts) < seconds["processor"]["median"]


@pytest.mark.soak
def test_two_ranks_hold_half_of_a_sharded_model_each() -> None:
    result = run("sharded", "--mib", 64, "--ranks", 1, 2)
    alone, whole, half = (result["ranks"][name] for name in ("ddp, 1", "ddp, 2", "fsdp, 2"))
    # Parameters, gradients and two moments, and a unit of 16 MiB and what the process needs besides.
    assert alone["after_step_mib"] >= 4 * 64
    assert whole["after_step_mib"] >= 4 * 64
    assert half["after_step_mib"] < 0.5 * alone["after_step_mib"] + 2 * 16


@pytest.mark.soak
def test_two_ranks_read_half_each() -> None:
    result = run("ranks", "--mib", 24, "--ranks", 2)
    # A tenth or so is held back.
    assert 0.8 < 2 * result["ranks"]["2"]["read_mib"] / (result["data_bytes"] / 2**20) < 1
    assert result["ranks"]["2"]["own_mib"] > 0


def test_train_compares_with_both_loops() -> None:
    result = run("train", "--models", "mlp", "--images", 128, "--repeats", 1, "--device", "cpu")
    measured = result["models"]["mlp"]
    assert set(measured["images_per_second"]) == {"ours", "bare", "ours_augmented", "usual"}
    assert set(measured["of_bare"]) == set(measured["of_usual"]) == SPREAD


def test_train_measures_images_on_the_host_and_the_share_of_a_peak() -> None:
    more = ("--data-on-host", "--peak-tflops", 2)
    measured = run("train", "--models", "mlp", "--images", 128, "--repeats", 1, "--device", "cpu", *more)
    mlp = measured["models"]["mlp"]
    assert set(mlp["on_host_of_ours"]) == SPREAD
    # Two matrices, once forwards and twice backwards, but not for the gradient of the images.
    flops = 2 * (2 * 784 * 128 + 3 * 128 * 10)
    assert mlp["flops_per_image"] == pytest.approx(flops, rel=1e-4)
    share = mlp["images_per_second"]["ours"]["median"] * flops / 2e12
    assert mlp["share_of_peak"]["median"] == pytest.approx(share, rel=1e-3)


@pytest.mark.soak
def test_to_accuracy_stops_at_it_or_gives_up(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for label in range(10):
            folder = tmp_path / split / f"class-{label}"
            folder.mkdir(parents=True)
            Image.new("RGB", (32, 32), (25 * label, 0, 0)).save(folder / "1.png")
    folder = ["--data", tmp_path, "--device", "cpu"]
    for more, epochs in ((["--accuracy", 0], 1), (["--accuracy", 1.1, "--epochs", 2], 2)):
        loops = run("to_accuracy", *folder, *more)["loops"]
        assert [loops[name][0]["epochs"] for name in ("ours", "usual")] == [epochs, epochs]
        assert loops["ours"][0]["seconds"] > 0


@pytest.mark.parametrize("peer", ["flower", "nvflare"])
def test_peers_take_the_flags_of_the_round_trip(peer: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.peers.{peer}", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for flag in ("--agents", "--model", "--rounds"):
        assert flag in done.stdout


def test_ratios_are_taken_pair_by_pair() -> None:
    assert figures.ratios([1.0, 4.0, 9.0], [1.0, 2.0, 3.0]) == {"median": 2.0, "min": 1.0, "max": 3.0}


WORK = """
import subprocess, sys, time
if len(sys.argv) == 1:
    subprocess.run([sys.executable, __file__, "child"])
    print("child ended", flush=True)
    time.sleep(600)
memory = bytearray(64 << 20)
until = time.process_time() + 0.3
while time.process_time() < until: pass
"""


def test_a_family_is_counted_with_what_it_started_and_has_ended(tmp_path: Path) -> None:
    script = tmp_path / "work.py"
    script.write_text(WORK, "utf-8")
    with processes_in(tmp_path) as processes:
        pid = processes.start("work", [sys.executable, script])
        meter = Meter(single={"parent": pid}, families={"family": pid})
        meter.begin()
        processes.wait_for_output("work", "(child ended)", seconds=60)
        usage = meter.end()
        assert usage["family"].cpu_seconds >= 0.3 > usage["parent"].cpu_seconds
        assert usage["family"].peak_mib >= 64 > usage["parent"].peak_mib


def test_no_process_is_left(tmp_path: Path) -> None:
    with processes_in(tmp_path) as processes:
        pid = processes.start("parent", ["/bin/sh", "-c", "sleep 600 & wait"])
        processes.wait_for("its child", lambda: children(pid) or None, seconds=60)
        started = [pid, *children(pid)]
    # A process that was killed is there until the kernel has come to it.
    until_gone = time.monotonic() + 60
    while left := [each for each in started if Path(f"/proc/{each}/exe").exists()]:
        assert time.monotonic() < until_gone, f"still there: {left}"
        time.sleep(0.01)


def test_a_process_that_failed_is_named_with_what_it_said(tmp_path: Path) -> None:
    with processes_in(tmp_path) as processes:
        processes.start("broken", ["/bin/sh", "-c", "echo no such luck; exit 1"])
        with pytest.raises(RuntimeError, match="broken failed while waiting for nothing:\nno such luck"):
            processes.wait_for("nothing", lambda: None, seconds=60)


@pytest.mark.soak
def test_memory_of_a_big_model_depends_on_its_largest_tensor_only() -> None:
    """The model has 92 MiB, so that a process that held it would show that."""
    size = ("--layers", 32, "--hidden", 256, "--vocabulary", 4096)
    result = run("big_model", *size, "--wire", "int8")
    model_mib, largest_mib = (result[f"{what}_bytes"] / 2**20 for what in ("model", "largest_tensor"))
    assert (model_mib > 90, largest_mib) == (True, 4.0)
    added = {name: result["peak_mib"][name] - result["idle_mib"][name] for name in result["peak_mib"]}
    assert added["trainer"] < 3 * largest_mib + 16
    assert added["cloud-server"] < 48
    assert result["peak_mib"]["cloud-server"] < 200
    assert result["sent_bytes"] < 0.27 * result["model_bytes"]
