"""Recipes of trainings for tests, with small images and models, one of which has every kind of state."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as v2

from ecavg.cloud_server.state_dir import blob_path
from ecavg.common.config import RunConfig, TrainingConfig
from ecavg.common.dataset import pictures
from ecavg.common.tasks.task import task_of
from ecavg.common.training import Recipe
from ecavg.common.transfer import blob_of
from ecavg.edge_agent.data import AgentData, load_agent_data

CPU = torch.device("cpu")
SPEC = pictures(3, (3, 8, 8), (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))

# Trainings that differ in all that a step depends on.
TRAININGS: dict[str, dict[str, Any]] = {
    "sgd": {"schedule": "cosine", "augment": ("random_crop", "horizontal_flip")},
    "sgd_without_momentum": {"momentum": 0.0, "schedule": "one-cycle"},
    "nesterov": {"nesterov": True, "weight_decay": 1e-3, "label_smoothing": 0.1},
    "adam": {"optimizer": "adam", "learning_rate": 1e-2, "augment": ("random_crop",)},
    "adamw": {"optimizer": "adamw", "learning_rate": 1e-2, "weight_decay": 0.1, "schedule": "one-cycle"},
}


class PowerCutError(Exception):
    """A training is cut off."""


class Tied(nn.Module):
    """Two layers with one weight, a frozen bias, and a buffer that a state_dict leaves out."""

    num_calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(192, 192), nn.Linear(192, 192)
        self.second.weight = self.first.weight
        self.last = nn.Linear(192, 3)
        self.first.bias.requires_grad_(False)
        self.register_buffer("num_calls", torch.zeros(()), persistent=False)

    @property
    def drift(self) -> Tensor:
        """Return what changes the outputs from call to call, in hundredths."""
        return self.num_calls

    def forward(self, x: Tensor) -> Tensor:
        self.num_calls += 1
        hidden = self.second(self.first(x.flatten(1)).relu()).relu()
        logits: Tensor = self.last(hidden) * (1 + self.drift / 100)
        return logits


def recipe_of(run: RunConfig, seed: int, config: TrainingConfig | None = None) -> Recipe:
    """Return the recipe of the run's pre-training, or of a training with another config, in float32."""
    return Recipe(config or run.pretrain, task_of(run), seed, "float32")


def make_data(num_images: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images whose brightest channel is their label."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (num_images,), generator=generator)
    images = torch.randint(0, 160, (num_images, 3, 8, 8), dtype=torch.uint8, generator=generator)
    images[torch.arange(num_images), labels] += 80
    return images, labels


def make_model(seed: int = 0, *, batch_norm: bool = False, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(seed)
    norm = nn.BatchNorm2d(6) if batch_norm else nn.Identity()
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), norm, nn.ReLU(), nn.Flatten(), nn.Dropout(dropout), nn.Linear(216, 3)
    )


def normalised(images: Tensor) -> Tensor:
    return v2.normalize(
        v2.to_dtype(images, torch.float32, scale=True), list(SPEC.inputs.mean), list(SPEC.inputs.std)
    )


class Recorder(nn.Module):
    """Keeps what it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(192, 3)
        self.batches: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.batches.append(x.detach().clone())
        return self.linear(x.flatten(1))


def data_of(run: RunConfig, source: str | None = None, **options: Any) -> AgentData:
    """Return what an agent has of a source; options are those of `load_agent_data`."""
    defaults = {"data_dir": None, "partition": None, "seed_name": "edge-1", "allowed_factories": ()}
    return load_agent_data(run, source=source, **{**defaults, **options})


def put(path: Path, blobs_dir: Path) -> str:
    """Move a file to the blobs, and return its digest."""
    digest = blob_of(path).digest
    blob_path(blobs_dir, digest).parent.mkdir(parents=True, exist_ok=True)
    path.rename(blob_path(blobs_dir, digest))
    return digest
