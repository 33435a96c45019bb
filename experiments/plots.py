"""The plots of the tables, as SVG files; the same figures give the same bytes."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ecavg.common.files import replacing
from experiments import tables
from experiments import worth as worth_table
from experiments.tasks import VARIANTS

mpl.use("svg")
mpl.rcParams.update(
    {
        # With a salt, the ids in the file are not drawn at random.
        "svg.hashsalt": "ecavg",
        "svg.fonttype": "none",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.3,
        "legend.frameon": False,
    }
)

MARKERS = {"as it is": ("o", ""), "adapted": ("^", ", adapted"), "its own": ("x", ", kept out by the gate")}
COLOURS = {"plain_average": "tab:red", "selection": "tab:blue"}
_PLOTTED_STAGES = ("edges, pre-trained", "average", "aligned", "start", "fine-tuned", "edges, after")

Figures = Mapping[str, Any]


def save(plots: Mapping[str, Figure], out_dir: Path, stem: str) -> None:
    for name, plot in plots.items():
        with replacing(out_dir / f"{stem}{name}.svg") as partial:
            plot.savefig(partial, format="svg", metadata={"Date": None}, bbox_inches="tight")


def claims(figures: Figures) -> dict[str, Figure]:
    plots = {"": _panels(figures, _stages, "accuracy on the common test set")}
    barriers = {name: group for name, group in figures.items() if any(group["barrier"])}
    if barriers:
        plots["-barrier"] = _panels(barriers, _barrier, "test loss, nats")
    return plots


def parts(figures: Figures) -> dict[str, Figure]:
    plot = _panels(figures, _parts, "")
    plot.set_figheight(0.32 * len(VARIANTS) + 1)
    return {"": plot}


def transfer(figures: Figures) -> dict[str, Figure]:
    plot = _panels({"": figures}, _transfer, "own held-out accuracy, after - before")
    plot.set_figwidth(1.3 * len(figures) + 1)
    return {"": plot}


def worth(figures: Figures) -> dict[str, Figure]:
    return {"": _panels(figures, _worth, "accuracy on the common test set")}


def _panels(groups: Figures, draw: Any, y_label: str) -> Figure:
    """Draw a panel for each setting, side by side."""
    plot = Figure(figsize=(5.2 * len(groups), 3.4))
    axes = plot.subplots(1, len(groups), squeeze=False, sharey=True)[0]
    for axis, (name, group) in zip(axes, groups.items(), strict=True):
        draw(axis, group)
        axis.set_title(name)
    axes[0].set_ylabel(y_label)
    return plot


def _stages(axis: Axes, group: Any) -> None:
    for name in tables.CLAIMS:
        values = {stage: tables.stage_values(group["seeds"], stage, name) for stage in _PLOTTED_STAGES}
        places = [place for place, stage in enumerate(_PLOTTED_STAGES) if values[stage]]
        for per_seed in zip(*(values[_PLOTTED_STAGES[place]] for place in places), strict=True):
            axis.plot(places, per_seed, color=COLOURS[name], alpha=0.25, linewidth=0.8)
        means = [fmean(values[_PLOTTED_STAGES[place]]) for place in places]
        axis.plot(places, means, marker="o", color=COLOURS[name], label=tables.NAMES[name])
    axis.set_xticks(range(len(_PLOTTED_STAGES)), _PLOTTED_STAGES, rotation=20, ha="right")
    axis.legend()


def _barrier(axis: Axes, group: Any) -> None:
    lines = [line for line in group["barrier"] if line]
    for key, label, colour in (
        ("as_they_are", "as they are", "tab:red"),
        ("aligned", "aligned", "tab:blue"),
    ):
        for line in lines:
            axis.plot(line["place"], line[key], color=colour, alpha=0.25, linewidth=0.8)
        means = [fmean(values) for values in zip(*(line[key] for line in lines), strict=True)]
        axis.plot(lines[0]["place"], means, marker="o", markersize=3, color=colour, label=label)
    axis.set_xlabel("place on the line from edge-01 (0) to edge-02 (1)")
    axis.legend()


def _parts(axis: Axes, group: Any) -> None:
    names = list(group["variants"])
    for place, seeds in enumerate(group["variants"].values()):
        for key, colour in (("start", "0.6"), ("fine_tuned", "tab:blue")):
            # Random weights have an accuracy far below all others, which would squeeze the scale.
            if key == "start" and VARIANTS[names[place]].is_random:
                continue
            values = [seed[key] for seed in seeds]
            axis.errorbar(
                fmean(values), place, xerr=_deviation(values), marker="o", color=colour, capsize=3,
                label=key.replace("_", "-") if place == len(names) - 1 else None,
            )  # fmt: skip
    axis.axvline(fmean(group["edges"]), color="tab:red", linewidth=0.8, label="edges, pre-trained")
    axis.set_yticks(range(len(names)), [VARIANTS[name].label for name in names])
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.set_xlabel("accuracy on the common test set")
    axis.legend()


def _transfer(axis: Axes, group: Any) -> None:
    for shift, (variant, colour) in zip((-0.12, 0.12), COLOURS.items(), strict=True):
        changes = list(_changes(group, variant))
        for takes, (marker, remark) in MARKERS.items():
            chosen = [(place + shift, change) for place, change, taken in changes if taken == takes]
            if chosen:
                xs, ys = zip(*chosen, strict=True)
                label = tables.NAMES[variant] + remark
                axis.scatter(xs, ys, s=12, alpha=0.6, marker=marker, color=colour, label=label)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_xticks(range(len(group)), [name.replace(", ", "\n") for name in group])
    axis.legend()


def _worth(axis: Axes, rows: Any) -> None:
    """Draw the cloud alone as a line over its budgets, and each other row as a line over its rounds."""
    alone = [row for name, row in rows.items() if name.startswith("alone")]
    images = [worth_table.last_values(row, "images") for row in alone]
    accuracies = [worth_table.last_values(row, "accuracy") for row in alone]
    axis.errorbar(
        [fmean(values) for values in images],
        [fmean(values) for values in accuracies],
        yerr=[_deviation(values) for values in accuracies],
        marker="s", color="black", capsize=3, label="the cloud alone",
    )  # fmt: skip
    for name, row in rows.items():
        if name.startswith("alone"):
            continue
        steps = list(zip(*(seed["steps"] for seed in row["seeds"]), strict=True))
        xs, ys = ([fmean(step[key] for step in seeds) for seeds in steps] for key in ("images", "accuracy"))
        style = "--" if name.endswith("warm_up") else "-"
        (line,) = axis.plot(xs, ys, style, marker="o", markersize=4, alpha=0.8, label=row["label"])
        deviation = _deviation(worth_table.last_values(row, "accuracy"))
        axis.errorbar(xs[-1], ys[-1], yerr=deviation, color=line.get_color(), capsize=3)
    # The weak models of the first rounds would squeeze the scale.
    least = min(min(worth_table.last_values(row, "accuracy")) for row in rows.values())
    most = max(max(worth_table.last_values(row, "accuracy")) for row in rows.values())
    axis.set_ylim(least - 1.5 * (most - least) - 0.001, most + 0.2 * (most - least) + 0.001)
    axis.set_xlabel("images that the cloud trains on")
    axis.legend(fontsize=7)


def _deviation(values: Sequence[float]) -> float:
    """Return the standard deviation over seeds, as the tables have it; 0 of a single seed."""
    return stdev(values) if len(values) > 1 else 0.0


def _changes(group: Any, variant: str) -> Iterator[tuple[int, float, str]]:
    """Yield for each agent the place of its setting, the change of its accuracy, and the model that it takes.

    For an agent that keeps its own model, the change is the one that the gate has prevented.
    """
    for place, seeds in enumerate(group.values()):
        for seed in seeds:
            for agent in seed["agents"].get(variant, ()):
                takes = agent["gate"]["takes"] if "gate" in agent else "as it is"
                after = agent["gate"]["own_after"] if takes == "adapted" else agent["own_after"]
                yield place, after - agent["own_before"], takes
