"""The parts of a model: which travel, how files of them become a model, and what each side does with them."""

from pathlib import Path

import pytest
import structlog
import torch
from torch import Tensor, nn

from ecavg.cloud_server.contribution import Contribution
from ecavg.cloud_server.jobs import JobDirectory
from ecavg.cloud_server.state_dir import StateDir
from ecavg.cloud_server.store import Store
from ecavg.cloud_server.trainer.finetune import CombinedData
from ecavg.cloud_server.trainer.measuring import Measuring
from ecavg.cloud_server.trainer.members import Member
from ecavg.cloud_server.trainer.output import write_model
from ecavg.cloud_server.trainer.selection import Selection
from ecavg.common.config import RunConfig, TrainingConfig
from ecavg.common.errors import RunError, UsageError
from ecavg.common.models import build_model, shared_part
from ecavg.common.schema import read_header
from ecavg.common.training import Examples
from ecavg.common.transfer import blob_of
from ecavg.common.weights import load_into, read_state_dict, write_state_dict
from ecavg.common.wire import Base
from ecavg.edge_agent.data import AgentData
from ecavg.edge_agent.local import LocalModels
from ecavg.edge_agent.state import AgentState
from tests.recipes import Tied
from tests.unit.states import run_rounds
from tests.unit.test_agent_state import ignore, make_shard

CPU = torch.device("cpu")
HEADS = RunConfig(
    hidden_units=8,
    share_parameters=("1.*",),
    pretrain=TrainingConfig(epochs=1, batch_size=16),
    apply="always",
)


def shared(*patterns: str) -> frozenset[str]:
    model = nn.ModuleDict(
        {
            "body": nn.ModuleDict({"0": nn.Linear(2, 2, bias=False), "bn1": nn.BatchNorm1d(2)}),
            "head": nn.Linear(2, 2),
        }
    )
    return shared_part(model, RunConfig(share_parameters=patterns))


@pytest.mark.parametrize(
    ("patterns", "left_out"),
    [
        (("*",), set()),
        (("body.*",), {"head.weight", "head.bias"}),
        (("!head.*",), {"head.weight", "head.bias"}),
        (("head.*", "body.?.weight"), {name for name in shared("*") if ".bn1." in name}),
        (("body.*", "!*.bn1.*", "head.bias"), {n for n in shared("*") if ".bn1." in n} | {"head.weight"}),
    ],
)
def test_patterns_say_what_travels(patterns: tuple[str, ...], left_out: set[str]) -> None:
    assert shared("*") - shared(*patterns) == left_out


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (
            ("features.*",),
            r"'features\.\*' matches no tensor of model 'mlp', which has body\.0\.weight, .*, …$",
        ),
        (("*", "!features.*"), r"'!features\.\*' matches no tensor"),
        (("head.*", "!*.bias", "!*.weight"), r"no tensor of model 'mlp' is left to travel"),
    ],
)
def test_patterns_that_make_no_sense_are_refused(patterns: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        shared(*patterns)


def test_trained_parameters_travel_under_all_their_names() -> None:
    assert shared_part(Tied(), RunConfig(share_parameters="trainable")) == {
        "first.weight", "second.weight", "second.bias", "last.weight", "last.bias",
    }  # fmt: skip
    one = RunConfig(share_parameters=("first.weight", "last.*"))
    assert "second.weight" in shared_part(Tied(), one)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((["1.weight", "1.bias"],), "tensor 3.weight is missing"),
        ((["1.weight", "1.bias", "3.weight"], ["3.weight", "3.bias"]), "tensor 3.weight is in two files"),
    ],
)
def test_parts_that_make_no_model_are_refused(
    parts: tuple[list[str], ...], message: str, tmp_path: Path
) -> None:
    model = build_model(HEADS)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    paths = [tmp_path / str(number) for number in range(len(parts))]
    for path, names in zip(paths, parts, strict=True):
        write_state_dict({name: torch.zeros_like(before[name]) for name in names}, path)
    with pytest.raises(RunError, match=message):
        load_into(model, *paths)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("wire", ["float32", "int8"])
def test_model_is_written_in_two_files_that_make_the_same_model(wire: str, tmp_path: Path) -> None:
    directory, start = JobDirectory(tmp_path), tmp_path / "start"
    directory.scratch_path.mkdir()
    run, model = HEADS.model_copy(update={"wire": wire}), build_model(HEADS, seed=1)
    part = shared_part(model, run)
    write_state_dict({name: t for name, t in build_model(HEADS).state_dict().items() if name in part}, start)
    base = Base(start, blob_of(start).digest) if wire == "int8" else None
    written = write_model(model, directory, run.wire, base, part)
    assert read_header(directory.weights_path).schema.keys() == {"1.weight", "1.bias"}
    assert written.rest
    assert written.rest.sha256 == blob_of(directory.rest_path).digest
    again = build_model(HEADS)
    load_into(again, directory.rest_path, directory.weights_path)
    assert all(map(torch.equal, again.state_dict().values(), model.state_dict().values()))


# ---------------------------------------------------------------------- the cloud


def deep(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 10)
    )


def permuted(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the same function, with the neurons of the first hidden layer in the opposite order."""
    moved = {"1.weight": state_dict["1.weight"].flip(0), "1.bias": state_dict["1.bias"].flip(0)}
    return state_dict | moved | {"3.weight": state_dict["3.weight"].flip(1)}


def select(folder: Path, structure: nn.Module, rest_names: set[str], *models: dict[str, Tensor]) -> Selection:
    """Select among contributions that leave these names out; the cloud's values for them are the model's."""
    (folder / "scratch").mkdir(parents=True)
    members, rest = [], folder / "rest"
    own = structure.state_dict()
    write_state_dict({name: own[name].clone() for name in rest_names}, rest)
    for agent_id, model in zip("ab", models, strict=True):
        path = folder / agent_id
        write_state_dict({name: tensor for name, tensor in model.items() if name not in rest_names}, path)
        members.append(Member(Contribution(agent_id, "", (), 1), path, path, 1.0))
    patterns = tuple(f"!{name}" for name in sorted(rest_names))
    shard = make_shard(64, 3)
    examples = Examples(*map(torch.from_numpy, shard))
    run = RunConfig(share_parameters=patterns)
    selection = Selection(
        Measuring(structure, run, CombinedData(examples, examples), CPU),
        members,
        None,
        scratch=folder / "scratch",
        rest=rest,
    )
    selection.run()
    return selection


def test_only_groups_that_travel_as_a_whole_are_aligned(tmp_path: Path) -> None:
    model = deep(1).state_dict()
    selection = select(tmp_path, deep(2), {"5.weight", "5.bias"}, model, permuted(model))
    assert {"aligned", "average"} <= selection.scores.keys()
    aligned = selection._chosen([0, 1])
    for member in aligned:
        tensors = read_state_dict(member.weights_path)
        assert all(torch.equal(tensors[name], model[name]) for name in tensors)


def test_groups_with_a_part_that_stays_are_averaged_with_a_line(tmp_path: Path) -> None:
    model = deep(1).state_dict()
    with structlog.testing.capture_logs() as lines:
        select(tmp_path, deep(2), {"3.weight", "5.weight"}, model, permuted(model))
    (said,) = [line for line in lines if line["event"] == "averaged_without_alignment"]
    assert "does not travel" in said["reason"]


def test_every_candidate_has_the_clouds_own_parts(tmp_path: Path) -> None:
    structure = deep(2)
    own = structure.state_dict()["5.weight"].clone()
    selection = select(
        tmp_path, structure, {"5.weight", "5.bias"}, deep(3).state_dict(), deep(4).state_dict()
    )
    nn.init.zeros_(structure[5].weight)
    assert torch.equal(selection.take_best().state_dict["5.weight"], own)
    assert torch.equal(structure.state_dict()["5.weight"], own)


# ---------------------------------------------------------------------- the server


def test_rest_of_a_model_is_public_with_it_and_stays_what_it_was(tmp_path: Path) -> None:
    store = Store(tmp_path)
    try:
        run_rounds(store, tmp_path, 1)
        row = store.round(1)
        assert row
        assert row.published_digest
        rests = []
        for content in (b"first", b"second"):
            (tmp_path / "made").write_bytes(content)
            rests.append(blob_of(tmp_path / "made").digest)
            store.blobs.adopt(tmp_path / "made", rests[-1])
            store.record_rest(row.published_digest, rests[-1])
        assert store.rest(row.published_digest) == rests[0]
        assert store.rest(row.initial_digest) is None
        assert [store.is_public(digest) for digest in rests] == [True, False]
        named = {each["digest"] for each in store.read("SELECT digest FROM named_blobs WHERE round = 1")}
        assert (rests[0] in named, rests[1] in named) == (True, False)
        assert StateDir(tmp_path).rest(1).name == "rest.safetensors"
    finally:
        store.close()


# ---------------------------------------------------------------------- the device


@pytest.fixture
def disk(tmp_path: Path) -> AgentState:
    return AgentState(tmp_path / "agent", "edge-1")


def local_models(disk: AgentState) -> LocalModels:
    data = AgentData(train=make_shard(40, 0), held_out=make_shard(20, 1), num_skipped=0)
    return LocalModels(HEADS, data, disk, CPU, (), 0.0)


def test_pre_trained_model_in_use_is_whole_though_the_one_before_was_measured_after_it(
    disk: AgentState, tmp_path: Path
) -> None:
    local = local_models(disk)
    worst = {name: torch.zeros_like(tensor) for name, tensor in build_model(HEADS).state_dict().items()}
    # All held-out examples are of another class.
    worst["3.bias"][9] = 1.0
    local._held_out.targets[:] = 0
    # An earlier life of the agent has left it.
    write_state_dict(worst, disk.model)
    weights, rest = published(tmp_path, 1)
    trained = local.keep(1, "ab" * 32, local.pretrain(1, weights, ignore, rest=rest))
    assert trained.rest
    in_use = read_state_dict(disk.model)
    expected = read_state_dict(disk.local_weights) | read_state_dict(disk.rest(trained.rest.digest))
    assert in_use.keys() == expected.keys()
    assert all(torch.equal(in_use[name], expected[name]) for name in expected)


def published(folder: Path, seed: int) -> tuple[Path, Path]:
    """Write the shared part and the rest of a model of the cloud."""
    tensors = build_model(HEADS, seed=seed).state_dict()
    paths = folder / f"shared-{seed}", folder / f"rest-{seed}"
    for path, number in zip(paths, "13", strict=True):
        write_state_dict({name: tensor for name, tensor in tensors.items() if name.startswith(number)}, path)
    return paths


def test_device_puts_what_is_published_together_with_its_own_part(disk: AgentState, tmp_path: Path) -> None:
    local = local_models(disk)
    weights, rest = published(tmp_path, 1)
    trained = local.keep(1, "ab" * 32, local.pretrain(1, weights, ignore, rest=rest))
    assert trained.rest
    own = read_state_dict(disk.rest(trained.rest.digest))
    assert own.keys() == {"3.weight", "3.bias"}
    assert not torch.equal(own["3.weight"], read_state_dict(rest)["3.weight"])
    in_use = read_state_dict(disk.model)
    assert all(torch.equal(in_use[name], own[name]) for name in own)

    newer, _ = published(tmp_path, 2)
    report = local.measure(1, newer, trained, ignore, rest=disk.rest(trained.rest.digest))
    local.apply(newer, report, ignore, rest=disk.rest(trained.rest.digest))
    assert report.applied
    expected = read_state_dict(newer) | own
    in_use = read_state_dict(disk.model)
    assert in_use.keys() == expected.keys()
    assert all(torch.equal(in_use[name], expected[name]) for name in expected)


def test_model_of_a_device_without_a_part_of_its_own_is_the_clouds(disk: AgentState, tmp_path: Path) -> None:
    local = local_models(disk)
    weights, rest = published(tmp_path, 1)
    local.apply(weights, local.measure(1, weights, None, ignore, rest=rest), ignore, rest=rest)
    in_use, expected = read_state_dict(disk.model), build_model(HEADS, seed=1).state_dict()
    assert all(torch.equal(in_use[name], expected[name]) for name in expected)


@pytest.mark.parametrize("is_known", [True, False])
def test_device_makes_the_part_that_the_model_is_built_with(
    disk: AgentState, tmp_path: Path, is_known: bool
) -> None:
    tensors = build_model(HEADS, seed=None if is_known else 5).state_dict()
    write_state_dict({name: tensors[name] for name in ("3.bias", "3.weight")}, tmp_path / "rest")
    blob = blob_of(tmp_path / "rest")
    assert local_models(disk).make_rest(blob) == is_known
    assert disk.weights(blob.digest).exists() == is_known


def test_parts_of_other_models_are_discarded(disk: AgentState) -> None:
    kept, other = disk.rest("ab" * 32), disk.rest("cd" * 32)
    for path in (kept, other):
        path.touch()
    disk.discard_rests_but(kept)
    assert (kept.exists(), other.exists()) == (True, False)
    disk.discard_rests_but(None)
    assert not kept.exists()
