"""How many bytes agents may send, and leave here.

| of | counts | against |
| --- | --- | --- |
| one agent | what it has here that no round uses, and what it has declared to be sending | `agent_bytes` |
| one agent, in a round | what it has sent, and sent again | twice that |
| all agents, in a round | the same of all of them | `round_bytes` |

What was sent is counted in memory: a server that is started again begins anew.
"""

import asyncio
from collections.abc import Callable, Mapping

from common.errors import BudgetError, Reason

LEAST_BYTES = 4096  # that a message or file counts for: either costs more than the bytes in it
MAX_FILES = 20_000  # of one agent that no round uses; a contribution has half of that


class _Files:
    """What an agent has here that no round uses, and its sum: it may have many, and opens many streams.

    Args:
        sizes: bytes by digest.
    """

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self._counted = {digest: max(size, LEAST_BYTES) for digest, size in sizes.items()}
        self._num_bytes = sum(self._counted.values())

    def note(self, digest: str, num_bytes: int | None) -> None:
        """As `Budgets.note_file`."""
        self._num_bytes -= self._counted.pop(digest, 0)
        if num_bytes is not None:
            self._counted[digest] = max(num_bytes, LEAST_BYTES)
            self._num_bytes += self._counted[digest]

    def with_declared(self, sizes: Mapping[str, int]) -> tuple[int, int]:
        """How many files and bytes it would be, were these here whole."""
        num_files, num_bytes = len(self._counted), self._num_bytes
        for digest, size in sizes.items():
            num_files += digest not in self._counted
            num_bytes += max(size, LEAST_BYTES) - self._counted.get(digest, 0)
        return num_files, num_bytes


class Budgets:
    """What agents have sent in the round that is open, and have here; in the event loop's thread only.

    Args:
        unused_sizes: bytes by digest of what an agent has here and no round uses; blocks on the disk.
    """

    def __init__(
        self, agent_bytes: int, round_bytes: int, unused_sizes: Callable[[str], Mapping[str, int]]
    ) -> None:
        self._agent_bytes = agent_bytes
        self._round_bytes = round_bytes
        self._unused_sizes = unused_sizes
        self._looking = asyncio.Lock()
        self._files: dict[str, _Files] = {}  # of agents whose files have been looked at
        self._notes: dict[str, dict[str, int | None]] = {}  # of one whose files are being looked at
        self.begin_round()

    def begin_round(self) -> None:
        """Nobody has sent anything; and what an old round used, it may use no more."""
        self._sent: dict[str, int] = {}
        self._sent_by_all = 0
        self.forget_sizes()

    def spend(self, agent_id: str, num_bytes: int) -> None:
        """Count a message.

        Raises:
            BudgetError: AGENT_BUDGET, ROUND_BUDGET; it counts all the same.
        """
        num_bytes = max(num_bytes, LEAST_BYTES)
        self._sent[agent_id] = self._sent.get(agent_id, 0) + num_bytes
        self._sent_by_all += num_bytes
        self.check_sent(agent_id)

    def check_sent(self, agent_id: str, num_more_bytes: int = 0) -> None:
        """Whether the agent may send so many bytes more in this round; raises what `spend` raises."""
        if self._sent.get(agent_id, 0) + num_more_bytes > 2 * self._agent_bytes:
            raise BudgetError(
                f"agent {agent_id} may send {2 * self._agent_bytes} bytes in a round, and this is more: go on"
                " in the next one, or ask the server's operator to raise max_agent_bytes"
            )
        if self._sent_by_all + num_more_bytes > self._round_bytes:
            raise BudgetError(
                f"all agents together may send {self._round_bytes} bytes in a round, and this is more: go on"
                " in the next one, or ask the server's operator to raise max_round_bytes",
                Reason.ROUND_BUDGET,
            )

    def forget_sizes(self) -> None:
        """Files have been removed."""
        self._files.clear()
        self._notes.clear()

    def note_file(self, agent_id: str, digest: str, num_bytes: int | None) -> None:
        """So much of a blob is here now; None: it has been discarded."""
        if agent_id in self._notes:
            self._notes[agent_id][digest] = num_bytes
        elif agent_id in self._files:  # else it is found when they are looked at
            self._files[agent_id].note(digest, num_bytes)

    def forget_sizes_of(self, agent_id: str) -> None:
        """Some of what the agent has here is in use now, or gone."""
        self._files.pop(agent_id, None)
        self._notes.pop(agent_id, None)

    async def check_files(self, agent_id: str, declared: Mapping[str, int]) -> None:
        """Hold what an agent would have here that no round uses against its budget.

        Args:
            declared: bytes by digest of what it is sending, all that it has declared.

        Raises:
            BudgetError: AGENT_BUDGET.
        """
        num_files, num_bytes = (await self._looked_at(agent_id)).with_declared(declared)
        if num_files > MAX_FILES:
            raise BudgetError(
                f"{num_files} files of agent {agent_id} would wait here to be contributed, {MAX_FILES} may:"
                " put the data into fewer shards"
            )
        if num_bytes > self._agent_bytes:
            raise BudgetError(
                f"{num_bytes} bytes of agent {agent_id} would wait here to be contributed,"
                f" {self._agent_bytes} may: send less, or ask the server's operator to raise max_agent_bytes"
            )

    async def _looked_at(self, agent_id: str) -> _Files:
        async with self._looking:
            while agent_id not in self._files:
                notes = self._notes[agent_id] = {}
                try:
                    found = await asyncio.to_thread(lambda: _Files(self._unused_sizes(agent_id)))
                    is_current = self._notes.get(agent_id) is notes  # nobody asked to look again
                finally:
                    self._notes.pop(agent_id, None)
                if is_current:
                    self._files[agent_id] = found
                    for digest, num_bytes in notes.items():
                        found.note(digest, num_bytes)
            return self._files[agent_id]
