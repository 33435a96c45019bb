import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import structlog
from PIL import Image

from common import dataset
from common.config import RunConfig
from common.errors import UsageError
from edge_agent import pictures, reading
from edge_agent.file_split import FileSplit
from edge_agent.image_folder import list_image_folder, stamp_of
from edge_agent.not_read import find_not_read
from edge_agent.pictures import IMAGE_FORMATS, decode_image

RUN = RunConfig(dataset="pets", num_classes=2, image_shape=(3, 4, 6))
RANDOM = np.random.default_rng(0)


def random_pixels(*shape: int) -> np.ndarray:
    return RANDOM.integers(0, 256, shape, dtype=np.uint8)


def save(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


@contextmanager
def denied(folder: Path) -> Iterator[None]:
    """Have the folder refuse to be listed, also where the tests run as root."""
    real = Path.iterdir

    def iterdir(self: Path) -> Iterator[Path]:
        if self == folder:
            raise PermissionError(13, "Permission denied", str(self))
        return real(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "iterdir", iterdir)
        yield


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    for name in ("train/cat/b.png", "train/cat/a.png", "train/dog/c.png", "test/dog/d.png"):
        save(tmp_path / name, random_pixels(4, 6, 3))
    return tmp_path


def read_all(split: FileSplit, shape: tuple[int, int, int] = (3, 4, 6)) -> tuple[np.ndarray, np.ndarray, int]:
    (images, labels), num_skipped = split.read(
        np.arange(len(split.targets)), dataset.pictures(1000, shape, (), ())
    )
    return images, labels, num_skipped


def test_files_and_classes_are_in_sorted_order(pets: Path) -> None:
    train, test = list_image_folder(pets, RUN)
    assert [path.relative_to(pets).as_posix() for path in train.paths] == [
        "train/cat/a.png",
        "train/cat/b.png",
        "train/dog/c.png",
    ]
    assert train.targets.tolist() == [0, 0, 1]
    assert test is not None
    assert test.targets.tolist() == [1]


def test_reading_says_how_far_it_is_after_each_batch_of_files(
    pets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "_BATCH", 2)
    (pets / "train/cat/a.png").write_bytes(b"broken")
    train, _ = list_image_folder(pets, RUN)
    told: list[tuple[int, int]] = []
    _, num_skipped = train.read(np.arange(3), RUN.spec, lambda *so: told.append(so))
    assert (told, num_skipped) == ([(2, 3), (3, 3)], 1)


def test_a_folder_without_test_has_none(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        save(tmp_path / "train" / name / "a.png", random_pixels(4, 6, 3))
    assert list_image_folder(tmp_path, RUN)[1] is None


def test_class_names_fix_the_labels(pets: Path) -> None:
    run = RUN.model_copy(update={"num_classes": 3, "class_names": ("emu", "dog", "cat")})
    train, _ = list_image_folder(pets, run)
    assert train.targets.tolist() == [2, 2, 1]


def test_only_the_files_asked_for_are_decoded(pets: Path) -> None:
    train, _ = list_image_folder(pets, RUN)
    (pets / "train/cat/a.png").unlink()
    shard, num_skipped = train.read(np.array([1, 2]), dataset.pictures(10, (3, 4, 6), (), ()))
    assert shard.targets.tolist() == [0, 1]
    assert num_skipped == 0


def test_other_and_hidden_files_are_not_images(pets: Path) -> None:
    for name in ("notes.txt", ".DS_Store", "._a.png"):
        (pets / "train/cat" / name).write_text("not an image")
    (pets / "train/.git").mkdir()
    assert len(list_image_folder(pets, RUN)[0].paths) == 3


@pytest.mark.parametrize("suffix", [*IMAGE_FORMATS, ".PNG", ".Tif"])
def test_every_format_is_read(tmp_path: Path, suffix: str) -> None:
    pixels = np.full((4, 6, 3), (200, 100, 50), np.uint8)
    path = tmp_path / f"train/cat/a{suffix}"
    path.parent.mkdir(parents=True)
    Image.fromarray(pixels).save(path, IMAGE_FORMATS[suffix.lower()])
    save(tmp_path / "train/dog/b.png", pixels)
    images, _, num_skipped = read_all(list_image_folder(tmp_path, RUN)[0])
    assert num_skipped == 0
    np.testing.assert_allclose(images[0], pixels.transpose(2, 0, 1), atol=3, err_msg=str(path))


def test_pixels_of_a_lossless_image_are_kept(tmp_path: Path) -> None:
    pixels = random_pixels(4, 6, 3)
    decoded = decode_image(save(tmp_path / "a.png", pixels), (3, 4, 6))
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, pixels.transpose(2, 0, 1))


def test_many_batches_keep_images_beside_their_labels(tmp_path: Path) -> None:
    labels = np.arange(200)
    paths = [save(tmp_path / f"{label}.bmp", np.full((1, 1, 3), label, np.uint8)) for label in labels]
    images, read_labels, _ = read_all(FileSplit(paths, labels, []), (3, 1, 1))
    np.testing.assert_array_equal(images[:, 0, 0, 0], labels)
    np.testing.assert_array_equal(read_labels, labels)


def test_colour_becomes_grey_by_the_weights_of_bt_601(tmp_path: Path) -> None:
    pixels = random_pixels(5, 5, 3)
    decoded = decode_image(save(tmp_path / "a.png", pixels), (1, 5, 5))
    np.testing.assert_allclose(decoded[0], pixels @ np.array([0.299, 0.587, 0.114]), atol=1)


def test_grey_becomes_three_equal_channels(tmp_path: Path) -> None:
    pixels = random_pixels(5, 5)
    decoded = decode_image(save(tmp_path / "a.png", pixels), (3, 5, 5))
    np.testing.assert_array_equal(decoded, np.stack([pixels] * 3))


def test_16_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    pixels = random_pixels(5, 5)
    path = save(tmp_path / "a.png", pixels.astype(np.uint16) * 257)
    np.testing.assert_array_equal(decode_image(path, (1, 5, 5))[0], pixels)


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_large_images_shrink_to_the_mean_of_their_regions(tmp_path: Path, suffix: str) -> None:
    blocks = random_pixels(2, 3, 3)
    path = save(tmp_path / f"a{suffix}", blocks.repeat(64, axis=0).repeat(64, axis=1))
    decoded = decode_image(path, (3, 8, 12))  # 4 x 4 pixels for each block, the inner ones not blended
    inner = decoded[:, 1::4, 1::4]
    np.testing.assert_allclose(inner, blocks.transpose(2, 0, 1), atol=4)


def test_jpeg_loses_no_detail_that_the_size_asked_for_can_show(tmp_path: Path) -> None:
    blocks = random_pixels(8, 8)  # 8 x 8 pixels each, which is where JPEG is exact
    path = save(tmp_path / "a.jpg", blocks.repeat(8, axis=0).repeat(8, axis=1))
    decoded = decode_image(path, (1, 32, 32))
    np.testing.assert_allclose(decoded[0], blocks.repeat(4, axis=0).repeat(4, axis=1), atol=2)


def test_unreadable_images_are_skipped_counted_and_logged_once(pets: Path) -> None:
    broken = pets / "train/cat/a.png"
    broken.write_bytes(b"not an image")
    truncated = pets / "train/cat/b.png"
    truncated.write_bytes(truncated.read_bytes()[:60])
    with structlog.testing.capture_logs() as logs:
        images, labels, num_skipped = read_all(list_image_folder(pets, RUN)[0])
    assert num_skipped == 2
    assert labels.tolist() == [1]
    np.testing.assert_array_equal(images[0], decode_image(pets / "train/dog/c.png", (3, 4, 6)))
    (event,) = logs
    assert event["event"] == "images_skipped"
    assert event["log_level"] == "warning"
    assert event["num_skipped"] == 2
    assert event["first"].startswith(str(broken))
    assert event["classes_without_images"] == ["cat"]


def test_reasons_for_skipping_images_are_counted(pets: Path) -> None:
    for name in ("train/cat/a.png", "train/cat/b.png"):
        Image.fromarray(RANDOM.random((4, 6)).astype(np.float32)).save(pets / name, "TIFF")
    (pets / "train/dog/d.png").write_bytes(b"not an image")
    with structlog.testing.capture_logs() as logs:
        read_all(list_image_folder(pets, RUN)[0])
    reasons = list(logs[0]["reasons"].items())
    assert [count for _, count in reasons] == [2, 1]
    assert "nothing says which are black and white" in reasons[0][0]
    assert "none of BMP, GIF" in reasons[1][0]


def test_an_image_of_too_many_pixels_is_skipped_before_it_is_decoded(
    pets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "MAX_IMAGE_PIXELS", 23)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    assert read_all(list_image_folder(pets, RUN)[0])[2] == 3


def test_what_pillow_calls_a_bomb_is_skipped(pets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)  # 24 pixels: over the limit, below twice the limit
    assert read_all(list_image_folder(pets, RUN)[0])[2] == 3


def test_a_format_is_told_by_content_and_others_are_not_opened(pets: Path) -> None:
    Image.fromarray(random_pixels(4, 6, 3)).save(pets / "train/cat/a.png", format="PCX")
    Image.fromarray(random_pixels(4, 6, 3)).save(pets / "train/cat/b.png", format="BMP")
    assert read_all(list_image_folder(pets, RUN)[0])[2] == 1


def test_stamp_changes_with_every_file_that_comes_goes_or_is_written(pets: Path) -> None:
    stamps = [stamp_of(pets)]
    assert stamp_of(pets) == stamps[0]
    save(pets / "train/cat/new.png", random_pixels(4, 6, 3))
    stamps.append(stamp_of(pets))
    (pets / "train/cat/new.png").write_bytes(b"longer than it was, and no image")
    stamps.append(stamp_of(pets))
    (pets / "train/cat/new.png").rename(pets / "train/dog/new.png")
    stamps.append(stamp_of(pets))
    (pets / "test/dog/d.png").unlink()
    stamps.append(stamp_of(pets))
    assert len(set(stamps)) == len(stamps)
    assert stamp_of(pets / "gone") not in stamps


def test_stamp_is_of_the_pictures_that_are_read(pets: Path) -> None:
    stamps = [stamp_of(pets)]
    (pets / "train/cat/notes.txt").touch()
    (pets / "train/cat/.hidden.png").touch()
    (pets / "more.png").touch()
    assert stamp_of(pets) == stamps[0]
    save(pets / "train/cat/2024/05/e.png", random_pixels(4, 6, 3))
    stamps.append(stamp_of(pets))
    (pets / "train/cat/album").symlink_to(save(pets / "elsewhere/f.gif", random_pixels(4, 6)).parent)
    stamps.append(stamp_of(pets))
    (pets / "elsewhere/f.gif").unlink()
    stamps.append(stamp_of(pets))
    assert len(set(stamps)) == 3
    assert stamps[3] == stamps[1]


# --- folders below a class folder


def names_in(split: FileSplit, folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in split.paths]


def test_pictures_of_a_class_are_those_in_all_folders_below_its_own(pets: Path) -> None:
    for name in ("2024/05/a.png", "2024/z.png", "0/0/0/0/a.png", ".trash/a.png", "@eaDir/a.png"):
        save(pets / "train/dog" / name, random_pixels(4, 6, 3))
    train, _ = list_image_folder(pets, RUN)
    assert names_in(train, pets / "train")[2:] == [
        "dog/0/0/0/0/a.png",
        "dog/2024/05/a.png",
        "dog/2024/z.png",
        "dog/c.png",
    ]
    assert train.targets.tolist() == [0, 0, 1, 1, 1, 1]


def test_class_whose_folder_is_a_link_is_read(pets: Path) -> None:
    (pets / "train/dog").rename(pets / "dogs")
    (pets / "train/dog").symlink_to(pets / "dogs")
    assert list_image_folder(pets, RUN)[0].targets.tolist() == [0, 0, 1]


@pytest.mark.parametrize("target", [".", "..", "../..", "../../..", "inner", "../dog/inner/back"])
def test_links_to_folders_end_and_bring_no_other_class(pets: Path, target: str) -> None:
    """None of these links leads to a picture that is not one of the class anyway."""
    inner = save(pets / "train/dog/inner/e.png", random_pixels(4, 6, 3)).parent
    (inner / "back").symlink_to("..")
    (pets / "train/dog/link").symlink_to(target)
    train, _ = list_image_folder(pets, RUN)
    assert names_in(train, pets)[2:] in (
        ["train/dog/c.png", "train/dog/inner/e.png"],
        ["train/dog/c.png", "train/dog/link/e.png"],
    )
    assert stamp_of(pets) == stamp_of(pets)


def test_folders_as_deep_as_a_path_may_be_are_read(pets: Path) -> None:
    """Beyond that they are named as what is not read."""
    here = os.open(pets / "train/dog", os.O_RDONLY)
    for _ in range(1100):
        os.mkdir("dddd", dir_fd=here)
        below = os.open("dddd", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    try:
        assert len(list_image_folder(pets, RUN)[0].paths) == 3
        assert str(find_not_read(pets)) == "files not read: 1 (out of reach 1), of them 1 in train/dog"
    finally:
        subprocess.run(["rm", "-rf", pets / "train/dog/dddd"], check=True)


def test_folder_below_that_cannot_be_opened_is_named_and_others_are_read(pets: Path) -> None:
    closed = save(pets / "train/dog/closed/e.png", random_pixels(4, 6, 3)).parent
    with denied(closed):
        assert len(list_image_folder(pets, RUN)[0].paths) == 3
        found = str(find_not_read(pets))
    assert found == "files not read: 1 (folder without permission 1), of them 1 in train/dog"


# --- what is not read


def test_what_is_not_read_is_counted_by_suffix_and_folder_in_one_warning(pets: Path) -> None:
    for number in range(3):
        (pets / f"train/cat/{number}.HEIC").touch()
    (pets / "test/dog/2024").mkdir()
    (pets / "test/dog/2024/notes.txt").touch()
    (pets / "train/stray.png").touch()
    with structlog.testing.capture_logs() as logs:
        text = str(find_not_read(pets))
    assert text == (
        "files not read: 5 (.heic 3, .png 1, .txt 1), of them 3 in train/cat, 1 in train, 1 in test/dog"
    )
    (event,) = logs
    assert event == {
        "event": "files_not_read",
        "log_level": "warning",
        "num_files": 5,
        "suffixes": {".heic": 3, ".txt": 1, ".png": 1},
        "folders": {"train/cat": 3, "test/dog": 1, "train": 1},
        "without_images": [],
    }


def test_class_of_which_nothing_is_read_is_named(pets: Path) -> None:
    for path in (pets / "train/cat").iterdir():
        path.rename(path.with_suffix(".heic"))
    (pets / "train/cat/deeper").mkdir()
    assert str(find_not_read(pets)) == (
        "files not read: 2 (.heic 2), of them 2 in train/cat; no image to read in train/cat"
    )


def test_nothing_is_said_of_a_folder_of_which_all_is_read(pets: Path) -> None:
    for name in ("Thumbs.db", "desktop.ini", ".DS_Store", "._a.png", ".picasa.ini"):
        (pets / "train/cat" / name).touch()
        (pets / "train" / name).touch()
    with structlog.testing.capture_logs() as logs:
        assert str(find_not_read(pets)) == ""
    assert not logs


def test_what_is_no_file_is_counted_and_not_opened(pets: Path) -> None:
    os.mkfifo(pets / "train/cat/pipe.png")
    (pets / "train/cat/gone.png").symlink_to("nowhere.png")
    (pets / "train/cat/loop.png").symlink_to("loop.png")
    (pets / "train/cat/without-a-suffix").touch()
    assert str(find_not_read(pets)).startswith("files not read: 4 (out of reach 2, ")
    assert find_not_read(pets).suffixes == {"out of reach": 2, "pipe or device": 1, "other": 1}


def test_warning_stays_short_whatever_the_names(pets: Path) -> None:
    for number in range(50):
        folder = pets / f"train/{'long' * 50}{number}"
        folder.mkdir()
        (folder / f"a.{number}").touch()
        (folder / f"a.{'x' * 200}").touch()
    text = str(find_not_read(pets))
    assert "and 46 more), of them" in text
    assert len(text) < 3000


# --- names that are not UTF-8


ODD = os.fsdecode("Übung".encode("latin-1"))


def test_file_whose_name_is_not_utf8_is_read_and_stamped(pets: Path) -> None:
    stamp = stamp_of(pets)
    save(pets / f"train/cat/{ODD}.png", random_pixels(4, 6, 3))
    assert len(read_all(list_image_folder(pets, RUN)[0])[0]) == 4
    assert stamp_of(pets) != stamp


def test_unreadable_file_whose_name_is_not_utf8_is_named_in_utf8(pets: Path) -> None:
    (pets / f"train/cat/{ODD}.png").write_bytes(b"not an image")
    (pets / f"train/cat/{ODD}.{ODD}").touch()
    with structlog.testing.capture_logs() as logs:
        read_all(list_image_folder(pets, RUN)[0])
        find_not_read(pets)
    assert logs[0]["first"].startswith(rf"{pets}/train/cat/\xdcbung.png: ")
    assert logs[1]["suffixes"] == {r".\xdcbung": 1}


def test_class_folder_whose_name_is_not_utf8_is_refused(pets: Path) -> None:
    (pets / "train/cat").rename(pets / f"train/{ODD}")
    with pytest.raises(UsageError, match="has a name that is not UTF-8: rename it"):
        list_image_folder(pets, RUN)


@pytest.mark.parametrize("folders", [[], ["train"], ["cat", "dog"]], ids=["empty", "empty train", "no train"])
def test_a_folder_without_class_folders_is_refused(tmp_path: Path, folders: list[str]) -> None:
    for name in folders:
        (tmp_path / name).mkdir()
    with pytest.raises(UsageError, match=rf"no class folders in {tmp_path}/train: lay the images out as"):
        list_image_folder(tmp_path, RUN)


@pytest.mark.parametrize("part", ["train", "test"])
def test_class_folders_without_images_are_refused(pets: Path, part: str) -> None:
    for path in (pets / part).glob("*/*"):
        path.unlink()
    with pytest.raises(UsageError, match=rf"no images \(.jpg, .*\) in the class folders of {pets}/{part}"):
        list_image_folder(pets, RUN)


def test_a_test_folder_without_class_folders_is_refused(pets: Path) -> None:
    for path in sorted((pets / "test").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    with pytest.raises(UsageError, match=f"no class folders in {pets}/test"):
        list_image_folder(pets, RUN)


def test_another_number_of_classes_than_the_runs_is_refused(pets: Path) -> None:
    run = RUN.model_copy(update={"num_classes": 3})
    with pytest.raises(UsageError, match=r"has 2 class folders, and the run 3 classes: set class_names"):
        list_image_folder(pets, run)


def test_a_class_folder_that_class_names_lack_is_refused(pets: Path) -> None:
    run = RUN.model_copy(update={"class_names": ("cat", "emu")})
    with pytest.raises(UsageError, match=rf"class folder {pets}/train/dog is not one of the run's 2 classes"):
        list_image_folder(pets, run)


def test_a_test_class_that_train_lacks_is_refused(pets: Path) -> None:
    save(pets / "test/emu/e.png", random_pixels(4, 6, 3))
    with pytest.raises(UsageError, match=rf"class folder {pets}/test/emu is not one of"):
        list_image_folder(pets, RUN)


def test_channels_that_no_image_has_are_refused(pets: Path) -> None:
    run = RunConfig(dataset="pets", num_classes=2, image_shape=(4, 4, 6))
    with pytest.raises(UsageError, match=r"1 or 3 channels, and the run's image_shape asks for 4"):
        list_image_folder(pets, run)


def test_a_folder_that_cannot_be_listed_is_refused(pets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(self: Path) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", deny)
    with pytest.raises(UsageError, match=rf"cannot read data folder {pets}/train: Permission denied"):
        list_image_folder(pets, RUN)
