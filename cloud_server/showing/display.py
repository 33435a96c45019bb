"""The run as the person at the server's terminal sees it."""

from common.run_state import Phase, RunState
from common.telemetry import ProgressDisplay


class RunDisplay:
    """Turns states of the run into progress bars."""

    def __init__(self, display: ProgressDisplay) -> None:
        self._display = display
        self._label = ""  # of the bar that is under way
        self._total = 0  # what its work comes to, once it is over

    def show(self, state: RunState) -> None:
        label = f"round {state.round}: "
        detail = ""
        if state.phase is Phase.COLLECTING:
            label += "contributions"
            done, total = state.num_contributions, state.max_contributions
            self._finish_other(label, done)  # a round may close with fewer
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
        self._display.close()

    def _finish_other(self, label: str, total: int) -> None:
        """States may skip the last step of a piece of work: what has been left is done."""
        if self._label and label != self._label:
            self._display.update(self._label, self._total, self._total)
        self._label, self._total = label, total
