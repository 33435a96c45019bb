"""The progress of the run at the server's terminal."""

from common.progress import ProgressDisplay
from common.run_state import Phase, RunState


class RunDisplay:
    """The progress bars of the run, at the terminal or in the log."""

    def __init__(self, display: ProgressDisplay) -> None:
        self._display = display
        # The label and the total of the current bar; an empty label stands for no bar.
        self._label = ""
        self._total = 0

    def show(self, state: RunState) -> None:
        """Move the bar of the current work to this state of the run."""
        label = "warm-up: " if state.is_warm_up else f"round {state.round}: "
        detail = ""
        if state.phase is Phase.COLLECTING:
            label += "contributions"
            done, total = state.num_contributions, state.max_contributions
            # The round may close with fewer contributions than its maximum. If so, the last number that was
            # shown counts as the total.
            self._finish_previous(label, done)
        elif state.progress:
            label += state.phase.replace("_", "-")
            done, total = state.progress.done, state.progress.total
            self._finish_previous(label, total)
            if state.progress.loss is not None:
                detail = f"loss {state.progress.loss:.3f}"
        else:
            self._finish_previous("", 0)
            return
        self._display.update(label, done, total, detail)

    def close(self) -> None:
        """Remove the bars."""
        self._display.close()

    def _finish_previous(self, label: str, total: int) -> None:
        """Fill the previous bar if the label is another one, and remember the label and the total.

        The last step of the previous work may never have been shown, because states may be skipped.
        """
        if self._label and label != self._label:
            self._display.update(self._label, self._total, self._total)
        self._label, self._total = label, total
