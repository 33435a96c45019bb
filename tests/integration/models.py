"""Models of a user's own, for tests: ordinary ones, and the odd ones that users have reported elsewhere."""

import math
import os
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

Shape = tuple[int, int, int]


def five_classes(num_classes: int, image_shape: Shape) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(image_shape), 5))


def linear(num_classes: int, image_shape: Shape) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(image_shape), num_classes))


class Linear(nn.Module):
    """The linear model as a module of its own, for others to change."""

    def __init__(self, num_classes: int, image_shape: Shape) -> None:
        super().__init__()
        self.body = linear(num_classes, image_shape)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.body(x)
        return logits


# ---------------------------------------------------------------------- odd, and they work


class Auxiliary(nn.Module):
    """A model with an auxiliary output while it trains, as GoogLeNet has."""

    def __init__(self, num_classes: int, image_shape: Shape, kind: type = tuple) -> None:
        super().__init__()
        self.kind = kind
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(image_shape), 32), nn.ReLU())
        self.head, self.aux = nn.Linear(32, num_classes), nn.Linear(32, num_classes)

    def forward(self, x: Tensor) -> Any:
        hidden = self.body(x)
        if not self.training:
            return self.head(hidden)
        outputs = {"out": self.head(hidden), "aux": self.aux(hidden)}
        return outputs if self.kind is dict else self.kind(outputs.values())


def auxiliary(num_classes: int, image_shape: Shape) -> nn.Module:
    return Auxiliary(num_classes, image_shape)


def auxiliary_dict(num_classes: int, image_shape: Shape) -> nn.Module:
    return Auxiliary(num_classes, image_shape, dict)


class Spectral(nn.Module):
    """A learnable filter of the spectrum, as in GFNet: its parameters are complex."""

    def __init__(self, num_classes: int, image_shape: Shape) -> None:
        super().__init__()
        channels, height, width = image_shape
        self.filter = nn.Parameter(torch.ones(channels, height, width // 2 + 1, dtype=torch.complex64))
        self.head = nn.Linear(math.prod(image_shape), num_classes)

    def forward(self, x: Tensor) -> Tensor:
        filtered = torch.fft.irfft2(torch.fft.rfft2(x) * self.filter, s=x.shape[-2:])
        logits: Tensor = self.head(filtered.flatten(1))
        return logits


def spectral(num_classes: int, image_shape: Shape) -> nn.Module:
    return Spectral(num_classes, image_shape)


def normed(num_classes: int, image_shape: Shape) -> nn.Module:
    """Return a network whose second module normalises batches."""
    norm = nn.BatchNorm1d(32)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(math.prod(image_shape), 32), norm, nn.ReLU(), nn.Linear(32, num_classes)
    )


class LowRank(nn.Module):
    """A frozen network of 64 KiB and more, and a small part beside it that is trained, as in LoRA."""

    def __init__(self, num_classes: int, image_shape: Shape, rank: int = 2) -> None:
        super().__init__()
        size, hidden = math.prod(image_shape), 256
        self.body = nn.Linear(size, hidden)
        self.head = nn.Linear(hidden, num_classes)
        self.down = nn.Linear(size, rank, bias=False)
        self.up = nn.Linear(rank, num_classes, bias=False)
        self.body.requires_grad_(False)
        self.head.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        logits: Tensor = self.head(self.body(flat).relu()) + self.up(self.down(flat))
        return logits


def low_rank(num_classes: int, image_shape: Shape) -> nn.Module:
    return LowRank(num_classes, image_shape)


class FullPrecision(Linear):
    """A model with an operation that there is not in bfloat16."""

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        if logits.dtype is torch.bfloat16:
            raise RuntimeError("not implemented for 'BFloat16'")
        return logits


def full_precision(num_classes: int, image_shape: Shape) -> nn.Module:
    return FullPrecision(num_classes, image_shape)


class Projection(nn.Module):
    """A random projection in a buffer that the state_dict leaves out, unless `persistent` is true."""

    def __init__(
        self, num_classes: int, image_shape: Shape, *, persistent: bool, seeded: bool = True
    ) -> None:
        super().__init__()
        size = math.prod(image_shape)
        # Other generators than PyTorch's are not seeded by anybody.
        generator = None if seeded else torch.Generator().manual_seed(int.from_bytes(os.urandom(4)))
        projection = torch.randn(size, 32, generator=generator) / size**0.5
        self.register_buffer("projection", projection, persistent=persistent)
        self.head = nn.Linear(32, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head((x.flatten(1) @ self.projection).relu())
        return logits


def left_out_buffer(num_classes: int, image_shape: Shape) -> nn.Module:
    return Projection(num_classes, image_shape, persistent=False)


def persistent_buffer(num_classes: int, image_shape: Shape) -> nn.Module:
    return Projection(num_classes, image_shape, persistent=True)


def tied(num_classes: int, image_shape: Shape) -> nn.Module:
    first, second = nn.Linear(32, 32), nn.Linear(32, 32)
    second.weight = first.weight
    size = math.prod(image_shape)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(size, 32), first, nn.ReLU(), second, nn.Linear(32, num_classes)
    )


def lazy(num_classes: int, image_shape: Shape) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(32), nn.ReLU(), nn.LazyLinear(num_classes))


def scripted(num_classes: int, image_shape: Shape) -> nn.Module:
    with warnings.catch_warnings():
        # It is deprecated, and still in use.
        warnings.simplefilter("ignore")
        module: nn.Module = torch.jit.script(linear(num_classes, image_shape))
    return module


def weight_norm(num_classes: int, image_shape: Shape) -> nn.Module:
    first = parametrizations.weight_norm(nn.Linear(math.prod(image_shape), 32))
    return nn.Sequential(nn.Flatten(), first, nn.ReLU(), nn.Linear(32, num_classes))


class IntegerParameter(Linear):
    """A parameter that is an integer and is not trained."""

    def __init__(self, num_classes: int, image_shape: Shape) -> None:
        super().__init__(num_classes, image_shape)
        self.steps = nn.Parameter(torch.tensor(3), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.steps / 3


def integer_parameter(num_classes: int, image_shape: Shape) -> nn.Module:
    return IntegerParameter(num_classes, image_shape)


# ---------------------------------------------------------------------- odd, and they cannot work


def unseeded(num_classes: int, image_shape: Shape) -> nn.Module:
    return Projection(num_classes, image_shape, persistent=False, seeded=False)


class Drifting(Auxiliary):
    """A model with a statistic that training changes and the state_dict leaves out."""

    def __init__(self, num_classes: int, image_shape: Shape) -> None:
        super().__init__(num_classes, image_shape)
        self.register_buffer("seen", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Any:
        if self.training:
            self.seen += 1
        return super().forward(x + self.seen)


def drifting(num_classes: int, image_shape: Shape) -> nn.Module:
    return Drifting(num_classes, image_shape)


def by_environment(num_classes: int, image_shape: Shape) -> nn.Module:
    """Return a model that depends on the machine: here on a variable."""
    model = linear(num_classes, image_shape)
    scale = float(os.environ.get("SCALE_OF_THIS_MACHINE", "1"))
    model[0].register_forward_hook(lambda _module, _inputs, outputs: outputs * scale)
    return model


def frozen(num_classes: int, image_shape: Shape) -> nn.Module:
    return linear(num_classes, image_shape).requires_grad_(False)


class ExtraState(Linear):
    def get_extra_state(self) -> dict[str, int]:
        return {"version": 1}

    def set_extra_state(self, state: Any) -> None: ...


def extra_state(num_classes: int, image_shape: Shape) -> nn.Module:
    return ExtraState(num_classes, image_shape)


class OnlyEvaluates(Linear):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            raise RuntimeError("this model is for inference\nonly")
        return super().forward(x)


def only_evaluates(num_classes: int, image_shape: Shape) -> nn.Module:
    return OnlyEvaluates(num_classes, image_shape)


def sparse_gradient(num_classes: int, image_shape: Shape) -> nn.Module:
    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.EmbeddingBag(256, num_classes, mode="mean", sparse=True)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.table(((x.flatten(1) + 4) * 16).long().clamp(0, 255))
            return logits

    return Sparse()


def one_image_too_few(num_classes: int, image_shape: Shape) -> nn.Module:
    """Return a model with a norm that cannot be trained on a single pixel."""
    channels = image_shape[0]
    pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.InstanceNorm2d(channels), nn.Flatten())
    return nn.Sequential(pooled, nn.Linear(channels, num_classes))


def double_complex(num_classes: int, image_shape: Shape) -> nn.Module:
    model = Spectral(num_classes, image_shape)
    model.register_buffer("unused", torch.ones(2, dtype=torch.complex128))
    return model


class Copies(Linear):
    """A model whose state_dict has copies, so that nothing can be loaded through it."""

    def __init__(self, num_classes: int, image_shape: Shape) -> None:
        super().__init__(num_classes, image_shape)
        self.register_state_dict_post_hook(
            lambda _module, state, _prefix, _metadata: state.update({k: v.clone() for k, v in state.items()})
        )


def copies(num_classes: int, image_shape: Shape) -> nn.Module:
    return Copies(num_classes, image_shape)
