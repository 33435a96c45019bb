"""Recordings of sound: windows, sample rates, what is held out, and what is refused."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import structlog

from ecavg.common.config import RunConfig
from ecavg.common.errors import UsageError
from ecavg.common.shards import cloud_holdout
from ecavg.edge_agent import recordings
from ecavg.edge_agent.config import AgentConfig
from ecavg.edge_agent.data import AgentData
from ecavg.edge_agent.doctor import _look_at_data
from ecavg.edge_agent.partition import Partition
from ecavg.edge_agent.sources import class_names_of, data_stamp
from ecavg.edge_agent.tables import TableFormat
from tests.conftest import need
from tests.recipes import data_of

RATE = 1000
WINDOW = 50
# The samples of a recording are numbers of their own, so that a test knows each again.
STEP = 2.0**-14
FORM = TableFormat(window=WINDOW, stride=WINDOW, horizon=0, sample_rate=RATE, max_bad_rows=0.1)
RUN: dict[str, Any] = {"dataset": "birds", "num_classes": 2, "holdout_fraction": 0.25}


@pytest.fixture(autouse=True)
def _audio() -> None:
    try:
        import soundfile
    except (ImportError, OSError):
        soundfile = None
    need("soundfile", soundfile, "soundfile")


def save(path: Path, samples: np.ndarray, rate: int = RATE, subtype: str = "FLOAT") -> Path:
    import soundfile

    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, rate, subtype)
    return path


def count_up(num_samples: int, start: int = 0) -> np.ndarray:
    return (np.arange(start, start + num_samples) * STEP).astype(np.float32)


def birds(folder: Path, num_files: int, num_samples: int) -> Path:
    """Write as many recordings, no two of which have a sample in common, in turn of two classes."""
    for number in range(num_files):
        name = ("crow", "jay")[number % 2]
        save(folder / f"train/{name}/{number}.wav", count_up(num_samples, number * num_samples) - 1)
    return folder


def load(folder: Path, form: TableFormat = FORM, partition: Partition | None = None, **run: Any) -> AgentData:
    inputs = {"shape": (1, form.window), "overlap": form.overlap}
    return data_of(
        RunConfig(**{**RUN, "inputs": inputs, **run}),
        source=str(folder),
        partition=partition,
        table=form,
    )


def samples_of(windows: np.ndarray) -> set[int]:
    return set(np.rint((windows + 1) / STEP).astype(int).ravel().tolist())


def overlapping(stride: int) -> TableFormat:
    return TableFormat(window=WINDOW, stride=stride, horizon=0, sample_rate=RATE, max_bad_rows=0.1)


def test_recordings_become_windows_with_the_class_of_their_folder(tmp_path: Path) -> None:
    folder = birds(tmp_path, 8, 3 * WINDOW + 7)
    assert class_names_of(str(folder), None) == ("crow", "jay")
    data = load(folder)
    windows = np.concatenate([data.train.inputs, data.held_out.inputs])
    labels = np.concatenate([data.train.targets, data.held_out.targets])
    assert (windows.shape, windows.dtype, labels.dtype) == ((24, 1, WINDOW), np.float32, np.int64)
    firsts = np.rint((windows[:, 0, 0] + 1) / STEP).astype(int)
    assert sorted(firsts % (3 * WINDOW + 7)) == sorted([0, WINDOW, 2 * WINDOW] * 8)
    np.testing.assert_array_equal(labels, firsts // (3 * WINDOW + 7) % 2)
    np.testing.assert_allclose(np.diff(windows, axis=2), STEP, atol=1e-6)


@pytest.mark.parametrize("stride", [WINDOW, 20])
@pytest.mark.parametrize("num_windows", [4, 200])
def test_no_sample_is_trained_on_and_held_out(num_windows: int, stride: int, tmp_path: Path) -> None:
    folder = birds(tmp_path, 6, WINDOW + (num_windows - 1) * stride)
    data = load(folder, overlapping(stride))
    train, held_out = samples_of(data.train.inputs), samples_of(data.held_out.inputs)
    assert train
    assert held_out
    assert not train & held_out
    if num_windows == 200:
        # Each of the long recordings has its last quarter held out.
        assert len(data.held_out.targets) == 6 * 50
        assert len(data.train.targets) == 6 * (150 - overlapping(stride).overlap)


def test_cloud_holds_out_no_sample_that_it_trains_on_and_several_classes(tmp_path: Path) -> None:
    form = overlapping(20)
    train = load(birds(tmp_path, 30, 15 * WINDOW), form).train
    rest, held_out = cloud_holdout(train.targets, 0.3, 1, form.overlap)
    assert len(held_out)
    assert not samples_of(train.inputs[rest]) & samples_of(train.inputs[held_out])
    # A block between the classes would have one change.
    assert np.count_nonzero(np.diff(train.targets[held_out])) > 1


def test_short_recording_stays_on_its_side_when_others_come(tmp_path: Path) -> None:
    trained_on: set[bytes] = set()
    for number in range(4, 16, 3):
        data = load(birds(tmp_path, number, 2 * WINDOW))
        assert not trained_on & {window.tobytes() for window in data.held_out.inputs}
        trained_on |= {window.tobytes() for window in data.train.inputs}


@pytest.mark.parametrize("num_windows", [5, 200])
def test_partitions_share_no_sample(num_windows: int, tmp_path: Path) -> None:
    form = overlapping(20)
    folder = birds(tmp_path, 16, WINDOW + num_windows * 20)
    parts = [load(folder, form, Partition(number, 2)) for number in (1, 2)]
    trained, held_out = ([samples_of(part[side].inputs) for part in parts] for side in (0, 1))
    assert trained[0] | trained[1] == samples_of(load(folder, form).train.inputs)
    assert not trained[0] & trained[1]
    assert not (trained[0] | trained[1]) & (held_out[0] | held_out[1])


def test_test_split_is_held_out(tmp_path: Path) -> None:
    birds(tmp_path, 4, 2 * WINDOW)
    save(tmp_path / "test/jay/0.wav", count_up(WINDOW, 4000))
    data = load(tmp_path)
    assert (len(data.train.targets), data.held_out.targets.tolist()) == (8, [1])


def test_channels_are_mixed(tmp_path: Path) -> None:
    birds(tmp_path, 2, WINDOW)
    left = np.linspace(-1, 0, WINDOW)
    save(tmp_path / "test/jay/0.wav", np.stack([left, -left / 2], 1))
    np.testing.assert_allclose(load(tmp_path).held_out.inputs[0, 0], left / 4, atol=1e-6)


@pytest.mark.parametrize("rate", [2 * RATE, RATE // 2, 441])
def test_recording_of_another_rate_is_resampled(rate: int, tmp_path: Path) -> None:
    birds(tmp_path, 2, 20 * WINDOW)
    hertz, seconds = 20, 20 * WINDOW / RATE
    time = np.arange(round(seconds * rate)) / rate
    save(tmp_path / "test/jay/0.wav", np.sin(2 * np.pi * hertz * time) * 0.9, rate, "PCM_16")
    windows = load(tmp_path, inputs={"shape": (1, WINDOW), "low": -1, "high": 1}).held_out.inputs
    sound = windows.ravel()
    expected = np.sin(2 * np.pi * hertz * np.arange(len(sound)) / RATE) * 0.9
    # Where a recording begins and ends, the filter of the resampling has nothing on one side.
    inside = slice(WINDOW, -WINDOW)
    assert 19 <= len(windows) <= 20
    np.testing.assert_allclose(sound[inside], expected[inside], atol=0.01)


def test_samples_of_a_file_of_floats_are_not_cut_at_another_rate_either(tmp_path: Path) -> None:
    birds(tmp_path, 2, 20 * WINDOW)
    rate, num_samples = RATE // 2, 10 * WINDOW
    time = np.arange(num_samples) / rate
    save(tmp_path / "test/jay/0.wav", 20 * np.sin(2 * np.pi * 20 * time), rate)
    assert 19 < load(tmp_path).held_out.inputs.max() <= 20


@pytest.mark.parametrize("kind", ["short", "broken", "cut off", "nan"])
def test_recording_that_cannot_be_used_is_left_out_and_named(kind: str, tmp_path: Path) -> None:
    folder = birds(tmp_path, 20, 4 * WINDOW)
    path = folder / "train/jay/7.wav"
    if kind == "short":
        save(path, count_up(WINDOW - 1))
    elif kind == "broken":
        path.write_bytes(b"RIFF")
    elif kind == "cut off":
        path.write_bytes(path.read_bytes()[:-20])
    else:
        save(path, np.where(np.arange(4 * WINDOW) == 70, np.nan, 0))
    with structlog.testing.capture_logs() as logs:
        data = load(folder)
    # What is cut off has a window less; which it has is used.
    num_windows = 79 if kind == "cut off" else 76
    assert len(data.train.targets) + len(data.held_out.targets) == num_windows
    if kind == "cut off":
        assert logs == []
        return
    assert [(log["event"], log["num_skipped"]) for log in logs] == [("recordings_skipped", 1)]
    assert logs[0]["first"].startswith(f"{path}: ")
    strict = TableFormat(window=WINDOW, stride=WINDOW, horizon=0, sample_rate=RATE)
    with pytest.raises(UsageError, match=r"^1 of \d+ files cannot be read, first .*7.wav: [^\n]*$"):
        load(folder, strict)


@pytest.mark.parametrize(
    ("value", "reason"), [(1.5, "not from -1 to 1"), (np.nan, "no numbers")], ids=["loud", "nan"]
)
def test_recording_with_samples_that_the_run_does_not_have_is_one_bad_one_of_all(
    value: float, reason: str, tmp_path: Path
) -> None:
    # One of 20 is as much as may be left out, on whichever side of the split it would be.
    form, bounds = replace(FORM, max_bad_rows=0.05), {"shape": (1, WINDOW), "low": -1, "high": 1}
    for number in range(4):
        folder = birds(tmp_path / str(number), 20, WINDOW)
        bad = save(folder / "train/jay/7.wav", np.full(WINDOW + number, value))
        with structlog.testing.capture_logs() as logs:
            data = load(folder, form, inputs=bounds)
        assert len(data.train.targets) + len(data.held_out.targets) == 19
        assert logs[0]["first"] == f"{bad}: it has samples that are {reason}"


def test_agent_says_what_it_needs_to_know(tmp_path: Path) -> None:
    folder = birds(tmp_path, 2, WINDOW)
    for form in (TableFormat(), TableFormat(window=WINDOW), TableFormat(sample_rate=RATE)):
        with pytest.raises(UsageError, match=r"--data-window SAMPLES, and .* with --data-sample-rate"):
            load(folder, form, inputs={"shape": (1, WINDOW)})
    with pytest.raises(UsageError, match=r"windows of 50 samples share samples with the next 2 windows: set"):
        load(folder, overlapping(20), inputs={"shape": (1, WINDOW)})
    with pytest.raises(UsageError, match=r"inputs of float32 \[1, 50\], and the run wants float32 \[1, 60\]"):
        load(folder, inputs={"shape": (1, 60)})
    with pytest.raises(UsageError, match="recordings of one class each, and the run has other targets"):
        load(folder, task="multi-label")
    with pytest.raises(UsageError, match="has 2 class folders, and the run 3 classes"):
        load(folder, num_classes=3)


def test_one_short_recording_cannot_be_split(tmp_path: Path) -> None:
    save(tmp_path / "train/jay/0.wav", count_up(3 * WINDOW))
    with pytest.raises(UsageError, match="1 examples cannot be split"):
        load(tmp_path, class_names=("crow", "jay"))


def test_keys_of_the_agent_say_how_recordings_become_windows() -> None:
    keys: dict[str, Any] = {"server": "127.0.0.1:1", "data_window": 50, "data_sample_rate": 1000}
    assert AgentConfig(**keys).table == TableFormat(window=50, stride=50, horizon=0, sample_rate=1000)
    assert AgentConfig(**keys, data_stride=10).table.overlap == 4
    assert AgentConfig(server="127.0.0.1:1", data_window=50).table == TableFormat(window=50)


def test_other_files_beside_recordings_are_told_of(tmp_path: Path) -> None:
    folder = birds(tmp_path, 4, 2 * WINDOW)
    assert load(folder).not_read == ""
    (folder / "train/jay/9.mp3").touch()
    assert load(folder).not_read == "files not read: 1 (.mp3 1), of them 1 in train/jay"
    (folder / "unlabelled").mkdir()
    told = load(folder, targets={"missing": True}).not_read
    assert told.endswith("unlabelled is not read, because recordings need a class")


def test_folder_with_pictures_is_an_image_folder(tmp_path: Path) -> None:
    folder = birds(tmp_path, 2, WINDOW)
    (folder / "train/jay/a.txt").touch()
    assert recordings.has_recordings(folder)
    (folder / "train/jay/a.jpg").touch()
    assert not recordings.has_recordings(folder)
    with pytest.raises(UsageError, match=r"has pictures, such as .*jay/a.jpg, with one class each"):
        load(folder)


def test_stamp_changes_with_a_recording(tmp_path: Path) -> None:
    folder = birds(tmp_path, 2, WINDOW)
    run = RunConfig(**RUN, inputs={"shape": (1, WINDOW)})
    before = data_stamp(run, str(folder), None)
    assert data_stamp(run, str(folder), None) == before
    birds(tmp_path, 3, WINDOW)
    assert data_stamp(run, str(folder), None) != before


def test_doctor_reads_some_recordings(tmp_path: Path) -> None:
    folder = birds(tmp_path, 4, 2 * WINDOW)
    config = AgentConfig(server="127.0.0.1:1", data=str(folder), data_window=50, data_sample_rate=RATE)
    assert _look_at_data(config) == f"{folder} has 4 recordings of 2 classes"
    save(folder / "train/jay/1.wav", np.full(2 * WINDOW, np.nan))
    with pytest.raises(UsageError, match=r"first .*1.wav: it has samples that are no numbers"):
        _look_at_data(config)


def test_missing_package_is_named_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = birds(tmp_path, 2, WINDOW)
    monkeypatch.setitem(sys.modules, "soundfile", None)
    assert recordings.has_recordings(folder)
    with pytest.raises(UsageError, match=r"needs soundfile: pip install 'ecavg\[audio\]'$"):
        load(folder)
