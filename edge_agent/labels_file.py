"""Targets that are known later than their examples, in a small CSV file beside the data.

    DIR/labels.csv          for an image folder (file,target) and for a folder of arrays (row,target)
    FILE.labels.csv         for FILE.npz (row,target)

The first line names the columns. A file is named as it lies in DIR/unlabelled; rows count from 0. Where a
target is several numbers, each has a column of its own.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import structlog

from ecavg.common.dataset import Targets
from ecavg.common.errors import UsageError, one_line
from ecavg.edge_agent.columns import LARGEST_NUMBER, as_class, open_csv

log = structlog.get_logger()


def labels_path(source: Path) -> Path:
    """Return where the targets of a source are that came later; there need not be such a file."""
    return source / "labels.csv" if source.is_dir() else source.with_suffix(".labels.csv")


def state_of_labels(source: Path) -> str:
    """Return what tells the file from an earlier state of it; "" where there is none."""
    try:
        status = labels_path(source).stat()
    except OSError:
        return ""
    return f"{status.st_size}:{status.st_mtime_ns}"


def labels_of_files(source: Path, names: Sequence[str], class_names: Sequence[str]) -> np.ndarray:
    """Return the label of each of these files, int64 [N]; -1 for those that the file does not name.

    Raises:
        UsageError: the file cannot be read, or has a target that is no class.
    """
    path, label_of = labels_path(source), {name: label for label, name in enumerate(class_names)}
    labels = np.full(len(names), -1, np.int64)
    places = {name: place for place, name in enumerate(names)}
    num_strangers = 0
    for line, (name, *cells) in _rows(path, "file", 1):
        label = label_of.get(as_class(cells[0]))
        if label is None:
            raise _refusal(path, line, f"{cells[0]!r} is not one of the run's classes")
        if name in places:
            labels[places[name]] = label
        num_strangers += name not in places
    if num_strangers:
        log.warning("labels_without_file", num_labels=num_strangers, path=str(path))
    return labels


def with_late_targets(
    source: Path, targets: np.ndarray, described: Targets, class_names: Sequence[str]
) -> np.ndarray:
    """Return targets, [N, …], with those that the file has in their rows.

    Raises:
        UsageError: the file cannot be read, or has a row or a target that is none.
    """
    path, label_of = labels_path(source), {name: str(label) for label, name in enumerate(class_names)}
    if not path.exists():
        return targets
    # Targets that do not fit the run stay as they are, and are refused later.
    wanted = targets.astype(described.dtype) if targets.dtype.kind == "i" else np.array(targets)
    for line, (row, *cells) in _rows(path, "row", max(1, int(np.prod(targets.shape[1:], dtype=int)))):
        try:
            values = np.array([_value(label_of.get(as_class(cell), cell), described) for cell in cells])
            wanted[_place(row, len(wanted))] = values.reshape(targets.shape[1:])
        except ValueError as error:
            raise _refusal(path, line, str(error)) from error
    return wanted


def _value(text: str, described: Targets) -> float:
    """Return the number that a text is; raise ValueError if no target of the run may be it."""
    try:
        value = float(text)
    except ValueError as error:
        raise ValueError(f"{text!r} is neither a number nor a class of the run") from error
    low, high = described.low, described.high
    is_within = (low is None or value >= low) and (high is None or value <= high)
    if not (abs(value) <= LARGEST_NUMBER and is_within):
        raise ValueError(f"{text!r} is no target of the run")
    if described.dtype == "int64" and not value.is_integer():
        raise ValueError(f"{text!r} is no whole number")
    return value


def _place(text: str, num_rows: int) -> int:
    if not (text.isascii() and text.isdecimal() and int(text) < num_rows):
        raise ValueError(f"{text!r} is not a row from 0 to {num_rows - 1}")
    return int(text)


def _rows(path: Path, key: str, num_targets: int) -> list[tuple[int, list[str]]]:
    """Return the cells of each row with its line in the file; none where there is no file."""
    if not path.exists():
        return []
    with open_csv(path, str(path)) as reader:
        header = [name.strip() for name in next(reader, [])]
        rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if row]
    if header[:1] != [key] or len(header) != 1 + num_targets:
        raise _refusal(path, 1, f"the columns should be {key} and {num_targets} for the target")
    for line, cells in rows:
        if len(cells) != len(header):
            raise _refusal(path, line, "it has more or fewer cells than the first line")
    return rows


def _refusal(path: Path, line: int, problem: str) -> UsageError:
    return UsageError(f"{path}, line {line}: {one_line(problem)}: correct it")
