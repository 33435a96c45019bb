"""Weights on the wire: as they are, rounded to bfloat16, or as int8 differences from a base.

An encoded file is a safetensors file too, with the same names and shapes. What is encoded are its F32
tensors; whatever else it holds (half and double precision, integers, bools) travels as it is.

| an F32 tensor of | "bfloat16" | "int8" |
| --- | --- | --- |
| running statistics | BF16 | BF16: of a small variance, the difference from a larger one tells nothing |
| anything else | BF16 | I8, the difference from the base's, in steps of the F32 tensor "NAME.scale" |

To read one without this module: BF16 is the upper half of F32; an I8 tensor that has a scale is multiplied
by it and added to the base. There is one scale for each output channel (index of axis 0), or one for all
where a channel is a single value. The only entry of the metadata, "ecavg", says in JSON which wire it is, and
the digest of the base.

What rounding takes away the sender keeps, and adds the next time (error feedback: Seide et al., 1-Bit
Stochastic Gradient Descent, 2014; Karimireddy et al., arXiv 1901.09847). So small changes are not lost for
ever: what all rounds have sent differs from what they should have by the rounding of the last one only.

Files are read and written in pieces of whole channels, so that memory does not depend on the size of a file
or tensor. Decoding multiplies once and adds once, each rounded to float32 as IEEE 754 says: every machine
makes the same bytes of it.
"""

import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NamedTuple, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, ValidationError, model_validator

from ecavg.common.config import FrozenModel, RunConfig, Wire
from ecavg.common.errors import InvalidError, Reason, RunError, UsageError
from ecavg.common.files import replacing
from ecavg.common.schema import Header, Schema, TensorSpec, check_finite, check_weights, read_header
from ecavg.common.tensor_files import PIECE_ELEMENTS, PLAIN, Array, TensorFile, own_header, reading, writing
from ecavg.common.transfer import DIGEST

# The only entry of the metadata: the format's own writer shuffles several.
_ENTRY = "ecavg"
# PyTorch's names of the tensors that are measured, not trained.
_STATISTICS = ("running_mean", "running_var")
# An int8 has so many steps to either side of zero.
_NUM_STEPS = 127
# Some processors are set to take less for zero.
_LEAST_SCALE = np.finfo(np.float32).smallest_normal
# The largest difference, 128 steps, is then half of what float32 can say.
_LARGEST_SCALE = np.finfo(np.float32).max / 256

Floats = npt.NDArray[np.float32]


class Base(NamedTuple):
    """The weights that differences are taken from, normally the round's initial weights."""

    path: Path
    # The digest of the file, which the caller has checked.
    digest: str


class Encoding(FrozenModel):
    """The encoding of a file, as its metadata say."""

    wire: Wire = "float32"
    # The digest of the base, for int8.
    base: Annotated[str, Field(pattern=rf"^{DIGEST.pattern}$")] | None = None
    # The BF16 tensors that were BF16 before, sorted, for bfloat16.
    as_is: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _differences_have_a_base(self) -> Self:
        if (self.wire == "int8") != (self.base is not None):
            raise ValueError("int8 has a base, and nothing else has one")
        return self


def contributed_wires(run: RunConfig) -> tuple[Wire, ...]:
    """Return the encodings in which a run's contributions may arrive, the run's own first.

    Weights that an agent has drawn itself have no base in common with the server, so that no differences
    can be taken of them.
    """
    without_base = (wire_of(run.wire, None),) if run.initial_weights == "independent" else ()
    return tuple(dict.fromkeys((run.wire, *without_base)))


def is_encoded(run: RunConfig) -> bool:
    """Return True if a run's weights travel in another form than they are used in."""
    return run.wire != "float32"


def needs_base(run: RunConfig) -> bool:
    """Return True if a run's weights travel as differences from a base."""
    return run.wire == "int8"


def wire_of(wire: Wire, base: object | None) -> Wire:
    """Return how weights travel in a run with this wire: without a base, as bfloat16 in place of int8."""
    return "bfloat16" if wire == "int8" and base is None else wire


def wire_schema(schema: Schema, wire: Wire) -> Schema:
    """Return the names, shapes and dtypes that weights of this schema have when they are encoded.

    Raises:
        UsageError: a tensor has the name that the scale of another one needs.
    """
    encoded = {}
    for name, spec in schema.items():
        encoded[name] = TensorSpec(_wire_dtype(name, spec, wire), spec.shape)
        if spec.dtype == "F32" and encoded[name].dtype == "I8":
            if _scale(name) in schema:
                raise UsageError(
                    f"tensor {_scale(name)!a} has the name that int8 needs for the scale of"
                    f' {name!a}: rename it, or set wire = "bfloat16"'
                )
            encoded[_scale(name)] = TensorSpec("F32", _scale_shape(spec.shape))
    return encoded


def encoding_of(header: Header) -> Encoding:
    """Return how the file with this header is encoded; a file that says nothing is not encoded.

    Raises:
        InvalidError: INVALID_FILE, the metadata are not known here.
    """
    try:
        return Encoding.model_validate_json(header.metadata.get(_ENTRY, "{}"))
    except ValidationError as error:
        raise InvalidError(
            f"the weights have an unknown encoding: their metadata entry {_ENTRY} is not one of ECAvg's",
            Reason.INVALID_FILE,
        ) from error


def check_encoded(header: Header, schema: Schema, wire: Wire, *, base_digest: str | None = None) -> None:
    """Check all but the values of a file: it must be what encoding makes of weights of this schema.

    Args:
        base_digest: the digest of the base that differences must be from; only int8 has one.

    Raises:
        InvalidError: INVALID_FILE or SCHEMA_MISMATCH; INITIAL_WEIGHTS, it was made with another base.
        UsageError: weights of this schema cannot be encoded.
        ValueError: int8 without a base.
    """
    found = encoding_of(header)
    if found.wire != wire:
        raise InvalidError(
            f'the weights are encoded as {found.wire}: set wire = "{wire}"', Reason.SCHEMA_MISMATCH
        )
    expected = _encoding(schema, wire, base_digest)
    if found.base != expected.base:
        raise InvalidError(
            f"the weights are differences from {_short(found.base)}, not from {_short(expected.base)}:"
            " encode them with the round's initial weights as base",
            Reason.INITIAL_WEIGHTS,
        )
    if found != expected:
        raise InvalidError(
            "the weights' metadata are wrong about which tensors were BF16 before", Reason.SCHEMA_MISMATCH
        )
    check_weights(header, wire_schema(schema, wire))


def check_values(path: Path, header: Header) -> None:
    """Check that decoding a file that `check_encoded` let pass gives finite values, without the base.

    Differences may take up half of what float32 can say, and are taken not to meet a base beyond the other.

    Raises:
        InvalidError: NON_FINITE, naming the first tensor whose values are not.
        OSError: the file cannot be read.
    """
    check_finite(path, header)
    with path.open("rb") as file:
        tensors = TensorFile(file, header)
        for name, spec in header.schema.items():
            scale = header.schema.get(_scale(name))
            if spec.dtype != "I8" or not scale or scale.dtype != "F32":
                continue
            if np.abs(tensors.read(_scale(name), 0, scale.shape)).max(initial=0) > _LARGEST_SCALE:
                raise InvalidError(
                    f"tensor {name!a} has differences that are too large for float32: lower the learning"
                    " rate, or look for broken input data",
                    Reason.NON_FINITE,
                )


def encode(
    weights: Path,
    target: Path,
    wire: Wire,
    *,
    base: Base | None = None,
    residual: Path | None = None,
    next_residual: Path | None = None,
) -> None:
    """Write `target`, the encoded weights, durably; "float32" is a plain copy.

    The caller keeps the residuals: `residual` is what the file sent last has lost, `next_residual` becomes
    what this one loses, and is there before `target` is. As long as they are two files, encoding again after
    a crash gives the same bytes. They are float32: rounded themselves, they would lose a little in every
    round. "float32" loses nothing and touches neither. Nothing is kept of running statistics: added to a
    variance it could make it negative.

    Args:
        weights: a safetensors file, not encoded.
        base: with the names, shapes and dtypes of the weights; needed for int8, and used by nothing else.

    Raises:
        ValueError: int8 without a base.
        RunError: a file is not usable, does not fit the others, or holds NaN or infinite values.
        OSError: a file cannot be read or written.
    """
    if wire == "int8" and not base:
        raise ValueError("int8 needs a base")
    try:
        header = read_header(weights)
        check_finite(weights, header)
        if encoding_of(header).wire != "float32":
            raise InvalidError("they are encoded already")
        if wire == "float32":
            _copy(weights, target)
        else:
            _encode(weights, target, wire, base if wire == "int8" else None, residual, next_residual)
    except InvalidError as error:
        raise RunError(f"cannot encode the weights in {weights}: {error}") from error


def decode(encoded: Path, target: Path, *, base: Base | None = None) -> None:
    """Write `target`, durably: weights with the names, shapes and dtypes they had before they were encoded.

    The same encoded file and base give the same bytes on every machine. What is not encoded is copied.

    Args:
        base: what int8 was made with; used by nothing else.

    Raises:
        InvalidError: INVALID_FILE, SCHEMA_MISMATCH or NON_FINITE, it is not what encoding makes, or the
            values are not finite; INITIAL_WEIGHTS, it was made with another base.
        RunError: the base is not usable.
        OSError: a file cannot be read or written.
    """
    header = read_header(encoded)
    encoding = encoding_of(header)
    if encoding.wire == "float32":
        check_finite(encoded, header)
        _copy(encoded, target)
        return
    if encoding.wire == "bfloat16":
        base = None
    elif not base:
        raise InvalidError(
            f"the weights are differences from {_short(encoding.base)}, which is not there",
            Reason.INITIAL_WEIGHTS,
        )
    schema = own_header(base.path).schema if base else _schema_before_rounding(header, encoding)
    check_encoded(header, schema, encoding.wire, base_digest=base.digest if base else None)
    with (
        reading(encoded, header.schema) as source,
        reading(base and base.path, schema) as origin,
        writing(target, schema, PLAIN) as decoded,
        np.errstate(over="ignore", invalid="ignore"),  # what is written is checked
    ):
        for name in schema:
            _decode_tensor(name, source, origin, decoded)


def _encode(
    weights: Path,
    target: Path,
    wire: Wire,
    base: Base | None,
    residual: Path | None,
    next_residual: Path | None,
) -> None:
    schema = read_header(weights).schema
    encoding = _encoding(schema, wire, base.digest if base else None)
    metadata = {_ENTRY: encoding.model_dump_json(exclude_defaults=True)}
    kept = {name: spec for name, spec in schema.items() if spec.dtype == "F32" and not is_statistic(name)}
    with (
        reading(weights, schema) as source,
        reading(base and base.path, schema) as origin,
        reading(residual, kept) as last,
        writing(target, wire_schema(schema, wire), metadata) as encoded,
        writing(next_residual, kept, PLAIN) as left,
        np.errstate(over="ignore", invalid="ignore"),  # what is written is checked
    ):
        for name in schema:
            _encode_tensor(name, source, origin, last, encoded, left)


def _encode_tensor(
    name: str, source: TensorFile, origin: TensorFile, last: TensorFile, encoded: TensorFile, left: TensorFile
) -> None:
    spec, wire_dtype = source.schema[name], encoded.schema[name].dtype
    if wire_dtype == spec.dtype:
        source.copy_to(encoded, name)
        return
    for begin, shape in _pieces(spec.shape):
        values: Floats = source.read(name, begin, shape)
        added: Floats = last.read(name, begin, shape)
        if wire_dtype == "I8":
            start: Floats = origin.read(name, begin, shape)
            steps, scale = _quantised(values - start + added)
            encoded.write(name, begin, steps)
            encoded.write(_scale(name), begin // shape[1], scale)
            decoded = _dequantised(steps, scale, start)
        else:
            bits = _rounded(values + added)
            encoded.write(name, begin, bits)
            decoded = _widened(bits)
        left.write(name, begin, values - decoded + added)


def _decode_tensor(name: str, source: TensorFile, origin: TensorFile, decoded: TensorFile) -> None:
    spec, wire_dtype = decoded.schema[name], source.schema[name].dtype
    if wire_dtype == spec.dtype:
        source.copy_to(decoded, name)
        return
    for begin, shape in _pieces(spec.shape):
        values = source.read(name, begin, shape)
        if wire_dtype == "I8":
            scale: Floats = source.read(_scale(name), begin // shape[1], shape[:1])
            values = _dequantised(values, scale, origin.read(name, begin, shape))
        else:
            values = _widened(values)
        decoded.write(name, begin, values)


def _quantised(changes: Floats) -> tuple[Array, Floats]:
    """Return the changes [C, n] as int8 [C, n], the nearest multiples of a scale [C]: largest / 127."""
    scale: Floats = np.abs(changes).max(axis=1) / np.float32(_NUM_STEPS)
    scale[scale < _LEAST_SCALE] = 0
    steps = changes / np.where(scale > 0, scale, np.float32(1))[:, None]
    return np.rint(steps, out=steps).astype(np.int8), scale


def _dequantised(steps: Array, scale: Floats, start: Floats) -> Floats:
    """Return the base's values [C, n] plus int8 [C, n] times scale [C]: two operations, two roundings."""
    values = steps.astype(np.float32)
    values *= scale[:, None]
    values += start
    return values


def _rounded(values: Floats) -> Array:
    """Return the bits of the nearest BF16, of two the even one; values beyond the largest become infinite."""
    bits = values.view(np.uint32)
    odd = bits >> 16 & 1
    return ((bits + (odd + 0x7FFF)) >> 16).astype(np.uint16)


def _widened(bits: Array) -> Floats:
    """Return the values of BF16, given its bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _pieces(shape: tuple[int, ...]) -> Iterator[tuple[int, tuple[int, int]]]:
    """Yield where pieces of a tensor begin, and their shapes [C, n]: whole channels, one scale for each."""
    num_channels = math.prod(_scale_shape(shape))
    channel_elements = math.prod(shape) // max(num_channels, 1)
    if not channel_elements:
        return
    step = max(PIECE_ELEMENTS // channel_elements, 1)
    for first in range(0, num_channels, step):
        yield first * channel_elements, (min(step, num_channels - first), channel_elements)


def _scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:1] if math.prod(shape[1:]) > 1 else ()


def _scale(name: str) -> str:
    return f"{name}.scale"


def is_statistic(name: str) -> bool:
    """Return True if the tensor of this name is one of BatchNorm's running statistics."""
    return name.rpartition(".")[2] in _STATISTICS


def _wire_dtype(name: str, spec: TensorSpec, wire: Wire) -> str:
    if wire == "float32" or spec.dtype != "F32":
        return spec.dtype
    return "BF16" if wire == "bfloat16" or is_statistic(name) else "I8"


def _encoding(schema: Schema, wire: Wire, base_digest: str | None) -> Encoding:
    if wire != "bfloat16":
        return Encoding(wire=wire, base=base_digest if wire == "int8" else None)
    return Encoding(wire=wire, as_is=tuple(sorted(name for name in schema if schema[name].dtype == "BF16")))


def _schema_before_rounding(header: Header, encoding: Encoding) -> Schema:
    """Return what a file encoded as bfloat16 was before, if its metadata are right."""
    as_is = set(encoding.as_is)
    return {
        name: TensorSpec("F32", spec.shape) if spec.dtype == "BF16" and name not in as_is else spec
        for name, spec in header.schema.items()
    }


def _short(digest: str | None) -> str:
    return f"{digest[:16]}…" if digest else "nothing"


def _copy(path: Path, target: Path) -> None:
    with replacing(target) as partial:
        shutil.copyfile(path, partial)
