"""The rooms of the server, and the rooms that each may import.

`python -m tests.rooms` prints the drawing of ARCHITECTURE.md.

A room is a module or a folder of cloud_server/. The rooms are listed in the order of the arrows: each room
imports only rooms below it.
"""

from typing import NamedTuple

BEGIN, END = "<!-- rooms:begin -->", "<!-- rooms:end -->"


class Room(NamedTuple):
    """One room, with its purpose and the rooms that it may import."""

    name: str
    purpose: str
    leans_on: tuple[str, ...]


ROOMS = (
    Room(
        "__main__",
        "the composition root: the only place that builds the parts",
        (
            "commands",
            "server",
            "coordinator",
            "desk",
            "upkeep",
            "ledger",
            "intake",
            "run",
            "training",
            "tracking",
            "showing",
            "records",
            "door",
            "metrics",
            "rollout",
            "round",
            "store",
            "disk",
            "config",
        ),
    ),
    Room(
        "commands",
        "check, doctor, status, token, agents, forget, models: what an operator runs",
        ("upkeep", "door", "rollout", "store", "jobs", "round", "disk", "config", "state_dir"),
    ),
    Room(
        "server",
        "the gRPC server: port, health checking, reflection",
        ("servicer", "desk", "door", "metrics"),
    ),
    Room("servicer", "protobuf ↔ domain; decides nothing", ("desk", "door", "contribution", "disk")),
    Room(
        "coordinator",
        "the order of a round, and only that",
        (
            "upkeep",
            "ledger",
            "intake",
            "run",
            "training",
            "tracking",
            "showing",
            "records",
            "metrics",
            "round",
            "store",
            "jobs",
            "disk",
            "config",
        ),
    ),
    Room(
        "desk",
        "what agents ask for: join, watch, upload, contribute, download, report",
        ("ledger", "intake", "run", "showing", "metrics", "store", "contribution", "disk"),
    ),
    Room(
        "upkeep",
        "clean-ups, provenance, forgetting an agent, deciding on canaries",
        (
            "ledger",
            "intake",
            "training",
            "showing",
            "metrics",
            "rollout",
            "round",
            "store",
            "jobs",
            "disk",
            "config",
            "state_dir",
        ),
    ),
    Room(
        "ledger",
        "the open round and the agents: one lock, record first, then memory",
        (
            "run",
            "showing",
            "records",
            "metrics",
            "rollout",
            "round",
            "store",
            "classes",
            "contribution",
            "disk",
        ),
    ),
    Room(
        "intake",
        "what is sent: uploads, the gates that a blob must pass, budgets",
        ("store", "contribution", "disk"),
    ),
    Room(
        "run",
        "the run: found in the state directory, or begun",
        ("training", "records", "store", "jobs", "disk", "config"),
    ),
    Room(
        "training",
        "a job, again where that may help; the trainer process kept alive",
        ("jobs", "disk", "state_dir"),
    ),
    Room(
        "trainer",
        "torch: aggregation, alignment, selection, fine-tune, audit",
        ("jobs", "contribution", "state_dir"),
    ),
    Room(
        "tracking",
        "what TensorBoard and MLflow are told, from the records",
        ("round", "store", "jobs", "disk", "config", "state_dir"),
    ),
    Room(
        "showing",
        "what is seen of the run: state for agents, page, terminal; the reports",
        ("records", "metrics", "rollout", "round", "store", "jobs", "contribution", "disk"),
    ),
    Room(
        "records",
        "round and run as records and as jobs",
        ("round", "store", "jobs", "classes", "contribution", "disk"),
    ),
    Room("door", "who may come in: admission, authority, limits, connections", ("disk",)),
    Room("metrics", "what the server counts", ("round", "jobs")),
    Room("rollout", "which round's model is for which agent", ("store", "disk")),
    Room("round", "the state machine of a round, a value", ("contribution",)),
    Room("store", "the records, in SQLite", ("contribution", "disk")),
    Room(
        "jobs",
        "the job directory: all that server and trainer say to each other",
        ("contribution", "state_dir"),
    ),
    Room("classes", "what the labels of a run stand for", ()),
    Room("contribution", "one agent's part in a round", ()),
    Room("disk", "the ground floor: database, tables, blobs, full disks", ("state_dir",)),
    Room("config", "the server's configuration keys", ("state_dir",)),
    Room("state_dir", "the paths of a state directory", ()),
)


def drawing() -> str:
    """Return the rooms and their arrows as the text block of ARCHITECTURE.md."""
    width = max(len(room.name) for room in ROOMS) + 2
    lines = []
    for room in ROOMS:
        arrows = "everything below" if room.name == "__main__" else " ".join(room.leans_on)
        lines += [f"{room.name:<{width}}{room.purpose}", *([f"{'':<{width}}→ {arrows}"] if arrows else [])]
    return "\n".join(["```", *lines, "```"])


if __name__ == "__main__":
    print(drawing())
