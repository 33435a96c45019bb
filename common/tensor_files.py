"""Safetensors files of our own that are read and written in pieces, without PyTorch.

The memory that this takes depends neither on the size of a file nor on that of a tensor. The files are read
instead of mapped, because mapped pages count as memory of the process.
"""

import io
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ecavg.common.errors import InvalidError, Reason, RunError
from ecavg.common.files import replacing
from ecavg.common.schema import Header, Schema, TensorSpec, check_finite, parse_header, read_header

# So much of a file is held at once, or one channel if that is longer: it stays in the cache.
PIECE_ELEMENTS = 1 << 15
# The metadata of weights that are not encoded.
PLAIN: Mapping[str, str] = {"format": "pt"}

_NOTHING = Header({}, {}, 0, {})
_NUMPY_DTYPES: Mapping[str, str] = {"F32": "<f4", "BF16": "<u2", "I8": "i1"}

Array = npt.NDArray[Any]


class TensorFile:
    """The tensors of an open safetensors file; a missing tensor reads as zeros, and is not written."""

    def __init__(self, file: io.BufferedIOBase, header: Header) -> None:
        self.schema = header.schema
        self._file = file
        self._header = header

    def read(self, name: str, begin: int, shape: tuple[int, ...]) -> Array:
        """Return values of a tensor in this shape, beginning with value number `begin`; BF16 as uint16."""
        if name not in self.schema:
            return np.zeros(shape, np.float32)
        values = np.empty(shape, _NUMPY_DTYPES[self.schema[name].dtype])
        self._fill(name, begin * values.itemsize, values)
        return values

    def write(self, name: str, begin: int, values: Array) -> None:
        """Overwrite values of a tensor, beginning with value number `begin`."""
        if name in self.schema:
            self._seek(name, begin * values.itemsize)
            self._file.write(values.data)

    def copy_to(self, other: "TensorFile", name: str) -> None:
        """Copy this file's values of a tensor to another file, whatever their dtype."""
        num_bytes = self.schema[name].num_bytes
        for begin in range(0, num_bytes, PIECE_ELEMENTS):
            values = np.empty(min(PIECE_ELEMENTS, num_bytes - begin), np.uint8)
            self._fill(name, begin, values)
            other.write(name, begin, values)

    def _fill(self, name: str, begin_bytes: int, values: Array) -> None:
        self._seek(name, begin_bytes)
        if self._file.readinto(values.data) != values.nbytes:
            raise InvalidError("the file ends within its data", Reason.INVALID_FILE)

    def _seek(self, name: str, begin_bytes: int) -> None:
        self._file.seek(self._header.data_start + self._header.offsets[name][0] + begin_bytes)


def own_header(path: Path) -> Header:
    """Return the header of a file of our own.

    Raises:
        RunError: the file is not a safetensors file.
    """
    try:
        return read_header(path)
    except InvalidError as error:
        raise RunError(f"cannot read the weights in {path}: {error}") from error


@contextmanager
def reading(path: Path | None, expected: Schema) -> Iterator[TensorFile]:
    """Yield the tensors of a file of our own, which must be as expected; without a file there are none.

    Raises:
        RunError: the file is not as expected.
    """
    if not path:
        yield TensorFile(io.BytesIO(), _NOTHING)
        return
    header = own_header(path)
    if header.schema != expected:
        raise RunError(f"{path} does not fit the weights: it has other names, shapes or dtypes")
    with path.open("rb") as file:
        yield TensorFile(file, header)


@contextmanager
def writing(path: Path | None, schema: Schema, metadata: Mapping[str, str]) -> Iterator[TensorFile]:
    """Yield the tensors of a file that is there, durably, at the end; they are zeros until written.

    Raises:
        InvalidError: NON_FINITE, values are not finite; INVALID_FILE, there are too many tensors.
    """
    if not path:
        yield TensorFile(io.BytesIO(), _NOTHING)
        return
    prefix, num_bytes = _prefix(schema, metadata)
    header = parse_header(prefix, num_bytes)
    with replacing(path) as partial:
        with partial.open("wb") as file:
            file.write(prefix)
            file.truncate(num_bytes)
            yield TensorFile(file, header)
        check_finite(partial, header)


def _prefix(schema: Schema, metadata: Mapping[str, str]) -> tuple[bytes, int]:
    """Return the header as the format's own writer makes it, and the size of the file.

    Largest elements come first, so that all are aligned; of one size, they are in order of their names.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, spec in sorted(schema.items(), key=lambda item: (-_element_bytes(item[1]), item[0])):
        begin, end = end, end + spec.num_bytes
        entries[name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": (begin, end)}
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, 8 + len(text) + end


def _element_bytes(spec: TensorSpec) -> int:
    return spec._replace(shape=()).num_bytes
