"""The trainer on real digits: its jobs in this process, and itself as a process that is killed."""

import errno
import hashlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from sklearn.datasets import load_digits

from ecavg.cloud_server.contribution import Contribution
from ecavg.cloud_server.jobs import Job, JobDirectory, Result
from ecavg.cloud_server.state_dir import blob_path
from ecavg.cloud_server.trainer import __main__ as trainer_main
from ecavg.cloud_server.trainer import pipeline, work
from ecavg.cloud_server.trainer.aggregation import mean
from ecavg.cloud_server.trainer.finetune import CombinedData, combine
from ecavg.cloud_server.trainer.group import OWN_STORE, Group
from ecavg.cloud_server.training import runner
from ecavg.common import training, training_step
from ecavg.common.config import FineTuneConfig, RunConfig
from ecavg.common.errors import Reason
from ecavg.common.evaluation import evaluate
from ecavg.common.mapped import in_memory
from ecavg.common.models import build_model
from ecavg.common.schema import read_header
from ecavg.common.seeds import derive_seed
from ecavg.common.shards import Shard, write_shard
from ecavg.common.tasks.task import task_of
from ecavg.common.training import Examples, train
from ecavg.common.transfer import blob_of
from ecavg.common.weights import read_state_dict, write_state_dict
from ecavg.common.wire import Base, decode, encode, encoding_of
from tests.processes import ROOT, WAIT_SECONDS, free_port, until
from tests.recipes import recipe_of
from tests.tapes import Failing

RUN = RunConfig(hidden_units=32, fine_tune=FineTuneConfig(epochs=3, batch_size=64, learning_rate=0.05))
ENDLESS = RUN.model_copy(update={"fine_tune": RUN.fine_tune.model_copy(update={"epochs": 100_000})})
CPU = torch.device("cpu")
AGENTS = ("ann", "bob")


def digits() -> Shard:
    bunch = load_digits()
    images = (bunch.images * (255 / 16)).astype(np.uint8)[:, None]
    return Shard(images, bunch.target.astype(np.int64))


def part(shard: Shard, index: slice) -> Shard:
    return Shard(shard.inputs[index], shard.targets[index])


def put_blob(path: Path, blobs_dir: Path) -> str:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    blob_path(blobs_dir, digest).parent.mkdir(parents=True, exist_ok=True)
    path.rename(blob_path(blobs_dir, digest))
    return digest


def put_shard(shard: Shard, blobs_dir: Path) -> str:
    write_shard(blobs_dir / "new", shard)
    return put_blob(blobs_dir / "new", blobs_dir)


@pytest.fixture(scope="module")
def blobs_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("blobs")


@pytest.fixture(scope="module")
def contributions(blobs_dir) -> tuple[Contribution, ...]:
    """Two agents, each with a model that has seen its own half of the digits."""
    everything = digits()
    halves = [part(everything, slice(0, 900)), part(everything, slice(900, None))]
    made = []
    for agent_id, half in zip(AGENTS, halves, strict=True):
        model = build_model(RUN, seed=derive_seed(RUN.seed, "initial_weights"))
        images, labels = torch.from_numpy(half.inputs), torch.from_numpy(half.targets)
        train(model, Examples(images, labels), recipe_of(RUN, seed=1), device=CPU)
        write_state_dict(model.state_dict(), blobs_dir / "new")
        weights = put_blob(blobs_dir / "new", blobs_dir)
        shards = (put_shard(half, blobs_dir),)
        made.append(Contribution(agent_id, weights, shards, len(labels)))
    return tuple(made)


@pytest.fixture
def do(tmp_path, blobs_dir, contributions):
    """Return a function that does a job in this process; its arguments replace an ordinary round's fields."""

    def do(**fields) -> tuple[Result, JobDirectory]:
        directory = JobDirectory(tmp_path / "jobs" / fields.get("name", "round-0001"))
        directory.write_job(job(**{"contributions": contributions, **fields}))
        work.run_job(directory, blobs_dir=blobs_dir, device_name="cpu", group=Group())
        return directory.read_result(), directory

    return do


def job(contributions: tuple[Contribution, ...], **fields) -> Job:
    defaults = {"kind": "round", "name": "round-0001", "round": 1, "run": RUN, "device": "auto"}
    return Job(**{**defaults, "initial_weights": None, "contributions": contributions, **fields})


def test_initial_weights_are_those_of_the_seed(do):
    result, directory = do(kind="initialise", name="initialise", round=0, contributions=())
    assert result.error is None
    assert result.weights.sha256 == hashlib.sha256(directory.weights_path.read_bytes()).hexdigest()
    assert result.weights.bytes == directory.weights_path.stat().st_size
    assert result.num_parameters == 64 * 32 + 32 + 32 * 10 + 10
    again, _ = do(kind="initialise", name="again", round=0, contributions=())
    other, _ = do(kind="initialise", name="other", round=0, run=RUN.model_copy(update={"seed": 1}))
    assert again.weights == result.weights != other.weights


def test_a_round_averages_fine_tunes_and_evaluates(do, blobs_dir, contributions):
    result, directory = do()
    assert result.error is None
    data = combine(RUN, contributions, blobs_dir)
    model = build_model(RUN, seed=0)

    paths = [blob_path(blobs_dir, contribution.weights_digest) for contribution in contributions]
    model.load_state_dict(mean(paths, [900, 897]))
    average = evaluate(model, *data.held_out, task=task_of(RUN), device=CPU)
    model.load_state_dict(read_state_dict(directory.weights_path))
    published = evaluate(model, *data.held_out, task=task_of(RUN), device=CPU)

    assert average.num_examples == 180  # a tenth
    assert result.candidates["average"] == average.score
    assert set(result.candidates) == {"aligned", "average", "best_agent", "greedy_soup"}  # none is previous
    assert result.candidates[result.start] == max(result.candidates.values())
    assert set(result.soup) <= set(AGENTS)
    assert result.published == "fine_tuned"
    assert result.score_fine_tuned == result.score_published == published.score > 0.9
    assert [item.label for item in result.classes] == list(range(10))
    assert sum(item.num_examples for item in result.classes) == 180
    num_right = sum(item.num_examples * item.score_published for item in result.classes)
    assert num_right == pytest.approx(180 * published.score)
    assert set(result.seconds) == {"aggregate", "fine_tune", "evaluate"}
    assert min(result.seconds.values()) > 0
    assert result.weights.sha256 == hashlib.sha256(directory.weights_path.read_bytes()).hexdigest()
    assert not directory.is_pending


def test_progress_goes_through_the_phases_in_order(do):
    _, directory = do()
    lines, _ = directory.read_progress(0)
    assert list(dict.fromkeys(line.phase for line in lines)) == ["aggregating", "fine_tuning", "evaluating"]
    assert [line.phase for line in lines] == sorted((line.phase for line in lines), key=phase_order)
    last = {line.phase: line for line in lines}
    assert all(line.done == line.total for line in last.values())
    assert last["aggregating"].total == len(RUN.candidates)
    assert last["fine_tuning"].total == 3 * 26  # epochs of 1617 images in batches of 64
    assert last["fine_tuning"].loss > 0


def phase_order(phase: str) -> int:
    return ["aggregating", "fine_tuning", "evaluating"].index(phase)


def test_the_order_of_contributions_does_not_show(do, contributions):
    one, _ = do(name="one")
    other, _ = do(name="other", contributions=contributions[::-1])
    assert one.weights == other.weights


def test_rounds_differ_in_their_randomness(do):
    one, _ = do(name="one", round=1)
    two, _ = do(name="two", round=2)
    assert one.weights != two.weights


def test_a_new_attempt_gives_the_same_bytes_whatever_the_old_one_left(do, tmp_path):
    first, _ = do(name="first")
    second = JobDirectory(tmp_path / "jobs" / "second")
    second.path.mkdir()
    second.weights_path.write_bytes(b"half of a model")
    again, _ = do(name="second")
    assert again.weights == first.weights


def test_agents_without_data_get_their_average(do, blobs_dir, contributions):
    alone = tuple(replace(item, shard_digests=()) for item in contributions)
    result, directory = do(contributions=alone)
    assert result.error is None
    assert (result.candidates, result.score_published) == ({}, None)
    expected = mean([blob_path(blobs_dir, item.weights_digest) for item in alone], [900, 897])
    found = read_state_dict(directory.weights_path)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    phases = {line.phase for line in directory.read_progress(0)[0]}
    assert phases == {"aggregating", "fine_tuning", "evaluating"}


def test_a_single_example_is_trained_on(do, blobs_dir, contributions):
    one = put_shard(part(digits(), slice(0, 1)), blobs_dir)
    single = replace(contributions[0], shard_digests=(one,), num_examples=1)
    result, _ = do(contributions=(single, contributions[1]))
    assert result.error is None


def test_each_shard_of_an_agent_is_split_by_itself(blobs_dir, contributions):
    """So that a shard which the server has had before is split as before, whatever has come to it."""
    half = part(digits(), slice(0, 900))
    pieces = [part(half, slice(0, 1)), part(half, slice(1, 500)), part(half, slice(500, 900))]
    shards = [put_shard(piece, blobs_dir) for piece in pieces]

    def combined(*shards: str) -> CombinedData:
        return combine(RUN, [replace(contributions[0], shard_digests=shards)], blobs_dir)

    together = combined(*shards)
    for index, name in enumerate(("train", "held_out")):
        apart = [combined(shard)[index] for shard in shards]
        assert torch.equal(getattr(together, name).inputs, torch.cat([each.inputs for each in apart]))
        assert torch.equal(getattr(together, name).targets, torch.cat([each.targets for each in apart]))
    assert len(together.train.targets) + len(together.held_out.targets) == 900


def test_combined_data_is_every_example_once_and_held_out_alike_in_any_company(blobs_dir, contributions):
    both = combine(RUN, contributions, blobs_dir)
    parts = [in_memory(part.inputs) for part in both]
    images = torch.cat(parts).flatten(1).numpy()
    everything = digits().inputs.reshape(len(images), -1)
    assert sorted(map(bytes, images)) == sorted(map(bytes, everything))
    alone = combine(RUN, contributions[1:], blobs_dir)
    assert torch.equal(both.held_out.inputs[-len(alone.held_out.targets) :], alone.held_out.inputs)


class Full(Exception): ...


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "out_of_memory", "out of memory"),
        (MemoryError(), "out_of_memory", "out of memory"),
        (RuntimeError("CUDA error: out of memory\nmore"), "out_of_memory", "CUDA error: out of memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when"), "out_of_memory", "CUBLAS_STATUS"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out_of_memory", "can't allocate"),
        (Full("first line\nsecond line"), "failed", "Full: first line; see trainer.log"),
    ],
)
def test_what_goes_wrong_is_the_result(do, monkeypatch, error, kind, message):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(pipeline, "fine_tune", fail)
    result, directory = do()
    assert result.weights is None
    assert result.error.kind == kind
    assert message in result.error.message
    assert "\n" not in result.error.message
    assert not directory.weights_path.exists()


def test_round_whose_graph_takes_the_last_memory_is_done_with_half_the_batch_and_no_graph(
    do, contributions, monkeypatch
):
    recorder = Failing(0, error=torch.OutOfMemoryError, text="CUDA out of memory")
    take = training_step.TrainingStep.take

    def take_or_fail(step, batch, batch_size):
        # There is no memory for a full batch any more, and enough for half of one.
        if recorder.num_asked and batch_size > 32:
            raise torch.OutOfMemoryError("CUDA out of memory")
        take(step, batch, batch_size)

    monkeypatch.setattr(training, "MIN_STEPS", 1)
    monkeypatch.setattr(training, "recorder_for", lambda device: recorder)
    monkeypatch.setattr(training_step.TrainingStep, "take", take_or_fail)
    first = job(contributions)
    result, _ = do(run=first.run)
    assert result.error.kind == "out_of_memory"
    second = runner._next_attempt(first, result.error)
    assert (second.attempt, second.run.fine_tune.batch_size) == (2, 32)
    result, _ = do(name="again", attempt=second.attempt, run=second.run)
    assert result.error is None
    assert result.score_fine_tuned > 0.5
    # The second attempt did not even try to record.
    assert recorder.num_asked == 1


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"run": RUN.model_copy(update={"model": "resnet9000"})}, "usage", "unknown model 'resnet9000'"),
        ({"device": "tpu"}, "usage", "device 'tpu' is not there"),
        (
            {"contributions": (Contribution("a", "0" * 64, (), 1),)},
            "failed",
            "No such file",
        ),
        ({"contributions": ()}, "failed", "no contribution"),
    ],
)
def test_bad_jobs_fail_with_one_line(do, changes, kind, message):
    result, _ = do(**changes)
    assert result.error.kind == kind
    assert message in result.error.message


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_disk_that_takes_no_weights_is_waited_for_and_costs_no_attempt(do, monkeypatch, number):
    def fail(*_, **__):
        raise SafetensorError(f"I/O error: {os.strerror(number)} (os error {number})")

    monkeypatch.setattr("ecavg.common.weights.save_file", fail)
    result, directory = do()
    assert result.error.kind == "storage"
    assert os.strerror(number) in result.error.message
    assert not directory.weights_path.exists()


def test_a_fine_tune_that_makes_it_worse_is_not_published(do, monkeypatch):
    monkeypatch.setattr(pipeline, "fine_tune", lambda model, *_, **__: model[1].weight.data.fill_(np.inf))
    result, directory = do()
    assert result.published == "start"
    assert result.score_fine_tuned < result.score_published == result.candidates[result.start]
    assert all(tensor.isfinite().all() for tensor in read_state_dict(directory.weights_path).values())


def test_a_model_that_is_not_finite_is_not_published(do, monkeypatch, blobs_dir, contributions):
    monkeypatch.setattr(pipeline, "fine_tune", lambda model, *_, **__: model[1].weight.data.fill_(np.inf))
    alone = put_shard(part(digits(), slice(0, 1)), blobs_dir)  # nothing of it can be held out
    result, directory = do(contributions=(replace(contributions[0], shard_digests=(alone,)),))
    assert result.error.kind == "failed"
    assert "1.weight" in result.error.message
    assert "run.fine_tune.learning_rate" in result.error.message
    assert not directory.weights_path.exists()


def test_the_previous_global_model_is_a_candidate_from_the_second_round_on(do, contributions):
    initial = contributions[0].weights_digest
    first, _ = do(initial_weights=initial)
    second, _ = do(name="round-0002", round=2, initial_weights=initial)
    assert "previous" not in first.candidates
    assert second.candidates["previous"] > 0.5


@pytest.mark.parametrize("aggregator", ["trimmed_mean", "median", "geometric_median"])
def test_every_aggregator_makes_a_round(do, aggregator):
    result, _ = do(run=RUN.model_copy(update={"aggregator": aggregator}))
    assert result.error is None
    assert result.score_published > 0.9


# Who takes part


@pytest.fixture(scope="module")
def three(blobs_dir) -> tuple[str, tuple[Contribution, ...]]:
    """Return the initial weights' digest and three contributions, each trained on a third of the digits."""
    start = build_model(RUN, seed=derive_seed(RUN.seed, "initial_weights"))
    write_state_dict(start.state_dict(), blobs_dir / "new")
    digest, made = put_blob(blobs_dir / "new", blobs_dir), []
    for index, agent_id in enumerate(("ann", "bob", "cas")):
        third = part(digits(), slice(index, None, 3))
        model = build_model(RUN, seed=derive_seed(RUN.seed, "initial_weights"))
        images, labels = torch.from_numpy(third.inputs.copy()), torch.from_numpy(third.targets.copy())
        train(model, Examples(images, labels), recipe_of(RUN, seed=index), device=CPU)
        write_state_dict(model.state_dict(), blobs_dir / "new")
        weights = put_blob(blobs_dir / "new", blobs_dir)
        shards = (put_shard(third, blobs_dir),)
        made.append(Contribution(agent_id, weights, shards, 599, initial_digest=digest))
    return digest, tuple(made)


def with_factor(item: Contribution, factor: float, start: str, blobs_dir: Path) -> Contribution:
    """Return the contribution with its update multiplied by the factor."""
    origin, weights = (read_state_dict(blob_path(blobs_dir, each)) for each in (start, item.weights_digest))
    far = {name: origin[name] + factor * (tensor - origin[name]) for name, tensor in weights.items()}
    write_state_dict(far, blobs_dir / "new")
    return replace(item, weights_digest=put_blob(blobs_dir / "new", blobs_dir))


def test_honest_rounds_publish_the_same_bytes_with_and_without_screening(do, monkeypatch, three):
    start, contributions = three
    screened, _ = do(name="screened", contributions=contributions, initial_weights=start)
    assert [agent.agent_id for agent in screened.audit] == ["ann", "bob", "cas"]
    assert all(agent.scale == 1 and not agent.flags for agent in screened.audit)
    assert screened.seconds["audit"] > 0
    monkeypatch.setattr(pipeline, "MIN_AGENTS", 100)
    plain, _ = do(name="plain", contributions=contributions, initial_weights=start)
    assert plain.audit == ()
    assert plain.weights == screened.weights


@pytest.mark.parametrize("factor", [1000.0, 1e30])
def test_update_that_goes_too_far_is_clipped_before_anything_is_made_of_it(do, blobs_dir, three, factor):
    start, (ann, bob, cas) = three
    far = with_factor(cas, factor, start, blobs_dir)
    run = RUN.model_copy(update={"candidates": ("average",), "quarantine": "report"})
    sent = tuple(replace(item, shard_digests=()) for item in (ann, bob, far))
    result, directory = do(contributions=sent, initial_weights=start, run=run)
    assert result.error is None
    assert [agent.scale < 1 for agent in result.audit] == [False, False, True]
    paths = [
        blob_path(blobs_dir, each) for each in (start, *(item.weights_digest for item in (ann, bob, far)))
    ]
    origin, *tensors = ([*read_state_dict(path).values()] for path in paths)
    flat = [
        np.concatenate([(b - a).double().numpy().ravel() for a, b in zip(origin, each, strict=True)])
        for each in tensors
    ]
    norms = [float(np.linalg.norm(each)) for each in flat]
    flat[2] *= 3 * sorted(norms)[1] / norms[2]
    published = read_state_dict(directory.weights_path).values()
    found = np.concatenate([(b - a).double().numpy().ravel() for a, b in zip(origin, published, strict=True)])
    np.testing.assert_allclose(found, np.mean(flat, axis=0), atol=1e-6)


def test_update_that_is_rejected_leaves_neither_weights_nor_data(do, blobs_dir, three):
    start, (ann, bob, cas) = three
    far = with_factor(cas, 1000.0, start, blobs_dir)
    run = RUN.model_copy(update={"on_large_update": "reject"})
    result, _ = do(name="three", contributions=(ann, bob, far), initial_weights=start, run=run)
    assert [agent.left_out for agent in result.audit] == [None, None, Reason.LARGE_UPDATE]
    without, _ = do(name="two", contributions=(ann, bob), initial_weights=start, run=run)
    assert result.weights == without.weights
    assert result.classes == without.classes


def test_without_a_common_start_the_weights_themselves_are_compared(do, blobs_dir, three):
    start, contributions = three
    own = [replace(item, initial_digest=None) for item in contributions]
    far = with_factor(own[2], 1000.0, start, blobs_dir)
    result, _ = do(contributions=(*own[:2], far), initial_weights=start)
    assert result.error is None
    assert [agent.scale < 1 for agent in result.audit] == [False, False, True]
    tensors = read_state_dict(blob_path(blobs_dir, own[0].weights_digest)).values()
    norm = float(np.linalg.norm(np.concatenate([tensor.double().numpy().ravel() for tensor in tensors])))
    assert result.audit[0].update_norm == pytest.approx(norm)


# What travels


def encoded_as(wire, contributions, blobs_dir) -> tuple[Base, tuple[Contribution, ...]]:
    """Return the base weights, and the contributions encoded as agents send them that started from these."""
    write_state_dict(
        build_model(RUN, seed=derive_seed(RUN.seed, "initial_weights")).state_dict(), blobs_dir / "b"
    )
    digest = put_blob(blobs_dir / "b", blobs_dir)
    base, sent = Base(blob_path(blobs_dir, digest), digest), []
    for item in contributions:
        encode(blob_path(blobs_dir, item.weights_digest), blobs_dir / "new", wire, base=base)
        sent.append(replace(item, weights_digest=put_blob(blobs_dir / "new", blobs_dir)))
    return base, tuple(sent)


def with_wire(wire: str) -> RunConfig:
    return RUN.model_copy(update={"wire": wire})


def accuracy_of(path: Path, data) -> float:
    model = build_model(RUN, seed=0)
    model.load_state_dict(read_state_dict(path))
    return evaluate(model, *data.held_out, task=task_of(RUN), device=CPU).score


@pytest.mark.parametrize("wire", ["bfloat16", "int8"])
def test_published_is_what_the_agents_decode(do, blobs_dir, contributions, tmp_path, wire):
    base, sent = encoded_as(wire, contributions, blobs_dir)
    result, directory = do(run=with_wire(wire), contributions=sent, initial_weights=base.digest)
    assert result.error is None
    assert blob_of(directory.encoded_path) == (result.encoded.sha256, result.encoded.bytes)
    assert result.encoded.base == (base.digest if wire == "int8" else None)
    decode(directory.encoded_path, tmp_path / "decoded", base=base if result.encoded.base else None)
    assert (tmp_path / "decoded").read_bytes() == directory.weights_path.read_bytes()
    assert read_header(directory.weights_path).metadata == {"format": "pt"}
    data = combine(RUN, contributions, blobs_dir)
    assert accuracy_of(directory.weights_path, data) == result.score_published > 0.9
    assert not directory.scratch_path.exists()


@pytest.mark.parametrize("wire", ["bfloat16", "int8"])
def test_contributions_are_decoded_before_they_are_averaged(do, blobs_dir, contributions, tmp_path, wire):
    base, sent = encoded_as(wire, contributions, blobs_dir)
    alone = tuple(replace(item, shard_digests=()) for item in sent)  # so that nothing is fine-tuned
    _, directory = do(run=with_wire(wire), contributions=alone, initial_weights=base.digest)
    paths = [tmp_path / item.agent_id for item in alone]
    for item, path in zip(alone, paths, strict=True):
        decode(blob_path(blobs_dir, item.weights_digest), path, base=base)
    write_state_dict(mean(paths, [900, 897]), tmp_path / "mean")
    encode(tmp_path / "mean", tmp_path / "expected", wire, base=base)
    assert directory.encoded_path.read_bytes() == (tmp_path / "expected").read_bytes()


def test_a_start_that_is_published_is_measured_as_it_arrives(do, monkeypatch, blobs_dir, contributions):
    monkeypatch.setattr(pipeline, "fine_tune", lambda model, *_, **__: model[1].weight.data.fill_(np.inf))
    base, sent = encoded_as("int8", contributions, blobs_dir)
    result, directory = do(run=with_wire("int8"), contributions=sent, initial_weights=base.digest)
    assert result.published == "start"
    data = combine(RUN, contributions, blobs_dir)
    assert accuracy_of(directory.weights_path, data) == result.score_published
    assert result.encoded.sha256 == blob_of(directory.encoded_path).digest


def test_without_a_common_base_bfloat16_takes_the_place_of_int8(do, blobs_dir, contributions):
    base, (_, second) = encoded_as("int8", contributions, blobs_dir)
    _, (first, _) = encoded_as("bfloat16", contributions, blobs_dir)  # of weights of its own
    run = with_wire("int8").model_copy(update={"initial_weights": "independent"})
    result, directory = do(run=run, contributions=(first, second), initial_weights=base.digest)
    assert result.error is None
    assert result.encoded.base is None
    assert encoding_of(read_header(directory.encoded_path)).wire == "bfloat16"


@pytest.mark.parametrize("wire", ["bfloat16", "int8"])
def test_first_initial_weights_are_rounded_to_bfloat16(do, tmp_path, wire):
    run = with_wire(wire)
    exact, _ = do(kind="initialise", name="exact", round=0, contributions=())
    result, directory = do(kind="initialise", name="initialise", round=0, contributions=(), run=run)
    assert exact.encoded is None
    assert result.encoded.base is None
    decode(directory.encoded_path, tmp_path / "decoded")
    assert blob_of(tmp_path / "decoded").digest == result.weights.sha256 != exact.weights.sha256
    tensors = read_state_dict(directory.weights_path)
    assert all(torch.equal(tensor, tensor.bfloat16().float()) for tensor in tensors.values())


@pytest.mark.parametrize("wire", ["float32", "bfloat16", "int8"])
def test_a_round_done_again_travels_as_the_same_bytes(do, blobs_dir, contributions, tmp_path, wire):
    base, sent = encoded_as(wire, contributions, blobs_dir)
    fields = {"run": with_wire(wire), "contributions": sent, "initial_weights": base.digest}
    first, _ = do(name="first", **fields)
    second = JobDirectory(tmp_path / "jobs" / "second")
    second.path.mkdir()
    second.encoded_path.write_bytes(b"half of a file")
    again, _ = do(name="second", **fields)
    assert (again.weights, again.encoded) == (first.weights, first.encoded)


def test_weights_that_int8_cannot_name_are_bad_configuration(do, monkeypatch):
    class Scaled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Module()
            self.weight.scale = torch.nn.Parameter(torch.ones(2))

        def state_dict(self, *_, **__):
            return {"weight": torch.ones(2), "weight.scale": self.weight.scale}

    monkeypatch.setattr(work, "initial_model", lambda _: Scaled())
    result, _ = do(kind="initialise", name="i", round=0, contributions=(), run=with_wire("int8"))
    assert result.error.kind == "usage"
    assert "'weight.scale' has the name that int8 needs" in result.error.message


def test_a_broken_gpu_ends_the_process_after_its_result(do, monkeypatch, tmp_path):
    def fail(*_, **__):
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(pipeline, "fine_tune", fail)
    with pytest.raises(torch.AcceleratorError):
        do()
    assert JobDirectory(tmp_path / "jobs" / "round-0001").read_result().error.kind == "failed"


def test_a_damaged_job_fails(tmp_path):
    directory = JobDirectory(tmp_path)
    (tmp_path / "job.json").write_text("{")
    work.run_job(directory, blobs_dir=tmp_path, device_name="cpu", group=Group())
    assert "damaged" in directory.read_result().error.message


def test_a_waiting_trainer_finds_a_job_within_50_ms(tmp_path, contributions):
    assert trainer_main.POLL_SECONDS < 0.05
    found = []
    waiting = threading.Thread(target=lambda: found.append(trainer_main._next_job(tmp_path)), daemon=True)
    waiting.start()
    JobDirectory(tmp_path / "round-0007").write_job(job(contributions))
    waiting.join(WAIT_SECONDS)
    (name,) = found
    assert name.startswith("round-0007 ")


class Trainer:
    """A trainer process, or a group of them; whoever holds its stdin is its server."""

    def __init__(self, state_dir: Path, *launcher: str) -> None:
        state_dir.mkdir(exist_ok=True)
        self._output_path = state_dir / "trainer.log"
        arguments = ("--state-dir", str(state_dir), "--device", "cpu", "--checkpoint-seconds", "0")
        with self._output_path.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *launcher, "ecavg.cloud_server.trainer", *arguments],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env={**os.environ, "OMP_NUM_THREADS": "1", OWN_STORE: "1"},
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self._output_path.read_text("utf-8")

    def result_of(self, directory: JobDirectory) -> Result:
        return until(directory.read_result, self)

    def wait_for_training(self, directory: JobDirectory) -> None:
        until(lambda: [line for line in directory.read_progress(0)[0] if line.loss], self)

    def wait_for_checkpoint(self, directory: JobDirectory) -> None:
        until(directory.checkpoint_path.exists, self)

    def kill_rank(self) -> None:
        """Kill one of the processes that the launcher has started."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)


@contextmanager
def trainer_in(state_dir: Path, *launcher: str) -> Iterator[Trainer]:
    trainer = Trainer(state_dir, *launcher)
    try:
        yield trainer
    finally:
        trainer.process.stdin.close()
        if trainer.process.poll() is None:
            os.killpg(trainer.process.pid, signal.SIGKILL)
        trainer.process.wait(WAIT_SECONDS)


@pytest.fixture
def state_dir(tmp_path, blobs_dir):
    (tmp_path / "blobs").symlink_to(blobs_dir)
    return tmp_path


def ask(state_dir: Path, job: Job) -> JobDirectory:
    directory = JobDirectory(state_dir / "jobs" / job.name)
    directory.write_job(job)
    return directory


def test_a_job_that_was_stopped_is_done_again_with_the_same_bytes(state_dir, contributions):
    long = RUN.model_copy(update={"fine_tune": RUN.fine_tune.model_copy(update={"epochs": 60})})
    stopped = ask(state_dir, job(contributions, run=long, name="stopped"))
    with trainer_in(state_dir) as trainer:
        trainer.wait_for_checkpoint(stopped)
        trainer.process.terminate()
        assert trainer.process.wait(WAIT_SECONDS) == -signal.SIGTERM
    assert stopped.is_pending
    with trainer_in(state_dir) as trainer:
        undisturbed = ask(state_dir, job(contributions, run=long, name="undisturbed"))
        assert trainer.result_of(stopped).error is None
        assert trainer.result_of(stopped).weights == trainer.result_of(undisturbed).weights
        assert trainer.output.count("training_resumed") == 1
        assert not stopped.checkpoint_path.exists()

        endless = ask(state_dir, job(contributions, run=ENDLESS, name="endless"))
        trainer.wait_for_training(endless)
        trainer.process.send_signal(signal.SIGINT)
        assert trainer.process.wait(WAIT_SECONDS) == -signal.SIGINT
    assert "Traceback" not in trainer.output


def test_two_ranks_under_torchrun_train_together_and_leave_with_their_server(
    state_dir, contributions, three, do
):
    launcher = (
        "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "--max-restarts", "1", "-m",
    )  # fmt: skip
    alone, _ = do(name="alone")
    with trainer_in(state_dir, *launcher) as trainer:
        initialise = ask(state_dir, job((), kind="initialise", name="initialise", round=0))
        assert trainer.result_of(initialise).error is None
        result = trainer.result_of(ask(state_dir, job(contributions)))
        assert result.error is None
        assert result.score_published > 0.9
        assert (result.candidates, result.start) == (alone.candidates, alone.start)
        _, sent = encoded_as("bfloat16", contributions, state_dir / "blobs")
        result = trainer.result_of(ask(state_dir, job(sent, run=with_wire("bfloat16"), name="encoded")))
        assert result.error is None
        assert result.encoded
        start, honest = three  # one of which is clipped: every rank has to know
        far = with_factor(honest[2], 1000.0, start, state_dir / "blobs")
        screened = job((*honest[:2], far), name="screened", initial_weights=start)
        result = trainer.result_of(ask(state_dir, screened))
        assert result.error is None
        assert [agent.scale < 1 for agent in result.audit] == [False, False, True]
        until(lambda: trainer.output.count("job_done") == 8, trainer)  # four jobs on two ranks

        endless = ask(state_dir, job(contributions, run=ENDLESS, name="endless"))
        trainer.wait_for_checkpoint(endless)
        trainer.kill_rank()
        # The ranks form a group anew, and both have the last epoch.
        until(lambda: trainer.output.count("training_resumed") == 2, trainer)
        assert endless.is_pending
        trainer.process.stdin.close()
        assert trainer.process.wait(WAIT_SECONDS) == 0
    assert endless.is_pending


@pytest.mark.soak
def test_ranks_with_a_sharded_model_go_on_when_one_is_killed(state_dir, contributions, do):
    more = {"epochs": 60, "parallel": "fsdp", "ema_decay": 0.9}
    long = RUN.model_copy(update={"fine_tune": RUN.fine_tune.model_copy(update=more)})
    alone, alone_directory = do(run=long, name="alone")
    launcher = (
        "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "--max-restarts", "1", "-m",
    )  # fmt: skip
    with trainer_in(state_dir, *launcher) as trainer:
        sharded = ask(state_dir, job(contributions, run=long, name="sharded"))
        trainer.wait_for_checkpoint(sharded)
        trainer.kill_rank()
        result = trainer.result_of(sharded)
        assert trainer.output.count("training_resumed") == 2
    assert (result.error, result.start, result.published) == (None, alone.start, alone.published)
    assert result.candidates == pytest.approx(alone.candidates, abs=1.01 / 180)
    found, expected = (read_state_dict(each.weights_path) for each in (sharded, alone_directory))
    assert all(torch.allclose(found[name], expected[name], rtol=1e-3, atol=1e-4) for name in expected)


@pytest.mark.soak
def test_machines_that_share_the_folder_go_on_from_their_checkpoint(state_dir, contributions, do):
    long = RUN.model_copy(update={"fine_tune": RUN.fine_tune.model_copy(update={"epochs": 60})})
    alone, alone_directory = do(run=long, name="alone")
    launcher = (
        "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "3",
        "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--rdzv-id", "1",
        "--local-addr", "127.0.0.1", "-m",
    )  # fmt: skip
    with trainer_in(state_dir, *launcher) as one, trainer_in(state_dir, *launcher):
        shared = ask(state_dir, job(contributions, run=long, name="shared"))
        one.wait_for_checkpoint(shared)
        one.kill_rank()
        result = one.result_of(shared)
        # Both write to one log.
        assert one.output.count("training_resumed") == 2
        assert "checkpoint_not_written" not in one.output
    assert (result.error, result.candidates) == (None, alone.candidates)
    found, expected = (read_state_dict(each.weights_path) for each in (shared, alone_directory))
    assert all(torch.allclose(found[name], expected[name], rtol=1e-3, atol=1e-4) for name in expected)


def test_an_unknown_flag_is_bad_usage():
    command = [sys.executable, "-m", "ecavg.cloud_server.trainer", "--unknown"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode == 2


# The learning rate stays so high that the last weights are worse than their average.
KEPT_HIGH = {"ema_decay": 0.95, "schedule": "constant", "learning_rate": 0.3, "momentum": 0.9}


def averaging(**more: object) -> RunConfig:
    return RUN.model_copy(update={"fine_tune": RUN.fine_tune.model_copy(update=KEPT_HIGH)} | more)


@pytest.mark.parametrize("wire", ["float32", "int8"])
def test_average_of_the_fine_tune_is_published_where_it_is_the_best(do, blobs_dir, contributions, wire):
    run = averaging()
    changes = {}
    if wire == "int8":
        base, contributions = encoded_as(wire, contributions, blobs_dir)
        run = averaging(wire=wire)
        changes = {"contributions": contributions, "initial_weights": base.digest}
    result, directory = do(run=run, **changes)
    assert result.error is None
    assert result.published == "fine_tuned_average"
    assert result.score_published == result.score_fine_tuned_average > result.score_fine_tuned
    model = build_model(RUN, seed=0)
    model.load_state_dict(read_state_dict(directory.weights_path))
    data = combine(RUN, contributions, blobs_dir)
    measured = evaluate(model, *data.held_out, task=task_of(RUN), device=CPU)
    assert measured.score == result.score_published


def test_average_of_the_fine_tune_is_not_published_where_it_is_worse(do):
    # The average is still where the fine-tune has begun: after the first step of a start of chance.
    run = averaging()
    slow = {"ema_decay": 0.9999, "schedule": "cosine", "learning_rate": 0.05}
    result, _ = do(run=run.model_copy(update={"fine_tune": run.fine_tune.model_copy(update=slow)}))
    without, _ = do(name="without")
    assert result.score_fine_tuned_average < result.score_fine_tuned == result.score_published
    assert result.published == "fine_tuned"
    assert result.weights == without.weights
    assert without.score_fine_tuned_average is None
