"""Targets that become known after their shard was sent: a small safetensors file beside the shard.

The file says which shard it is for, by digest, and which rows of it have which targets. It travels as a shard
does, is named in a contribution as shards are, and so lives and is deleted with them. The shard keeps its
bytes. The file has all targets of the shard that came later: where one more comes, or one is corrected, a new
file takes its place.

Shape letters: N examples of a shard, M of them with a target that came later.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from ecavg.common.dataset import DatasetSpec
from ecavg.common.errors import InvalidError, Reason
from ecavg.common.files import replacing
from ecavg.common.schema import (
    Header,
    TensorSpec,
    check_tensor,
    dtype_name,
    missing_rows,
    num_examples,
    pieces,
    read_header,
)
from ecavg.common.shards import Shard, cloud_holdout, has_target, read_shard, read_tensors

_NAMES = ("rows", "targets")
# The key of the shard's digest in the file's metadata.
_SHARD = "shard"


class LateTargets(NamedTuple):
    """Targets of some examples of a shard."""

    # The digest of the shard's file.
    shard: str
    # int64 [M], rising.
    rows: np.ndarray
    # [M, …], none of them missing.
    targets: np.ndarray


class KnownShard(NamedTuple):
    """A shard with the targets that are known now."""

    shard: Shard
    # The targets in the shard's own file, [N, …], by which it is split: they never change.
    sent: np.ndarray

    def split(self, spec: DatasetSpec, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Return indices as `cloud_holdout` does, without examples whose target is not known."""
        is_known = has_target(self.shard.targets, spec.targets)
        rest, held_out = cloud_holdout(self.sent, fraction, seed, spec.inputs.overlap)
        return rest[is_known[rest]], held_out[is_known[held_out]]

    def unlabelled(self, spec: DatasetSpec, fraction: float, seed: int) -> np.ndarray:
        """Return indices of the examples of the rest whose target is not known."""
        rest, _ = cloud_holdout(self.sent, fraction, seed, spec.inputs.overlap)
        is_known = has_target(self.shard.targets, spec.targets)
        unlabelled: np.ndarray = rest[~is_known[rest]]
        return unlabelled


def write_late_targets(path: Path, late: LateTargets) -> None:
    """Write the targets to the file at `path`, which appears whole; the same ones always give the same bytes.

    Raises:
        OSError: the file cannot be written.
    """
    arrays = {"rows": np.ascontiguousarray(late.rows), "targets": np.ascontiguousarray(late.targets)}
    with replacing(path) as partial:
        try:
            save_file(arrays, partial, {_SHARD: late.shard})
        except SafetensorError as error:
            raise OSError(f"cannot write {path}: {error}") from error


def read_known_shards(files: Mapping[str, Path]) -> list[KnownShard]:
    """Read shards, with the targets that came later.

    Args:
        files: the files of shards and of late targets, by digest; the result has the order of the shards.

    Raises:
        InvalidError, KeyError: a file is neither of both.
        OSError: a file cannot be read.
    """
    headers = {digest: read_header(path) for digest, path in files.items()}
    late = {
        shard_of(header): read_tensors(files[digest], header, _NAMES)
        for digest, header in headers.items()
        if is_late(header)
    }
    shards = [digest for digest, header in headers.items() if not is_late(header)]
    return [_known(read_shard(files[digest]), late.get(digest)) for digest in shards]


def is_late(header: Header) -> bool:
    """Return True if the file has late targets, and is no shard."""
    return _NAMES[0] in header.schema


def shard_of(header: Header) -> str:
    """Return the digest of the shard that late targets are for."""
    return header.metadata[_SHARD]


def check_late_header(header: Header, spec: DatasetSpec) -> None:
    """Check that a file has late targets of the run's dataset.

    Raises:
        InvalidError: INVALID_SHARD, names, dtypes or shapes are others, or it is for no shard.
    """
    if not spec.targets.missing:
        _refuse("no target of this run may be missing")
    found = header.schema.get(_NAMES[1])
    size = found.shape[0] if found and found.shape else 0
    wanted = {
        "rows": TensorSpec("I64", (size,)),
        "targets": TensorSpec(dtype_name(spec.targets.dtype), (size, *spec.targets.shape)),
    }
    if header.schema != wanted or size < 1:
        _refuse("it should have rows, int64 [M], and targets like the run's, with M of at least 1")
    if set(header.metadata) != {_SHARD} or len(shard_of(header)) != 64:
        _refuse("its metadata should name a shard, by digest")


def check_late_content(path: Path, header: Header, spec: DatasetSpec) -> None:
    """Check that rows rise from 0 on, and that targets are finite, in range, and none of them missing.

    Raises:
        InvalidError: INVALID_SHARD, they are not.
        OSError: the file cannot be read.
    """
    told = spec._replace(targets=spec.targets._replace(missing=False))
    check_tensor(path, header, "targets", told.targets, told)
    last = -1
    for piece in pieces(path, header, "rows", "<i8"):
        if piece[0] <= last or (np.diff(piece) <= 0).any():
            _refuse("its rows do not rise from 0 on")
        last = int(piece[-1])


def check_contributed(headers: Mapping[str, Header], files: Mapping[str, Path], spec: DatasetSpec) -> int:
    """Check that late targets are for shards of the same contribution.

    Args:
        headers: of shards and late targets, by digest; each has passed its own checks.
        files: their files.
        spec: the dataset of the run.

    Returns:
        How many examples of the shards have a target.

    Raises:
        InvalidError: late targets are for another shard, for rows that it does not have, or there twice.
    """
    sizes = {name: num_examples(header) for name, header in headers.items() if not is_late(header)}
    told: dict[str, np.ndarray] = {}
    for digest, header in headers.items():
        if not is_late(header):
            continue
        shard, rows = shard_of(header), _rows_of(files[digest], header)
        if shard not in sizes or shard in told or rows[-1] >= sizes[shard]:
            raise InvalidError(
                f"the late targets {digest[:16]}… should be the only ones for a shard that the contribution"
                " names, and for rows that it has"
            )
        told[shard] = rows
    if not spec.targets.missing:
        return sum(sizes.values())
    return sum(_num_known(files[shard], headers[shard], told.get(shard), spec) for shard in sizes)


def _rows_of(path: Path, header: Header) -> np.ndarray:
    """Return the rows in a file of late targets, int64 [M]; the server calls this, and maps no files."""
    return np.concatenate([piece.copy() for piece in pieces(path, header, _NAMES[0], "<i8")])


def _num_known(path: Path, header: Header, told: np.ndarray | None, spec: DatasetSpec) -> int:
    """Return how many examples of a shard have a target, with those whose rows were told later."""
    is_missing = missing_rows(path, header, spec)
    if told is not None:
        is_missing[told] = False
    return int((~is_missing).sum())


def _known(sent: Shard, late: Sequence[np.ndarray] | None) -> KnownShard:
    """Return a shard with its late targets: rows and targets, if there are any."""
    if late is None:
        return KnownShard(sent, sent.targets)
    rows, told = late
    targets = np.array(sent.targets)
    targets[rows] = told
    return KnownShard(Shard(sent.inputs, targets), sent.targets)


def _refuse(problem: str) -> NoReturn:
    raise InvalidError(f"not late targets of the run's dataset: {problem}", Reason.INVALID_SHARD)
