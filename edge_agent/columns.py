"""The columns of a file that holds a table: CSV or Parquet.

    FILE.csv                a line with the names of the columns, then a line for each row
    FILE.parquet, FILE.pq   Apache Parquet, which pyarrow reads

A CSV file is UTF-8, with commas between cells and, where need be, double quotes around them (RFC 4180).
Shape letter: R rows of the file.
"""

import csv
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import structlog

from ecavg.common.errors import UsageError, one_line

if TYPE_CHECKING:
    import pyarrow
    from pyarrow import parquet

CSV = ".csv"
PARQUET = (".parquet", ".pq")
# Numbers become float32, which has none beyond.
LARGEST_NUMBER = float(np.finfo(np.float32).max)
# An error names at most so many columns of a file.
_MAX_NAMED = 20
# An error shows at most so many characters of a cell.
_MAX_SHOWN = 40

log = structlog.get_logger()


class Columns(NamedTuple):
    """Columns of a file."""

    path: Path
    names: Sequence[str]
    # For each name float64 [R], NaN where there is no number, or objects [R], texts, None where is none.
    cells: Sequence[np.ndarray]
    # What a user calls a row, as in "line 8", and the number of each, [R].
    noun: str
    numbers: Sequence[int]
    # Why a cell is None.
    why_none: str


class BadCells(NamedTuple):
    """The cells of a column that cannot be used."""

    # bool [R].
    are_bad: np.ndarray
    # What such a cell is, as in "no number".
    what: str


def is_table(path: Path) -> bool:
    """Return True if the path is a file of columns."""
    try:
        return path.suffix.lower() in (CSV, *PARQUET) and path.is_file()
    except OSError:
        return False


def count_rows(path: Path) -> int:
    """Return how many rows a table has beside its header, without reading their cells.

    Raises:
        UsageError: the Parquet file cannot be read, or pyarrow is missing.
    """
    if path.suffix.lower() in PARQUET:
        with _parquet_file(path) as file:
            return int(file.metadata.num_rows)
    with path.open("rb") as file:
        return max(0, sum(bool(line.strip()) for line in file) - 1)


def as_class(text: str) -> str:
    """Return a cell as names of classes are written, in Unicode's normal form NFC."""
    return unicodedata.normalize("NFC", text)


@contextmanager
def open_csv(path: Path, name: str) -> Iterator[Any]:
    """Open a CSV file, and return its reader; what goes wrong with it in the context is an error of one line.

    Args:
        path: the file.
        name: what a user calls it.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            yield csv.reader(file, strict=True)
    except (OSError, UnicodeError, csv.Error) as error:
        raise UsageError(
            f"{name} cannot be read ({error}): it should be CSV in UTF-8, with commas"
        ) from error


def read_columns(path: Path, names: Sequence[str]) -> Columns:
    """Read these columns of a CSV or Parquet file.

    Raises:
        UsageError: the file cannot be read, lacks a column, or is Parquet, and pyarrow is not installed.
    """
    if path.suffix.lower() == CSV:
        return _read_csv(path, names)
    return _read_parquet(path, names)


def usable_rows(columns: Columns, bad: Sequence[BadCells], max_bad_rows: float) -> np.ndarray:
    """Return which rows can be used, bool [R]; the others are counted, and logged once with the first.

    Args:
        bad: for each column the cells that cannot be used.
        max_bad_rows: the largest fraction of rows that may be left out.

    Raises:
        UsageError: more rows than that cannot be used.
    """
    is_bad_row: np.ndarray = np.logical_or.reduce([column.are_bad for column in bad])
    num_bad, num_rows = int(is_bad_row.sum()), len(is_bad_row)
    if not num_bad:
        return ~is_bad_row
    first = _describe(columns, bad, int(is_bad_row.argmax()))
    if num_bad > max_bad_rows * num_rows:
        raise UsageError(
            f"{num_bad} of {num_rows} rows cannot be used, first {first}: correct them, or allow more"
            " with --max-bad-rows"
        )
    log.warning("rows_skipped", num_skipped=num_bad, num_rows=num_rows, first=first)
    return ~is_bad_row


def _describe(columns: Columns, bad: Sequence[BadCells], row: int) -> str:
    """Return the place of a bad row, and what is wrong with the first of its cells that cannot be used."""
    number = next(number for number, column in enumerate(bad) if column.are_bad[row])
    cell = columns.cells[number][row]
    place = f"{columns.path}, {columns.noun} {columns.numbers[row]}"
    if cell is None:
        return f"{one_line(place)}: {columns.why_none}"
    shown = one_line(str(cell)[:_MAX_SHOWN])
    return f"{one_line(place)}: {columns.names[number]} is {shown!r}, which is {bad[number].what}"


def _read_csv(path: Path, names: Sequence[str]) -> Columns:
    lines, rows = [], []
    nothing = [None] * len(names)
    with open_csv(path, f"data source {path}") as reader:
        header = [name.strip() for name in next(reader, [])]
        places = _places(path, header, names, "the first line")
        for row in filter(None, reader):
            lines.append(reader.line_num)
            rows.append([row[n].strip() for n in places] if len(row) == len(header) else nothing)
    cells = np.array(rows, object).reshape(len(rows), len(names))
    return Columns(
        path, names, list(cells.T), "line", lines, "it has more or fewer cells than the first line"
    )


@contextmanager
def _parquet_file(path: Path) -> Iterator["parquet.ParquetFile"]:
    """Open a Parquet file; what goes wrong with it in the context is an error of one line."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UsageError(f"data source {path} needs pyarrow: pip install 'ecavg[parquet]'") from error
    try:
        with parquet.ParquetFile(path) as file:
            yield file
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise UsageError(
            f"data source {path} cannot be read ({one_line(str(error))}): it should be a Parquet file"
        ) from error


def _read_parquet(path: Path, names: Sequence[str]) -> Columns:
    with _parquet_file(path) as file:
        _places(path, file.schema_arrow.names, names, "it")
        table = file.read(columns=list(dict.fromkeys(names)))
        cells = [_cells(path, name, table.column(name)) for name in names]
    return Columns(path, names, cells, "row", range(1, table.num_rows + 1), "a cell has no value")


def _cells(path: Path, name: str, column: "pyarrow.ChunkedArray") -> np.ndarray:
    """Return a column of a Parquet file as `Columns.cells` has it."""
    import pyarrow

    types = pyarrow.types
    if types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kind = column.type
    if types.is_boolean(kind) or types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind):
        return np.asarray(column.cast(pyarrow.float64(), safe=False).to_numpy())
    if types.is_string(kind) or types.is_large_string(kind) or types.is_null(kind):
        texts = [text if text is None else text.strip() for text in column.to_pylist()]
        return np.array(texts, object)
    raise UsageError(f"data source {path}: the column {name} is {kind}, which is neither numbers nor texts")


def _places(path: Path, header: Sequence[str], names: Sequence[str], who: str) -> list[int]:
    """Return where these names are in the header, or raise UsageError."""
    for name in names:
        if header.count(name) != 1:
            found = ", ".join(map(one_line, header[:_MAX_NAMED])) or "nothing"
            raise UsageError(
                f"data source {path} has {header.count(name)} columns {name!r}; {who} names: {found}"
            )
    return [header.index(name) for name in names]
