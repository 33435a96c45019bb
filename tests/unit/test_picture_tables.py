"""Tables of paths of pictures, with a class, several classes or numbers for each."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import structlog
from PIL import Image

from ecavg.common.config import RunConfig
from ecavg.common.errors import UsageError
from ecavg.edge_agent.config import AgentConfig
from ecavg.edge_agent.data import AgentData, load_agent_data
from ecavg.edge_agent.doctor import _look_at_data
from ecavg.edge_agent.sources import class_names_of
from ecavg.edge_agent.tables import TableFormat, open_table
from tests.recipes import data_of

COUNT = 30
RANDOM = np.random.default_rng(0)
PIXELS = RANDOM.integers(0, 256, (COUNT, 4, 4), dtype=np.uint8)
PICTURES: dict[str, Any] = {"dataset": "field", "image_shape": (1, 4, 4)}
FORM = TableFormat(("photo",), ("kind",), max_bad_rows=0.1)
BIRDS = ("crow", "jay", "owl")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "2024").mkdir()
    for number, pixels in enumerate(PIXELS):
        Image.fromarray(pixels).save(tmp_path / f"2024/{number}.png")
    return tmp_path


def csv(folder: Path, cells: list[str], header: str = "kind") -> Path:
    """Write a table whose last cells are given, one row for each picture."""
    path = folder / "field.csv"
    rows = [f"2024/{number}.png,{cell}" for number, cell in enumerate(cells)]
    path.write_text("\n".join([f"photo,{header}", *rows]) + "\n")
    return path


def load(path: Path, form: TableFormat = FORM, **run: Any) -> AgentData:
    return data_of(
        RunConfig(**PICTURES, **run),
        source=str(path),
        table=form,
    )


def targets_in_order(data: AgentData) -> np.ndarray:
    """Return the targets in the order of PIXELS, NaN where there is no example."""
    inputs, targets = (np.concatenate(side) for side in zip(data.train, data.held_out, strict=True))
    found = np.full((COUNT, *targets.shape[1:]), np.nan)
    for pixels, target in zip(inputs, targets, strict=True):
        (number,) = np.flatnonzero((pixels[0] == PIXELS).all((1, 2)))
        found[number] = target
    return found


def test_name_beside_a_path_is_the_class_of_the_picture(folder: Path) -> None:
    path = csv(folder, ["owl", "jay", "crow"] * 10)
    names = class_names_of(str(path), None, table=FORM)
    assert names == BIRDS
    data = load(path, num_classes=3, class_names=names)
    np.testing.assert_array_equal(targets_in_order(data), [2, 1, 0] * 10)
    assert (data.train.inputs.dtype, data.train.targets.dtype) == (np.uint8, np.int64)


def test_names_with_a_separator_are_several_classes(folder: Path) -> None:
    form = TableFormat(("photo",), ("kind",), separator="|")
    path = csv(folder, ["owl|crow", "", " jay "] * 10)
    names = class_names_of(str(path), None, table=form)
    assert names == BIRDS
    data = load(path, form, task="multi-label", num_classes=3, class_names=names)
    np.testing.assert_array_equal(targets_in_order(data), [[1, 0, 1], [0, 0, 0], [0, 1, 0]] * 10)


def test_columns_of_0_and_1_are_several_classes(folder: Path) -> None:
    path = csv(folder, ["1,0", "0,0", "1,1"] * 10, "owl,jay")
    form = TableFormat(("photo",), ("jay", "owl"))
    data = load(path, form, task="multi-label", num_classes=2)
    np.testing.assert_array_equal(targets_in_order(data), [[0, 1], [0, 0], [1, 1]] * 10)


@pytest.mark.parametrize("num_numbers", [1, 2])
def test_numbers_beside_a_path_are_targets_of_a_regression(num_numbers: int, folder: Path) -> None:
    names = ("weight", "age")[:num_numbers]
    numbers = RANDOM.uniform(0, 9, (COUNT, num_numbers)).astype(np.float32)
    path = csv(folder, [",".join(map(str, row)) for row in numbers.tolist()], ",".join(names))
    form = TableFormat(("photo",), names)
    data = load(path, form, task="regression", targets={"shape": (num_numbers,)})
    np.testing.assert_array_equal(targets_in_order(data), numbers)


@pytest.mark.parametrize(
    ("kind", "is_there", "reason"),
    [
        ("owl", False, "photo is '2024/7.png', which is no file of a picture"),
        ("cow", True, "kind is 'cow', which is no label from 0 to 2 and no name of a class"),
        ("", True, "kind is '', which is no label from 0 to 2 and no name of a class"),
    ],
)
def test_row_without_a_picture_or_a_class_is_left_out_and_named(
    kind: str, is_there: bool, reason: str, folder: Path
) -> None:
    path = csv(folder, ["owl"] * 7 + [kind] + ["jay"] * 22)
    if not is_there:
        (folder / "2024/7.png").unlink()
    with structlog.testing.capture_logs() as logs:
        data = load(path, num_classes=3, class_names=BIRDS)
    assert np.flatnonzero(np.isnan(targets_in_order(data))).tolist() == [7]
    assert [(log["event"], log["num_skipped"], log["first"]) for log in logs] == [
        ("rows_skipped", 1, f"{path}, line 9: {reason}")
    ]
    with pytest.raises(UsageError, match=r"^1 of 30 rows cannot be used, first .*, line 9: [^\n]*$"):
        load(path, TableFormat(("photo",), ("kind",)), num_classes=3, class_names=BIRDS)


def test_broken_pictures_are_left_out_up_to_the_stated_share(folder: Path) -> None:
    path = csv(folder, ["owl"] * 30)
    (folder / "2024/7.png").write_bytes(b"no picture")
    with structlog.testing.capture_logs() as logs:
        data = load(path, num_classes=3, class_names=BIRDS)
    assert (data.num_skipped, len(logs)) == (1, 1)
    assert (logs[0]["event"], logs[0]["num_skipped"]) == ("images_skipped", 1)
    assert logs[0]["first"].startswith(f"{folder}/2024/7.png: it is none of")
    with pytest.raises(UsageError, match=r"^1 of 30 files cannot be read, first .*2024/7.png: it is none of"):
        load(path, TableFormat(("photo",), ("kind",)), num_classes=3, class_names=BIRDS)


def test_strange_name_among_several_is_a_bad_row(folder: Path) -> None:
    path = csv(folder, ["owl|jay"] * 29 + ["owl|cow"])
    form = TableFormat(("photo",), ("kind",), separator="|")
    what = r"kind is 'owl\|cow', which is not names of the run's classes with \| between them"
    with pytest.raises(UsageError, match=f"line 31: {what}"):
        load(path, form, task="multi-label", num_classes=3, class_names=BIRDS)
    with pytest.raises(UsageError, match="set class_names in the server's"):
        load(path, form, task="multi-label", num_classes=3)


def test_run_without_pictures_is_refused_in_one_line(folder: Path) -> None:
    run = RunConfig(dataset="field", num_classes=3, inputs={"shape": (1,)}, class_names=BIRDS)
    options = {"data_dir": None, "partition": None, "seed_name": "edge-1", "allowed_factories": ()}
    path = csv(folder, ["owl"] * 30)
    with pytest.raises(UsageError, match=r"has pictures, and the run other inputs: set image_shape"):
        load_agent_data(run, source=str(path), table=FORM, **options)
    run = RunConfig(dataset="field", num_classes=3, image_shape=(2, 4, 4), class_names=BIRDS)
    with pytest.raises(UsageError, match="picture files give 1 or 3 channels"):
        load_agent_data(run, source=str(path), table=FORM, **options)


def test_doctor_decodes_some_of_the_pictures(folder: Path) -> None:
    path = csv(folder, ["owl", "jay", "crow"] * 10)
    columns = {"data_inputs": ("photo",), "data_target": ("kind",)}
    config = AgentConfig(server="127.0.0.1:1", data=str(path), **columns)
    assert _look_at_data(config) == f"{path} has 30 images of 3 classes"
    (folder / "2024/0.png").write_bytes(b"no picture")
    with pytest.raises(UsageError, match=r"2024/0.png cannot be read"):
        _look_at_data(config)


def test_separator_is_for_tables_of_numbers_as_well(tmp_path: Path) -> None:
    path = tmp_path / "pumps.csv"
    path.write_text("heat,faults\n1.5,seal;motor\n2.5,\n3.5,10\n")
    config = AgentConfig(
        server="127.0.0.1:1", data_inputs=("heat",), data_target=("faults",), data_separator=";"
    )
    names = class_names_of(str(path), None, table=config.table)
    assert names == ("10", "motor", "seal")
    np.testing.assert_array_equal(
        open_table(path, config.table, names).targets, [[0, 1, 1], [0, 0, 0], [1, 0, 0]]
    )


def test_cell_without_names_is_missing_where_targets_may_be_and_a_separator_alone_is_no_class(
    tmp_path: Path,
) -> None:
    path = tmp_path / "pumps.csv"
    path.write_text("heat,faults\n1.5,seal;motor\n2.5,\n3.5,;\n")
    form = TableFormat(("heat",), ("faults",), separator=";", missing=True)
    np.testing.assert_array_equal(
        open_table(path, form, ("motor", "seal")).targets, [[1, 1], [np.nan, np.nan], [0, 0]]
    )
