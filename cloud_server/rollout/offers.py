"""Which round's model each agent is offered, from what is on record.

A published round is for all agents, unless the table `rollouts` says that its model is for a canary alone, or
withdrawn. A row in `pins` offers all agents the model of one round, whatever is published later.
"""

from collections import defaultdict
from dataclasses import dataclass

from ecavg.cloud_server.disk.tables import RolloutRow
from ecavg.cloud_server.store import Store

# Agents are told of so many withdrawn rounds at most, the newest ones.
MAX_WITHDRAWN = 1000

_IS_FOR_ALL = (
    "published IS NOT NULL AND number NOT IN"
    " (SELECT round FROM rollouts WHERE state IN ('canary', 'withdrawn'))"
)


@dataclass(frozen=True)
class Offers:
    """The rounds whose models are offered; 0 stands for none."""

    # The newest round whose model is for all agents.
    released: int = 0
    # The round whose model only the agents of the canary are offered, until it is decided.
    canary: int = 0
    canary_agents: frozenset[str] = frozenset()
    # The round whose model all agents are offered in the place of `released`.
    pinned: int = 0
    # The rounds whose models are not to be used any more, sorted.
    withdrawn: tuple[int, ...] = ()

    @property
    def for_all(self) -> int:
        """Return the round whose model agents outside the canary are offered."""
        return self.pinned or self.released

    def for_agent(self, agent_id: str | None) -> int:
        """Return the round whose model this agent is offered."""
        return self.canary if agent_id in self.canary_agents else self.for_all

    @property
    def rounds(self) -> set[int]:
        """Return the rounds whose models some agent is offered."""
        return {self.for_all, self.canary} - {0}


def read(store: Store) -> Offers:
    """Return what agents are offered now."""
    pins = store.read("SELECT round FROM pins")
    canary = store.read("SELECT round FROM rollouts WHERE state = 'canary'")
    agents = store.read("SELECT agent_id FROM canaries JOIN rollouts USING (round) WHERE state = 'canary'")
    withdrawn = store.read(
        "SELECT round FROM rollouts WHERE state = 'withdrawn' ORDER BY round DESC LIMIT ?", MAX_WITHDRAWN
    )
    # Agents do not use the model of round 0: it is only where round 1 starts from.
    newest = store.read(f"SELECT max(number) AS number FROM rounds WHERE number AND {_IS_FOR_ALL}")  # noqa: S608
    return Offers(
        released=newest[0]["number"] or 0,
        canary=canary[0]["round"] if canary else 0,
        canary_agents=frozenset(row["agent_id"] for row in agents),
        pinned=pins[0]["round"] if pins else 0,
        withdrawn=tuple(row["round"] for row in reversed(withdrawn)),
    )


def next_start(store: Store) -> str:
    """Return the digest of the weights that the next round starts from.

    These are the newest model that is for all agents, the warm-up's included, or else the weights that the
    run has begun with.
    """
    rows = store.read(
        f"SELECT published AS digest FROM rounds WHERE {_IS_FOR_ALL} ORDER BY number DESC LIMIT 1"  # noqa: S608
    ) or store.read("SELECT initial_weights AS digest FROM rounds ORDER BY number LIMIT 1")
    return str(rows[0]["digest"])


def withdrawn_round(store: Store, digest: str) -> int:
    """Return the withdrawn round whose model has this digest; 0: none has, or another round stands for it."""
    is_fine = store.read(
        "SELECT 1 FROM rounds WHERE published = ?1 AND number NOT IN"
        " (SELECT round FROM rollouts WHERE state = 'withdrawn')"
        " UNION SELECT 1 FROM rounds WHERE initial_weights = ?1"
        " AND number = (SELECT min(number) FROM rounds)",
        digest,
    )
    rows = store.read(
        "SELECT max(round) AS round FROM rollouts JOIN rounds ON round = number"
        " WHERE state = 'withdrawn' AND published = ?",
        digest,
    )
    return 0 if is_fine else rows[0]["round"] or 0


def rollouts(store: Store, first: int = 0) -> dict[int, RolloutRow]:
    """Return the roll-outs on record from a round on, by round."""
    canaries = defaultdict(list)
    for row in store.read("SELECT * FROM canaries WHERE round >= ? ORDER BY agent_id", first):
        canaries[row["round"]].append(row["agent_id"])
    rows = store.read("SELECT * FROM rollouts WHERE round >= ? ORDER BY round", first)
    return {row["round"]: RolloutRow(**row, canary=tuple(canaries[row["round"]])) for row in rows}


def rollout_of(store: Store, number: int) -> RolloutRow | None:
    """Return the roll-out of a round; None: its model is for all agents, if it has one."""
    return rollouts(store, first=number).get(number)
