from pathlib import Path

import numpy as np
import pytest
import structlog
from PIL import Image

from common.config import RunConfig
from common.errors import UsageError
from edge_agent import image_folder
from edge_agent.image_folder import FileSplit, decode_image, list_image_folder, stamp_of

RUN = RunConfig(dataset="pets", num_classes=2, image_shape=(3, 4, 6))
RANDOM = np.random.default_rng(0)


def random_pixels(*shape: int) -> np.ndarray:
    return RANDOM.integers(0, 256, shape, dtype=np.uint8)


def save(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    for name in ("train/cat/b.png", "train/cat/a.png", "train/dog/c.png", "test/dog/d.png"):
        save(tmp_path / name, random_pixels(4, 6, 3))
    return tmp_path


def read_all(split: FileSplit, shape: tuple[int, int, int] = (3, 4, 6)) -> tuple[np.ndarray, np.ndarray, int]:
    (images, labels), num_skipped = split.read(np.arange(len(split.labels)), shape)
    return images, labels, num_skipped


def test_files_and_classes_are_in_sorted_order(pets: Path) -> None:
    train, test = list_image_folder(pets, RUN)
    assert [path.relative_to(pets).as_posix() for path in train.paths] == [
        "train/cat/a.png",
        "train/cat/b.png",
        "train/dog/c.png",
    ]
    assert train.labels.tolist() == [0, 0, 1]
    assert test is not None
    assert test.labels.tolist() == [1]


def test_a_folder_without_test_has_none(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        save(tmp_path / "train" / name / "a.png", random_pixels(4, 6, 3))
    assert list_image_folder(tmp_path, RUN)[1] is None


def test_class_names_fix_the_labels(pets: Path) -> None:
    run = RUN.model_copy(update={"num_classes": 3, "class_names": ("emu", "dog", "cat")})
    train, _ = list_image_folder(pets, run)
    assert train.labels.tolist() == [2, 2, 1]


def test_only_the_files_asked_for_are_decoded(pets: Path) -> None:
    train, _ = list_image_folder(pets, RUN)
    (pets / "train/cat/a.png").unlink()
    shard, num_skipped = train.read(np.array([1, 2]), (3, 4, 6))
    assert shard.labels.tolist() == [0, 1]
    assert num_skipped == 0


def test_other_and_hidden_files_are_not_images(pets: Path) -> None:
    for name in ("notes.txt", ".DS_Store", "._a.png"):
        (pets / "train/cat" / name).write_text("not an image")
    (pets / "train/.git").mkdir()
    assert len(list_image_folder(pets, RUN)[0].paths) == 3


@pytest.mark.parametrize("suffix", [".png", ".PNG", ".bmp", ".webp", ".jpg", ".jpeg"])
def test_every_format_is_read(tmp_path: Path, suffix: str) -> None:
    pixels = np.full((4, 6, 3), (200, 100, 50), np.uint8)
    path = save(tmp_path / f"train/cat/a{suffix}", pixels)
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
    images, read_labels, _ = read_all(FileSplit(paths, labels), (3, 1, 1))
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


def test_an_image_of_too_many_pixels_is_skipped_before_it_is_decoded(
    pets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_folder, "MAX_IMAGE_PIXELS", 23)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    assert read_all(list_image_folder(pets, RUN)[0])[2] == 3


def test_what_pillow_calls_a_bomb_is_skipped(pets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)  # 24 pixels: over the limit, below twice the limit
    assert read_all(list_image_folder(pets, RUN)[0])[2] == 3


def test_a_format_is_told_by_content_and_others_are_not_opened(pets: Path) -> None:
    Image.fromarray(random_pixels(4, 6, 3)).save(pets / "train/cat/a.png", format="TIFF")
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
