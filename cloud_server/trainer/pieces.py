"""Contributions that are read side by side in pieces, and reduced piece by piece.

The number of contributions, and the size of their files, do not change the memory that this takes: a piece
fits into a processor's cache. The files are read instead of mapped, because mapped pages count as the
trainer's memory.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ecavg.common.errors import RunError
from ecavg.common.schema import TensorSpec, read_header
from ecavg.common.tensor_files import PLAIN, TensorFile, writing
from ecavg.common.weights import StateDict

# The largest piece that PyTorch adds up in one thread. For longer pieces PyTorch would wake other threads,
# which costs more than it saves, and many times more on a busy machine.
PIECE_ELEMENTS = 1 << 15

_TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip

# A callback that gets the number of tensors that are done, and the number of all tensors.
OnTensor = Callable[[int, int], None]

# The same piece of every contribution in turn, each with the values [n]. The values of the next contribution
# overwrite those of the previous one.
Piece = Iterable[Tensor]
# A function that reduces a piece to the result, which is float64 [n] and filled with zeros at first.
Reducer = Callable[[Piece, Tensor], None]


class Contributions:
    """Safetensors files with equal names, shapes and dtypes, which are read side by side.

    Attributes:
        stored: the dtypes and shapes of the tensors in the files.
        schema: the same, with each complex tensor as a real one whose last axis has both parts.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        headers = [read_header(path) for path in paths]
        self.stored = headers[0].schema
        if any(header.schema != self.stored for header in headers):
            raise RunError("the contributions have different names, shapes or dtypes")
        self.schema = {name: _as_real(spec) for name, spec in self.stored.items()}
        self._files = list(zip(paths, headers, strict=True))

    def pieces(self, name: str, max_elements: int) -> Iterator[tuple[int, Piece]]:
        """Yield the pieces of a tensor in order, each with the index of its first element in the tensor."""
        dtype, num_elements = torch_dtype(self.schema[name]), math.prod(self.schema[name].shape)
        buffer = torch.empty(min(max_elements, num_elements), dtype=dtype)
        for begin in range(0, num_elements, max_elements):
            yield begin, self._piece(name, begin, buffer[: num_elements - begin])

    def restored(self, tensors: StateDict) -> StateDict:
        """Return tensors of `schema` with those complex that are complex in the files."""
        return {
            name: torch.view_as_complex(tensor) if self.stored[name].dtype == "C64" else tensor
            for name, tensor in tensors.items()
        }

    def _piece(self, name: str, begin: int, values: Tensor) -> Iterator[Tensor]:
        """Read one piece of each contribution in turn into `values`, and yield `values` each time."""
        data = values.view(torch.uint8).numpy().data
        for path, header in self._files:
            with path.open("rb") as file:
                file.seek(header.data_start + header.offsets[name][0] + begin * values.element_size())
                if file.readinto(data) != len(data):
                    raise RunError(f"{path} ends within its data")
            yield values


def _as_real(spec: TensorSpec) -> TensorSpec:
    """Return a complex tensor as a real one, because every rule here is about single coordinates."""
    return TensorSpec("F32", (*spec.shape, 2)) if spec.dtype == "C64" else spec


class Reduction(NamedTuple):
    """The contributions, and how a piece of each becomes that piece of the aggregate."""

    contributions: Contributions
    # The length of one contribution's piece.
    max_elements: int
    reduce: Reducer
    on_tensor: OnTensor

    def in_memory(self) -> StateDict:
        """Return the state_dict of all tensors, each reduced piece by piece."""
        reduced: StateDict = {}
        for name, spec in self.contributions.schema.items():
            tensor = reduced[name] = torch.empty(spec.shape, dtype=torch_dtype(spec))
            for begin, values in self._pieces(name, tensor.dtype, tensor.numel()):
                tensor.view(-1)[begin : begin + len(values)] = values
            self.on_tensor(len(reduced), len(self.contributions.schema))
        return self.contributions.restored(reduced)

    def write(self, target: Path) -> None:
        """Write all tensors to a file, piece by piece."""
        schema = self.contributions.schema
        with writing(target, self.contributions.stored, PLAIN) as file:
            for done, (name, spec) in enumerate(schema.items(), 1):
                for begin, values in self._pieces(name, torch_dtype(spec), math.prod(spec.shape)):
                    write_piece(file, name, begin, values)
                self.on_tensor(done, len(schema))

    def _pieces(self, name: str, dtype: torch.dtype, num_elements: int) -> Iterator[tuple[int, Tensor]]:
        """Yield the reduced pieces of a tensor in order, each with the index of its first element."""
        buffer = torch.empty(min(self.max_elements, num_elements), dtype=torch.float64)
        for begin, piece in self.contributions.pieces(name, self.max_elements):
            result = buffer[: num_elements - begin].zero_()
            self.reduce(piece, result)
            # The cast to an integer dtype would cut the fraction off, so the result is rounded before.
            yield begin, (result if dtype.is_floating_point else result.round_()).to(dtype)


def write_piece(file: TensorFile, name: str, begin: int, values: Tensor) -> None:
    """Write the values [n] of a tensor into a file, beginning with value number `begin`."""
    file.write(name, begin * values.element_size(), values.view(torch.uint8).numpy())


def torch_dtype(spec: TensorSpec) -> torch.dtype:
    """Return the PyTorch dtype of a tensor in a safetensors file."""
    return _TORCH_DTYPES[spec.dtype]
