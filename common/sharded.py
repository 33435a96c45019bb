"""Weights in several files, as Hugging Face writes them: an index in JSON, and files that share the tensors.

The index `model.safetensors.index.json` maps names of tensors to names of files in its folder:
`{"metadata": {"total_size": 8}, "weight_map": {"NAME": "model-00001-of-00002.safetensors"}}`.

Format: https://huggingface.co/docs/huggingface_hub/package_reference/serialization
"""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ecavg.common.config import INDEX_SUFFIX
from ecavg.common.errors import InvalidError, Reason
from ecavg.common.files import replacing
from ecavg.common.schema import TensorSpec, read_header
from ecavg.common.tensor_files import PLAIN, own_header, reading, writing

# Each tensor has a line with its own name and a file's, so that this is for more tensors than a file holds.
MAX_INDEX_BYTES = 2**24


def weight_files(path: Path) -> list[Path]:
    """Return the files of weights: those that an index names, sorted, or the path itself if it is no index.

    Raises:
        InvalidError: INVALID_FILE, the index is not one, or a file does not have the tensors that it says.
        OSError: a file cannot be read.
    """
    if not path.name.endswith(INDEX_SUFFIX):
        return [path]
    names: dict[str, set[str]] = {}
    for tensor, file in _weight_map(path).items():
        names.setdefault(file, set()).add(tensor)
    for file, tensors in sorted(names.items()):
        if read_header(path.parent / file).schema.keys() != tensors:
            raise InvalidError(f"{file!a} does not have the tensors that the index says", Reason.INVALID_FILE)
    return [path.parent / file for file in sorted(names)]


def write_sharded(weights: Path, index: Path, max_file_bytes: int) -> None:
    """Write the weights of one file as several files and an index, which is the last to be replaced.

    The names of the files begin with those of the index and of the content, so that the files of an earlier
    index stay whole until this one is there. They are removed then.

    Args:
        weights: the file to divide.
        index: the index to write, in a folder that has no other weights.
        max_file_bytes: the most bytes of tensors in a file; a larger tensor has a file of its own.

    Raises:
        RunError: `weights` is not usable.
        OSError: a file cannot be read or written.
    """
    header = own_header(weights)
    parts: list[dict[str, TensorSpec]] = [{}]
    for name, spec in header.schema.items():
        if parts[-1] and _num_bytes(parts[-1]) + spec.num_bytes > max_file_bytes:
            parts.append({})
        parts[-1][name] = spec
    stem, stamp = index.name.removesuffix(INDEX_SUFFIX), weights.stat().st_mtime_ns
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        file = f"{stem}-{stamp:x}-{number:05}-of-{len(parts):05}.safetensors"
        weight_map |= dict.fromkeys(part, file)
        with (
            reading(weights, header.schema) as source,
            writing(index.with_name(file), part, PLAIN) as target,
        ):
            for name in part:
                source.copy_to(target, name)
    text = {"metadata": {"total_size": _num_bytes(header.schema)}, "weight_map": weight_map}
    with replacing(index) as partial:
        partial.write_text(json.dumps(text, indent=2) + "\n", "utf-8")
    _remove_all_but(set(weight_map.values()), index)


def remove_sharded(index: Path) -> None:
    """Remove an index and the files that `write_sharded` has written with it; there may be none."""
    index.unlink(missing_ok=True)
    _remove_all_but(set(), index)


def _remove_all_but(needed: Collection[str], index: Path) -> None:
    """Remove the files of an index but those with these names."""
    for path in index.parent.glob(f"{index.name.removesuffix(INDEX_SUFFIX)}-*-of-*.safetensors"):
        if path.name not in needed:
            path.unlink()


def _num_bytes(schema: Mapping[str, TensorSpec]) -> int:
    return sum(spec.num_bytes for spec in schema.values())


def _weight_map(path: Path) -> dict[str, str]:
    """Return the map of an index, from the names of tensors to the names of files in the index's folder."""
    with path.open("rb") as file:
        content = file.read(MAX_INDEX_BYTES + 1)
    try:
        index: Any = json.loads(content) if len(content) <= MAX_INDEX_BYTES else None
    except (ValueError, RecursionError):
        index = None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(map(_is_file_name, weight_map.values())):
        raise InvalidError(
            "not an index of weights: it should be JSON with a weight_map from tensors to files beside it",
            Reason.INVALID_FILE,
        )
    return weight_map


def _is_file_name(value: object) -> bool:
    return isinstance(value, str) and value.endswith(".safetensors") and Path(value).name == value
