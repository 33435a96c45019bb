"""The run as the person at the server's terminal sees it."""

from common.run_state import Phase, RunState
from common.telemetry import ProgressDisplay


class RunDisplay:
    """The progress bars that show the states of the run."""

    def __init__(self, display: ProgressDisplay) -> None:
        self._display = display
        # The label of the bar that is under way.
        self._label = ""
        # The total of its work.
        self._total = 0

    def show(self, state: RunState) -> None:
        """Show this state."""
        label = f"round {state.round}: "
        detail = ""
        if state.phase is Phase.COLLECTING:
            label += "contributions"
            done, total = state.num_contributions, state.max_contributions
            # A round may close with fewer contributions than it may have.
            self._finish_other(label, done)
        elif state.progress:
            label += state.phase.replace("_", "-")
            done, total = state.progress.done, state.progress.total
            self._finish_other(label, total)
            if state.progress.loss is not None:
                detail = f"loss {state.progress.loss:.3f}"
        else:
            self._finish_other("", 0)
            return
        self._display.update(label, done, total, detail)

    def close(self) -> None:
        """Remove the bars."""
        self._display.close()

    def _finish_other(self, label: str, total: int) -> None:
        """Fill the last bar when another piece of work begins: states may skip the last step of a piece."""
        if self._label and label != self._label:
            self._display.update(self._label, self._total, self._total)
        self._label, self._total = label, total
