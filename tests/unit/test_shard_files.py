from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest

from ecavg.common.shards import Shard, read_shard
from ecavg.common.transfer import Blob, blob_of
from ecavg.edge_agent import shard_files
from ecavg.edge_agent.shard_files import input_digests, keep_shards


def examples(*numbers: int) -> Shard:
    """Images that are told apart by their number; each has its own label, too."""
    images = [np.random.default_rng(number).integers(0, 256, (1, 4, 4)) for number in numbers]
    return Shard(np.array(images, np.uint8), np.array(numbers, np.int64) % 10)


def contents(paths: list[Path]) -> list[list[int]]:
    """Which numbers each file holds."""
    known = {examples(number).inputs.tobytes(): number for number in range(100)}
    return [[known[image.tobytes()] for image in read_shard(path).inputs] for path in paths]


def keep(folder: Path, *numbers: int) -> list[list[int]]:
    paths = keep_shards(folder, examples(*numbers))
    assert sorted(folder.iterdir()) == paths
    for path in paths:
        np.testing.assert_array_equal(read_shard(path).targets, examples(*contents([path])[0]).targets)
    return contents(paths)


def blobs(folder: Path) -> dict[str, Blob]:
    return {path.name: blob_of(path) for path in folder.iterdir()}


def test_new_examples_become_a_new_shard_and_the_old_file_is_not_touched(tmp_path: Path) -> None:
    assert keep(tmp_path / "shards", 3, 1, 2) == [[3, 1, 2]]
    (old,) = (tmp_path / "shards").iterdir()
    before = old.stat()
    assert keep(tmp_path / "shards", 0, 1, 7, 2, 3) == [[3, 1, 2], [0, 7]]
    after = old.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_the_same_examples_in_any_order_change_nothing(tmp_path: Path) -> None:
    keep(tmp_path, 1, 2, 3)
    keep(tmp_path, 1, 2, 3, 4)
    before = blobs(tmp_path)
    assert keep(tmp_path, 4, 2, 1, 3) == [[1, 2, 3], [4]]
    assert blobs(tmp_path) == before


def test_shard_that_lost_an_example_is_made_anew_and_the_others_stay(tmp_path: Path) -> None:
    keep(tmp_path, 1, 2, 3)
    keep(tmp_path, 1, 2, 3, 4, 5)
    keep(tmp_path, 1, 2, 3, 4, 5, 6)
    before = blobs(tmp_path)
    assert keep(tmp_path, 1, 3, 4, 5, 6, 7) == [[4, 5], [6], [1, 3, 7]]
    assert {name: blob for name, blob in blobs(tmp_path).items() if name in before} == {
        name: before[name] for name in sorted(before)[1:]
    }


def test_relabelled_example_is_another_one(tmp_path: Path) -> None:
    keep(tmp_path, 1, 2)
    images, labels = examples(1, 2)
    (path,) = keep_shards(tmp_path, Shard(images, labels[::-1].copy()))
    assert read_shard(path).targets.tolist() == [2, 1]


def test_copy_of_an_example_that_is_in_a_shard_is_not_written_again(tmp_path: Path) -> None:
    assert keep(tmp_path, 1, 2, 2) == [[1, 2, 2]]  # how often something is there at first is the user's
    assert keep(tmp_path, 1, 1, 2, 2, 2) == [[1, 2, 2]]
    assert keep(tmp_path, 1, 2, 3, 3) == [[1, 2, 2], [3, 3]]


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b"", lambda b: b[:-9] + b"\x63" + b[-8:]])
def test_damaged_file_is_written_again(tmp_path: Path, damage) -> None:  # type: ignore[no-untyped-def]
    keep(tmp_path, 1, 2)
    (path,) = tmp_path.iterdir()
    blob = blob_of(path)
    path.write_bytes(damage(path.read_bytes()))
    assert keep(tmp_path, 1, 2) == [[1, 2]]
    assert list(blobs(tmp_path).values()) == [blob]


def test_images_of_another_shape_are_others(tmp_path: Path) -> None:
    shard = examples(1, 2)
    keep_shards(tmp_path, shard)
    (path,) = keep_shards(tmp_path, Shard(shard.inputs.reshape(2, 1, 2, 8), shard.targets))
    assert read_shard(path).inputs.shape == (2, 1, 2, 8)


def test_too_many_shards_become_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_files, "MAX_SHARDS", 3)
    for end in (2, 3, 4):
        keep(tmp_path, *range(1, end))
    assert keep(tmp_path, 1, 2, 3) == [[1], [2], [3]]
    assert keep(tmp_path, 1, 2, 3, 4) == [[1, 2, 3, 4]]
    assert keep(tmp_path, 1, 2, 3, 4, 5) == [[1, 2, 3, 4], [5]]


@pytest.mark.parametrize("before", [(1, 2, 3), (1, 2, 9)], ids=["too many", "one removed"])
@pytest.mark.parametrize("cut_at", ["write_shard", "unlink"])
def test_cut_off_at_any_step_and_called_again_it_leaves_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: tuple[int, ...], cut_at: str
) -> None:
    monkeypatch.setattr(shard_files, "MAX_SHARDS", 3)
    folders = [tmp_path / "whole", tmp_path / "cut"]
    for folder in folders:
        for end in (1, 2, 3):
            keep(folder, *before[:end])
    expected = keep(folders[0], 1, 2, 3, 4)

    def cut(*_: object, **__: object) -> None:
        raise InterruptedError

    with monkeypatch.context() as patch:
        patch.setattr(*((shard_files, "write_shard") if cut_at == "write_shard" else (Path, "unlink")), cut)
        with pytest.raises(InterruptedError):
            keep_shards(folders[1], examples(1, 2, 3, 4))
    assert keep(folders[1], 1, 2, 3, 4) == expected
    assert set(blobs(folders[1]).values()) == set(blobs(folders[0]).values())


def test_digests_are_those_of_blake2_and_differ_by_pixels_and_key() -> None:
    images = np.asfortranarray(examples(1, 2, 1).inputs)
    found = input_digests(images, [b"a", b"a", b"b"])
    expected = [
        int.from_bytes(blake2b(examples(number).inputs.tobytes(), digest_size=8, key=key).digest())
        for number, key in ((1, b"a"), (2, b"a"), (1, b"b"))
    ]
    assert found.tolist() == expected
    assert len(set(expected)) == 3
