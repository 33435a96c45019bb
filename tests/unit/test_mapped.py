"""Rows that stay in the files of shards: the same values, and only those that are asked for in memory."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from ecavg.cloud_server.contribution import Contribution
from ecavg.cloud_server.state_dir import blob_path
from ecavg.cloud_server.trainer.finetune import CombinedData, combine
from ecavg.common.batches import DeviceData, draw_epoch
from ecavg.common.config import FineTuneConfig, RunConfig
from ecavg.common.mapped import in_memory
from ecavg.common.shards import Shard, write_shard
from tests.recipes import CPU
from tests.unit.states import digest_of

RUN = RunConfig(image_shape=(3, 32, 32), num_classes=3, fine_tune=FineTuneConfig())


def put(blobs_dir: Path, num_images: int, seed: int) -> str:
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (num_images, 3, 32, 32), np.uint8)
    write_shard(blobs_dir / "new", Shard(images, generator.integers(0, 3, num_images)))
    digest = digest_of((blobs_dir / "new").read_bytes())
    blob_path(blobs_dir, digest).parent.mkdir(parents=True, exist_ok=True)
    (blobs_dir / "new").rename(blob_path(blobs_dir, digest))
    return digest


@pytest.fixture(scope="module")
def blobs_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("blobs")


@pytest.fixture(scope="module")
def contributions(blobs_dir: Path) -> list[Contribution]:
    """Return two contributions of 2,001 images, 6 MB; one shard is too small to hold anything back of it."""
    first = (put(blobs_dir, 700, 0), put(blobs_dir, 1, 1))
    return [Contribution("a", "", first, 701), Contribution("b", "", (put(blobs_dir, 1300, 2),), 1300)]


def both(contributions: list[Contribution], blobs_dir: Path) -> tuple[CombinedData, CombinedData]:
    return combine(RUN, contributions, blobs_dir), combine(RUN, contributions, blobs_dir, are_mapped=True)


def test_mapped_rows_are_those_in_memory(contributions: list[Contribution], blobs_dir: Path) -> None:
    for known, mapped in zip(*both(contributions, blobs_dir), strict=True):
        order = torch.randperm(len(known.inputs), generator=torch.Generator().manual_seed(1))
        for rows, expected in zip(mapped, known, strict=True):
            assert (len(rows), rows.shape, rows.dtype) == (len(expected), expected.shape, expected.dtype)
            assert torch.equal(in_memory(rows), expected)
            assert torch.equal(rows[order], expected[order])
            assert torch.equal(rows[3:90], expected[3:90])
            assert torch.equal(rows[:0], expected[:0])


def test_batches_of_mapped_rows_are_those_in_memory(
    contributions: list[Contribution], blobs_dir: Path
) -> None:
    def batches(data: CombinedData) -> list[torch.Tensor]:
        moved = DeviceData(data.train.inputs, RUN.spec, CPU, [data.train.targets])
        draws = draw_epoch(len(moved), 5)
        parts = [slice(begin, begin + 64) for begin in range(0, len(moved), 64)]
        return [field for batch in draws.batches(moved, parts) for field in batch]

    known, mapped = map(batches, both(contributions, blobs_dir))
    assert all(map(torch.equal, known, mapped))


def test_only_rows_that_are_asked_for_are_in_memory(
    contributions: list[Contribution], blobs_dir: Path
) -> None:
    def peak(*, are_mapped: bool) -> int:
        """Return how many bytes NumPy has held at most, while a batch was made of a tenth of the data."""
        tracemalloc.start()
        data = combine(RUN, contributions, blobs_dir, are_mapped=are_mapped)
        batch = data.train.inputs[torch.arange(0, len(data.train.targets), 10)]
        assert batch.shape == (181, 3, 32, 32)
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    num_bytes = 2001 * 3 * 32 * 32
    assert peak(are_mapped=False) > num_bytes
    assert peak(are_mapped=True) < num_bytes / 4


def test_without_shards_there_is_nothing(blobs_dir: Path) -> None:
    data = combine(RUN, [], blobs_dir, are_mapped=True)
    assert [len(part.targets) for part in data] == [0, 0]
