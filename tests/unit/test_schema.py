import contextlib
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from ecavg.common import schema
from ecavg.common.dataset import pictures
from ecavg.common.errors import InvalidError, Reason
from ecavg.common.schema import (
    MAX_HEADER_BYTES,
    Header,
    TensorSpec,
    check_examples,
    check_finite,
    check_shard,
    check_weights,
    header_bytes_needed,
    parse_header,
    read_header,
)

LARGEST = 2**63 - 1


def file_bytes(header: bytes | dict[str, Any], data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: Any = "U8", shape: Any = (4,), data_offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": data_offsets}


def parse(content: bytes) -> Header:
    return parse_header(content, len(content))


def write(path: Path, **tensors: np.ndarray) -> Path:
    path.write_bytes(save(tensors))
    return path


def write_raw(path: Path, dtype: str, values: np.ndarray) -> Path:
    shape = [values.size * values.itemsize // schema._DTYPE_BYTES[dtype]]
    path.write_bytes(file_bytes({"t": entry(dtype, shape, (0, values.nbytes))}, values.tobytes()))
    return path


def test_header_of_a_file_by_the_library_is_read(tmp_path: Path) -> None:
    arrays = {"b": np.zeros((2, 3), np.float32), "a": np.arange(5), "scalar": np.array(1.0)}
    path = tmp_path / "x"
    path.write_bytes(save(arrays, metadata={"format": "pt"}))

    header = read_header(path)

    assert header.schema == {
        "a": TensorSpec("I64", (5,)),
        "b": TensorSpec("F32", (2, 3)),
        "scalar": TensorSpec("F64", ()),
    }
    assert header.metadata == {"format": "pt"}
    content = path.read_bytes()
    for name, (begin, end) in header.offsets.items():
        assert content[header.data_start :][begin:end] == arrays[name].tobytes()


def test_header_is_parsed_from_its_prefix_before_the_data_is_there() -> None:
    content = save({"t": np.zeros(1000)})
    needed = header_bytes_needed(content[:8])
    assert needed == len(content) - 8000
    assert parse_header(content[:needed], len(content)) == parse(content)


def test_header_length_is_unknown_before_eight_bytes() -> None:
    assert header_bytes_needed(b"\x01" * 7) is None


@pytest.mark.parametrize("length", [0, MAX_HEADER_BYTES + 1, 2**63, 2**64 - 1])
def test_header_length_is_capped_before_anything_is_read(length: int) -> None:
    with pytest.raises(InvalidError) as caught:
        header_bytes_needed(struct.pack("<Q", length))
    assert caught.value.reason is Reason.INVALID_FILE


def test_header_of_exactly_the_cap_is_accepted() -> None:
    assert parse(file_bytes(b"{}".ljust(MAX_HEADER_BYTES))).schema == {}


def test_empty_tensors_take_no_bytes() -> None:
    tensors = {"a": entry(shape=[0, 3], data_offsets=[0, 0]), "b": entry(), "c": entry("F32", [0], [4, 4])}
    assert parse(file_bytes(tensors, bytes(4))).schema["a"] == TensorSpec("U8", (0, 3))


DEEP = b'{"t": ' + b"[" * 500_000
DEEP_DTYPE = b'{"t": {"dtype": %s, "shape": [4], "data_offsets": [0, 4]}}' % (b"[" * 400 + b"]" * 400)
ENTRY = b'{"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}'
MALFORMED: dict[str, bytes] = {
    "empty": b"",
    "length only": struct.pack("<Q", 2),
    "header cut off": file_bytes({"t": entry()}, bytes(4))[:20],
    "not JSON": file_bytes(b"{nonsense"),
    "not an object": file_bytes(b"[]"),
    "leading space": file_bytes(b" {}"),
    "byte order mark": file_bytes(b"\xef\xbb\xbf{}"),
    "text after the object": file_bytes(b"{} {}"),
    "not UTF-8": file_bytes(b'{"\xff": %s}' % ENTRY, bytes(4)),
    "lone surrogate": file_bytes(b'{"\\ud800": %s}' % ENTRY, bytes(4)),
    "lone surrogate in the metadata": file_bytes(b'{"__metadata__": {"ecavg": "\\ud800"}}'),
    "nested too deeply": file_bytes(DEEP),
    "nested dtype": file_bytes(DEEP_DTYPE, bytes(4)),
    "nested objects": file_bytes(b'{"t":' * 200_000),
    "integer of many digits": file_bytes(b'{"t": ' + b"9" * 100_000 + b"}"),
    "tensor twice": file_bytes(b'{"t": %s, "t": %s}' % (ENTRY, ENTRY), bytes(4)),
    "key of a tensor twice": file_bytes(b'{"t": {"dtype": "U8", %s}' % ENTRY[1:], bytes(4)),
    "metadata twice": file_bytes(b'{"__metadata__": {}, "__metadata__": {}}'),
    "metadata is a list": file_bytes({"__metadata__": []}),
    "metadata is null": file_bytes({"__metadata__": None}),
    "metadata value is a number": file_bytes({"__metadata__": {"format": 1}}),
    "tensor without a name": file_bytes({"": entry()}, bytes(4)),
    "tensor is a list": file_bytes({"t": []}),
    "no dtype": file_bytes({"t": {"shape": [4], "data_offsets": [0, 4]}}, bytes(4)),
    "unknown key": file_bytes({"t": {**entry(), "extra": 1}}, bytes(4)),
    "unknown dtype": file_bytes({"t": entry("F128")}, bytes(4)),
    "dtype in lower case": file_bytes({"t": entry("u8")}, bytes(4)),
    "dtype is a list": file_bytes({"t": entry(["U8"])}, bytes(4)),
    "shape is a number": file_bytes({"t": entry(shape=4)}, bytes(4)),
    "shape is a string": file_bytes({"t": entry(shape="4")}, bytes(4)),
    "negative size": file_bytes({"t": entry(shape=[-4])}, bytes(4)),
    "two negative sizes": file_bytes({"t": entry(shape=[-2, -2])}, bytes(4)),
    "float size": file_bytes({"t": entry(shape=[4.0])}, bytes(4)),
    "size with an exponent": file_bytes(b'{"t": %s}' % ENTRY.replace(b"[4]", b"[4e0]"), bytes(4)),
    "bool size": file_bytes({"t": entry(shape=[True], data_offsets=[0, 1])}, bytes(1)),
    "size is NaN": file_bytes(b'{"t": %s}' % ENTRY.replace(b"[4]", b"[NaN]"), bytes(4)),
    "size over 63 bits": file_bytes({"t": entry(shape=[2**63, 0], data_offsets=[0, 0])}),
    "product over 63 bits": file_bytes({"t": entry(shape=[2**62, 4, 0], data_offsets=[0, 0])}),
    "product wraps to 4": file_bytes({"t": entry(shape=[2**32 + 1, 2**32 + 4])}, bytes(4)),
    "many sizes": file_bytes({"t": entry(shape=[9] * 200_000)}, bytes(4)),
    "three offsets": file_bytes({"t": entry(data_offsets=[0, 4, 4])}, bytes(4)),
    "bool offset": file_bytes({"t": entry(data_offsets=[False, 4])}, bytes(4)),
    "offsets reversed": file_bytes({"t": entry(data_offsets=[4, 0])}, bytes(4)),
    "negative offset": file_bytes({"t": entry(data_offsets=[-4, 0])}, bytes(4)),
    "offset beyond the file": file_bytes({"t": entry(shape=[5], data_offsets=[0, 5])}, bytes(4)),
    "offset at the end of memory": file_bytes({"t": entry(shape=[LARGEST], data_offsets=[0, LARGEST])}),
    "fewer bytes than the shape": file_bytes({"t": entry(data_offsets=[0, 3])}, bytes(3)),
    "more bytes than the shape": file_bytes({"t": entry(data_offsets=[0, 5])}, bytes(5)),
    "gap at the start": file_bytes({"t": entry(data_offsets=[1, 5])}, bytes(5)),
    "gap between": file_bytes({"a": entry(), "b": entry(data_offsets=[5, 9])}, bytes(9)),
    "gap at the end": file_bytes({"t": entry()}, bytes(5)),
    "overlap": file_bytes({"a": entry(), "b": entry(data_offsets=[3, 7])}, bytes(7)),
    "same bytes twice": file_bytes({"a": entry(), "b": entry()}, bytes(4)),
    "empty tensor within another": file_bytes(
        {"a": entry(), "b": entry(shape=[0], data_offsets=[2, 2])}, bytes(4)
    ),
    "no tensors but data": file_bytes({}, bytes(1)),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_file_is_refused_in_one_short_line(name: str, tmp_path: Path) -> None:
    content = MALFORMED[name]
    path = tmp_path / "x"
    path.write_bytes(content)
    for read in (lambda: parse(content), lambda: read_header(path)):
        with pytest.raises(InvalidError) as caught:
            read()
        assert caught.value.reason is Reason.INVALID_FILE
        assert len(str(caught.value)) < 500
        assert str(caught.value).isprintable()


def test_names_of_strangers_are_escaped_and_cut_short() -> None:
    name = "\x1b[2J\n\u202e" + "x" * 10_000
    with pytest.raises(InvalidError) as caught:
        parse(file_bytes({name: entry("F128")}, bytes(4)))
    message = str(caught.value)
    assert message.isascii()
    assert message.isprintable()
    assert len(message) < 500


@given(st.binary(max_size=300))
def test_random_bytes_are_refused_or_parsed_but_never_crash(content: bytes) -> None:
    for candidate in (content, file_bytes(content), file_bytes(b"{" + content + b"}")):
        with contextlib.suppress(InvalidError):
            assert isinstance(parse(candidate), Header)


@given(st.data())
def test_whatever_is_accepted_the_library_accepts_too(data: st.DataObject) -> None:
    sizes = st.integers(-1, 4) | st.just(2**63) | st.booleans()
    tensors = data.draw(
        st.dictionaries(
            st.text(max_size=2),
            st.builds(
                entry,
                st.sampled_from(["U8", "F32", "BF16", "BOOL", "?"]),
                st.lists(sizes, max_size=3),
                st.lists(st.integers(0, 8), min_size=2, max_size=2),
            ),
            max_size=3,
        )
    )
    content = file_bytes(tensors, bytes(data.draw(st.integers(0, 12))))
    try:
        header = parse(content)
    except InvalidError:
        return
    known = {
        name: (tensor["dtype"], tuple(tensor["shape"])) for name, tensor in safetensors.deserialize(content)
    }
    assert header.schema == known


@given(
    st.dictionaries(
        st.text(min_size=1).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(["f4", "i8", "u1", "?"]), st.lists(st.integers(0, 3), max_size=4)),
        max_size=5,
    )
)
def test_every_file_of_the_library_is_accepted(tensors: dict[str, tuple[str, list[int]]]) -> None:
    arrays = {name: np.zeros(shape, dtype) for name, (dtype, shape) in tensors.items()}
    header = parse(save(arrays))
    assert {name: spec.shape for name, spec in header.schema.items()} == {
        name: array.shape for name, array in arrays.items()
    }


def test_weights_with_the_expected_schema_pass_in_any_order() -> None:
    header = parse(save({"b": np.zeros(2, np.float32), "a": np.zeros(3)}))
    check_weights(header, {"a": TensorSpec("F64", (3,)), "b": TensorSpec("F32", (2,))})


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ({"w": TensorSpec("F32", (3,))}, r"'?w'? is F32 \[2\], the run's model has F32 \[3\]"),
        ({"w": TensorSpec("F16", (2,))}, r"w is F32 \[2\], the run's model has F16 \[2\]"),
        ({"w": TensorSpec("F32", (2,)), "v": TensorSpec("I64", ())}, r"v is missing, .* has I64 \[\]"),
        ({}, r"w is F32 \[2\], the run's model has no such tensor"),
    ],
)
def test_other_weights_are_refused_naming_both_sides(expected: dict[str, TensorSpec], message: str) -> None:
    with pytest.raises(InvalidError, match=message) as caught:
        check_weights(parse(save({"w": np.zeros(2, np.float32)})), expected)
    assert caught.value.reason is Reason.SCHEMA_MISMATCH


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, np.complex64])
def test_non_finite_value_is_found_at_any_place(dtype: type, bad: float, tmp_path: Path) -> None:
    num = schema.PIECE_BYTES // np.dtype(dtype).itemsize + 3  # more than one piece
    for place in (0, num // 2, num - 1):
        values = np.full(num, np.finfo(dtype).max, dtype)
        values[place] = bad
        path = write(tmp_path / "x", ok=np.zeros(3, dtype), broken=values)
        with pytest.raises(InvalidError, match="broken holds NaN or infinite") as caught:
            check_finite(path, read_header(path))
        assert caught.value.reason is Reason.NON_FINITE


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_every_finite_value_passes(dtype: type, tmp_path: Path) -> None:
    info = np.finfo(dtype)
    values = np.array([0, -0.0, info.max, info.min, info.tiny, info.smallest_subnormal], dtype)
    path = write(tmp_path / "x", values=values, scalar=np.array(info.max, dtype), empty=values[:0])
    check_finite(path, read_header(path))


@pytest.mark.parametrize(("dtype", "torch_name"), [("BF16", "bfloat16"), ("F8_E5M2", "float8_e5m2"),
                                                    ("F8_E4M3", "float8_e4m3fn")])  # fmt: skip
def test_every_bit_pattern_is_judged_as_torch_does(dtype: str, torch_name: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    bits = np.arange(2**16, dtype=np.uint16) if dtype == "BF16" else np.arange(2**8, dtype=np.uint8)
    floats = torch.from_numpy(bits.copy()).view(getattr(torch, torch_name)).float()
    finite = torch.isfinite(floats).numpy()

    path = write_raw(tmp_path / "x", dtype, bits[finite])
    check_finite(path, read_header(path))
    for value in bits[~finite]:
        path = write_raw(tmp_path / "x", dtype, np.array([0, value], bits.dtype))
        with pytest.raises(InvalidError):
            check_finite(path, read_header(path))


def test_integers_are_finite_whatever_their_bits(tmp_path: Path) -> None:
    path = write(tmp_path / "x", count=np.full(9, -1), flags=np.full(9, 255, np.uint8))
    check_finite(path, read_header(path))


def test_file_that_shrinks_after_its_header_was_read_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x", values=np.zeros(1000))
    header = read_header(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InvalidError, match="ends within its data"):
        check_finite(path, header)


def shard(images: np.ndarray, labels: np.ndarray, **more: np.ndarray) -> Header:
    return parse(save({"images": images, "labels": labels, **more}))


def test_shard_of_the_dataset_passes_and_is_counted() -> None:
    header = shard(np.zeros((5, 3, 4, 4), np.uint8), np.zeros(5, np.int64))
    assert check_shard(header, pictures(10, (3, 4, 4), (), ())) == 5


@pytest.mark.parametrize(
    "header",
    [
        parse(save({"images": np.zeros((5, 3, 4, 4), np.uint8)})),
        shard(np.zeros((5, 3, 4, 4), np.uint8), np.zeros(5, np.int64), extra=np.zeros(1)),
        shard(np.zeros((5, 3, 4, 4), np.float32), np.zeros(5, np.int64)),
        shard(np.zeros((5, 3, 4, 4), np.uint8), np.zeros(5, np.int32)),
        shard(np.zeros((5, 3, 4, 4), np.uint8), np.zeros((5, 1), np.int64)),
        shard(np.zeros((5, 3, 4, 4), np.uint8), np.zeros((), np.int64)),
        shard(np.zeros((5, 3, 4, 4), np.uint8), np.zeros(4, np.int64)),
        shard(np.zeros((5, 1, 4, 4), np.uint8), np.zeros(5, np.int64)),
        shard(np.zeros((5, 48), np.uint8), np.zeros(5, np.int64)),
        shard(np.zeros((0, 3, 4, 4), np.uint8), np.zeros(0, np.int64)),
    ],
    ids=["no labels", "extra", "float", "int32", "2-d", "scalar", "fewer", "grey", "flat", "empty"],
)
def test_anything_but_a_shard_of_the_dataset_is_refused(header: Header) -> None:
    with pytest.raises(InvalidError) as caught:
        check_shard(header, pictures(10, (3, 4, 4), (), ()))
    assert caught.value.reason is Reason.INVALID_SHARD


@pytest.mark.parametrize("label", [-1, 10, 2**40, -(2**63)])
def test_label_outside_the_classes_is_refused(label: int, tmp_path: Path) -> None:
    labels = np.arange(100_000) % 10  # more than one piece
    images = np.zeros((100_000, 1, 1, 1), np.uint8)
    path = write(tmp_path / "good", images=images, labels=labels)
    check_examples(path, read_header(path), pictures(10, (1, 1, 1), (), ()))

    labels[-1] = label
    path = write(tmp_path / "bad", images=images, labels=labels)
    with pytest.raises(InvalidError, match=f"label {label},") as caught:
        check_examples(path, read_header(path), pictures(10, (1, 1, 1), (), ()))
    assert caught.value.reason is Reason.INVALID_SHARD


@pytest.mark.parametrize("text", ['{"a":' * 1000, '{"a":{"shape":[' + "1," * 500_000, "{" * (1 << 20)])
def test_counts_of_a_header_are_checked_before_it_is_parsed(text: str) -> None:
    content = len(text).to_bytes(8, "little") + text.encode("ascii")
    with pytest.raises(InvalidError, match="far more in it than 2 tensors") as refused:
        parse_header(content, len(content), max_tensors=2)
    assert refused.value.reason is Reason.INVALID_FILE


def test_header_with_as_many_tensors_as_allowed_passes_the_counts() -> None:
    entries = {
        f"{{{number}}}": {"dtype": "U8", "shape": [1] * 8, "data_offsets": [number, number + 1]}
        for number in range(100)
    }
    text = json.dumps(entries | {"__metadata__": {"note": "{,}" * 20}}).encode("ascii")
    content = len(text).to_bytes(8, "little") + text
    header = parse_header(content, len(content) + 100, max_tensors=100)
    assert len(header.schema) == 100
