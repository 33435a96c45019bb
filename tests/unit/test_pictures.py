"""What one picture looks like once it is read: upright, on a background, and in its first frame."""

import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ecavg.common.config import Background
from ecavg.edge_agent.pictures import decode_image, quiet_pillow

RANDOM = np.random.default_rng(0)
SHADES: dict[Background, int] = {"white": 255, "black": 0, "grey": 128}


def random_pixels(*shape: int) -> np.ndarray:
    return RANDOM.integers(0, 256, shape, dtype=np.uint8)


def png(
    width: int, height: int, bits: int, colour_type: int, rows: list[bytes], *chunks: tuple[bytes, bytes]
) -> bytes:
    """Return a PNG with these rows as they are stored, and with these chunks before them."""
    start = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    all_chunks = [(b"IHDR", start), *chunks, (b"IDAT", pixels), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(map(png_chunk, all_chunks))


def png_chunk(chunk: tuple[bytes, bytes]) -> bytes:
    kind, content = chunk
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def tiff(
    values: np.ndarray, order: str, *, is_compressed: bool = False, tags: dict[int, int] | None = None
) -> bytes:
    """Return a TIFF of one strip with these values [H, W] or [H, W, C], in this byte order.

    Args:
        order: "<" or ">".
        tags: what else it has, or has differently; each is a SHORT.
    """
    height, width, *rest = values.shape
    channels = rest[0] if rest else 1
    strip = values.astype(values.dtype.newbyteorder(order)).tobytes()
    strip = zlib.compress(strip) if is_compressed else strip
    sample_format = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    # For each tag: type 3 is SHORT, 4 is LONG.
    entries: dict[int, tuple[int, tuple[int, ...]]] = {
        256: (4, (width,)),
        257: (4, (height,)),
        258: (3, (values.dtype.itemsize * 8,) * channels),
        259: (3, (8 if is_compressed else 1,)),
        262: (3, (1 if channels < 3 else 2,)),
        273: (4, (8,)),
        277: (3, (channels,)),
        278: (4, (height,)),
        279: (4, (len(strip),)),
        339: (3, (sample_format,) * channels),
    }
    entries |= {tag: (3, (value,)) for tag, value in (tags or {}).items()}
    later, directory = b"", b""
    at = 8 + len(strip) + 2 + 12 * len(entries) + 4
    for tag, (kind, numbers) in sorted(entries.items()):
        content = struct.pack(f"{order}{len(numbers)}{'HI'[kind - 3]}", *numbers)
        if len(content) > 4:
            content, later = struct.pack(f"{order}I", at + len(later)), later + content
        directory += struct.pack(f"{order}HHI", tag, kind, len(numbers)) + content.ljust(4, b"\0")
    head = {"<": b"II", ">": b"MM"}[order] + struct.pack(f"{order}HI", 42, 8 + len(strip))
    return head + strip + struct.pack(f"{order}H", len(entries)) + directory + bytes(4) + later


def decoded(folder: Path, content: bytes, shape: tuple[int, int, int], **options: Any) -> np.ndarray:
    path = folder / "picture"
    path.write_bytes(content)
    return decode_image(path, shape, **options)


# --- turned photos

STORED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.swapaxes(0, 1),
    6: lambda upright: np.rot90(upright, 1),
    7: lambda upright: upright[::-1, ::-1].swapaxes(0, 1),
    8: lambda upright: np.rot90(upright, -1),
}


# Types of a TIFF's tags, and so of EXIF data.
ASCII, SHORT = 2, 3


def exif_of(*tags: tuple[int, int, bytes]) -> bytes:
    """Return EXIF data with these tags: number, type and value."""
    sizes = {ASCII: 1, SHORT: 2}
    entries = [
        struct.pack("<HHI4s", number, kind, len(value) // sizes[kind], value) for number, kind, value in tags
    ]
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(entries) + bytes(4)


def turned(orientation: int) -> bytes:
    return exif_of((0x0112, SHORT, orientation.to_bytes(2, "little")))


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP", "TIFF", "MPO"])
def test_photos_are_upright_however_they_are_stored(tmp_path: Path, name: str, orientation: int) -> None:
    """The upright picture is 16 x 24 pixels, in blocks of 8 x 8 that JPEG keeps exactly."""
    upright = random_pixels(2, 3).repeat(8, axis=0).repeat(8, axis=1)
    image = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    options: dict[str, Any] = {"lossless": True} if name == "WEBP" else {}
    image.save(tmp_path / "photo", name, exif=turned(orientation), **options)
    np.testing.assert_allclose(decode_image(tmp_path / "photo", (1, 16, 24))[0], upright, atol=2)


@pytest.mark.parametrize("is_compressed", [False, True])
def test_tiff_with_two_orientations_is_turned_once(tmp_path: Path, is_compressed: bool) -> None:
    upright = random_pixels(4, 6)
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    image = Image.fromarray(np.rot90(upright))
    options = {"compression": "tiff_lzw"} if is_compressed else {}
    image.save(tmp_path / "photo", "TIFF", tiffinfo={274: 6, 700: xmp}, **options)
    np.testing.assert_array_equal(decode_image(tmp_path / "photo", (1, 4, 6))[0], upright)


def test_orientation_behind_the_pixels_of_a_png_counts(tmp_path: Path) -> None:
    upright = random_pixels(4, 6)
    Image.fromarray(np.rot90(upright)).save(tmp_path / "photo", "PNG")
    content = (tmp_path / "photo").read_bytes()
    exif = png_chunk((b"eXIf", turned(6).removeprefix(b"Exif\0\0")))
    np.testing.assert_array_equal(
        decoded(tmp_path, content[:-12] + exif + content[-12:], (1, 4, 6))[0], upright
    )


def test_turned_jpeg_loses_no_detail_in_a_shape_that_is_not_square(tmp_path: Path) -> None:
    """The upright picture has 8 stripes of 8 x 1024 pixels; in the shape asked for each has 16 x 8."""
    stripes = random_pixels(8, 1)
    upright = stripes.repeat(8, axis=0).repeat(1024, axis=1)
    Image.fromarray(np.rot90(upright)).save(tmp_path / "photo", "JPEG", exif=turned(6), quality=95)
    found = decode_image(tmp_path / "photo", (1, 128, 8))[0].reshape(8, 16, 8)
    np.testing.assert_allclose(found[:, 3:-3], np.broadcast_to(stripes[:, :, None], (8, 10, 8)), atol=2)


BROKEN_EXIF: dict[str, bytes] = {
    "no TIFF": b"Exif\0\0this is no EXIF at all",
    "cut off": turned(6)[:17],
    "nothing": b"Exif\0\0",
    "an offset beyond the end": b"Exif\0\0II*\0\xff\xff\xff\x7f",
    "a directory without entries": b"Exif\0\0II*\0\x08\0\0\0\xff\xff",
    "no such orientation": turned(9),
    "orientation 0": turned(0),
    "an orientation in words": exif_of((0x0112, ASCII, b"up!\0")),
}


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("exif", BROKEN_EXIF.values(), ids=BROKEN_EXIF.keys())
def test_picture_with_broken_exif_data_is_read_as_it_is_stored(
    tmp_path: Path, name: str, exif: bytes
) -> None:
    image = Image.fromarray(random_pixels(2, 3).repeat(8, axis=0).repeat(8, axis=1))
    image.save(tmp_path / "plain", name)
    image.save(tmp_path / "broken", name, exif=exif)
    with quiet_pillow():
        plain, broken = (decode_image(tmp_path / each, (1, 16, 24)) for each in ("plain", "broken"))
    np.testing.assert_array_equal(broken, plain)


def test_orientation_counts_where_other_exif_data_cannot_be_written_anew(tmp_path: Path) -> None:
    """The tag 0x0100 beside it is a text, and would be written as a number."""
    upright = random_pixels(2, 3).repeat(8, axis=0).repeat(8, axis=1)
    exif = exif_of((0x0100, ASCII, b"abc\0"), (0x0112, SHORT, b"\6\0"))
    Image.fromarray(np.rot90(upright)).save(tmp_path / "photo", "JPEG", exif=exif)
    np.testing.assert_allclose(decode_image(tmp_path / "photo", (1, 16, 24))[0], upright, atol=2)


# --- transparency

# Each of 16 x 16 pixels is transparent to another degree.
COLOURS = random_pixels(16, 16, 3)
GREYS = random_pixels(16, 16)
ALPHA = np.arange(256, dtype=np.uint8).reshape(16, 16)


def laid_on(shade: int, colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Return what is seen: float [C, H, W]."""
    colours = colours if colours.ndim == 3 else colours[..., None]
    share = alpha.reshape(16, 16, 1) / 255.0
    return (colours * share + shade * (1 - share)).transpose(2, 0, 1)


def saved(image: Image.Image, name: str, **options: Any) -> Callable[[Path], bytes]:
    def save(path: Path) -> bytes:
        image.save(path, name, **options)
        return path.read_bytes()

    return save


def rgba() -> Image.Image:
    return Image.fromarray(np.dstack([COLOURS, ALPHA]))


def paletted() -> Image.Image:
    """Return 256 colours, one for each pixel, of which ALPHA says how transparent it is."""
    image = Image.frombytes("P", (16, 16), ALPHA.tobytes())
    image.putpalette(COLOURS.reshape(-1, 3).tobytes())
    return image


COLOURED: dict[str, Callable[[Path], bytes]] = {
    "RGBA.png": saved(rgba(), "PNG"),
    "RGBA.webp": saved(rgba(), "WEBP", lossless=True, exact=True),
    "RGBA.tif": saved(rgba(), "TIFF"),
    "RGBA-compressed.tif": saved(rgba(), "TIFF", compression="tiff_lzw"),
    "P-with-alphas.png": saved(paletted(), "PNG", transparency=bytes(range(256))),
    "RGBA-16-bits.png": lambda _: png(
        16, 16, 16, 6, [row.astype(">u2").tobytes() for row in np.dstack([COLOURS, ALPHA]) * np.uint16(257)]
    ),
}


@pytest.mark.parametrize("background", SHADES)
@pytest.mark.parametrize("name", COLOURED)
def test_background_shows_as_far_as_a_coloured_picture_is_transparent(
    tmp_path: Path, name: str, background: Background
) -> None:
    content = COLOURED[name](tmp_path / "saved")
    expected = laid_on(SHADES[background], COLOURS, ALPHA)
    found = decoded(tmp_path, content, (3, 16, 16), background=background)
    np.testing.assert_allclose(found, expected, atol=0.51)


def grey_with_alpha() -> Image.Image:
    return Image.merge("LA", (Image.fromarray(GREYS), Image.fromarray(ALPHA)))


GREY: dict[str, Callable[[Path], bytes]] = {
    "LA.png": saved(grey_with_alpha(), "PNG"),
    "LA.tif": saved(grey_with_alpha(), "TIFF"),
    "LA-16-bits.png": lambda _: png(
        16, 16, 16, 4, [row.astype(">u2").tobytes() for row in np.dstack([GREYS, ALPHA]) * np.uint16(257)]
    ),
    "RGBA.png": saved(grey_with_alpha().convert("RGBA"), "PNG"),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("background", SHADES)
@pytest.mark.parametrize("name", GREY)
def test_background_shows_as_far_as_a_grey_picture_is_transparent(
    tmp_path: Path, name: str, background: Background, channels: int
) -> None:
    content = GREY[name](tmp_path / "saved")
    expected = laid_on(SHADES[background], GREYS, ALPHA).repeat(channels, axis=0)
    found = decoded(tmp_path, content, (channels, 16, 16), background=background)
    np.testing.assert_allclose(found, expected, atol=0.51)


@pytest.mark.parametrize("extra", [1, 2], ids=["La.tif", "LA.tif"])
@pytest.mark.parametrize("channels", [1, 3], ids=["grey", "coloured"])
def test_colours_that_are_multiplied_by_their_alpha_are_not_multiplied_twice(
    tmp_path: Path, channels: int, extra: int
) -> None:
    """ExtraSamples is 1 where the colours are multiplied already, and 2 where they are not."""
    colours = COLOURS[..., :channels]
    stored = np.rint(colours * (ALPHA[..., None] / 255)) if extra == 1 else colours
    content = tiff(np.dstack([stored, ALPHA]).astype(np.uint8), "<", tags={338: extra})
    found = decoded(tmp_path, content, (channels, 16, 16))
    np.testing.assert_allclose(found, laid_on(255, colours, ALPHA), atol=2)


def rows_of(bits: int, *values: int) -> list[bytes]:
    """Return one row of a PNG with these values of 1, 2, 4, 8 or 16 bits."""
    if bits >= 8:
        return [b"".join(value.to_bytes(bits // 8) for value in values)]
    packed = int("".join(f"{value:0{bits}b}" for value in values).ljust(8, "0"), 2)
    return [bytes([packed])]


# For each: bits, colour type, the values of two pixels, and what the second looks like.
ONE_COLOUR: dict[str, tuple[int, int, tuple[int, ...], tuple[int, ...], int]] = {
    "1 bit": (1, 0, (0,), (1,), 255),
    "2 bits": (2, 0, (2,), (1,), 85),
    "4 bits": (4, 0, (5,), (9,), 153),
    "8 bits": (8, 0, (77,), (76,), 76),
    "16 bits": (16, 0, (0x4D01,), (0x4D02,), 0x4D),
    "RGB": (8, 2, (1, 2, 3), (9, 9, 9), 9),
    "RGB of 16 bits": (16, 2, (0x0102, 0x0304, 0x0506), (0x0909, 0x0909, 0x0909), 9),
}


@pytest.mark.parametrize("case", ONE_COLOUR.values(), ids=ONE_COLOUR.keys())
def test_one_colour_of_a_png_may_be_transparent(tmp_path: Path, case: tuple[Any, ...]) -> None:
    bits, colour_type, clear, other, seen = case
    transparent = b"".join(value.to_bytes(2) for value in clear)
    content = png(2, 1, bits, colour_type, rows_of(bits, *clear, *other), (b"tRNS", transparent))
    assert decoded(tmp_path, content, (1, 1, 2), background="grey").tolist() == [[[128, seen]]]


@pytest.mark.parametrize("name", ["GIF", "PNG"])
def test_one_colour_of_a_palette_may_be_transparent(tmp_path: Path, name: str) -> None:
    image = paletted()
    image.save(tmp_path / "picture", name, transparency=7)
    alpha = np.where(ALPHA == 7, 0, 255)
    found = decode_image(tmp_path / "picture", (3, 16, 16), "grey")
    np.testing.assert_array_equal(found, laid_on(128, COLOURS, alpha))


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 16, 16), (3, 7, 9)])
def test_icons_give_the_same_pixels_in_colour_in_grey_and_flattened(
    tmp_path: Path, shape: tuple[int, int, int]
) -> None:
    """They are black shapes with soft edges, on a transparent ground."""
    black, alpha = Image.new("L", (16, 16)), Image.fromarray(ALPHA)
    Image.merge("RGBA", (black, black, black, alpha)).save(tmp_path / "rgba.png")
    Image.merge("LA", (black, alpha)).save(tmp_path / "la.png")
    Image.fromarray(255 - ALPHA).save(tmp_path / "flat.png")
    rgba, la, flat = (decode_image(tmp_path / f"{name}.png", shape) for name in ("rgba", "la", "flat"))
    np.testing.assert_array_equal(rgba, flat)
    np.testing.assert_array_equal(la, flat)


@pytest.mark.parametrize("alpha", [0, 255])
def test_bmp_whose_fourth_bytes_are_all_zero_is_opaque(tmp_path: Path, alpha: int) -> None:
    """A header of version 4 says which bits are which colour, alpha included."""
    colours = random_pixels(4, 6, 3)
    pixels = np.dstack([colours[..., ::-1], np.full((4, 6), alpha)]).astype(np.uint8)[::-1].tobytes()
    masks = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    header = struct.pack("<IiiHHIIiiII", 108, 6, 4, 1, 32, 3, len(pixels), 0, 0, 0, 0) + masks + bytes(52)
    head = struct.pack("<2sIHHI", b"BM", 14 + len(header) + len(pixels), 0, 0, 14 + len(header))
    found = decoded(tmp_path, head + header + pixels, (3, 4, 6))
    np.testing.assert_array_equal(found, colours.transpose(2, 0, 1))


# --- values of more than 8 bits


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("is_compressed", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_16_bits_of_a_tiff_are_scaled(tmp_path: Path, order: str, is_compressed: bool, channels: int) -> None:
    pixels = random_pixels(4, 6, channels)
    values = (pixels * np.uint16(257)).squeeze()
    content = tiff(values, order, is_compressed=is_compressed)
    found = decoded(tmp_path, content, (channels, 4, 6))
    np.testing.assert_array_equal(found, pixels.transpose(2, 0, 1))


def test_16_bits_of_a_tiff_whose_zero_is_white_are_read_so(tmp_path: Path) -> None:
    pixels = random_pixels(4, 6)
    content = tiff(pixels * np.uint16(257), "<", tags={262: 0})
    np.testing.assert_array_equal(decoded(tmp_path, content, (1, 4, 6))[0], 255 - pixels)


def test_12_bits_of_a_tiff_are_scaled(tmp_path: Path) -> None:
    pixels = random_pixels(4, 6)
    digits = "".join(f"{value:02x}{value >> 4:x}" for value in pixels.ravel().tolist())
    packed = np.frombuffer(bytes.fromhex(digits), np.uint8).reshape(4, 9)
    content = tiff(packed, "<", tags={256: 6, 258: 12})
    np.testing.assert_array_equal(decoded(tmp_path, content, (1, 4, 6))[0], pixels)


@pytest.mark.parametrize("dtype", ["u4", "i4", "i2", "i1", "f4"])
def test_values_without_a_stated_range_are_refused(tmp_path: Path, dtype: str) -> None:
    content = tiff(RANDOM.integers(0, 100, (4, 6)).astype(dtype), "<")
    with pytest.raises(ValueError, match="nothing says which are black and white: save it with 8 or 16 bits"):
        decoded(tmp_path, content, (1, 4, 6))


# --- pictures of every kind, and files of several


@pytest.mark.parametrize("name", ["PNG", "GIF", "BMP", "TIFF"])
def test_colours_of_a_palette_are_read(tmp_path: Path, name: str) -> None:
    paletted().save(tmp_path / "picture", name)
    np.testing.assert_array_equal(decode_image(tmp_path / "picture", (3, 16, 16)), COLOURS.transpose(2, 0, 1))


@pytest.mark.parametrize("name", ["PNG", "GIF", "BMP", "TIFF"])
def test_one_bit_is_black_or_white(tmp_path: Path, name: str) -> None:
    is_white = random_pixels(4, 6) > 127
    Image.fromarray(is_white).save(tmp_path / "picture", name)
    np.testing.assert_array_equal(decode_image(tmp_path / "picture", (1, 4, 6))[0], is_white * 255)


@pytest.mark.parametrize("name", ["JPEG", "TIFF"])
def test_cmyk_is_read(tmp_path: Path, name: str) -> None:
    Image.new("CMYK", (8, 8), (255, 0, 0, 0)).save(tmp_path / "picture", name)
    found = decode_image(tmp_path / "picture", (3, 8, 8))
    np.testing.assert_allclose(found.mean(axis=(1, 2)), (0, 255, 255), atol=2)


def test_ycbcr_is_read(tmp_path: Path) -> None:
    colours = Image.new("RGB", (16, 16), (200, 100, 50))
    colours.save(tmp_path / "photo", "JPEG", quality=95)
    found = decode_image(tmp_path / "photo", (3, 16, 16))
    np.testing.assert_allclose(found.mean(axis=(1, 2)), (200, 100, 50), atol=2)


@pytest.mark.parametrize("name", ["GIF", "WEBP", "PNG", "TIFF", "MPO"])
def test_the_first_of_several_pictures_is_read(tmp_path: Path, name: str) -> None:
    first, *others = (Image.new("RGB", (16, 16), (shade,) * 3) for shade in (40, 120, 200))
    options: dict[str, Any] = {"lossless": True} if name == "WEBP" else {}
    first.save(tmp_path / "picture", name, save_all=True, append_images=others, **options)
    with Image.open(tmp_path / "picture") as file:
        assert file.n_frames == 3
    np.testing.assert_array_equal(decode_image(tmp_path / "picture", (3, 16, 16)), 40)


def test_file_of_no_such_format_is_refused_without_its_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^it is none of BMP, GIF, JPEG, PNG, TIFF, WEBP, or is broken$"):
        decoded(tmp_path, b"nothing", (1, 4, 6))
