"""Pictures with masks: a mask says for each pixel which class it shows.

    DIR/{images,masks}/**                  a picture and its mask have equal names, but for the suffix
    DIR/{train,test}/{images,masks}/**     the same with a test split

A mask is a PNG file whose values, or places in the palette, are the classes. 255, the border in many sets,
is no class where the run has fewer: such pixels do not count.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import structlog
from PIL import Image

from ecavg.common.agent_progress import OnExamples, ignore_examples
from ecavg.common.config import Background, RunConfig
from ecavg.common.dataset import DatasetSpec, Targets
from ecavg.common.errors import UsageError, one_line
from ecavg.common.shards import Shard
from ecavg.common.tasks import IGNORED
from ecavg.edge_agent.file_split import SAMPLE_SHAPE, check_has_pictures, leave_out_unread
from ecavg.edge_agent.folder_walk import folders_in, items_below, named_in_errors, stamp_of_folders
from ecavg.edge_agent.pictures import check_size, decode_sized, quiet_pillow
from ecavg.edge_agent.reading import check_some, read_each
from ecavg.edge_agent.splits import Source

FOLDERS = ("images", "masks")
# The value of pixels that many sets have between two objects.
_BORDER = 255
# Pillow spreads the values of grey PNG with few bits over 0..255, by these factors.
_SPREAD = {"L;2": 85, "L;4": 17}

log = structlog.get_logger()


def is_mask_folder(path: Path) -> bool:
    """Return True for a folder with images and masks, or whose train folder has these two and no others."""
    try:
        if all((path / name).is_dir() for name in FOLDERS):
            return True
        train = path / "train"
        return train.is_dir() and [folder.name for folder in folders_in(train)] == list(FOLDERS)
    except OSError:
        return False


def stamp_of_masks(path: Path) -> str:
    """Return a value that changes when a picture or a mask is added, removed or written to."""
    return stamp_of_folders([part / name for part in (path, *_parts(path)) for name in FOLDERS])


def pictures_folder(path: Path) -> Path:
    """Return where the pictures of the train split lie in a folder with masks."""
    return _parts(path)[0] / FOLDERS[0]


def open_mask_folder(path: Path, max_skipped: float, run: RunConfig | None = None) -> Source:
    """Find the pictures with masks.

    Args:
        max_skipped: the largest fraction of them that may be left out because they cannot be used.
        run: None: the run is not known.

    Raises:
        UsageError: a folder cannot be read, too many pictures have no mask, or the run has other targets.
    """
    if run:
        check_has_pictures(f"data folder {path}", run)
        _check_targets(path, run.spec)
    background = run.background if run else "white"
    splits = [_pairs(part, background, max_skipped) for part in _parts(path)]
    return Source(splits[0], splits[1] if len(splits) > 1 else None)


@dataclass(frozen=True)
class MaskSplit:
    """The train or the test part of pictures with masks."""

    paths: Sequence[Path]
    masks: Sequence[Path]
    background: Background
    # The largest fraction of the pictures that may be left out because they cannot be read.
    max_skipped: float

    noun: ClassVar = "image"
    is_series: ClassVar = False

    @property
    def targets(self) -> np.ndarray:
        """Return int64 [N, 0]: the masks are read later."""
        return np.empty((len(self.paths), 0), np.int64)

    def read(
        self, indices: np.ndarray, spec: DatasetSpec, on_read: OnExamples = ignore_examples
    ) -> tuple[Shard, int]:
        """Decode these pictures and masks; what cannot be read is left out, counted, and logged once.

        Raises:
            UsageError: too many of them cannot be read.
        """
        images = np.empty((len(indices), *spec.inputs.shape), np.uint8)
        targets = np.empty((len(indices), *spec.targets.shape), np.int64)

        def decode(n: int, path: Path) -> None:
            images[n], size = decode_sized(path, spec.inputs.shape, self.background)
            targets[n] = _decode_mask(self.masks[indices[n]], size, spec.targets)

        with quiet_pillow():
            failures = read_each([self.paths[n] for n in indices], decode, on_read)
        return leave_out_unread(Shard(images, targets), failures, self.max_skipped), len(failures)

    def check_some(self) -> None:
        """Decode a few pictures and masks; raise UsageError if one of them cannot be read."""
        mask_of = dict(zip(self.paths, self.masks, strict=True))

        def decode(path: Path) -> None:
            _, size = decode_sized(path, SAMPLE_SHAPE, self.background)
            _decode_mask(mask_of[path], size, Targets("int64", SAMPLE_SHAPE[1:]))

        with quiet_pillow():
            check_some(self.paths, decode)


def _check_targets(path: Path, spec: DatasetSpec) -> None:
    if (spec.targets.dtype, spec.targets.shape) != ("int64", spec.inputs.shape[1:]):
        raise UsageError(
            f"data folder {path} has masks, and the run's targets are no classes of pixels:"
            ' set task = "segmentation" in the server\'s [run] table'
        )


def _parts(path: Path) -> list[Path]:
    """Return the folders in which images and masks are: the train split and, where there is one, the test."""
    if (path / FOLDERS[0]).is_dir():
        return [path]
    return [path / "train", *(part for part in (path / "test",) if part.is_dir())]


def _pairs(part: Path, background: Background, max_skipped: float) -> MaskSplit:
    """Return the pictures of a folder that have a mask; others are counted, and logged once."""
    with named_in_errors():
        pictures, masks = (_files_by_name(part / name) for name in FOLDERS)
    names = sorted(pictures.keys() & masks.keys())
    alone = sorted(pictures.keys() ^ masks.keys())
    first = one_line(str({**masks, **pictures}[alone[0]])) if alone else ""
    if not names and not alone:
        raise UsageError(
            f"data folder {part} has no pictures: lay them out as {part}/images/* and {part}/masks/*"
        )
    if not names or len(alone) > max_skipped * (len(names) + len(alone)):
        raise UsageError(
            f"data folder {part}: {len(alone)} of {len(names) + len(alone)} pictures or masks are alone,"
            f" first {first}: {part}/masks needs a PNG file of the same name for each picture"
        )
    if alone:
        log.warning("pictures_without_mask", num_skipped=len(alone), first=first)
    return MaskSplit(
        [pictures[name] for name in names], [masks[name] for name in names], background, max_skipped
    )


def _files_by_name(folder: Path) -> dict[str, Path]:
    """Return the picture files of a folder and of those below it by their paths in it, without the suffix."""
    found: dict[str, Path] = {}
    for path in sorted(item.path for item in items_below(folder) if item.is_picture):
        name = str(path.relative_to(folder).with_suffix(""))
        if other := found.get(name):
            raise UsageError(f"pictures {other} and {path} have the same name: rename one")
        found[name] = path
    return found


def _decode_mask(path: Path, size: tuple[int, int], wanted: Targets) -> np.ndarray:
    """Read the classes of a mask, int64 [H, W]; where its size differs from the run's, by nearest neighbours.

    Args:
        size: width and height of the picture.

    Raises:
        ValueError: the file cannot be read, or is no mask of this picture.
    """
    try:
        classes = _classes_in(path, size)
    except (OSError, SyntaxError) as error:
        # Pillow raises the second for some broken PNG files.
        reason = (isinstance(error, OSError) and error.strerror) or "it is no PNG file, or is broken"
        raise ValueError(f"its mask cannot be read: {reason}") from error
    rows, columns = (
        (2 * np.arange(n) + 1) * length // (2 * n)
        for n, length in zip(wanted.shape, classes.shape, strict=True)
    )
    return _checked(classes[rows][:, columns], wanted)


def _classes_in(path: Path, size: tuple[int, int]) -> np.ndarray:
    """Return the classes of a mask as they are in its file, int64 [H, W].

    Raises:
        ValueError: the mask has another size than the picture, or colours.
        OSError, SyntaxError: the file cannot be read.
    """
    with path.open("rb") as stream, Image.open(stream, formats=("PNG",)) as file:
        check_size(file)
        if file.size != size:
            raise ValueError(
                f"its mask has {file.width} x {file.height} pixels, the picture {size[0]} x {size[1]}"
            )
        if file.mode not in ("1", "L", "P") and not file.mode.startswith("I"):
            raise ValueError(f"its mask has colours ({file.mode}): save it as grey PNG, or with a palette")
        spread = _SPREAD.get(str(file.tile[0].args), 1) if file.tile else 1
        return np.asarray(file).astype(np.int64) // spread


def _checked(classes: np.ndarray, wanted: Targets) -> np.ndarray:
    """Return the classes, border pixels as those that do not count; raise ValueError if the run lacks one."""
    if wanted.high is None:
        return classes
    if wanted.low == IGNORED and wanted.high < _BORDER:
        classes = np.where(classes == _BORDER, IGNORED, classes)
    if (strangest := int(classes.max())) > wanted.high:
        raise ValueError(f"its mask has the class {strangest}, and the run only 0 to {wanted.high:g}")
    return classes
