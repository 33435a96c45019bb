"""How many examples this device has that it has not contributed with: counted, and not read."""

import asyncio
import zipfile
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import IO

from numpy.lib import format as npy

from ecavg.common.errors import UsageError
from ecavg.edge_agent.arrays import is_arrays
from ecavg.edge_agent.columns import count_rows, is_table
from ecavg.edge_agent.folder_walk import folders_in, items_below
from ecavg.edge_agent.labels_file import labels_path
from ecavg.edge_agent.masks import is_mask_folder, pictures_folder
from ecavg.edge_agent.pictures import IMAGE_FORMATS
from ecavg.edge_agent.recordings import RECORDINGS, has_recordings
from ecavg.edge_agent.state import AgentState


class NewExamples:
    """What there is in the source of an agent's data, and what of it is new.

    Args:
        source: a folder or file of examples; None: they cannot be counted.
        disk: has how many there were at the last contribution.
    """

    def __init__(self, source: Path | None, disk: AgentState) -> None:
        self._source = source
        self._disk = disk

    async def count(self) -> int:
        """Return how many examples there are now; 0 where they cannot be counted."""
        return await asyncio.to_thread(count_examples, self._source) if self._source else 0

    async def count_new(self) -> int:
        """Return how many examples have come since the last contribution; what has gone counts as nothing."""
        return max(0, await self.count() - self._disk.progress.num_contributed)


def count_examples(source: Path) -> int:
    """Return how many training examples a source of files has; 0 if it cannot be read now.

    Pictures and recordings are counted by their names, arrays by their headers, and a table by its lines or,
    where it is Parquet, by its footer. A target that is told in a file beside pictures or arrays counts like
    an example: it is as new.
    """
    try:
        if is_table(source):
            return count_rows(source)
        if is_mask_folder(source):
            return _count_files([pictures_folder(source)], IMAGE_FORMATS)
        if has_recordings(source):
            return _count_files(folders_in(source / "train"), RECORDINGS)
        num_inputs = (
            _count_inputs(source)
            if is_arrays(source)
            else _count_files(folders_in(source / "train"), IMAGE_FORMATS)
        )
        labels = labels_path(source)
        return num_inputs + (count_rows(labels) if labels.exists() else 0)
    except (UsageError, OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        # Somebody is writing there, or has taken it away: it is looked at again.
        return 0


def _count_files(folders: Iterable[Path], suffixes: Collection[str]) -> int:
    return sum(item.has_suffix(suffixes) for folder in folders for item in items_below(folder))


def _count_inputs(path: Path) -> int:
    if path.is_file():
        with zipfile.ZipFile(path) as archive, archive.open("inputs.npy") as file:
            return _length(file)
    folder = path / "train" if (path / "train").is_dir() else path
    with (folder / "inputs.npy").open("rb") as file:
        return _length(file)


def _length(file: IO[bytes]) -> int:
    """Return the length of the first axis of an array, of which only the header is read."""
    version = npy.read_magic(file)
    read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, _, _ = read_header(file)
    return int(shape[0]) if shape else 0
