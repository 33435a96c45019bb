"""The ranks: the processes that train one model together, in the default process group of PyTorch.

What the ranks tell each other is text and the bytes of tensors, so that nothing has to be unpickled.
"""

import json
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Ranks(NamedTuple):
    """This process's place among the ranks."""

    rank: int = 0
    world_size: int = 1
    # The rank among the ranks of this machine, which is the number of the rank's GPU.
    local_rank: int = 0

    def share(self, text: str, source: int = 0) -> str:
        """Return the text that the rank `source` gives, on every rank; the other ranks wait for it here."""
        if self.world_size == 1:
            return text
        encoded = torch.tensor(list(text.encode()), dtype=torch.uint8)
        size = torch.tensor([len(encoded)])
        dist.broadcast(size, src=source)
        if self.rank != source:
            encoded = torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(encoded, src=source)
        return bytes(encoded.tolist()).decode()

    def share_tensors(self, tensors: Mapping[str, Tensor], source: int = 0) -> dict[str, Tensor]:
        """Return the tensors that the rank `source` gives, by name, on the CPU of every rank."""
        return dict(self.share_each(tensors, source))

    def share_each(self, tensors: Mapping[str, Tensor], source: int = 0) -> Iterator[tuple[str, Tensor]]:
        """Yield what `share_tensors` returns, one tensor at a time; every rank has to take all of them."""
        if self.world_size == 1:
            yield from tensors.items()
            return
        described = {name: [str(each.dtype), *each.shape] for name, each in tensors.items()}
        described = json.loads(self.share(json.dumps(described), source))
        for name, (dtype, *shape) in described.items():
            if self.rank == source:
                tensor = tensors[name].detach().cpu().contiguous()
            else:
                tensor = torch.empty(shape, dtype=_dtype(dtype))
            # Gloo does not know every dtype, but bytes.
            if tensor.numel():
                dist.broadcast(tensor.view(-1).view(torch.uint8), src=source)
            yield name, tensor

    def concatenate(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors that all ranks give, by name, one behind the other in the order of the ranks.

        A rank that has nothing gives no tensors; at least one gives some.
        """
        given = [self.share_tensors(tensors, source) for source in range(self.world_size)]
        names = max(given, key=len)
        return {name: torch.cat([each[name] for each in given if each]) for name in names}

    def add(self, tensor: Tensor) -> Tensor:
        """Return the sum of the tensors that all ranks give, which are on the CPU."""
        total = tensor.clone()
        if self.world_size > 1:
            dist.all_reduce(total)
        return total

    def part(self, size: int, step: int = 1) -> slice:
        """Return this rank's part of so many rows; all parts but the last consist of whole steps."""
        num_steps = -(-size // step)
        begin, end = (num_steps * rank // self.world_size * step for rank in (self.rank, self.rank + 1))
        return slice(min(begin, size), min(end, size))

    def gather(self, number: int) -> list[int]:
        """Return the numbers that all ranks give, in the order of the ranks."""
        if self.world_size == 1:
            return [number]
        numbers = torch.zeros(self.world_size, dtype=torch.int64)
        numbers[self.rank] = number
        dist.all_reduce(numbers)
        return numbers.tolist()


# There is no process group.
ALONE = Ranks()


def _dtype(name: str) -> torch.dtype:
    """Return the dtype of this name, such as "torch.float32"."""
    dtype = getattr(torch, name.removeprefix("torch."))
    assert isinstance(dtype, torch.dtype)
    return dtype
