"""The shards of this agent on its disk: written files keep their bytes, new examples become a new shard.

The server knows by digest whatever it was sent once. So when the data grow, only the new examples travel.
"""

from collections.abc import Iterable, Iterator
from hashlib import blake2b
from pathlib import Path

import numpy as np

from ecavg.common.errors import InvalidError
from ecavg.common.shards import Shard, read_shard, write_shard

# The server is asked for each shard in every round; where there are more, all become one again.
MAX_SHARDS = 256
_MAX_KEY_BYTES = 64


def keep_shards(folder: Path, train: Shard) -> list[Path]:
    """Make the shard files in `folder` hold the examples of `train`, and no others.

    A file stays as it is while all of its examples are still in `train`. The examples that no such file holds
    become one new shard, in the order of `train`. An example is its input and its target, wherever it comes
    from: a copy of one that is in a file already is not new. When this is cut off and called again, it gives
    the same files. Without examples there are no files.

    Returns:
        The files in the order in which they came to be.

    Raises:
        OSError: the folder or the disk does not let it.
    """
    folder.mkdir(exist_ok=True)
    files = sorted(folder.glob("*.safetensors"))
    identities, places = np.unique(_identities(train), return_inverse=True)
    is_kept = np.zeros(len(identities), bool)
    kept = []
    for path in files:
        found = _identities_in(path, train.inputs.shape[1:])
        if not len(found) or not np.isin(found, identities).all():
            continue
        where = np.searchsorted(identities, found)
        if not is_kept[where].any():
            is_kept[where] = True
            kept.append(path)
    is_new = ~is_kept[places]
    if is_new.any() and len(kept) == MAX_SHARDS:
        kept, is_new = [], np.ones(len(places), bool)
    if is_new.any():
        number = int(files[-1].stem) + 1 if files else 1
        kept.append(folder / f"{number:06}.safetensors")
        write_shard(kept[-1], train if is_new.all() else Shard(*(array[is_new] for array in train)))
    for path in set(files) - set(kept):
        path.unlink()
    return kept


def input_digests(inputs: np.ndarray, keys: Iterable[bytes]) -> np.ndarray:
    """Return for each of [N, …] a number that follows from its values and a key: uint64 [N].

    The numbers are spread evenly. Two inputs have the same one by chance once in 2^64.
    """
    numbers = (
        int.from_bytes(blake2b(np.ascontiguousarray(values).data, digest_size=8, key=key).digest())
        for values, key in zip(inputs, keys, strict=True)
    )
    return np.fromiter(numbers, np.uint64, len(inputs))


def _identities(shard: Shard) -> np.ndarray:
    return input_digests(np.asarray(shard.inputs), _target_keys(shard.targets))


def _target_keys(targets: np.ndarray) -> Iterator[bytes]:
    """Yield for each target, of [N, …], a key that follows from its values."""
    for target in targets:
        values: bytes = target.tobytes()
        # A key has at most 64 bytes.
        yield values if len(values) <= _MAX_KEY_BYTES else blake2b(values).digest()


def _identities_in(path: Path, input_shape: tuple[int, ...]) -> np.ndarray:
    """Return the identities of the examples in a file; none where it is damaged, or of another shape."""
    try:
        shard = read_shard(path)
    except (InvalidError, KeyError, ValueError):
        shard = None
    if shard is None or shard.inputs.shape[1:] != input_shape:
        return np.empty(0, np.uint64)
    return _identities(shard)
