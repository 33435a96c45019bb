"""Examples in CSV files: rows of a table, and windows over a time series."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import structlog

from ecavg.common.config import RunConfig
from ecavg.common.errors import UsageError
from ecavg.edge_agent.agent import class_names_of
from ecavg.edge_agent.config import AgentConfig, check_source
from ecavg.edge_agent.data import AgentData
from ecavg.edge_agent.doctor import _look_at_data
from ecavg.edge_agent.sources import data_stamp
from ecavg.edge_agent.tables import TableFormat, open_table
from tests.recipes import data_of

ROWS = np.random.default_rng(0).uniform(-5, 5, (40, 2)).round(4)
FORM = TableFormat(("flow", "heat"), ("wear",))
NUMBERS: dict[str, Any] = {"task": "regression", "dataset": "pumps", "inputs": {"shape": (2,)}}
CLASSES: dict[str, Any] = {"dataset": "pumps", "num_classes": 2, "inputs": {"shape": (2,)}}


def lines_of(rows: np.ndarray) -> list[str]:
    return [f"{number},{heat},{heat + flow:.4f},{flow}" for number, (flow, heat) in enumerate(rows)]


def csv(folder: Path, lines: list[str], header: str = "time,heat,wear,flow") -> Path:
    path = folder / "pumps.csv"
    path.write_text("\n".join([header, *lines]) + "\n", "utf-8")
    return path


def load(path: Path, form: TableFormat = FORM, **run: Any) -> AgentData:
    return data_of(
        RunConfig(**run),
        source=str(path),
        table=form,
    )


def both(data: AgentData) -> tuple[np.ndarray, np.ndarray]:
    inputs, targets = (np.concatenate(side) for side in zip(data.train, data.held_out, strict=True))
    return inputs, targets


def test_named_columns_become_inputs_and_target_in_the_order_of_the_names(tmp_path: Path) -> None:
    path = csv(tmp_path, lines_of(ROWS))
    check_source(str(path))
    inputs, targets = both(load(path, **NUMBERS))
    assert (inputs.dtype, targets.dtype, targets.shape) == (np.float32, np.float32, (40, 1))
    np.testing.assert_allclose(targets[:, 0], inputs.sum(1), atol=1e-3)
    assert sorted(inputs[:, 0]) == sorted(ROWS[:, 0].astype(np.float32))
    assert data_stamp(RunConfig(**NUMBERS), str(path), None)


def test_names_of_classes_are_those_in_the_target_column(tmp_path: Path) -> None:
    kinds = ["worn", "fine"]
    path = csv(tmp_path, [f"0,{n}.5,{kinds[n % 2]},{n % 2}" for n in range(40)])
    names = class_names_of(str(path), None, table=FORM)
    assert names == ("fine", "worn")
    inputs, labels = both(load(path, **CLASSES, class_names=names))
    np.testing.assert_array_equal(labels, 1 - inputs[:, 0])
    assert labels.dtype == np.int64


def test_numbers_are_labels_and_no_names(tmp_path: Path) -> None:
    path = csv(tmp_path, [f"0,{n}.5,{n % 2},{n % 2}" for n in range(40)])
    assert class_names_of(str(path), None, table=FORM) == ()
    inputs, labels = both(load(path, **CLASSES))
    np.testing.assert_array_equal(labels, inputs[:, 0])
    # One text among numbers is a bad row, and not the name of a class.
    csv(tmp_path, ["0,1,?,1", *[f"0,{n}.5,{n % 2},{n % 2}" for n in range(200)]])
    assert class_names_of(str(path), None, table=FORM) == ()


@pytest.mark.parametrize(
    "bad", ["7,,1,2", "7,x,1,2", "7,nan,1,2", "7,inf,1,2", "7,1,2", "7,1,2,3,4", "7,1,?,3"]
)
def test_bad_row_is_left_out_counted_and_named(bad: str, tmp_path: Path) -> None:
    lines = lines_of(ROWS)
    path = csv(tmp_path, [*lines[:6], bad, *lines[6:]])
    with structlog.testing.capture_logs() as logs:
        arrays = open_table(path, TableFormat(FORM.inputs, FORM.targets, max_bad_rows=0.1))
    np.testing.assert_allclose(arrays.inputs, ROWS, rtol=1e-6)
    assert [(log["event"], log["num_skipped"], log["num_rows"]) for log in logs] == [("rows_skipped", 1, 41)]
    assert logs[0]["first"].startswith(f"{path}, line 8: ")
    with pytest.raises(UsageError, match=r"^1 of 41 rows cannot be used, first .*pumps.csv, line 8: [^\n]*$"):
        open_table(path, FORM)


@pytest.mark.parametrize(
    ("form", "text", "message"),
    [
        (TableFormat(), "a,b\n1,2\n", "name its columns with --data-inputs"),
        (TableFormat(("a",), ("c",)), "a,b\n1,2\n", "has 0 columns 'c'; the first line names: a, b"),
        (TableFormat(("a",), ("b",)), "a,b,a\n1,2,3\n", "has 2 columns 'a'"),
        (TableFormat(("a",), ("b",)), "", "has 0 columns 'a'; the first line names: nothing"),
        (TableFormat(("a",), ("b",)), "a,b\n", "no example is complete"),
        (TableFormat(("a",), ("b",)), 'a,b\n"1,2\n', "cannot be read"),
        (TableFormat(("a",), ("b",), window=3), "a,b\n1,2\n2,3\n", "no example is complete"),
    ],
)
def test_file_that_is_no_table_is_refused_in_one_line(
    form: TableFormat, text: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "pumps.csv"
    path.write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        open_table(path, form)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("label", ["2", "-1", "0.5", "1e300"])
def test_row_whose_label_the_run_does_not_have_is_left_out_and_named(label: str, tmp_path: Path) -> None:
    lines = [f"{n},{heat},{n % 2},{flow}" for n, (flow, heat) in enumerate(ROWS)]
    path = csv(tmp_path, [*lines, f"0,1,{label},1"])
    form = TableFormat(("flow", "heat"), ("wear",), max_bad_rows=0.1)
    with structlog.testing.capture_logs() as logs:
        _, targets = both(load(path, form, **CLASSES))
    assert sorted(targets) == [0] * 20 + [1] * 20
    (skipped,) = (log for log in logs if log["event"] == "rows_skipped")
    assert skipped["first"] == f"{path}, line 42: wear is '{label}', which is no label from 0 to 1"


def test_number_beyond_float32_is_a_bad_cell(tmp_path: Path) -> None:
    path = csv(tmp_path, [*lines_of(ROWS), "0,1e300,1,1"])
    with pytest.raises(UsageError, match="line 42: heat is '1e300', which is no number"):
        load(path, **NUMBERS)


def test_class_is_the_same_however_its_accents_are_written(tmp_path: Path) -> None:
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    lines = [f"{n},{heat},{(decomposed, 'tea')[n % 2]},{flow}" for n, (flow, heat) in enumerate(ROWS)]
    path = csv(tmp_path, lines)
    assert class_names_of(str(path), None, table=FORM) == (composed, "tea")
    _, targets = both(load(path, **CLASSES, class_names=(composed, "tea")))
    assert sorted(targets) == [0] * 20 + [1] * 20


def test_file_in_another_encoding_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pumps.csv").write_bytes("a,b\n1,ä\n".encode("latin-1"))
    with pytest.raises(UsageError, match="should be CSV in UTF-8"):
        open_table(tmp_path / "pumps.csv", TableFormat(("a",), ("b",)))


def test_doctor_prints_what_the_run_needs(tmp_path: Path) -> None:
    path = csv(tmp_path, lines_of(ROWS))
    columns = {"data_inputs": ("flow", "heat"), "data_target": ("wear",)}
    found = _look_at_data(AgentConfig(server="127.0.0.1:1", data=str(path), **columns))
    assert "has 40 examples; mean = [" in found
    assert "of the targets, mean = [" in found


def test_windows_hold_rows_one_after_the_other_and_the_target_comes_after(tmp_path: Path) -> None:
    path = csv(tmp_path, [f"{n},{n},{n},{100 + n}" for n in range(10)])
    form = TableFormat(("heat", "flow"), ("wear",), window=3, stride=2, horizon=2)
    windows, targets = open_table(path, form)
    assert windows.shape == (3, 2, 3)
    np.testing.assert_array_equal(windows[:, 0], [[0, 1, 2], [2, 3, 4], [4, 5, 6]])
    np.testing.assert_array_equal(windows[:, 1], windows[:, 0] + 100)
    np.testing.assert_array_equal(targets, [4, 6, 8])


def test_windows_with_a_bad_row_are_left_out(tmp_path: Path) -> None:
    path = csv(tmp_path, [f"{n},{'' if n == 5 else n},{n},0" for n in range(10)])
    windows, _ = open_table(path, TableFormat(("heat",), ("heat",), window=2, max_bad_rows=0.2))
    np.testing.assert_array_equal(windows[:, 0], [[0, 1], [1, 2], [2, 3], [6, 7], [7, 8]])
