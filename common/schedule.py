"""The learning-rate schedule over a whole run: which part of it a training of a round follows.

A schedule that begins anew in each round raises the learning rate again each time, and throws away what the
rounds before have settled. With `schedule_over = "run"` the pre-training and the fine-tuning of all rounds
follow one schedule instead, in the order in which they happen:

    round 1: pre-train, fine-tune │ round 2: pre-train, fine-tune │ …
    └────────────────────────── one schedule ──────────────────────────┘

The warm-up of a run that has one (`run.warm_up_epochs`) is round 0, and comes before all of these.

The rounds that were asked for when the run began are the plan of the run, which never changes. A run without
an end plans one round. Each round after the plan follows a small schedule of its own: from EXTRA_PEAK of the
learning rate linearly down to zero over the epochs of the round. So the rate does not jump up again, except
when the shared data have grown by half: then the next round follows the full schedule over its own epochs.
"""

import math
from collections.abc import Iterable
from typing import Literal, NamedTuple

from ecavg.common.config import RunConfig, TrainingConfig

# The learning rate at the beginning of a round after the plan, as a share of the highest one. Re-warming to
# the full rate forgets what was learnt (arXiv 2503.02844, 2403.08763).
EXTRA_PEAK = 0.2
# The full schedule comes back when the shared examples are so many times as many as when it was begun last.
GROWTH = 1.5


class Combined(NamedTuple):
    """The data of a round that published a model."""

    # How many shared examples are in the model.
    num_shared: int
    # True in a round after the plan that followed the full schedule.
    has_full_curve: bool


class Place(NamedTuple):
    """The place of a training in a schedule, both counted in epochs."""

    # The epochs of the schedule before this training.
    begin: int
    # The epochs of the whole schedule.
    total: int
    # True in a round after the plan of the run that begins small.
    is_extra: bool = False


def whole(config: TrainingConfig) -> Place:
    """Return the place of a training that has a schedule of its own."""
    return Place(0, config.epochs)


def is_full_curve_due(run: RunConfig, published: Iterable[Combined]) -> bool:
    """Return whether the next round, if it comes after the plan, follows the full schedule.

    The shared data are the most that any round has combined, so that agents that come and go are no growth.

    Args:
        run: the configuration of the run.
        published: the rounds that published a model, in their order; the first of them began the plan.
    """
    if "run" not in (run.pretrain.schedule_over, run.fine_tune.schedule_over):
        return False
    most, most_at_begin = 0, None
    for each in published:
        most = max(most, each.num_shared)
        if most_at_begin is None or each.has_full_curve:
            most_at_begin = most
    return most_at_begin is not None and 0 < most >= GROWTH * most_at_begin


def place_of(
    run: RunConfig,
    training: Literal["pretrain", "fine_tune"],
    round_number: int,
    planned_rounds: int,
    *,
    has_full_curve: bool = False,
) -> Place:
    """Return the place of a round's pre-training or fine-tuning in its schedule.

    Args:
        run: the configuration of the run.
        training: which of the two trainings of a round.
        round_number: the number of the round, from 1 on; 0 for the warm-up.
        planned_rounds: how many rounds the schedule of the run is for.
        has_full_curve: whether a round after these follows the full schedule, over its own epochs.
    """
    config = run.pretrain if training == "pretrain" else run.fine_tune_of(round_number)
    if config.schedule_over == "round":
        return whole(config)
    epochs = run.pretrain.epochs + run.fine_tune.epochs
    within = 0 if training == "pretrain" else run.pretrain.epochs
    if round_number > planned_rounds:
        return Place(within, epochs, is_extra=not has_full_curve)
    warm_up = run.warm_up_epochs if run.has_warm_up else 0
    begin = warm_up + (round_number - 1) * epochs + within if round_number else 0
    return Place(begin, warm_up + planned_rounds * epochs)


def learning_rate_factor(schedule: str, place: Place, step: int, steps_per_epoch: int) -> float:
    """Return the factor of the learning rate at a step: 1 at most, 0 after the last step of the schedule.

    "cosine" is SGDR's half wave (arXiv 1608.03983, eq. 5); "one-cycle" rises linearly over the first quarter
    and falls linearly from there (arXiv 1708.07120). In a round after the plan, both fall linearly.

    Args:
        schedule: the name of the schedule.
        place: the place of the training in the schedule.
        step: the step of the training, from 0 on.
        steps_per_epoch: the steps of each epoch of this training.
    """
    step, num_steps = place.begin * steps_per_epoch + step, place.total * steps_per_epoch
    if schedule == "constant":
        return 1.0
    if place.is_extra:
        return EXTRA_PEAK * (1 - step / num_steps)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * step / num_steps))
    num_rising = math.ceil(num_steps / 4)
    return min((step + 1) / num_rising, (num_steps - step) / (num_steps - num_rising + 1))
