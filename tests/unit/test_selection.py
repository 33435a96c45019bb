"""Selection on real digits: which model a fine-tune starts from."""

from pathlib import Path

import numpy as np
import pytest
import structlog
import torch
from sklearn.datasets import load_digits
from torch import nn

from ecavg.cloud_server.contribution import Contribution
from ecavg.cloud_server.trainer import measuring as measuring_module
from ecavg.cloud_server.trainer import selection as selection_module
from ecavg.cloud_server.trainer.finetune import CombinedData
from ecavg.cloud_server.trainer.measuring import Measuring
from ecavg.cloud_server.trainer.members import Member
from ecavg.cloud_server.trainer.permutations import apply, permutation_groups
from ecavg.cloud_server.trainer.selection import Selection
from ecavg.common import evaluation as evaluation_module
from ecavg.common.batches import DeviceData
from ecavg.common.config import CANDIDATES, RunConfig
from ecavg.common.evaluation import Evaluation, evaluate
from ecavg.common.models import build_model, empty_inputs
from ecavg.common.tasks.task import task_of
from ecavg.common.training import Examples, train
from ecavg.common.weights import write_state_dict
from tests.recipes import recipe_of

RUN = RunConfig(hidden_units=32)
CPU = torch.device("cpu")


class ConvNet(nn.Sequential):
    """With running statistics that are wrong after averaging."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16 * 64, 10),
        )


class Branching(nn.Module):
    """Which way it goes depends on the data, so there is no graph of it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x) if x.sum() > 0 else self.layers(-x)


def branching(*, num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    return Branching()


@pytest.fixture(scope="module")
def data() -> CombinedData:
    bunch = load_digits()
    images = torch.from_numpy((bunch.images * (255 / 16)).astype(np.uint8)[:, None])
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    return CombinedData(Examples(images[:1400], labels[:1400]), Examples(images[1400:], labels[1400:]))


@pytest.fixture(scope="module")
def trained(data):
    """Return a function that trains a model on the training examples from `begin` to `end`."""

    def trained(seed: int, begin: int, end: int, model: nn.Module | None = None) -> nn.Module:
        model = model or build_model(RUN, seed=seed)
        examples = Examples(data.train.inputs[begin:end], data.train.targets[begin:end])
        train(model, examples, recipe_of(RUN, seed), device=CPU)
        return model

    return trained


@pytest.fixture
def selected(tmp_path, data):
    """Return a function that selects among models; the contributions are named a, b, … in their order."""

    def selected(
        *models: nn.Module | dict,
        run: RunConfig = RUN,
        previous: nn.Module | None = None,
        data: CombinedData = data,
        structure: nn.Module | None = None,
    ) -> Selection:
        paths = [
            write(model, tmp_path / f"{name}.safetensors")
            for name, model in zip("abcdef", models, strict=False)
        ]
        scratch = tmp_path / "scratch"
        scratch.mkdir(exist_ok=True)
        selection = Selection(
            Measuring(structure or build_model(run, seed=9), run, data, CPU),
            [Member(Contribution(path.stem, "", (), 1), path, path, 1.0) for path in paths],
            write(previous, tmp_path / "previous.safetensors") if previous else None,
            scratch=scratch,
        )
        selection.run()
        return selection

    return selected


def write(model: nn.Module | dict, path: Path) -> Path:
    write_state_dict(model if isinstance(model, dict) else model.state_dict(), path)
    return path


def accuracy(model: nn.Module, examples: Examples) -> float:
    return evaluate(model, *examples, task=task_of(RUN), device=CPU).score


def shuffled(model: nn.Module, seed: int = 0) -> dict:
    """Return the state_dict of the same function, with the neurons in another order."""
    groups = permutation_groups(model, empty_inputs(RUN.spec))
    generator = torch.Generator().manual_seed(seed)
    permutations = [torch.randperm(group.size, generator=generator) for group in groups]
    return apply(groups, permutations, model.state_dict())


def test_neurons_in_another_order_are_averaged_as_if_they_were_in_the_same(selected, trained, data):
    model = trained(1, 0, 1400)
    selection = selected(model, shuffled(model))
    assert selection.scores["aligned"] == accuracy(model, data.held_out)
    assert selection.scores["average"] < selection.scores["aligned"] - 0.05
    best = selection.take_best()
    assert best.name == "aligned"
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(best.state_dict[name], tensor)


def test_every_candidate_is_measured_and_the_best_one_is_taken(selected, trained, data):
    models = [trained(seed, 100 * seed, 100 * seed + 300) for seed in range(1, 4)]
    previous = trained(7, 0, 60)
    selection = selected(*models, previous=previous)
    found = selection.scores
    assert list(found) == list(CANDIDATES)
    assert found["previous"] == accuracy(previous, data.held_out)
    for name in CANDIDATES:
        # Asked for alone, each candidate is the best one, and is what the model is left as.
        run = RUN.model_copy(update={"candidates": (name,)})
        alone = selected(*models, run=run, previous=previous).take_best()
        model = build_model(RUN, seed=0)
        model.load_state_dict(alone.state_dict)
        assert accuracy(model, data.held_out) == found[name]
    best = selection.take_best()
    assert found[best.name] == max(found.values()) == best.evaluation.score
    assert selection.scores["best_agent"] == max(accuracy(model, data.held_out) for model in models)


def test_who_would_spoil_the_soup_is_left_out(selected, trained):
    good, also_good = trained(1, 0, 700), trained(1, 700, 1400)
    selection = selected(good, build_model(RUN, seed=5), also_good)
    assert set(selection.soup) == {"a", "c"}
    assert selection.scores["greedy_soup"] > selection.scores["aligned"]
    assert selection.scores["greedy_soup"] >= selection.scores["best_agent"]


def test_the_previous_model_is_kept_where_the_agents_got_worse(selected, trained, data):
    previous = trained(1, 0, 1400)
    selection = selected(build_model(RUN, seed=5), build_model(RUN, seed=6), previous=previous)
    assert selection.take_best().name == "previous"
    assert selection.scores["previous"] == accuracy(previous, data.held_out)


def test_a_worse_model_offered_later_is_not_taken(selected, trained, data):
    model = build_model(RUN, seed=9)
    selection = selected(trained(1, 0, 1400), trained(1, 0, 1200), structure=model)
    best = selection.take_best()
    nn.init.zeros_(model[3].weight)
    assert selection.offer("fine_tuned").score < 0.2
    assert selection.take_best() is best
    assert accuracy(model, data.held_out) == best.evaluation.score


def evaluation_of(right: list[int]) -> Evaluation:
    """Return the evaluation of a model that is right on these of a hundred examples."""
    scores = torch.zeros(100)
    scores[right] = 1
    return Evaluation(float(scores.mean()), 1 - float(scores.mean()), 100, scores, {})


@pytest.mark.parametrize(
    ("right", "published"),
    [
        # The start is right on the first ninety. One that is lost may be chance, and so may three less one.
        (range(1, 90), "fine_tuned"),
        ([*range(3, 90), 95], "fine_tuned"),
        ([*range(4, 90), 95], "average"),
        (range(2, 90), "average"),
        # As a fine-tune of no epochs leaves it.
        (range(90), "average"),
        (range(91), "fine_tuned"),
    ],
)
def test_start_stays_only_where_it_is_better_beyond_chance(
    selected, trained, monkeypatch, right: list[int], published: str
):
    selection = selected(trained(1, 0, 700))
    selection.best = selection.best._replace(name="average", evaluation=evaluation_of(list(range(90))))
    monkeypatch.setattr(selection, "measure", lambda: evaluation_of(list(right)))
    selection.offer("fine_tuned")
    assert selection.best.name == published


def test_average_of_the_fine_tune_is_taken_only_where_it_is_better(selected, trained, monkeypatch):
    selection = selected(trained(1, 0, 700))
    selection.best = selection.best._replace(name="fine_tuned", evaluation=evaluation_of(list(range(90))))
    for number in (89, 90, 91):
        monkeypatch.setattr(selection, "measure", lambda number=number: evaluation_of(list(range(number))))
        selection.offer("fine_tuned_average")
        assert selection.best.name == ("fine_tuned_average" if number == 91 else "fine_tuned")


def test_running_statistics_are_those_of_the_combined_data(selected, trained):
    torch.manual_seed(3)
    start = ConvNet().state_dict()
    models = []
    for begin in (0, 700):
        model = ConvNet()
        model.load_state_dict(start)
        models.append(trained(1, begin, begin + 700, model))
    broken = models[1].state_dict() | {"1.running_mean": torch.full((16,), 1e3)}
    recomputed = selected(models[0], broken, structure=ConvNet())
    averaged = selected(
        models[0], broken, structure=ConvNet(), run=RUN.model_copy(update={"recompute_statistics": False})
    )
    assert recomputed.scores["average"] > 0.8
    assert averaged.scores["average"] < 0.3


def test_without_held_out_data_the_first_candidate_is_taken(selected, trained):
    nothing = Examples(torch.empty(0, 1, 8, 8, dtype=torch.uint8), torch.empty(0, dtype=torch.int64))
    model = trained(1, 0, 1400)
    selection = selected(model, shuffled(model), data=CombinedData(nothing, nothing))
    assert selection.scores == {}
    assert selection.soup == ()
    best = selection.take_best()
    assert (best.name, best.evaluation) == ("aligned", None)
    torch.testing.assert_close(best.state_dict["1.weight"], model.state_dict()["1.weight"])
    assert selection.offer("fine_tuned") is None
    assert selection.take_best().name == "fine_tuned"


def test_a_model_without_a_graph_is_averaged_as_it_is(selected, trained):
    run = RUN.model_copy(update={"model": "tests.unit.test_selection:branching"})
    models = [trained(seed, 0, 700, Branching()) for seed in (1, 2)]
    with structlog.testing.capture_logs() as logs:
        selection = selected(*models, run=run)
    assert [line["event"] for line in logs].count("averaged_without_alignment") == 1
    assert "aligned" not in selection.scores
    assert {"average", "greedy_soup", "best_agent"} <= set(selection.scores)
    alone = selected(*models, run=run.model_copy(update={"candidates": ("aligned",)}))
    assert alone.take_best().name == "average"


def test_one_agent_alone_is_the_average(selected, trained, data):
    model = trained(1, 0, 1400)
    selection = selected(model)
    found = accuracy(model, data.held_out)
    assert selection.scores == {"average": found, "best_agent": found}
    torch.testing.assert_close(selection.take_best().state_dict, read_state_dict_of(model), rtol=0, atol=0)


@pytest.mark.parametrize("aggregator", ["trimmed_mean", "median", "geometric_median"])
def test_the_run_s_aggregator_makes_the_average(selected, trained, aggregator):
    """One absurd contribution among five ruins a mean, and nothing else."""
    models = [trained(1, 100 * index, 100 * index + 400) for index in range(4)]
    absurd = {name: tensor * -1000 for name, tensor in models[0].state_dict().items()}
    run = RUN.model_copy(update={"candidates": ("average",), "trim_fraction": 0.2})
    assert selected(absurd, *models, run=run).scores["average"] < 0.6
    robust = run.model_copy(update={"aggregator": aggregator})
    assert selected(absurd, *models, run=robust).scores["average"] > 0.8


def test_the_same_selection_gives_the_same_bits(tmp_path, trained, data):
    paths = [
        write(trained(seed, 0, 400), tmp_path / f"{name}.safetensors")
        for seed, name in enumerate(("a", "b", "c"))
    ]
    found = []
    for _ in range(2):
        (tmp_path / "scratch").mkdir(exist_ok=True)
        selection = Selection(
            Measuring(build_model(RUN, seed=9), RUN, data, CPU),
            [Member(Contribution(path.stem, "", (), 1), path, path, 1.0) for path in paths],
            None,
            scratch=tmp_path / "scratch",
        )
        selection.run()
        found.append(selection.take_best().state_dict)
    torch.testing.assert_close(*found, rtol=0, atol=0)


def read_state_dict_of(model: nn.Module) -> dict:
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


@pytest.fixture
def count(monkeypatch):
    """Return a function that counts the calls of a function or class that the module under test uses."""

    def count(module, name: str) -> list:
        calls, real = [], getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **more: calls.append(name) or real(*args, **more))
        return calls

    return count


@pytest.fixture
def convolutions(trained) -> list[nn.Module]:
    """Return two models that make a good soup, and one between them that would spoil it."""
    torch.manual_seed(3)
    start = ConvNet().state_dict()
    models = [ConvNet() for _ in range(3)]
    for model in models:
        model.load_state_dict(start)
    for model, begin in ((models[0], 0), (models[2], 700)):
        trained(1, begin, begin + 700, model)
    nn.init.normal_(models[1][4].weight)
    return models


def test_images_are_moved_to_the_device_once_for_all_candidates(selected, convolutions, count):
    moves, uses = count(DeviceData, "__init__"), count(evaluation_module, "_moved")
    selection = selected(*convolutions, structure=ConvNet())
    # The images to measure on and those for the statistics, for all candidates together.
    assert len(moves) == 2
    assert len(uses) > 6
    # Their memory is free for the fine-tune.
    assert selection._measuring._moved == {}
    assert selection.offer("fine_tuned")


def test_soup_that_is_still_in_the_model_is_not_made_again(selected, convolutions, count):
    made, recomputed = count(selection_module, "aggregate"), count(measuring_module, "recompute_statistics")
    run = RUN.model_copy(update={"candidates": ("aligned", "greedy_soup")})
    found = selected(*convolutions, structure=ConvNet(), run=run)
    assert set(found.soup) == {"a", "c"}
    # One mean of all three, and one of the soup.
    assert (len(made), len(recomputed)) == (2, 2)
    assert found.take_best().name == "greedy_soup"
    # Without the other candidate, the mean of all three is made after the soup, so the soup is made again.
    made.clear()
    alone = selected(
        *convolutions, structure=ConvNet(), run=RUN.model_copy(update={"candidates": ("greedy_soup",)})
    )
    assert len(made) == 3
    expected = alone.take_best().state_dict
    assert all(torch.equal(tensor, expected[key]) for key, tensor in found.take_best().state_dict.items())


def test_model_that_changed_since_is_filled_again(selected, convolutions, count):
    found = selected(*convolutions, structure=ConvNet())
    found._fill(found._members, "mean")
    made = count(selection_module, "aggregate")
    found._fill(found._members, "mean")
    assert made == []
    for change in (nn.init.zeros_, lambda weight: found.take_best()):
        change(found._model[4].weight)
        found._fill(found._members, "mean")
        assert len(made) == 1
        made.clear()


def test_groups_of_a_network_are_found_once_for_all_rounds(selected, trained, count):
    found, model = count(selection_module, "permutation_groups"), build_model(RUN, seed=9)
    models = [trained(1, 0, 700), trained(2, 0, 700)]
    first, second = (selected(*models, structure=model) for _ in range(2))
    assert len(found) == 1
    assert first.scores == second.scores
