"""The run as the person at the server's terminal sees it."""

from cloud_server.coordinator import RunState
from cloud_server.round import Phase
from common.telemetry import ProgressDisplay


class RunDisplay:
    """Turns states of the run into progress bars and lines."""

    def __init__(self, display: ProgressDisplay) -> None:
        self._display = display

    def show(self, state: RunState) -> None:
        prefix = f"round {state.round}: "
        if state.phase is Phase.COLLECTING:
            done, total = state.num_contributions, state.max_contributions
            self._display.update(f"{prefix}contributions", done, total)
        elif state.progress:
            label = prefix + state.progress.phase.replace("_", "-")
            loss = state.progress.loss
            detail = "" if loss is None else f"loss {loss:.3f}"
            self._display.update(label, state.progress.done, state.progress.total, detail)

    def close(self) -> None:
        self._display.close()
