"""What a run's examples are: dtype, shape and range of inputs and targets; and the datasets that have names.

Shapes are those of one example, without N. Nothing here needs PyTorch: the serving process checks by it what
devices send.
"""

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

# One input or target may have so many values; those of an image, channels included.
MAX_VALUES = 64_000_000
# One input or target may have so many axes.
MAX_AXES = 8

# Stands for the target of an example that has none, where targets are int64.
MISSING = -1

InputDtype = Literal["uint8", "float32", "int64"]
TargetDtype = Literal["int64", "float32"]


class Inputs(NamedTuple):
    """The inputs of a run's examples."""

    dtype: InputDtype
    # Channels or features first: of pictures, channels, height and width.
    shape: tuple[int, ...]
    # One number for each channel or feature, of uint8 values scaled to 0..1; empty: values stay as they are.
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    # No value is below `low` or above `high`; None: there is no bound.
    low: float | None = None
    high: float | None = None
    # So many of the next examples share values with an example, as windows of a series do; 0: none.
    overlap: int = 0


class Targets(NamedTuple):
    """The targets of a run's examples."""

    dtype: TargetDtype
    # Empty for one label or number an example.
    shape: tuple[int, ...] = ()
    # No value is below `low` or above `high`; None: there is no bound.
    low: float | None = None
    high: float | None = None
    # One number for each value on the first axis of the shape; empty: the values stay as they are.
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    # Whether an example may come without a target: MISSING for int64, NaN for float32.
    missing: bool = False


class DatasetSpec(NamedTuple):
    """The inputs and targets of a run's examples."""

    inputs: Inputs
    targets: Targets
    # The number of classes; 0 where the targets are numbers.
    num_classes: int = 0

    @property
    def is_pictures(self) -> bool:
        """Return True if the inputs are pictures: uint8 of channels, height and width."""
        return self.inputs.dtype == "uint8" and len(self.inputs.shape) == 3

    @property
    def tensor_names(self) -> tuple[str, str]:
        """Return the names of the inputs and the targets in a shard's file.

        Labelled pictures have names of their own, by which the digests of their shards stay what they were.
        """
        has_labels = self.targets.dtype == "int64" and not self.targets.shape
        return ("images", "labels") if self.is_pictures and has_labels else ("inputs", "targets")


def labels(num_classes: int) -> Targets:
    """Return targets that are one class an example."""
    return Targets("int64", (), 0, num_classes - 1)


def pictures(
    num_classes: int, image_shape: tuple[int, int, int], mean: tuple[float, ...], std: tuple[float, ...]
) -> DatasetSpec:
    """Return pictures with one label each.

    Args:
        image_shape: channels, height and width.
        mean: for each channel, of pixels in 0..1.
        std: for each channel, of pixels in 0..1.
    """
    return DatasetSpec(Inputs("uint8", image_shape, mean, std), labels(num_classes), num_classes)


def _rows(mean: tuple[float, ...], std: tuple[float, ...]) -> Inputs:
    """Return rows of a table, with a mean and a deviation for each column."""
    return Inputs("float32", (len(mean),), mean, std)


SUNSPOTS_WINDOW = 11

DATASETS: Mapping[str, DatasetSpec] = {
    "digits": pictures(10, (1, 8, 8), (0.305,), (0.376,)),
    "mnist": pictures(10, (1, 28, 28), (0.1307,), (0.3081,)),
    "fashion-mnist": pictures(10, (1, 28, 28), (0.2860,), (0.3530,)),
    "cifar10": pictures(10, (3, 32, 32), (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": pictures(100, (3, 32, 32), (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "diabetes": DatasetSpec(
        _rows(
            (48.52, 1.468, 26.38, 94.65, 189.1, 115.4, 49.79, 4.07, 4.641, 91.26),
            (13.09, 0.499, 4.413, 13.82, 34.57, 30.38, 12.92, 1.289, 0.5218, 11.48),
        ),
        Targets("float32", (1,), 0, 1000, (152.1,), (77.01,)),
    ),
    # The sunspots of 11 years one after the other, about one cycle, and of the next year.
    "sunspots": DatasetSpec(
        Inputs("float32", (1, SUNSPOTS_WINDOW), (49.75,), (40.39,), overlap=SUNSPOTS_WINDOW),
        Targets("float32", (1,), 0, 1000, (49.75,), (40.39,)),
    ),
    "breast-cancer": DatasetSpec(
        _rows(
            (
                14.13, 19.29, 91.97, 654.9, 0.09636, 0.1043, 0.0888, 0.04892, 0.1812, 0.0628,
                0.4052, 1.217, 2.866, 40.34, 0.007041, 0.02548, 0.03189, 0.0118, 0.02054, 0.003795,
                16.27, 25.68, 107.3, 880.6, 0.1324, 0.2543, 0.2722, 0.1146, 0.2901, 0.08395,
            ),
            (
                3.521, 4.297, 24.28, 351.6, 0.01405, 0.05277, 0.07965, 0.03877, 0.02739, 0.007054,
                0.2771, 0.5512, 2.02, 45.45, 0.003, 0.01789, 0.03016, 0.006165, 0.008259, 0.002644,
                4.829, 6.141, 33.57, 568.9, 0.02281, 0.1572, 0.2084, 0.06567, 0.06181, 0.01805,
            ),
        ),
        labels(2),
        2,
    ),
    "wine": DatasetSpec(
        _rows(
            (13.0, 2.336, 2.367, 19.49, 99.74, 2.295, 2.029, 0.3619, 1.591, 5.058, 0.9574, 2.612, 746.9),
            (0.8095, 1.114, 0.2736, 3.33, 14.24, 0.6241, 0.996, 0.1241, 0.5707, 2.312, 0.2279, 0.708, 314.0),
        ),
        labels(3),
        3,
    ),
}  # fmt: skip

# The names of the classes of the named datasets, label 0 first, as scikit-learn and torchvision order them.
CLASS_NAMES: Mapping[str, tuple[str, ...]] = {
    "breast-cancer": ("malignant", "benign"),
    "wine": ("class_0", "class_1", "class_2"),
    "digits": tuple("0123456789"),
    "mnist": tuple("0123456789"),
    "fashion-mnist": (
        "T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
    ),
    "cifar10": (
        "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
    ),
    "cifar100": (
        "apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle", "bottle",
        "bowl", "boy", "bridge", "bus", "butterfly", "camel", "can", "castle", "caterpillar", "cattle",
        "chair", "chimpanzee", "clock", "cloud", "cockroach", "couch", "crab", "crocodile", "cup",
        "dinosaur", "dolphin", "elephant", "flatfish", "forest", "fox", "girl", "hamster", "house",
        "kangaroo", "keyboard", "lamp", "lawn_mower", "leopard", "lion", "lizard", "lobster", "man",
        "maple_tree", "motorcycle", "mountain", "mouse", "mushroom", "oak_tree", "orange", "orchid",
        "otter", "palm_tree", "pear", "pickup_truck", "pine_tree", "plain", "plate", "poppy", "porcupine",
        "possum", "rabbit", "raccoon", "ray", "road", "rocket", "rose", "sea", "seal", "shark", "shrew",
        "skunk", "skyscraper", "snail", "snake", "spider", "squirrel", "streetcar", "sunflower",
        "sweet_pepper", "table", "tank", "telephone", "television", "tiger", "tractor", "train", "trout",
        "tulip", "turtle", "wardrobe", "whale", "willow_tree", "wolf", "woman", "worm",
    ),
}  # fmt: skip


def check_spec(spec: DatasetSpec, *, is_pictures: bool) -> None:
    """Raise ValueError if inputs or targets are too large, or mean, deviation or bounds do not fit them."""
    what = "image_shape" if is_pictures else "inputs.shape"
    for name, side in ((what, spec.inputs), ("targets.shape", spec.targets)):
        if math.prod(side.shape) > MAX_VALUES or len(side.shape) > MAX_AXES:
            raise ValueError(
                f"{name} {list(side.shape)} has more than {MAX_VALUES} values, or {MAX_AXES} axes"
            )
    _check_scaling("", spec.inputs, "channels" if len(spec.inputs.shape) > 1 else "features")
    _check_scaling("targets.", spec.targets, "numbers")
    if spec.inputs.dtype == "int64" and spec.inputs.mean:
        raise ValueError("mean and std are not for inputs of int64, which a model gets as they are")
    for name, side in (("inputs", spec.inputs), ("targets", spec.targets)):
        if side.low is not None and side.high is not None and side.low > side.high:
            raise ValueError(f"{name}.low must not be above {name}.high")


def _check_scaling(prefix: str, side: Inputs | Targets, noun: str) -> None:
    """Raise ValueError if there is a mean or a deviation, and not one for each index of the first axis."""
    size = side.shape[0] if side.shape else 1
    if (side.mean or side.std) and not len(side.mean) == len(side.std) == size:
        raise ValueError(f"{prefix}mean and {prefix}std need one number for each of {size} {noun}")
    if min(side.std, default=1) <= 0:
        raise ValueError(f"{prefix}std must be above 0")
