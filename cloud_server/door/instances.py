"""The processes that show one agent's identity, and how two that live at the same time are told apart.

A state directory that is copied, as with a cloned card, gives two devices one identity. Each process of an
agent chooses an instance id at its start and shows it with its `Watch`. An agent that was started again has
another instance id, and its old `Watch` may still be open. So a newer instance at first takes the place of
the older one, whose `Watch` is ended. A process that is gone does not come back. If both come back after they
have been replaced, both are alive, and the one that was seen later is refused.
"""

# So many instances of one agent are remembered.
MAX_SEEN = 8


class Instances:
    """The instances of one agent."""

    def __init__(self) -> None:
        # In the order in which they were first seen.
        self._seen: list[str] = []
        self._current = ""
        # Those that came back after they had been replaced, and are still here.
        self._returned: set[str] = set()
        self._refused: set[str] = set()

    def enter(self, instance_id: str) -> bool:
        """Note that an instance opens a Watch; the Watches of all others are to be ended.

        Returns:
            True if the instance may stay; False if it is a second device.
        """
        if instance_id in self._refused:
            return False
        if instance_id not in self._seen:
            self._seen = [*self._seen, instance_id][-MAX_SEEN:]
        elif instance_id != self._current:
            self._returned.add(instance_id)
        if len(self._returned) > 1:
            self._refuse(max(self._returned, key=self._seen.index))
        if instance_id in self._refused:
            return False
        self._current = instance_id
        return True

    def leave(self, instance_id: str) -> None:
        """Note that the instance has no Watch open any more."""
        self._returned.discard(instance_id)

    def is_refused(self, instance_id: str) -> bool:
        """Return True if the instance is a second device."""
        return instance_id in self._refused

    def _refuse(self, instance_id: str) -> None:
        self._returned.clear()
        self._seen.remove(instance_id)
        self._refused = {*list(self._refused)[-MAX_SEEN:], instance_id}
