"""The progress of a run at a terminal, the server's or an agent's."""

import time

from ecavg.common.config import RunConfig
from ecavg.common.cron import local_zone, spoken
from ecavg.common.progress import ProgressDisplay
from ecavg.common.run_state import Phase, RunState, WorkProgress


class RunDisplay:
    """The progress bars of the run, at the terminal or in the log.

    Args:
        prefix: begins the label of each bar; empty for the number of the round.
        run: tells how many epochs the cloud trains for; None: it is not known yet.
    """

    def __init__(self, display: ProgressDisplay, prefix: str = "", run: RunConfig | None = None) -> None:
        self.run = run
        self._display = display
        self._prefix = prefix
        # The last round after which was said what the next one waits for; -1: none, not even the warm-up.
        self._said = -1
        # The label and the total of the current bar; an empty label stands for no bar.
        self._label = ""
        self._total = 0

    def show(self, state: RunState) -> None:
        """Move the bar of the current work to this state of the run."""
        label = self._prefix or ("warm-up: " if state.is_warm_up else f"round {state.round}: ")
        detail, unit = "", "steps"
        if state.phase is Phase.COLLECTING:
            label, unit = label + "contributions", "contributions"
            done, total = state.num_contributions, state.max_contributions
            # The round may close with fewer contributions than its maximum. If so, the last number that was
            # shown counts as the total.
            self._finish_previous(label, done)
        elif state.progress:
            label += state.phase.replace("_", "-")
            done, total = state.progress.done, state.progress.total
            self._finish_previous(label, total)
            detail = self._detail(state, state.progress)
        else:
            self._finish_previous("", 0)
            self._say_what_opens(state)
            return
        self._display.update(label, done, total, detail, unit)

    def _say_what_opens(self, state: RunState) -> None:
        """Say once after a round what the next one waits for, if it waits."""
        if state.round == self._said or state.run_over:
            return
        if state.next_round_at is not None:
            when = spoken(state.next_round_at, time.time(), local_zone())
        elif state.num_examples_to_open is not None:
            when = f"when the agents have {state.num_examples_to_open} new examples"
        else:
            return
        self._said = state.round
        self._display.message(f"the next round opens {when}")

    def _detail(self, state: RunState, work: WorkProgress) -> str:
        """Return the epochs of the cloud's training and the loss, as far as they are known."""
        parts = []
        epochs = self.run.fine_tune_of(state.round).epochs if self.run else 0
        if state.phase is Phase.FINE_TUNING and epochs and work.total:
            parts.append(f"{work.done * epochs // work.total} of {epochs} epochs")
        if work.loss is not None:
            parts.append(f"loss {work.loss:.3f}")
        return ", ".join(parts)

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
