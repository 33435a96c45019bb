"""Encoded weights that no good agent sends: to a run of int8 differences, and of bfloat16 without a base."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from ecavg.common import wire
from ecavg.common.config import Wire
from ecavg.common.errors import Reason
from ecavg.common.pb import ecavg_pb2 as pb
from ecavg.common.schema import read_header
from tests.hostile.target import Agent, Target, digest_of, refusal_of, target_in
from tests.unit.test_schema import file_bytes

Tensors = dict[str, dict[str, Any]]  # name → dtype, shape and data
Change = Callable[[Tensors], None]

OTHER_BASE = json.dumps({"wire": "int8", "base": "0" * 64})
BFLOAT16 = '{"wire":"bfloat16"}'


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    settings = ("--set", "run.wire=int8", "--set", "run.initial_weights=independent")
    with target_in(tmp_path_factory.mktemp("wires"), *settings) as target:
        yield target


def encoded(target: Target, name: Wire, folder: Path) -> tuple[Tensors, str]:
    """Good weights of the run on their way: tensors, and what the metadata say."""
    base, weights, out = (folder / each for each in ("base", "weights", "out"))
    base.write_bytes(target.witness.download(target.initial_digest))
    moved = {key: value + np.float32(0.01) for key, value in target.initial_weights.items()}
    weights.write_bytes(save(moved))
    wire.encode(weights, out, name, base=wire.Base(base, target.initial_digest))
    header, content = read_header(out), out.read_bytes()
    tensors: Tensors = {}
    for key, (begin, end) in header.offsets.items():
        data = content[header.data_start :][begin:end]
        tensors[key] = {"dtype": header.schema[key].dtype, "shape": header.schema[key].shape, "data": data}
    return tensors, header.metadata["ecavg"]


def file_of(tensors: Tensors, said: str) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"ecavg": said}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + len(tensor["data"])
        entries[name] = {"dtype": tensor["dtype"], "shape": tensor["shape"], "data_offsets": [begin, end]}
    return file_bytes(entries, b"".join(tensor["data"] for tensor in tensors.values()))


def scale_of(value: float) -> Change:
    def change(tensors: Tensors) -> None:
        scale = tensors["1.weight.scale"]
        scale["data"] = scale["data"][:-4] + np.float32(value).tobytes()

    return change


def retyped(name: str, dtype: str, shape: list[int], num_bytes: int) -> Change:
    def change(tensors: Tensors) -> None:
        tensors[name] = {"dtype": dtype, "shape": shape, "data": bytes(num_bytes)}

    return change


def without(name: str) -> Change:
    return lambda tensors: tensors.pop(name) and None


def unchanged(_: Tensors) -> None: ...


def bits_of(value: int) -> Change:
    def change(tensors: Tensors) -> None:
        bias = tensors["1.bias"]
        bias["data"] = bias["data"][:-2] + value.to_bytes(2, "little")

    return change


ATTACKS: Mapping[str, tuple[Wire, Change, str | None, Reason]] = {
    "scale that is no number": ("int8", scale_of(np.nan), None, Reason.NON_FINITE),
    "infinite scale": ("int8", scale_of(np.inf), None, Reason.NON_FINITE),
    "scale that leaves float32": ("int8", scale_of(2e36), None, Reason.NON_FINITE),
    "negative scale that leaves float32": ("int8", scale_of(-2e36), None, Reason.NON_FINITE),
    "no scale": ("int8", without("1.weight.scale"), None, Reason.SCHEMA_MISMATCH),
    "scale in float64": ("int8", retyped("1.weight.scale", "F64", [64], 512), None, Reason.SCHEMA_MISMATCH),
    "scale in int8": ("int8", retyped("1.weight.scale", "I8", [64], 64), None, Reason.SCHEMA_MISMATCH),
    "one scale for all": ("int8", retyped("1.weight.scale", "F32", [], 4), None, Reason.SCHEMA_MISMATCH),
    "no scales": ("int8", retyped("1.weight.scale", "F32", [0], 0), None, Reason.SCHEMA_MISMATCH),
    "scale of a scale": ("int8", retyped("1.weight.scale.scale", "F32", [], 4), None, Reason.SCHEMA_MISMATCH),
    "differences in int16": (
        "int8", retyped("1.weight", "I16", [64, 64], 8192), None, Reason.SCHEMA_MISMATCH,
    ),
    "differences in uint8": ("int8", retyped("1.weight", "U8", [64, 64], 4096), None, Reason.SCHEMA_MISMATCH),
    "differences of another shape": (
        "int8", retyped("1.weight", "I8", [4096], 4096), None, Reason.SCHEMA_MISMATCH,
    ),
    "int8 said to be bfloat16": ("int8", unchanged, BFLOAT16, Reason.SCHEMA_MISMATCH),
    "int8 said to be float32": ("int8", unchanged, "{}", Reason.SCHEMA_MISMATCH),
    "int8 without a base": ("int8", unchanged, '{"wire":"int8"}', Reason.INVALID_FILE),
    "base that is no digest": ("int8", unchanged, '{"wire":"int8","base":"../x"}', Reason.INVALID_FILE),
    "base that is a number": ("int8", unchanged, '{"wire":"int8","base":7}', Reason.INVALID_FILE),
    "bfloat16 with a base": (
        "bfloat16", unchanged, json.dumps({"wire": "bfloat16", "base": "0" * 64}), Reason.INVALID_FILE,
    ),
    "bfloat16 that was bfloat16 before": (
        "bfloat16", unchanged, '{"wire":"bfloat16","as_is":["1.weight"]}', Reason.SCHEMA_MISMATCH,
    ),
    "bfloat16 of tensors that there are not": (
        "bfloat16", unchanged, '{"wire":"bfloat16","as_is":["../x"]}', Reason.SCHEMA_MISMATCH,
    ),
    "bfloat16 said to be int8": ("bfloat16", unchanged, OTHER_BASE, Reason.SCHEMA_MISMATCH),
    "bfloat16 that is no number": ("bfloat16", bits_of(0x7FC0), None, Reason.NON_FINITE),
    "infinite bfloat16": ("bfloat16", bits_of(0xFF80), None, Reason.NON_FINITE),
    "unknown key": ("bfloat16", unchanged, '{"wire":"bfloat16","code":"x"}', Reason.INVALID_FILE),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_encoding_that_is_none_is_refused(target: Target, attacker: Agent, name: str, tmp_path: Path) -> None:
    way, change, said, reason = ATTACKS[name]
    tensors, truth = encoded(target, way, tmp_path)
    change(tensors)
    content = file_of(tensors, truth if said is None else said)
    refused = refusal_of(lambda: attacker.upload(content, "weights"))
    assert refused.reason is reason
    assert attacker.query(digest_of(content), "weights") == (0, False)


@pytest.mark.parametrize("way", ["int8", "bfloat16"])
def test_good_encoding_is_taken(target: Target, attacker: Agent, way: Wire, tmp_path: Path) -> None:
    """So that the attacks differ from it by what they say alone."""
    content = file_of(*encoded(target, way, tmp_path))
    assert attacker.query(attacker.upload(content, "weights"), "weights") == (len(content), True)


def test_differences_from_another_base_are_not_contributed(
    target: Target, attacker: Agent, tmp_path: Path
) -> None:
    tensors, _ = encoded(target, "int8", tmp_path)
    weights = attacker.upload(file_of(tensors, OTHER_BASE), "weights")
    request = pb.ContributeRequest(
        round=1, weights_digest=weights, num_examples=4, initial_weights_digest=target.initial_digest
    )
    assert refusal_of(lambda: attacker.stub.Contribute(request)).reason is Reason.INITIAL_WEIGHTS
