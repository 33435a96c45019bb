"""How `cloud-server status` draws the status at the terminal.

The document comes from another process, perhaps of another version: what it does not have is left out.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from rich.console import Console, Group, RenderableType
from rich.filesize import decimal
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ecavg.common import cli
from ecavg.common.errors import one_line
from ecavg.common.progress import rate_text

# The width of what is not written to a terminal.
WIDTH = 120
NONE = "–"

Document = Mapping[str, Any]

_OUTCOMES = {"accepted": "contributed", "rejected": "rejected", "late": "late, joins the next round"}
_WAITS = {
    "hours": "outside of its hours",
    "command": "its ready_command says that it is not the time",
    "time": "waits for the time at which it pre-trains",
    "examples": "waits for new examples",
    "upload_hours": "waits for the hours in which it uploads",
}


def show(document: Document) -> None:
    """Print the status once, in colours if stdout is a terminal; raise RunError if it cannot be written."""
    if sys.stdout.isatty():
        Console(highlight=False, markup=False).print(_view(document))
        return
    lines = cli.rendered(_view(document), WIDTH).split("\n")
    cli.print_result("\n".join(line.rstrip() for line in lines))


def shown_live(documents: Iterable[Document]) -> None:
    """Show each status in the place of the one before, or below it if stdout is no terminal."""
    if not sys.stdout.isatty():
        for document in documents:
            show(document)
        return
    with Live(console=Console(highlight=False, markup=False), auto_refresh=False) as live:
        for document in documents:
            live.update(_view(document), refresh=True)


def _view(document: Document) -> RenderableType:
    if "round" not in document:
        return _text("The server is starting.")
    parts = [_headline(document), _progress(document), _agents(document)]
    return Group(*(part for part in parts if part))


def _headline(document: Document) -> Text:
    """Return the run, the round and its phase, how many have contributed, and why the last round failed."""
    phase = str(document.get("phase")).replace("_", "-")
    lines = [_run(document), f"Round {document.get('round')}: {phase}"]
    if document.get("run_over"):
        lines.append("The run is over.")
    elif phase == "collecting":
        lines.append(_quorum(document))
    lines.append(str(document.get("waiting") or ""))
    if document.get("pinned_round"):
        lines.append(f"The model of round {document['pinned_round']} is pinned: agents use that one.")
    rounds = document.get("rounds") or []
    if rounds and rounds[-1].get("failure"):
        lines.append(f"Round {rounds[-1].get('round')} failed: {rounds[-1]['failure']}")
    lines += _roll_outs(rounds)
    published = [row for row in rounds if row.get("outcome") == "published" and not _is_withdrawn(row)]
    if published:
        last, figures = published[-1], _Figures(document.get("metric") or "accuracy")
        lines.append(
            f"Global model of round {last.get('round')}: {figures.metric}"
            f" {figures.text(last, 'start')} at the start,"
            f" {figures.text(last, 'published')} as published"
        )
    if _trainer(document).get("state") == "restarting":
        lines.append("The trainer has ended, and is started again.")
    return _text("\n".join(one_line(line) for line in lines if line))


def _roll_outs(rounds: Sequence[Document]) -> list[str]:
    """Return that the model of the last round was withdrawn, and why."""
    if not rounds or not _is_withdrawn(rounds[-1]):
        return []
    return [
        f"The model of round {rounds[-1].get('round')} is withdrawn: {rounds[-1]['roll_out'].get('reason')}"
    ]


def _is_withdrawn(row: Document) -> bool:
    return bool((row.get("roll_out") or {}).get("state") == "withdrawn")


def _trainer(document: Document) -> Document:
    trainer = document.get("trainer")
    return trainer if isinstance(trainer, Mapping) else {}


def _run(document: Document) -> str:
    """Return the name of the run and its id."""
    run_id = document.get("run_id")
    name = document.get("run_name")
    return f"Run {name} ({run_id})" if name else f"Run {run_id}"


def _quorum(document: Document) -> str:
    accepted = sum(agent.get("outcome") == "accepted" for agent in document.get("agents") or [])
    return f"{accepted} of {document.get('max_agents')} contributions, at least {document.get('min_agents')}"


def _progress(document: Document) -> RenderableType | None:
    """Return a bar for the work under way, or None if there is none."""
    work = document.get("progress")
    if not work or not work.get("total"):
        return None
    done, total = work["done"], work["total"]
    loss = "" if work.get("loss") is None else f", loss {work['loss']:.3f}"
    line = Table.grid(padding=(0, 1))
    left = _left(_trainer(document).get("seconds_left"))
    line.add_row(ProgressBar(total, done, width=24), _text(f"step {done} of {total}{loss}{left}"))
    return line


def _agents(document: Document) -> RenderableType:
    agents = document.get("agents") or []
    if not agents:
        return _text("No agent has joined yet.")
    figures = _Figures(document.get("metric") or "accuracy")
    table = Table(box=None, pad_edge=False)
    table.add_column("agent", overflow="fold")
    table.add_column("state", overflow="fold")
    for heading in ("local", "before", "after", "gain"):
        table.add_column(heading, justify="right", no_wrap=True)
    for agent in agents:
        table.add_row(*map(_text, _cells(agent, figures)))
    return table


def _cells(agent: Document, figures: "_Figures") -> tuple[str, ...]:
    """Return an agent's row: the figure before is that of its own model where it has used no other."""
    first = "local" if figures.of(agent, "before") is None else "before"
    last = "after" if figures.of(agent, "adapted") is None else "adapted"
    return (
        str(agent.get("agent_id")),
        _state(agent),
        figures.text(agent, "local"),
        figures.text(agent, "before"),
        figures.text(agent, last),
        figures.gain(agent, first, last),
    )


class _Figures(NamedTuple):
    """How the figure of the run's task reads: accuracies as percentages, and any other as a number."""

    metric: str

    def of(self, item: Document, stage: str) -> float | None:
        """Return the figure of one stage of a round or an agent; None: it was not measured."""
        return item.get(f"{'accuracy' if self._is_accuracy else 'score'}_{stage}")

    def text(self, item: Document, stage: str) -> str:
        """Return the same as a text."""
        score = self.of(item, stage)
        if score is None:
            return NONE
        return f"{100 * score:.1f} %" if self._is_accuracy else f"{score:.3f}"

    def gain(self, item: Document, before: str, after: str) -> str:
        """Return how much larger the figure of one stage is than that of another."""
        first, last = self.of(item, before), self.of(item, after)
        if first is None or last is None:
            return NONE
        return f"{100 * (last - first):+.1f}" if self._is_accuracy else f"{last - first:+.3f}"

    @property
    def _is_accuracy(self) -> bool:
        return self.metric == "accuracy"


def _state(agent: Document) -> str:
    """Return what the agent does, or has done, in words."""
    is_away = agent.get("state") == "away"
    doing, waits = _doing(agent.get("progress")), _WAITS.get(agent.get("waits_for") or "", "")
    silent = "" if is_away or doing or waits else "working"
    parts = [_OUTCOMES.get(agent.get("outcome") or "", silent), doing, waits]
    parts.append(_away(agent) if is_away else "")
    if place := agent.get("upload_place"):
        parts.append(f"waits to upload, place {place}")
    parts.append(_model_in_use(agent))
    if agent.get("is_canary"):
        parts.append("in the canary")
    audit = agent.get("audit") or {}
    parts += [f"flagged: {flag}" for flag in audit.get("flags") or []]
    if audit.get("left_out"):
        parts.append("left out of the model")
    parts.append(str(agent.get("message") or ""))
    return ", ".join(filter(None, parts))


def _model_in_use(agent: Document) -> str:
    """Return which round's model the agent uses, as far as it has reported."""
    if agent.get("applied") is False:
        return "kept its own model"
    if agent.get("model_round") is not None:
        return f"uses the global model of round {agent['model_round']}"
    return "uses the global model" if agent.get("applied") else ""


def _away(agent: Document) -> str:
    since = agent.get("away_since")
    return f"away since {datetime.fromtimestamp(since, UTC):%Y-%m-%d %H:%M} UTC" if since else "away"


def _doing(progress: Document | None) -> str:
    """Return what an agent is doing, how far it is, how fast, and how long that will take."""
    if not progress or progress.get("phase") == "queued":
        # Its place in the queue says more.
        return ""
    does = str(progress.get("phase")).replace("_", "-")
    done, total, unit = progress.get("done") or 0, progress.get("total"), str(progress.get("unit"))
    if total and unit == "bytes":
        does += f" {decimal(done)} of {decimal(total)}"
    elif total:
        does += f" {100 * done // total} %"
    if rate := progress.get("rate"):
        does += f" at {rate_text(rate, unit)}"
    return does + _left(progress.get("seconds_left"))


def _left(seconds: float | None) -> str:
    """Return the time left in minutes and seconds, with a comma before it; nothing if it is unknown."""
    return "" if seconds is None else f", {timedelta(seconds=round(seconds))} left"


def _text(text: str) -> Text:
    """Return text that cannot control the terminal; its lines stay lines."""
    return Text("\n".join(map(one_line, text.split("\n"))))
