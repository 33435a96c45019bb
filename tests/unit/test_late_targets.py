"""Examples without a target, and targets that come later: sources, shards, gates, and what is trained on."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from safetensors.numpy import save_file
from structlog.testing import capture_logs

from ecavg.cloud_server.contribution import Contribution
from ecavg.cloud_server.intake.gates import DataGate
from ecavg.cloud_server.intake.turns import Turns
from ecavg.cloud_server.intake.uploads import Uploads
from ecavg.cloud_server.store import Store
from ecavg.cloud_server.trainer.audit import audit
from ecavg.cloud_server.trainer.finetune import combine
from ecavg.cloud_server.trainer.members import Member
from ecavg.common.config import RunConfig
from ecavg.common.errors import InvalidError, Reason, UsageError
from ecavg.common.late_targets import LateTargets, write_late_targets
from ecavg.common.models import build_model
from ecavg.common.schema import PIECE_BYTES, missing_rows, read_header
from ecavg.common.shards import Shard, write_shard
from ecavg.common.transfer import blob_of
from ecavg.common.weights import write_state_dict
from ecavg.edge_agent.config import AgentConfig
from ecavg.edge_agent.data import AgentData
from ecavg.edge_agent.doctor import _look_at_data
from ecavg.edge_agent.local import LocalModels
from ecavg.edge_agent.shard_files import keep_late_targets, keep_shards
from ecavg.edge_agent.state import AgentState
from ecavg.edge_agent.tables import TableFormat
from tests.recipes import CPU, data_of, put

MISSING = {"targets": {"missing": True}}
RUN = RunConfig(**MISSING)
ROWS: dict[str, Any] = {"dataset": "own", "model": "mlp", "inputs": {"shape": (2,)}}
ROWS_RUN = RunConfig(**ROWS, num_classes=3, class_names=("a", "b", "c"), **MISSING)
NUMBERS_RUN = RunConfig(**ROWS, task="regression", **MISSING)


def images(num: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (num, 1, 8, 8), dtype=np.uint8)


def partly_labelled(num: int = 60) -> Shard:
    """Return images of which every third has a label."""
    labels = np.arange(num) % 10
    labels[np.arange(num) % 3 > 0] = -1
    return Shard(images(num), labels)


# ---------------------------------------------------------------------- the gate for shards


def check(folder: Path, shard: Shard, run: RunConfig) -> None:
    write_shard(folder / "shard", shard)
    gate = DataGate(run.spec, 1 << 20)
    gate.check_header(read_header(folder / "shard"))
    gate.check_content(folder / "shard")


def numbers(*targets: float) -> Shard:
    return Shard(np.zeros((len(targets), 2), np.float32), np.array(targets, np.float32)[:, None])


def test_missing_targets_pass_only_where_the_run_has_them(tmp_path: Path) -> None:
    check(tmp_path, partly_labelled(), RUN)
    check(tmp_path, numbers(1, np.nan, 3), NUMBERS_RUN)
    with pytest.raises(InvalidError, match="label -1"):
        check(tmp_path, partly_labelled(), RunConfig())
    with pytest.raises(InvalidError, match="no finite number"):
        check(tmp_path, numbers(1, np.nan), RunConfig(**ROWS, task="regression"))


def test_shard_whose_targets_are_all_to_come_is_a_shard(tmp_path: Path) -> None:
    check(tmp_path, Shard(images(3), np.full(3, -1)), RUN)


@pytest.mark.parametrize("label", [-2, 10])
def test_other_values_are_no_missing_targets(tmp_path: Path, label: int) -> None:
    with pytest.raises(InvalidError, match=f"label {label}"):
        check(tmp_path, Shard(images(3), np.array([1, -1, label])), RUN)
    with pytest.raises(InvalidError, match="inf"):
        check(tmp_path, numbers(1, np.nan, np.inf), NUMBERS_RUN)


def test_inputs_are_never_missing(tmp_path: Path) -> None:
    shard = Shard(np.full((2, 2), np.nan, np.float32), np.ones((2, 1), np.float32))
    with pytest.raises(InvalidError, match="inputs has the value nan"):
        check(tmp_path, shard, NUMBERS_RUN)


def test_task_that_has_minus_one_for_a_value_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"targets\.missing: -1 would stand"):
        RunConfig(task="segmentation", dataset="own", num_classes=2, image_shape=(1, 4, 4), **MISSING)


def test_known_dataset_keeps_its_targets() -> None:
    known = RunConfig(dataset="diabetes", task="regression").spec.targets
    run = RunConfig(dataset="diabetes", task="regression", **MISSING)
    assert run.spec.targets == known._replace(missing=True)


# ---------------------------------------------------------------------- sources


def load(run: RunConfig, source: Path, **options: Any) -> AgentData:
    return data_of(
        run,
        source=str(source),
        **options,
    )


def known_labels(data: AgentData) -> dict[bytes, int]:
    parts = (data.train, data.held_out)
    return {image.tobytes(): int(label) for part in parts for image, label in zip(*part, strict=True)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return an image folder of two classes, with 20 pictures each, and 20 pictures without one."""
    for number, image in enumerate(images(60)):
        part = ("train/cat", "train/dog", "unlabelled")[number % 3]
        (tmp_path / "pets" / part).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0]).save(tmp_path / "pets" / part / f"{number}.png")
    return tmp_path / "pets"


PETS = RunConfig(dataset="pets", model="mlp", num_classes=2, image_shape=(1, 8, 8), **MISSING)


def test_pictures_without_a_class_are_kept_and_none_is_measured_by(folder: Path) -> None:
    data = load(PETS, folder)
    assert (data.train.targets == -1).sum() > 10
    assert set(data.held_out.targets) <= {0, 1}
    strict = load(PETS.model_copy(update={"targets": RunConfig().targets}), folder)
    assert len(strict.train.targets) + len(strict.held_out.targets) == 40


def test_pictures_without_a_class_that_cannot_be_read_are_of_no_class(folder: Path) -> None:
    for path in (folder / "unlabelled").iterdir():
        path.write_bytes(b"no picture")
    with capture_logs() as logs:
        load(PETS, folder)
    (skipped,) = (entry for entry in logs if entry["event"] == "images_skipped")
    assert (skipped["num_skipped"], skipped["classes_without_images"]) == (20, [])


def test_what_is_not_read_of_pictures_without_a_class_is_told(folder: Path) -> None:
    assert load(PETS, folder).not_read == ""
    (folder / "unlabelled/1.heic").write_bytes(b"")
    assert load(PETS, folder).not_read == "files not read: 1 (.heic 1), of them 1 in pets/unlabelled"
    strict = load(PETS.model_copy(update={"targets": RunConfig().targets}), folder)
    assert strict.not_read == (
        "unlabelled is not read, because the server's [run.targets] table has no missing = true"
    )


def test_labels_file_tells_classes_later_and_moves_no_picture(folder: Path) -> None:
    before = load(PETS, folder)
    lines = [
        f"{path.name},{'dog' if n % 2 else 'cat'}" for n, path in enumerate((folder / "unlabelled").iterdir())
    ]
    (folder / "labels.csv").write_text("\n".join(["file,target", *lines, "gone.png,cat"]))
    after = load(PETS, folder)

    assert after.stamp != before.stamp
    np.testing.assert_array_equal(after.train.inputs, before.train.inputs)
    assert set(after.train.targets) == set(after.held_out.targets) == {0, 1}
    told = known_labels(after)
    assert all(told[image] == label for image, label in known_labels(before).items() if label != -1)
    for line in lines:
        name, label = line.split(",")
        pixels = np.asarray(Image.open(folder / "unlabelled" / name))
        assert told[pixels.tobytes()] == ["cat", "dog"].index(label)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("file,target\n2.png,cow", "line 2: 'cow' is not one of the run's classes"),
        ("name,target\n2.png,cat", "line 1: the columns should be file and 1 for the target"),
        ("file,target\n2.png", "line 2: it has more or fewer cells"),
        ('file,target\n"2.png', "cannot be read"),
    ],
)
def test_labels_file_that_cannot_be_used_is_refused_with_its_line(
    folder: Path, text: str, problem: str
) -> None:
    (folder / "labels.csv").write_text(text)
    with pytest.raises(UsageError, match=r"labels\.csv") as refused:
        load(PETS, folder)
    assert problem in str(refused.value)


@pytest.mark.parametrize(("run", "cells"), [(ROWS_RUN, "a b"), (NUMBERS_RUN, "1.5 2")])
def test_empty_cells_of_a_table_are_missing_targets(tmp_path: Path, run: RunConfig, cells: str) -> None:
    some = cells.split()
    lines = [f"{n},{n / 7},{'' if n % 3 == 0 else some[n % 2]}" for n in range(60)]
    (tmp_path / "t.csv").write_text("\n".join(["x,y,z", *lines]))
    table = TableFormat(("x", "y"), ("z",))
    data = load(run, tmp_path / "t.csv", table=table)
    is_missing = (data.train.targets == -1) | np.isnan(data.train.targets)
    assert is_missing.sum() > 10
    np.testing.assert_array_equal(is_missing.reshape(-1), data.train.inputs[:, 0] % 3 == 0)
    assert (data.held_out.inputs[:, 0] % 3 > 0).all()
    strict = run.model_copy(update={"targets": RunConfig().targets})
    with pytest.raises(UsageError, match="rows cannot be used"):
        load(strict, tmp_path / "t.csv", table=table)


def test_arrays_have_missing_targets_and_a_labels_file(tmp_path: Path) -> None:
    inputs = np.random.default_rng(0).random((40, 2)).astype(np.float32)
    for run, missing, first in ((ROWS_RUN, -1, "c"), (ROWS_RUN, np.nan, "2"), (NUMBERS_RUN, np.nan, "2")):
        np.savez(tmp_path / "a.npz", inputs=inputs, targets=np.where(np.arange(40) % 2, 1, missing))
        (tmp_path / "a.labels.csv").unlink(missing_ok=True)
        before = load(run, tmp_path / "a.npz")
        (tmp_path / "a.labels.csv").write_text(
            "row,target\n" + "\n".join(f"{n},{first}" for n in range(0, 40, 2))
        )
        after = load(run, tmp_path / "a.npz")
        assert before.stamp != after.stamp
        num_missing = len(before.train.targets) - np.isin(before.train.targets, (0, 1, 2)).sum()
        assert 10 < num_missing == (after.train.targets == 2).sum()
        assert np.isin(after.train.targets, (1, 2)).all()


@pytest.mark.parametrize(
    "line", ["40,1", "-1,1", "one,1", "1,many", "1,1.5", "1,nan", "1,inf", "1,3", "1,-1", "1,1e300"]
)
def test_labels_file_of_arrays_is_refused_with_its_line(tmp_path: Path, line: str) -> None:
    np.savez(tmp_path / "a.npz", inputs=np.ones((40, 2), np.float32), targets=np.ones(40, int))
    (tmp_path / "a.labels.csv").write_text(f"row,target\n{line}")
    with pytest.raises(UsageError, match=r"a\.labels\.csv, line 2: "):
        load(ROWS_RUN, tmp_path / "a.npz")


@pytest.mark.parametrize("number", ["nan", "inf", "1e300", "101"])
def test_number_that_no_target_can_be_is_refused_with_its_line(tmp_path: Path, number: str) -> None:
    np.savez(tmp_path / "a.npz", inputs=np.ones((40, 2), np.float32), targets=np.ones(40))
    (tmp_path / "a.labels.csv").write_text(f"row,target\n1,100\n2,{number}")
    run = RunConfig(**ROWS, task="regression", targets={"missing": True, "low": 0, "high": 100})
    with pytest.raises(UsageError, match=r"a\.labels\.csv, line 3: "):
        load(run, tmp_path / "a.npz")


def test_labels_file_does_not_make_whole_numbers_of_other_targets(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", inputs=np.ones((40, 2), np.float32), targets=np.arange(40) % 3 + 0.5)
    (tmp_path / "a.labels.csv").write_text("row,target\n1,a")
    with pytest.raises(UsageError, match="the run wants int64"):
        load(ROWS_RUN, tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("known", "purpose"), [(slice(0, 40), "held back to measure models on"), (slice(52, 60), "to train on")]
)
def test_series_without_a_target_on_one_side_is_refused(tmp_path: Path, known: slice, purpose: str) -> None:
    cells = np.full(60, "", object)
    cells[known] = "1"
    (tmp_path / "t.csv").write_text("x,y,z\n" + "\n".join(f"{n},1,{cell}" for n, cell in enumerate(cells)))
    inputs = {"shape": (2, 4), "overlap": 4}
    run = RunConfig(dataset="own", model="cnn1d", task="regression", inputs=inputs, **MISSING)
    with pytest.raises(UsageError, match=rf"none of \d+ examples {purpose} has a target"):
        load(run, tmp_path / "t.csv", table=TableFormat(("x", "y"), ("z",), window=4))


def looked_at(source: Path, **columns: Any) -> str:
    return _look_at_data(AgentConfig(server="127.0.0.1:1", data=str(source), **columns))


def test_doctor_counts_examples_without_a_target(tmp_path: Path, folder: Path) -> None:
    hint = "have no target, which takes missing = true in the server's [run.targets]"
    assert looked_at(folder) == f"{folder} has 60 images of 2 classes; 20 {hint}"
    lines = [f"{n},{n / 7},{'' if n % 3 == 0 else 'ab'[n % 2]}" for n in range(60)]
    (tmp_path / "t.csv").write_text("\n".join(["x,y,z", *lines]))
    found = looked_at(tmp_path / "t.csv", data_inputs=("x", "y"), data_target=("z",))
    assert found.startswith(f"{tmp_path}/t.csv has 60 examples of 2 classes; mean")
    assert found.endswith(f"; 20 {hint}")
    inputs = np.ones((40, 2), np.float32)
    for missing, value, what in ((-1, 1, " of 1 classes;"), (np.nan, 1.5, "of the targets, mean = [1.5]")):
        np.savez(tmp_path / "a.npz", inputs=inputs, targets=np.where(np.arange(40) < 4, missing, value))
        assert what in looked_at(tmp_path / "a.npz")
        assert looked_at(tmp_path / "a.npz").endswith(f"; 4 {hint}")
    np.savez(tmp_path / "a.npz", inputs=inputs, targets=np.arange(40) - 20)
    assert hint not in looked_at(tmp_path / "a.npz")


def test_doctor_reads_the_labels_file_of_pictures(folder: Path) -> None:
    (folder / "labels.csv").write_text("file,target\n2.png,cat\n5.png,dog")
    assert "; 18 have no target" in looked_at(folder)
    (folder / "labels.csv").write_text("file,target\n2.png,cow")
    with pytest.raises(UsageError, match=r"labels.csv, line 2"):
        looked_at(folder)


def test_device_with_too_few_targets_is_refused(tmp_path: Path) -> None:
    inputs = np.random.default_rng(0).random((40, 2)).astype(np.float32)
    np.savez(tmp_path / "a.npz", inputs=inputs, targets=np.where(np.arange(40) < 1, 1, -1))
    with pytest.raises(UsageError, match="at least 2 are needed"):
        load(ROWS_RUN, tmp_path / "a.npz")


# ---------------------------------------------------------------------- shard files


def keep(folder: Path, shard: Shard) -> tuple[list[Path], list[Path]]:
    files = keep_shards(folder, shard, RUN.spec.targets)
    digests = {path: blob_of(path).digest for path in files}
    return files, keep_late_targets(digests, shard, RUN.spec.targets)


def test_late_targets_are_written_beside_a_shard_that_keeps_its_bytes(tmp_path: Path) -> None:
    shard = partly_labelled()
    (file,), none = keep(tmp_path, shard)
    before = file.read_bytes()
    assert none == []
    told = shard.targets.copy()
    told[[4, 8]] = 7, 3

    assert keep(tmp_path, Shard(shard.inputs[::-1], told[::-1])) == ([file], [file.with_suffix(".targets")])
    assert file.read_bytes() == before
    assert file.with_suffix(".targets").stat().st_size < 400
    first = file.with_suffix(".targets").read_bytes()
    told[8] = 5
    keep(tmp_path, Shard(shard.inputs, told))
    assert file.read_bytes() == before != first != file.with_suffix(".targets").read_bytes()

    assert keep(tmp_path, shard) == ([file], [])
    assert list(tmp_path.iterdir()) == [file]


def test_new_examples_are_a_new_shard_beside_late_targets(tmp_path: Path) -> None:
    shard, more = partly_labelled(), images(5, seed=1)
    keep(tmp_path, shard)
    told = np.where(shard.targets == -1, 2, shard.targets)
    grown = Shard(np.concatenate([shard.inputs, more]), np.concatenate([told, [1, -1, 1, -1, 1]]))
    files, late = keep(tmp_path, grown)
    assert [path.name for path in (*files, *late)] == [
        "000001.safetensors",
        "000002.safetensors",
        "000001.targets",
    ]
    assert read_header(files[1]).schema["images"].shape[0] == 5


def test_shard_that_is_made_anew_takes_its_late_targets_along(tmp_path: Path) -> None:
    shard = partly_labelled()
    keep(tmp_path, shard)
    told = np.where(shard.targets == -1, 2, shard.targets)
    keep(tmp_path, Shard(shard.inputs, told))
    files, late = keep(tmp_path, Shard(shard.inputs[1:], told[1:]))
    assert late == []
    assert list(tmp_path.iterdir()) == files


# ---------------------------------------------------------------------- what is trained on


def test_cloud_trains_on_targets_as_they_are_known_and_moves_no_example(tmp_path: Path) -> None:
    shard = partly_labelled(300)
    write_shard(tmp_path / "new", shard)
    digest = put(tmp_path / "new", tmp_path)
    rows = np.flatnonzero(shard.targets == -1)[:30]
    write_late_targets(tmp_path / "new", LateTargets(digest, rows, np.full(30, 9)))
    late = put(tmp_path / "new", tmp_path)

    first = combine(RUN, [Contribution("ann", "", (digest,), 100)], tmp_path)
    second = combine(RUN, [Contribution("ann", "", (digest, late), 130)], tmp_path)

    assert len(first.train.targets) + len(first.held_out.targets) == 100
    assert len(second.train.targets) + len(second.held_out.targets) == 130
    for before, after in zip(first, second, strict=True):
        labels = {image.numpy().tobytes(): int(label) for image, label in zip(*after, strict=True)}
        assert all(
            labels[image.numpy().tobytes()] == int(label) for image, label in zip(*before, strict=True)
        )
    told = {image.tobytes() for image in shard.inputs[rows]}
    found = [
        int(label)
        for part in second
        for image, label in zip(*part, strict=True)
        if image.numpy().tobytes() in told
    ]
    assert found == [9] * 30


def test_run_without_missing_targets_combines_what_it_always_did(tmp_path: Path) -> None:
    shard = Shard(images(60), np.arange(60) % 10)
    write_shard(tmp_path / "new", shard)
    agents = [Contribution("ann", "", (put(tmp_path / "new", tmp_path),), 60)]
    for one, other in zip(
        combine(RunConfig(), agents, tmp_path), combine(RUN, agents, tmp_path), strict=True
    ):
        assert torch.equal(one.inputs, other.inputs)
        assert torch.equal(one.targets, other.targets)


def test_audit_looks_at_what_has_a_target(tmp_path: Path) -> None:
    members = []
    for number, agent_id in enumerate(("ann", "bob", "eve")):
        shard = partly_labelled(90)
        write_shard(tmp_path / "new", Shard(images(90, seed=number), shard.targets))
        digest = put(tmp_path / "new", tmp_path)
        write_state_dict(build_model(RUN, seed=number).state_dict(), tmp_path / agent_id)
        contribution = Contribution(agent_id, "", (digest,), 30)
        members.append(Member(contribution, tmp_path / agent_id, tmp_path / agent_id, 1.0))
    findings = audit(build_model(RUN), members, tmp_path, run=RUN, device=CPU)
    assert all(each.labels and each.label_loss is not None for each in findings)


@pytest.mark.parametrize("shared_fraction", [0.0, 0.5, 1.0])
def test_device_trains_on_what_has_a_target_and_offers_what_is_new(
    tmp_path: Path, shared_fraction: float
) -> None:
    shard = partly_labelled()
    held_out = Shard(images(10, seed=1), np.arange(10))
    disk = AgentState(tmp_path / "edge", "edge-1")

    def models(labels: np.ndarray) -> LocalModels:
        data = AgentData(Shard(shard.inputs, labels), held_out, 0)
        return LocalModels(RUN, data, disk, CPU, (), 60.0, shared_fraction=shared_fraction)

    before = models(shard.targets)
    after = models(np.where(shard.targets == -1, 4, shard.targets))
    assert (before.num_examples, before.num_without_target) == (20, 40)
    assert (after.num_examples, after.num_without_target) == (60, 0)
    assert before.num_shared == after.num_shared
    assert set(before.trained_on) < set(after.trained_on)
    assert all(path.suffix == ".targets" for path in after.shards.keys() - before.shards.keys())
    assert not after.has_withdrawn
    seen = before._examples(), after._examples()
    assert [int(each.targets.min()) for each in seen] == [0, 0]
    assert len(seen[0].targets) <= 20 < len(seen[1].targets)


def test_device_whose_only_target_the_cloud_holds_back_is_told_so(tmp_path: Path) -> None:
    held_out = Shard(images(10, seed=1), np.arange(10))
    refused = []
    for number in range(12):
        labels = np.full(30, -1)
        labels[3] = 1
        disk = AgentState(tmp_path / str(number), f"edge-{number}")
        try:
            models = LocalModels(RUN, AgentData(Shard(images(30), labels), held_out, 0), disk, CPU, (), 60.0)
        except UsageError as error:
            refused.append(str(error))
        else:
            assert len(models._examples().targets) == 1
    assert 0 < len(refused) < 12
    assert all("tell the targets of more examples" in message for message in refused)


# ---------------------------------------------------------------------- late targets at the gate


@pytest.fixture
def late_of() -> Callable[..., dict[str, np.ndarray]]:
    def late(rows: Any = (1, 2), targets: Any = (3, 4)) -> dict[str, np.ndarray]:
        return {"rows": np.array(rows, np.int64), "targets": np.array(targets, np.int64)}

    return late


@pytest.mark.parametrize(
    ("arrays", "metadata"),
    [
        ({}, {}),
        ({}, {"shard": "f" * 63}),
        ({}, {"shard": "f" * 64, "more": ""}),
        ({"rows": [], "targets": []}, None),
        ({"rows": 1, "targets": 3}, None),
        ({"rows": [1, 2], "targets": [3]}, None),
        ({"rows": [2, 1]}, None),
        ({"rows": [1, 1]}, None),
        ({"rows": [-1, 1]}, None),
        ({"targets": [3, -1]}, None),
        ({"targets": [3, 10]}, None),
        ({"targets": [[3], [4]]}, None),
    ],
)
def test_late_targets_that_are_none_are_refused(
    tmp_path: Path, late_of: Callable[..., Any], arrays: Any, metadata: Any
) -> None:
    path = tmp_path / "late"

    def check_late() -> None:
        gate = DataGate(RUN.spec, 1 << 20)
        gate.check_header(read_header(path))
        gate.check_content(path)

    good = {"shard": "f" * 64}
    for fit in (late_of(), late_of(rows=[1], targets=[3])):
        save_file(fit, path, good)
        check_late()
    save_file(late_of(**arrays), path, good if metadata is None else metadata)
    with pytest.raises(InvalidError) as refused:
        check_late()
    assert refused.value.reason is Reason.INVALID_SHARD


def test_run_without_missing_targets_takes_no_late_ones(tmp_path: Path, late_of: Callable[..., Any]) -> None:
    save_file(late_of(), tmp_path / "late", {"shard": "f" * 64})
    with pytest.raises(InvalidError, match="no target of this run may be missing"):
        DataGate(RunConfig().spec, 1 << 20).check_header(read_header(tmp_path / "late"))


@pytest.fixture
def uploads(tmp_path: Path) -> Iterator[Uploads]:
    store = Store(tmp_path / "state")
    yield Uploads(store, weights_schema={}, spec=RUN.spec, max_data_bytes=1 << 20, turns=Turns(2))
    store.close()


def test_contribution_names_late_targets_of_its_own_shards_once(
    tmp_path: Path, uploads: Uploads, late_of: Callable[..., Any]
) -> None:
    blobs_dir = tmp_path / "state/blobs"

    def late(shard: str, **arrays: Any) -> str:
        save_file(late_of(**arrays), tmp_path / "new", {"shard": shard})
        return put(tmp_path / "new", blobs_dir)

    write_shard(tmp_path / "new", partly_labelled(9))
    shard = put(tmp_path / "new", blobs_dir)
    fit = late(shard, rows=(1, 8))
    # Three of nine have a target in the shard, and two more are told later.
    assert uploads.count_shared([shard], 3) == 3
    assert uploads.count_shared([shard, fit], 5) == uploads.count_shared([fit, shard], 5) == 5
    with pytest.raises(InvalidError, match="shards have 5 examples"):
        uploads.count_shared([shard, fit], 4)
    for digests in (
        [fit],
        [shard, fit, late(shard)],
        [shard, late(shard, rows=(1, 9))],
        [shard, late("f" * 64)],
    ):
        with pytest.raises(InvalidError, match="the only ones for a shard"):
            uploads.count_shared(digests, 9)


def test_examples_that_lack_a_part_of_their_target_are_counted_over_all_pieces_of_a_file(
    tmp_path: Path,
) -> None:
    run = RunConfig(**ROWS, task="regression", targets={"missing": True, "shape": (3,)})
    targets = np.ones((PIECE_BYTES // 8, 3), np.float32)
    is_missing = np.arange(len(targets)) % 7 == 0
    targets[is_missing, np.arange(is_missing.sum()) % 3] = np.nan
    write_shard(tmp_path / "shard", Shard(np.zeros((len(targets), 2), np.float32), targets))
    found = missing_rows(tmp_path / "shard", read_header(tmp_path / "shard"), run.spec)
    np.testing.assert_array_equal(found, is_missing)


def test_configuration_that_travels_has_the_key() -> None:
    assert json.loads(RUN.model_dump_json())["targets"]["missing"] is True
