"""Files that no good agent sends, in uploads that are otherwise as they should be."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from ecavg.common.errors import Reason
from ecavg.common.schema import MAX_HEADER_BYTES
from tests.hostile.target import IMAGE_SHAPE, Agent, Target, chunk, digest_of, header, refusal_of
from tests.unit.test_schema import entry, file_bytes

Weights = dict[str, np.ndarray]

# ---------------------------------------------------------------------- whatever the file should be


def length_of(num_bytes: int) -> bytes:
    return num_bytes.to_bytes(8, "little")


def tensors(**entries: dict[str, Any]) -> bytes:
    """With as much data as the largest offset says."""
    ends = [each["data_offsets"][1] for each in entries.values()]
    return file_bytes(entries, bytes(max(ends)))


HEADERS: Mapping[str, bytes] = {
    "no bytes but a length": length_of(2),
    "header of no length": length_of(0) + b"{}",
    "header of 67 MB": length_of(67_000_000) + b'{"a":',
    "header of 2^63 bytes": length_of(2**63) + b"{}",
    "header of 2^64-1 bytes": length_of(2**64 - 1) + b"{}",
    "header longer than the file": length_of(1000) + b'{"a":',
    "header just over the limit": length_of(MAX_HEADER_BYTES + 1) + b" " * (MAX_HEADER_BYTES + 1),
    "million tensors": length_of(45_000_000) + b'{"0":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"1":',
    "hundred thousand tensors": file_bytes({str(n): entry(data_offsets=(0, 4)) for n in range(100_000)}),
    "not JSON": file_bytes(b"{]"),
    "not an object": file_bytes(b"[]"),
    "a text": file_bytes(b'"{}"'),
    "leading blanks": file_bytes(b"  {}"),
    "byte order mark": file_bytes(b"\xef\xbb\xbf{}"),
    "not UTF-8": file_bytes(b'{"\xff":1}'),
    "zeros": file_bytes(bytes(100)),
    "something behind the object": file_bytes(b"{} {}"),
    "half a surrogate for a name": file_bytes(b'{"\\ud800":' + json.dumps(entry()).encode() + b"}", bytes(4)),
    "half a surrogate in the metadata": file_bytes(b'{"__metadata__":{"ecavg":"\\ud800"}}'),
    "duplicate names": file_bytes(
        b'{"a":' + json.dumps(entry()).encode() + b',"a":' + json.dumps(entry()).encode() + b"}", bytes(4)
    ),
    "duplicate keys": file_bytes(
        b'{"a":{"dtype":"U8","dtype":"F32","shape":[4],"data_offsets":[0,4]}}', bytes(4)
    ),
    "deep nesting": file_bytes(b'{"a":' + b"[" * 500_000 + b"]" * 500_000 + b"}"),
    "deep nesting of objects": file_bytes(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "integer of a million digits": file_bytes(b'{"a":' + b"9" * 1_000_000 + b"}"),
    "NaN": file_bytes(b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,4]}}', bytes(4)),
    "Infinity": file_bytes(b'{"a":{"dtype":"U8","shape":[Infinity],"data_offsets":[0,4]}}', bytes(4)),
    "sizes in floating point": file_bytes(
        b'{"a":{"dtype":"U8","shape":[4.0],"data_offsets":[0,4]}}', bytes(4)
    ),
    "sizes as truth values": tensors(a=entry(shape=[True] * 4)),
    "sizes as texts": tensors(a=entry(shape=["4"])),
    "shape of shapes": tensors(a=entry(shape=[[4]])),
    "no shape": file_bytes({"a": {"dtype": "U8", "data_offsets": [0, 4]}}, bytes(4)),
    "one key too many": file_bytes({"a": entry() | {"requires_grad": True}}, bytes(4)),
    "tensor without a name": file_bytes({"": entry()}, bytes(4)),
    "negative size": tensors(a=entry(shape=[-4])),
    "negative sizes with a positive product": tensors(a=entry(shape=[-2, -2])),
    "negative offset": file_bytes({"a": entry(data_offsets=[-4, 0])}, bytes(4)),
    "offsets in the wrong order": file_bytes({"a": entry(data_offsets=[4, 0])}, bytes(4)),
    "three offsets": file_bytes({"a": entry(data_offsets=[0, 2, 4])}, bytes(4)),
    "overlap": tensors(a=entry(), b=entry(data_offsets=[2, 6])),
    "the same bytes twice": tensors(a=entry(), b=entry()),
    "gap": tensors(a=entry(), b=entry(data_offsets=[8, 12])),
    "gap at the start": tensors(a=entry(data_offsets=[4, 8])),
    "bytes of no tensor": file_bytes({"a": entry()}, bytes(400)),
    "offsets beyond the size": file_bytes({"a": entry(shape=[1 << 40], data_offsets=[0, 1 << 40])}, bytes(4)),
    "offsets over 2^63": file_bytes({"a": entry(shape=[2**64], data_offsets=[0, 2**64])}, bytes(4)),
    "product that is 0 modulo 2^64": file_bytes(
        {"a": entry("F32", [2**32, 2**32], [0, 0])}
    ),
    "product that is 4 modulo 2^64": file_bytes(
        {"a": entry("U8", [2**62 + 1, 4], [0, 4])}, bytes(4)
    ),
    "bytes that are 4 modulo 2^64": file_bytes({"a": entry("F32", [2**62 + 1], [0, 4])}, bytes(4)),
    "product over 2^64 times nothing": file_bytes({"a": entry("U8", [2**62, 2**62, 0], [0, 0])}),
    "hundred thousand sizes": file_bytes({"a": entry("U8", [2**60] * 40_000, [0, 4])}, bytes(4)),
    "unknown dtype": tensors(a=entry("F128")),
    "dtype that is no text": tensors(a=entry(["U8"])),
    "dtype of numpy": tensors(a=entry("<f4")),
    "dtype of objects": tensors(a=entry("O")),
    "dtype below one byte": tensors(a=entry("F4", [8])),
    "metadata that are no texts": file_bytes({"__metadata__": {"a": 1}}),
    "metadata that are a list": file_bytes({"__metadata__": ["a"]}),
    "metadata as a tensor": file_bytes({"__metadata__": entry()}, bytes(4)),
}  # fmt: skip


ANNOUNCED_BYTES = {"header of 67 MB": 70_000_000, "million tensors": 46_000_000}  # more than is sent


@pytest.mark.parametrize("kind", ["weights", "data"])
@pytest.mark.parametrize("name", HEADERS)
def test_file_against_the_rules_of_the_format_is_refused(
    target: Target, attacker: Agent, name: str, kind: str
) -> None:
    content = HEADERS[name]
    size_bytes = ANNOUNCED_BYTES.get(name, len(content))
    is_large = kind == "weights" and size_bytes > MAX_HEADER_BYTES
    reasons = {Reason.INVALID_FILE, Reason.SIZE_LIMIT} if is_large else {Reason.INVALID_FILE}
    pieces = [content[begin : begin + 300_000] for begin in range(0, len(content), 300_000)]
    refused = refusal_of(
        lambda: attacker.send(header(content, kind, size_bytes=size_bytes), *map(chunk, pieces))
    )
    assert refused.reason in reasons
    assert str(refused).isprintable()
    assert len(str(refused)) < 500
    assert attacker.query(digest_of(content), kind) == (0, False)


# ---------------------------------------------------------------------- weights


def changed(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Weights], bytes]:
    """Weights of the run, but for this tensor."""
    return lambda weights: save(weights | {name: np.ascontiguousarray(change(weights[name]))})


def with_value(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(values: np.ndarray) -> np.ndarray:
        copy = values.copy()
        copy.flat[-1] = value
        return copy

    return change


def with_bits(bits: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(values: np.ndarray) -> np.ndarray:
        copy = values.copy()
        copy.view(np.uint32).flat[0] = bits
        return copy

    return change


def with_metadata(**metadata: str) -> Callable[[Weights], bytes]:
    return lambda weights: save(weights, metadata=metadata)


INT8 = json.dumps({"wire": "int8", "base": "0" * 64})

WEIGHTS: Mapping[str, tuple[Callable[[Weights], bytes], Reason]] = {
    "no tensors": (lambda _: file_bytes({}), Reason.SCHEMA_MISMATCH),
    "missing tensor": (
        lambda weights: save({name: value for name, value in weights.items() if name != "3.bias"}),
        Reason.SCHEMA_MISMATCH,
    ),
    "tensor too many": (lambda weights: save(weights | {"4.bias": np.zeros(4)}), Reason.SCHEMA_MISMATCH),
    "name that is a path": (
        lambda weights: save(weights | {"../../../etc/passwd": np.zeros(4)}),
        Reason.SCHEMA_MISMATCH,
    ),
    "name that forges a line of the log": (
        lambda weights: save(weights | {'\n{"event": "ready"}\x1b[2J': np.zeros(4)}),
        Reason.SCHEMA_MISMATCH,
    ),
    "as many tensors as a header holds": (
        lambda _: file_bytes({f"{n}": entry("U8", [0], [0, 0]) for n in range(16_000)}),
        Reason.INVALID_FILE,
    ),
    "other shape, same number": (changed("3.weight", np.transpose), Reason.SCHEMA_MISMATCH),
    "flat": (changed("1.weight", np.ravel), Reason.SCHEMA_MISMATCH),
    "empty tensor": (changed("1.bias", lambda values: values[:0]), Reason.SCHEMA_MISMATCH),
    "float64": (changed("1.bias", lambda values: values.astype(np.float64)), Reason.SCHEMA_MISMATCH),
    "float16": (changed("1.bias", lambda values: values.astype(np.float16)), Reason.SCHEMA_MISMATCH),
    "integers": (changed("1.bias", lambda values: values.view(np.int32)), Reason.SCHEMA_MISMATCH),
    "bool": (changed("1.bias", lambda values: values > 0), Reason.SCHEMA_MISMATCH),
    "NaN": (changed("3.bias", with_value(np.nan)), Reason.NON_FINITE),
    "signalling NaN": (changed("3.weight", with_bits(0xFFA00000)), Reason.NON_FINITE),
    "infinity": (changed("1.weight", with_value(np.inf)), Reason.NON_FINITE),
    "minus infinity": (changed("1.weight", with_value(-np.inf)), Reason.NON_FINITE),
    "encoded otherwise than the run": (with_metadata(ecavg=INT8), Reason.SCHEMA_MISMATCH),
    "bfloat16 by its word": (with_metadata(ecavg='{"wire":"bfloat16"}'), Reason.SCHEMA_MISMATCH),
    "unknown encoding": (with_metadata(ecavg='{"wire":"pickle"}'), Reason.INVALID_FILE),
    "encoding that is no JSON": (with_metadata(ecavg="import os"), Reason.INVALID_FILE),
    "encoding that is nested deeply": (with_metadata(ecavg="[" * 100_000), Reason.INVALID_FILE),
    "base that is a path": (
        with_metadata(ecavg='{"wire":"int8","base":"../../../../etc/passwd"}'),
        Reason.INVALID_FILE,
    ),
    "base with a line feed": (
        with_metadata(ecavg=json.dumps({"wire": "int8", "base": "0" * 64 + "\n"})),
        Reason.INVALID_FILE,
    ),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_are_not_the_runs_are_refused(target: Target, attacker: Agent, name: str) -> None:
    make, reason = WEIGHTS[name]
    content = make(target.initial_weights)
    refused = refusal_of(lambda: attacker.upload(content, "weights"))
    assert refused.reason is reason
    assert str(refused).isprintable()
    assert attacker.query(digest_of(content), "weights") == (0, False)


def test_metadata_that_nobody_knows_are_nothing_but_bytes(target: Target, attacker: Agent) -> None:
    """The format allows them; they are stored, and read by nobody."""
    content = save(target.initial_weights, metadata={"__reduce__": "os.system", "../evil": "x" * 1000})
    assert attacker.query(attacker.upload(content, "weights"), "weights") == (len(content), True)


# ---------------------------------------------------------------------- shards


def images(*shape: int, dtype: Any = np.uint8) -> np.ndarray:
    return np.zeros(shape, dtype)


def labels(*values: int, dtype: Any = np.int64) -> np.ndarray:
    return np.array(values, dtype)


def shards(*examples: tuple[np.ndarray, np.ndarray]) -> list[bytes]:
    return [save({"images": image, "labels": label}) for image, label in examples]


GOOD = images(4, *IMAGE_SHAPE)
HUGE = 2**40

SHARDS: Mapping[str, bytes] = {
    **dict(zip(
        ["three channels", "wider", "no channel axis", "one axis more", "larger in all", "one pixel"],
        shards(
            (images(4, 3, 8, 8), labels(0, 1, 2, 3)),
            (images(4, 1, 8, 9), labels(0, 1, 2, 3)),
            (images(4, 8, 8), labels(0, 1, 2, 3)),
            (images(4, 1, 1, 8, 8), labels(0, 1, 2, 3)),
            (images(1, 1, 4000, 4000), labels(0)),
            (images(4, 1, 1, 1), labels(0, 1, 2, 3)),
        ), strict=True,
    )),
    **dict(zip(
        ["images in float32", "images as int8", "labels in int32", "labels in float64", "labels as bool"],
        shards(
            (images(4, *IMAGE_SHAPE, dtype=np.float32), labels(0, 1, 2, 3)),
            (images(4, *IMAGE_SHAPE, dtype=np.int8), labels(0, 1, 2, 3)),
            (GOOD, labels(0, 1, 2, 3, dtype=np.int32)),
            (GOOD, labels(0, 1, 2, 3, dtype=np.float64)),
            (GOOD, labels(0, 1, 1, 0, dtype=np.bool_)),
        ), strict=True,
    )),
    **dict(zip(
        ["a class too many", "label -1", "least label", "largest label", "fewer labels", "more labels",
         "labels in two axes", "no examples", "a single label"],
        shards(
            (GOOD, labels(0, 1, 2, 10)),
            (GOOD, labels(-1, 1, 2, 3)),
            (GOOD, labels(0, 1, 2, -(2**63))),
            (GOOD, labels(0, 1, 2, 2**63 - 1)),
            (GOOD, labels(0, 1, 2)),
            (GOOD, labels(0, 1, 2, 3, 4)),
            (GOOD, np.zeros((4, 1), np.int64)),
            (images(0, *IMAGE_SHAPE), labels()),
            (GOOD, np.array(1)),
        ), strict=True,
    )),
    "no labels": save({"images": GOOD}),
    "a third tensor": save({"images": GOOD, "labels": labels(0, 1, 2, 3), "../x": GOOD}),
    "other names": save({"data": GOOD, "targets": labels(0, 1, 2, 3)}),
    "weights": save({"1.bias": np.zeros(4, np.float32)}),
}  # fmt: skip


@pytest.mark.parametrize("name", SHARDS)
def test_shard_that_does_not_fit_the_run_is_refused(target: Target, attacker: Agent, name: str) -> None:
    refused = refusal_of(lambda: attacker.upload(SHARDS[name], "data"))
    assert refused.reason is Reason.INVALID_SHARD
    assert attacker.query(digest_of(SHARDS[name]), "data") == (0, False)


def test_shard_with_more_examples_than_bytes_is_refused(target: Target, attacker: Agent) -> None:
    """2^40 examples are announced, and room is made for none."""
    num_bytes = 64 * HUGE
    announced = {
        "images": entry("U8", [HUGE, *IMAGE_SHAPE], [0, num_bytes]),
        "labels": entry("I64", [HUGE], [num_bytes, num_bytes + 8 * HUGE]),
    }
    content = file_bytes(announced, bytes(100))
    assert refusal_of(lambda: attacker.upload(content, "data")).reason is Reason.INVALID_FILE
    whole = header(content, "data", size_bytes=len(content) - 100 + 72 * HUGE)
    assert refusal_of(lambda: attacker.send(whole, chunk(content))).reason is Reason.SIZE_LIMIT


def test_shard_that_is_cut_off_is_refused(target: Target, attacker: Agent) -> None:
    content = save({"images": GOOD, "labels": labels(0, 1, 2, 3)})[:-8]
    assert refusal_of(lambda: attacker.upload(content, "data")).reason is Reason.INVALID_FILE
