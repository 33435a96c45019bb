"""Examples as NumPy arrays: what a user's own code returns, and what files of arrays hold.

    FILE.npz                                the arrays `inputs` and `targets`, and where there is a test split
                                            `inputs_test` and `targets_test`
    DIR/{inputs,targets}.npy                the same, one array a file, read as they are needed
    DIR/{train,test}/{inputs,targets}.npy   the same with a test split

Nothing is unpickled: an array of Python objects is refused.
"""

import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.lib import format as npy

from ecavg.common.dataset import MISSING, Inputs, Targets
from ecavg.common.errors import UsageError
from ecavg.common.schema import are_missing
from ecavg.edge_agent.labels_file import state_of_labels

_NAMES = ("inputs", "targets")


class Arrays(NamedTuple):
    """The inputs and targets of some examples."""

    # [N, …]
    inputs: np.ndarray
    # [N, …]
    targets: np.ndarray


def is_arrays(path: Path) -> bool:
    """Return True if the path is a file of arrays, or a folder of such files."""
    try:
        if path.is_file():
            return path.suffix.lower() == ".npz"
        return any((path / part / "inputs.npy").is_file() for part in ("", "train"))
    except OSError:
        return False


def stamp_of_arrays(path: Path) -> str:
    """Return what tells files of arrays from an earlier state of them."""
    files = [path] if path.is_file() else sorted(path.rglob("*.npy"))
    return " ".join([*map(_state_of, files), state_of_labels(path)])


def _state_of(file: Path) -> str:
    try:
        status = file.stat()
    except OSError:
        # Somebody has just taken it away, or it is a link that leads nowhere.
        return f"{file.name}:gone"
    return f"{file.name}:{status.st_size}:{status.st_mtime_ns}"


def open_arrays(path: Path) -> tuple[Arrays, Arrays | None]:
    """Return the train and the test split of a file or folder of arrays; None: there is no test split.

    Raises:
        UsageError: the arrays cannot be read, or are no examples.
    """
    try:
        train, test = _open_npz(path) if path.is_file() else _open_folder(path)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UsageError(
            f"data source {path} cannot be read ({error}): it should have the arrays"
            " inputs and targets, of numbers"
        ) from error
    return check_arrays(str(path), train), check_arrays(str(path), test) if test else None


def check_arrays(name: str, arrays: Any) -> Arrays:
    """Return the arrays of a source; their integers become int64, but for pixels, and their reals float32.

    Raises:
        UsageError: they are not two arrays of numbers, with one target for each input.
    """
    try:
        inputs, targets = (np.asarray(array) for array in arrays)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"data source {name} must return (inputs, targets), or None where there is no test split"
        ) from error
    if targets.shape[:1] != inputs.shape[:1] or inputs.ndim < 2 or not len(inputs):
        raise UsageError(
            f"data source {name}: inputs are {inputs.dtype} {list(inputs.shape)}, targets {targets.dtype}"
            f" {list(targets.shape)}; there must be one target for each input, and at least one"
        )
    inputs = inputs if inputs.dtype == np.uint8 else _converted(name, "inputs", inputs)
    return Arrays(inputs, _converted(name, "targets", targets))


def as_wanted(noun: str, values: np.ndarray, wanted: Inputs | Targets) -> np.ndarray:
    """Return inputs or targets in the dtype and shape of the run.

    Integers become numbers where the run wants these, and one number an example gets an axis of its own.

    Raises:
        UsageError: they have another dtype or shape, or values that the run does not have.
    """
    if wanted.shape == (1,) and values.ndim == 1:
        values = values[:, None]
    if isinstance(wanted, Targets) and wanted.missing and wanted.dtype == "int64":
        values = as_labels(values)
    if wanted.dtype == "float32" and values.dtype == np.int64:
        values = values.astype(np.float32)
    if values.dtype.name != wanted.dtype or values.shape[1:] != wanted.shape:
        advice = "give whole numbers, or " if (wanted.dtype, values.dtype.kind) == ("int64", "f") else ""
        raise UsageError(
            f"the data has {noun} of {values.dtype} {list(values.shape[1:])}, and the run wants"
            f" {wanted.dtype} {list(wanted.shape)}: {advice}describe them in the server's [run.{noun}] table"
        )
    _check_range(noun, values, wanted)
    return np.ascontiguousarray(values)


def statistics(values: np.ndarray) -> str:
    """Return mean and standard deviation of [N, …] for each channel or feature, as a configuration has them.

    Those of uint8 are of values scaled to 0..1.
    """
    others = (0, *range(2, values.ndim))
    scale = 255 if values.dtype == np.uint8 else 1
    found = values.mean(others, np.float64) / scale, values.std(others, np.float64) / scale
    return ", ".join(
        f"{name} = [{', '.join(f'{number:.4g}' for number in np.atleast_1d(numbers))}]"
        for name, numbers in zip(("mean", "std"), found, strict=True)
    )


def as_labels(targets: np.ndarray) -> np.ndarray:
    """Return whole numbers, of which some may be missing (NaN), as int64; others as they are."""
    if targets.dtype.kind != "f":
        return targets
    given = targets[~np.isnan(targets)]
    if not (np.isfinite(given) & (given == np.rint(given))).all():
        return targets
    return np.where(np.isnan(targets), MISSING, targets).astype(np.int64)


def _check_range(noun: str, values: np.ndarray, wanted: Inputs | Targets) -> None:
    low, high = (
        (-np.inf if wanted.low is None else wanted.low),
        (np.inf if wanted.high is None else wanted.high),
    )
    if values.dtype == np.uint8 and (wanted.low, wanted.high) == (None, None):
        return
    is_bad = ~(np.isfinite(values) & (values >= low) & (values <= high))
    if isinstance(wanted, Targets) and wanted.missing:
        is_bad &= ~are_missing(values)
    if is_bad.any():
        first = int(np.flatnonzero(is_bad.reshape(len(values), -1).any(1))[0])
        what = "no finite numbers" if (low, high) == (-np.inf, np.inf) else f"not from {low:g} to {high:g}"
        raise UsageError(
            f"the data has {noun} that are {what}, first in example {first}"
            f" ({int(is_bad.sum())} values): correct or remove them, or set low and high in the server's"
            f" [run.{noun}] table"
        )


def _converted(name: str, noun: str, values: np.ndarray) -> np.ndarray:
    if values.dtype.kind in "iub":
        return values.astype(np.int64, copy=False)
    if values.dtype.kind == "f":
        # What is too large for float32 becomes infinite, and is refused as such.
        with np.errstate(over="ignore"):
            return values.astype(np.float32, copy=False)
    raise UsageError(f"data source {name}: {noun} are {values.dtype}, not numbers")


def _open_npz(path: Path) -> tuple[Arrays, Arrays | None]:
    with zipfile.ZipFile(path) as file:
        members = set(file.namelist())
        train = Arrays(*(_read_member(file, name) for name in _NAMES))
        if "inputs_test.npy" not in members:
            return train, None
        return train, Arrays(*(_read_member(file, f"{name}_test") for name in _NAMES))


def _read_member(file: zipfile.ZipFile, name: str) -> np.ndarray:
    with file.open(f"{name}.npy") as member:
        return np.asarray(npy.read_array(member))


def _open_folder(path: Path) -> tuple[Arrays, Arrays | None]:
    train = path / "train" if (path / "train").is_dir() else path
    test = path / "test"
    return _open_files(train), _open_files(test) if test.is_dir() else None


def _open_files(folder: Path) -> Arrays:
    return Arrays(*(npy.open_memmap(folder / f"{name}.npy", mode="r") for name in _NAMES))
