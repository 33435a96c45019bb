"""Image folders, DIR/{train,test}/<class>/*: they are listed first, and decoded later as far as needed."""

import hashlib
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import structlog
from PIL import Image

from common.config import RunConfig, class_name
from common.errors import UsageError
from common.shards import Shard

# One file may have so many pixels, which is checked before it is decoded.
MAX_IMAGE_PIXELS = 64_000_000
# One file may have so many bytes, which is checked before it is opened, because WebP is read whole.
MAX_IMAGE_BYTES = 512 << 20
IMAGE_FORMATS: Mapping[str, str] = {
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".png": "PNG",
    ".webp": "WEBP",
    ".bmp": "BMP",
}
# The mode for each number of channels.
_MODES = {1: "L", 3: "RGB"}

# Pillow lets go of the interpreter's lock only while it decodes: photos keep several threads busy, and
# with tiny images more than a few only wait for each other.
NUM_DECODERS = min(4, os.cpu_count() or 1)
_DECODER_BATCH = 64

log = structlog.get_logger()


@dataclass(frozen=True)
class FileSplit:
    """The train or the test part of an image folder."""

    paths: Sequence[Path]
    # The labels, int64 [N].
    labels: np.ndarray

    def read(self, indices: np.ndarray, image_shape: tuple[int, int, int]) -> tuple[Shard, int]:
        """Decode these files; files that cannot be read are left out, counted, and logged once."""
        images = np.empty((len(indices), *image_shape), np.uint8)
        is_read = np.zeros(len(indices), bool)

        def decode(start: int) -> list[str]:
            failures = []
            for n in range(start, min(start + _DECODER_BATCH, len(indices))):
                path = self.paths[indices[n]]
                try:
                    images[n] = decode_image(path, image_shape)
                    is_read[n] = True
                except Exception as error:
                    # Pillow raises whatever a broken file led it to.
                    failures.append(f"{path}: {error}")
            return failures

        with _quiet_pillow(), ThreadPoolExecutor(NUM_DECODERS) as pool:
            batches = pool.map(decode, range(0, len(indices), _DECODER_BATCH))
            failures = [failure for batch in batches for failure in batch]
        if not failures:
            return Shard(images, self.labels[indices]), 0
        log.warning("images_skipped", num_skipped=len(failures), first=failures[0])
        return Shard(images[is_read], self.labels[indices][is_read]), len(failures)


def list_image_folder(folder: Path, run: RunConfig) -> tuple[FileSplit, FileSplit | None]:
    """Find the files and labels of `folder`/train and, where there is one, `folder`/test.

    A class folder's label is its place among the run's class_names or, where there are none, among the
    sorted names of the class folders in `folder`/train.

    Raises:
        UsageError: a folder is missing, cannot be read, or has no images, or the class folders are not
            the run's classes.
    """
    spec = run.spec
    if spec.image_shape[0] not in _MODES:
        raise UsageError(
            f"data folder {folder}: image folders give 1 or 3 channels, and the run's image_shape asks for"
            f" {spec.image_shape[0]}"
        )
    train, test = folder / "train", folder / "test"
    class_names = run.class_names or tuple(class_folders(train))
    if len(class_names) != spec.num_classes:
        raise UsageError(
            f"data folder {train} has {len(class_names)} class folders, and the run {spec.num_classes}"
            " classes: set class_names in the server's [run] table"
        )
    return _list_images(train, class_names), _list_images(test, class_names) if test.is_dir() else None


def class_folders(folder: Path) -> dict[str, Path]:
    """Return the class folders in `folder` by the names of their classes, sorted by name.

    Raises:
        UsageError: there are none, or they cannot be read, or a name is no name of a class.
    """
    folders: dict[str, Path] = {}
    with _named_in_errors():
        entries = list(folder.iterdir()) if folder.is_dir() else []
    for path in entries:
        if _is_hidden(path) or not path.is_dir():
            continue
        try:
            name = class_name(path.name)
        except ValueError as error:
            raise UsageError(f"class folder {path}: its name {error}: rename it") from error
        if other := folders.get(name):
            raise UsageError(f"class folders {other} and {path} have the same name: rename one")
        folders[name] = path
    if not folders:
        raise UsageError(f"no class folders in {folder}: lay the images out as {folder}/<class>/*")
    return dict(sorted(folders.items()))


@contextmanager
def _named_in_errors() -> Iterator[None]:
    """Turn the error of a folder that cannot be read into UsageError."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"cannot read data folder {error.filename}: {error.strerror}") from error


def stamp_of(folder: Path) -> str:
    """Return a value that changes when a file below `folder` is added, removed or written to.

    No file is opened.
    """
    stamp = hashlib.sha256()
    for path in sorted(folder.glob("*/*/*")):
        with suppress(OSError):
            # The file has just gone, or is a link that leads nowhere.
            status = path.stat()
            stamp.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    return stamp.hexdigest()


def decode_image(path: Path, image_shape: tuple[int, int, int]) -> np.ndarray:
    """Read one file as uint8 [C, H, W], C being 1 or 3; resized where its size differs.

    Transparency is dropped, 16-bit grey is scaled to 8 bits.

    Raises:
        Exception: of any kind: the file is no image, is broken, or has more than MAX_IMAGE_PIXELS.
    """
    channels, height, width = image_shape
    mode, size = _MODES[channels], (width, height)
    if (num_bytes := path.stat().st_size) > MAX_IMAGE_BYTES:
        raise ValueError(f"{num_bytes} bytes, at most {MAX_IMAGE_BYTES} are read")
    with Image.open(path, formats=tuple(set(IMAGE_FORMATS.values()))) as file:
        if file.width * file.height > MAX_IMAGE_PIXELS:
            raise ValueError(f"{file.width} x {file.height} pixels, at most {MAX_IMAGE_PIXELS} are read")
        # A JPEG is decoded without the detail that resizing would take away.
        file.draft(mode, size)
        image = _to_8_bits(file).convert(mode)
    if image.size != size:
        # Pillow always resizes with antialiasing.
        image = image.resize(size, Image.Resampling.BILINEAR)
    return np.asarray(image).reshape(height, width, channels).transpose(2, 0, 1)


def _to_8_bits(image: Image.Image) -> Image.Image:
    if not image.mode.startswith("I;16"):
        return image
    # convert() would clip to white.
    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))


@contextmanager
def _quiet_pillow() -> Iterator[None]:
    """Keep Pillow's remarks on odd files off the terminal; a file that it calls a bomb is not read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def _list_images(folder: Path, class_names: Sequence[str]) -> FileSplit:
    label_of = {name: label for label, name in enumerate(class_names)}
    paths: list[Path] = []
    labels: list[int] = []
    for name, path in class_folders(folder).items():
        if name not in label_of:
            raise UsageError(f"class folder {path} is not one of the run's {len(label_of)} classes")
        with _named_in_errors():
            images = sorted(each for each in path.iterdir() if _is_image(each))
        paths += images
        labels += [label_of[name]] * len(images)
    if not paths:
        raise UsageError(f"no images ({', '.join(IMAGE_FORMATS)}) in the class folders of {folder}")
    return FileSplit(paths, np.array(labels, np.int64))


def _is_image(path: Path) -> bool:
    """Return True if the file may be an image, and is no pipe or device, which could be read for ever."""
    return path.suffix.lower() in IMAGE_FORMATS and not _is_hidden(path) and path.is_file()


def _is_hidden(path: Path) -> bool:
    # Such names are .DS_Store and ._photo.jpg.
    return path.name.startswith(".")
