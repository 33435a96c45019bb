"""The state of a run, as the server tells it and agents hear it, and the answer to a contribution."""

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from ecavg.common.errors import Reason
from ecavg.common.transfer import Blob, Encoded


class Phase(StrEnum):
    """How far a round is."""

    # Agents pre-train, upload and contribute.
    COLLECTING = "collecting"
    # The contributed weights are being averaged.
    AGGREGATING = "aggregating"
    # The start that did best is being trained on the combined data.
    FINE_TUNING = "fine_tuning"
    # The result is being measured on held-out data.
    EVALUATING = "evaluating"
    # The round is over, and its global model is there for every agent.
    PUBLISHED = "published"
    # The round is over without a model; `failure` says why.
    FAILED = "failed"


class Outcome(StrEnum):
    """How an agent's contribution to a round ended: exactly one of these."""

    # The contribution is part of the round.
    ACCEPTED = "accepted"
    # The contribution was refused; a better one may follow while the round collects.
    REJECTED = "rejected"
    # The round had closed; the next one is open to this agent.
    LATE = "late"


class Selection(StrEnum):
    """Whether an agent is in the sample of agents that take part in a round."""

    # The sample is not drawn yet.
    PENDING = "pending"
    # The agent takes part.
    DRAWN = "drawn"
    # The agent waits for the model, or until it is drawn in the place of another.
    NOT_DRAWN = "not_drawn"


class Wait(StrEnum):
    """What an agent waits for: with all but the last it is not ready to take part in a round."""

    # The hours of the day in which it works.
    HOURS = "hours"
    # Its user's program, which says that it is not the time.
    COMMAND = "command"
    # The time at which it pre-trains.
    TIME = "time"
    # More new examples.
    EXAMPLES = "examples"
    # The hours of the day in which it uploads.
    UPLOAD_HOURS = "upload_hours"


class Availability(NamedTuple):
    """What an agent says of itself when it opens a Watch."""

    # True if the agent may be drawn for a round.
    is_ready: bool = True
    # What it waits for; None: for nothing, or that is not said. It may be ready all the same.
    waits_for: Wait | None = None
    # How many examples it has that it has not contributed with.
    num_new_examples: int = 0


# An agent that says nothing of itself.
AVAILABLE = Availability()


class WorkProgress(NamedTuple):
    """How far the cloud's work in the present phase is."""

    done: int
    total: int
    # The mean training loss since the last report; None where nothing is trained, or it is not finite.
    loss: float | None = None


class PublishedModel(NamedTuple):
    """A global model that agents may download."""

    round: int
    weights: Blob
    # The same weights in fewer bytes; None: they travel as they are.
    encoded: Encoded | None
    # The cloud's values for the parts of the model that do not travel with the weights; None: all parts do.
    rest: Blob | None = None


class LeftOut(NamedTuple):
    """An accepted contribution that is no part of its round's model."""

    round: int
    reason: Reason
    message: str


@dataclass(frozen=True)
class RunState:
    """The whole state of the run at one moment, as one agent may see it."""

    round: int
    phase: Phase
    initial_weights: Blob
    # The initial weights in fewer bytes; None: they travel as they are.
    initial_encoded: Encoded | None
    # How this agent's contribution to this round ended; None: nothing has come from it yet.
    outcome: Outcome | None
    # The digest of the weights in this agent's accepted contribution to this round; "": there is none.
    accepted_weights: str
    progress: WorkProgress | None
    # The newest model that is for this agent, or the one that is pinned.
    latest_model: PublishedModel | None
    # The number of this round or the one before, if it failed; else 0.
    failed_round: int
    # Why `failed_round` failed.
    failure: str
    run_over: bool
    num_contributions: int
    max_contributions: int
    # The last round whose model contains a contribution of this agent; 0: there is none.
    counted_round: int
    # This agent's accepted contribution to this round or the one before, if the model contains nothing of it.
    left_out: LeftOut | None
    # True if the learning rate takes a full curve in this round after the plan: see common/schedule.py.
    has_full_curve: bool = False
    # The rest that belongs to the initial weights, as in PublishedModel.
    initial_rest: Blob | None = None
    # Whether this agent is in the sample of this round; None: there is no sample, every agent takes part.
    selection: Selection | None = None
    # True once the last round is over, and agents are waited for that still have to take its model.
    last_round_over: bool = False
    # When the next round opens, in seconds since the epoch; None: at once, or nobody can say.
    next_round_at: float | None = None
    # The next round opens when the connected agents have so many new examples; None: it waits for none.
    num_examples_to_open: int | None = None
    # True if `latest_model` is to be used in the place of any other, a newer one included.
    is_pinned: bool = False
    # The rounds whose models are not to be used any more.
    withdrawn_rounds: tuple[int, ...] = ()

    @property
    def takes_part(self) -> bool:
        """Return True if this agent may contribute to this round."""
        return self.selection in (None, Selection.DRAWN)

    @property
    def is_warm_up(self) -> bool:
        """Return True in round 0, for which the cloud needs data and no weights."""
        return self.round == 0

    @property
    def latest_round(self) -> int:
        """Return the round of the model that is for this agent; 0: there is none."""
        return self.latest_model.round if self.latest_model else 0


class Verdict(NamedTuple):
    """How the server answers a contribution."""

    outcome: Outcome
    reason: Reason | None = None
    message: str = ""
