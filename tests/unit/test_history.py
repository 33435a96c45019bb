"""The models that were in use on a device: files, entries, and the way back."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ecavg.common.config import RunConfig
from ecavg.common.errors import UsageError
from ecavg.common.sharded import weight_files
from ecavg.common.transfer import blob_of
from ecavg.common.weights import write_state_dict
from ecavg.edge_agent.history import History, Source, Use, use_of

RUN = RunConfig(hidden_units=4, class_names=tuple("abcdefghij"))


def take(history: History, folder: Path, number: int, source: Source = Source.PUBLISHED) -> Use:
    """Have a model come into use whose bytes are of this round."""
    path = folder / f"round-{number}.safetensors"
    write_state_dict({"w": torch.full((2,), float(number))}, path)
    use = use_of(path, "run", number, source, (None, number / 10))
    history.take(path, RUN, use)
    return use


@pytest.fixture
def history(tmp_path: Path) -> History:
    (tmp_path / "state").mkdir()
    return History(tmp_path / "state", keep_models=3)


def in_use(folder: Path) -> str:
    return blob_of(folder / "state" / "model.safetensors").digest


def test_last_models_keep_their_files_and_all_their_entries(history: History, tmp_path: Path) -> None:
    uses = [take(history, tmp_path, number) for number in (1, 2, 3, 4)]
    assert history.uses() == tuple(uses)
    assert [history.is_kept(use) for use in uses] == [False, True, True, True]
    assert history.run_of(uses[1]) == RUN
    with pytest.raises(UsageError, match="is missing or damaged"):
        history.run_of(uses[0])
    assert in_use(tmp_path) == uses[3].digest == history.latest().digest


def test_step_that_is_taken_again_is_recorded_once(history: History, tmp_path: Path) -> None:
    first = take(history, tmp_path, 1)
    history.mark_told()
    take(history, tmp_path, 1)
    assert history.uses() == (first.model_copy(update={"is_told": True}),)


def test_rolling_back_goes_on_to_ever_older_models(history: History, tmp_path: Path) -> None:
    uses = [take(history, tmp_path, number) for number in (1, 2, 3)]
    for expected in (uses[1], uses[0]):
        restored = history.roll_back()
        assert (restored.round, restored.source) == (expected.round, Source.ROLLED_BACK)
        assert in_use(tmp_path) == expected.digest == history.latest().digest
    assert history.roll_back() is None
    assert history.roll_back(3).digest == uses[2].digest == in_use(tmp_path)


def test_model_of_a_round_is_taken_where_it_is_kept(history: History, tmp_path: Path) -> None:
    uses = [take(history, tmp_path, number) for number in (1, 2, 3, 4)]
    assert history.roll_back(1) is None
    assert history.roll_back(9) is None
    assert in_use(tmp_path) == uses[3].digest
    assert history.roll_back(2).digest == uses[1].digest == in_use(tmp_path)


def test_failure_is_recorded_with_the_model_that_is_given_up(history: History, tmp_path: Path) -> None:
    take(history, tmp_path, 1)
    take(history, tmp_path, 2)
    history.roll_back(failure="it failed")
    assert [(use.round, use.is_told, use.failure) for use in history.uses()] == [
        (1, False, ""),
        (2, True, "it failed"),
        (1, False, ""),
    ]


def test_device_without_a_model_and_damaged_history_say_what_to_do(history: History, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no model is in use"):
        history.latest()
    take(history, tmp_path, 1)
    (tmp_path / "state/models/history.json").write_text("{")
    with pytest.raises(UsageError, match=r"history\.json is damaged; remove it"):
        history.uses()


def test_model_that_is_rolled_back_to_is_written_in_several_files_as_well(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    history = History(tmp_path / "state", keep_models=3, max_file_bytes=1)
    for number in (1, 2):
        take(history, tmp_path, number)
    history.roll_back()
    (file,) = weight_files(tmp_path / "state/model.safetensors.index.json")
    assert load_file(file)["w"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("max_file_bytes", [None, 1000])
def test_several_files_are_removed_where_the_model_in_use_is_one_file(
    max_file_bytes: int | None, tmp_path: Path
) -> None:
    (tmp_path / "state").mkdir()
    take(History(tmp_path / "state", 3, max_file_bytes=1), tmp_path, 1)
    assert len(list((tmp_path / "state").glob("model*safetensors*"))) == 3
    # The configuration, or the model, is another one.
    take(History(tmp_path / "state", 3, max_file_bytes), tmp_path, 2)
    assert [path.name for path in (tmp_path / "state").glob("model*safetensors*")] == ["model.safetensors"]


def test_figures_of_two_tasks_are_not_compared(history: History, tmp_path: Path) -> None:
    take(history, tmp_path, 1)
    (tmp_path / "other").write_bytes(b"other")
    use = use_of(tmp_path / "other", "next run", 1, Source.PUBLISHED, (None, -7.0))
    history.take(tmp_path / "other", RUN, use.model_copy(update={"metric": "R²"}))
    restored = history.roll_back()
    assert (restored.metric, restored.score_before, restored.score) == ("accuracy", None, 0.1)


def test_device_goes_back_to_the_newest_model_that_is_not_withdrawn(history: History, tmp_path: Path) -> None:
    take(history, tmp_path, 1)
    second = take(history, tmp_path, 2, Source.PRE_TRAINED)
    take(history, tmp_path, 3, Source.ADAPTED)
    take(history, tmp_path, 4)
    assert history.go_back("run", [3]) is None
    assert history.go_back("another run", [3, 4]) is None
    restored = history.go_back("run", [3, 4])
    assert restored
    assert (restored.round, restored.source, restored.digest) == (2, Source.ROLLED_BACK, second.digest)
    assert in_use(tmp_path) == second.digest
    assert history.uses()[-2].failure == "the server has withdrawn the model"
    # What this device has trained itself is not the model that the server has withdrawn.
    assert not history.is_withdrawn("run", [2, 3, 4])
    assert history.go_back("run", [2, 3, 4]) is None


def test_model_that_a_later_round_has_published_as_well_is_not_withdrawn(
    history: History, tmp_path: Path
) -> None:
    take(history, tmp_path, 1)
    withdrawn = take(history, tmp_path, 2)
    assert history.go_back("run", [2])
    history.take(history.weights(withdrawn), RUN, withdrawn.model_copy(update={"round": 3}))
    assert not history.is_withdrawn("run", [2])
    assert history.is_withdrawn("run", [2, 3])


def test_withdrawn_model_that_was_rolled_back_to_is_known(history: History, tmp_path: Path) -> None:
    take(history, tmp_path, 1)
    take(history, tmp_path, 2)
    history.roll_back(1)
    assert history.is_withdrawn("run", [1])
    restored = history.go_back("run", [1])
    assert restored
    assert restored.round == 2


def test_device_whose_other_models_are_withdrawn_as_well_keeps_the_one_in_use(
    history: History, tmp_path: Path
) -> None:
    assert not history.is_withdrawn("run", [1])
    take(history, tmp_path, 1)
    take(history, tmp_path, 2)
    assert history.go_back("run", [1, 2]) is None
    assert history.latest().round == 2
