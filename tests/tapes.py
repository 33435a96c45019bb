"""Recorders of steps for machines without a GPU, in the place of `ecavg.common.graphs.CudaRecorder`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Call = Callable[[], object]


class TapeRecorder:
    """A recorder that keeps PyTorch's operations on the CPU, and does them again on the same memory.

    As with a CUDA graph, a replay knows nothing of Python: numbers and branches are as they were recorded,
    and what reads a number from a tensor cannot be recorded.
    """

    def __init__(self) -> None:
        self.num_recorded = 0
        self.num_replayed = 0

    def record(self, step: Call) -> Call:
        for _ in range(3):
            step()
        tape = _Tape()
        with tape:
            step()
        self.num_recorded += 1

        def replay() -> None:
            self.num_replayed += 1
            tape.play()

        return replay


class _Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self._operations: list[tuple[bool, Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        result = func(*args, **(kwargs or {}))
        self._operations.append((torch.is_grad_enabled(), func, args, kwargs or {}, result))
        return result

    def play(self) -> None:
        for is_training, func, args, kwargs, kept in self._operations:
            # Some kernels are others where no gradient is wanted.
            with torch.set_grad_enabled(is_training), torch._C._AutoDispatchBelowAutograd():
                result = func(*args, **kwargs)
            self._keep(kept, result)

    @torch.no_grad()
    def _keep(self, kept: Any, result: Any) -> None:
        for old, new in zip(tree_leaves(kept), tree_leaves(result), strict=True):
            if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                old.copy_(new)


class Caller:
    """A recorder whose replays are the step itself, and that counts them."""

    def __init__(self) -> None:
        self.num_recorded = 0
        self.num_replayed = 0

    def record(self, step: Call) -> Call:
        self.num_recorded += 1
        step()

        def replay() -> None:
            self.num_replayed += 1
            step()

        return replay


class BitFlipper:
    """A recorder whose replays change the lowest bit of one number besides."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def record(self, step: Call) -> Call:
        def replay() -> None:
            step()
            number = self._tensor.detach()[(0,) * self._tensor.dim()]
            number.view(torch.int32 if number.element_size() == 4 else torch.int64).bitwise_xor_(1)

        return replay


class Failing:
    """A recorder that takes some steps and then fails, while recording or at the replay."""

    def __init__(
        self,
        num_steps: int,
        *,
        at_replay: bool = False,
        error: type[Exception] = ValueError,
        text: str = "this GPU has no graphs\nand more",
    ) -> None:
        self._num_steps, self._at_replay = num_steps, at_replay
        self._error, self._text = error, text
        self.num_asked = 0

    def record(self, step: Call) -> Call:
        self.num_asked += 1
        if self._at_replay:
            return lambda: self._fail(step)
        return self._fail(step)

    def _fail(self, step: Call) -> Call:
        for _ in range(self._num_steps):
            step()
        raise self._error(self._text)
