import threading
from collections.abc import Sequence
from contextlib import closing

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms.v2 import functional as v2

from ecavg.common import batches
from ecavg.common.batches import (
    CROP_PADDING,
    DeviceData,
    Draws,
    balanced_order,
    batch_bounds,
    draw_epoch,
    horizontal_flip,
    random_crop,
)
from ecavg.common.dataset import pictures
from ecavg.common.errors import UsageError

CPU = torch.device("cpu")
SPEC = pictures(3, (3, 7, 9), (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))


def make_images(num_images: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (num_images, 3, 7, 9), dtype=torch.uint8, generator=generator)


def normalised(images: Tensor) -> Tensor:
    return v2.normalize(
        v2.to_dtype(images, torch.float32, scale=True), list(SPEC.inputs.mean), list(SPEC.inputs.std)
    )


def test_images_are_taken_normalised_and_their_targets_with_them() -> None:
    images, labels = make_images(20), torch.arange(20)
    others = torch.rand(20, 3)
    data = DeviceData(images, SPEC, CPU, [labels, others])
    assert len(data) == 20
    parts = [torch.tensor([7, 3, 3]), slice(18, 25)]
    for which, (rows, y, other) in zip(parts, data.rows(parts), strict=True):
        assert torch.equal(rows, images[which])
        torch.testing.assert_close(data.normalise(rows), normalised(images[which]))
        assert torch.equal(y, labels[which])
        assert torch.equal(other, others[which])


@pytest.mark.parametrize(
    ("images", "targets", "found"),
    [
        (torch.zeros(2, 3, 7, 9), [], "2 torch.float32"),
        (make_images(3), [torch.zeros(3), torch.arange(2)], "3 torch.uint8, 3 torch.float32, 2 torch.int64"),
    ],
)
def test_other_images_and_missing_targets_are_refused(
    images: Tensor, targets: Sequence[Tensor], found: str
) -> None:
    with pytest.raises(ValueError, match=f"not {found}$"):
        DeviceData(images, SPEC, CPU, targets)


@pytest.fixture
def _nothing_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "_fits", lambda tensors, device: False)


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("batches")}


@pytest.mark.parametrize("num_parts", [0, 1, 2, 3, 10])
@pytest.mark.usefixtures("_nothing_fits")
def test_images_that_do_not_fit_come_out_in_the_same_order(num_parts: int) -> None:
    images, labels = make_images(30), torch.arange(30)
    data = DeviceData(images, SPEC, CPU, [labels])
    parts = [torch.tensor([index, 29 - index, index]) for index in range(num_parts)]
    found = list(data.rows(parts))
    assert len(found) == num_parts
    for part, (rows, y) in zip(parts, found, strict=True):
        assert torch.equal(rows, images[part])
        assert torch.equal(y, labels[part])
    assert not threads()


@pytest.mark.usefixtures("_nothing_fits")
def test_images_that_do_not_fit_are_gathered_ahead_but_not_far(monkeypatch: pytest.MonkeyPatch) -> None:
    data = DeviceData(make_images(30), SPEC, CPU, [torch.arange(30)])
    gathered = []
    by = set()

    def gather(part: Tensor) -> list[Tensor]:
        by.add(threading.current_thread().name)
        gathered.append(part)
        return [part]

    monkeypatch.setattr(data, "_gather", gather)
    with closing(data.rows(torch.arange(30).split(1))) as rows:
        for taken in range(1, 11):
            next(rows)
            assert taken <= len(gathered) <= taken + batches.NUM_AHEAD
    assert len(gathered) < 30
    assert all(name.startswith("batches") for name in by)
    assert not threads()


@pytest.mark.usefixtures("_nothing_fits")
def test_error_of_the_thread_reaches_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    data = DeviceData(make_images(30), SPEC, CPU, [torch.arange(30)])
    rows = data.rows([torch.tensor([1]), torch.tensor([30]), torch.tensor([2])])
    assert len(next(rows)) == 2
    with pytest.raises(IndexError):
        next(rows)
    assert not threads()


def test_crop_and_flip_equal_torchvision_image_by_image() -> None:
    x = normalised(make_images(200))
    _, corners, flipped = draw_epoch(200, 0)
    found = horizontal_flip(random_crop(x, corners), flipped)
    for image, (top, left), flip, result in zip(x, corners.tolist(), flipped, found, strict=True):
        expected = v2.crop(v2.pad(image, [CROP_PADDING]), top, left, 7, 9)
        assert torch.equal(result, v2.horizontal_flip(expected) if flip else expected)


def test_an_image_is_augmented_alike_in_any_part_of_the_epoch_that_has_it() -> None:
    data = DeviceData(make_images(30), SPEC, CPU, [torch.arange(30)])
    draws = draw_epoch(30, 5)
    (whole,) = draws.batches(data, [slice(0, 30)])
    assert torch.equal(whole.targets, draws.order_N)
    plain = whole.augmented(data, ())
    cropped = random_crop(plain, draws.corners_N2)
    for augment, expected in (
        (("random_crop",), cropped),
        (("horizontal_flip",), horizontal_flip(plain, draws.flipped_N)),
        (("horizontal_flip", "random_crop"), horizontal_flip(cropped, draws.flipped_N)),
    ):
        bounds = [slice(begin, begin + 8) for begin in range(0, 30, 8)]
        parts = [batch.augmented(data, augment) for batch in draws.batches(data, bounds)]
        assert torch.equal(torch.cat(parts), expected)


def test_an_epoch_is_drawn_from_its_seed_alone() -> None:
    def same(one: Draws, other: Draws) -> list[bool]:
        return [torch.equal(*pair) for pair in zip(one, other, strict=True)]

    torch.manual_seed(1)
    first = draw_epoch(30, 5)
    torch.manual_seed(2)  # what the process drew before does not matter
    assert same(first, draw_epoch(30, 5)) == [True] * 3
    assert same(first, draw_epoch(30, 6)) == [False] * 3
    assert sorted(first.order_N.tolist()) == list(range(30))
    labels = torch.tensor([0] * 25 + [1] * 5)
    assert labels[draw_epoch(30, 5, labels).order_N].bincount().tolist() == [15, 15]


@given(st.lists(st.sampled_from([0, 1, 2, 5, 900]), min_size=1, max_size=60), st.integers(0, 2**40))
def test_balanced_order_draws_classes_and_their_examples_equally_often(labels: list[int], seed: int) -> None:
    order = balanced_order(torch.tensor(labels), torch.Generator().manual_seed(seed))
    assert order.dtype == torch.int64
    drawn = order.tolist()
    assert len(drawn) == len(labels)
    per_class = [sum(labels[index] == label for index in drawn) for label in set(labels)]
    assert max(per_class) - min(per_class) <= 1
    for label in set(labels):
        per_example = [drawn.count(index) for index, other in enumerate(labels) if other == label]
        assert max(per_example) - min(per_example) <= 1


def test_balanced_order_leaves_the_rest_to_chance() -> None:
    labels = torch.tensor([0] * 6 + [1, 2])  # in eight draws, two of the classes come three times
    orders = [balanced_order(labels, torch.Generator().manual_seed(seed)) for seed in range(300)]
    counts = torch.stack([labels[order].bincount() for order in orders]).sum(0)
    assert counts.tolist() == pytest.approx([800, 800, 800], abs=50)  # six standard deviations
    examples = torch.cat(orders).bincount()[:6]
    assert examples.tolist() == pytest.approx([800 / 6] * 6, abs=60)
    firsts = labels[torch.stack(orders)[:, 0]].bincount()
    assert firsts.tolist() == pytest.approx([100] * 3, abs=50)  # shuffled, not class by class


@given(st.integers(1, 300), st.integers(1, 50), st.integers(1, 4))
def test_batches_cover_all_images_and_none_is_too_small(num_images: int, size: int, smallest: int) -> None:
    if min(num_images, size) < smallest:
        with pytest.raises(UsageError, match=f"at least {smallest} images"):
            batch_bounds(num_images, size, smallest)
        return
    bounds = batch_bounds(num_images, size, smallest)
    assert [index for begin, end in bounds for index in range(begin, end)] == list(range(num_images))
    sizes = [end - begin for begin, end in bounds]
    assert set(sizes[:-1]) <= {size}
    assert smallest <= sizes[-1] < size + smallest
