"""The server's gate for safetensors files: what is in one, and whether it is what the run expects.

The header is checked in full before anything else is read, and every rule of the format is checked
here, whatever the libraries that open the file later would let pass. Everything in a header was
written by a stranger: texts quoted in an error are escaped and cut short.

Format: https://huggingface.co/docs/safetensors/index#format
"""

import json
import math
from collections.abc import Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from common.errors import InvalidError, Reason

MAX_HEADER_BYTES = 1 << 20
PIECE_BYTES = 1 << 18  # of tensor data held at once: stays in a processor's cache

_LENGTH_BYTES = 8
_MAX_SIZE = 2**63 - 1  # bytes or elements; keeps the product of a hostile shape short as well
_DTYPE_BYTES: Mapping[str, int] = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "C64": 8,
    "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1,
    "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip

# A float is NaN or infinite when all bits of its exponent are set (E4M3 has no infinity: exponent and
# mantissa); read as integers, so that NumPy needs no such type.
_NON_FINITE_BITS: Mapping[str, tuple[str, int]] = {
    "F64": ("<u8", 0x7FF0_0000_0000_0000),
    "F32": ("<u4", 0x7F80_0000),
    "C64": ("<u4", 0x7F80_0000),  # two F32
    "BF16": ("<u2", 0x7F80),
    "F16": ("<u2", 0x7C00),
    "F8_E5M2": ("<u1", 0x7C),
    "F8_E4M3": ("<u1", 0x7F),
}


class TensorSpec(NamedTuple):
    """What a tensor is, apart from its values."""

    dtype: str  # safetensors' name, "F32"
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return _quote(f"{self.dtype} {list(self.shape)}")

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * _DTYPE_BYTES[self.dtype]


Schema = Mapping[str, TensorSpec]


class Header(NamedTuple):
    """The checked header of a safetensors file."""

    schema: dict[str, TensorSpec]
    metadata: dict[str, str]
    data_start: int  # offset in the file of the first byte of data
    offsets: dict[str, tuple[int, int]]  # begin and end of each tensor, counted from data_start


def most_file_bytes(num_bytes: int) -> int:
    """How large a file with `num_bytes` of tensors may be."""
    return _LENGTH_BYTES + MAX_HEADER_BYTES + num_bytes


def header_bytes_needed(prefix: bytes | bytearray) -> int | None:
    """Length in bytes of the header, its own 8-byte length field included; None: that is not there yet.

    Raises:
        InvalidError: INVALID_FILE, the length is zero or over MAX_HEADER_BYTES.
    """
    if len(prefix) < _LENGTH_BYTES:
        return None
    length = int.from_bytes(prefix[:_LENGTH_BYTES], "little")
    if not 0 < length <= MAX_HEADER_BYTES:
        _invalid(f"its header has {length} bytes, 1 to {MAX_HEADER_BYTES} are allowed")
    return _LENGTH_BYTES + length


def parse_header(prefix: bytes | bytearray, size_bytes: int, *, max_tensors: int | None = None) -> Header:
    """Check the header of a file of `size_bytes`; `prefix` holds at least all of the header.

    Args:
        max_tensors: about so many may be in it; more are found out before anything is made of them.

    Raises:
        InvalidError: INVALID_FILE, with the first rule of the format that is broken.
    """
    data_start = header_bytes_needed(prefix)
    if data_start is None or data_start > min(len(prefix), size_bytes):
        _invalid("it ends within its header")
    text = prefix[_LENGTH_BYTES:data_start]
    if max_tensors is not None:
        _check_counts(text, max_tensors)
    entries = _parse_json(text)
    metadata = _check_metadata(entries.pop("__metadata__", {}))
    schema = {}
    offsets = {}
    for name, entry in entries.items():
        schema[name], offsets[name] = _check_entry(name, entry)
    _check_layout(offsets, size_bytes - data_start)
    return Header(schema, metadata, data_start, offsets)


def read_header(path: Path) -> Header:
    """Read and check the header of the file at `path`; no data is read.

    Raises:
        InvalidError: INVALID_FILE.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        prefix = file.read(_LENGTH_BYTES)
        needed = header_bytes_needed(prefix) or 0
        prefix += file.read(max(0, needed - _LENGTH_BYTES))
    return parse_header(prefix, path.stat().st_size)


def check_weights(header: Header, expected: Schema) -> None:
    """Check names, shapes and dtypes against those of the run's model.

    Raises:
        InvalidError: SCHEMA_MISMATCH, naming the first tensor that differs and both sides.
    """
    for name, spec in expected.items():
        found = header.schema.get(name)
        if found != spec:
            what = f"is {found}" if found else "is missing"
            _mismatch(f"tensor {_quote(name)} {what}, the run's model has {spec}")
    for name, spec in header.schema.items():
        if name not in expected:
            _mismatch(f"tensor {_quote(name)} is {spec}, the run's model has no such tensor")


def check_finite(path: Path, header: Header) -> None:
    """Check that no floating-point tensor of the file holds a NaN or an infinity.

    Raises:
        InvalidError: NON_FINITE, naming the first such tensor.
        OSError: the file cannot be read.
    """
    for name, spec in header.schema.items():
        if spec.dtype not in _NON_FINITE_BITS:
            continue
        dtype, bits = _NON_FINITE_BITS[spec.dtype]
        for piece in _pieces(path, header, name, dtype):
            piece &= piece.dtype.type(bits)
            if piece.max() == bits:
                raise InvalidError(
                    f"tensor {_quote(name)} holds NaN or infinite values:"
                    " lower the learning rate, or look for broken input data",
                    Reason.NON_FINITE,
                )


def check_shard(header: Header, *, image_shape: tuple[int, int, int]) -> int:
    """Check that the file is a shard: exactly `images` U8 [N, C, H, W] and `labels` I64 [N]; returns N.

    Raises:
        InvalidError: INVALID_SHARD.
    """
    if set(header.schema) != {"images", "labels"}:
        names = _quote(", ".join(sorted(header.schema)))
        _invalid_shard(f"its tensors are {names}, not images and labels")
    images, labels = header.schema["images"], header.schema["labels"]
    num_examples = labels.shape[0] if labels.shape else 0
    if labels != TensorSpec("I64", (num_examples,)) or num_examples < 1:
        _invalid_shard(f"labels is {labels}, not I64 [N] with N of at least 1")
    wanted = TensorSpec("U8", (num_examples, *image_shape))
    if images != wanted:
        _invalid_shard(f"images is {images}, the run's dataset wants {wanted}")
    return num_examples


def check_labels(path: Path, header: Header, num_classes: int) -> None:
    """Check that every label of a shard that passed `check_shard` is one of the classes.

    Raises:
        InvalidError: INVALID_SHARD, with the first label that is not.
        OSError: the file cannot be read.
    """
    for labels in _pieces(path, header, "labels", "<i8"):
        for label in (int(labels.min()), int(labels.max())):
            if not 0 <= label < num_classes:
                _invalid_shard(f"it has the label {label}, the run's classes are 0 to {num_classes - 1}")


def _check_counts(text: bytes | bytearray, max_tensors: int) -> None:
    """A tensor has a brace, and a comma for each of its sizes; names and metadata may have a few more."""
    if text.count(b"{") > 2 * max_tensors + 64 or text.count(b",") > 16 * max_tensors + 512:
        _invalid(f"its header has far more in it than {max_tensors} tensors")


def _parse_json(text: bytes | bytearray) -> dict[str, Any]:
    if not text.startswith(b"{"):
        _invalid("its header does not start with '{'")
    try:
        # Without parsers of ours json would also take 1e9, NaN and Infinity, and "-0" for a zero.
        entries: dict[str, Any] = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_unique_keys,
            parse_int=_natural_number,
            parse_float=_no_such_number,
            parse_constant=_no_such_number,
        )
    except RecursionError:
        _invalid("its header is nested too deeply")
    except ValueError as error:  # JSON, UTF-8, or an integer of thousands of digits
        _invalid(f"its header is not valid JSON: {_quote(str(error))}")
    return entries


def _natural_number(text: str) -> int:
    if text.startswith("-"):
        raise ValueError(f"{text} is below zero")
    return int(text)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a key is there twice")
    for text in (*entries, *entries.values()):
        if isinstance(text, str):
            text.encode("utf-8")  # UnicodeEncodeError, a ValueError: "\ud800" is JSON and yet no text
    return entries


def _no_such_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is not an integer")


def _check_metadata(metadata: Any) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _invalid("its __metadata__ does not map strings to strings")
    return metadata


def _check_entry(name: str, entry: Any) -> tuple[TensorSpec, tuple[int, int]]:
    """One tensor's description and byte range, which fit each other."""
    tensor = f"tensor {_quote(name)}"
    if not name:
        _invalid("a tensor has no name")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        _invalid(f"{tensor} does not have dtype, shape and data_offsets, and nothing else")
    dtype, shape, data_offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPE_BYTES:
        _invalid(f"{tensor} has a dtype that is none of {', '.join(_DTYPE_BYTES)}")
    if not _are_sizes(shape):
        _invalid(f"{tensor} has a shape that is not a list of sizes")
    if not _are_sizes(data_offsets) or len(data_offsets) != 2:
        _invalid(f"{tensor} has data_offsets that are not two offsets")
    begin, end = data_offsets
    if end - begin != _num_elements(tensor, shape) * _DTYPE_BYTES[dtype]:
        _invalid(f"{tensor} has a dtype and shape that do not fit its data_offsets")
    return TensorSpec(dtype, tuple(shape)), (begin, end)


def _are_sizes(value: Any) -> bool:
    """Whether it is a list of integers from 0 on; True and False are none."""
    return isinstance(value, list) and all(type(size) is int and 0 <= size <= _MAX_SIZE for size in value)


def _num_elements(tensor: str, shape: list[int]) -> int:
    product = 1
    for size in shape:
        product *= size
        if product > _MAX_SIZE:
            _invalid(f"{tensor} has a shape with too many elements")
    return product


def _check_layout(offsets: Mapping[str, tuple[int, int]], num_data_bytes: int) -> None:
    """The tensors fill the data from its first byte to its last, without gap or overlap."""
    filled = 0
    for name, (begin, end) in sorted(offsets.items(), key=lambda item: item[1]):
        if begin != filled:
            _invalid(f"tensor {_quote(name)} begins at byte {begin} of the data, not at {filled}")
        filled = end
    if filled != num_data_bytes:
        _invalid(f"its tensors take {filled} bytes, there are {num_data_bytes} bytes of data")


def _pieces(path: Path, header: Header, name: str, dtype: str) -> Iterator[np.ndarray]:
    """A tensor's values, in pieces that share one buffer; the caller may overwrite it.

    Read rather than mapped: mapped pages would count as the server's memory, and a file that shrinks
    under a mapping kills the process.
    """
    begin, end = header.offsets[name]
    buffer = np.empty(min(PIECE_BYTES, end - begin), np.uint8)
    with path.open("rb", buffering=0) as file:
        file.seek(header.data_start + begin)
        while begin < end:
            num_bytes = min(len(buffer), end - begin)
            _read_exactly(file, buffer.data[:num_bytes])
            yield buffer[:num_bytes].view(dtype)
            begin += num_bytes


def _read_exactly(file: FileIO, view: memoryview) -> None:
    while view:
        num_read = file.readinto(view)
        if not num_read:
            _invalid("it ends within its data")
        view = view[num_read:]


def _quote(text: str, limit: int = 120) -> str:
    """A stranger's text for a one-line message: escaped, and cut short."""
    return ascii(text if len(text) <= limit else text[:limit] + "...")[1:-1]


def _invalid(problem: str) -> NoReturn:
    raise InvalidError(f"not a usable safetensors file: {problem}", Reason.INVALID_FILE)


def _mismatch(problem: str) -> NoReturn:
    raise InvalidError(
        f"the weights do not fit the run: {problem}; send a state_dict of the run's model",
        Reason.SCHEMA_MISMATCH,
    )


def _invalid_shard(problem: str) -> NoReturn:
    raise InvalidError(f"not a shard of the run's dataset: {problem}", Reason.INVALID_SHARD)
