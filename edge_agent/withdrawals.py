"""The withdrawal of a model that this device may use: the way back, and the word to the server."""

from collections.abc import Collection

from ecavg.common.faults import Point, crash_point
from ecavg.common.progress import ProgressDisplay
from ecavg.common.run_state import RunState
from ecavg.edge_agent.client import CloudClient
from ecavg.edge_agent.state import AgentState, Report
from ecavg.edge_agent.updating import Updates
from ecavg.edge_agent.worker import Worker

# So many reports are kept of models that came into use, in case that one is withdrawn.
MAX_REPORTS = 10


class Withdrawals:
    """What an agent does where the server has withdrawn models; each step may be taken again."""

    def __init__(
        self,
        client: CloudClient,
        disk: AgentState,
        worker: Worker,
        updates: Updates,
        display: ProgressDisplay,
    ) -> None:
        self._client = client
        self._disk = disk
        self._worker = worker
        self._updates = updates
        self._display = display

    def has_news(self, state: RunState) -> bool:
        """Return True if a model is withdrawn that this agent has not given up yet."""
        return not set(state.withdrawn_rounds) <= set(self._disk.progress.avoided_rounds)

    def are_urgent(self, state: RunState) -> bool:
        """Return True if the model in use is withdrawn, and this agent has not followed that yet.

        Nothing waits here for the worker, which may be in the middle of a long training.
        """
        run_id, history = self._disk.progress.run_id, self._updates.history
        return self.has_news(state) and history.is_withdrawn(run_id, state.withdrawn_rounds)

    async def concern_model_in_use(self, state: RunState) -> bool:
        """Return True if the model in use is withdrawn."""
        run_id, history = self._disk.progress.run_id, self._updates.history
        return await self._worker.run(history.is_withdrawn, run_id, state.withdrawn_rounds)

    async def follow(self, state: RunState) -> None:
        """Use an older model again if the one in use is withdrawn, and tell the server of it.

        Where no other model is kept, the next one is taken in any case, be it an older one.
        """
        withdrawn, progress = state.withdrawn_rounds, self._disk.progress
        restored = await self._worker.run(self._updates.history.go_back, progress.run_id, withdrawn)
        if restored:
            self._display.message(f"the model is withdrawn; that of round {restored.round} is in use again")
            crash_point(Point.AGENT_WENT_BACK)
        await self._updates.tell()
        changes: dict[str, object] = {"avoided_rounds": withdrawn}
        if await self.concern_model_in_use(state):
            self._display.message("the model is withdrawn, and no other is kept: the next one is used anyway")
            changes["evaluated_round"] = 0
        else:
            changes["applied_reports"] = await self._report_anew(withdrawn)
        await self._worker.run(self._disk.save, self._disk.progress.model_copy(update=changes))

    def reports_with(self, report: Report) -> tuple[Report, ...]:
        """Return the reports of models that came into use, with this one if it is one of these."""
        reports = self._disk.progress.applied_reports
        return (*reports, report)[-MAX_REPORTS:] if report.applied else reports

    async def _report_anew(self, withdrawn: Collection[int]) -> tuple[Report, ...]:
        """Report that models which came into use are so no more; return the reports that still hold."""
        reports = self._disk.progress.applied_reports
        for report in reports:
            if report.round in withdrawn:
                changes = {"applied": False, "reason": "the model is withdrawn"}
                await self._client.report(report.model_copy(update=changes))
        return tuple(report for report in reports if report.round not in withdrawn)
