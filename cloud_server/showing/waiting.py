"""Who holds up the round, and why, in one sentence for people."""

import math
from collections.abc import Collection, Container, Sequence
from datetime import UTC, datetime
from typing import NamedTuple

from ecavg.cloud_server.round import Round
from ecavg.cloud_server.showing.progress import Shown
from ecavg.common.agent_progress import Activity
from ecavg.common.pace import duration
from ecavg.common.run_state import Phase, Wait

# So many agents are named.
NUM_NAMED = 3

_DOES = {
    Activity.READING: "reads its data",
    Activity.PRE_TRAINING: "trains",
    Activity.UPLOADING: "uploads",
    Activity.QUEUED: "waits to upload",
    Activity.DOWNLOADING: "downloads",
    Activity.EVALUATING: "measures a model",
    Activity.ADAPTING: "adapts a model",
}


_WAITS = {
    Wait.HOURS: "is outside of its hours",
    Wait.COMMAND: "is not ready to take part, as its ready_command says",
    Wait.TIME: "waits for the time at which it pre-trains",
    Wait.EXAMPLES: "waits for new examples",
    Wait.UPLOAD_HOURS: "waits for the hours in which it uploads",
}


class Pending(NamedTuple):
    """An agent that may contribute to the round, and has not."""

    agent_id: str
    # Since when it is away, in seconds since the epoch; None: it is here.
    away_since: float | None
    is_ready: bool
    # None: nobody knows what it is doing.
    shown: Shown | None
    # What it waits for; None: for nothing, or it has not said.
    waits_for: Wait | None = None

    @property
    def seconds_left(self) -> float:
        """Return how long it will take with what it is doing; infinity if nobody knows."""
        known = self.shown and self.shown.seconds_left
        return math.inf if known is None else known


def tried_sentence(number: int, canary: Collection[str], reported: Container[str]) -> str:
    """Return whose reports on the model of round `number` are waited for.

    Args:
        canary: the agents that have the model before all others.
        reported: those that have reported on it, and maybe others.
    """
    missing = sorted(agent_id for agent_id in canary if agent_id not in reported)
    names = ", ".join(missing[:NUM_NAMED])
    more = f" and {len(missing) - NUM_NAMED} more" if len(missing) > NUM_NAMED else ""
    count = f"{len(canary) - len(missing)} of {len(canary)} agents of the canary have reported"
    return f"The model of round {number} is tried out: {count}" + (
        f"; waiting for {names}{more}." if missing else "."
    )


def sentence(current: Round, pending: Sequence[Pending], now: float) -> str | None:
    """Return for whom and what the round waits; None: it waits for no agent.

    Args:
        pending: those who may contribute, and have not.
        now: seconds since the epoch.
    """
    if current.phase is not Phase.COLLECTING:
        return None
    if current.policy.sampling and not current.drawn:
        return _before_the_draw(pending, current.policy.sampling.min_connected)
    num_wanted = current.policy.max_agents - len(current.contributions)
    if num_wanted <= 0:
        return None
    waited_for = _waited_for(pending, num_wanted, now)
    parts = [_does(agent, now) for agent in waited_for[:NUM_NAMED]]
    if len(waited_for) > NUM_NAMED:
        parts.append(f"and {len(waited_for) - NUM_NAMED} more")
    if num_absent := num_wanted - len(waited_for):
        parts.append(f"{num_absent} {'has' if num_absent == 1 else 'have'} not joined")
    head = f"Waiting for {num_wanted} of {current.policy.max_agents}: {'; '.join(parts)}."
    return " ".join(filter(None, [head, _closing(current, now)]))


def _waited_for(pending: Sequence[Pending], num_wanted: int, now: float) -> list[Pending]:
    """Return the agents whose contributions would be the next ones, whoever takes longest first.

    The round waits for an agent that is away only where those that are here are too few.
    """

    def time_of(agent: Pending) -> tuple[bool, float, str]:
        is_away = agent.away_since is not None
        seconds = now - (agent.away_since or 0.0) if is_away else agent.seconds_left
        return is_away, seconds, agent.agent_id

    return sorted(pending, key=time_of)[:num_wanted][::-1]


def _does(agent: Pending, now: float) -> str:
    if agent.away_since is not None:
        return f"{agent.agent_id} has been away for {duration(max(0.0, now - agent.away_since))}"
    if agent.shown is None:
        silent = "has not contributed" if agent.is_ready else "is not ready to take part"
        state = _WAITS[agent.waits_for] if agent.waits_for else silent
        return f"{agent.agent_id} {state}"
    does = f"{agent.agent_id} {_DOES[agent.shown.progress.activity]}"
    if agent.shown.seconds_left is not None:
        return f"{does}, {duration(agent.shown.seconds_left)} left"
    done, total = agent.shown.progress.done, agent.shown.progress.total
    return f"{does}, {math.floor(100 * done / total)} % done" if total else does


def _before_the_draw(pending: Sequence[Pending], num_needed: int) -> str:
    num_ready = sum(agent.away_since is None and agent.is_ready for agent in pending)
    return f"Waiting to draw the agents of the round: {num_ready} of {num_needed} are connected and ready."


def _closing(current: Round, now: float) -> str:
    """Return when the round closes by time, and with how many contributions."""
    at, policy, num_there = current.deadline_at, current.policy, len(current.contributions)
    if at is None:
        return ""
    if at <= now:
        return f"The round closes as soon as {policy.min_agents} have contributed."
    if num_there >= policy.min_agents:
        return f"The round closes {_at(at, now)} with {num_there}."
    if policy.on_too_few == "fail":
        return f"The round fails {_at(at, now)} if fewer than {policy.min_agents} have contributed."
    return f"The round closes {_at(at, now)} if {policy.min_agents} have contributed, else it waits."


def _at(at: float, now: float) -> str:
    """Return a time to come, with its day if it is not within a day."""
    time = datetime.fromtimestamp(at, UTC)
    return f"at {time:%H:%M} UTC" if at - now < 86_400 else f"on {time:%Y-%m-%d} at {time:%H:%M} UTC"
