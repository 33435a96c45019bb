"""What each of several ranks reads of the data, and what it holds in memory, over an epoch of a fine-tune.

    python -m benchmarks.ranks --mib 512 --ranks 1 2 4

The ranks are processes on this machine, over Gloo, with a small model. The memory is a rank's own, without
the pages of files, which the ranks of a machine share and the system takes back where memory is scarce.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import figures
from benchmarks.processes import memory_bytes
from ecavg.cloud_server.contribution import Contribution
from ecavg.cloud_server.state_dir import blob_path
from ecavg.cloud_server.trainer.finetune import combine, fine_tune
from ecavg.common.config import FineTuneConfig, RunConfig
from ecavg.common.mapped import MappedRows
from ecavg.common.ranks import Ranks
from ecavg.common.shards import Shard, write_shard
from ecavg.common.training import StepReport
from ecavg.common.transfer import blob_of

IMAGE = (3, 32, 32)
RUN = RunConfig(image_shape=IMAGE, num_classes=10, fine_tune=FineTuneConfig(epochs=1, batch_size=1024))
NUM_SHARDS = 8


def main(argv: list[str] | None = None) -> int:
    arguments = _parse(argv)
    if arguments.rank is not None:
        print(json.dumps(_one_rank(arguments.folder, arguments.rank, arguments.ranks[0])))
        return 0
    machine = figures.machine()
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        num_bytes = _write_shards(Path(folder), arguments.mib << 20)
        measured = {str(number): _measure(folder, number) for number in arguments.ranks}
    result = {"benchmark": "ranks", "data_bytes": num_bytes, "ranks": measured, "machine": machine}
    rows = [(number, *each.values()) for number, each in measured.items()]
    headings = ("ranks", "MiB read by a rank", "MiB of its own")
    figures.emit(result, f"{num_bytes >> 20} MiB of examples", headings, rows)
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = figures.argument_parser(__doc__)
    parser.add_argument("--mib", type=int, default=512, metavar="N", help="the size of all examples")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], metavar="N", help="how many")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def _write_shards(folder: Path, num_bytes: int) -> int:
    """Write shards of about so many bytes, and return how many there are."""
    generator = np.random.default_rng(0)
    num_images = num_bytes // NUM_SHARDS // int(np.prod(IMAGE))
    for _ in range(NUM_SHARDS):
        images = generator.integers(0, 256, (num_images, *IMAGE), np.uint8)
        write_shard(folder / "new", Shard(images, generator.integers(0, 10, num_images)))
        path = blob_path(folder, blob_of(folder / "new").digest)
        path.parent.mkdir(exist_ok=True)
        (folder / "new").rename(path)
    return NUM_SHARDS * num_images * int(np.prod(IMAGE))


def _measure(folder: str, world_size: int) -> dict[str, float]:
    """Return the largest figures of all ranks, in MiB."""
    command = [sys.executable, "-m", "benchmarks.ranks", "--folder", folder, "--ranks", str(world_size)]
    ranks = [
        subprocess.Popen([*command, "--rank", str(rank)], stdout=subprocess.PIPE, text=True)
        for rank in range(world_size)
    ]
    measured: list[dict[str, float]] = [json.loads(process.communicate()[0]) for process in ranks]
    (Path(folder) / "rendezvous").unlink(missing_ok=True)
    return {name: max(each[name] for each in measured) for name in measured[0]}


def _one_rank(folder: Path, rank: int, world_size: int) -> dict[str, float]:
    """Train for an epoch as one rank, and return what that has taken, in MiB."""
    torch.set_num_threads(1)
    if world_size > 1:
        where = f"file://{folder}/rendezvous"
        torch.distributed.init_process_group("gloo", init_method=where, rank=rank, world_size=world_size)
    digests = tuple(sorted(path.name for path in folder.glob("??/*")))
    read, held, before = [0], [0.0], _own_mib()

    def on_step(_: StepReport) -> None:
        held[0] = max(held[0], _own_mib() - before)

    def get(rows: MappedRows, numbers: Any, original: Any = MappedRows.__getitem__) -> Tensor:
        found: Tensor = original(rows, numbers)
        read[0] += found.nbytes
        return found

    with patch.object(MappedRows, "__getitem__", get):
        data = combine(RUN, [Contribution("a", "", digests, 1)], folder, are_mapped=world_size > 1)
        if world_size == 1:
            read[0] = sum(rows.nbytes for rows in data.train if isinstance(rows, Tensor))
        model = nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(IMAGE)), 10))
        ranks, device = Ranks(rank, world_size), torch.device("cpu")
        fine_tune(model, data.train, RUN, round_number=1, device=device, on_step=on_step, ranks=ranks)
    return {"read_mib": round(read[0] / 2**20, 1), "own_mib": round(held[0], 1)}


def _own_mib() -> float:
    """Return the memory of this process that is no page of a file, in MiB."""
    return memory_bytes("RssAnon") / 2**20


if __name__ == "__main__":
    sys.exit(main())
