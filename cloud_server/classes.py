"""The classes that the labels of a run stand for, which the agents of the run must agree on.

The label of an image in an image folder comes from the name of its class folder. Two devices that number
other folders would mean different things by the same label, and nobody would notice. So the names travel when
an agent joins. The names of the configuration stand, or those of the first agent that has all classes.
"""

from collections.abc import Sequence
from typing import NamedTuple

from ecavg.common.config import class_name
from ecavg.common.errors import InvalidError, Reason

# A message quotes so many characters of a list of names.
MAX_LISTED_CHARACTERS = 150


class Classes(NamedTuple):
    """The names of the classes of a run, label 0 first."""

    # Empty as long as nobody has named them.
    names: tuple[str, ...] = ()
    # The id of the agent whose class folders these are; empty where the configuration has them.
    named_by: str = ""

    def agree(self, agent_id: str, names: Sequence[str], num_classes: int) -> "Classes":
        """Return the classes of the run after this agent has joined with these class folders.

        Args:
            agent_id: the id of the agent.
            names: the names of the agent's classes; empty where the agent has no image folder.
            num_classes: the number of classes of the run.

        Raises:
            InvalidError: MALFORMED_REQUEST, a name is no name, or there twice; CLASS_NAMES, the classes are
                not those of the run, or not as many as long as nobody has named them.
        """
        names = _checked(names)
        if set(names) <= set(self.names):
            return self
        if not self.names:
            _check_number(names, num_classes)
            return Classes(names, agent_id)
        strange = [name for name in names if name not in self.names]
        raise InvalidError(
            f"the class folders here are not the run's classes: not {_listed(strange)}; here are"
            f" {_listed(names)}, the run has {_listed(self.names)}: rename the folders, or set class_names in"
            " the server's [run] table",
            Reason.CLASS_NAMES,
        )


def _checked(names: Sequence[str]) -> tuple[str, ...]:
    """Return the names in NFC; raise InvalidError if they are not different names."""
    try:
        checked = tuple(map(class_name, names))
    except ValueError as error:
        raise InvalidError(f"class_names: {error}") from error
    if len(set(checked)) < len(checked):
        raise InvalidError("class_names has the same name twice")
    return checked


def _check_number(names: Sequence[str], num_classes: int) -> None:
    if len(names) != num_classes:
        raise InvalidError(
            f"there are {len(names)} class folders here ({_listed(names)}), and the run has {num_classes}"
            " classes: join after a device that has them all, or set class_names in the server's [run] table",
            Reason.CLASS_NAMES,
        )


def _listed(names: Sequence[str]) -> str:
    text = ", ".join(names)
    return text if len(text) <= MAX_LISTED_CHARACTERS else text[:MAX_LISTED_CHARACTERS] + "…"
