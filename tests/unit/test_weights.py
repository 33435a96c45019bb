import struct
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ecavg.common.errors import RunError
from ecavg.common.schema import read_header
from ecavg.common.weights import copy_into, load_into, read_state_dict, write_state_dict

OTHER_WEIGHTS = [
    ({"3.bias": None}, "3.bias is missing"),
    ({"3.bias": torch.zeros(3)}, r"3.bias is F32 \[3\], the run's model has F32 \[2\]"),
    ({"3.bias": torch.zeros(2, dtype=torch.float64)}, r"3.bias is F64 \[2\]"),
    ({"extra": torch.zeros(1)}, "extra is F32"),
]


def small_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_state_dict_comes_back_with_buffers_and_dtypes(tmp_path: Path) -> None:
    model = small_model()
    model[1].num_batches_tracked.fill_(2**40)
    write_state_dict(model.state_dict(), tmp_path / "x")
    found = read_state_dict(tmp_path / "x")
    assert_same(found, model.state_dict())
    assert found["1.num_batches_tracked"].dtype == torch.int64


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.uint8, torch.bool],
)
def test_every_dtype_comes_back_bit_by_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    state_dict = {"t": torch.randn(3, 4).mul(3).to(dtype), "scalar": torch.ones((), dtype=dtype)}
    write_state_dict({**state_dict, "empty": torch.ones(0, 2, dtype=dtype)}, tmp_path / "x")
    found = read_state_dict(tmp_path / "x")
    assert found.pop("empty").shape == (0, 2)
    assert_same(found, state_dict)


def test_tied_sliced_and_transposed_tensors_survive(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    state_dict = {"a": base, "tied": base, "row": base[1], "turned": base.T, "part": base[:, ::2]}
    write_state_dict(state_dict, tmp_path / "x")
    assert_same(load_file(tmp_path / "x"), state_dict)
    assert_same(read_state_dict(tmp_path / "x"), state_dict)


def test_same_tensors_give_the_same_bytes_in_any_order_and_layout(tmp_path: Path) -> None:
    state_dict = small_model().state_dict()
    write_state_dict(state_dict, tmp_path / "a")
    turned = small_model().to(memory_format=torch.channels_last).state_dict()
    write_state_dict(dict(reversed(turned.items())), tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert read_header(tmp_path / "a").metadata == {"format": "pt"}


def test_parameters_can_be_trained_on_after_writing(tmp_path: Path) -> None:
    model = small_model()
    write_state_dict(dict(model.named_parameters()), tmp_path / "x")
    before = read_state_dict(tmp_path / "x")["3.weight"].clone()
    with torch.no_grad():
        model[3].weight.add_(1)
    assert torch.equal(read_state_dict(tmp_path / "x")["3.weight"], before)


def test_failed_write_is_an_os_error_and_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x"
    write_state_dict({"t": torch.ones(2)}, path)
    before = path.read_bytes()

    def fail(_tensors: object, partial: Path, **_: object) -> None:
        partial.write_bytes(b"half")
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("ecavg.common.weights.save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        write_state_dict({"t": torch.zeros(2)}, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_folder_that_is_not_there_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_state_dict({"t": torch.ones(2)}, tmp_path / "missing" / "x")
    with pytest.raises(FileNotFoundError):
        read_state_dict(tmp_path / "x")


def test_weights_load_into_another_model_of_the_same_kind(tmp_path: Path) -> None:
    trained, fresh = small_model(1), small_model(2)
    write_state_dict(trained.state_dict(), tmp_path / "x")
    weight = fresh[3].weight
    load_into(fresh, tmp_path / "x")
    assert_same(fresh.state_dict(), trained.state_dict())
    assert fresh[3].weight is weight
    assert weight.requires_grad


def test_weights_load_into_a_model_in_channels_last_layout(tmp_path: Path) -> None:
    trained, fresh = small_model(1), small_model(2).to(memory_format=torch.channels_last)
    write_state_dict(trained.state_dict(), tmp_path / "x")
    load_into(fresh, tmp_path / "x")
    assert_same(fresh.state_dict(), trained.state_dict())


@pytest.mark.parametrize(("change", "message"), OTHER_WEIGHTS)
def test_other_weights_are_refused_and_the_model_is_unchanged(
    change: dict[str, torch.Tensor | None], message: str, tmp_path: Path
) -> None:
    state_dict = {**small_model(1).state_dict(), **change}
    save_file({name: t for name, t in state_dict.items() if t is not None}, tmp_path / "x")
    model = small_model(2)
    with pytest.raises(RunError, match=message) as caught:
        load_into(model, tmp_path / "x")
    assert "\n" not in str(caught.value)
    assert_same(model.state_dict(), small_model(2).state_dict())


@pytest.mark.parametrize("content", [b"", b"\x80\x04pickle" * 9, struct.pack("<Q", 2) + b"{}x"])
def test_file_that_is_no_safetensors_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(content)
    for read in (lambda: read_state_dict(path), lambda: load_into(small_model(), path)):
        with pytest.raises(RunError, match="not a usable safetensors file"):
            read()


def test_tensors_in_memory_are_copied_into_a_model_in_any_layout() -> None:
    trained, fresh = small_model(1), small_model(2).to(memory_format=torch.channels_last)
    weight = fresh[3].weight
    copy_into(fresh, {name: tensor.clone() for name, tensor in trained.state_dict().items()})
    assert_same(fresh.state_dict(), trained.state_dict())
    assert fresh[3].weight is weight
    assert weight.requires_grad


def test_mnasnet_takes_a_plain_dict() -> None:
    trained, fresh = (torchvision.models.mnasnet0_5(num_classes=3) for _ in range(2))
    plain = dict(trained.state_dict())
    with pytest.raises(ValueError, match="version"):
        fresh.load_state_dict(plain)  # why copy_into is there
    copy_into(fresh, plain)
    assert_same(fresh.state_dict(), trained.state_dict())


@pytest.mark.parametrize(("change", "message"), OTHER_WEIGHTS)
def test_other_tensors_in_memory_are_refused_and_the_model_is_unchanged(
    change: dict[str, torch.Tensor | None], message: str
) -> None:
    state_dict = {**small_model(1).state_dict(), **change}
    model = small_model(2)
    with pytest.raises(RunError, match=message) as caught:
        copy_into(model, {name: t for name, t in state_dict.items() if t is not None})
    assert "\n" not in str(caught.value)
    assert_same(model.state_dict(), small_model(2).state_dict())
