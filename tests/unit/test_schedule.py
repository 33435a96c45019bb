import pytest

from ecavg.common.config import RunConfig
from ecavg.common.schedule import (
    EXTRA_PEAK,
    Combined,
    Place,
    is_full_curve_due,
    learning_rate_factor,
    place_of,
    whole,
)

STEPS = 7


def run_of(over: str, schedule: str = "one-cycle") -> RunConfig:
    table = {"schedule_over": over, "schedule": schedule}
    return RunConfig.model_validate({"pretrain": table | {"epochs": 4}, "fine_tune": table | {"epochs": 2}})


def factors(schedule: str, place: Place, epochs: int, steps: int = STEPS) -> list[float]:
    return [learning_rate_factor(schedule, place, step, steps) for step in range(epochs * steps)]


def rates_of(run: RunConfig, rounds: range, planned_rounds: int) -> list[float]:
    """Return the factors of all steps of these rounds, in the order in which they happen."""
    rates = []
    for number in rounds:
        for training, epochs in (("pretrain", 4), ("fine_tune", 2)):
            rates += factors(run.pretrain.schedule, place_of(run, training, number, planned_rounds), epochs)
    return rates


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 10, 1001])
def test_schedules_peak_at_one_and_end_at_zero(num_steps: int) -> None:
    for schedule in ("constant", "cosine", "one-cycle"):
        values = factors(schedule, Place(0, 1), 1, num_steps)
        assert max(values) == 1
        assert min(values) > 0
    for schedule in ("cosine", "one-cycle"):
        assert learning_rate_factor(schedule, Place(0, 1), num_steps, num_steps) == pytest.approx(0)


def test_one_cycle_rises_for_a_quarter_then_falls() -> None:
    values = factors("one-cycle", Place(0, 1), 1, 100)
    assert values[:25] == pytest.approx([(step + 1) / 25 for step in range(25)])
    assert values[24:] == pytest.approx([1 - step / 76 for step in range(76)])


@pytest.mark.parametrize("schedule", ["constant", "cosine", "one-cycle"])
def test_all_rounds_of_the_plan_follow_one_schedule(schedule: str) -> None:
    assert rates_of(run_of("run", schedule), range(1, 4), 3) == factors(schedule, Place(0, 18), 18)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "one-cycle"])
def test_warm_up_comes_first_in_the_schedule_of_the_run(schedule: str) -> None:
    run = run_of("run", schedule).model_copy(update={"warm_up_epochs": 3})
    warm_up = factors(schedule, place_of(run, "fine_tune", 0, 2), 3)
    assert warm_up + rates_of(run, range(1, 3), 2) == factors(schedule, Place(0, 15), 15)


def test_warm_up_may_have_a_schedule_of_its_own() -> None:
    run = run_of("round").model_copy(update={"warm_up_epochs": 3})
    assert place_of(run, "fine_tune", 0, 5) == Place(0, 3)


@pytest.mark.parametrize("initial_weights", ["independent", "pretrained", "my.safetensors"])
def test_run_without_shared_weights_has_no_warm_up_in_its_schedule(initial_weights: str) -> None:
    run = run_of("run").model_copy(update={"warm_up_epochs": 3, "initial_weights": initial_weights})
    assert run.first_round == 1
    assert place_of(run, "pretrain", 1, 2) == Place(0, 12)


def test_each_round_has_a_schedule_of_its_own_unless_asked_for() -> None:
    run = run_of("round")
    assert place_of(run, "pretrain", 3, 5) == whole(run.pretrain)
    assert place_of(run, "fine_tune", 3, 5) == whole(run.fine_tune)


def test_one_training_may_follow_the_run_and_the_other_not() -> None:
    table = {"pretrain": {"epochs": 4, "schedule_over": "run"}, "fine_tune": {"epochs": 2}}
    run = RunConfig.model_validate(table)
    assert place_of(run, "pretrain", 2, 2) == Place(6, 12)
    assert place_of(run, "fine_tune", 2, 2) == Place(0, 2)


@pytest.mark.parametrize("schedule", ["cosine", "one-cycle"])
def test_rounds_after_the_plan_begin_small_and_end_at_zero(schedule: str) -> None:
    for number in (3, 4):
        rates = rates_of(run_of("run", schedule), range(number, number + 1), 2)
        assert rates[0] == EXTRA_PEAK
        assert rates == sorted(rates, reverse=True)
        assert 0 < rates[-1] < EXTRA_PEAK / len(rates) * 1.01


def test_constant_rate_stays_constant_after_the_plan() -> None:
    assert set(rates_of(run_of("run", "constant"), range(1, 5), 2)) == {1.0}


@pytest.mark.parametrize("schedule", ["cosine", "one-cycle"])
def test_full_curve_after_the_plan_is_the_schedule_over_the_epochs_of_its_round(schedule: str) -> None:
    run = run_of("run", schedule)
    pretrain = place_of(run, "pretrain", 3, 2, has_full_curve=True)
    fine_tune = place_of(run, "fine_tune", 3, 2, has_full_curve=True)
    rates = factors(schedule, pretrain, 4) + factors(schedule, fine_tune, 2)
    assert rates == factors(schedule, Place(0, 6), 6)


def full_curves(*num_shared: int, over: str = "run") -> list[int]:
    """Play rounds that combine so many shared examples, and return the numbers of those with a full curve.

    One round is planned. The round after these counts as well.
    """
    published: list[Combined] = []
    full = []
    for number, shared in enumerate((*num_shared, 0), 1):
        is_full = number > 1 and is_full_curve_due(run_of(over), published)
        full += [number] if is_full else []
        published.append(Combined(shared, is_full))
    return full


def test_full_curve_comes_back_once_when_the_shared_data_have_grown_by_half() -> None:
    assert full_curves(100, 100, 149, 149) == []
    assert full_curves(100, 100, 150, 150, 150) == [4]
    assert full_curves(100, 120, 140, 160, 180, 200, 269, 270) == [5, 9]


def test_agents_that_come_and_go_are_no_growth() -> None:
    assert full_curves(100, 20, 100, 20, 100, 149) == []
    assert full_curves(100, 150, 20, 150, 20, 150) == [3]


def test_data_that_come_with_the_full_curve_count_for_it() -> None:
    assert full_curves(100, 150, 220, 220, 220) == [3]


def test_first_shared_data_have_a_full_curve() -> None:
    assert full_curves(0, 0, 10, 10) == [4]


def test_full_curve_comes_again_only_where_the_run_has_one_schedule() -> None:
    assert full_curves(100, 1000, over="round") == []
    assert not is_full_curve_due(run_of("run"), [])
