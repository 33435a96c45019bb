"""How far an agent is with what it is doing, as it is told and shown."""

from collections.abc import Callable
from enum import StrEnum
from typing import NamedTuple

# Called with how many examples are done, and with their number.
OnExamples = Callable[[int, int], None]


class Activity(StrEnum):
    """What an agent is doing in a round, where that may take long."""

    # The agent reads its data.
    READING = "reading"
    # The agent trains on its own data.
    PRE_TRAINING = "pre_training"
    # The agent uploads weights or data.
    UPLOADING = "uploading"
    # An upload of the agent waits for its turn.
    QUEUED = "queued"
    # The agent downloads initial weights or a published model.
    DOWNLOADING = "downloading"
    # The agent measures a published model on its held-out data.
    EVALUATING = "evaluating"
    # The agent trains a published model further on its own data.
    ADAPTING = "adapting"


class Unit(StrEnum):
    """What the steps of an activity are counted in."""

    STEPS = "steps"
    BYTES = "bytes"
    EXAMPLES = "examples"


UNITS = {
    Activity.READING: Unit.EXAMPLES,
    Activity.PRE_TRAINING: Unit.STEPS,
    Activity.UPLOADING: Unit.BYTES,
    Activity.QUEUED: Unit.BYTES,
    Activity.DOWNLOADING: Unit.BYTES,
    Activity.EVALUATING: Unit.EXAMPLES,
    Activity.ADAPTING: Unit.STEPS,
}


# What an agent tells of; the server sees the others itself.
TOLD = (Activity.READING, Activity.PRE_TRAINING, Activity.EVALUATING, Activity.ADAPTING)


class AgentProgress(NamedTuple):
    """How far an agent is with one activity."""

    activity: Activity
    # In the unit of the activity.
    done: int = 0
    # None: nobody knows.
    total: int | None = None
    # The mean training loss of the last steps; None where nothing is trained, or it is not finite.
    loss: float | None = None


def ignore_examples(_done: int, _total: int) -> None:
    """Do nothing, where nobody wants to know how far the work is."""
