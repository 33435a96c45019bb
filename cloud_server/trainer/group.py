"""The trainer's ranks: one process alone, or the members of a group that torchrun started."""

import os
from collections.abc import Mapping
from datetime import timedelta
from typing import NamedTuple, Self

import torch
import torch.distributed as dist

from common.training import select_device

# A rank waits for the next job, or for rank 0 to average, within a collective: for as long as it
# takes. A peer that dies is noticed by its broken connection, not by this.
_TIMEOUT = timedelta(days=365)


class Group(NamedTuple):
    """This process's place among the ranks."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0  # among the ranks of this machine: the number of its GPU

    @classmethod
    def join(cls, device_name: str, environ: Mapping[str, str] = os.environ) -> Self:
        """Meet the other ranks, where torchrun's variables say that there are some.

        Raises:
            UsageError: no such device here.
        """
        if int(environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        group = cls(*(int(environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
        device = group.device(device_name)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        # Gloo beside NCCL: a rank that waits inside NCCL keeps its GPU busy.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=_TIMEOUT)
        return group

    def device(self, name: str) -> torch.device:
        """The device of this name; within a group, every rank has its own GPU.

        Raises:
            UsageError: no such device here.
        """
        device = select_device(name)
        if self.world_size > 1 and device.type == "cuda":
            return torch.device("cuda", self.local_rank)
        return device

    def share(self, text: str) -> str:
        """Rank 0's text, on every rank; the others wait here until it comes."""
        if self.world_size == 1:
            return text
        encoded = torch.tensor(list(text.encode()), dtype=torch.uint8)
        size = torch.tensor([len(encoded)])
        dist.broadcast(size, src=0)
        if self.rank != 0:
            encoded = torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(encoded, src=0)
        return bytes(encoded.tolist()).decode()
