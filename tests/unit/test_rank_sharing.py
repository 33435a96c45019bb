"""What ranks tell each other comes as it was given: here by the rank that gives it, over a group of one."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ecavg.common.ranks import ALONE, Ranks

TENSORS = {
    "floats": torch.randn(2, 3),
    "brain floats": torch.randn(5).bfloat16(),
    "truths": torch.tensor([True, False]),
    "a number": torch.tensor(7),
    "nothing": torch.empty(0, 3),
    "channels last": torch.randn(1, 2, 3, 3).contiguous(memory_format=torch.channels_last),
    "complex": torch.randn(2, dtype=torch.complex64),
}


@pytest.fixture
def first(tmp_path: Path) -> Iterator[Ranks]:
    """Return the first of two ranks, which hears only itself."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield Ranks(0, 2)
    dist.destroy_process_group()


def test_tensors_keep_dtype_shape_and_bits(first: Ranks) -> None:
    for shared in (first.share_tensors(TENSORS), ALONE.share_tensors(TENSORS)):
        assert shared.keys() == TENSORS.keys()
        for name, tensor in TENSORS.items():
            assert (shared[name].dtype, shared[name].shape) == (tensor.dtype, tensor.shape), name
            assert torch.equal(shared[name], tensor), name


def test_text_and_numbers_come_as_they_were(first: Ranks) -> None:
    assert first.share("Grüße") == ALONE.share("Grüße") == "Grüße"
    assert (first.gather(3), ALONE.gather(3)) == ([3, 0], [3])
    number = torch.tensor([1.5], dtype=torch.float64)
    assert torch.equal(first.add(number), number)
    assert torch.equal(ALONE.add(number), number)


def test_rank_alone_joins_what_it_has_itself() -> None:
    (found,) = ALONE.concatenate({"x": torch.arange(3)}).values()
    assert torch.equal(found, torch.arange(3))
