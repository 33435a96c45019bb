"""The server's checks of a safetensors file: its header, its fit to the run, and its values.

The whole header is checked before any data is read. Every rule of the format is checked here, because the
libraries that open the file later may be less strict. A stranger has written everything in a header, so
error messages quote its texts escaped and cut short.

Format: https://huggingface.co/docs/safetensors/index#format
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from ecavg.common.dataset import MISSING, DatasetSpec, Inputs, Targets
from ecavg.common.errors import InvalidError, Reason

MAX_HEADER_BYTES = 1 << 20
# Tensor data is read in pieces of this size, which stay in a processor's cache.
PIECE_BYTES = 1 << 18

_LENGTH_BYTES = 8
# No size of a shape, number of elements or offset may be larger. The bound also keeps the computation with
# the numbers of a hostile shape cheap.
_MAX_SIZE = 2**63 - 1
_DTYPE_BYTES: Mapping[str, int] = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "C64": 8,
    "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1,
    "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip

# A float is NaN or infinite when all bits of its exponent are set. F8_E4M3 has no infinity, and is NaN when
# all bits of its exponent and mantissa are set. The values are read as integers (the first item), because
# NumPy does not know all of these types. A C64 is read as two F32.
_NON_FINITE_BITS: Mapping[str, tuple[str, int]] = {
    "F64": ("<u8", 0x7FF0_0000_0000_0000),
    "F32": ("<u4", 0x7F80_0000),
    "C64": ("<u4", 0x7F80_0000),
    "BF16": ("<u2", 0x7F80),
    "F16": ("<u2", 0x7C00),
    "F8_E5M2": ("<u1", 0x7C),
    "F8_E4M3": ("<u1", 0x7F),
}


# The dtypes of examples, as safetensors and as NumPy name them.
_DTYPE_NAMES: Mapping[str, str] = {"uint8": "U8", "int64": "I64", "float32": "F32"}
_NUMPY_DTYPES: Mapping[str, str] = {"uint8": "u1", "int64": "<i8", "float32": "<f4"}


class TensorSpec(NamedTuple):
    """The dtype and shape of a tensor."""

    dtype: str
    """The name that safetensors uses, for example "F32"."""
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return _quote(f"{self.dtype} {list(self.shape)}")

    @property
    def num_bytes(self) -> int:
        """Return the size of the tensor's values in bytes."""
        return math.prod(self.shape) * _DTYPE_BYTES[self.dtype]


Schema = Mapping[str, TensorSpec]


class Header(NamedTuple):
    """The checked header of a safetensors file."""

    schema: dict[str, TensorSpec]
    metadata: dict[str, str]
    data_start: int
    """The offset in the file of the first byte of data."""
    offsets: dict[str, tuple[int, int]]
    """The begin and the end of each tensor in bytes, counted from `data_start`."""


def most_file_bytes(num_bytes: int) -> int:
    """Return the size in bytes of the largest file that may hold `num_bytes` of tensor data."""
    return _LENGTH_BYTES + MAX_HEADER_BYTES + num_bytes


def header_bytes_needed(prefix: bytes | bytearray) -> int | None:
    """Return the length in bytes of the header, including the length field of 8 bytes.

    Args:
        prefix: the first bytes of the file.

    Returns:
        The length, or None if the prefix does not contain the whole length field yet.

    Raises:
        InvalidError: INVALID_FILE, the length is zero or over MAX_HEADER_BYTES.
    """
    if len(prefix) < _LENGTH_BYTES:
        return None
    length = int.from_bytes(prefix[:_LENGTH_BYTES], "little")
    if not 0 < length <= MAX_HEADER_BYTES:
        _refuse_file(f"its header has {length} bytes, 1 to {MAX_HEADER_BYTES} are allowed")
    return _LENGTH_BYTES + length


def parse_header(prefix: bytes | bytearray, size_bytes: int, *, max_tensors: int | None = None) -> Header:
    """Check and return the header of a file.

    Args:
        prefix: the first bytes of the file, which hold at least the whole header.
        size_bytes: the size of the whole file.
        max_tensors: the number of tensors that the file may have. A header with far more tensors is refused
            before any object is made from it. None sets no limit.

    Raises:
        InvalidError: INVALID_FILE, the header breaks a rule of the format; the message names the first one.
    """
    data_start = header_bytes_needed(prefix)
    if data_start is None or data_start > min(len(prefix), size_bytes):
        _refuse_file("it ends within its header")
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
    """Read, check and return the header of the file at `path`.

    Raises:
        InvalidError: INVALID_FILE, the header breaks a rule of the format.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        prefix = file.read(_LENGTH_BYTES)
        needed = header_bytes_needed(prefix) or 0
        prefix += file.read(max(0, needed - _LENGTH_BYTES))
    return parse_header(prefix, path.stat().st_size)


def check_weights(header: Header, expected: Schema) -> None:
    """Check that the names, shapes and dtypes of the tensors are those of the run's model.

    Raises:
        InvalidError: SCHEMA_MISMATCH, a tensor differs; the message names the first one, and how it differs.
    """
    for name, spec in expected.items():
        found = header.schema.get(name)
        if found != spec:
            what = f"is {found}" if found else "is missing"
            _refuse_weights(f"tensor {_quote(name)} {what}, the run's model has {spec}")
    for name, spec in header.schema.items():
        if name not in expected:
            _refuse_weights(f"tensor {_quote(name)} is {spec}, the run's model has no such tensor")


def check_parts(headers: Sequence[Header], expected: Schema) -> None:
    """Check that files have together exactly the tensors of the run's model, each of them in one file.

    Raises:
        InvalidError: SCHEMA_MISMATCH, a tensor differs, is missing, or is there twice.
    """
    together: dict[str, TensorSpec] = {}
    for header in headers:
        for name in header.schema.keys() & together.keys():
            _refuse_weights(f"tensor {_quote(name)} is in two files")
        together |= header.schema
    check_weights(Header(together, metadata={}, data_start=0, offsets={}), expected)


def check_finite(path: Path, header: Header) -> None:
    """Check that no floating-point tensor of the file holds a NaN or an infinity.

    Raises:
        InvalidError: NON_FINITE, a tensor does; the message names the first one.
        OSError: the file cannot be read.
    """
    for name, spec in header.schema.items():
        if spec.dtype not in _NON_FINITE_BITS:
            continue
        dtype, bits = _NON_FINITE_BITS[spec.dtype]
        for piece in pieces(path, header, name, dtype):
            piece &= piece.dtype.type(bits)
            if piece.max() == bits:
                raise InvalidError(
                    f"tensor {_quote(name)} holds NaN or infinite values:"
                    " lower the learning rate, or look for broken input data",
                    Reason.NON_FINITE,
                )


def check_shard(header: Header, spec: DatasetSpec) -> int:
    """Check that the file is a shard: exactly the inputs and targets that the run's dataset wants.

    Args:
        header: the header of the file.
        spec: the run's dataset.

    Returns:
        The number of examples N, at least 1.

    Raises:
        InvalidError: INVALID_SHARD, the file has other tensors, or tensors of another dtype or shape.
    """
    inputs_name, targets_name = spec.tensor_names
    if set(header.schema) != {inputs_name, targets_name}:
        names = _quote(", ".join(sorted(header.schema)))
        _refuse_shard(f"its tensors are {names}, not {inputs_name} and {targets_name}")
    inputs, targets = header.schema[inputs_name], header.schema[targets_name]
    found = targets.shape[0] if targets.shape else 0
    dtype, shape = _DTYPE_NAMES[spec.targets.dtype], spec.targets.shape
    if targets != TensorSpec(dtype, (found, *shape)) or found < 1:
        sizes = ", ".join(map(str, ("N", *shape)))
        _refuse_shard(f"{targets_name} is {targets}, not {dtype} [{sizes}] with N of at least 1")
    wanted = TensorSpec(_DTYPE_NAMES[spec.inputs.dtype], (found, *spec.inputs.shape))
    if inputs != wanted:
        _refuse_shard(f"{inputs_name} is {inputs}, the run's dataset wants {wanted}")
    return found


def dtype_name(dtype: str) -> str:
    """Return the name that safetensors uses for a dtype of examples."""
    return _DTYPE_NAMES[dtype]


def num_examples(header: Header) -> int:
    """Return how many examples a shard has, which must have passed `check_shard`."""
    return next(iter(header.schema.values())).shape[0]


def are_missing(targets: np.ndarray) -> np.ndarray:
    """Return True for each value that stands for a missing target, where targets may be missing."""
    return np.asarray(targets == MISSING if targets.dtype.kind == "i" else np.isnan(targets))


def missing_rows(path: Path, header: Header, spec: DatasetSpec) -> np.ndarray:
    """Return which examples of a shard lack a target, or a part of it: bool [N].

    The shard must have passed `check_shard`.

    Raises:
        OSError: the file cannot be read.
    """
    is_missing = np.zeros(num_examples(header), bool)
    num_values, begin = math.prod(spec.targets.shape), 0
    for piece in pieces(path, header, spec.tensor_names[1], _NUMPY_DTYPES[spec.targets.dtype]):
        is_missing[(begin + np.flatnonzero(are_missing(piece))) // num_values] = True
        begin += len(piece)
    return is_missing


def check_examples(path: Path, header: Header, spec: DatasetSpec) -> None:
    """Check that every value of a shard is a finite number, and within the bounds of the run's dataset.

    The shard must have passed `check_shard`.

    Raises:
        InvalidError: INVALID_SHARD, a value is not; the message has the value.
        OSError: the file cannot be read.
    """
    sides: tuple[Inputs | Targets, ...] = (spec.inputs, spec.targets)
    for name, side in zip(spec.tensor_names, sides, strict=True):
        # Every byte is a pixel.
        if side.dtype == "uint8" and side.low is None and side.high is None:
            continue
        check_tensor(path, header, name, side, spec)


def check_tensor(path: Path, header: Header, name: str, side: Inputs | Targets, spec: DatasetSpec) -> None:
    """Refuse inputs or targets of which a value is not finite, or out of bounds, and not a missing one.

    Raises:
        InvalidError: INVALID_SHARD, a value is not; the message has the value.
        OSError: the file cannot be read.
    """
    for piece in pieces(path, header, name, _NUMPY_DTYPES[side.dtype]):
        may_be_missing = isinstance(side, Targets) and side.missing
        values = piece[~are_missing(piece)] if may_be_missing else piece
        for value in (values.min().item(), values.max().item()) if len(values) else ():
            _check_value(value, name, side, spec)


def _check_value(value: float, name: str, side: Inputs | Targets, spec: DatasetSpec) -> None:
    """Refuse a value that is not finite, or out of bounds."""
    if not math.isfinite(value):
        _refuse_shard(f"{name} has the value {value}, which is no finite number")
    is_low, is_high = (
        side.low is not None and value < side.low,
        side.high is not None and value > side.high,
    )
    if not (is_low or is_high):
        return
    if name == "labels":
        _refuse_shard(f"it has the label {value}, the run's classes are 0 to {spec.num_classes - 1}")
    low, high = ("any" if bound is None else f"{bound:g}" for bound in (side.low, side.high))
    _refuse_shard(f"{name} has the value {value:g}, the run's dataset has {low} to {high}")


def _check_counts(text: bytes | bytearray, max_tensors: int) -> None:
    """Refuse a header with far more than `max_tensors` tensors, before the JSON is parsed.

    Each tensor has one brace, and one comma for each of its sizes and fields. Names and metadata may contain
    a few more of both.
    """
    if text.count(b"{") > 2 * max_tensors + 64 or text.count(b",") > 16 * max_tensors + 512:
        _refuse_file(f"its header has far more in it than {max_tensors} tensors")


def _parse_json(text: bytes | bytearray) -> dict[str, Any]:
    if not text.startswith(b"{"):
        _refuse_file("its header does not start with '{'")
    try:
        # Without these hooks json would also accept 1e9, NaN and Infinity, would read "-0" as zero, and
        # would keep the last of two equal keys.
        entries: dict[str, Any] = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_unique_keys,
            parse_int=_natural_number,
            parse_float=_refuse_number,
            parse_constant=_refuse_number,
        )
    except RecursionError:
        _refuse_file("its header is nested too deeply")
    # The text is not valid JSON or UTF-8, or contains an integer of thousands of digits.
    except ValueError as error:
        _refuse_file(f"its header is not valid JSON: {_quote(str(error))}")
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
            # A lone surrogate such as "\ud800" is valid JSON, but no text. For such a string, `encode`
            # raises UnicodeEncodeError, which is a ValueError.
            text.encode("utf-8")
    return entries


def _refuse_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is not an integer")


def _check_metadata(metadata: Any) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _refuse_file("its __metadata__ does not map strings to strings")
    return metadata


def _check_entry(name: str, entry: Any) -> tuple[TensorSpec, tuple[int, int]]:
    """Check one tensor's entry in the header, and return the tensor's description and byte range."""
    tensor = f"tensor {_quote(name)}"
    if not name:
        _refuse_file("a tensor has no name")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        _refuse_file(f"{tensor} does not have dtype, shape and data_offsets, and nothing else")
    dtype, shape, data_offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPE_BYTES:
        _refuse_file(f"{tensor} has a dtype that is none of {', '.join(_DTYPE_BYTES)}")
    if not _are_sizes(shape):
        _refuse_file(f"{tensor} has a shape that is not a list of sizes")
    if not _are_sizes(data_offsets) or len(data_offsets) != 2:
        _refuse_file(f"{tensor} has data_offsets that are not two offsets")
    begin, end = data_offsets
    if end - begin != _num_elements(tensor, shape) * _DTYPE_BYTES[dtype]:
        _refuse_file(f"{tensor} has a dtype and shape that do not fit its data_offsets")
    return TensorSpec(dtype, tuple(shape)), (begin, end)


def _are_sizes(value: Any) -> bool:
    """Return True if the value is a list of integers that are not negative, and not booleans either."""
    return isinstance(value, list) and all(type(size) is int and 0 <= size <= _MAX_SIZE for size in value)


def _num_elements(tensor: str, shape: list[int]) -> int:
    product = 1
    for size in shape:
        product *= size
        if product > _MAX_SIZE:
            _refuse_file(f"{tensor} has a shape with too many elements")
    return product


def _check_layout(offsets: Mapping[str, tuple[int, int]], num_data_bytes: int) -> None:
    """Check that the tensors fill the data from its first to its last byte, without a gap or an overlap."""
    filled = 0
    for name, (begin, end) in sorted(offsets.items(), key=lambda item: item[1]):
        if begin != filled:
            _refuse_file(f"tensor {_quote(name)} begins at byte {begin} of the data, not at {filled}")
        filled = end
    if filled != num_data_bytes:
        _refuse_file(f"its tensors take {filled} bytes, there are {num_data_bytes} bytes of data")


def pieces(path: Path, header: Header, name: str, dtype: str) -> Iterator[np.ndarray]:
    """Yield a tensor's values in pieces.

    All pieces share one buffer, which the caller may overwrite.

    The file is read and not mapped, because mapped pages would count as memory of the server, and because
    a file that shrinks while it is mapped kills the process.
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
    """Fill the whole view from the file."""
    while view:
        num_read = file.readinto(view)
        if not num_read:
            _refuse_file("it ends within its data")
        view = view[num_read:]


def _quote(text: str, limit: int = 120) -> str:
    """Return a stranger's text for a one-line message, escaped and cut to `limit` characters."""
    return ascii(text if len(text) <= limit else text[:limit] + "...")[1:-1]


def _refuse_file(problem: str) -> NoReturn:
    raise InvalidError(f"not a usable safetensors file: {problem}", Reason.INVALID_FILE)


def _refuse_weights(problem: str) -> NoReturn:
    raise InvalidError(
        f"the weights do not fit the run: {problem}; send a state_dict of the run's model",
        Reason.SCHEMA_MISMATCH,
    )


def _refuse_shard(problem: str) -> NoReturn:
    raise InvalidError(f"not a shard of the run's dataset: {problem}", Reason.INVALID_SHARD)
