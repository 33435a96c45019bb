import hashlib
import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args
from unittest import mock

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from ecavg.common.config import Wire
from ecavg.common.errors import InvalidError, Reason, RunError, UsageError
from ecavg.common.schema import TensorSpec, check_weights, read_header
from ecavg.common.weights import read_state_dict, write_state_dict
from ecavg.common.wire import (
    PIECE_ELEMENTS,
    Base,
    Encoding,
    check_encoded,
    check_values,
    decode,
    encode,
    encoding_of,
    wire_of,
)
from ecavg.common.wire import wire_schema as encoded_schema

StateDict = dict[str, Tensor]
WIRES: tuple[Wire, ...] = get_args(Wire)
ROUNDING: tuple[Wire, ...] = ("bfloat16", "int8")
LARGEST = torch.finfo(torch.float32).max
OTHER_DIGEST = "0123456789abcdef" * 4


def network(seed: int = 0) -> StateDict:
    """Weights of all kinds that networks have; a channel of the first is longer than a piece."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "long.weight": draw(3, PIECE_ELEMENTS + 5),
        "conv.weight": draw(37, 50, 7, 7) * torch.logspace(-6, 2, 37)[:, None, None, None],
        "conv.bias": draw(37),
        "norm.weight": 1 + draw(37) / 100,
        "norm.running_mean": draw(37),
        "norm.running_var": draw(37).exp(),
        "norm.num_batches_tracked": torch.tensor(2**40 + seed),
        "layer_scale": draw(5, 1, 1),
        "temperature": draw(),
    }


def moved(start: StateDict, seed: int, step: float = 0.01) -> StateDict:
    """Return the weights as if after some training."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: value * (1 + step * torch.randn(value.shape, generator=generator))
        if value.is_floating_point()
        else value + 1
        for name, value in start.items()
    }


def write(path: Path, state_dict: StateDict) -> Path:
    write_state_dict(state_dict, path)
    return path


def base_in(path: Path, state_dict: StateDict) -> Base:
    return Base(write(path, state_dict), digest_of(path))


def digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def there_and_back(folder: Path, weights: StateDict, wire: Wire, start: StateDict | None = None) -> StateDict:
    base = base_in(folder / "base", start) if start else None
    encode(write(folder / "weights", weights), folder / "encoded", wire, base=base)
    decode(folder / "encoded", folder / "decoded", base=base)
    return read_state_dict(folder / "decoded")


def sent_again(folder: Path, wire: Wire, base: Base, residual: Path | None, next_residual: Path) -> StateDict:
    """Return the weights after encoding, with the residual of the last encoding added, and decoding."""
    encode(
        folder / "weights",
        folder / "encoded",
        wire,
        base=base,
        residual=residual,
        next_residual=next_residual,
    )
    decode(folder / "encoded", folder / "decoded", base=base)
    return read_state_dict(folder / "decoded")


def random_files(folder: Path, model: str, num_classes: int) -> tuple[Base, Path]:
    """Random weights of a real network, and others not far from them."""
    with torch.device("meta"):
        shapes = torchvision.models.get_model(model, num_classes=num_classes).state_dict()
    generator = torch.Generator().manual_seed(0)
    start = {
        name: torch.randn(value.shape, generator=generator).exp()
        if value.is_floating_point()
        else torch.tensor(3)
        for name, value in shapes.items()
    }
    return base_in(folder / "base", start), write(folder / "weights", moved(start, 1))


# What is lost, and what is not


@pytest.mark.parametrize("wire", WIRES)
def test_names_shapes_and_dtypes_come_back(wire: Wire, tmp_path: Path) -> None:
    there_and_back(tmp_path, moved(network(), 1), wire, network())
    found, expected = (read_header(tmp_path / name) for name in ("decoded", "weights"))
    assert found.schema == expected.schema
    assert found.metadata == expected.metadata == {"format": "pt"}


def test_float32_is_a_plain_copy_both_ways(tmp_path: Path) -> None:
    there_and_back(tmp_path, network(), "float32")
    assert len({digest_of(tmp_path / name) for name in ("weights", "encoded", "decoded")}) == 1


def test_bfloat16_is_what_pytorch_rounds_to(tmp_path: Path) -> None:
    weights = network()
    weights["ties"] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 1e-45, 3.38e38, 1.2e-38])
    found = there_and_back(tmp_path, weights, "bfloat16")
    for name, value in weights.items():
        expected = value.bfloat16().float() if value.is_floating_point() else value
        assert torch.equal(found[name], expected), name


def test_decoded_file_is_the_one_that_weights_are_written_to(tmp_path: Path) -> None:
    """Who has decoded the tensors, or averaged them, gets the same digest from write_state_dict."""
    found = there_and_back(tmp_path, network(), "bfloat16")
    assert digest_of(write(tmp_path / "written", found)) == digest_of(tmp_path / "decoded")


def test_int8_is_within_half_a_step_of_each_channel(tmp_path: Path) -> None:
    start, weights = network(), moved(network(), 1)
    found = there_and_back(tmp_path, weights, "int8", start)
    for name in ("long.weight", "conv.weight", "conv.bias", "norm.weight", "layer_scale", "temperature"):
        exact, base = weights[name].double(), start[name].double()
        channels = (len(exact), -1) if name in ("long.weight", "conv.weight") else (1, -1)
        step = (exact - base).abs().reshape(channels).amax(dim=1, keepdim=True) / 127
        error = (found[name].double() - exact).abs().reshape(channels)
        rounding = 2**-23 * exact.abs().reshape(channels)  # of base + difference to float32
        assert (error <= step / 2 * (1 + 1e-4) + rounding).all(), name
        assert name == "temperature" or error.max() > 0, name  # it has been rounded at all


def test_running_statistics_are_rounded_by_themselves(tmp_path: Path) -> None:
    """As a difference from 1 in steps of 1/127, a variance of 0.001 would come back as 0."""
    start, weights = network(), network()
    start["norm.running_var"] = torch.ones(37)
    weights["norm.running_var"] = torch.logspace(-9, 3, 37)
    found = there_and_back(tmp_path, weights, "int8", start)
    for name in ("norm.running_mean", "norm.running_var"):
        assert torch.equal(found[name], weights[name].bfloat16().float())


@pytest.mark.parametrize("wire", ROUNDING)
@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8, torch.bool],
)
def test_other_dtypes_travel_as_they_are(dtype: torch.dtype, wire: Wire, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(4, 3, generator=generator).mul(50).to(dtype)
    weights = {"t": value, "f": torch.ones(4, 3), "empty": value[:0], "scalar": value[0, 0]}
    start = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    found = there_and_back(tmp_path, weights, wire, start)
    for name in ("t", "empty", "scalar"):
        assert found[name].dtype == dtype
        assert torch.equal(found[name], weights[name])


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 4), (), (1,), (1, 1), (4, 1)])
def test_empty_and_single_values_come_back(shape: tuple[int, ...], wire: Wire, tmp_path: Path) -> None:
    weights = {"t": torch.full(shape, 1.5)}
    found = there_and_back(tmp_path, weights, wire, {"t": torch.full(shape, 1.0)})
    assert found["t"].shape == shape
    torch.testing.assert_close(found["t"], weights["t"], rtol=1e-6, atol=0)


def test_channels_without_a_change_are_exactly_the_base(tmp_path: Path) -> None:
    start = {"t": torch.randn(3, 4, generator=torch.Generator().manual_seed(0))}
    weights = {"t": start["t"] + torch.tensor([[0.0], [0.1], [0.0]])}
    weights["t"][2, 1] = start["t"][2, 1] = 1e-40
    weights["t"][2, 1] *= 2  # less than a scale can say
    found = there_and_back(tmp_path, weights, "int8", start)
    assert torch.equal(found["t"][::2], start["t"][::2])
    assert load_file(tmp_path / "encoded")["t.scale"][::2].tolist() == [0, 0]


# What is in the file


def test_int8_file_can_be_read_by_anyone(tmp_path: Path) -> None:
    start, weights = network(), moved(network(), 1)
    found = there_and_back(tmp_path, weights, "int8", start)
    header, raw = read_header(tmp_path / "encoded"), load_file(tmp_path / "encoded")
    assert header.metadata.keys() == {"ecavg"}
    assert json.loads(header.metadata["ecavg"]) == {"wire": "int8", "base": digest_of(tmp_path / "base")}
    assert raw["conv.weight"].dtype == torch.int8
    assert raw["conv.weight"].abs().amax(dim=(1, 2, 3)).tolist() == [127] * 37
    assert raw["conv.weight.scale"].shape == (37,)
    assert raw["conv.bias.scale"].shape == raw["layer_scale.scale"].shape == ()
    assert "norm.running_var.scale" not in raw
    scale = raw["conv.weight.scale"][:, None, None, None]
    assert torch.equal(raw["conv.weight"] * scale + start["conv.weight"], found["conv.weight"])


def test_bfloat16_file_says_what_it_is_and_what_was_bfloat16_before(tmp_path: Path) -> None:
    write(tmp_path / "a", {"t": torch.ones(2)})
    write(tmp_path / "b", {"t": torch.ones(2), "u": torch.ones(2).bfloat16()})
    entries = {}
    for name in ("a", "b"):
        encode(tmp_path / name, tmp_path / "encoded", "bfloat16")
        header = read_header(tmp_path / "encoded")
        assert {spec.dtype for spec in header.schema.values()} == {"BF16"}
        entries[name] = {key: json.loads(value) for key, value in header.metadata.items()}
    assert entries == {
        "a": {"ecavg": {"wire": "bfloat16"}},
        "b": {"ecavg": {"wire": "bfloat16", "as_is": ["u"]}},
    }


@pytest.mark.parametrize("wire", WIRES)
def test_schema_is_known_before_anything_is_encoded(wire: Wire, tmp_path: Path) -> None:
    base = base_in(tmp_path / "base", network())
    encode(write(tmp_path / "weights", moved(network(), 1)), tmp_path / "encoded", wire, base=base)
    own, header = read_header(base.path).schema, read_header(tmp_path / "encoded")
    assert header.schema == encoded_schema(own, wire)
    assert encoding_of(header).wire == wire
    check_encoded(header, own, wire, base_digest=base.digest)


def test_schema_of_int8() -> None:
    schema = {
        "a": TensorSpec("F32", (4, 3)),
        "b": TensorSpec("F32", (4,)),
        "b.running_mean": TensorSpec("F32", (4,)),
        "c": TensorSpec("F16", (4, 3)),
        "d": TensorSpec("I8", (4, 3)),
        "d.scale": TensorSpec("F64", (4,)),
    }
    assert encoded_schema(schema, "int8") == {
        "a": TensorSpec("I8", (4, 3)),
        "a.scale": TensorSpec("F32", (4,)),
        "b": TensorSpec("I8", (4,)),
        "b.scale": TensorSpec("F32", ()),
        "b.running_mean": TensorSpec("BF16", (4,)),
        "c": TensorSpec("F16", (4, 3)),
        "d": TensorSpec("I8", (4, 3)),
        "d.scale": TensorSpec("F64", (4,)),
    }


def test_tensor_that_is_called_like_a_scale_is_refused(tmp_path: Path) -> None:
    state_dict = {"t": torch.ones(2, 2), "t.scale": torch.ones(2)}
    base = base_in(tmp_path / "base", state_dict)
    with pytest.raises(UsageError, match=r"'t\.scale' has the name that int8 needs for the scale of 't'"):
        encode(base.path, tmp_path / "encoded", "int8", base=base)
    assert not (tmp_path / "encoded").exists()
    there_and_back(tmp_path, state_dict, "bfloat16")


@pytest.mark.parametrize(
    ("model", "num_classes"),
    [("mobilenet_v2", 10), ("mobilenet_v2", 1000), ("resnet50", 1000)],
)
def test_sizes_of_real_networks(model: str, num_classes: int, tmp_path: Path) -> None:
    base, weights = random_files(tmp_path, model, num_classes)
    full = weights.stat().st_size
    limits: dict[Wire, float] = {"float32": 1, "bfloat16": 0.51, "int8": 0.27}
    for wire, at_most in limits.items():
        encode(weights, tmp_path / "encoded", wire, base=base)
        assert (tmp_path / "encoded").stat().st_size <= at_most * full


# The same bytes


@pytest.mark.parametrize("wire", WIRES)
def test_same_files_give_the_same_bytes_in_any_order_of_tensors(wire: Wire, tmp_path: Path) -> None:
    digests = set()
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        weights = moved(network(), 1)
        if name == "b":
            weights = dict(reversed(weights.items()))
            (folder / ".encoded.partial").write_bytes(b"\xff" * 9_000_000)  # what a crash has left
        there_and_back(folder, weights, wire, network())
        digests.add((digest_of(folder / "encoded"), digest_of(folder / "decoded")))
        assert {path.name for path in folder.iterdir()} == {"base", "weights", "encoded", "decoded"}
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("wire", "encoded", "decoded"),
    [("bfloat16", "e36cc48426f52ca1", "1ab5d1e3789cf4c8"), ("int8", "9efb63e3981e77c5", "11cea9e28e325d42")],
)
def test_bytes_are_those_of_every_other_machine(
    wire: Wire, encoded: str, decoded: str, tmp_path: Path
) -> None:
    integers = np.arange(64 * 99).reshape(64, 99) * 7919 % 10007 - 5003
    start = integers.astype(np.float32) / np.float32(3)
    weights = start + (integers[::-1] % 1009 - 504).astype(np.float32) / np.float32(7)
    base = Base(write(tmp_path / "base", {"t": torch.tensor(start)}), OTHER_DIGEST)
    encode(write(tmp_path / "weights", {"t": torch.tensor(weights)}), tmp_path / "encoded", wire, base=base)
    decode(tmp_path / "encoded", tmp_path / "decoded", base=base)
    found = {name: digest_of(tmp_path / name)[:16] for name in ("encoded", "decoded")}
    assert found == {"encoded": encoded, "decoded": decoded}


def test_multiplying_and_adding_are_rounded_one_by_one(tmp_path: Path) -> None:
    """In float64 the product is exact, and the sum is if rounded afterwards (24 bits in 53)."""
    start = network()
    found = there_and_back(tmp_path, moved(start, 1), "int8", start)["long.weight"]
    raw, base = load_file(tmp_path / "encoded"), start["long.weight"].double()
    product = raw["long.weight"].double() * raw["long.weight.scale"].double()[:, None]
    assert torch.equal(found, (product.float().double() + base).float())
    assert not torch.equal(found, (product + base).float())  # a fused operation would be seen


# Error feedback


@pytest.mark.parametrize("wire", ROUNDING)
def test_residual_is_what_was_lost(wire: Wire, tmp_path: Path) -> None:
    start, weights = network(), moved(network(), 1)
    base = base_in(tmp_path / "base", start)
    write(tmp_path / "weights", weights)
    first = sent_again(tmp_path, wire, base, None, tmp_path / "r1")
    residual = read_state_dict(tmp_path / "r1")
    assert set(weights) - set(residual) == {
        "norm.running_mean",
        "norm.running_var",
        "norm.num_batches_tracked",
    }
    for name, lost in residual.items():
        assert torch.equal(lost, weights[name] - first[name])

    second = sent_again(tmp_path, wire, base, tmp_path / "r1", tmp_path / "r2")
    left = read_state_dict(tmp_path / "r2")
    for name, lost in left.items():
        exact = 2 * weights[name].double() - first[name] - second[name]
        assert (lost - exact).abs().max() <= 2**-22 * weights[name].abs().max()


@settings(max_examples=40, deadline=None)
@given(
    wire=st.sampled_from(ROUNDING),
    seed=st.integers(0, 2**32 - 1),
    num_rounds=st.integers(1, 12),
    step=st.sampled_from([1e-6, 1e-3, 1.0, 100.0]),
    shape=st.sampled_from([(3, 4), (5,), (2, 3, 2), ()]),
)
def test_all_rounds_together_are_wrong_by_the_last_rounding_only(
    wire: Wire, seed: int, num_rounds: int, step: float, shape: tuple[int, ...]
) -> None:
    generator = torch.Generator().manual_seed(seed)
    true_sum = sent_sum = torch.zeros(shape, dtype=torch.float64)
    residual, largest = None, 0.0
    with TemporaryDirectory() as folder, mock.patch("os.fsync"):  # what survives a power cut is not the point
        for number in range(num_rounds):
            start = torch.randn(shape, generator=generator)
            exact = start + step * torch.randn(shape, generator=generator)
            base = base_in(Path(folder, "base"), {"t": start})
            write(Path(folder, "weights"), {"t": exact})
            left = Path(folder, f"residual-{number}")
            received = sent_again(Path(folder), wire, base, residual, left)["t"]
            true_sum = true_sum + (exact.double() - start)
            sent_sum = sent_sum + (received.double() - start)
            largest = max(largest, float(exact.abs().max()), float(start.abs().max()))
            residual = left
        raw = load_file(Path(folder, "encoded"))
    if wire == "int8":
        scale = raw["t.scale"].double()
        one_rounding = scale.reshape(-1, *[1] * (len(shape) - 1)) / 2 if scale.dim() else scale / 2
    else:
        one_rounding = raw["t"].double().abs() * 2**-8
    rounding = num_rounds * 2**-21 * largest  # of float32, in each round
    assert ((sent_sum - true_sum).abs() <= one_rounding * 1.001 + rounding).all()


@pytest.mark.parametrize("wire", ROUNDING)
def test_small_changes_get_through_in_the_end(wire: Wire, tmp_path: Path) -> None:
    """Beside a large change, or by itself on bfloat16, each would be rounded away for ever."""
    start = {"t": torch.tensor([[1.0, 1.0, 1.0]])}
    weights = {"t": torch.tensor([[1.001, 2.0, 1.0]])}
    base = base_in(tmp_path / "base", start)
    write(tmp_path / "weights", weights)
    sent, residual = 0.0, None
    for number in range(20):
        left = tmp_path / f"r{number}"
        change = sent_again(tmp_path, wire, base, residual, left)["t"][0, 0].item() - 1
        assert number or change == 0
        sent, residual = sent + change, left
    assert sent == pytest.approx(0.020, abs=0.004)


def test_nothing_is_fed_back_into_a_variance(tmp_path: Path) -> None:
    """Rounding 1003.9 to 1004 leaves -0.1, which would make 0.001 negative."""
    base = base_in(tmp_path / "base", {"x.running_var": torch.ones(1), "t": torch.ones(1)})
    residual = None
    for number, variance in enumerate([1003.9, 0.001]):
        write(tmp_path / "weights", {"x.running_var": torch.tensor([variance]), "t": torch.ones(1)})
        found = sent_again(tmp_path, "bfloat16", base, residual, tmp_path / f"r{number}")
        residual = tmp_path / f"r{number}"
    assert found["x.running_var"].item() == pytest.approx(0.001, rel=2**-8)


def test_crash_between_the_files_and_encoding_again_changes_nothing(tmp_path: Path) -> None:
    base = base_in(tmp_path / "base", network())
    write(tmp_path / "weights", moved(network(), 1))
    encode(tmp_path / "weights", tmp_path / "first", "int8", base=base, next_residual=tmp_path / "r1")
    target = tmp_path / "target"
    target.mkdir()  # cannot be replaced by a file
    arguments: dict[str, Any] = {
        "base": base,
        "residual": tmp_path / "r1",
        "next_residual": tmp_path / "r2",
    }
    with pytest.raises(OSError, match="directory"):
        encode(tmp_path / "weights", target, "int8", **arguments)
    left = digest_of(tmp_path / "r2")  # there first: whoever finds the target has it

    target.rmdir()
    encode(tmp_path / "weights", target, "int8", **arguments)
    assert digest_of(tmp_path / "r2") == left
    assert digest_of(target) != digest_of(tmp_path / "first")
    assert not list(tmp_path.glob(".*"))


# Files that do not fit


def test_int8_without_a_base_is_a_mistake_of_ours(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="base"):
        encode(write(tmp_path / "w", network()), tmp_path / "e", "int8")


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_not_encoded(value: float, wire: Wire, tmp_path: Path) -> None:
    base = base_in(tmp_path / "base", {"t": torch.zeros(4)})
    write(tmp_path / "w", {"t": torch.tensor([0, 1, value, 2])})
    with pytest.raises(RunError, match="t holds NaN or infinite values"):
        encode(tmp_path / "w", tmp_path / "e", wire, base=base, next_residual=tmp_path / "r")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "w"}


@pytest.mark.parametrize(("wire", "start"), [("bfloat16", 0.0), ("int8", -LARGEST)])
def test_values_beyond_what_the_wire_holds_are_not_encoded(wire: Wire, start: float, tmp_path: Path) -> None:
    base = base_in(tmp_path / "base", {"t": torch.full((4,), start)})
    write(tmp_path / "w", {"t": torch.full((4,), LARGEST)})
    with pytest.raises(RunError, match="NaN or infinite"):
        encode(tmp_path / "w", tmp_path / "e", wire, base=base)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "w"}


def test_what_is_encoded_is_not_encoded_again(tmp_path: Path) -> None:
    encode(write(tmp_path / "w", network()), tmp_path / "e", "bfloat16")
    with pytest.raises(RunError, match="encoded already"):
        encode(tmp_path / "e", tmp_path / "f", "float32")


@pytest.mark.parametrize("file", ["base", "residual", "weights"])
@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "other names, shapes or dtypes"), (b"\x80\x04pickle" * 9, "not a usable safetensors file")],
)
def test_files_of_ones_own_that_do_not_fit_are_run_errors(
    file: str, content: bytes | None, message: str, tmp_path: Path
) -> None:
    paths = {
        name: write(tmp_path / name, {"t": torch.ones(2, 2)}) for name in ("base", "residual", "weights")
    }
    if content is None:
        write(paths[file], {"t": torch.ones(2)})
    else:
        paths[file].write_bytes(content)
    base = Base(paths["base"], OTHER_DIGEST)
    with pytest.raises(RunError, match=message) as caught:
        encode(paths["weights"], tmp_path / "e", "int8", base=base, residual=paths["residual"])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "e").exists()


def encoded_files(folder: Path) -> tuple[Base, StateDict, dict[str, str]]:
    """Tensors and metadata of an int8 file in good order."""
    base = base_in(folder / "base", {"t": torch.ones(4, 3), "n": torch.tensor(1), "b": torch.ones(2)})
    write(folder / "weights", {"t": torch.rand(4, 3), "n": torch.tensor(2), "b": torch.zeros(2)})
    encode(folder / "weights", folder / "encoded", "int8", base=base)
    return base, load_file(folder / "encoded"), read_header(folder / "encoded").metadata


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"t.scale": None}, Reason.SCHEMA_MISMATCH),
        ({"t.scale": torch.ones(3)}, Reason.SCHEMA_MISMATCH),
        ({"t.scale": torch.ones(())}, Reason.SCHEMA_MISMATCH),
        ({"t.scale": torch.ones(4, 1)}, Reason.SCHEMA_MISMATCH),
        ({"t.scale": torch.ones(4).double()}, Reason.SCHEMA_MISMATCH),
        ({"t": torch.ones(4, 3)}, Reason.SCHEMA_MISMATCH),
        ({"t": torch.ones(4, 3).to(torch.uint8)}, Reason.SCHEMA_MISMATCH),
        ({"t": torch.ones(3, 4).to(torch.int8)}, Reason.SCHEMA_MISMATCH),
        ({"t": None}, Reason.SCHEMA_MISMATCH),
        ({"n": None}, Reason.SCHEMA_MISMATCH),
        ({"n": torch.tensor(1, dtype=torch.int8), "n.scale": torch.tensor(1.0)}, Reason.SCHEMA_MISMATCH),
        ({"extra": torch.ones(1)}, Reason.SCHEMA_MISMATCH),
        ({"t.scale": torch.tensor([1, 1, float("nan"), 1])}, Reason.NON_FINITE),
        ({"t.scale": torch.tensor([1, float("inf"), 1, 1])}, Reason.NON_FINITE),
        ({"b.scale": torch.tensor(LARGEST)}, Reason.NON_FINITE),
    ],
)
def test_damaged_files_are_refused(change: dict[str, Tensor | None], reason: Reason, tmp_path: Path) -> None:
    base, tensors, metadata = encoded_files(tmp_path)
    changed = {name: tensor for name, tensor in {**tensors, **change}.items() if tensor is not None}
    save_file(changed, tmp_path / "encoded", metadata=metadata)
    write(tmp_path / "decoded", {"old": torch.ones(1)})
    before = digest_of(tmp_path / "decoded")
    with pytest.raises(InvalidError) as caught:
        decode(tmp_path / "encoded", tmp_path / "decoded", base=base)
    assert caught.value.reason is reason
    assert "\n" not in str(caught.value)
    assert digest_of(tmp_path / "decoded") == before
    if reason is Reason.SCHEMA_MISMATCH:  # known before any data are read
        header, schema = read_header(tmp_path / "encoded"), read_header(base.path).schema
        with pytest.raises(InvalidError):
            check_encoded(header, schema, "int8", base_digest=base.digest)


@pytest.mark.parametrize("num_bytes", [0, 7, 100, -1])
def test_file_that_is_cut_off_is_refused(num_bytes: int, tmp_path: Path) -> None:
    base, _, _ = encoded_files(tmp_path)
    content = (tmp_path / "encoded").read_bytes()
    (tmp_path / "encoded").write_bytes(content[:num_bytes])
    with pytest.raises(InvalidError) as caught:
        decode(tmp_path / "encoded", tmp_path / "decoded", base=base)
    assert caught.value.reason is Reason.INVALID_FILE


@pytest.mark.parametrize(
    "entry",
    [
        "",
        "int8",
        "[]",
        "null",
        '{"wire": "int4"}',
        '{"wire": "int8", "base": "../../etc/passwd"}',
        f'{{"wire": "int8", "base": "{OTHER_DIGEST}\\n"}}',
        '{"wire": "int8", "base": 7}',
        '{"wire": "int8"}',
        f'{{"wire": "bfloat16", "base": "{OTHER_DIGEST}"}}',
        '{"wire": "bfloat16", "as_is": "t"}',
        '{"wire": "bfloat16", "more": 1}',
        '{"wire": ' + "[" * 100_000,
        '{"wire": ' + "9" * 100_000 + "}",
    ],
)
def test_unknown_encoding_is_refused(entry: str, tmp_path: Path) -> None:
    save_file({"t": torch.ones(4, 3)}, tmp_path / "e", metadata={"ecavg": entry})
    with pytest.raises(InvalidError, match="unknown encoding") as caught:
        decode(tmp_path / "e", tmp_path / "d")
    assert caught.value.reason is Reason.INVALID_FILE
    assert len(str(caught.value)) < 200


def test_other_base_is_refused(tmp_path: Path) -> None:
    base, _, _ = encoded_files(tmp_path)
    for wrong in (base._replace(digest=OTHER_DIGEST), None):
        with pytest.raises(InvalidError, match=f"are differences from {base.digest[:16]}…, ") as caught:
            decode(tmp_path / "encoded", tmp_path / "decoded", base=wrong)
        assert caught.value.reason is Reason.INITIAL_WEIGHTS
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "decoded").exists()


def test_base_that_cannot_be_read_is_not_the_senders_fault(tmp_path: Path) -> None:
    base, _, _ = encoded_files(tmp_path)
    base.path.write_bytes(b"")
    with pytest.raises(RunError, match="cannot read the weights in"):
        decode(tmp_path / "encoded", tmp_path / "decoded", base=base)


@pytest.mark.parametrize("as_is", [(), ("t",), ("t", "u"), ("u", "u"), ("u", "v"), ("n", "u"), ("m", "u")])
def test_gate_refuses_what_is_wrong_about_the_dtypes_before(as_is: tuple[str, ...], tmp_path: Path) -> None:
    weights = {"t": torch.ones(2), "u": torch.ones(2).bfloat16(), "n": torch.tensor(1)}
    schema = read_header(write(tmp_path / "w", weights)).schema
    encode(tmp_path / "w", tmp_path / "e", "bfloat16")
    check_encoded(read_header(tmp_path / "e"), schema, "bfloat16")
    entry = Encoding(wire="bfloat16", as_is=as_is).model_dump_json()
    save_file(load_file(tmp_path / "e"), tmp_path / "e", metadata={"ecavg": entry})
    with pytest.raises(InvalidError) as caught:
        check_encoded(read_header(tmp_path / "e"), schema, "bfloat16")
    assert caught.value.reason is Reason.SCHEMA_MISMATCH


@pytest.mark.parametrize("wanted", WIRES)
@pytest.mark.parametrize("sent", WIRES)
def test_gate_lets_only_the_runs_wire_pass(sent: Wire, wanted: Wire, tmp_path: Path) -> None:
    base = base_in(tmp_path / "base", network())
    schema = read_header(base.path).schema
    encode(base.path, tmp_path / "e", sent, base=base)
    header = read_header(tmp_path / "e")
    if sent == wanted:
        check_encoded(header, schema, wanted, base_digest=base.digest)
        return
    with pytest.raises(InvalidError, match=f"encoded as {sent}") as caught:
        check_encoded(header, schema, wanted, base_digest=base.digest)
    assert caught.value.reason is Reason.SCHEMA_MISMATCH
    with pytest.raises(InvalidError):
        check_weights(header, encoded_schema(schema, wanted))


@pytest.mark.parametrize(("scale", "is_fine"), [(1e36, True), (-1e36, True), (2e36, False), (-2e36, False)])
def test_gate_refuses_differences_that_could_leave_float32(
    scale: float, is_fine: bool, tmp_path: Path
) -> None:
    """Known without the base: whatever passes can be decoded, and one agent's file cannot end a round."""
    start = {
        "t": torch.full((4, 3), LARGEST / 2),
        "d": torch.ones(2, dtype=torch.int8),
        "e": torch.ones(0, 2),
    }
    base = base_in(tmp_path / "base", start)
    encode(base.path, tmp_path / "e", "int8", base=base)
    tensors = load_file(tmp_path / "e")
    tensors |= {"t": torch.full((4, 3), -128 if scale < 0 else 127, dtype=torch.int8)}
    tensors |= {"t.scale": torch.tensor([0, 0, scale, 0])}
    save_file(tensors, tmp_path / "e", metadata=read_header(tmp_path / "e").metadata)
    if is_fine:
        check_values(tmp_path / "e", read_header(tmp_path / "e"))
        decode(tmp_path / "e", tmp_path / "d", base=base)
        return
    with pytest.raises(InvalidError, match="tensor 't' has differences that are too large") as caught:
        check_values(tmp_path / "e", read_header(tmp_path / "e"))
    assert caught.value.reason is Reason.NON_FINITE


def test_weights_without_a_base_travel_as_bfloat16_at_least() -> None:
    assert [wire_of(wire, None) for wire in WIRES] == ["float32", "bfloat16", "bfloat16"]
    assert [wire_of(wire, OTHER_DIGEST) for wire in WIRES] == list(WIRES)


# What it costs


@pytest.mark.parametrize("wire", WIRES)
def test_memory_does_not_depend_on_the_size_of_a_tensor(wire: Wire, tmp_path: Path) -> None:
    """One tensor of 64 MiB, in a process of its own, which does without torch."""
    for name, scale in (("large", 1 << 12), ("small", 4)):
        write(tmp_path / name, {"t": torch.arange(scale * (1 << 12), dtype=torch.float32).view(scale, -1)})
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from ecavg.common.wire import Base, decode, encode\n"
        "def peak():\n"  # getrusage would give what this process's parent had at the fork
        "    status = Path('/proc/self/status').read_text()\n"
        "    return int(status.partition('VmHWM:')[2].split()[0])\n"
        "folder, wire = Path(sys.argv[1]), sys.argv[2]\n"
        "for name in ('small', 'large'):\n"  # the first loads what is loaded at the first use
        "    before = peak()\n"
        "    base, residual = Base(folder / name, '0' * 64), folder / f'{name}-residual'\n"
        "    encode(base.path, folder / 'e', wire, base=base, next_residual=residual)\n"
        "    residual = residual if wire != 'float32' else None\n"
        "    encode(base.path, folder / 'e', wire, base=base, residual=residual)\n"
        "    decode(folder / 'e', folder / 'd', base=base)\n"
        "print(peak() - before)\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path), wire]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert int(output) < 6 * 1024
