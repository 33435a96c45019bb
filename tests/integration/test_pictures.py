"""Image folders as devices in the field have them: every picture counts, and looks as it does to people."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ecavg.common.shards import read_shard
from tests.integration.test_data_travel_once import next_rounds
from tests.processes import ROOT, Cluster, Command
from tests.soak import others_soak

# "Übung", as a device writes it that does not know of UTF-8.
ODD = os.fsdecode("Übung".encode("latin-1"))
QUICK = ("--min-agents", 1, "--set", "run.pretrain.epochs=1", "--set", "run.fine_tune.epochs=1")


def of(num_classes: int, *image_shape: int) -> tuple[str, ...]:
    """Return the server's arguments for image folders of so many classes."""
    settings = ("dataset=pictures", f"num_classes={num_classes}", f"image_shape={list(image_shape)}")
    return tuple(word for setting in settings for word in ("--set", f"run.{setting}"))


def write_shades(folder: Path, names: Mapping[str, int], *, suffix: str = ".png", count: int = 10) -> None:
    """Write tiny pictures into folders whose brightness is given."""
    rng = np.random.default_rng(0)
    for name, shade in names.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            pixels = np.clip(rng.normal(shade, 8, (8, 8)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}{suffix}")


def events_of(command: Command) -> list[dict[str, Any]]:
    """Return the log of an agent, each line of which must be JSON in UTF-8."""
    events = [json.loads(line) for line in command.output.splitlines()]
    assert json.dumps(events, ensure_ascii=False).encode("utf-8")
    return events


def own_report(cluster: Cluster, name: str) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((cluster.folder / name / "report.json").read_text("utf-8"))
    return report


# --- names that are not UTF-8


def test_agent_reads_a_file_whose_name_is_not_utf8_again_and_again(cluster: Cluster) -> None:
    """It is readable when the agent starts, and is no image any more in a later round."""
    folder = cluster.folder / "pictures"
    write_shades(folder, {"train/a": 20, "train/b": 200})
    odd = (folder / "train/a/0.png").rename(folder / f"train/a/{ODD}.png")
    (folder / f"train/a/{ODD}").touch()
    server = cluster.server("--rounds", 0, *QUICK, *of(2, 1, 8, 8))
    agent = cluster.agent("edge-1", "--data", folder)
    next_rounds(cluster, agent, 1)
    odd.write_bytes(b"no image")
    agent.wait_for("the data have changed")
    next_rounds(cluster, agent)
    assert agent.terminate() == server.terminate() == 0
    (event,) = (event for event in events_of(agent) if event["event"] == "images_skipped")
    assert event["first"].startswith(rf"{folder}/train/a/\xdcbung.png: it is none of")
    told = [event["text"] for event in events_of(agent) if "not read" in event.get("text", "")]
    assert told == ["files not read: 1 (other 1), of them 1 in train/a"]


def test_agent_runs_where_no_path_is_utf8(cluster: Cluster) -> None:
    folder = cluster.folder / ODD / "pictures"
    write_shades(folder, {"train/a": 20, "train/b": 200})
    server = cluster.server(*QUICK, *of(2, 1, 8, 8))
    agent = cluster.agent("edge-1", "--data", folder)
    assert agent.wait() == 0
    assert server.wait() == 0
    assert own_report(cluster, "edge-1")["applied"]


def test_class_folder_whose_name_is_not_utf8_is_refused_in_one_line(cluster: Cluster) -> None:
    folder = cluster.folder / "pictures"
    write_shades(folder, {"train/a": 20, f"train/{ODD}": 200})
    cluster.server(*QUICK, *of(2, 1, 8, 8))
    agent = cluster.agent("edge-1", "--data", folder)
    assert agent.wait() == 2
    assert agent.output.splitlines()[-1] == (
        rf"edge-agent: class folder {folder}/train/\xdcbung has a name that is not UTF-8: rename it"
    )


@pytest.mark.parametrize("key", ["data", "data-dir"])
def test_missing_folder_whose_name_is_not_utf8_is_named_in_one_line(key: str) -> None:
    command = [
        sys.executable,
        "-m",
        "ecavg.edge_agent",
        "--server",
        "127.0.0.1:1",
        f"--{key}",
        f"/nowhere/{ODD}",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    (line,) = done.stderr.decode("utf-8").splitlines()
    assert done.returncode == 2
    assert line.startswith(f"edge-agent: {key.replace('-', '_')}: data ")
    assert "dcbung" in line


# --- other suffixes, and deeper folders


def test_whole_folder_is_trained_on_and_what_is_not_read_is_told(cluster: Cluster) -> None:
    folder = cluster.folder / "pictures"
    write_shades(folder, {"train/gif": 20, "test/gif": 20}, suffix=".gif")
    write_shades(folder, {"train/deep/2024/05": 90, "test/deep": 90})
    for suffix in (".jfif", ".jpe"):
        write_shades(folder, {"train/jpeg": 160}, suffix=suffix)
    for suffix in (".tif", ".tiff"):
        write_shades(folder, {"test/jpeg": 160}, suffix=suffix)
    write_shades(folder, {"train/phone": 230})
    for number in range(10):
        (folder / f"train/phone/{number}.png").rename(folder / f"train/phone/{number}.heic")
    (folder / "train/deep/notes.txt").touch()
    (folder / "train/deep/Thumbs.db").touch()
    server = cluster.server(*QUICK, *of(4, 1, 8, 8))
    agent = cluster.agent("edge-1", "--data", folder)
    assert agent.wait() == 0
    assert server.wait() == 0
    assert cluster.report()["agents"][0]["num_examples"] == 40
    assert own_report(cluster, "edge-1")["num_held_out"] == 40
    told = (
        "files not read: 11 (.heic 10, .txt 1), of them 10 in train/phone, 1 in train/deep;"
        " no image to read in train/phone"
    )
    events = events_of(agent)
    assert [event["text"] for event in events if "not read" in event.get("text", "")] == [told]
    (warning,) = (event for event in events if event["event"] == "files_not_read")
    assert warning["suffixes"] == {".heic": 10, ".txt": 1}


# --- turned photos

TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda upright: upright,
    3: lambda upright: np.rot90(upright, 2),
    6: lambda upright: np.rot90(upright, 1),
    8: lambda upright: np.rot90(upright, -1),
}


def write_photos(folder: Path) -> None:
    """Write photos that are bright at the top or at the left, most of them stored turned, as phones do."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 60), ("test", 40)):
        for name, bright in (("left", np.s_[:, :12]), ("top", np.s_[:12])):
            (folder / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.normal(60, 10, (32, 32))
                pixels[bright] += 140
                orientation, exif = list(TURNS)[number % 4], Image.Exif()
                exif[0x0112] = orientation
                stored = TURNS[orientation](np.clip(pixels, 0, 255).astype(np.uint8))
                photo = Image.fromarray(np.ascontiguousarray(stored))
                photo.save(folder / part / name / f"{number}.jpg", quality=95, exif=exif)


def test_turned_photos_are_told_apart_as_upright_ones_are(cluster: Cluster) -> None:
    write_photos(cluster.folder / "photos")
    server = cluster.server("--min-agents", 1, *of(2, 1, 16, 16))
    agent = cluster.agent("edge-1", "--data", cluster.folder / "photos")
    assert agent.wait() == 0
    assert server.wait() == 0
    assert own_report(cluster, "edge-1")["accuracy_after"] > 0.9


# --- transparent icons


def write_icons(folder: Path, shade: int, shape: int) -> None:
    """Write icons of the shade `shape` in three ways: on transparency twice, and on a ground of `shade`."""
    rng = np.random.default_rng(0)
    for part, name in ((part, name) for part in ("train", "test") for name in ("bar", "disc")):
        for way in ("rgba", "la", "flat"):
            (folder / way / part / name).mkdir(parents=True)
        for number in range(10):
            rows, columns = np.mgrid[:32, :32] - rng.integers(13, 19, (2, 1, 1))
            # The edges are soft.
            edge = (
                8 - np.hypot(rows, columns)
                if name == "disc"
                else np.minimum(13 - abs(columns), 4 - abs(rows))
            )
            alpha = np.clip(128 + 90 * edge, 0, 255).astype(np.uint8)
            colour = np.full_like(alpha, shape)
            flat = np.rint((colour * (alpha / 255.0)) + shade * (1 - alpha / 255.0)).astype(np.uint8)
            pictures = {
                "rgba": np.dstack([colour] * 3 + [alpha]),
                "la": np.dstack([colour, alpha]),
                "flat": flat,
            }
            for way, pixels in pictures.items():
                Image.fromarray(pixels).save(folder / way / part / name / f"{number}.png")


BACKGROUNDS = ((None, 255, 0), ("grey", 128, 255))


@pytest.mark.parametrize(("background", "shade", "shape"), others_soak(BACKGROUNDS, BACKGROUNDS[1:]))
def test_icons_give_the_same_shards_transparent_and_flattened(
    cluster: Cluster, background: str | None, shade: int, shape: int
) -> None:
    write_icons(cluster.folder / "icons", shade, shape)
    settings = ("--set", f"run.background={background}") if background else ()
    server = cluster.server(*QUICK, "--min-agents", 3, *settings, *of(2, 1, 16, 16))
    ways = ("rgba", "la", "flat")
    agents = [cluster.agent(way, "--data", cluster.folder / "icons" / way) for way in ways]
    assert [agent.wait() for agent in agents] == [0, 0, 0]
    assert server.wait() == 0
    shards = [cluster.folder / way / "shards/000001.safetensors" for way in ways]
    assert len({shard.read_bytes() for shard in shards}) == 1
    images = read_shard(shards[0]).inputs
    assert len(images) == 20
    assert (images[:, 0, 0, 0] == shade).all()
    assert (images == shape).any(axis=(1, 2, 3)).all()
