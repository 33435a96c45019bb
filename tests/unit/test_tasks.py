"""What each task computes, against scikit-learn and loops that are written out."""

import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score, mean_absolute_error, r2_score
from torch import Tensor, nn

from ecavg.common.config import RunConfig
from ecavg.common.dataset import DatasetSpec, Inputs, Targets
from ecavg.common.errors import UsageError
from ecavg.common.evaluation import WORST, evaluate
from ecavg.common.models import build_model
from ecavg.common.tasks import KINDS, kind_of, published, unpublished
from ecavg.common.tasks.classification import Classification
from ecavg.common.tasks.multi_label import MultiLabel
from ecavg.common.tasks.regression import Regression
from ecavg.common.tasks.segmentation import Segmentation
from ecavg.common.tasks.task import Figure, Task, output_shape_of, task_of
from tests.recipes import CPU

RUNS: dict[str, dict[str, Any]] = {
    "classification": {},
    "multi-label": {"dataset": "own", "num_classes": 3, "inputs": {"shape": (4,)}},
    "regression": {"dataset": "diabetes"},
    "segmentation": {"dataset": "own", "num_classes": 3, "image_shape": (1, 8, 8)},
}
NUMBERS = DatasetSpec(Inputs("float32", (4,)), Targets("float32", (2,), mean=(10.0, -5.0), std=(4.0, 0.5)))


def run_of(task: str, **more: Any) -> RunConfig:
    return RunConfig(task=task, **{**RUNS[task], **more})


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", KINDS)
def test_task_has_the_figure_that_processes_without_pytorch_know_of(name: str) -> None:
    task = task_of(run_of(name))
    assert task.metric == kind_of(name).metric
    model = build_model(run_of(name))
    shape = output_shape_of(run_of(name))
    inputs = torch.zeros(2, *task.spec.inputs.shape)
    assert shape is not None
    assert model(inputs).shape == (2, *shape)


def test_classification_is_cross_entropy_and_accuracy() -> None:
    task = Classification(RunConfig().spec)
    logits, labels = drawn(50, 10), torch.arange(50) % 10
    expected = [
        F.cross_entropy(one, label, label_smoothing=0.1) for one, label in zip(logits, labels, strict=True)
    ]
    torch.testing.assert_close(task.loss(logits, labels, 0.1), torch.stack(expected))
    right = logits.numpy().argmax(1) == labels.numpy()
    assert task.scores(logits, labels).numpy().tolist() == right.astype(float).tolist()
    figure = task.figure(task.tally(logits, labels))
    assert figure.score == right.mean()
    assert {label: each.score for label, each in figure.by_class.items()} == {
        label: right[labels.numpy() == label].mean() for label in range(10)
    }


def test_regression_is_the_squared_error_in_deviations_of_the_targets() -> None:
    task = Regression(NUMBERS)
    outputs, targets = drawn(30, 2), 3 * drawn(30, 2, seed=1) + 10
    predictions = outputs.numpy() * [4, 0.5] + [10, -5]
    errors = predictions - targets.numpy()
    np.testing.assert_allclose(task.loss(outputs, targets), ((errors / [4, 0.5]) ** 2).mean(1), rtol=1e-5)
    np.testing.assert_allclose(task.scores(outputs, targets), -np.abs(errors).mean(1), rtol=1e-5)
    figure = task.figure(task.tally(outputs, targets))
    assert figure.score == pytest.approx(r2_score(targets, predictions))
    assert figure.figures == {"mean_absolute_error": pytest.approx(mean_absolute_error(targets, predictions))}


@pytest.mark.parametrize(("error", "score"), [(0.0, 1.0), (0.5, 0.0)])
def test_r2_of_equal_targets_says_whether_there_is_an_error(error: float, score: float) -> None:
    targets = torch.full((3, 1), 7.0)
    task = Regression(DatasetSpec(Inputs("float32", (4,)), Targets("float32", (1,))))
    assert task.figure(task.tally(targets + error, targets)).score == score


def test_multi_label_is_the_mean_of_average_precisions() -> None:
    task = MultiLabel(run_of("multi-label").spec)
    # Rounded, so that some outputs are equal.
    outputs, targets = (4 * drawn(60, 3)).round() / 4, (drawn(60, 3, seed=1) > 0.5).long()
    targets[:, 2] = 0
    expected = [average_precision_score(targets[:, k], outputs[:, k]) for k in range(2)]
    figure = task.figure(task.tally(outputs, targets))
    assert figure.score == pytest.approx(np.mean(expected))
    assert {k: each.score for k, each in figure.by_class.items()} == pytest.approx(dict(enumerate(expected)))
    assert [each.num_examples for each in figure.by_class.values()] == targets[:, :2].sum(0).tolist()
    probabilities = outputs.sigmoid().numpy()
    wanted = 0.8 * targets.numpy() + 0.1
    losses = -(wanted * np.log(probabilities) + (1 - wanted) * np.log(1 - probabilities)).mean(1)
    np.testing.assert_allclose(task.loss(outputs, targets, 0.2), losses, rtol=1e-5)
    right = (probabilities > 0.5) == targets.numpy()
    np.testing.assert_allclose(task.scores(outputs, targets), right.mean(1), rtol=1e-6)


def intersection_over_union(found: np.ndarray, wanted: np.ndarray) -> dict[int, float]:
    """Return the ratio of each class that is in either; pixels of class -1 do not count."""
    counts = wanted >= 0
    sets = {k: ((found == k) & counts, (wanted == k) & counts) for k in range(3)}
    return {k: (a & b).sum() / (a | b).sum() for k, (a, b) in sets.items() if (a | b).any()}


def test_segmentation_is_the_mean_intersection_over_union() -> None:
    task = Segmentation(run_of("segmentation").spec)
    outputs = drawn(6, 3, 8, 8)
    targets = torch.randint(-1, 3, (6, 8, 8), generator=torch.Generator().manual_seed(2))
    targets[0] = -1
    found, wanted = outputs.numpy().argmax(1), targets.numpy()
    figure = task.figure(task.tally(outputs, targets))
    expected = intersection_over_union(found, wanted)
    assert figure.score == pytest.approx(np.mean(list(expected.values())))
    assert {k: each.score for k, each in figure.by_class.items()} == pytest.approx(expected)
    per_example = [
        np.mean(list(intersection_over_union(*both).values())) if (both[1] >= 0).any() else 0.0
        for both in zip(found, wanted, strict=True)
    ]
    np.testing.assert_allclose(task.scores(outputs, targets), per_example, rtol=1e-6)
    losses = task.loss(outputs, targets)
    assert losses[0] == 0
    np.testing.assert_allclose(
        losses[1:],
        [F.cross_entropy(outputs[i : i + 1], targets[i : i + 1], ignore_index=-1) for i in range(1, 6)],
        rtol=1e-5,
    )


@pytest.mark.parametrize("name", ["regression", "multi-label"])
def test_model_that_is_not_finite_is_the_worst_and_not_an_error(name: str) -> None:
    run = run_of(name)
    model = build_model(run)
    for parameter in model.parameters():
        nn.init.constant_(parameter, math.inf)
    targets = torch.ones(5, *run.spec.targets.shape, dtype=getattr(torch, run.spec.targets.dtype))
    found = evaluate(model, torch.ones(5, *run.spec.inputs.shape), targets, task=task_of(run), device=CPU)
    assert found.score == WORST or name == "multi-label"
    assert math.isfinite(found.score)
    assert torch.isfinite(found.scores).all()


def test_classifier_whose_outputs_are_no_numbers_is_right_about_nothing() -> None:
    run = RunConfig()
    model = build_model(run)
    for parameter in model.parameters():
        nn.init.constant_(parameter, math.nan)
    images = torch.ones(5, *run.spec.inputs.shape, dtype=torch.uint8)
    labels = torch.zeros(5, dtype=torch.int64)
    found = evaluate(model, images, labels, task=task_of(run), device=CPU)
    assert (found.score, found.by_class[0].score) == (0.0, 0.0)
    assert found.scores.tolist() == [0.0] * 5


def test_names_of_published_fields_follow_from_the_task() -> None:
    fields = {"score_before": 1, "applied": True}
    assert published(KINDS["classification"], fields) == {"accuracy_before": 1, "applied": True}
    assert published(KINDS["regression"], fields) == fields
    assert unpublished({"accuracy": 1, "accuracy_local": 2}) == {"score": 1, "score_local": 2}
    for kind in KINDS.values():
        assert unpublished(published(kind, fields)) == fields


class Largest(Task):
    """An own task: the largest output is to be the target."""

    metric = "closeness"

    def loss(self, outputs: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        return (outputs.amax(1) - targets[:, 0]).abs() + label_smoothing

    def scores(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return -self.loss(outputs, targets)


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    module = ModuleType("users_task")
    module.Largest = Largest  # type: ignore[attr-defined]
    module.no_task = lambda _: 7  # type: ignore[attr-defined]
    monkeypatch.setitem(__import__("sys").modules, "users_task", module)
    return module


@pytest.mark.usefixtures("own")
def test_own_task_is_found_by_name_where_it_is_allowed() -> None:
    run = RunConfig(task="users_task:Largest", dataset="own", inputs={"shape": (4,)}, model="any:thing")
    task = task_of(run, ["users_task:Largest"])
    assert isinstance(task, Largest)
    assert task.spec.targets == Targets("float32", (1,))
    outputs, targets = torch.tensor([[1.0, 3.0], [0.0, -1.0]]), torch.tensor([[2.0], [0.0]])
    assert task.figure(task.tally(outputs, targets)) == Figure(-0.5)
    with pytest.raises(UsageError, match="--allow-factory users_task:Largest"):
        task_of(run, [])
    with pytest.raises(UsageError, match="does not derive from"):
        task_of(run.model_copy(update={"task": "users_task:no_task"}))
    with pytest.raises(UsageError, match="bring a model, too"):
        build_model(run.model_copy(update={"model": "mlp"}))


OWN: dict[str, Any] = {"dataset": "own", "num_classes": 2}
DIABETES: dict[str, Any] = {"dataset": "diabetes", "task": "regression"}
CROPS: dict[str, Any] = {"pretrain": {"augment": ("random_crop",)}}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "sorting"}, "choose classification, multi-label, regression, segmentation"),
        ({"task": "regression"}, "dataset 'digits' has other targets"),
        ({"dataset": "diabetes"}, "dataset 'diabetes' has other targets"),
        ({"dataset": "own", "task": "regression"}, "unknown dataset 'own'"),
        ({"dataset": "own", "inputs": {"shape": (4,)}}, "unknown dataset 'own'"),
        ({**DIABETES, "mean": (1.0,)}, "each of 10 features"),
        ({**DIABETES, "targets": {"std": (0.0,)}}, "targets.std must be above 0"),
        ({**DIABETES, "partition_by": "classes:2"}, "partition_by must be"),
        ({**DIABETES, "pretrain": {"label_smoothing": 0.1}}, "label_smoothing"),
        ({**DIABETES, "fine_tune": {"class_balanced": True}}, "class_balanced"),
        ({"dataset": "wine", **CROPS}, "augment is for pictures"),
        ({**RUNS["segmentation"], "task": "segmentation", **CROPS}, "masks"),
        ({"image_shape": (1, 8, 8), "inputs": {"shape": (4,)}}, "say the same"),
        ({**OWN, "inputs": {"shape": (8001, 8001)}}, "more than 64000000 values"),
        ({**OWN, "inputs": {"shape": (1,), "dtype": "int64"}, "mean": (0,), "std": (1,)}, "inputs of int64"),
        ({**OWN, "inputs": {"shape": (4,), "low": 1, "high": 0}}, "must not be above"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RunConfig(**settings)


def test_run_is_the_same_dataset_after_it_has_travelled() -> None:
    for name in RUNS:
        run = run_of(name)
        assert RunConfig.model_validate_json(run.model_dump_json()).spec == run.spec


def test_every_task_has_a_page_entry() -> None:
    page = (Path(__file__).parents[2] / "docs/tasks.md").read_text("utf-8")
    for name, kind in KINDS.items():
        assert f"`{name}`" in page
        assert kind.metric in page
