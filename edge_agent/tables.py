"""Examples from a CSV file: rows of a table, or windows over a time series.

    FILE.csv    a line with the names of the columns, then a line for each example or point in time

The file is UTF-8, with commas between cells and, where need be, double quotes around them (RFC 4180).
Shape letters: R rows of the file, N examples, C columns of inputs, T columns of targets, W steps of a window.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import structlog

from ecavg.common.errors import UsageError, one_line
from ecavg.edge_agent.arrays import Arrays

# An error names at most so many columns of a file.
_MAX_NAMED = 20

log = structlog.get_logger()


@dataclass(frozen=True)
class TableFormat:
    """Which columns of a CSV file are inputs and targets, and how its rows become examples."""

    inputs: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    # How many rows one after the other are one input; None: each row is one.
    window: int | None = None
    # From the first row of a window to that of the next one.
    stride: int = 1
    # How many rows after the last of a window the row of its target is.
    horizon: int = 1
    # The largest fraction of rows that may be left out because they cannot be used.
    max_bad_rows: float = 0.01
    # Whether a target may be missing, where its cell is empty.
    missing: bool = False

    @property
    def overlap(self) -> int:
        """Return how many of the next examples share rows with an example, its target's row included."""
        if self.window is None:
            return 0
        return (self.window + self.horizon - 1) // self.stride


class Table(NamedTuple):
    """The cells of a file that count, as numbers."""

    # float64 [R, C + T], the inputs first; all of a bad row are NaN.
    values: np.ndarray
    num_inputs: int
    num_bad: int


@dataclass
class _BadRows:
    """The rows that cannot be used: how many, and the first of them."""

    path: Path
    count: int = 0
    first: str = ""

    def add(self, line: int, reason: str) -> None:
        self.count += 1
        self.first = self.first or f"{self.path}, line {line}: {one_line(reason)}"


def is_table(path: Path) -> bool:
    """Return True if the path is a CSV file."""
    try:
        return path.suffix.lower() == ".csv" and path.is_file()
    except OSError:
        return False


def open_table(path: Path, form: TableFormat, class_names: Sequence[str] = ()) -> Arrays:
    """Return the examples of a CSV file in the order of its rows.

    Whole numbers are int64, others float32. Inputs are [N, C], windows [N, C, W]; targets are [N] for one
    column, [N, T] for several. A window in which a bad row lies, or whose target does, is left out.

    Args:
        class_names: the names that cells of the target column may have in place of labels, label 0 first.

    Raises:
        UsageError: the file cannot be read, lacks a column, or has too many bad rows, or too few others.
    """
    values, num_inputs, _ = read_table(path, form, class_names)
    inputs, targets = values[:, :num_inputs], values[:, num_inputs:]
    if form.window is not None:
        inputs, targets = _windows(inputs, targets, form)
    is_whole = np.isfinite(inputs).all(tuple(range(1, inputs.ndim)))
    is_whole &= np.isfinite(targets).all(1) | form.missing
    if not is_whole.any():
        raise UsageError(
            f"data source {path} has {len(values)} rows, which are too few: no example is complete"
        )
    targets = targets[:, 0] if targets.shape[1] == 1 else targets
    return Arrays(_as_numbers(inputs[is_whole]), _as_numbers(targets[is_whole]))


def names_in(path: Path, form: TableFormat) -> tuple[str, ...]:
    """Return the different texts in the target column, sorted; none where any of them is a number.

    Raises:
        UsageError: the file cannot be read, or lacks a column.
    """
    if len(form.targets) != 1:
        return ()
    texts = {cells[-1].strip() for _, cells in _rows(path, form) if cells} - {""}
    return () if any(map(_is_number, texts)) else tuple(sorted(texts))


def read_table(path: Path, form: TableFormat, class_names: Sequence[str] = ()) -> Table:
    """Read the columns that count; rows that cannot be used are counted, logged once, and become NaN.

    Raises:
        UsageError: the file cannot be read, lacks a column, or has too many bad rows.
    """
    label_of = {name: str(label) for label, name in enumerate(class_names)}
    bad, rows = _BadRows(path), []
    width = len(form.inputs) + len(form.targets)
    for line, cells in _rows(path, form):
        try:
            rows.append(_numbers(cells, label_of, form))
        except ValueError as error:
            bad.add(line, str(error))
            rows.append([np.nan] * width)
    if bad.count > form.max_bad_rows * len(rows):
        raise UsageError(
            f"{bad.count} of {len(rows)} rows cannot be used, first {bad.first}: correct them, or allow more"
            " with --max-bad-rows"
        )
    if bad.count:
        log.warning("rows_skipped", num_skipped=bad.count, num_rows=len(rows), first=bad.first)
    return Table(np.array(rows, np.float64).reshape(-1, width), len(form.inputs), bad.count)


def _rows(path: Path, form: TableFormat) -> list[tuple[int, list[str]]]:
    """Return the cells that count of each row, the inputs first, with the row's line in the file.

    A row with more or fewer cells than there are columns has none.
    """
    if not form.inputs or not form.targets:
        raise UsageError(
            f"data source {path}: name its columns with --data-inputs COLUMN, repeatable, and"
            " --data-target COLUMN"
        )
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            header = [name.strip() for name in next(reader, [])]
            places = [_place(path, header, name) for name in (*form.inputs, *form.targets)]
            return [
                (reader.line_num, [row[n] for n in places] if len(row) == len(header) else [])
                for row in reader
                if row
            ]
    except (OSError, UnicodeError, csv.Error) as error:
        raise UsageError(
            f"data source {path} cannot be read ({error}): it should be CSV in UTF-8, with commas"
        ) from error


def _place(path: Path, header: Sequence[str], name: str) -> int:
    if header.count(name) == 1:
        return header.index(name)
    found = ", ".join(map(one_line, header[:_MAX_NAMED]))
    raise UsageError(
        f"data source {path} has {header.count(name)} columns {name!r}; the first line names: {found}"
    )


def _numbers(cells: Sequence[str], label_of: dict[str, str], form: TableFormat) -> list[float]:
    """Return the cells of one row as numbers, or raise ValueError."""
    if not cells:
        raise ValueError("it has more or fewer cells than the first line")
    numbers: list[float] = []
    for name, cell in zip((*form.inputs, *form.targets), cells, strict=True):
        text = cell.strip()
        if len(numbers) >= len(form.inputs):
            text = label_of.get(text, text)
            if form.missing and not text:
                numbers.append(np.nan)
                continue
        if not _is_number(text):
            raise ValueError(f"{name} is {text[:40]!r}, which is no number and no name of a class")
        numbers.append(float(text))
    return numbers


def _is_number(text: str) -> bool:
    try:
        return bool(np.isfinite(float(text)))
    except ValueError:
        return False


def _windows(inputs: np.ndarray, targets: np.ndarray, form: TableFormat) -> tuple[np.ndarray, np.ndarray]:
    """Return the windows [N, C, W], as a view, and their targets [N, T]."""
    assert form.window is not None
    if len(inputs) < form.window + form.horizon:
        return np.empty((0, inputs.shape[1], form.window)), targets[:0]
    windows = np.lib.stride_tricks.sliding_window_view(inputs, form.window, axis=0)
    ends = targets[form.window - 1 + form.horizon :]
    return windows[: len(ends) : form.stride], ends[:: form.stride]


def _as_numbers(values: np.ndarray) -> np.ndarray:
    are_whole = (values == np.rint(values)).all() and (np.abs(values) < 2.0**53).all()
    return values.astype(np.int64 if are_whole else np.float32)
