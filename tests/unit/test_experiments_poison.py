"""The experiment on poisoned agents, with a few rounds of digits."""

import json
from pathlib import Path

import numpy as np
import pytest

from ecavg.common.shards import Shard
from experiments import poison
from experiments.poison import AGGREGATORS, ATTACKS, DEFENCES, TARGET, Variant

IMAGES = np.zeros((10, 1, 8, 8), np.uint8)
LABELS = np.arange(10)
FEW = [
    Variant(attack, "mean", defence)
    for attack in ("honest", "label_flip", "scale", "nan")
    for defence in ("none", "both")
]


def test_backdoor_is_in_the_share_of_the_images_that_it_should_be_in() -> None:
    attack = ATTACKS["backdoor_half"]
    images, labels = poison._poisoned_data(attack, Shard(IMAGES, LABELS), 10, 0)
    has_patch = images[:, 0, -2:, -2:].min(axis=(1, 2)) == 255
    assert has_patch.sum() == 5
    assert (labels[has_patch] == TARGET).all()
    assert (labels[~has_patch] == LABELS[~has_patch]).all()
    assert images.sum() == 5 * 4 * 255
    assert not IMAGES.any()


def test_every_label_is_flipped() -> None:
    shard = poison._poisoned_data(ATTACKS["label_flip"], Shard(IMAGES, LABELS), 10, 0)
    assert list(shard.targets) == list(range(9, -1, -1))


def test_every_variant_is_in_the_tables() -> None:
    record = {
        "accuracy": 0.9, "average": 0.8, "success": 0.1, "refused": [], "clipped": ["edge-01", "edge-03"],
        "flagged": {"edge-01": ["labels"]}, "seconds": {"audit": 0.5, "aggregate": 1.5},
    }  # fmt: skip
    seed = {variant.name: record for variant in poison.VARIANTS}
    text = poison.in_words({"1 of 5": [seed, seed]}, {"1 of 5": 1})
    assert all(attack.label in text for attack in ATTACKS.values())
    assert all(text.count(f"| {name} |") >= 2 * len(ATTACKS) for name in AGGREGATORS)
    assert text.count(" | ".join(DEFENCES)) == 3
    assert "| labels flipped | 2 | 0 + 0 | 2 + 2 | 2 + 0 |" in text
    assert "0.50 s of a round's 2.00 s" in text


def test_rounds_are_measured_once_and_taken_up_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(poison, "VARIANTS", FEW)
    arguments = poison._parse(
        ["--task", "digits", "--seeds", "1", "--cases", "5", "--work-dir", str(tmp_path)]
    )
    (cell,) = poison._cells(arguments)["1 of 5"]
    doing = poison._do(cell, lambda *_: None)
    next(doing)
    doing.close()
    assert len(cell.missing) == len(FEW) - 1
    assert len(list(poison._do(cell, lambda *_: None))) == len(FEW) - 1
    assert cell.missing == []

    def record(attack: str, defence: str) -> poison.Record:
        return cell.known[Variant(attack, "mean", defence).name]

    assert record("honest", "none")["accuracy"] == record("honest", "both")["accuracy"] > 0.8
    assert record("nan", "none")["refused"] == [{"agent_id": "edge-01", "reason": "non_finite"}]
    assert record("label_flip", "none")["left_out"] == []
    assert record("label_flip", "both")["left_out"] == ["edge-01"]
    # Without the poisoned agent, whether refused or excluded, it is the same round.
    assert record("label_flip", "both")["accuracy"] == record("nan", "both")["accuracy"]
    assert record("scale", "both")["clipped"] == ["edge-01"]
    assert record("scale", "both")["average"] > record("scale", "none")["average"] + 0.2
    assert json.loads((cell.path / "records.json").read_text("utf-8")).keys() == cell.known.keys()
