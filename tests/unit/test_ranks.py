"""Ranks that train one model together, as processes of their own over Gloo."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ecavg.common import training_step
from ecavg.common.config import TrainingConfig
from ecavg.common.ranks import ALONE, Ranks
from ecavg.common.tasks.classification import Classification
from ecavg.common.training import Examples, Recipe, train
from ecavg.common.weights import read_state_dict, write_state_dict
from tests.recipes import CPU, SPEC, make_data, make_model
from tests.unit.rank_processes import run_ranks

ROOT = Path(__file__).parents[2]

STATISTICS_SCRIPT = """
import sys
from pathlib import Path
from unittest.mock import patch
import torch
from ecavg.common import training
from ecavg.common.config import TrainingConfig
from ecavg.common.ranks import Ranks
from ecavg.common.tasks.classification import Classification
from tests.recipes import SPEC, make_data, make_model

rank, folder = int(sys.argv[1]), Path(sys.argv[2])
torch.distributed.init_process_group(
    "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
)

def trained():
    model = make_model(batch_norm=True, dropout=0.3)
    recipe = training.Recipe(TrainingConfig(epochs=2, batch_size=10), Classification(SPEC), 3, "float32")
    ranks, device = Ranks(rank, 2), torch.device("cpu")
    training.train(model, training.Examples(*make_data(45)), recipe, device=device, ranks=ranks)
    return model.state_dict()

found = trained()
with patch("ecavg.common.training_step._has_shared_buffers", return_value=True) as shared:
    expected = trained()
assert shared.called
torch.distributed.destroy_process_group()
different = [name for name in found if not torch.equal(found[name], expected[name])]
# The other rank's statistics are its own, and nobody uses them.
assert different == (["1.running_mean", "1.running_var"] if rank else []), different
"""


@pytest.mark.soak
def test_ranks_need_not_share_statistics(tmp_path: Path) -> None:
    run_ranks(STATISTICS_SCRIPT, tmp_path)


def test_ranks_share_other_buffers() -> None:
    model = make_model(batch_norm=True)
    assert not training_step._has_shared_buffers(model)
    model[2].register_buffer("mean", torch.zeros(1))
    assert training_step._has_shared_buffers(model)


class HalvedNorm(nn.BatchNorm2d):
    """A BatchNorm that normalises each of two ranks' parts by itself, and counts only the first."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = x[: len(x) // 2], x[len(x) // 2 :]
        return torch.cat(
            [super().forward(first), F.batch_norm(second, None, None, self.weight, self.bias, training=True)]
        )


def make_deep_model(kind: str) -> nn.Module:
    """Return a model with a norm that is "none", "whole", or "halved"."""
    torch.manual_seed(0)
    norm = {"none": lambda _: nn.Identity(), "whole": nn.BatchNorm2d, "halved": HalvedNorm}[kind]
    # The gradient of a bias before a BatchNorm is a rounding error, of which Adam would make a full step.
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), norm(8), nn.ReLU(), nn.Conv2d(8, 8, 3, bias=False), norm(8),
        nn.ReLU(), nn.Flatten(), nn.Linear(128, 3),
    )  # fmt: skip


DEEP_SCRIPT = """
import sys
from pathlib import Path
import torch
from ecavg.common.ranks import Ranks
from ecavg.common.weights import write_state_dict
from tests.unit.test_ranks import DEEP_KINDS, train_deep

rank, folder = int(sys.argv[1]), Path(sys.argv[2])
torch.distributed.init_process_group(
    "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
)
for kind, optimizer in DEEP_KINDS:
    model = train_deep(kind, optimizer, Ranks(rank, 2))
    write_state_dict(model.state_dict(), folder / f"{kind}-{optimizer}-{rank}")
torch.distributed.destroy_process_group()
"""

DEEP_KINDS = [(kind, optimizer) for kind in ("none", "whole") for optimizer in ("sgd", "adamw")]
# So far apart, relatively and absolutely, numbers may be after 20 steps because of rounding.
RTOL, ATOL = 1e-5, 1e-6


def train_deep(kind: str, optimizer: Any, ranks: Ranks = ALONE) -> nn.Module:
    model = make_deep_model(kind)
    augment = ("random_crop", "horizontal_flip")
    config = TrainingConfig(
        epochs=4, batch_size=10, optimizer=optimizer, learning_rate=0.01, augment=augment, label_smoothing=0.1
    )
    recipe = Recipe(config, Classification(SPEC), 3, "float32")
    train(model, Examples(*make_data(45)), recipe, device=CPU, ranks=ranks)
    return model


def are_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return all(torch.allclose(found[name], expected[name], rtol=RTOL, atol=ATOL) for name in expected)


@pytest.mark.soak
def test_two_ranks_equal_one_but_for_the_statistics_of_their_batches(tmp_path: Path) -> None:
    run_ranks(DEEP_SCRIPT, tmp_path)
    for kind, optimizer in DEEP_KINDS:
        first, second = (read_state_dict(tmp_path / f"{kind}-{optimizer}-{rank}") for rank in range(2))
        different = [name for name in first if not torch.equal(first[name], second[name])]
        assert different == [name for name in first if "running" in name]
        alone = train_deep(kind, optimizer).state_dict()
        # Without BatchNorm it does not matter how many ranks there are.
        assert are_close(first, alone) == (kind == "none")
        if kind == "whole":
            # BatchNorm takes mean and variance of a rank's part of the batch, and that is all that differs.
            assert are_close(first, train_deep("halved", optimizer).state_dict())


RANK_SCRIPT = """
import sys
from pathlib import Path
import torch
from ecavg.common.config import TrainingConfig
from ecavg.common.tasks.classification import Classification
from ecavg.common.ranks import Ranks
from ecavg.common.training import Examples, Recipe, train
from ecavg.common.weights import read_state_dict, write_state_dict
from tests.recipes import SPEC

rank, folder, world_size = int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[4])
given = read_state_dict(folder / "given")
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 3))
model[1].load_state_dict({"weight": given["weight"], "bias": given["bias"]})
torch.distributed.init_process_group(
    "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size
)
loss = train(
    model, Examples(given["inputs"], given["targets"]),
    Recipe(
        TrainingConfig.model_validate_json(sys.argv[3]), Classification(SPEC),
        seed=3, precision="float32", class_balanced=True,
    ),
    device=torch.device("cpu"), ranks=Ranks(rank, world_size),
)
torch.distributed.destroy_process_group()
write_state_dict({**model[1].state_dict(), "loss": torch.tensor(loss)}, folder / str(rank))
"""


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.soak)])
def test_ranks_train_what_one_process_trains(tmp_path: Path, world_size: int) -> None:
    # The last batch has 4 images: with fewer than there are ranks, the batches would be others.
    images, labels = make_data(24)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    examples = Examples(images, labels)
    write_state_dict({**model[1].state_dict(), **examples._asdict()}, tmp_path / "given")
    config = TrainingConfig(epochs=2, batch_size=5, augment=("random_crop",))  # unequal parts
    run_ranks(RANK_SCRIPT, tmp_path, config.model_dump_json(), world_size, world_size=world_size)

    recipe = Recipe(config, Classification(SPEC), 3, "float32", class_balanced=True)
    loss = train(model, examples, recipe, device=CPU)

    assert len({(tmp_path / str(rank)).read_bytes() for rank in range(world_size)}) == 1
    together = read_state_dict(tmp_path / "0")
    assert together.keys() == {"weight", "bias", "loss"}
    assert together["loss"].item() == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(together["weight"], model[1].weight.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(together["bias"], model[1].bias.detach(), rtol=1e-4, atol=1e-6)
