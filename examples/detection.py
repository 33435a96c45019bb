"""A user's own task: object detection with torchvision's SSDLite, on generated pictures.

A detector of torchvision returns losses while it trains, and boxes otherwise. Here model and task share that
work: the model is the detector's layers alone, whose outputs are the same tensors in both modes, and the task
has the detector's loss and makes boxes of outputs.

Shapes: B pictures of a batch, N of a data set, A anchors, O objects, D detections.
"""

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.detection import ssdlite320_mobilenet_v3_large
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.ssd import SSD
from torchvision.ops import box_iou

from ecavg.common.dataset import DatasetSpec
from ecavg.common.tasks.task import Figure, Task

NUM_SCENES, SIZE = 240, 64
# Class 0 is the background, as everywhere in torchvision.
CLASSES = ("disc", "square")
COLOURS = ((230, 60, 60), (60, 120, 230))
# A picture has no more objects than this.
MOST_OBJECTS = 2
# Of a picture, so many detections count.
MOST_DETECTIONS = 20
# A detection is right if its box and an object's have this intersection over union, or more.
LEAST_OVERLAP = 0.5


def scenes(split: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Return generated pictures, uint8 [N, 3, SIZE, SIZE], and their objects, float32 [N, MOST_OBJECTS, 5].

    An object is the left, upper, right and lower edge of its box, in pixels, and its class, from 1 on. All
    numbers of a place without an object are 0.
    """
    if split == "test":
        return None
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 80, (NUM_SCENES, SIZE, SIZE, 3), dtype=np.uint8)
    objects = np.zeros((NUM_SCENES, MOST_OBJECTS, 5), np.float32)
    for picture, places in zip(pictures, objects, strict=True):
        for place in places[: rng.integers(1, MOST_OBJECTS + 1)]:
            place[:] = _drawn(picture, rng)
    return pictures.transpose(0, 3, 1, 2).copy(), objects


def _drawn(picture: np.ndarray, rng: np.random.Generator) -> tuple[int, int, int, int, int]:
    """Draw a disc or a square into the picture, [SIZE, SIZE, 3], and return the object."""
    width = int(rng.integers(20, 33))
    left, top = (int(edge) for edge in rng.integers(0, SIZE - width + 1, 2))
    kind = int(rng.integers(len(CLASSES)))
    from_middle = np.abs(np.indices((width, width)) - (width - 1) / 2)
    is_inside = np.hypot(*from_middle) <= width / 2 if kind == 0 else np.ones((width, width), bool)
    picture[top : top + width, left : left + width][is_inside] = COLOURS[kind]
    return left, top, left + width, top + width, kind + 1


def detector() -> SSD:
    """Return SSDLite with random weights.

    Its own BatchNorm averages over hundreds of steps, and this training has less.
    """
    return ssdlite320_mobilenet_v3_large(
        weights=None,
        weights_backbone=None,
        norm_layer=nn.BatchNorm2d,
        num_classes=len(CLASSES) + 1,
        detections_per_img=MOST_DETECTIONS,
    )


class Net(nn.Module):
    """The layers of a detector. Pictures are not brought to 320x320, as the detector does."""

    def __init__(self, of_detector: SSD) -> None:
        super().__init__()
        self.backbone, self.head = of_detector.backbone, of_detector.head

    def forward(self, x: Tensor) -> Tensor:
        """Return of each anchor the box, 4 numbers relative to it, and the logits of 3 classes, [B, A, 7]."""
        outputs = self.head(list(self.backbone(x).values()))
        return torch.cat([outputs["bbox_regression"], outputs["cls_logits"]], 2)


def net(input_shape: tuple[int, ...], output_shape: tuple[int, ...] | None) -> nn.Module:  # noqa: ARG001
    """Return the network; it takes pictures of any size."""
    return Net(detector())


class Detection(Task):
    """Boxes and classes of the objects in a picture. The figure is the mean average precision at IoU 0.5."""

    metric = "mean average precision at IoU 0.5"

    def __init__(self, spec: DatasetSpec) -> None:
        super().__init__(spec)
        # Its weights do not matter: it has the loss, and makes boxes of outputs.
        self._detector = detector().eval()
        pictures = torch.zeros(1, *spec.inputs.shape)
        self._size = (spec.inputs.shape[1], spec.inputs.shape[2])
        with torch.no_grad():
            features = list(self._detector.backbone(pictures).values())
        self._anchors = self._detector.anchor_generator(ImageList(pictures, [self._size]), features)[0]

    def loss(self, outputs: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:  # noqa: ARG002
        """Return the detector's loss of each picture, of boxes and classes, for each matched anchor; [B]."""
        return torch.stack([self._loss(*pair) for pair in zip(outputs, targets, strict=True)])

    def scores(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean average precision of each picture, [B]."""
        return torch.tensor([mean_average_precision(each[None]) for each in self.tally(outputs, targets)])

    def tally(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return of each picture and class what `_counted` says, float32 [B, classes, 1 + 2 D]."""
        found = self.detections(outputs)
        return torch.stack([_counted(*pair) for pair in zip(found, targets, strict=True)])

    def figure(self, tally: Tensor) -> Figure:
        """Return the mean average precision of all pictures."""
        return Figure(mean_average_precision(tally))

    def detections(self, outputs: Tensor) -> list[dict[str, Tensor]]:
        """Return of each picture the boxes [D, 4] in pixels, labels [D] and scores [D], best first."""
        size, anchors = [self._size] * len(outputs), [self._anchors.to(outputs.device)] * len(outputs)
        return self._detector.postprocess_detections(_of_head(outputs), anchors, size)

    def _loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of one picture from its outputs [A, 7] and targets [O, 5]."""
        anchors, (boxes, labels) = self._anchors.to(outputs.device), objects_of(targets)
        matched = torch.full((len(anchors),), -1, device=outputs.device)
        if len(boxes):
            matched = self._detector.proposal_matcher(box_iou(boxes, anchors))
        wanted = [{"boxes": boxes, "labels": labels}]
        losses = self._detector.compute_loss(wanted, _of_head(outputs[None]), [anchors], [matched])
        return losses["bbox_regression"] + losses["classification"]


def objects_of(targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the boxes, [O, 4], and labels, int64 [O], of one picture's targets, [MOST_OBJECTS, 5].

    The server cannot know what the numbers mean, so what is no object is left out here.
    """
    boxes, labels = targets[:, :4], targets[:, 4].long()
    is_object = (boxes[:, 2:] > boxes[:, :2]).all(1) & (labels >= 1) & (labels <= len(CLASSES))
    return boxes[is_object], labels[is_object]


def _of_head(outputs: Tensor) -> dict[str, Tensor]:
    """Return the outputs of the network as the detector's head returns them."""
    return {"bbox_regression": outputs[..., :4], "cls_logits": outputs[..., 4:]}


def _counted(found: dict[str, Tensor], targets: Tensor) -> Tensor:
    """Return of each class the number of objects, and the scores of the detections, and which are right.

    The result is float32 [classes, 1 + 2 D], for one picture. Scores that are missing are -1.
    """
    boxes, labels = objects_of(targets)
    counted = torch.full((len(CLASSES), 1 + 2 * MOST_DETECTIONS), -1.0)
    for row, label in zip(counted, range(1, len(CLASSES) + 1), strict=True):
        of_class, wanted = found["labels"] == label, boxes[labels == label]
        num_found = int(of_class.sum())
        row[0] = len(wanted)
        row[1 : 1 + num_found] = found["scores"][of_class]
        row[1 + MOST_DETECTIONS :][:num_found] = are_right(found["boxes"][of_class], wanted).float()
    return counted


def are_right(found: Tensor, wanted: Tensor) -> Tensor:
    """Return which boxes, [D, 4] with the best first, are right, bool [D].

    A box is right if the object, [O, 4], with which it has the largest overlap is not taken by a better box.
    """
    right, taken = torch.zeros(len(found), dtype=torch.bool), set[int]()
    if len(wanted):
        overlaps, nearest = box_iou(found, wanted).max(1)
        for number, (overlap, index) in enumerate(zip(overlaps.tolist(), nearest.tolist(), strict=True)):
            right[number] = overlap >= LEAST_OVERLAP and index not in taken
            taken |= {index} if right[number] else set()
    return right


def mean_average_precision(tally: Tensor) -> float:
    """Return the mean of the average precisions of the classes that some picture has; 0 without objects."""
    precisions = [average_precision(of_class) for of_class in tally.unbind(1) if of_class[:, 0].sum()]
    return sum(precisions) / max(1, len(precisions))


def average_precision(counted: Tensor) -> float:
    """Return the average precision of a class, from what `_counted` says of it in N pictures, [N, 1 + 2 D].

    It is the area under the precision as a function of the recall, where the precision at a recall is the
    best one at this recall or a higher one: PASCAL VOC from 2010 on (Everingham et al., The PASCAL Visual
    Object Classes Challenge: A Retrospective, doi 10.1007/s11263-014-0733-5).
    """
    scores, right = (side.flatten() for side in counted[:, 1:].chunk(2, 1))
    order = scores.argsort(descending=True, stable=True)
    order = order[scores[order] >= 0]
    is_right = right[order] > 0
    precision = is_right.double().cumsum(0) / torch.arange(1, len(order) + 1)
    best = precision.flip(0).cummax(0).values.flip(0)
    return float(best[is_right].sum() / counted[:, 0].double().sum())
