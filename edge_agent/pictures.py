"""One picture: a file becomes pixels in the run's shape, as a person who opens the file sees it.

A person sees a photo upright, however the camera held its sensor, and sees through what is transparent.
"""

import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile

from ecavg.common.config import Background

# One file may have so many pixels, which is checked before it is decoded.
MAX_IMAGE_PIXELS = 64_000_000
# One file may have so many bytes, which is checked before it is opened, because WebP is read whole.
MAX_IMAGE_BYTES = 512 << 20
# One tile of a TIFF, which is decoded whole, may have so many pixels though the picture has fewer.
_MAX_TILE_PIXELS = 4_000_000
IMAGE_FORMATS: Mapping[str, str] = {
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".jpe": "JPEG",
    ".jfif": "JPEG",
    ".png": "PNG",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".gif": "GIF",
    ".tif": "TIFF",
    ".tiff": "TIFF",
}
_FORMATS = tuple(sorted(set(IMAGE_FORMATS.values())))
# The mode for each number of channels.
MODES: Mapping[int, str] = {1: "L", 3: "RGB"}

_SHADES: Mapping[Background, int] = {"white": 255, "black": 0, "grey": 128}

# What undoes each orientation that EXIF knows; orientation 1 is upright (EXIF 2.32, section 4.6.4).
_TURNS: Mapping[int, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Those of them that make a wide picture a high one.
_SIDEWAYS = frozenset(_TURNS[orientation] for orientation in (5, 6, 7, 8))

# Pillow brings these kinds of PNG pixels to 8 bits, but not the transparent colour beside them.
_PNG_BITS: Mapping[str, int] = {"L;2": 2, "L;4": 4, "RGB;16B": 16}

# Pillow logs an error for some files that it then refuses anyway.
logging.getLogger("PIL").setLevel(logging.CRITICAL)


def decode_image(path: Path, image_shape: tuple[int, ...], background: Background = "white") -> np.ndarray:
    """Read one file as uint8 [C, H, W], C being 1 or 3; see `decode_sized`."""
    return decode_sized(path, image_shape, background)[0]


def decode_sized(
    path: Path, image_shape: tuple[int, ...], background: Background = "white"
) -> tuple[np.ndarray, tuple[int, int]]:
    """Read one file as uint8 [C, H, W], C being 1 or 3, resized where its size differs; and its own size.

    The picture is turned as its EXIF data say. The background shows where the picture is transparent. Values
    of 12 or 16 bits are scaled to 8 bits. Of several pictures in one file, the first is read.

    Returns:
        The pixels, and width and height of the picture as a person sees it.

    Raises:
        Exception: of any kind: the file is no image, is broken, has more than MAX_IMAGE_PIXELS, or does not
            say which of its values are black and white.
    """
    channels, height, width = image_shape
    mode, size = MODES[channels], (width, height)
    if (num_bytes := path.stat().st_size) > MAX_IMAGE_BYTES:
        raise ValueError(f"{num_bytes} bytes, at most {MAX_IMAGE_BYTES} are read")
    # Some files that Pillow opens by name it maps into memory. Then it reads turned TIFFs wrongly, and the
    # process would end if somebody cut the file off meanwhile.
    with path.open("rb") as stream, _open(stream) as file:
        check_size(file)
        own_size = file.size
        if isinstance(file, JpegImageFile):
            # A JPEG is decoded without the detail that resizing would take away.
            file.draft(mode, size[::-1] if _turn_of(file) in _SIDEWAYS else size)
        _load(file)
        if isinstance(file, TiffImageFile):
            # Pillow has turned it by now.
            own_size = file.size
        image = _on_background(_to_8_bits(file), _SHADES[background]).convert(mode)
        # Pillow reads all EXIF data of a PNG only when it loads the pixels. It has turned a TIFF by now.
        turn = _turn_of(file)
    if turn is not None:
        image = image.transpose(turn)
        own_size = own_size[::-1] if turn in _SIDEWAYS else own_size
    if image.size != size:
        # Pillow always resizes with antialiasing.
        image = image.resize(size, Image.Resampling.BILINEAR)
    return np.asarray(image).reshape(height, width, channels).transpose(2, 0, 1), own_size


@contextmanager
def quiet_pillow() -> Iterator[None]:
    """Keep Pillow's remarks on odd files off the terminal; a file that it calls a bomb is not read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def _open(stream: BinaryIO) -> ImageFile:
    try:
        return Image.open(stream, formats=_FORMATS)
    except UnidentifiedImageError as error:
        raise ValueError(f"it is none of {', '.join(_FORMATS)}, or is broken") from error


def check_size(file: ImageFile) -> None:
    """Raise ValueError if the file has more pixels than are decoded."""
    num_pixels = file.width * file.height
    if num_pixels > MAX_IMAGE_PIXELS:
        raise ValueError(f"{file.width} x {file.height} pixels, at most {MAX_IMAGE_PIXELS} are read")
    tile = [_tags(file).get(tag, 0) for tag in (ExifTags.Base.TileWidth, ExifTags.Base.TileLength)]
    if math.prod(side for side in tile if isinstance(side, int)) > max(num_pixels, _MAX_TILE_PIXELS):
        raise ValueError(f"tiles of {tile[0]} x {tile[1]} pixels, which is more than the image has")


def _tags(file: ImageFile) -> Mapping[int, Any]:
    """Return the tags of a TIFF; no other file has any."""
    return file.tag_v2 if isinstance(file, TiffImageFile) else {}


def _load(file: ImageFile) -> None:
    """Decode the pixels, and bring a PNG's transparent colour to the bits of the pixels."""
    bits = _PNG_BITS.get(str(file.tile[0].args)) if isinstance(file, PngImageFile) and file.tile else None
    file.load()
    colour = file.info.get("transparency")
    if bits and colour is not None:
        values = [_to_byte(value, bits) for value in np.atleast_1d(colour).tolist()]
        file.info["transparency"] = values[0] if file.mode == "L" else tuple(values)


def _to_byte(value: int, bits: int) -> int:
    return value >> (bits - 8) if bits > 8 else value * (255 // (2**bits - 1))


def _turn_of(file: Image.Image) -> Image.Transpose | None:
    """Return what makes the picture upright; None: it is, or its EXIF data are broken.

    ImageOps.exif_transpose would also write the EXIF data anew, which fails where any of them are odd.
    """
    try:
        return _TURNS.get(file.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:
        # Pillow raises whatever broken data led it to.
        return None


def _to_8_bits(file: ImageFile) -> Image.Image:
    """Scale values of more than 8 bits, which Pillow would clip to white."""
    tags = _tags(file)
    if file.mode in ("I", "F") or set(tags.get(ExifTags.Base.SampleFormat, (1,))) != {1}:
        raise ValueError(
            "its values are signed, of 32 bits or fractions, and nothing says which are black and white:"
            " save it with 8 or 16 bits"
        )
    if not file.mode.startswith("I;16"):
        return file
    values = np.asarray(file)
    bits = tags.get(ExifTags.Base.BitsPerSample, (16,))[0]
    grey = Image.fromarray((values >> (bits - 8)).astype(np.uint8))
    if tags.get(ExifTags.Base.PhotometricInterpretation) == 0:
        # 0 is white here, which Pillow heeds only with 8 bits and fewer.
        grey = grey.point(lambda value: 255 - value)
    if "transparency" in file.info:
        grey.putalpha(Image.fromarray((values != file.info["transparency"]).astype(np.uint8) * 255))
    return grey


def _on_background(image: Image.Image, shade: int) -> Image.Image:
    """Lay a picture that is transparent somewhere on a background."""
    if not _is_transparent(image):
        return image
    if image.mode == "La":
        # Pillow has no direct way from here to RGBA.
        image = image.convert("LA")
    image = image.convert("RGBA")
    ground = Image.new("RGB", image.size, (shade, shade, shade))
    ground.paste(image, mask=image)
    return ground


def _is_transparent(image: Image.Image) -> bool:
    if image.format == "BMP" and image.mode == "RGBA":
        # Many programs leave the fourth byte of each pixel at 0, and mean nothing by it.
        return image.getchannel("A").getbbox() is not None
    return image.has_transparency_data
