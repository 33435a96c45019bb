"""The experiments on a few digits: whole tables, and that what is done is not done again."""

import json
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ecavg.cloud_server.trainer.finetune import fine_tune
from ecavg.common.config import RunConfig
from ecavg.common.layers import deep_merge
from ecavg.common.weights import read_state_dict
from ecavg.edge_agent.local import LocalModels
from experiments import barrier, cell, command, data, paper, plots, tables
from experiments.round import Network
from experiments.tasks import TASKS, VARIANTS, Setting, Variant

FEW = ["--examples-per-agent", "60", "--test-examples", "100", "--seeds", "2"]
SHORT = ["--set", "pretrain.epochs=3", "--set", "fine_tune.epochs=2"]

Record = dict[str, Any]
Make = Callable[..., int]


def nothing(*_: Any) -> None: ...


@pytest.fixture(autouse=True)
def _leave_the_process_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "set_up_process", nothing)
    monkeypatch.setenv("EXPERIMENT_DATA", "")  # what is written there ends with the test


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("experiments")


@pytest.fixture
def make(folder: Path) -> Make:
    """Make a table in a folder that the tests share: what one has found out the next one need not."""

    def make(table: str, *more: str, out: str = "out") -> int:
        dirs = ["--work-dir", str(folder / "work"), "--out-dir", str(folder / out)]
        return paper.main(["--task", "digits", "--table", table, *FEW, *SHORT, *dirs, *more])

    return make


def figures_of(folder: Path, table: str) -> Record:
    return json.loads((folder / f"out/digits-{table}.json").read_text("utf-8"))["figures"]  # type: ignore[no-any-return]


def test_claims_are_measured_at_every_stage(make: Make, folder: Path) -> None:
    assert make("claims") == 0
    (group,) = figures_of(folder, "claims").values()
    assert [seed["seed"] for seed in group["seeds"]] == [0, 1]
    for name in tables.CLAIMS:
        for stage in ("edges, pre-trained", "average", "start", "fine-tuned", "published", "edges, after"):
            assert len(tables.stage_values(group["seeds"], stage, name)) == 2
    assert len(tables.stage_values(group["seeds"], "aligned", "selection")) == 2
    text = (folder / "out/digits-claims.md").read_text("utf-8")
    assert "| fine-tuned | " in text
    assert "plain average below every edge: on " in text
    for line in group["barrier"]:
        assert len(line["as_they_are"]) == len(line["aligned"]) == barrier.NUM_POINTS
        assert line["as_they_are"][0] == line["aligned"][0]
        # A permuted network is the same function.
        assert line["as_they_are"][-1] == pytest.approx(line["aligned"][-1], rel=1e-5)
        assert line["aligned"][5] < line["as_they_are"][5]
    for name in ("digits-claims.svg", "digits-claims-barrier.svg"):
        assert (folder / "out" / name).read_text("utf-8").startswith("<?xml")


def test_figures_are_those_of_the_weights_on_the_common_test_set(make: Make, folder: Path) -> None:
    make("claims")
    (group,) = figures_of(folder, "claims").values()
    (place,) = (folder / "work").glob("digits-independent-iid-2x60-seed1-*")
    (arrays,) = (path.parent for path in (folder / "work").glob("*/test-targets.npy"))
    images, labels = data.sample(data.read(arrays, "test"), 100, 0)
    spec = RunConfig(**TASKS["digits"].run).spec
    for agent_id, found in zip(("edge-01", "edge-02"), group["seeds"][1]["edges"], strict=True):
        weights = read_state_dict(place / "network" / agent_id / "work/local.safetensors")
        x = torch.from_numpy(
            ((images / 255 - spec.inputs.mean) / spec.inputs.std).astype(np.float32)
        ).flatten(1)
        hidden = torch.relu(x @ weights["1.weight"].T + weights["1.bias"])
        chosen = (hidden @ weights["3.weight"].T + weights["3.bias"]).argmax(1)
        assert found == (chosen.numpy() == labels).mean()


@pytest.mark.soak
def test_parts_have_a_row_for_each_variant_and_share_the_pretraining(
    make: Make, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers: list[int] = []
    pretrain = LocalModels.pretrain

    def counted(self: LocalModels, number: int, *rest: Any) -> Any:
        numbers.append(number)
        return pretrain(self, number, *rest)

    monkeypatch.setattr(LocalModels, "pretrain", counted)
    assert make("parts", "--initial-weights", "shared") == 0
    # Two seeds with two agents each: once for all variants, and in each of the two shorter rounds.
    assert sorted(numbers) == [1] * 8 + [2] * 4
    (group,) = figures_of(folder, "parts").values()
    assert list(group["variants"]) == list(VARIANTS)
    assert all([row["seed"] for row in rows] == [0, 1] for rows in group["variants"].values())
    one = {name: rows[0] for name, rows in group["variants"].items()}
    assert one["aligned"]["start_is"] == "aligned"
    assert one["best_agent"]["start_is"] == "best_agent"
    # An mlp has no BatchNorm.
    assert one["plain_average"]["fine_tuned"] == one["statistics"]["fine_tuned"]
    assert one["random"]["start"] < one["plain_average"]["start"]
    text = (folder / "out/digits-parts.md").read_text("utf-8")
    assert all(text.count(f"| {variant.label} |") == 1 for variant in VARIANTS.values())


def test_transfer_counts_every_agent_in_every_cell(make: Make, folder: Path) -> None:
    assert make("transfer", "--agents", "2,3", "--partition-by", "iid,dirichlet:0.3", "--seeds", "1") == 0
    figures = figures_of(folder, "transfer")
    assert {name: len(seeds[0]["agents"]["selection"]) for name, seeds in figures.items()} == {
        "shared, iid, 2 agents": 2,
        "shared, iid, 3 agents": 3,
        "shared, dirichlet:0.3, 2 agents": 2,
        "shared, dirichlet:0.3, 3 agents": 3,
    }
    for seed in (seed for seeds in figures.values() for seed in seeds):
        agents = seed["agents"]["selection"]
        assert sum(agent["num_held_out"] for agent in agents) == 100  # the common test set, dealt out
        assert not any(agent["gate"]["is_worse"] for agent in agents)
        for agent in agents:
            gate = agent["gate"]
            assert (gate["takes"] == "as it is") is not agent["is_worse"]
            if gate["takes"] != "adapted":
                end = "before" if gate["takes"] == "its own" else "after"
                assert [gate[f"{where}_after"] for where in ("own", "test")] == [
                    agent[f"{where}_{end}"] for where in ("own", "test")
                ]
    assert not list((folder / "work").glob("digits-shared-dirichlet*/network"))  # weights are large


def test_what_the_default_has_done_is_not_done_again_for_its_start_alone(
    make: Make, folder: Path, tmp_path: Path
) -> None:
    make("parts", "--initial-weights", "shared")
    (place,) = (folder / "work").glob("digits-shared-iid-2x60-seed0-*")
    records = {name: json.loads((place / f"{name}.json").read_text("utf-8")) for name in VARIANTS}
    start = records["selection"]["rounds"][0]["start"]
    assert records[start]["same_as"] == "selection"
    command = ["--task", "digits", "--table", "parts", *FEW, *SHORT, "--seeds", "1", "--variants", start]
    dirs = ["--work-dir", str(tmp_path), "--out-dir", str(tmp_path)]
    assert paper.main([*command, "--initial-weights", "shared", *dirs]) == 0
    (path,) = tmp_path.glob(f"*/{start}.json")
    alone = json.loads(path.read_text("utf-8"))
    assert "same_as" not in alone
    assert alone["rounds"][0]["digest"] == records[start]["rounds"][0]["digest"]
    assert alone["rounds"][0]["models"]["fine_tuned"] == records[start]["rounds"][0]["models"]["fine_tuned"]


def test_what_is_done_is_not_done_again(make: Make, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make("claims")
    before = {path: path.read_bytes() for path in (folder / "out").iterdir()}

    def refuse(*_: Any) -> None:
        raise AssertionError("done already")

    monkeypatch.setattr(cell, "_Run", refuse)
    assert make("claims") == 0
    assert {path: path.read_bytes() for path in before} == before
    with pytest.raises(AssertionError, match="done already"):
        make("claims", "--set", "fine_tune.learning_rate=0.01")


def test_a_stopped_experiment_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dirs = ["--work-dir", str(tmp_path / "work"), "--out-dir", str(tmp_path / "out")]
    command = ["--task", "digits", *FEW[:4], "--seeds", "1", *SHORT, *dirs]
    calls = []

    def stopped_in_the_second(*args: Any, **more: Any) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        fine_tune(*args, **more)

    monkeypatch.setattr("ecavg.cloud_server.trainer.pipeline.fine_tune", stopped_in_the_second)
    assert paper.main(command) == 130
    assert not (tmp_path / "out").exists()

    monkeypatch.setattr(LocalModels, "pretrain", None)  # neither agent trains once more
    assert paper.main(command) == 0
    assert len(calls) == 3  # the second variant only
    assert (tmp_path / "out/digits-claims.md").exists()


@pytest.mark.soak
def test_seeds_may_be_done_side_by_side(
    make: Make, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make("claims")

    def pool(num_jobs: int, *context: Any, initializer: Any) -> ProcessPoolExecutor:
        assert (num_jobs, initializer) == (2, nothing)
        return ProcessPoolExecutor(num_jobs, *context, initializer=initializer)

    monkeypatch.setattr(paper, "ProcessPoolExecutor", pool)
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))  # other sums have other last bits
    dirs = ["--work-dir", str(tmp_path), "--out-dir", str(tmp_path)]
    assert paper.main(["--task", "digits", *FEW, *SHORT, *dirs, "--jobs", "2"]) == 0
    (alone,) = figures_of(folder, "claims").values()
    (together,) = json.loads((tmp_path / "digits-claims.json").read_text("utf-8"))["figures"].values()
    for one, other in zip(alone["seeds"], together["seeds"], strict=True):
        assert one["selection"] == other["selection"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--variants", "magic"], "unknown variants magic: choose from random, "),
        (["--table", "everything"], "invalid choice: 'everything'"),
    ],
)
def test_bad_usage_is_told(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        paper.main(["--task", "digits", *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--examples-per-agent", "5000"], "10000 examples are wanted, and there are 1348"),
        (["--set", "fine_tune.epochs"], "--set fine_tune.epochs is not TOML"),
        (["--set", "fine_tune.epochs=-1"], "fine_tune.epochs"),
    ],
)
def test_what_cannot_be_had_is_told_in_a_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert paper.main(["--task", "digits", "--work-dir", str(tmp_path), *arguments]) == 2
    assert message in capsys.readouterr().out.replace("\n", " ")


# ---------------------------------------------------------------------- parts of it


def test_data_are_drawn_anew_for_each_seed_and_never_from_the_test_split(tmp_path: Path) -> None:
    folder = data.prepare(RunConfig(), None, tmp_path)
    drawn = {}
    for seed in (0, 1):
        data.choose(folder, 50, 30, seed)
        drawn[seed] = {name: data.examples(name) for name in ("train", "test")}
    train, test = drawn[0]["train"], drawn[0]["test"]
    assert (len(train.targets), len(test.targets)) == (50, 30)
    assert not np.array_equal(train.inputs, drawn[1]["train"].inputs)
    assert np.array_equal(test.inputs, drawn[1]["test"].inputs)
    everything = {image.tobytes() for image in data.read(folder, "train").inputs}
    assert {image.tobytes() for image in train.inputs} <= everything
    assert len(data.read(folder, "train").targets) + len(data.read(folder, "test").targets) == 1797


def setting_with(**changes: Any) -> Setting:
    run = RunConfig(**{**TASKS["digits"].run, **changes})
    return Setting("digits", run, Path("data"), 2, 120, 100)


def test_only_what_pretraining_depends_on_is_in_a_settings_name() -> None:
    one = setting_with()
    assert one.name.startswith("digits-shared-iid-2x60-seed0-")
    assert one.name == setting_with(candidates=("average",), apply="always").name
    assert one.name == setting_with(adapt_epochs=7).name
    assert one.name_of_whole_run != setting_with(adapt_epochs=7).name_of_whole_run
    for changes in (
        {"seed": 1},
        {"hidden_units": 7},
        {"pretrain": {"epochs": 9}},
        {"initial_weights": "independent"},
    ):
        assert setting_with(**changes).name != one.name
    assert setting_with(fine_tune={"holdout_fraction": 0.2}).name != one.name


@pytest.mark.parametrize(("epochs", "num_rounds"), [(5, 2), (3, 2), (6, 3), (1, 2)])
def test_several_rounds_have_the_epochs_of_one(epochs: int, num_rounds: int) -> None:
    setting = setting_with(pretrain={"epochs": epochs}, fine_tune={"epochs": epochs})
    runs = [setting.run_of(Variant("", {}), number, num_rounds) for number in range(1, num_rounds + 1)]
    assert sum(run.pretrain.epochs for run in runs) == epochs
    assert sum(run.fine_tune.epochs for run in runs) == epochs
    assert max(run.pretrain.epochs for run in runs) - min(run.pretrain.epochs for run in runs) <= 1


def agent(takes: str, own: float, test: float) -> Record:
    """One to whom the published model is a loss of 0.1, on its own held-out data if it does not take it."""
    is_worse = takes != "as it is"
    gate = {"takes": takes, "own_after": own, "test_after": test, "is_worse": False}
    before = {"own_before": 0.8, "test_before": 0.8}
    return {**before, "own_after": 0.7, "test_after": 0.7, "is_worse": is_worse, "gate": gate}


def test_an_agent_that_adapts_or_keeps_its_model_is_not_worse_off() -> None:
    agents = [agent("its own", 0.8, 0.8), agent("adapted", 0.9, 0.85), *[agent("as it is", 0.7, 0.7)] * 2]
    figures = {"a cell": [{"seed": 0, "agents": {"selection": agents}, "seconds": {}}]}
    lines = tables.transfer_in_words(figures).splitlines()
    assert "| a cell | 2 of 4 (50.0%) | 0 of 4 (0.0%) |" in lines
    assert "| a cell | 2 of 4 (50.0%) | 1 of 4 (25.0%) | 1 of 4 (25.0%) |" in lines
    own, test = (line for line in lines if line.startswith("| a cell | 0.8000 |"))
    assert own == "| a cell | 0.8000 | 0.7000 (least gain -0.1000) | 0.7750 (least gain -0.0250) |"
    assert test == "| a cell | 0.8000 | 0.7000 (least gain -0.1000) | 0.7625 (least gain -0.0375) |"


def test_record_of_another_gate_is_not_taken_for_this_one(make: Make, folder: Path) -> None:
    make("claims")

    def missing(**run: Any) -> list[str]:
        (place,) = (folder / "work").glob("digits-independent-iid-2x60-seed0-*")
        changes = {"initial_weights": "independent", "pretrain": {"epochs": 3}, "fine_tune": {"epochs": 2}}
        setting = setting_with(**deep_merge(TASKS["digits"].run, deep_merge(changes, run)))
        return cell.Cell(setting, tables.CLAIMS, place).missing

    assert missing() == []
    assert missing(adapt_epochs=2) == ["selection"]  # the paper's agents do not adapt


def test_what_the_gate_decides_is_measured_and_then_applied(tmp_path: Path) -> None:
    changes = {"partition_by": "classes:5", "adapt_epochs": 20}
    folder = data.prepare(RunConfig(), None, tmp_path)
    setting = setting_with(**changes)._replace(data=folder, num_examples=240)
    with closing(Network(setting, tmp_path / "network", torch.device("cpu"), nothing)) as network:
        contributions = network.contribute(setting.run, 1, None)
        edge = network.edges[0]
        own = edge.disk.model.read_bytes()
        stranger = network.cloud.blobs.get(contributions[1].weights_digest)  # of five other classes

        ungated = replace(edge, run=setting.run.model_copy(update={"apply": "always"}))
        always = ungated.receive(1, stranger, nothing)
        assert (always.weights, always.accuracy) == (stranger, always.report.score_after)
        assert always.comparison.is_worse
        gated = edge.receive(1, stranger, nothing)
        assert (gated.weights, gated.accuracy) == (edge.disk.adapted, gated.report.score_adapted)
        assert gated.report.uses_adapted
        assert not gated.comparison.is_worse

        assert edge.disk.model.read_bytes() == own  # for the next variant
        adapted = gated.weights.read_bytes()
        edge.apply(stranger, gated)
        assert edge.disk.model.read_bytes() == adapted


def test_mean_and_deviation_are_those_of_the_sample() -> None:
    assert tables.spread([0.5, 0.7]) == f"0.6000 ± {np.std([0.5, 0.7], ddof=1):.4f}"
    assert tables.spread([0.5], sign=True) == "+0.5000"
    assert tables.spread([]) == "-"


def test_the_same_figures_give_the_same_plots(make: Make, folder: Path, tmp_path: Path) -> None:
    make("claims")
    for attempt in ("one", "two"):
        (tmp_path / attempt).mkdir()
        plots.save(plots.claims(figures_of(folder, "claims")), tmp_path / attempt, "claims")
    one, two = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two")
    )
    assert one == two
    assert set(one) == {"claims.svg", "claims-barrier.svg"}
