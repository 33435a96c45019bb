"""An image folder that somebody else fills: what is no image, or too large a one, is passed over."""

import io
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import GifImagePlugin, Image, PngImagePlugin, TiffImagePlugin

from ecavg.common.config import RunConfig
from ecavg.edge_agent.data import load_agent_data
from ecavg.edge_agent.pictures import MAX_IMAGE_BYTES
from tests.hostile import pickles
from tests.hostile.target import MAX_GROWTH_BYTES

RUN = RunConfig(num_classes=2)
MEBIBYTE = 1 << 20


def bytes_of(image: Image.Image, name: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, name, **options)
    return file.getvalue()


def photo(name: str) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    return bytes_of(Image.fromarray(pixels), name)


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    """Grey, 8 bits."""
    start = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + start + b"".join(chunks) + png_chunk(b"IEND", b"")


def zeros(num_bytes: int) -> bytes:
    """Compressed; a thousandth of them is left."""
    packer = zlib.compressobj(1)
    pieces = [packer.compress(bytes(MEBIBYTE)) for _ in range(num_bytes // MEBIBYTE)]
    return b"".join(pieces) + packer.flush()


def png_bomb() -> bytes:
    """Return a complete and correct image of 400 million pixels, in half a megabyte."""
    side = 20_000
    return png(side, side, png_chunk(b"IDAT", zeros((side + 1) * side + MEBIBYTE)))


def png_of_more_than_fits() -> bytes:
    return png(2**31 - 1, 2**31 - 1, png_chunk(b"IDAT", zlib.compress(bytes(100))))


def png_without_a_side() -> bytes:
    return png(0, 8, png_chunk(b"IDAT", zlib.compress(bytes(8))))


def png_with_a_text_bomb() -> bytes:
    text = png_chunk(b"zTXt", b"Comment\0\0" + zeros(256 * MEBIBYTE))
    return png(8, 8, text, png_chunk(b"IDAT", zlib.compress(bytes(72))))


def png_with_a_profile_bomb() -> bytes:
    profile = png_chunk(b"iCCP", b"icc\0\0" + zeros(256 * MEBIBYTE))
    return png(8, 8, profile, png_chunk(b"IDAT", zlib.compress(bytes(72))))


def jpeg_bomb() -> bytes:
    content = bytearray(photo("JPEG"))
    start = content.index(b"\xff\xc0") + 5
    content[start : start + 4] = struct.pack(">HH", 65_500, 65_500)
    return bytes(content)


def webp_bomb() -> bytes:
    content = bytearray(bytes_of(Image.new("RGB", (64, 64)), "WEBP", lossless=True))
    start = content.index(b"VP8L") + 9
    content[start : start + 4] = struct.pack("<I", 0x0FFFFFFF)  # 16,384 x 16,384
    return bytes(content)


def bmp_bomb() -> bytes:
    content = bytearray(photo("BMP"))
    content[18:26] = struct.pack("<ii", 2**31 - 1, -(2**31))
    return bytes(content)


def gif_bomb() -> bytes:
    """Return a GIF whose screen is small, and whose first picture has 4 billion pixels."""
    content = bytearray(photo("GIF"))
    place = content.index(b"\x2c", 13 + 768)
    content[place + 5 : place + 9] = struct.pack("<HH", 65_535, 65_535)
    return bytes(content)


def gif_bomb_of_the_screen() -> bytes:
    content = bytearray(photo("GIF"))
    content[6:10] = struct.pack("<HH", 65_535, 65_535)
    return bytes(content)


def tiff_of(width: int, height: int, *more: tuple[int, int], strip: bytes = b"") -> bytes:
    """Return a grey TIFF, deflated, in one strip, with these other tags: number and value."""
    entries = {256: width, 257: height, 258: 8, 259: 8, 262: 1, 273: 8, 277: 1, 278: height, 279: len(strip)}
    directory = b"".join(
        struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted((entries | dict(more)).items())
    )
    head = struct.pack("<2sHI", b"II", 42, 8 + len(strip))
    return head + strip + struct.pack("<H", len(directory) // 12) + directory + bytes(4)


def tiff_bomb() -> bytes:
    """Return a complete and correct image of 400 million pixels, in half a megabyte."""
    return tiff_of(20_000, 20_000, strip=zeros(400 * MEBIBYTE))


def tiff_bomb_of_a_tile() -> bytes:
    """Return an image of 8 x 8 pixels whose only tile has a billion."""
    tile = {322: 32_768, 323: 32_768, 324: 8, 325: 1000}
    return tiff_of(8, 8, *tile.items(), strip=zeros(MEBIBYTE))


def tiff_with_a_bomb_behind_8_pixels() -> bytes:
    return tiff_of(8, 8, strip=zeros(256 * MEBIBYTE))


def tiff_in_a_circle() -> bytes:
    """Return a TIFF without an image, whose only directory is followed by itself."""
    return struct.pack("<2sHIHHHIII", b"II", 42, 8, 1, 256, 4, 1, 8, 8)


NO_IMAGES: dict[str, Callable[[], bytes]] = {
    "bomb.png": png_bomb,
    "more-than-fits.png": png_of_more_than_fits,
    "without-a-side.png": png_without_a_side,
    "bomb.jpg": jpeg_bomb,
    "bomb.webp": webp_bomb,
    "bomb.bmp": bmp_bomb,
    "bomb.gif": gif_bomb,
    "bomb-of-the-screen.gif": gif_bomb_of_the_screen,
    "bomb.tif": tiff_bomb,
    "circle.tif": tiff_in_a_circle,
    "negative.tif": lambda: tiff_of(2**31, 2**31),
    "without-a-side.tif": lambda: tiff_of(0, 8),
    "text-bomb.png": png_with_a_text_bomb,
    "empty.png": lambda: b"",
    "one-byte.jpeg": lambda: b"\xff",
    "zeros.bmp": lambda: bytes(1000),
    "pickle.png": lambda: pickles.plain(Path("somebody-unpickled-this")),
    "icon.gif": lambda: bytes_of(Image.new("L", (8, 8)), "ICO"),
    "pcx.jpg": lambda: bytes_of(Image.new("L", (8, 8)), "PCX"),
    "jpeg2000.tif": lambda: bytes_of(Image.new("L", (8, 8)), "JPEG2000"),
    "postscript.png": lambda: bytes_of(Image.new("L", (8, 8)), "EPS"),  # Pillow runs a program for it
    "page.jpg": lambda: b"<svg><script>evil()</script></svg>",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of two good images each."""
    for index in range(4):
        path = tmp_path / f"images/train/{index % 2}/good{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), 50 * index, np.uint8)).save(path)
    return tmp_path / "images"


@pytest.fixture(autouse=True)
def _memory() -> Iterator[None]:
    """Most of what this process has held during the test is not more than before and a little."""
    Image.init()
    Path("/proc/self/clear_refs").write_text("5", "ascii")
    before = bytes_of_status("VmRSS")
    yield
    assert bytes_of_status("VmHWM") - before < MAX_GROWTH_BYTES


def bytes_of_status(field: str) -> int:
    return int(Path("/proc/self/status").read_text("ascii").split(f"{field}:")[1].split()[0]) * 1024


def read(folder: Path) -> tuple[int, int]:
    """How many images come of the folder, and how many were passed over."""
    data = load_agent_data(
        RUN,
        source=str(folder),
        data_dir=None,
        partition=None,
        seed_name="edge-1",
        allowed_factories=(),
    )
    return len(data.train.targets) + len(data.held_out.targets), data.num_skipped


@pytest.mark.parametrize("name", NO_IMAGES)
def test_what_is_no_image_is_passed_over(folder: Path, name: str) -> None:
    (folder / "train/0" / name).write_bytes(NO_IMAGES[name]())
    assert read(folder) == (4, 1)


def test_profile_that_is_a_bomb_is_not_unpacked(folder: Path) -> None:
    (folder / "train/0/profile.png").write_bytes(png_with_a_profile_bomb())
    num_images, num_skipped = read(folder)
    assert (num_images, num_skipped) in [(4, 1), (5, 0)]  # Pillow goes on without a profile it cannot read


@pytest.mark.parametrize("bomb", [tiff_bomb_of_a_tile, tiff_with_a_bomb_behind_8_pixels])
def test_no_more_of_a_tiff_is_unpacked_than_its_pixels(folder: Path, bomb: Callable[[], bytes]) -> None:
    (folder / "train/0/bomb.tif").write_bytes(bomb())
    assert sum(read(folder)) == 5


@pytest.mark.parametrize("name", ["GIF", "TIFF", "PNG", "WEBP"])
def test_of_thousands_of_pictures_in_one_file_only_the_first_is_decoded(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The directories of a TIFF lead to one another, so that a thousand of them would be read in turn."""
    frames = [Image.new("L", (8, 8), number % 256) for number in range(1000)]
    content = bytes_of(frames[0], name, save_all=True, append_images=frames[1:])
    (folder / f"train/0/many.{name.lower()}").write_bytes(content)
    for plugin in (GifImagePlugin.GifImageFile, PngImagePlugin.PngImageFile, TiffImagePlugin.TiffImageFile):
        monkeypatch.setattr(plugin, "seek", lambda *_: pytest.fail("another picture was looked for"))
    assert read(folder) == (5, 0)


@pytest.mark.parametrize("name", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_image_that_is_cut_off_is_passed_over(folder: Path, name: str) -> None:
    content = photo(name)
    cuts = [*range(0, 64, 3), *range(64, len(content) - 64, len(content) // 20)]
    for cut in cuts:
        (folder / f"train/0/{cut}.{name.lower()}").write_bytes(content[:cut])
    assert read(folder) == (4, len(cuts))


@pytest.mark.parametrize("name", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_damaged_images_are_read_or_passed_over(folder: Path, name: str) -> None:
    generator = np.random.default_rng(0)
    for index in range(60):
        content = np.frombuffer(photo(name), np.uint8).copy()
        places = generator.integers(0, min(len(content), 200), 4)
        content[places] = generator.integers(0, 256, 4, np.uint8)
        (folder / f"train/0/{index}.{name.lower()}").write_bytes(content.tobytes())
    assert sum(read(folder)) == 64


def test_what_is_no_file_is_not_opened(folder: Path) -> None:
    """Pipes and devices would be read for ever."""
    place = folder / "train/0"
    os.mkfifo(place / "pipe.png")
    (place / "device.png").symlink_to("/dev/zero")
    (place / "nowhere.png").symlink_to("/nowhere/evil")
    (place / "loop.png").symlink_to("loop.png")
    (place / "folder.png").mkdir()
    assert read(folder) == (4, 0)


def test_links_are_taken_for_what_they_point_to(folder: Path) -> None:
    """It is the user's own folder: a link to an image is one, a link to anything else is none."""
    (folder / "train/0/link.png").symlink_to(folder / "train/1/good1.png")
    (folder / "train/0/secret.png").symlink_to("/etc/passwd")
    assert read(folder) == (5, 1)


def test_file_that_is_too_large_is_not_opened(folder: Path) -> None:
    for suffix in ("webp", "png"):
        with (folder / f"train/0/large.{suffix}").open("wb") as file:
            file.write(photo(suffix.upper()))
            file.truncate(MAX_IMAGE_BYTES + 1)  # a hole
    assert read(folder) == (4, 2)


def test_text_bomb_is_one() -> None:
    """Where Pillow did not stop, it would be unpacked whole."""
    with pytest.raises(ValueError, match="Decompressed data too large"):
        PngImagePlugin.PngImageFile(io.BytesIO(png_with_a_text_bomb())).load()
