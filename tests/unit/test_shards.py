from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from ecavg.common.dataset import pictures
from ecavg.common.errors import UsageError
from ecavg.common.schema import check_shard, read_header
from ecavg.common.shards import Shard, cloud_holdout, read_shard, split, write_shard


def make_shard(num_examples: int = 7) -> Shard:
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (num_examples, 3, 5, 3), dtype=np.uint8)
    return Shard(images, generator.integers(0, 10, num_examples))


def test_shard_comes_back_as_read_only_views_of_the_file(tmp_path: Path) -> None:
    shard, path = make_shard(), tmp_path / "shard"
    write_shard(path, shard)

    images, labels = read_shard(path)

    np.testing.assert_array_equal(images, shard.inputs)
    np.testing.assert_array_equal(labels, shard.targets)
    assert (images.dtype, labels.dtype) == (np.uint8, np.int64)
    assert isinstance(images, np.memmap)
    assert not images.flags.writeable
    assert not images.flags.owndata


def test_written_shard_is_plain_safetensors_and_passes_the_gate(tmp_path: Path) -> None:
    shard, path = make_shard(), tmp_path / "shard"
    write_shard(path, shard)
    np.testing.assert_array_equal(load_file(path)["images"], shard.inputs)
    assert check_shard(read_header(path), pictures(10, (3, 5, 3), (), ())) == 7


def test_same_shard_gives_the_same_bytes_whatever_its_memory_layout(tmp_path: Path) -> None:
    shard = make_shard()
    write_shard(tmp_path / "a", shard)
    write_shard(tmp_path / "b", Shard(np.asfortranarray(shard.inputs), np.repeat(shard.targets, 2)[::2]))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_shard_with_unaligned_labels_is_read(tmp_path: Path) -> None:
    path = tmp_path / "shard"
    header = (
        b'{"images":{"dtype":"U8","shape":[1,1,1,1],"data_offsets":[0,1]},'
        b'"labels":{"dtype":"I64","shape":[1],"data_offsets":[1,9]}}'
    )
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\x07" + (5).to_bytes(8, "little"))
    shard = read_shard(path)
    assert shard.targets.tolist() == [5]
    assert shard.targets.flags.aligned


def test_failed_write_leaves_the_old_shard_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "shard"
    write_shard(path, make_shard())
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("ecavg.common.shards.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        write_shard(path, make_shard(9))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "shard",
    [
        Shard(np.zeros((2, 1, 1, 1), np.float64), np.zeros(2, np.int64)),
        Shard(np.zeros((2, 1, 1, 1), np.uint8), np.zeros(2, np.uint8)),
        Shard(np.zeros((2, 1, 1, 1), np.uint8), np.zeros(2, np.int32)),
        Shard(np.zeros((2, 1, 1, 1), np.uint8), np.zeros(3, np.int64)),
    ],
)
def test_arrays_that_are_no_shard_are_not_written(shard: Shard, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="targets"):
        write_shard(tmp_path / "shard", shard)
    assert not list(tmp_path.iterdir())


@given(
    st.lists(st.integers(0, 4), min_size=2, max_size=80),
    st.floats(0.001, 0.999),
    st.integers(0, 2**63 - 1),
)
def test_split_is_disjoint_complete_sorted_and_stratified(
    labels: list[int], fraction: float, seed: int
) -> None:
    labels_N = np.array(labels)
    rest, held_out = split(labels_N, fraction, seed)

    assert sorted([*rest, *held_out]) == list(range(len(labels)))
    assert rest.dtype == held_out.dtype == np.int64
    assert (np.diff(rest) > 0).all()
    assert (np.diff(held_out) > 0).all()
    assert 1 <= len(held_out) < len(labels)
    assert len(held_out) == min(max(1, round(fraction * len(labels))), len(labels) - 1)
    taken = len(held_out) / len(labels)
    for label in set(labels):
        assert abs((labels_N[held_out] == label).sum() - taken * (labels_N == label).sum()) < 1


def test_split_depends_on_the_seed_only() -> None:
    labels = np.arange(100) % 10
    again = [split(labels, 0.2, 7)[1] for _ in range(2)]
    np.testing.assert_array_equal(*again)
    assert not np.array_equal(split(labels, 0.2, 8)[1], again[0])


def test_every_example_can_be_held_out() -> None:
    labels = np.arange(20) % 3
    seen = {index for seed in range(200) for index in split(labels, 0.1, seed)[1]}
    assert seen == set(range(20))


@pytest.mark.parametrize(("num_examples", "num_held_out"), [(0, 0), (1, 0), (2, 1), (10, 3)])
def test_cloud_holds_back_of_two_examples_on(num_examples: int, num_held_out: int) -> None:
    rest, held_out = cloud_holdout(np.zeros(num_examples, np.int64), 0.3, 5)
    assert sorted([*rest, *held_out]) == list(range(num_examples))
    assert len(held_out) == num_held_out


def test_single_example_cannot_be_split() -> None:
    with pytest.raises(UsageError, match="at least 2"):
        split(np.zeros(1, np.int64), 0.5, 0)
