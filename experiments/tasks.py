"""The paper's three tasks, and the changes that each row of our tables makes to their `[run]` table."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ecavg.common.config import RunConfig
from ecavg.common.layers import deep_merge, read_preset

# These settings train a deep network in few epochs, on a CPU.
_FOR_FEW_EPOCHS: Mapping[str, Any] = {
    "batch_size": 64,
    "optimizer": "adamw",
    "learning_rate": 0.001,
    "weight_decay": 5e-4,
    "schedule": "one-cycle",
    "augment": ("random_crop", "horizontal_flip"),
    # The precision is the same on every machine, so that results can be compared.
    "precision": "float32",
}


class Task(NamedTuple):
    """A model and its data, in a size that suits a machine without a GPU."""

    # The [run] table.
    run: Mapping[str, Any]
    examples_per_agent: int
    # The table "transfer" makes these changes to the [run] table, because it has many settings.
    for_transfer: Mapping[str, Any]
    # The table "worth" makes these changes: epochs that can be spread over 3 and over 5 rounds, and the same
    # recipe for edges and cloud.
    for_worth: Mapping[str, Any]
    # The table "transfer" uses so many examples in all, however many agents there are.
    examples_in_all: int
    # The table "transfer" uses so many test examples. The other tables use all of them.
    test_examples: int


def _deep(model: str, dataset: str) -> dict[str, Any]:
    pretrain = {**_FOR_FEW_EPOCHS, "epochs": 6}
    fine_tune = {**_FOR_FEW_EPOCHS, "epochs": 3}
    return {"model": model, "dataset": dataset, "pretrain": pretrain, "fine_tune": fine_tune}


_SHORT = {"pretrain": {"epochs": 4}, "fine_tune": {"epochs": 2}}
_SHORT_BFLOAT16 = {phase: {**short, "precision": "bfloat16"} for phase, short in _SHORT.items()}


def _worth(edge_epochs: int, **recipe: Any) -> dict[str, Any]:
    """Return the changes of the table "worth": the epochs in all, and the recipe of both trainings."""
    return {"pretrain": {"epochs": edge_epochs, **recipe}, "fine_tune": {"epochs": 15, **recipe}}


TASKS: Mapping[str, Task] = {
    "digits": Task(read_preset("digits-mlp")["run"], 500, {}, _worth(15), 1_000, 10_000),
    "mnist": Task(
        read_preset("mnist-mlp")["run"],
        30_000,
        {},
        _worth(15, learning_rate=0.1, schedule="cosine"),
        20_000,
        10_000,
    ),
    "cifar10": Task(_deep("mobilenet_v2", "cifar10"), 5_000, _SHORT, _worth(30), 6_000, 4_000),
    "cifar100": Task(_deep("resnet50", "cifar100"), 2_000, _SHORT_BFLOAT16, _worth(30), 8_000, 2_000),
}

# The table "async" makes these changes to every task's [run] table, because it has many short rounds, and
# gives each agent so many examples.
FOR_ASYNC: Mapping[str, Any] = {"pretrain": {"epochs": 2}, "fine_tune": {"epochs": 1}}
EXAMPLES_FOR_ASYNC = 500


class Variant(NamedTuple):
    """A row of the table of parts: the parts of the cloud's work that are done, and how."""

    label: str
    # Changes to the [run] table, of no key that the agents' pre-training depends on.
    changes: Mapping[str, Any]
    # True if the fine-tune starts from freshly drawn weights.
    is_random: bool = False
    # True if the same epochs are spread over several rounds.
    is_split: bool = False
    # True if the agents' decisions about the published model are measured, too.
    is_received: bool = False


DEFAULT = "selection"
PLAIN = {"candidates": ("average",), "recompute_statistics": False, "apply": "always"}

VARIANTS: Mapping[str, Variant] = {
    "random": Variant("random weights", PLAIN, is_random=True),
    "plain_average": Variant("plain average (the paper)", PLAIN, is_received=True),
    "statistics": Variant("+ BatchNorm recomputed", {"candidates": ("average",)}),
    "aligned": Variant("aligned, BatchNorm recomputed", {"candidates": ("aligned",)}),
    "greedy_soup": Variant("greedy soup, aligned", {"candidates": ("greedy_soup",)}),
    "best_agent": Variant("best agent", {"candidates": ("best_agent",)}),
    DEFAULT: Variant("best of all (the default)", {}, is_received=True),
    "rounds": Variant("best of all, shorter rounds", {}, is_split=True, is_received=True),
}


class Setting(NamedTuple):
    """One seed of one experiment: everything that the agents' pre-trained weights depend on."""

    task: str
    run: RunConfig
    # The folder with the data, see data.py.
    data: Path
    num_agents: int
    # The number of examples of all agents together.
    num_examples: int
    # The common test set has at most so many examples. Each agent holds a part of it for itself.
    num_test: int

    @property
    def name(self) -> str:
        """Return a name for a folder: the main facts, and a digest of all that pre-training depends on."""
        return self._name(_AFTER_PRETRAINING)

    @property
    def name_of_whole_run(self) -> str:
        """Return a name for a folder: the main facts, and a digest of the whole run."""
        return self._name(set())

    def _name(self, left_out: set[str]) -> str:
        run = self.run.model_dump(mode="json", exclude=left_out)
        everything = [
            run,
            self.run.fine_tune.holdout_fraction,
            self.data.name,
            self.num_examples,
            self.num_test,
        ]
        digest = hashlib.sha256(json.dumps(everything).encode()).hexdigest()[:8]
        initial = Path(self.run.initial_weights).stem
        sizes = f"{self.num_agents}x{self.num_examples // self.num_agents}"
        partition = self.run.partition_by.replace(":", "")
        return f"{self.task}-{initial}-{partition}-{sizes}-seed{self.run.seed}-{digest}"

    def run_of(self, variant: Variant, number: int = 1, num_rounds: int = 1) -> RunConfig:
        """Return the variant's configuration in the round with this number.

        Args:
            num_rounds: the number of rounds over which the epochs are spread.
        """
        run = RunConfig.model_validate(deep_merge(self.run.model_dump(), variant.changes))
        trainings = {"pretrain": run.pretrain, "fine_tune": run.fine_tune}
        return run.model_copy(
            update={
                name: config.model_copy(update={"epochs": _share(config.epochs, number, num_rounds)})
                for name, config in trainings.items()
            }
        )


# The agents' pre-training does not depend on these keys of the [run] table.
_AFTER_PRETRAINING = {
    "aggregator", "trim_fraction", "weights", "candidates", "recompute_statistics", "fine_tune",
    "apply", "adapt_epochs", "max_norm_ratio", "on_large_update", "quarantine",
}  # fmt: skip


def _share(epochs: int, number: int, num_rounds: int) -> int:
    """Return one round's share of all epochs; if there is a remainder, later rounds have more epochs."""
    return epochs * number // num_rounds - epochs * (number - 1) // num_rounds
