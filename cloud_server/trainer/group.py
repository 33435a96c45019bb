"""The ranks of the trainer: a single process, or the processes of a group that torchrun started."""

import os
from collections.abc import Mapping
from datetime import timedelta
from typing import Self

import torch
import torch.distributed as dist

from ecavg.common.devices import select_device
from ecavg.common.errors import UsageError
from ecavg.common.ranks import Ranks

# A rank waits within a collective for the next job, or until rank 0 has averaged, which may take any time.
# The death of another rank shows by its broken connection, so that no time-out is needed.
_TIMEOUT = timedelta(days=365)
# With this variable each group of ranks that torchrun forms has a store of its own. Otherwise a group that is
# formed anew finds the addresses of the last group in the store, and cannot connect.
OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"


class Group(Ranks):
    """This process's place among the ranks of the trainer."""

    @classmethod
    def join(cls, device_name: str, environ: Mapping[str, str] = os.environ) -> Self:
        """Join the other ranks, if torchrun's variables in the environment say that there are any.

        Raises:
            UsageError: this machine has no such device, or the variables are not those of a torchrun whose
                group of ranks can form anew.
        """
        if (environ.get("WORLD_SIZE") or "1") == "1":
            return cls()
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        try:
            group = cls(*(int(environ[name]) for name in names))
        except (KeyError, ValueError) as error:
            raise UsageError(
                f"the environment has WORLD_SIZE, but {', '.join(names)} are not three numbers: start the"
                " trainer with torchrun, or remove these variables"
            ) from error
        _check_store(environ)
        device = group.device(device_name)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        # Tensors on the CPU go through Gloo, because a rank that waits inside NCCL keeps its GPU busy.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=_TIMEOUT)
        return group

    def device(self, name: str) -> torch.device:
        """Return the device of this name; within a group, every rank has its own GPU.

        Raises:
            UsageError: this machine has no such device.
        """
        device = select_device(name)
        if self.world_size > 1 and device.type == "cuda":
            return torch.device("cuda", self.local_rank)
        return device


def _check_store(environ: Mapping[str, str]) -> None:
    """Raise UsageError if torchrun would give the ranks the store of the last group; see OWN_STORE."""
    if environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise UsageError(
            "this torchrun could not start a group again after a failure: set"
            f" {OWN_STORE}=1 in its environment, and use --rdzv-backend=c10d or --standalone"
        )
