"""The meaning of labels: class folders of devices that differ, through the real commands."""

import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ecavg.common.dataset import CLASS_NAMES
from ecavg.common.faults import Point
from tests.processes import Cluster, Command

PETS = ("cat", "dog", "fish")
OWN = (
    "--set", "run.dataset=pets", "--set", "run.num_classes=3", "--set", "run.image_shape=[1, 8, 8]",
    "--set", "run.pretrain.epochs=20", "--set", "run.fine_tune.epochs=20",
)  # fmt: skip
# The classes differ by their brightness, whatever they are called.
BRIGHTNESS = {"cat": 20, "dog": 90, "Dog": 90, "fish": 160}


def folder_of(path: Path, *names: str, count: int = 40) -> Path:
    """Make an image folder with these classes."""
    random = np.random.default_rng(len(names))
    for name in names:
        folder = path / "train" / name
        folder.mkdir(parents=True)
        for number in range(count):
            pixels = random.normal(BRIGHTNESS.get(name.strip(), 50), 8, (8, 8))
            Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(folder / f"{number}.png")
    return path


def last_line(command: Command) -> str:
    return command.output.strip().splitlines()[-1]


def test_device_with_other_class_folders_is_refused_with_both_lists(cluster: Cluster, tmp_path: Path) -> None:
    server = cluster.server("--min-agents", 2, *OWN)
    first = cluster.agent("edge-1", "--data", folder_of(tmp_path / "first", *PETS))
    first.wait_for("joined as edge-1")
    other = cluster.agent("edge-2", "--data", folder_of(tmp_path / "other", "cat", "Dog", "fish"))
    assert other.wait() == 2
    assert "not Dog; here are Dog, cat, fish, the run has cat, dog, fish" in last_line(other)
    assert "Traceback" not in other.output
    assert "agent_refused" in server.output

    (tmp_path / "other/train/Dog").rename(tmp_path / "other/train/dog")
    other = cluster.agent("edge-2", "--data", tmp_path / "other")
    assert (first.wait(), other.wait(), server.wait()) == (0, 0, 0)
    report = cluster.report()
    assert report["accuracy_published"] > 0.9
    assert [each["name"] for each in report["classes"]] == list(PETS)


@pytest.mark.soak
def test_names_hold_after_a_restart_of_the_server(cluster: Cluster, tmp_path: Path) -> None:
    server = cluster.server("--min-agents", 2, *OWN)
    first = cluster.agent("edge-1", "--data", folder_of(tmp_path / "first", *PETS))
    first.wait_for("joined as edge-1")
    assert (first.terminate(), server.terminate()) == (0, 0)
    cluster.server("--min-agents", 2, *OWN)
    other = cluster.agent("edge-2", "--data", folder_of(tmp_path / "other", "cat", "Dog", "fish"))
    assert other.wait() == 2
    assert "the run has cat, dog, fish" in last_line(other)


def test_whoever_named_the_classes_may_correct_them_before_anybody_else_joins(
    cluster: Cluster, tmp_path: Path
) -> None:
    server = cluster.server("--min-agents", 2, *OWN)
    wrong = folder_of(tmp_path / "first", "cat", "Dog", "fish")
    first = cluster.agent(
        "edge-1", "--data", wrong, env={"ECAVG_CRASH_AT": f"{Point.AGENT_JOINED}:1:{tmp_path / 'dead'}"}
    )
    assert first.wait() == -signal.SIGKILL
    (tmp_path / "first/train/Dog").rename(tmp_path / "first/train/dog")
    first = cluster.agent("edge-1", "--data", tmp_path / "first")
    # Until the one that named the classes has come back, the others are held against its first names.
    first.wait_for("joined as edge-1")
    other = cluster.agent("edge-2", "--data", folder_of(tmp_path / "other", *PETS))
    assert (first.wait(), other.wait(), server.wait()) == (0, 0, 0)


def test_device_with_some_of_the_classes_takes_part_once_they_are_named(
    cluster: Cluster, tmp_path: Path
) -> None:
    server = cluster.server("--min-agents", 2, *OWN)
    some = folder_of(tmp_path / "some", "fish", "dog")
    early = cluster.agent("edge-2", "--data", some)
    assert early.wait() == 2
    assert "there are 2 class folders here (dog, fish), and the run has 3 classes" in last_line(early)
    first = cluster.agent("edge-1", "--data", folder_of(tmp_path / "first", *PETS))
    first.wait_for("joined as edge-1")
    late = cluster.agent("edge-2", "--data", some)
    assert (first.wait(), late.wait(), server.wait()) == (0, 0, 0)
    assert cluster.report()["accuracy_published"] > 0.9


def test_folders_are_held_against_the_names_of_a_dataset(cluster: Cluster, tmp_path: Path) -> None:
    """One device reads the digits themselves, another one folders that are called in words."""
    cluster.server("--min-agents", 2)
    digits = cluster.agent("edge-1")
    digits.wait_for("joined as edge-1")
    words = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    other = cluster.agent("edge-2", "--data", folder_of(tmp_path / "words", *words, count=2))
    assert other.wait() == 2
    assert f"the run has {', '.join(CLASS_NAMES['digits'])}" in last_line(other)


def test_named_classes_of_the_configuration_stand(cluster: Cluster, tmp_path: Path) -> None:
    cluster.server("--min-agents", 1, *OWN, "--set", 'run.class_names=["fish", "dog", "cat"]')
    other = cluster.agent("edge-2", "--data", folder_of(tmp_path / "other", "cat", "Dog", "fish"))
    assert other.wait() == 2
    assert "the run has fish, dog, cat" in last_line(other)
    agent = cluster.agent("edge-1", "--data", folder_of(tmp_path / "first", *PETS))
    assert agent.wait() == 0
    assert [each["name"] for each in cluster.report()["classes"]] == ["fish", "dog", "cat"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("caf\u00e9", "cafe\u0301", "bar"), "have the same name: rename one"),
        (("two\nlines", "bar", "foo"), "its name should be at most 500 printable characters: rename it"),
    ],
)
def test_folders_that_name_no_classes_are_refused(
    cluster: Cluster, tmp_path: Path, names: tuple[str, ...], message: str
) -> None:
    cluster.server("--min-agents", 1, *OWN)
    agent = cluster.agent("edge-1", "--data", folder_of(tmp_path / "odd", *names, count=1))
    assert agent.wait() == 2
    assert message in last_line(agent)
