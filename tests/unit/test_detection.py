"""The detection of examples/: its loss and boxes are torchvision's, its figure is that of PASCAL VOC."""

import importlib
from itertools import pairwise
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ecavg.common.dataset import DatasetSpec, Inputs, Targets
from tests.processes import ROOT

SIZE = 320
DISC, SQUARE = (20.0, 30.0, 140.0, 150.0, 1.0), (150.0, 160.0, 310.0, 310.0, 2.0)


@pytest.fixture
def detection(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module("detection")


def task_for(detection: ModuleType, size: int = SIZE) -> Any:
    targets = Targets("float32", (2, 5), 0, size)
    return detection.Detection(DatasetSpec(Inputs("uint8", (3, size, size)), targets))


def drawn_outputs(detection: ModuleType, task: Any, num_pictures: int = 2) -> Tensor:
    """Return outputs of a model that knows nothing."""
    torch.manual_seed(0)
    model = detection.net((3, SIZE, SIZE), None).eval()
    with torch.no_grad():
        outputs: Tensor = task.outputs(model(torch.randn(num_pictures, 3, SIZE, SIZE)))
    return outputs


def test_loss_and_boxes_are_those_of_the_whole_detector(detection: ModuleType) -> None:
    torch.manual_seed(0)
    whole = detection.detector()
    layers = detection.Net(whole)
    task = task_for(detection)
    pixels = torch.rand(2, 3, SIZE, SIZE)
    # Torchvision divides by the number of matched anchors of all pictures: here each has the same.
    targets = torch.tensor([[DISC, SQUARE], [DISC, SQUARE]])
    boxes, labels = detection.objects_of(targets[0])
    expected = sum(whole.train()(list(pixels), [{"boxes": boxes, "labels": labels}] * 2).values())
    found = task.loss(task.outputs(layers((pixels - 0.5) / 0.5)), targets)
    assert found.shape == (2,)
    torch.testing.assert_close(found.mean(), expected)
    with torch.no_grad():
        pictures = whole.eval()(list(pixels))
        outputs = task.outputs(layers((pixels - 0.5) / 0.5))
    for mine, theirs in zip(task.detections(outputs), pictures, strict=True):
        assert len(theirs["scores"]) == detection.MOST_DETECTIONS
        torch.testing.assert_close(mine, theirs)


def true_outputs(task: Any, target: tuple[float, ...]) -> Tensor:
    """Return the outputs of a model that is sure of one object, in one picture: [1, A, 7]."""
    anchors = task._anchors
    boxes = torch.tensor(target[:4]).expand(len(anchors), 4)
    logits = torch.zeros(len(anchors), 3)
    logits[:, int(target[4])] = 20.0
    return torch.cat([task._detector.box_coder.encode_single(boxes, anchors), logits], 1)[None]


def test_picture_whose_objects_are_found_has_the_score_1(detection: ModuleType) -> None:
    task = task_for(detection)
    outputs = torch.cat([true_outputs(task, DISC), true_outputs(task, SQUARE), true_outputs(task, DISC)])
    nothing = (0.0,) * 5
    # The second picture has another class, and in the third one an object is missed.
    wrong = (*SQUARE[:4], 1.0)
    targets = torch.tensor([[DISC, nothing], [wrong, nothing], [DISC, wrong]])
    assert task.scores(outputs, targets).tolist() == [1.0, 0.0, 0.5]
    assert task.figure(task.tally(outputs[:1], targets[:1])).score == 1.0


def test_what_is_no_object_is_left_out(detection: ModuleType) -> None:
    task = task_for(detection)
    outputs = drawn_outputs(detection, task, 4)
    numbers = [DISC, (0.0,) * 5, (*DISC[:4], 60.0), (*DISC[:4], 0.5), (9.0, 9.0, 3.0, 30.0, 1.0)]
    targets = torch.tensor([[DISC, each] for each in numbers[1:]])
    alone = task.loss(outputs, torch.tensor([[DISC, numbers[1]]] * 4))
    assert torch.equal(task.loss(outputs, targets), alone)
    assert task.loss(outputs[:1], torch.zeros(1, 2, 5)).tolist() == [0.0]
    assert task.scores(outputs[:1], torch.zeros(1, 2, 5)).tolist() == [0.0]


def test_object_is_found_once(detection: ModuleType) -> None:
    wanted = torch.tensor([DISC[:4], SQUARE[:4]])
    small = torch.tensor([20.0, 30.0, 60.0, 70.0])
    found = torch.stack([wanted[1], wanted[1] + 1, small, wanted[0]])
    assert detection.are_right(found, wanted).tolist() == [True, False, False, True]
    assert detection.are_right(found, wanted[:0]).tolist() == [False] * 4


def area_under_the_curve(ranked: list[int], num_objects: int) -> float:
    """Return the area under the best precision at each recall or above, in steps that are written out."""
    curve = [(sum(ranked[:n]) / num_objects, sum(ranked[:n]) / n) for n in range(1, len(ranked) + 1)]
    recalls = sorted({recall for recall, _ in curve} | {0.0})
    return sum(
        (high - low) * max(precision for recall, precision in curve if recall >= high)
        for low, high in pairwise(recalls)
    )


@pytest.mark.parametrize("ranked", [[1, 0, 1, 0], [0, 1, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0, 0, 1, 1], []])
def test_average_precision_is_the_area_under_the_curve(ranked: list[int], detection: ModuleType) -> None:
    num_objects, num_pictures = 4, 3
    counted = np.full((num_pictures, 1 + 2 * detection.MOST_DETECTIONS), -1.0, np.float32)
    counted[:, 0] = (1, 0, 3)
    # The best is in picture 0, the next in picture 1, and so on.
    for rank, is_right in enumerate(ranked):
        picture, place = rank % num_pictures, rank // num_pictures
        counted[picture, 1 + place] = 1 - rank / 10
        counted[picture, 1 + detection.MOST_DETECTIONS + place] = is_right
    expected = area_under_the_curve(ranked, num_objects) if ranked else 0.0
    assert detection.average_precision(torch.from_numpy(counted)) == pytest.approx(expected)
