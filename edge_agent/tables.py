"""Examples from a table: its rows, or windows over a time series.

The file is CSV or Parquet; see edge_agent/columns.py.
Shape letters: R rows of the file, N examples, C columns of inputs, T columns of targets, W steps of a window.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ecavg.common.dataset import MISSING
from ecavg.common.errors import UsageError
from ecavg.edge_agent.arrays import Arrays
from ecavg.edge_agent.columns import LARGEST_NUMBER, BadCells, Columns, as_class, read_columns, usable_rows


@dataclass(frozen=True)
class TableFormat:
    """Which columns of a table are inputs and targets, and how rows, or samples of sound, become examples."""

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
    # What stands between the names of classes in a cell of the target column; None: a cell is one.
    separator: str | None = None
    # How many samples a second the windows of recordings have; None: the source has no recordings.
    sample_rate: int | None = None
    # Whether a target may be missing, where its cell is empty.
    missing: bool = False
    # How many classes there are where targets are labels, from 0 on; None: they are not, or it is not known.
    num_classes: int | None = None

    @property
    def overlap(self) -> int:
        """Return how many of the next examples share rows with an example, its target's row included."""
        if self.window is None:
            return 0
        return (self.window + self.horizon - 1) // self.stride


class Block(NamedTuple):
    """The numbers in a column."""

    # float64 [R, k]; NaN where the cell cannot be used.
    values: np.ndarray
    # What such a cell is, as in "no number".
    what: str
    # bool [R], the cells that are empty and may be; None: none may.
    may_lack: np.ndarray | None = None

    @property
    def bad_cells(self) -> BadCells:
        """Return which cells cannot be used."""
        are_bad = np.isnan(self.values).any(1)
        return BadCells(are_bad if self.may_lack is None else are_bad & ~self.may_lack, self.what)


def open_table(path: Path, form: TableFormat, class_names: Sequence[str] = ()) -> Arrays:
    """Return the examples of a table in the order of its rows; see `examples_of`.

    Raises:
        UsageError: the file cannot be read, lacks a column, or has too many bad rows, or too few others.
    """
    return examples_of(read_table(path, form), form, class_names)


def examples_of(columns: Columns, form: TableFormat, class_names: Sequence[str]) -> Arrays:
    """Return the examples in the columns of a table, in the order of the rows.

    Whole numbers are int64, others float32. Inputs are [N, C], windows [N, C, W]; targets are [N] for one
    column, [N, T] for several. A window in which a bad row lies is left out, and so is one whose target lies
    there, unless it may be missing.

    Args:
        class_names: the names that cells of the target column may have in place of labels, label 0 first.

    Raises:
        UsageError: there are too many bad rows, or too few others.
    """
    num_inputs = len(form.inputs)
    blocks = [Block(_numbers(cells, {})[:, None], "no number") for cells in columns.cells[:num_inputs]]
    blocks += target_blocks(columns, form, class_names)
    is_usable = usable_rows(columns, [block.bad_cells for block in blocks], form.max_bad_rows)
    values = np.where(is_usable[:, None], np.concatenate([block.values for block in blocks], 1), np.nan)
    inputs, targets = values[:, :num_inputs], values[:, num_inputs:]
    if form.window is not None:
        inputs, targets = _windows(inputs, targets, form)
    is_whole = np.isfinite(inputs).all(tuple(range(1, inputs.ndim)))
    is_whole &= np.isfinite(targets).all(1) | form.missing
    if not is_whole.any():
        raise UsageError(
            f"data source {columns.path} has {len(values)} rows, which are too few: no example is complete"
        )
    return Arrays(_as_numbers(inputs[is_whole]), targets_of(targets[is_whole], form))


def target_blocks(columns: Columns, form: TableFormat, class_names: Sequence[str]) -> list[Block]:
    """Return the numbers of each target column: one a row, or where a cell has several names, K of K classes.

    Raises:
        UsageError: the cells are names of classes, and the run has none.
    """
    cells = columns.cells[len(form.inputs) :]
    may_lack = [_are_empty(column) if form.missing else None for column in cells]
    if form.separator is None:
        label_of = {name: label for label, name in enumerate(class_names)}
        what = _what_is_wanted(form, class_names)
        numbers = [_targets_in(column, label_of, form)[:, None] for column in cells]
        return [Block(values, what, empty) for values, empty in zip(numbers, may_lack, strict=True)]
    if not class_names:
        raise UsageError(
            f"data source {columns.path} has names of classes: set class_names in the server's [run] table"
        )
    what = f"not names of the run's classes with {form.separator} between them"
    return [
        Block(_several_classes(column, form.separator, class_names, empty), what, empty)
        for column, empty in zip(cells, may_lack, strict=True)
    ]


def _what_is_wanted(form: TableFormat, class_names: Sequence[str]) -> str:
    """Return what a cell of the target column that cannot be used is not."""
    name = " and no name of a class" if class_names else ""
    return ("no number" if form.num_classes is None else f"no label from 0 to {form.num_classes - 1}") + name


def _targets_in(cells: np.ndarray, label_of: Mapping[str, int], form: TableFormat) -> np.ndarray:
    """Return the cells of a target column as float64 [R]; NaN is no number or, among labels, no label."""
    values = _numbers(cells, label_of)
    if form.num_classes is None:
        return values
    least = MISSING if form.missing else 0
    are_labels = (values == np.rint(values)) & (values >= least) & (values < form.num_classes)
    return np.where(are_labels, values, np.nan)


def targets_of(values: np.ndarray, form: TableFormat) -> np.ndarray:
    """Return target values [N, T] as int64 or float32: [N] for one column of numbers or labels."""
    is_one = values.shape[1] == 1 and form.separator is None
    return _as_numbers(values[:, 0] if is_one else values)


def names_in(path: Path, form: TableFormat) -> tuple[str, ...]:
    """Return the different texts in the target column, sorted; none where any of them is a number.

    Where a cell has the names of several classes, whatever they are, these are the texts.

    Raises:
        UsageError: the file cannot be read, or lacks a column.
    """
    if len(form.targets) != 1:
        return ()
    cells = read_table(path, form).cells[-1]
    if cells.dtype != object:
        return ()
    texts = {as_class(text) for text in cells.tolist() if text}
    if form.separator:
        return tuple(sorted({name for text in texts for name in _pieces(text, form.separator)}))
    return () if any(np.isfinite(_number(text, {})) for text in texts) else tuple(sorted(texts))


def read_table(path: Path, form: TableFormat) -> Columns:
    """Read the columns that count, the inputs first.

    Raises:
        UsageError: the file cannot be read, lacks a column, or nothing says which columns count.
    """
    if not form.inputs or not form.targets:
        raise UsageError(
            f"data source {path}: name its columns with --data-inputs COLUMN, repeatable, and"
            " --data-target COLUMN"
        )
    return read_columns(path, (*form.inputs, *form.targets))


def _numbers(cells: np.ndarray, label_of: Mapping[str, int]) -> np.ndarray:
    """Return the cells of a column as float64 [R], names of classes as their labels; NaN is no number."""
    if cells.dtype == object:
        values = np.fromiter((_number(cell, label_of) for cell in cells), np.float64, len(cells))
    elif label_of:
        # A class may have a number for a name.
        values = _numbers(np.array([_text(cell) for cell in cells.tolist()], object), label_of)
    else:
        values = cells
    return np.where(np.abs(values) <= LARGEST_NUMBER, values, np.nan)


def _are_empty(cells: np.ndarray) -> np.ndarray:
    """Return which cells of a column are empty, bool [R]."""
    if cells.dtype == object:
        return np.array([cell is None or cell == "" for cell in cells], bool)
    are_empty: np.ndarray = np.isnan(cells)
    return are_empty


def _number(text: str | None, label_of: Mapping[str, int]) -> float:
    """Return the label or the number that a text means; NaN: it means none."""
    if text and label_of and (label := label_of.get(as_class(text))) is not None:
        return label
    try:
        return float(text or "nan")
    except ValueError:
        return np.nan


def _several_classes(
    cells: np.ndarray, separator: str, class_names: Sequence[str], may_lack: np.ndarray | None
) -> np.ndarray:
    """Return float64 [R, K] of 0 and 1: which of K classes each cell names; NaN where one is no class.

    Args:
        may_lack: bool [R], the cells that are empty and name nothing yet; None: an empty cell has no class.
    """
    label_of = {name: label for label, name in enumerate(class_names)}
    found = np.zeros((len(cells), len(class_names)))
    for row, cell in enumerate(cells.tolist()):
        names = None if cell is None else _pieces(cell if isinstance(cell, str) else _text(cell), separator)
        if names is None or not names <= label_of.keys():
            found[row] = np.nan
        else:
            found[row, [label_of[name] for name in names]] = 1
    if may_lack is not None:
        found[may_lack] = np.nan
    return found


def _pieces(text: str, separator: str) -> set[str]:
    """Return the names in a cell; an empty one has none."""
    return {as_class(piece.strip()) for piece in text.split(separator)} - {""}


def _text(number: float) -> str:
    return str(int(number)) if number.is_integer() else str(number)


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
