"""Examples in files of arrays, and what a run makes of them."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ecavg.common.config import RunConfig
from ecavg.common.dataset import Inputs, Targets
from ecavg.common.errors import UsageError
from ecavg.edge_agent.arrays import (
    as_wanted,
    check_arrays,
    is_arrays,
    open_arrays,
    stamp_of_arrays,
    statistics,
)
from ecavg.edge_agent.config import AgentConfig, check_source
from ecavg.edge_agent.data import AgentData
from ecavg.edge_agent.doctor import _look_at_data
from ecavg.edge_agent.sources import data_stamp, find_source
from tests.recipes import data_of

RUN = RunConfig(
    task="regression", dataset="pumps", model="mlp", inputs={"shape": (3,), "low": -5, "high": 5}, seed=1
)
ROWS = np.random.default_rng(0).uniform(-5, 5, (40, 3))
NUMBERS = ROWS.sum(1)


def load(source: Path, run: RunConfig = RUN) -> AgentData:
    return data_of(run, str(source))


def npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def folder(path: Path, inputs: np.ndarray, targets: np.ndarray) -> Path:
    path.mkdir(parents=True)
    np.save(path / "inputs.npy", inputs)
    np.save(path / "targets.npy", targets)
    return path


def test_file_of_arrays_is_read_in_the_dtypes_of_the_run(tmp_path: Path) -> None:
    path = npz(tmp_path / "pumps.npz", inputs=ROWS, targets=NUMBERS)
    check_source(str(path))
    loaded = load(path)
    both = [loaded.train, loaded.held_out]
    assert {(each.inputs.dtype.name, each.targets.shape[1:]) for each in both} == {("float32", (1,))}
    found = sorted(map(tuple, np.concatenate([np.hstack(each) for each in both])))
    expected = np.hstack([ROWS, NUMBERS[:, None]]).astype(np.float32)
    assert found == sorted(map(tuple, expected))
    assert 0 < len(loaded.held_out.targets) < 20


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_test_split_is_held_out(kind: str, tmp_path: Path) -> None:
    train, test = (ROWS[:30], NUMBERS[:30]), (ROWS[30:], NUMBERS[30:])
    path = tmp_path / "pumps.npz"
    if kind == "file":
        npz(path, inputs=train[0], targets=train[1], inputs_test=test[0], targets_test=test[1])
    else:
        path = tmp_path / "pumps"
        folder(path / "train", *train)
        folder(path / "test", *test)
    loaded = load(path)
    np.testing.assert_array_equal(loaded.held_out.inputs, test[0].astype(np.float32))
    np.testing.assert_array_equal(loaded.train.targets[:, 0], train[1].astype(np.float32))


def test_change_of_the_files_is_noticed(tmp_path: Path) -> None:
    path = folder(tmp_path / "pumps", ROWS, NUMBERS)
    before = data_stamp(RUN, str(path), None)
    assert before == stamp_of_arrays(path) != ""
    assert data_stamp(RUN, str(path), None) == before
    os.utime(path / "targets.npy", (0, 0))
    assert data_stamp(RUN, str(path), None) != before
    assert not is_arrays(tmp_path)
    # Somebody takes a file away between two looks.
    (path / "more.npy").symlink_to(path / "gone.npy")
    assert data_stamp(RUN, str(path), None) != before


def test_suffix_may_have_capital_letters(tmp_path: Path) -> None:
    path = npz(tmp_path / "pumps.npz", inputs=ROWS, targets=NUMBERS).rename(tmp_path / "PUMPS.NPZ")
    assert len(load(path).train.targets) > 0


def test_array_of_objects_is_not_unpickled(tmp_path: Path) -> None:
    objects = np.array([{"a": 1}] * 40, dtype=object)
    for path in (
        npz(tmp_path / "pumps.npz", inputs=ROWS, targets=objects),
        folder(tmp_path / "pumps", ROWS, objects),
    ):
        with pytest.raises(UsageError, match=r"cannot be read .*it should have the arrays"):
            open_arrays(path)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"inputs": ROWS}, "targets.npy"),
        ({"inputs": ROWS, "targets": NUMBERS[:-1]}, "there must be one target for each input"),
        ({"inputs": NUMBERS, "targets": NUMBERS}, "there must be one target for each input"),
        ({"inputs": ROWS, "targets": NUMBERS.astype(str)}, "targets are <U.*, not numbers"),
        ({"inputs": ROWS[:, :2], "targets": NUMBERS}, r"inputs of float32 \[2\], .* float32 \[3\]"),
        ({"inputs": ROWS * 2, "targets": NUMBERS}, r"inputs that are not from -5 to 5, first in example \d"),
        ({"inputs": ROWS, "targets": np.where(NUMBERS > 9, np.nan, NUMBERS)}, "targets that are no finite"),
        ({"inputs": ROWS, "targets": np.where(NUMBERS > 9, 1e300, NUMBERS)}, "no finite numbers, first"),
    ],
)  # fmt: skip
def test_arrays_that_do_not_fit_the_run_are_refused_in_one_line(
    arrays: dict[str, np.ndarray], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message) as refused:
        load(npz(tmp_path / "pumps.npz", **arrays))
    assert "\n" not in str(refused.value)


def test_file_that_is_no_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pumps.npz").write_text("no archive")
    with pytest.raises(UsageError, match="cannot be read"):
        load(tmp_path / "pumps.npz")


def test_whole_numbers_become_what_the_run_wants() -> None:
    ones = check_arrays("here", (np.ones((2, 3), np.int16), np.array([True, False])))
    assert (ones.inputs.dtype, ones.targets.dtype) == (np.int64, np.int64)
    assert as_wanted("inputs", ones.inputs, Inputs("float32", (3,))).dtype == np.float32
    assert as_wanted("targets", ones.targets, Targets("float32", (1,))).tolist() == [[1.0], [0.0]]


def test_statistics_are_those_of_each_channel() -> None:
    windows = np.stack([np.full((2, 4), 3.0), np.array([[5.0] * 4, [3.0] * 4])])
    assert statistics(windows) == "mean = [4, 3], std = [1, 0]"
    assert statistics(np.full((2, 1), 51, np.uint8)) == "mean = [0.2], std = [0]"


def test_doctor_says_what_to_normalise_by(tmp_path: Path) -> None:
    path = npz(tmp_path / "pumps.npz", inputs=[[1.0], [3.0]], targets=[2.0, 4.0])
    assert find_source(str(path), None)
    assert _look_at_data(AgentConfig(server="127.0.0.1:1", data=str(path))) == (
        f"{path} has 2 examples; mean = [2], std = [1]; of the targets, mean = [3], std = [1]"
    )


@pytest.mark.parametrize(
    ("name", "task", "num_examples"),
    [
        ("breast-cancer", "classification", 569),
        ("wine", "classification", 178),
        ("diabetes", "regression", 442),
    ],
)
def test_tables_of_scikit_learn_are_normalised_by_what_the_run_says(
    name: str, task: str, num_examples: int
) -> None:
    run = RunConfig(dataset=name, task=task)
    loaded = data_of(run)
    inputs, targets = (np.concatenate(both) for both in zip(loaded.train, loaded.held_out, strict=True))
    assert len(inputs) == num_examples
    normalised = (inputs - np.array(run.spec.inputs.mean)) / np.array(run.spec.inputs.std)
    np.testing.assert_allclose(normalised.mean(0), 0, atol=0.01)
    np.testing.assert_allclose(normalised.std(0), 1, atol=0.01)
    if task == "regression":
        normalised = (targets - run.spec.targets.mean) / np.array(run.spec.targets.std)
        assert abs(normalised.mean()) < 0.01
        assert abs(normalised.std() - 1) < 0.01
    else:
        assert set(targets) == set(range(run.spec.num_classes))
