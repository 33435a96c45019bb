"""The shards of this agent on its disk: written files keep their bytes, new examples become a new shard.

The server knows by digest whatever it was sent once. So when the data grow, only the new examples travel.
Where the target of an example becomes known after its shard was written, the shard stays as it is, and the
target is written to a file beside it.
"""

from collections.abc import Iterable, Iterator, Mapping
from hashlib import blake2b
from itertools import repeat
from pathlib import Path

import numpy as np

from ecavg.common.dataset import Targets
from ecavg.common.errors import InvalidError
from ecavg.common.late_targets import LateTargets, write_late_targets
from ecavg.common.shards import Shard, has_target, read_shard, write_shard

# The server is asked for each shard in every round; where there are more, all become one again.
MAX_SHARDS = 256
_MAX_KEY_BYTES = 64
# Of a run whose examples all have targets.
_NONE_MISSING = Targets("int64")
# The key of the identity of an input whose target is not known.
_NO_TARGET = b"no target"


def keep_shards(folder: Path, train: Shard, described: Targets = _NONE_MISSING) -> list[Path]:
    """Make the shard files in `folder` hold the examples of `train`, and no others.

    A file stays as it is while all of its examples are still in `train`. The examples that no such file holds
    become one new shard, in the order of `train`. An example is its input and its target, wherever it comes
    from: a copy of one that is in a file already is not new, nor is one that is there without its target.
    When this is cut off and called again, it gives the same files. Without examples there are no files.

    Args:
        described: the targets of the run, of which some may be missing.

    Returns:
        The files in the order in which they came to be.

    Raises:
        OSError: the folder or the disk does not let it.
    """
    folder.mkdir(exist_ok=True)
    files = sorted(folder.glob("*.safetensors"))
    own = _identities(train, described)
    # An example may be in a file with its target or, where some are missing, without it.
    both = [own, _without_targets(train.inputs)] if described.missing else [own]
    identities, places = np.unique(both, return_inverse=True)
    is_kept = np.zeros(len(identities), bool)
    kept = []
    for path in files:
        found = _identities_in(path, train.inputs.shape[1:], described)
        if not len(found) or not np.isin(found, identities).all():
            continue
        where = np.searchsorted(identities, found)
        if not is_kept[where].any():
            is_kept[where] = True
            kept.append(path)
    is_new = ~is_kept[places.reshape(len(both), -1)].any(0)
    if is_new.any() and len(kept) == MAX_SHARDS:
        kept, is_new = [], np.ones(len(own), bool)
    if is_new.any():
        number = int(files[-1].stem) + 1 if files else 1
        kept.append(folder / f"{number:06}.safetensors")
        write_shard(kept[-1], train if is_new.all() else Shard(*(array[is_new] for array in train)))
    for path in set(files) - set(kept):
        path.unlink()
        path.with_suffix(".targets").unlink(missing_ok=True)
    return kept


def keep_late_targets(shards: Mapping[Path, str], train: Shard, described: Targets) -> list[Path]:
    """Make the files beside the shards hold the targets of `train` that the shards themselves lack.

    Args:
        shards: the digest of each shard's file.
        described: the targets of the run.

    Returns:
        The files, in the order of the shards.

    Raises:
        OSError: the disk does not let it.
    """
    if not described.missing:
        return []
    has_targets = has_target(train.targets, described)
    targets = train.targets[has_targets]
    known, places = np.unique(_without_targets(train.inputs[has_targets]), return_index=True)
    files = []
    for path, digest in shards.items():
        sent, file = read_shard(path), path.with_suffix(".targets")
        rows = np.flatnonzero(~has_target(sent.targets, described))
        identities = _without_targets(sent.inputs[rows])
        is_known = np.isin(identities, known)
        if is_known.any():
            told = targets[places[np.searchsorted(known, identities[is_known])]]
            write_late_targets(file, LateTargets(digest, rows[is_known], told))
            files.append(file)
        else:
            file.unlink(missing_ok=True)
    return files


def input_digests(inputs: np.ndarray, keys: Iterable[bytes]) -> np.ndarray:
    """Return for each of [N, …] a number that follows from its values and a key: uint64 [N].

    The numbers are spread evenly. Two inputs have the same one by chance once in 2^64.
    """
    numbers = (
        int.from_bytes(blake2b(np.ascontiguousarray(values).data, digest_size=8, key=key).digest())
        for values, key in zip(inputs, keys, strict=True)
    )
    return np.fromiter(numbers, np.uint64, len(inputs))


def _identities(shard: Shard, described: Targets) -> np.ndarray:
    has_targets = has_target(shard.targets, described)
    keys = (
        key if known else _NO_TARGET
        for key, known in zip(_target_keys(shard.targets), has_targets, strict=True)
    )
    return input_digests(np.asarray(shard.inputs), keys)


def _without_targets(inputs: np.ndarray) -> np.ndarray:
    """Return the identities that inputs have as long as their targets are not known."""
    return input_digests(np.asarray(inputs), repeat(_NO_TARGET, len(inputs)))


def _target_keys(targets: np.ndarray) -> Iterator[bytes]:
    """Yield for each target, of [N, …], a key that follows from its values."""
    for target in targets:
        values: bytes = target.tobytes()
        # A key has at most 64 bytes.
        yield values if len(values) <= _MAX_KEY_BYTES else blake2b(values).digest()


def _identities_in(path: Path, input_shape: tuple[int, ...], described: Targets) -> np.ndarray:
    """Return the identities of the examples in a file; none where it is damaged, or of another shape."""
    try:
        shard = read_shard(path)
    except (InvalidError, KeyError, ValueError):
        shard = None
    if shard is None or shard.inputs.shape[1:] != input_shape:
        return np.empty(0, np.uint64)
    return _identities(shard, described)
