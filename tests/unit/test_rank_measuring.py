"""Models that several ranks measure together: each rank has a part, and the result is that of one rank."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ecavg.cloud_server.trainer.finetune import CombinedData
from ecavg.cloud_server.trainer.measuring import Measuring
from ecavg.common.config import RunConfig
from ecavg.common.evaluation import BATCH_SIZE
from ecavg.common.ranks import ALONE, Ranks
from ecavg.common.training import Examples
from ecavg.common.weights import read_state_dict, write_state_dict
from tests.recipes import CPU, make_data, make_model
from tests.unit.rank_processes import run_ranks

RUN = RunConfig(image_shape=(3, 8, 8), num_classes=3)
WORLD_SIZE = 2
# The ranks have unequal parts of one number, and one of them has no part of the other.
NUMBERS_HELD_OUT = (2 * BATCH_SIZE + 100, 50)


def measuring_of(num_held_out: int, ranks: Ranks) -> tuple[nn.Module, Measuring]:
    # Only rank 0 has the weights that are measured.
    model = make_model(ranks.rank, batch_norm=True)
    data = CombinedData(Examples(*make_data(1300, 1)), Examples(*make_data(num_held_out, 2)))
    return model, Measuring(model, RUN, data, CPU, ranks)


def measured(num_held_out: int, ranks: Ranks) -> dict[str, Tensor]:
    """Return what is measured of two models, and the statistics that are recomputed in between."""
    model, measuring = measuring_of(num_held_out, ranks)
    first = measuring.measure()
    measuring.recompute_statistics()
    second = measuring.measure()
    measuring.end()
    assert first
    assert second
    return {
        "first": first.scores,
        "figures": torch.tensor([first.score, first.loss], dtype=torch.float64),
        "second": second.scores,
        **{name: tensor for name, tensor in model.state_dict().items() if name.startswith("1.")},
    }


def measure_as_rank(rank: int, folder: Path) -> None:
    """Do the part of one of the ranks; rank 0 writes the results."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD_SIZE
    )
    ranks = Ranks(rank, WORLD_SIZE)
    for number in NUMBERS_HELD_OUT:
        if rank:
            measuring_of(number, ranks)[1].serve()
        else:
            write_state_dict(measured(number, ranks), folder / str(number))
    torch.distributed.destroy_process_group()


SCRIPT = """
import sys
from pathlib import Path
from tests.unit.test_rank_measuring import measure_as_rank
measure_as_rank(int(sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(SCRIPT, folder, world_size=WORLD_SIZE)
    return folder


@pytest.mark.parametrize("num_held_out", NUMBERS_HELD_OUT)
def test_ranks_measure_what_one_rank_measures(folder: Path, num_held_out: int) -> None:
    together, alone = read_state_dict(folder / str(num_held_out)), measured(num_held_out, ALONE)
    # Each batch is measured by one rank, as one rank alone would measure it.
    assert torch.equal(together["first"], alone["first"])
    assert torch.equal(together["figures"], alone["figures"])
    # The sum of the ranks' statistics is rounded in another place.
    assert together["1.num_batches_tracked"] == alone["1.num_batches_tracked"] == 3
    for name in ("1.running_mean", "1.running_var", "second"):
        assert torch.allclose(together[name], alone[name], rtol=1e-6, atol=1e-6), name
    assert not torch.equal(alone["first"], alone["second"])


def test_parts_of_ranks_are_whole_batches_and_leave_nothing_out() -> None:
    for size in (0, 1, 9, 10, 11, 95):
        parts = [Ranks(rank, 4).part(size, 10) for rank in range(4)]
        assert [number for part in parts for number in range(size)[part]] == list(range(size))
        assert all(part.start % 10 == 0 or part.start == size for part in parts)
