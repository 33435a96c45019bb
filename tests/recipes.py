"""Recipes of trainings for tests, and a model with every kind of state."""

from typing import Any

import torch
from torch import Tensor, nn

from common.config import RunConfig, TrainingConfig
from common.training import Recipe

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
    return Recipe(config or run.pretrain, run.spec, seed, "float32")
