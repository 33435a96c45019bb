"""Pictures whose paths are in a column of a table, each with the target in its row.

    photo,kind
    2024/05/0001.jpg,cat

A path begins in the folder of the table. Shape letter: R rows of the file.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.config import Background
from common.errors import UsageError
from edge_agent.columns import BadCells, Columns, usable_rows
from edge_agent.file_split import FileSplit
from edge_agent.folder_walk import look_at
from edge_agent.pictures import IMAGE_FORMATS
from edge_agent.tables import TableFormat, target_blocks, targets_of


def has_pictures(columns: Columns, form: TableFormat) -> bool:
    """Return True if the inputs of a table are one column, and most of its cells are names of pictures."""
    cells = columns.cells[0]
    if len(form.inputs) != 1 or form.window is not None or cells.dtype != object:
        return False
    num_names = sum(Path(cell or "").suffix.lower() in IMAGE_FORMATS for cell in cells.tolist())
    return 2 * num_names > len(cells)


def picture_rows(
    columns: Columns, form: TableFormat, class_names: Sequence[str], background: Background
) -> FileSplit:
    """Return the pictures that the rows name; rows without a file, or without a target, are left out.

    Args:
        class_names: the names that cells of the target column may have in place of labels, label 0 first.

    Raises:
        UsageError: too many rows cannot be used, or all of them.
    """
    folder = columns.path.parent
    paths = [folder / (cell or "") for cell in columns.cells[0].tolist()]
    is_missing = np.array([not look_at(path).is_picture for path in paths], bool)
    blocks = target_blocks(columns, form, class_names)
    bad = [BadCells(is_missing, "no file of a picture"), *(block.bad_cells for block in blocks)]
    is_usable = usable_rows(columns, bad, form.max_bad_rows)
    if not is_usable.any():
        raise UsageError(f"data source {columns.path} has no row with a picture")
    targets = np.concatenate([block.values for block in blocks], 1)[is_usable]
    usable = [paths[row] for row in np.flatnonzero(is_usable)]
    return FileSplit(usable, targets_of(targets, form), class_names, background, form.max_bad_rows)
