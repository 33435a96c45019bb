"""Recordings of sound: WAV files in class folders, cut into windows of equal length.

    DIR/{train,test}/<class>/**/*.wav

An example is one window of one channel, samples from -1 to 1, unless a file of floats has others. Where there
is no test split, a long recording has its last windows held out, and short ones are held out as a whole, so
no sample is on both sides.
Shape letters: P pieces of recordings, N windows, W samples of a window.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import chain
from math import gcd
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from ecavg.common.agent_progress import OnExamples, ignore_examples
from ecavg.common.config import RunConfig
from ecavg.common.dataset import DatasetSpec, Inputs
from ecavg.common.errors import UsageError
from ecavg.common.shards import Shard, check_splittable
from ecavg.edge_agent.arrays import as_wanted
from ecavg.edge_agent.folder_walk import items_below
from ecavg.edge_agent.image_folder import class_folders, classes_of, labelled_files
from ecavg.edge_agent.reading import check_some, leave_out, read_each
from ecavg.edge_agent.splits import Source, is_held_out
from ecavg.edge_agent.tables import TableFormat

RECORDINGS = (".wav",)
# A recording of so many windows is split by time; shorter ones are trained on, or held out, as a whole.
LONG = 64
# So many samples of a file are in memory at once where only their digest counts.
_BLOCK = 1 << 16


class Piece(NamedTuple):
    """Windows of a recording, one after the other."""

    path: Path
    label: int
    # The first of them, and how many there are.
    begin: int
    num_windows: int


class _Recording(NamedTuple):
    """A file, and what decides on which side of a split it is."""

    whole: Piece
    # uint64, follows from the samples of the file.
    rank: int


def has_recordings(path: Path) -> bool:
    """Return True if there are recordings, and no pictures, in the class folders of a folder."""
    try:
        folders = class_folders(path / "train").values() if (path / "train").is_dir() else ()
        has_any = False
        for item in chain.from_iterable(map(items_below, folders)):
            if item.is_picture:
                return False
            has_any = has_any or item.has_suffix(RECORDINGS)
        return has_any
    except (OSError, UsageError):
        # What is wrong is said by whoever reads the folder.
        return False


def open_recordings(path: Path, form: TableFormat, run: RunConfig | None = None) -> Source:
    """Find the recordings and how many windows each has.

    Args:
        form: the window, the stride and the sample rate; and how many files may be left out.
        run: None: the run is not known, and nothing is held out.

    Raises:
        UsageError: soundfile is not installed, the form lacks something, the run has other targets, a folder
            cannot be read, or too many files cannot be.
    """
    _check_form(path, form)
    if run and (run.spec.targets.dtype, run.spec.targets.shape) != ("int64", ()):
        raise UsageError(
            f"data folder {path} has recordings of one class each, and the run has other targets"
        )
    class_names = classes_of(path, run) if run else tuple(class_folders(path / "train"))
    wanted = run.spec.inputs if run else Inputs("float32", ())
    train = _list_recordings(path / "train", class_names, form, wanted)
    if (path / "test").is_dir():
        test = _list_recordings(path / "test", class_names, form, wanted)
        return Source(_split_of(train, form), _split_of(test, form))
    if run is None:
        return Source(_split_of(train, form), None)
    kept, held_out = _hold_out(train, run.holdout_fraction, form.overlap)
    return Source(RecordingSplit(kept, form), RecordingSplit(held_out, form))


@dataclass(frozen=True)
class RecordingSplit:
    """The train or the test part of recordings."""

    pieces: Sequence[Piece]
    form: TableFormat

    noun: ClassVar = "recording"
    # Pieces do not overlap, and windows are cut later.
    is_series: ClassVar = False

    @property
    def targets(self) -> np.ndarray:
        """Return the label of each piece, int64 [P]."""
        return np.array([piece.label for piece in self.pieces], np.int64)

    def read(
        self, indices: np.ndarray, spec: DatasetSpec, on_read: OnExamples = ignore_examples
    ) -> tuple[Shard, int]:
        """Return the windows of these pieces; files that cannot be read are left out, and logged once.

        Raises:
            UsageError: too many files cannot be read, or the windows are not what the run has.
        """
        pieces = [self.pieces[n] for n in indices]
        ends = np.cumsum([piece.num_windows for piece in pieces])
        inputs = np.empty((ends[-1], 1, self.form.window or 1), np.float32)

        def cut(n: int, _: Path) -> None:
            inputs[ends[n] - pieces[n].num_windows : ends[n], 0] = _windows_of(pieces[n], self.form)

        failures = read_each([piece.path for piece in pieces], cut, on_read)
        are_read = leave_out(failures, len(pieces), self.form.max_bad_rows, self.noun)
        counts = [piece.num_windows for piece in pieces]
        is_window_read = np.repeat(are_read, counts)
        labels = np.repeat(self.targets[indices], counts)[is_window_read]
        inputs = as_wanted("inputs", inputs[is_window_read] if failures else inputs, spec.inputs)
        return Shard(inputs, as_wanted("targets", labels, spec.targets)), len(failures)

    def check_some(self) -> None:
        """Read a few recordings; raise UsageError if one of them cannot be read."""
        piece_of = {piece.path: piece for piece in self.pieces}
        check_some([*piece_of], lambda path: _windows_of(piece_of[path], self.form))


def _check_form(path: Path, form: TableFormat) -> None:
    if form.window is None or form.sample_rate is None:
        raise UsageError(
            f"data source {path} has recordings: say how long an example is with --data-window SAMPLES, and"
            " how many samples a second has with --data-sample-rate"
        )
    _soundfile(path)


def _soundfile(path: Path) -> Any:
    try:
        import soundfile
    except (ImportError, OSError) as error:
        # OSError: the package is there, and the library that it needs is not.
        raise UsageError(f"data source {path} needs soundfile: pip install 'ecavg[audio]'") from error
    return soundfile


def _list_recordings(
    folder: Path, class_names: Sequence[str], form: TableFormat, wanted: Inputs
) -> list[_Recording]:
    """Return the recordings below a folder, in an order that mixes classes and follows from their samples.

    The cloud holds out a block of windows, which so are of several classes.
    """
    paths, labels = labelled_files(folder, class_names, RECORDINGS)
    found: list[_Recording] = []

    def look(n: int, path: Path) -> None:
        whole = Piece(path, labels[n], 0, _count_windows(path, form))
        found.append(_Recording(whole, _rank_of(path, wanted)))

    failures = read_each(paths, look, ignore_examples)
    leave_out(failures, len(paths), form.max_bad_rows, RecordingSplit.noun)
    if not found:
        raise UsageError(f"data source {folder}: none of its recordings can be read; see the warning above")
    return sorted(found, key=lambda recording: (recording.rank, recording.whole.path))


def _rank_of(path: Path, wanted: Inputs) -> int:
    """Return a number that follows from the samples; the rest of a file may have the time of its writing.

    Raises:
        ValueError: there are samples that the run does not have.
    """
    digest = blake2b(digest_size=8)
    with _soundfile(path).SoundFile(path) as file:
        for block in file.blocks(_BLOCK, dtype="float32"):
            _check_samples(block, wanted)
            digest.update(np.ascontiguousarray(block).data)
    return int.from_bytes(digest.digest())


def _check_samples(block: np.ndarray, wanted: Inputs) -> None:
    """Raise ValueError if mixed samples are not finite, or out of bounds: files of floats may have any.

    Args:
        block: [samples], or [samples, channels].
    """
    mixed = block if block.ndim == 1 else block.mean(1)
    low = -np.inf if wanted.low is None else wanted.low
    high = np.inf if wanted.high is None else wanted.high
    if not np.isfinite(mixed).all():
        raise ValueError("it has samples that are no numbers")
    if ((mixed < low) | (mixed > high)).any():
        raise ValueError(f"it has samples that are not from {low:g} to {high:g}")


def _count_windows(path: Path, form: TableFormat) -> int:
    """Return how many windows a recording has; raise ValueError if it is shorter than one."""
    assert form.window is not None
    info = _soundfile(path).info(path)
    num_samples = -(-info.frames * form.sample_rate // info.samplerate)
    if num_samples < form.window:
        raise ValueError(f"it has {num_samples} samples, a window {form.window}")
    return int((num_samples - form.window) // form.stride + 1)


def _split_of(recordings: Sequence[_Recording], form: TableFormat) -> RecordingSplit:
    return RecordingSplit([recording.whole for recording in recordings], form)


def _hold_out(
    recordings: Sequence[_Recording], fraction: float, overlap: int
) -> tuple[list[Piece], list[Piece]]:
    """Return the pieces to train on and those to hold out; no sample is in both.

    The last windows of a long recording are held out, and a gap before them is in neither part. Short
    recordings are held out by their samples, so that they stay on their side whatever files come.

    Raises:
        UsageError: there is only one recording, and it is short.
    """
    cuts = [_cut(recording.whole.num_windows, fraction, overlap) for recording in recordings]
    ranks = np.array([recording.rank for recording in recordings], np.uint64)
    if any(cuts):
        sides = ranks < fraction * 2.0**64
    else:
        check_splittable(len(recordings))
        sides = is_held_out(ranks, fraction)
    kept: list[Piece] = []
    held_out: list[Piece] = []
    for (piece, _), cut, is_out in zip(recordings, cuts, sides, strict=True):
        if cut:
            kept.append(piece._replace(num_windows=cut - overlap))
            held_out.append(piece._replace(begin=cut, num_windows=piece.num_windows - cut))
        else:
            (held_out if is_out else kept).append(piece)
    return kept, held_out


def _cut(num_windows: int, fraction: float, overlap: int) -> int:
    """Return the first window of a long recording that is held out; 0 for a short recording."""
    cut = num_windows - max(1, int(fraction * num_windows))
    return cut if num_windows >= LONG and cut > overlap else 0


def _windows_of(piece: Piece, form: TableFormat) -> np.ndarray:
    """Return the windows of a piece, float32 [N, W]: all channels mixed, at the sample rate of the form."""
    assert form.window is not None
    assert form.sample_rate is not None
    begin = piece.begin * form.stride
    end = begin + (piece.num_windows - 1) * form.stride + form.window
    samples = _samples(piece.path, form.sample_rate, begin, end)
    if len(samples) < end - begin or not np.isfinite(samples).all():
        raise ValueError("it is cut off, or has samples that are no numbers")
    return np.lib.stride_tricks.sliding_window_view(samples, form.window)[:: form.stride]


def _samples(path: Path, rate: int, begin: int, end: int) -> np.ndarray:
    """Return samples begin to end of a recording at another rate or its own, float32.

    They are from -1 to 1, unless the file is one of floats that has others.
    """
    with _soundfile(path).SoundFile(path) as file:
        if file.samplerate == rate:
            file.seek(begin)
            return np.asarray(file.read(end - begin, "float32", always_2d=True).mean(1))
        from scipy.signal import resample_poly

        mixed = file.read(dtype="float32", always_2d=True).mean(1)
        factor = gcd(rate, file.samplerate)
        resampled = resample_poly(mixed, rate // factor, file.samplerate // factor)
        # The filter may go a little beyond the values between which the samples are.
        most = max(1.0, float(np.abs(mixed).max(initial=0.0)))
        return np.asarray(resampled[begin:end].clip(-most, most), np.float32)
