"""The models that agents are offered, and what agents have reported of them."""

from collections.abc import Mapping, Set

from ecavg.cloud_server.rollout import offers
from ecavg.cloud_server.rollout.offers import Offers
from ecavg.cloud_server.store import Store
from ecavg.common.run_state import PublishedModel
from ecavg.common.transfer import Blob, Encoded


class Offered:
    """The offers as they are on record, with what agents need to take the models."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.offers = Offers()
        # The models that some agents are offered, by round.
        self._models: dict[int, PublishedModel] = {}
        # The agents that have reported on the model that all are offered, or on a newer one.
        self._reported: set[str] = set()
        # The agents that have reported to use a model that was withdrawn since.
        self._to_go_back: set[str] = set()
        # The round of the published model that each agent has reported to use.
        self._rounds_in_use = store.rounds_in_use()
        self.take(offers.read(store))

    @property
    def rounds_in_use(self) -> Mapping[str, int]:
        """Return the round of the published model that each agent has reported to use, by agent id."""
        return self._rounds_in_use

    def model_for(self, agent_id: str | None) -> PublishedModel | None:
        """Return the model that an agent is offered; None: there is none yet."""
        return self._models.get(self.offers.for_agent(agent_id))

    def take(self, changed: Offers) -> None:
        """Go on with these offers, which are on record."""
        before, self.offers = self.offers, changed
        self._models = {number: self._models.get(number) or self._model(number) for number in changed.rounds}
        if (changed.for_all, changed.pinned) != (before.for_all, before.pinned):
            numbers = filter(self._answers, {changed.for_all, *changed.withdrawn})
            self._reported = {row.agent_id for number in numbers for row in self._store.reports(number)}
        for number in set(changed.withdrawn) - set(before.withdrawn):
            self._to_go_back |= {agent for agent, used in self._rounds_in_use.items() if used == number}

    def note_report(self, agent_id: str, number: int, *, is_applied: bool) -> None:
        """Note that an agent has reported on the model of a round, and whether the agent uses it."""
        if self._answers(number):
            self._reported.add(agent_id)
        if is_applied:
            # One that has kept no other model goes back by taking the next.
            self._to_go_back.discard(agent_id)
        if number in self.offers.withdrawn:
            (self._to_go_back.add if is_applied else self._to_go_back.discard)(agent_id)
        if is_applied:
            self._rounds_in_use[agent_id] = number
        elif self._rounds_in_use.get(agent_id) == number:
            del self._rounds_in_use[agent_id]
            self._rounds_in_use |= self._store.rounds_in_use(agent_id)

    def forget(self, agent_id: str) -> None:
        """Drop what an agent has reported."""
        self._reported.discard(agent_id)
        self._to_go_back.discard(agent_id)
        self._rounds_in_use.pop(agent_id, None)

    def still_awaited(self, agent_ids: Set[str]) -> Set[str]:
        """Return those of the agents that are still to report on the model that all are offered.

        An agent that uses a withdrawn model is among them until it has reported that it has gone back.
        """
        to_report = agent_ids - self._reported if self.offers.for_all else set()
        return to_report | agent_ids & self._to_go_back

    def _answers(self, number: int) -> bool:
        """Return True if an agent that reports on this round's model has no other report to give.

        An agent that has seen a newer model, withdrawn since, does not take an older one but where that is
        pinned.
        """
        is_newer = not self.offers.pinned and number > self.offers.for_all
        return is_newer or number == self.offers.for_all

    def _model(self, number: int) -> PublishedModel:
        row = self._store.round(number)
        assert row
        assert row.published_digest
        digest = row.published_digest
        return PublishedModel(
            number, blob(self._store, digest), encoded(self._store, digest), rest(self._store, digest)
        )


def blob(store: Store, digest: str) -> Blob:
    """Return a blob by its digest, with its size; 0 bytes: it is not here."""
    return Blob(digest, store.blobs.size(digest) or 0)


def encoded(store: Store, digest: str) -> Encoded | None:
    """Return what weights also travel as; None: they travel as they are."""
    encoding = store.encoding(digest)
    if encoding is None or store.blobs.size(encoding.digest) is None:
        return None
    return Encoded(blob(store, encoding.digest), encoding.base)


def rest(store: Store, digest: str) -> Blob | None:
    """Return the rest that belongs to weights; None: the weights are a whole model."""
    found = store.rest(digest)
    return blob(store, found) if found else None
