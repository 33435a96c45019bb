"""Tables in Parquet files are what the same tables in CSV files are."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import structlog

from common.errors import UsageError
from edge_agent.arrays import Arrays
from edge_agent.columns import is_table
from edge_agent.config import check_source
from edge_agent.tables import TableFormat, names_in, open_table
from tests.conftest import need

FORM = TableFormat(("flow", "heat"), ("wear",), max_bad_rows=0.1)
RANDOM = np.random.default_rng(0)
NUMBERS = {
    "flow": RANDOM.uniform(-5, 5, 40).round(4).tolist(),
    "heat": RANDOM.integers(0, 9, 40).tolist(),
    "wear": RANDOM.uniform(0, 1, 40).round(4).tolist(),
    "note": ["a, b"] * 40,
}


@pytest.fixture
def arrow() -> Any:
    try:
        import pyarrow
    except ImportError:
        pyarrow = None
    need("pyarrow", pyarrow, "pyarrow")
    return pyarrow


def parquet(folder: Path, table: Any) -> Path:
    from pyarrow import parquet

    path = folder / "pumps.parquet"
    # Several row groups, as large files have them.
    parquet.write_table(table, path, row_group_size=7)
    return path


def csv(folder: Path, columns: dict[str, list[Any]]) -> Path:
    path = folder / "pumps.csv"
    rows = zip(*columns.values(), strict=True)
    lines = [",".join(columns), *(",".join(f'"{cell}"' for cell in row) for row in rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


def assert_same(one: Arrays, other: Arrays) -> None:
    for a, b in zip(one, other, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("window", [None, 5])
def test_parquet_gives_the_examples_that_csv_gives(arrow: Any, window: int | None, tmp_path: Path) -> None:
    form = TableFormat(FORM.inputs, FORM.targets, window)
    path = parquet(tmp_path, arrow.table(NUMBERS))
    check_source(str(path))
    assert is_table(path)
    assert_same(open_table(path, form), open_table(csv(tmp_path, NUMBERS), form))


@pytest.mark.parametrize("is_dictionary", [False, True])
def test_names_of_classes_in_parquet_are_labels(arrow: Any, is_dictionary: bool, tmp_path: Path) -> None:
    columns = {**NUMBERS, "wear": ["worn", "fine"] * 20}
    table = arrow.table(columns)
    if is_dictionary:
        table = table.set_column(2, "wear", table["wear"].dictionary_encode())
    path, same = parquet(tmp_path, table), csv(tmp_path, columns)
    names = names_in(path, FORM)
    assert names == names_in(same, FORM) == ("fine", "worn")
    assert_same(open_table(path, FORM, names), open_table(same, FORM, names))


def test_numbers_in_parquet_are_names_of_classes_where_the_run_has_such_names(
    arrow: Any, tmp_path: Path
) -> None:
    columns = {**NUMBERS, "wear": [20, 10] * 20}
    path, same = parquet(tmp_path, arrow.table(columns)), csv(tmp_path, columns)
    assert names_in(path, FORM) == ()
    targets = open_table(path, FORM, ("10", "20")).targets
    np.testing.assert_array_equal(targets, [1, 0] * 20)
    np.testing.assert_array_equal(targets, open_table(same, FORM, ("10", "20")).targets)


def test_numbers_of_every_kind_are_read(arrow: Any, tmp_path: Path) -> None:
    from decimal import Decimal

    columns = {
        "flow": arrow.array([True, False, True]),
        "heat": arrow.array([Decimal("1.5"), Decimal("2.5"), Decimal("-1.0")]),
        "wear": arrow.array([1, 2, 255], arrow.uint8()),
    }
    arrays = open_table(parquet(tmp_path, arrow.table(columns)), FORM)
    np.testing.assert_array_equal(arrays.inputs, np.array([[1, 1.5], [0, 2.5], [1, -1]], np.float32))
    np.testing.assert_array_equal(arrays.targets, [1, 2, 255])


@pytest.mark.parametrize(
    ("column", "bad", "reason"),
    [
        ("heat", None, "heat is 'nan', which is no number"),
        ("flow", float("inf"), "flow is 'inf', which is no number"),
        ("wear", float("nan"), "wear is 'nan', which is no number"),
    ],
)
def test_bad_row_of_parquet_is_counted_and_named(
    arrow: Any, column: str, bad: float | None, reason: str, tmp_path: Path
) -> None:
    cells = list(NUMBERS[column])
    cells[7] = bad
    path = parquet(tmp_path, arrow.table({**NUMBERS, column: cells}))
    with structlog.testing.capture_logs() as logs:
        arrays = open_table(path, FORM)
    assert len(arrays.inputs) == 39
    assert [(log["event"], log["num_skipped"], log["num_rows"]) for log in logs] == [("rows_skipped", 1, 40)]
    assert logs[0]["first"].startswith(f"{path}, row 8: {reason}")
    with pytest.raises(UsageError, match=r"^1 of 40 rows cannot be used, first .*, row 8: [^\n]*$"):
        open_table(path, TableFormat(FORM.inputs, FORM.targets))


def test_missing_name_in_parquet_is_a_bad_row(arrow: Any, tmp_path: Path) -> None:
    path = parquet(tmp_path, arrow.table({**NUMBERS, "wear": ["fine", None, *["worn"] * 38]}))
    with structlog.testing.capture_logs() as logs:
        open_table(path, FORM, ("fine", "worn"))
    assert logs[0]["first"] == f"{path}, row 2: a cell has no value"


def test_parquet_that_is_no_table_of_numbers_is_refused_in_one_line(arrow: Any, tmp_path: Path) -> None:
    path = parquet(tmp_path, arrow.table({**NUMBERS, "wear": [[1.0]] * 40}))
    with pytest.raises(UsageError, match=r"the column wear is list<.*>, which is neither numbers nor texts$"):
        open_table(path, FORM)
    with pytest.raises(UsageError, match=r"has 0 columns 'cost'; it names: flow, heat, wear, note$"):
        open_table(path, TableFormat(("flow",), ("cost",)))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UsageError, match=r"should be a Parquet file$") as caught:
        open_table(path, FORM)
    assert "\n" not in str(caught.value)


def test_missing_package_is_named_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    path = tmp_path / "pumps.parquet"
    path.touch()
    with pytest.raises(UsageError, match=r"needs pyarrow: pip install 'ecavg\[parquet\]'$"):
        open_table(path, FORM)
