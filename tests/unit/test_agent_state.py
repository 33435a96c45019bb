import json
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ecavg.edge_agent.local
from ecavg.cloud_server.contribution import Contribution
from ecavg.cloud_server.state_dir import blob_path
from ecavg.cloud_server.trainer.finetune import combine
from ecavg.common.config import RunConfig, TrainingConfig
from ecavg.common.errors import DivergedError, RunError, UsageError
from ecavg.common.evaluation import Evaluation
from ecavg.common.models import build_model
from ecavg.common.schedule import learning_rate_factor
from ecavg.common.seeds import derive_seed
from ecavg.common.shards import Shard, cloud_holdout, read_shard
from ecavg.common.tasks import unpublished
from ecavg.common.training import Examples, OnStep, StepReport, train
from ecavg.common.transfer import Blob, blob_of
from ecavg.common.weights import read_state_dict, write_state_dict
from ecavg.edge_agent.data import AgentData
from ecavg.edge_agent.local import LocalModels
from ecavg.edge_agent.state import AgentState, Arrived, Progress, Report, Trained
from tests.recipes import recipe_of

REPORT = Report(
    round=2,
    initial_weights="cd" * 32,
    score_local=0.1,
    score_before=1 / 3,
    score_after=0.7000000000000001,
    score_adapted=0.1 + 0.7,
    num_held_out=30,
    applied=True,
    reason="",
)
RUN = RunConfig(hidden_units=8, pretrain=TrainingConfig(epochs=3, batch_size=16))


def make_shard(num_images: int, seed: int) -> Shard:
    random = np.random.default_rng(seed)
    images = random.integers(0, 256, (num_images, 1, 8, 8), dtype=np.uint8)
    return Shard(images, random.integers(0, 10, num_images, dtype=np.int64))


def local_models(disk: AgentState, run: RunConfig = RUN) -> LocalModels:
    data = AgentData(train=make_shard(40, 0), held_out=make_shard(20, 1), num_skipped=0)
    return LocalModels(run, data, disk, torch.device("cpu"), (), 0.0)


def saying(label: int, path: Path, model: Path) -> Path:
    """Weights like those of `model` that give every image this label; the file at `path`."""
    tensors = {name: torch.zeros_like(tensor) for name, tensor in read_state_dict(model).items()}
    tensors["3.bias"][label] = 1
    write_state_dict(tensors, path)
    return path


@pytest.fixture
def disk(tmp_path: Path) -> AgentState:
    return AgentState(tmp_path / "agent", "edge-1")


def pretrain(local: LocalModels, on_step: OnStep) -> Trained:
    return local.keep(1, None, local.pretrain(1, None, on_step))


def ignore(_: StepReport) -> None:
    pass


def test_progress_comes_back_to_the_last_bit(disk: AgentState) -> None:
    blob = Blob("ab" * 32, 123)
    progress = Progress(
        run_id="r",
        trained=Trained(round=2, weights=blob, score=0.1 + 0.2, initial_weights="cd" * 32),
        contributed_round=2,
        arrived=Arrived(weights=blob, report=REPORT),
        evaluated_round=1,
    )
    disk.save(progress)
    disk.close()
    again = AgentState(disk.path, None)
    assert again.progress == progress
    assert again.progress.arrived.weights.digest == blob.digest


def test_damaged_progress_says_what_to_do(disk: AgentState) -> None:
    disk.close()
    (disk.path / "progress.json").write_text("{")
    with pytest.raises(UsageError, match=r"progress\.json is damaged; remove"):
        AgentState(disk.path, None)


@pytest.mark.parametrize(
    ("content", "what"),
    [(b"\x80\x04\x95", "not UTF-8 text"), (b"../edge", "damaged; remove"), (b"edge 1", "damaged; remove")],
)
def test_damaged_agent_id_is_named(content: bytes, what: str, tmp_path: Path) -> None:
    (tmp_path / "agent-id").write_bytes(content)
    with pytest.raises(UsageError, match=rf"agent-id is {what}"):
        AgentState(tmp_path, None)


def test_agent_id_may_have_been_written_on_windows(tmp_path: Path) -> None:
    (tmp_path / "agent-id").write_bytes("edge-1\r\n".encode("utf-16"))
    assert AgentState(tmp_path, None).agent_id == "edge-1"


def test_only_what_is_needed_stays(disk: AgentState) -> None:
    blob = Blob("ab" * 32, 123)
    for path in (disk.adapted, disk.checkpoint, disk.weights(blob.digest), disk.work / ".x.partial"):
        path.touch()
    disk.discard_all_but({disk.adapted, disk.weights(blob.digest), disk.local_weights})
    assert set(disk.work.iterdir()) == {disk.adapted, disk.weights(blob.digest)}
    disk.discard(disk.adapted, disk.adapted)
    assert set(disk.work.iterdir()) == {disk.weights(blob.digest)}


def test_data_that_are_read_anew_meanwhile_do_not_disturb_what_is_trained(
    disk: AgentState, tmp_path: Path
) -> None:
    expected = pretrain(local_models(AgentState(tmp_path / "other", "edge-1")), ignore)
    local = local_models(disk)
    data = AgentData(train=make_shard(40, 2), held_out=make_shard(20, 1), num_skipped=0)
    LocalModels(RUN, data, disk, torch.device("cpu"), (), 0.0)
    assert not any(path.exists() for path in local.shards)
    assert pretrain(local, ignore) == expected


def test_full_curve_of_a_round_after_the_plan_is_followed_and_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a full curve, the second round trains as the first does in a plan of one round."""
    monkeypatch.setattr("ecavg.common.training.REPORT_SECONDS", 0.0)
    rates: list[float] = []
    factor = learning_rate_factor

    def recorded(*args: Any) -> float:
        rates.append(factor(*args))
        return rates[-1]

    monkeypatch.setattr("ecavg.common.training.learning_rate_factor", recorded)
    run = RUN.model_copy(
        update={"pretrain": RUN.pretrain.model_copy(update={"schedule_over": "run", "graphs": "off"})}
    )

    def train(name: str, number: int, *, has_full_curve: bool = False, on_step: OnStep = ignore) -> Blob:
        rates.clear()
        with closing(AgentState(tmp_path / name, "edge-1")) as disk:
            models = local_models(disk, run)
            network = models.pretrain(number, None, on_step, has_full_curve=has_full_curve)
            return models.keep(number, None, network).weights

    def cut(step: StepReport) -> None:
        if step.step == 5:
            raise InterruptedError

    train("first", 1)
    first = list(rates)
    train("small", 2)
    assert max(rates) < max(first)
    expected = train("full", 2, has_full_curve=True)
    assert rates == first
    with pytest.raises(InterruptedError):
        train("cut", 2, has_full_curve=True, on_step=cut)
    assert train("cut", 2, has_full_curve=True) == expected
    assert len(rates) < len(first)


def test_interrupted_pretraining_goes_on_to_the_same_weights(
    disk: AgentState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ecavg.common.training.REPORT_SECONDS", 0.0)
    undisturbed = AgentState(tmp_path / "other", "edge-1")
    expected = pretrain(local_models(undisturbed), ignore)

    def cut(step: StepReport) -> None:
        if step.step == 5:  # in the midst of the second of three epochs of three steps
            raise InterruptedError

    with pytest.raises(InterruptedError):
        pretrain(local_models(disk), cut)
    assert not disk.model.exists()
    steps: list[StepReport] = []
    assert pretrain(local_models(disk), steps.append) == expected
    assert [step.step for step in steps] == [4, 5, 6, 7, 8, 9]
    assert blob_of(disk.local_weights) == expected.weights == blob_of(disk.model)
    # Killed before the result was noted: the last checkpoint is all it takes.
    assert pretrain(local_models(disk), steps.append) == expected
    assert len(steps) == 6


def test_global_model_that_does_no_worse_replaces_the_one_in_use(disk: AgentState, tmp_path: Path) -> None:
    local = local_models(disk)
    trained = pretrain(local, ignore)
    labels = make_shard(20, 1).targets
    rare, common = np.argsort(np.bincount(labels))[[0, -1]]
    saying(rare, disk.model, disk.local_weights)
    weights = saying(common, tmp_path / "global", disk.local_weights)

    report = local.measure(1, weights, trained, refuse)
    assert (report.score_local, report.initial_weights) == (trained.score, None)
    assert report.score_before == (labels == rare).mean()
    assert report.score_after == (labels == common).mean()
    assert (report.num_held_out, report.applied, report.reason) == (20, True, "")
    assert (report.score_adapted, report.uses_adapted) == (None, False)

    for _ in range(2):  # the second after a crash
        local.apply(weights, report, refuse)
        assert disk.model.read_bytes() == weights.read_bytes()
        assert report_on(disk) == report


def test_global_model_that_does_worse_leaves_the_one_in_use_alone(disk: AgentState, tmp_path: Path) -> None:
    """Where it is not to be adapted."""
    run = RUN.model_copy(update={"adapt_epochs": 0})
    local = local_models(disk, run)
    trained = pretrain(local, ignore).model_copy(update={"initial_weights": "cd" * 32})
    labels = make_shard(20, 1).targets
    rare, common = np.argsort(np.bincount(labels))[[0, -1]]
    saying(common, disk.model, disk.local_weights)
    in_use = disk.model.read_bytes()
    weights = saying(rare, tmp_path / "global", disk.local_weights)

    report = local.measure(1, weights, trained, refuse)
    assert not report.applied
    assert report.score_adapted is None
    before, after = (labels == common).mean(), (labels == rare).mean()
    assert report.reason.startswith(f"accuracy {before:.4f} → {after:.4f} on 20 held-out examples, worse by")
    assert "adaptation" not in report.reason
    assert report.initial_weights == "cd" * 32
    local.apply(weights, report, refuse)
    assert disk.model.read_bytes() == in_use
    assert report_on(disk) == report

    always = local_models(disk, RUN.model_copy(update={"apply": "always"}))
    taken = report.model_copy(update={"applied": True, "reason": ""})
    assert always.measure(1, weights, trained, refuse) == taken
    assert not disk.adapted.exists()


def two_classes(num_images: int, seed: int) -> Shard:
    """Dark images and bright ones: soon learnt."""
    labels = np.arange(num_images, dtype=np.int64) % 2
    noise = np.random.default_rng(seed).integers(0, 56, (num_images, 1, 8, 8))
    return Shard((noise + 200 * labels[:, None, None, None]).astype(np.uint8), labels)


def specialist(disk: AgentState, **changes: object) -> LocalModels:
    data = AgentData(train=two_classes(40, 0), held_out=two_classes(20, 1), num_skipped=0)
    return LocalModels(RUN.model_copy(update=changes), data, disk, torch.device("cpu"), (), 0.0)


def generalist(path: Path) -> Path:
    """Weights that know nothing of dark and bright; the file at `path`."""
    write_state_dict(build_model(RUN, seed=5).state_dict(), path)
    return path


def test_global_model_that_does_worse_is_adapted_and_used(disk: AgentState, tmp_path: Path) -> None:
    local = specialist(disk, adapt_epochs=3)
    trained = pretrain(local, ignore)
    disk.discard(disk.checkpoint)
    steps: list[StepReport] = []
    weights = generalist(tmp_path / "global")
    report = local.measure(4, weights, trained, steps.append)
    assert report.score_after < 0.5 < report.score_before == report.score_adapted == 1.0
    assert (report.applied, report.uses_adapted, report.reason) == (True, True, "")
    assert steps[-1].step == steps[-1].num_steps == 9  # three epochs of 36 images, 16 at a time

    # Independently: as many epochs of pre-training, on what the cloud does not hold back.
    model = build_model(RUN, seed=5)
    shard = two_classes(40, 0)
    rest, _ = cloud_holdout(shard.targets, 0.1, derive_seed(0, "cloud_holdout", "edge-1"))
    train(
        model,
        Examples(*(torch.from_numpy(array[rest]) for array in shard)),
        recipe_of(RUN, derive_seed(0, "adapt", 4, "edge-1"), TrainingConfig(epochs=3, batch_size=16)),
        device=torch.device("cpu"),
    )
    expected = model.state_dict()
    found = read_state_dict(disk.adapted)
    assert all(torch.equal(found[name], expected[name]) for name in expected)

    adapted = disk.adapted.read_bytes()
    local.apply(weights, report, refuse)
    assert disk.model.read_bytes() == adapted
    assert report_on(disk) == report


@pytest.mark.parametrize("lost", [(), ("adapted",), ("adapted", "checkpoint")])
def test_restart_between_adapting_and_applying_ends_the_same(
    disk: AgentState, tmp_path: Path, lost: tuple[str, ...]
) -> None:
    trained = pretrain(specialist(disk, adapt_epochs=3), ignore)
    weights = generalist(tmp_path / "global")
    report = specialist(disk, adapt_epochs=3).measure(1, weights, trained, ignore)
    adapted = disk.adapted.read_bytes()
    disk.save(Progress(arrived=Arrived(weights=blob_of(weights), report=report)))
    disk.close()

    again = AgentState(disk.path, None)
    again.discard(*(getattr(again, name) for name in lost))
    for _ in range(2):  # the second after a crash
        specialist(again, adapt_epochs=3).apply(weights, again.progress.arrived.report, ignore)
        assert again.model.read_bytes() == adapted
    assert report_on(again) == report


def test_own_model_is_kept_where_adaptation_does_not_help(disk: AgentState, tmp_path: Path) -> None:
    local = specialist(disk)
    trained = pretrain(local, ignore)
    in_use = disk.model.read_bytes()
    weights = saying(7, tmp_path / "global", disk.local_weights)  # without weights it can learn the bias only
    report = local.measure(1, weights, trained, ignore)
    assert (report.applied, report.uses_adapted) == (False, False)
    assert report.score_adapted in (0.0, 0.5)
    assert report.reason == (
        "accuracy 1.0000 → 0.0000 on 20 held-out examples, worse by more than the tolerance 0.0000;"
        f" {report.score_adapted:.4f} after local adaptation"
    )
    local.apply(weights, report, refuse)
    assert disk.model.read_bytes() == in_use
    assert report_on(disk) == report


def test_own_model_is_kept_where_adaptation_diverges(
    disk: AgentState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = specialist(disk)
    trained = pretrain(local, ignore)

    def diverge(*_: object, **__: object) -> None:
        raise DivergedError("training diverged in epoch 1")

    monkeypatch.setattr("ecavg.edge_agent.local.train", diverge)
    report = local.measure(1, generalist(tmp_path / "global"), trained, ignore)
    assert (report.applied, report.score_adapted) == (False, None)
    assert report.reason.endswith("; local adaptation: training diverged in epoch 1")


def refuse(_: StepReport) -> None:
    raise AssertionError("nothing is to be trained")


def report_on(disk: AgentState) -> Report:
    fields = unpublished(json.loads(disk.report.read_text()))
    return Report.model_validate({name: value for name, value in fields.items() if name != "agent_id"})


@pytest.mark.parametrize("sizes", [(40,), (30, 10), (39, 1)])
def test_agent_does_not_train_on_what_the_cloud_holds_back(
    disk: AgentState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, ...]
) -> None:
    trained_on = {}

    def train(_: object, examples: Examples, *args: object, **kwargs: object) -> None:
        trained_on.update(examples._asdict())

    monkeypatch.setattr("ecavg.edge_agent.local.train", train)
    everything, held_out = make_shard(40, 0), make_shard(20, 1)
    for end in np.cumsum(sizes):  # the agent is started again with more data
        data = AgentData(Shard(everything.inputs[:end], everything.targets[:end]), held_out, num_skipped=0)
        local = LocalModels(RUN, data, disk, torch.device("cpu"), (), 0.0)
    local.pretrain(1, None, ignore)

    shards = [blob.digest for blob in local.shards.values()]
    for path, blob in local.shards.items():
        target = blob_path(tmp_path / "blobs", blob.digest)
        target.parent.mkdir(parents=True)
        path.rename(target)
    contribution = Contribution(disk.agent_id, "", shards, local.num_examples)
    combined = combine(RUN, [contribution], tmp_path / "blobs")
    assert torch.equal(trained_on["inputs"], combined.train.inputs)
    assert torch.equal(trained_on["targets"], combined.train.targets)
    assert len(shards) == len(sizes)
    assert len(combined.held_out.targets) == sum(round(size / 10) for size in sizes)
    assert local.num_examples == len(combined.train.targets) + len(combined.held_out.targets) == 40


@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_private_examples_are_all_trained_on_and_of_shared_ones_what_the_cloud_trains_on(
    disk: AgentState, monkeypatch: pytest.MonkeyPatch, fraction: float
) -> None:
    trained_on = {}

    def train(_: object, examples: Examples, *args: object, **kwargs: object) -> None:
        trained_on.update(examples._asdict())

    monkeypatch.setattr("ecavg.edge_agent.local.train", train)
    everything = make_shard(200, 0)
    data = AgentData(everything, make_shard(20, 1), num_skipped=0)
    local = LocalModels(RUN, data, disk, torch.device("cpu"), (), 0.0, shared_fraction=fraction)
    local.pretrain(1, None, ignore)
    shared, private = (
        [read_shard(path) for path in folder.glob("*")] for folder in (disk.shards, disk.private)
    )
    assert sum(len(shard.targets) for shard in shared) == local.num_shared
    assert abs(local.num_shared - 200 * fraction) < 30
    assert sum(len(shard.targets) for shard in private) == 200 - local.num_shared
    assert local.num_examples == 200
    seed = derive_seed(RUN.seed, "cloud_holdout", disk.agent_id)
    expected = [shard.inputs[cloud_holdout(shard.targets, 0.1, seed)[0]] for shard in shared]
    expected += [shard.inputs for shard in private]
    np.testing.assert_array_equal(trained_on["inputs"].numpy(), np.concatenate(expected))
    assert len(local.trained_on) == len(shared) + len(private)


def test_sharing_less_withdraws_files_and_sharing_the_same_or_growing_does_not(disk: AgentState) -> None:
    everything, held_out = make_shard(100, 0), make_shard(20, 1)

    def load(count: int, fraction: float) -> tuple[LocalModels, set[bytes]]:
        data = AgentData(Shard(*(array[:count] for array in everything)), held_out, num_skipped=0)
        local = LocalModels(RUN, data, disk, torch.device("cpu"), (), 0.0, shared_fraction=fraction)
        return local, {image.tobytes() for path in local.shards for image in read_shard(path).inputs}

    first, shared_at_first = load(80, 0.6)
    grown, shared = load(100, 0.6)
    assert shared_at_first < shared
    assert not first.has_withdrawn
    assert not grown.has_withdrawn
    assert first.trained_on[0] == grown.trained_on[0]
    less, shared_then = load(100, 0.3)
    assert shared_then < shared
    assert less.has_withdrawn
    none, nothing = load(100, 0.0)
    assert (none.has_withdrawn, none.shards, nothing) == (True, {}, set())
    assert none.num_examples == 100


def test_model_of_another_run_counts_as_absent_and_is_replaced(disk: AgentState, tmp_path: Path) -> None:
    local = local_models(disk)
    pretrain(local, ignore)
    fitting = read_state_dict(disk.local_weights)
    weights = tmp_path / "global"
    write_state_dict(fitting, weights)
    stranger = {"another.weight": torch.zeros(3)}

    write_state_dict(stranger, disk.model)
    assert local.measure(1, weights, None, refuse).score_before is None
    local.keep(1, None, local.pretrain(1, None, ignore))
    assert blob_of(disk.model) == blob_of(disk.local_weights)

    disk.model.write_bytes(b"no safetensors")
    report = local.measure(1, weights, None, refuse)
    assert report.score_before is None
    local.apply(weights, report, refuse)
    assert blob_of(disk.model) == blob_of(weights)


def test_model_in_use_that_cannot_be_measured_now_is_not_taken_for_absent(
    disk: AgentState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = local_models(disk)
    pretrain(local, ignore)
    weights, in_use = generalist(tmp_path / "global"), disk.model.read_bytes()
    anew, evaluate = local_models(disk), ecavg.edge_agent.local.evaluate
    results = [torch.OutOfMemoryError("the device is shared"), None]

    def out_of_memory_at_first(*args: Any, **keys: Any) -> Evaluation:
        if error := results.pop(0):
            raise error
        return evaluate(*args, **keys)

    with monkeypatch.context() as patch:
        patch.setattr(ecavg.edge_agent.local, "evaluate", out_of_memory_at_first)
        with pytest.raises(RunError, match="the device is shared"):
            anew.measure(1, weights, None, refuse)
    assert anew.measure(1, weights, None, ignore).score_before is not None
    assert disk.model.read_bytes() == in_use


def test_one_network_is_built_and_what_is_known_of_the_model_in_use_is_not_measured_again(
    disk: AgentState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def counting(module: object, name: str) -> None:
        function = getattr(module, name)

        def counted(*args: object, **kwargs: object) -> object:
            calls.append(name)
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)

    counting(ecavg.edge_agent.local, "build_model")
    counting(ecavg.edge_agent.local, "evaluate")
    local = specialist(disk)
    initial = generalist(tmp_path / "initial")
    local.keep(1, None, local.pretrain(1, initial, ignore))
    assert calls == ["build_model", "evaluate"]  # no model was in use
    weights = saying(1, tmp_path / "global", disk.local_weights)
    always = local.measure(1, weights, None, ignore).model_copy(update={"applied": True, "reason": ""})
    local.apply(weights, always, ignore)
    calls.clear()
    report = local.measure(2, weights, None, ignore)
    assert report.score_before == report.score_after
    assert calls == ["evaluate"]


def test_progress_of_the_version_that_wrote_accuracies_is_read(tmp_path: Path) -> None:
    report = REPORT.model_dump(mode="json")
    old = {name.replace("score", "accuracy"): value for name, value in report.items()}
    trained = {"round": 1, "weights": ["0" * 64, 7], "accuracy": 0.25}
    arrived = {"weights": trained["weights"], "report": old}
    (tmp_path / "progress.json").write_text(json.dumps({"trained": trained, "arrived": arrived}))
    disk = AgentState(tmp_path, "edge-1")
    assert disk.progress.trained
    assert disk.progress.trained.score == 0.25
    assert disk.progress.arrived
    assert disk.progress.arrived.report == REPORT
    disk.close()
