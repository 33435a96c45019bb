"""Budgets: how many bytes agents may send, and leave on the server.

| of | counts | against |
| --- | --- | --- |
| one agent | its files here that no round uses, and the sizes of blobs that it is sending | `agent_bytes` |
| one agent, in a round | the bytes that it has sent, repeated ones included | twice that |
| all agents, in a round | the same of all of them | `round_bytes` |

Bytes sent are counted in memory: a server that is started again counts from zero.
"""

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence

from ecavg.cloud_server.disk.together import Together
from ecavg.common.errors import BudgetError, NotFoundError, Reason

# A message or a file counts for so many bytes at least: either costs more than the bytes in it.
LEAST_BYTES = 4096
# One agent may have so many files that no round uses; a contribution has half of that.
MAX_FILES = 20_000


class _Files:
    """One agent's files that no round uses, with a running sum of their sizes.

    The sum is kept, not made anew, because an agent may have many files and opens many streams.

    Args:
        sizes: bytes by digest.
    """

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self._counted = {digest: max(size, LEAST_BYTES) for digest, size in sizes.items()}
        self._num_bytes = sum(self._counted.values())

    def note(self, digest: str, num_bytes: int | None) -> None:
        """Count a file as `Budgets.note_file` does."""
        self._num_bytes -= self._counted.pop(digest, 0)
        if num_bytes is not None:
            self._counted[digest] = max(num_bytes, LEAST_BYTES)
            self._num_bytes += self._counted[digest]

    def with_declared(self, sizes: Mapping[str, int]) -> tuple[int, int]:
        """Return how many files and bytes there would be if these were here whole."""
        num_files, num_bytes = len(self._counted), self._num_bytes
        for digest, size in sizes.items():
            num_files += digest not in self._counted
            num_bytes += max(size, LEAST_BYTES) - self._counted.get(digest, 0)
        return num_files, num_bytes


class Budgets:
    """The bytes that agents have sent in the open round, and have here; for the event loop's thread only.

    Args:
        agent_bytes: what one agent may have here.
        round_bytes: what all agents together may send in a round.
        unused_sizes: returns the sizes of these agents' files that no round uses, by agent id and digest;
            leaves out agents that are not in the run; reads the disk.
    """

    def __init__(
        self,
        agent_bytes: int,
        round_bytes: int,
        unused_sizes: Callable[[Collection[str]], Mapping[str, Mapping[str, int]]],
    ) -> None:
        self._agent_bytes = agent_bytes
        self._round_bytes = round_bytes
        self._unused_sizes = unused_sizes
        # Many agents begin to send at once, and one look at the disk serves them all.
        self._measuring = Together[str, None](self._measure)
        # The files of those agents whose files have been measured.
        self._files: dict[str, _Files] = {}
        # What has happened to an agent's files while they are being measured.
        self._notes: dict[str, dict[str, int | None]] = {}
        self.begin_round()

    def begin_round(self) -> None:
        """Count what is sent from zero on, and drop the cached sizes: old rounds may have let files go."""
        self._sent: dict[str, int] = {}
        self._sent_by_all = 0
        self.forget_sizes()

    def spend(self, agent_id: str, num_bytes: int) -> None:
        """Count a message of so many bytes.

        Raises:
            BudgetError: AGENT_BUDGET or ROUND_BUDGET; the message counts all the same.
        """
        num_bytes = max(num_bytes, LEAST_BYTES)
        self._sent[agent_id] = self._sent.get(agent_id, 0) + num_bytes
        self._sent_by_all += num_bytes
        self.check_sent(agent_id)

    def check_sent(self, agent_id: str, num_more_bytes: int = 0) -> None:
        """Raise what `spend` raises, unless the agent may send so many bytes more in this round."""
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
        """Drop the cached sizes."""
        self._files.clear()
        self._notes.clear()

    def note_file(self, agent_id: str, digest: str, num_bytes: int | None) -> None:
        """Note how many bytes of a blob are here now; None: the blob has been discarded."""
        if agent_id in self._notes:
            self._notes[agent_id][digest] = num_bytes
        # Files that have not been measured yet are found when they are.
        elif agent_id in self._files:
            self._files[agent_id].note(digest, num_bytes)

    def forget_sizes_of(self, agent_id: str) -> None:
        """Drop the cached sizes of one agent's files."""
        self._files.pop(agent_id, None)
        self._notes.pop(agent_id, None)

    async def check_files(self, agent_id: str, declared: Mapping[str, int]) -> None:
        """Check the files that an agent would have here, and that no round uses, against its budget.

        Args:
            declared: by digest, the sizes that the agent has declared to be sending.

        Raises:
            BudgetError: AGENT_BUDGET.
        """
        num_files, num_bytes = (await self._measured(agent_id)).with_declared(declared)
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

    async def _measured(self, agent_id: str) -> _Files:
        # Again and again: somebody may drop the sizes while they are being measured.
        while agent_id not in self._files:
            await self._measuring.do(agent_id)
        return self._files[agent_id]

    async def _measure(self, agent_ids: Sequence[str]) -> list[Exception | None]:
        """Measure the files of these agents.

        Returns:
            For each agent None, or NotFoundError for one that is not in the run.
        """
        begun: dict[str, dict[str, int | None]] = {agent_id: {} for agent_id in agent_ids}
        self._notes |= begun
        found: Mapping[str, Mapping[str, int]] = {}
        try:
            found = await asyncio.to_thread(self._unused_sizes, begun.keys())
        finally:
            for agent_id, notes in begun.items():
                # The sizes are of use only if nobody has dropped them meanwhile.
                if self._notes.get(agent_id) is notes:
                    del self._notes[agent_id]
                    if agent_id in found:
                        self._keep(agent_id, _Files(found[agent_id]), notes)
        unknown = NotFoundError("the agent has not joined this run: join first", Reason.UNKNOWN_AGENT)
        return [None if agent_id in found else unknown for agent_id in agent_ids]

    def _keep(self, agent_id: str, files: _Files, notes: Mapping[str, int | None]) -> None:
        for digest, num_bytes in notes.items():
            files.note(digest, num_bytes)
        self._files[agent_id] = files
