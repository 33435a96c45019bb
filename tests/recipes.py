"""Recipes of trainings for tests, which compute in float32 whatever the machine."""

from common.config import RunConfig, TrainingConfig
from common.training import Recipe


def recipe_of(run: RunConfig, seed: int, config: TrainingConfig | None = None) -> Recipe:
    """Return the recipe of the run's pre-training, or of a training with another config."""
    return Recipe(config or run.pretrain, run.spec, seed, "float32")
