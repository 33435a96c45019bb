"""Weights in several files: what an index may say, and dividing a file."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ecavg.common import sharded
from ecavg.common.errors import InvalidError
from ecavg.common.schema import read_header
from ecavg.common.sharded import weight_files, write_sharded
from ecavg.edge_agent.data import AgentData
from ecavg.edge_agent.local import LocalModels
from ecavg.edge_agent.state import AgentState
from tests.unit.test_agent_state import RUN, ignore, make_shard

TENSORS = {
    "a": torch.arange(6.0).reshape(2, 3),
    "b": torch.arange(4, dtype=torch.int64),
    "c": torch.arange(5.0).to(torch.bfloat16),
    "d": torch.zeros(0, 3),
}


def write(folder: Path, index: object) -> Path:
    save_file({"a": TENSORS["a"]}, folder / "one.safetensors")
    save_file({"b": TENSORS["b"]}, folder / "two.safetensors")
    path = folder / "model.safetensors.index.json"
    path.write_text(index if isinstance(index, str) else json.dumps(index), "utf-8")
    return path


@pytest.mark.parametrize("max_file_bytes", [1, 24, 40, 10**9])
def test_divided_weights_are_the_same(max_file_bytes: int, tmp_path: Path) -> None:
    whole, index = tmp_path / "whole", tmp_path / "out/model.safetensors.index.json"
    index.parent.mkdir()
    save_file(TENSORS, whole)
    write_sharded(whole, index, max_file_bytes)
    files = weight_files(index)
    found = [load_file(path) for path in files]
    assert sum(map(len, found)) == len(TENSORS)
    together = {name: tensor for each in found for name, tensor in each.items()}
    assert together.keys() == TENSORS.keys()
    assert all(torch.equal(together[name], tensor) for name, tensor in TENSORS.items())
    for path, tensors in zip(files, found, strict=True):
        data = sum(spec.num_bytes for spec in read_header(path).schema.values())
        assert data <= max_file_bytes or len([each for each in tensors.values() if each.numel()]) == 1
    total = sum(tensor.nbytes for tensor in TENSORS.values())
    assert json.loads(index.read_text("utf-8"))["metadata"]["total_size"] == total


def test_files_of_an_earlier_index_are_removed_when_the_new_one_is_there(tmp_path: Path) -> None:
    whole, index = tmp_path / "whole", tmp_path / "out/model.safetensors.index.json"
    index.parent.mkdir()
    for value in (1.0, 2.0):
        save_file({"a": torch.full((4,), value), "b": torch.zeros(4)}, whole)
        write_sharded(whole, index, 16)
    files = weight_files(index)
    assert {*index.parent.iterdir()} == {index, *files}
    assert torch.equal(load_file(files[0])["a"], torch.full((4,), 2.0))


def test_path_of_one_file_is_that_file(tmp_path: Path) -> None:
    assert weight_files(tmp_path / "x.safetensors") == [tmp_path / "x.safetensors"]


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "not an index of weights"),
        ("[]", "not an index of weights"),
        ({"weight_map": {}}, "not an index of weights"),
        ({"weight_map": {"a": 1}}, "not an index of weights"),
        ({"weight_map": {"a": "../one.safetensors"}}, "not an index of weights"),
        ({"weight_map": {"a": "/etc/passwd"}}, "not an index of weights"),
        ({"weight_map": {"a": "two.safetensors"}}, "does not have the tensors that the index says"),
        (
            {"weight_map": {"a": "one.safetensors", "b": "one.safetensors"}},
            "does not have the tensors that the index says",
        ),
    ],
)
def test_index_that_is_wrong_is_refused(index: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidError, match=message):
        weight_files(write(tmp_path, index))


def test_index_that_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, {"weight_map": {"a": "one.safetensors"}})
    assert weight_files(path) == [tmp_path / "one.safetensors"]
    monkeypatch.setattr(sharded, "MAX_INDEX_BYTES", 10)
    with pytest.raises(InvalidError, match="not an index of weights"):
        weight_files(path)


def test_file_that_is_missing_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        weight_files(write(tmp_path, {"weight_map": {"a": "three.safetensors"}}))


@pytest.mark.parametrize(("max_file_bytes", "is_divided"), [(None, False), (1_000, True), (10**6, False)])
def test_large_model_in_use_is_written_in_several_files_as_well(
    max_file_bytes: int | None, is_divided: bool, tmp_path: Path
) -> None:
    disk = AgentState(tmp_path / "agent", "edge-1")
    data = AgentData(train=make_shard(40, 0), held_out=make_shard(20, 1), num_skipped=0)
    local = LocalModels(RUN, data, disk, torch.device("cpu"), (), 0.0, max_file_bytes=max_file_bytes)
    local.keep(1, None, local.pretrain(1, None, ignore))
    assert (disk.path / "model.safetensors.index.json").exists() == is_divided
    if is_divided:
        files = weight_files(disk.path / "model.safetensors.index.json")
        together = {name: tensor for path in files for name, tensor in load_file(path).items()}
        in_use = load_file(disk.model)
        assert len(files) > 1
        assert together.keys() == in_use.keys()
        assert all(torch.equal(together[name], tensor) for name, tensor in in_use.items())
