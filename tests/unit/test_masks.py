"""Pictures with masks: folders, kinds of mask files, and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import structlog
from PIL import Image

from ecavg.common.config import RunConfig
from ecavg.common.errors import UsageError
from ecavg.edge_agent.config import AgentConfig
from ecavg.edge_agent.data import AgentData
from ecavg.edge_agent.doctor import _look_at_data
from ecavg.edge_agent.masks import is_mask_folder
from ecavg.edge_agent.sources import class_names_of, data_stamp
from ecavg.edge_agent.tables import TableFormat
from tests.recipes import data_of

COUNT = 20
RANDOM = np.random.default_rng(0)
PIXELS = RANDOM.integers(0, 256, (COUNT, 4, 6), dtype=np.uint8)
CLASSES = RANDOM.integers(0, 3, (COUNT, 4, 6), dtype=np.uint8)
RUN: dict[str, Any] = {
    "task": "segmentation", "dataset": "field", "num_classes": 3, "image_shape": (1, 4, 6)
}  # fmt: skip


def save(folder: Path, mask: Any = Image.fromarray) -> Path:
    """Write pictures and their masks, which a function makes from [H, W]."""
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for number, (pixels, classes) in enumerate(zip(PIXELS, CLASSES, strict=True)):
        Image.fromarray(pixels).save(folder / f"images/{number:02}.tiff")
        mask(classes).save(folder / f"masks/{number:02}.png")
    return folder


def with_palette(classes: np.ndarray) -> Image.Image:
    image = Image.fromarray(classes).convert("P")
    image.putdata(classes.ravel().tolist())
    image.putpalette([0, 0, 0, 200, 10, 10, 10, 200, 10])
    return image


def load(folder: Path, max_bad_rows: float = 0.1, **run: Any) -> AgentData:
    return data_of(
        RunConfig(**{**RUN, **run}),
        source=str(folder),
        table=TableFormat(max_bad_rows=max_bad_rows),
    )


def masks_in_order(data: AgentData) -> dict[int, np.ndarray]:
    """Return the masks by the places of their pictures in PIXELS."""
    found = {}
    for inputs, targets in (data.train, data.held_out):
        for pixels, target in zip(inputs, targets, strict=True):
            (number,) = np.flatnonzero((pixels[0] == PIXELS).all((1, 2)))
            found[int(number)] = target
    return dict(sorted(found.items()))


@pytest.mark.parametrize(
    "mask",
    [Image.fromarray, with_palette, lambda classes: Image.fromarray(classes.astype(np.uint16))],
    ids=["grey", "palette", "16 bits"],
)
def test_mask_is_the_target_of_the_picture_with_its_name(mask: Any, tmp_path: Path) -> None:
    data = load(save(tmp_path / "field", mask))
    found = masks_in_order(data)
    assert list(found) == list(range(COUNT))
    np.testing.assert_array_equal(np.stack(list(found.values())), CLASSES)
    assert (data.train.targets.dtype, len(data.held_out.targets) > 0) == (np.int64, True)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_mask_of_few_bits_has_the_classes_that_were_written(bits: int, tmp_path: Path) -> None:
    """Pillow writes no grey PNG of 2 or 4 bits, so this one is written byte by byte."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    folder = save(tmp_path / "field")
    wanted = (CLASSES[0] > 0).astype(np.uint8) * (2**bits - 1 if bits < 3 else 5)
    rows = b"".join(
        b"\0" + np.packbits(np.unpackbits(row[:, None], axis=1)[:, -bits:].ravel()).tobytes()
        for row in wanted
    )
    header = struct.pack(">IIBBBBB", 6, 4, bits, 0, 0, 0, 0)
    png = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (folder / "masks/00.png").write_bytes(b"\x89PNG\r\n\x1a\n" + png)
    np.testing.assert_array_equal(masks_in_order(load(folder, num_classes=6))[0], wanted)


def test_mask_is_resized_without_making_classes_between(tmp_path: Path) -> None:
    folder = tmp_path / "field"
    save(folder, lambda classes: Image.fromarray(np.where(classes, 2, 0).astype(np.uint8)))
    data = load(folder, image_shape=(1, 8, 8))
    targets = np.concatenate([data.train.targets, data.held_out.targets])
    pillows = [
        Image.open(path).resize((8, 8), Image.Resampling.NEAREST) for path in folder.glob("masks/*.png")
    ]
    assert sorted(map(bytes, targets)) == sorted(np.array(each, np.int64).tobytes() for each in pillows)
    assert np.unique(targets).tolist() == [0, 2]
    twice = load(folder, image_shape=(1, 8, 12))
    ours = np.concatenate([twice.train.targets, twice.held_out.targets])
    same = np.concatenate([part.targets for part in load(folder)[:2]])
    # The parts hold the same pictures in other numbers, because their pixels decide.
    assert sorted(map(bytes, ours[:, ::2, ::2].copy())) == sorted(map(bytes, same))


def test_border_of_255_does_not_count_unless_the_run_has_so_many_classes(tmp_path: Path) -> None:
    folder = save(
        tmp_path / "field", lambda classes: Image.fromarray(np.where(classes == 2, 255, classes).astype("u1"))
    )
    found = masks_in_order(load(folder))
    np.testing.assert_array_equal(
        np.stack(list(found.values())), np.where(CLASSES == 2, -1, CLASSES.astype(int))
    )
    assert masks_in_order(load(folder, num_classes=256))[0].max() == 255


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (Image.fromarray(CLASSES[3][:3]), "its mask has 6 x 3 pixels, the picture 6 x 4"),
        (Image.fromarray(CLASSES[3] + 1), "its mask has the class 3, and the run only 0 to 2"),
        (Image.fromarray(CLASSES[3]).convert("RGB"), r"its mask has colours \(RGB\)"),
    ],
)
def test_mask_that_does_not_fit_is_left_out_and_named(
    broken: Image.Image, reason: str, tmp_path: Path
) -> None:
    folder = save(tmp_path / "field")
    broken.save(folder / "masks/03.png")
    with structlog.testing.capture_logs() as logs:
        data = load(folder)
    assert data.num_skipped == 1
    assert sorted(set(range(COUNT)) - set(masks_in_order(data))) == [3]
    assert logs[0]["first"].startswith(f"{folder}/images/03.tiff: {reason.replace(chr(92), '')}")
    with pytest.raises(UsageError, match=rf"^1 of 20 files cannot be read, first .*03.tiff: {reason}"):
        load(folder, 0.01)


@pytest.mark.parametrize("kept_bytes", [0, 20, 60])
def test_mask_that_is_broken_is_named_as_the_mask(kept_bytes: int, tmp_path: Path) -> None:
    folder = save(tmp_path / "field")
    mask = folder / "masks/03.png"
    mask.write_bytes(mask.read_bytes()[:kept_bytes])
    reason = "its mask cannot be read: it is no PNG file, or is broken"
    with pytest.raises(UsageError, match=rf"^1 of 20 files cannot be read, first .*03.tiff: {reason}: "):
        load(folder, 0.01)


def test_folders_without_pictures_are_told(tmp_path: Path) -> None:
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    with pytest.raises(UsageError, match=f"{tmp_path} has no pictures: lay them out as"):
        load(tmp_path)


@pytest.mark.parametrize("gone", ["images/03.tiff", "masks/03.png"])
def test_picture_or_mask_alone_is_left_out_and_named(gone: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "field")
    (folder / gone).unlink()
    left = folder / ("masks/03.png" if "images" in gone else "images/03.tiff")
    with structlog.testing.capture_logs() as logs:
        data = load(folder)
    assert len(masks_in_order(data)) == COUNT - 1
    assert logs == [
        {"event": "pictures_without_mask", "log_level": "warning", "num_skipped": 1, "first": str(left)}
    ]
    with pytest.raises(UsageError, match=f"1 of 20 pictures or masks are alone, first {left}: "):
        load(folder, 0.01)


@pytest.mark.parametrize("part", ["", "train"])
def test_files_that_are_no_pictures_are_told(part: str, tmp_path: Path) -> None:
    save(tmp_path / "field" / part)
    for name in ("images/99.heic", "masks/99.npy", "masks/98.npy"):
        (tmp_path / "field" / part / name).write_bytes(b"")
    data = load(tmp_path / "field")
    where = part or "field"
    assert data.not_read == (
        f"files not read: 3 (.npy 2, .heic 1), of them 2 in {where}/masks, 1 in {where}/images"
    )


def test_mask_must_have_the_size_of_the_picture_as_people_see_it(tmp_path: Path) -> None:
    folder = save(tmp_path / "field")
    for name in ("images/00.tiff", "images/01.tiff"):
        (folder / name).unlink()
    sideways = Image.fromarray(np.repeat(PIXELS[0].T[::-1, :, None], 3, 2))
    exif = Image.Exif()
    exif[0x0112] = 6  # A person sees it turned by 90 degrees.
    sideways.save(folder / "images/00.jpg", exif=exif)
    sideways.save(folder / "images/01.png", exif=exif)
    assert load(folder, 0.0).num_skipped == 0


def test_test_split_is_held_out(tmp_path: Path) -> None:
    save(tmp_path / "field/train")
    save(tmp_path / "field/test")
    data = load(tmp_path / "field")
    assert (len(data.train.targets), len(data.held_out.targets)) == (COUNT, COUNT)


def test_stamp_changes_with_pictures_and_masks(tmp_path: Path) -> None:
    for folder in (tmp_path / "one", tmp_path / "two/train"):
        save(folder)
    for source in (tmp_path / "one", tmp_path / "two"):
        stamps = [data_stamp(RunConfig(**RUN), str(source), None)]
        for name in ("images/00.tiff", "masks/00.png"):
            next(source.rglob(name)).unlink()
            stamps.append(data_stamp(RunConfig(**RUN), str(source), None))
        assert len(set(stamps)) == 3


def test_run_of_another_task_is_refused_in_one_line(tmp_path: Path) -> None:
    folder = save(tmp_path / "field")
    assert class_names_of(str(folder), None) == ()
    with pytest.raises(UsageError, match=r"has masks, and .*: set task = .segmentation. in the server"):
        load(folder, task="classification")


def test_two_pictures_for_one_mask_are_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "field")
    Image.fromarray(PIXELS[0]).save(folder / "images/00.png")
    with pytest.raises(UsageError, match=r"00.png and .*images/00.tiff have the same name: rename one"):
        load(folder)


def test_class_folders_with_such_names_among_others_are_an_image_folder(tmp_path: Path) -> None:
    for name in ("images", "masks", "scans"):
        (tmp_path / "train" / name).mkdir(parents=True)
    assert not is_mask_folder(tmp_path)
    (tmp_path / "train/scans").rmdir()
    assert is_mask_folder(tmp_path)


def test_doctor_looks_at_some_masks(tmp_path: Path) -> None:
    folder = save(tmp_path / "field")
    config = AgentConfig(server="127.0.0.1:1", data=str(folder))
    assert _look_at_data(config) == f"{folder} has 20 images"
    Image.fromarray(CLASSES[0][:3]).save(folder / "masks/00.png")
    with pytest.raises(UsageError, match=r"00.tiff cannot be read \(its mask has 6 x 3 pixels"):
        _look_at_data(config)
