"""Changes to a safetensors file that mostly leave it one: of its bytes, of its header, of what that says."""

import json
import random
from collections.abc import Callable
from typing import Any

from ecavg.common.schema import _DTYPE_BYTES, TensorSpec

VALUES: tuple[Any, ...] = (
    0, 1, 2, 3, 4, 8, 12, -1, 2**31, 2**32, 2**62 + 1, 2**63 - 1, 2**63, 2**64, True, None, 1.5,
    "", "x", "\ud800", [], [0], [0, 0], [0, 4], [1, 1, 2, 2], {},
    {"ecavg": "{}"}, {"ecavg": '{"wire":"bfloat16"}'},
    {"ecavg": json.dumps({"wire": "int8", "base": "0" * 64})}, *_DTYPE_BYTES,
)  # fmt: skip
KEYS = (
    "dtype",
    "shape",
    "data_offsets",
    "__metadata__",
    "images",
    "labels",
    "a",
    "b",
    "a.scale",
    "running_var",
    "n",
)


def mutated(content: bytes, max_size: int, seed: int, mutate: Callable[[bytes, int], bytes]) -> bytes:
    """Args: mutate: libFuzzer's own, of any bytes."""
    chance = random.Random(seed)
    length = int.from_bytes(content[:8], "little")
    text, data = content[8 : 8 + length], content[8 + length :]
    kind = chance.randrange(5)
    if kind == 0:
        return mutate(content, max_size)
    if kind == 1:
        text = mutate(text, max(max_size // 2, 1))
    elif kind == 2:
        data = mutate(data, max(max_size // 2, 1))
    else:
        try:
            header = json.loads(text)
        except (ValueError, RecursionError):
            return mutate(content, max_size)
        header = _changed(header, chance)
        if kind == 4 and isinstance(header, dict):
            data = _laid_out(header, data)
        text = json.dumps(header).encode("utf-8", "replace")
    return (len(text).to_bytes(8, "little") + text + data)[:max_size]


def _changed(value: Any, chance: random.Random) -> Any:
    """Return the value with one place changed, added or removed."""
    if not isinstance(value, dict | list) or not value or chance.random() < 0.1:
        return chance.choice(VALUES)
    places = list(value) if isinstance(value, dict) else range(len(value))
    place, way = chance.choice(places), chance.random()
    copy: Any = value.copy()
    if way < 0.1:
        del copy[place]
    elif way < 0.3 and isinstance(value, dict):
        copy[chance.choice(KEYS)] = copy.pop(place)
    elif way < 0.4 and isinstance(value, dict):
        copy[chance.choice(KEYS)] = value[place]
    elif way < 0.4:
        copy.append(value[place])
    else:
        copy[place] = _changed(value[place], chance)
    return copy


def _laid_out(header: dict[str, Any], data: bytes) -> bytes:
    """Offsets that fit dtypes and shapes, where these are any; and as much data."""
    end = 0
    for entry in header.values():
        try:
            num_bytes = TensorSpec(entry["dtype"], tuple(map(int, entry["shape"]))).num_bytes
            entry["data_offsets"] = [end, end + num_bytes]
        except (KeyError, TypeError, ValueError, OverflowError):
            continue
        end += num_bytes
    return data[: max(end, 0)].ljust(min(max(end, 0), 1 << 16), b"\0")
