"""A cloud that only averages: its jobs in this process, on tensors that no model is built for."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ecavg.cloud_server.contribution import Contribution
from ecavg.cloud_server.jobs import Job, JobDirectory, Result
from ecavg.cloud_server.state_dir import blob_path
from ecavg.cloud_server.trainer import work
from ecavg.cloud_server.trainer.group import Group
from ecavg.common.config import FineTuneConfig, RunConfig
from ecavg.common.errors import Reason
from ecavg.common.schema import read_header
from ecavg.common.sharded import write_sharded
from ecavg.common.transfer import blob_of
from ecavg.common.wire import Base, encode, encoding_of

# Nothing of this name can be built.
RUN = RunConfig(
    model="no-such-model",
    initial_weights="model.safetensors.index.json",
    candidates=("average",),
    fine_tune=FineTuneConfig(epochs=0),
)
SHAPES = {"embed.weight": (7, 4), "layers.0.weight": (4, 4), "layers.0.steps": (), "head.weight": (3, 4)}


class Cloud:
    """Jobs of one run, with the blobs that they name."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.folder, self.blobs = folder, folder / "blobs"
        index = folder / "model.safetensors.index.json"
        self.run = RUN.model_copy(update={"initial_weights": str(index), **changes})
        save_file(tensors(0), folder / "whole")
        write_sharded(folder / "whole", index, 100)

    def do(self, name: str, **fields: Any) -> tuple[Result, JobDirectory]:
        directory = JobDirectory(self.folder / "jobs" / name)
        defaults = {"kind": "round", "round": 1, "run": self.run, "device": "cpu", "initial_weights": None}
        directory.write_job(Job(**{**defaults, "name": name, **fields}))
        work.run_job(directory, blobs_dir=self.blobs, device_name="cpu", group=Group())
        result = directory.read_result()
        assert result
        return result, directory

    def put(self, path: Path) -> str:
        digest = blob_of(path).digest
        blob_path(self.blobs, digest).parent.mkdir(parents=True, exist_ok=True)
        path.replace(blob_path(self.blobs, digest))
        return digest

    def contributed(self, agent_id: str, values: dict[str, Tensor], start: str, num_examples: int = 1) -> Any:
        path = self.folder / agent_id
        save_file(values, path)
        if self.run.wire != "float32":
            encode(path, self.folder / "sent", self.run.wire, base=Base(blob_path(self.blobs, start), start))
            path = self.folder / "sent"
        return Contribution(agent_id, self.put(path), (), num_examples, start)

    def begin(self) -> tuple[str, str | None]:
        """Make the initial weights, and return the digests of what travels and of the rest."""
        result, directory = self.do("initialise", kind="initialise", round=0)
        assert result.error is None
        rest = self.put(directory.rest_path) if result.rest else None
        return self.put(directory.weights_path), rest


def tensors(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return made | {"layers.0.steps": torch.tensor(seed)}


@pytest.mark.parametrize("wire", ["float32", "bfloat16", "int8"])
def test_round_publishes_the_weighted_mean_of_a_model_that_is_never_built(tmp_path: Path, wire: str) -> None:
    cloud = Cloud(tmp_path, wire=wire)
    start, rest = cloud.begin()
    assert rest is None
    models = [tensors(1), tensors(2)]
    contributions = tuple(
        cloud.contributed(agent_id, model, start, number)
        for agent_id, model, number in zip("ab", models, (1, 3), strict=True)
    )
    fields = {"initial_weights": start, "contributions": contributions}
    result, directory = cloud.do("round-0001", **fields)
    assert result.error is None
    assert (result.start, result.published, result.score_published) == ("average", "start", None)
    found, tolerance = load_file(directory.weights_path), 0.0 if wire == "float32" else 0.05
    assert found.keys() == SHAPES.keys()
    for name in ("embed.weight", "layers.0.weight", "head.weight"):
        expected = ((models[0][name].double() + 3 * models[1][name].double()) / 4).float()
        torch.testing.assert_close(found[name], expected, rtol=0, atol=tolerance)
    assert found["layers.0.steps"] == 2
    if wire != "float32":
        assert result.encoded
        assert encoding_of(read_header(directory.encoded_path)).wire == wire
    again, _ = cloud.do("round-0001-again", **fields)
    assert again.weights == result.weights
    assert not directory.scratch_path.exists()


@pytest.mark.parametrize("aggregator", ["trimmed_mean", "median", "geometric_median"])
def test_every_aggregator_can_be_had_without_a_model(tmp_path: Path, aggregator: str) -> None:
    cloud = Cloud(tmp_path, aggregator=aggregator, max_norm_ratio=0)
    start, _ = cloud.begin()
    far = {name: tensor + 100 for name, tensor in tensors(1).items()}
    models = [tensors(1), tensors(1), tensors(1), tensors(1), far]
    contributions = tuple(
        cloud.contributed(name, model, start) for name, model in zip("abcde", models, strict=True)
    )
    _, directory = cloud.do("round-0001", initial_weights=start, contributions=contributions)
    for name, tensor in load_file(directory.weights_path).items():
        torch.testing.assert_close(tensor, tensors(1)[name], rtol=0, atol=1e-4)


def test_large_updates_are_clipped_and_nothing_is_audited(tmp_path: Path) -> None:
    cloud = Cloud(tmp_path)
    start, _ = cloud.begin()
    begin = tensors(0)
    steps = {"a": 1.0, "b": 1.0, "c": 30.0}
    contributions = tuple(
        cloud.contributed(agent_id, begin | {"head.weight": begin["head.weight"] + step}, start)
        for agent_id, step in steps.items()
    )
    result, directory = cloud.do("round-0001", initial_weights=start, contributions=contributions)
    assert [agent.scale for agent in result.audit] == pytest.approx([1, 1, 0.1])
    assert all(agent.label_share is None and agent.model_share is None for agent in result.audit)
    moved = load_file(directory.weights_path)["head.weight"] - begin["head.weight"]
    torch.testing.assert_close(moved, torch.full((3, 4), 5 / 3))


def test_large_updates_are_left_out(tmp_path: Path) -> None:
    cloud = Cloud(tmp_path, on_large_update="reject")
    start, _ = cloud.begin()
    contributions = tuple(
        cloud.contributed(agent_id, {name: t + step for name, t in tensors(0).items()}, start)
        for agent_id, step in {"a": 1, "b": 2, "c": 300}.items()
    )
    result, _ = cloud.do("round-0001", initial_weights=start, contributions=contributions)
    assert [agent.left_out for agent in result.audit] == [None, None, Reason.LARGE_UPDATE]


def test_rest_stays_as_it_was_in_the_files(tmp_path: Path) -> None:
    cloud = Cloud(tmp_path, share_parameters=("layers.*",))
    start, rest = cloud.begin()
    assert rest
    expected = {name: tensor for name, tensor in tensors(0).items() if not name.startswith("layers.")}
    found = load_file(blob_path(cloud.blobs, rest))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    shared = {name: tensor for name, tensor in tensors(1).items() if name not in expected}
    contributions = (cloud.contributed("a", shared, start),)
    fields = {"initial_weights": start, "initial_rest": rest, "contributions": contributions}
    result, directory = cloud.do("round-0001", **fields)
    assert result.rest
    assert result.rest.sha256 == rest == blob_of(directory.rest_path).digest
    assert load_file(directory.weights_path).keys() == shared.keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"share_parameters": "trainable"}, "known by building the model, which this cloud does not do"),
        ({"share_parameters": ("body.*",)}, "'body.*' matches no tensor"),
        ({"initial_weights": "nowhere.safetensors.index.json"}, "cannot read nowhere.safetensors.index.json"),
    ],
)
def test_run_that_cannot_begin_says_why(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    result, _ = Cloud(tmp_path, **changes).do("initialise", kind="initialise", round=0)
    assert result.error
    assert result.error.kind == "usage"
    assert message in result.error.message


def test_average_that_is_not_finite_fails_in_one_line(tmp_path: Path) -> None:
    cloud = Cloud(tmp_path, weights="uniform", max_norm_ratio=0)
    start, _ = cloud.begin()
    largest = {"head.weight": torch.full((3, 4), 3e38), "embed.weight": torch.zeros(7, 4)}
    contributions = (cloud.contributed("a", tensors(0) | largest, start),)
    path = blob_path(cloud.blobs, contributions[0].weights_digest)
    damaged = tensors(0) | {"head.weight": torch.full((3, 4), torch.inf)}
    save_file(damaged, path)
    result, _ = cloud.do("round-0001", initial_weights=start, contributions=contributions)
    assert result.error
    assert "the average cannot be used: tensor head.weight holds NaN or infinite" in result.error.message


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"initial_weights": "one.safetensors"}, False),
        ({"candidates": ("average", "best_agent")}, False),
        ({"fine_tune": FineTuneConfig(epochs=1)}, False),
    ],
)
def test_only_an_average_of_weights_in_several_files_needs_no_model(
    changes: dict[str, Any], expected: bool
) -> None:
    assert RUN.model_copy(update=changes).only_averages is expected
