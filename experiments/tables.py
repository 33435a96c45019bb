"""The tables: the figures of a table from the cells' records, and the Markdown text from the figures."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean, stdev

from experiments.cell import Cell, Record
from experiments.tasks import VARIANTS

CLAIMS = ("plain_average", "selection")
PARTS = tuple(VARIANTS)
TAKES = ("as it is", "adapted", "its own")
NAMES = {"plain_average": "the paper's", "selection": "the defaults"}

# The cells of each setting, one for each seed, by the setting's name.
Groups = Mapping[str, Sequence[Cell]]


# ---------------------------------------------------------------------- A. the paper's claims


def claims(groups: Groups) -> Record:
    """Return for each setting the accuracies of each seed at each stage, and the loss barriers."""
    return {
        name: {
            "seeds": [_claims_of(cell) for cell in cells],
            "barrier": [cell.barrier for cell in cells],
        }
        for name, cells in groups.items()
    }


def _claims_of(cell: Cell) -> Record:
    last = {name: _last(cell, name) for name in CLAIMS}
    found: Record = {
        "seed": cell.setting.run.seed,
        "edges": [each["accuracy"] for each in last["selection"]["local"]],
    }
    for name, record in last.items():
        accuracies = {key: value["accuracy"] for key, value in record["models"].items()}
        start, fine_tuned = accuracies[record["start"]], accuracies["fine_tuned"]
        published = start if record["published"] == "start" else accuracies[record["published"]]
        # The paper publishes the fine-tuned model in any case, and every edge uses it.
        if name == "plain_average":
            published, after = fine_tuned, [fine_tuned for _ in record["edges"]]
        else:
            after = [left_with(edge)["test_after"] for edge in record["edges"]]
        found[name] = {
            **accuracies,
            "start_is": record["start"],
            "start": start,
            "published": published,
            "edges_after": after,
            "digest": record["digest"],
        }
    found["seconds"] = {name: _seconds(cell, name) for name in CLAIMS}
    return found


STAGES: Mapping[str, Callable[[Record, str], float | None]] = {
    "edges, pre-trained": lambda seed, _: fmean(seed["edges"]),
    "average": lambda seed, name: seed[name]["average"],
    "aligned": lambda seed, name: seed[name].get("aligned"),
    "greedy soup": lambda seed, name: seed[name].get("greedy_soup"),
    "best agent": lambda seed, name: seed[name].get("best_agent"),
    "start": lambda seed, name: seed[name]["start"],
    "fine-tuned": lambda seed, name: seed[name]["fine_tuned"],
    "average of the fine-tune": lambda seed, name: seed[name].get("fine_tuned_average"),
    "published": lambda seed, name: seed[name]["published"],
    "edges, after": lambda seed, name: fmean(seed[name]["edges_after"]),
}


def stage_values(seeds: Sequence[Record], stage: str, name: str) -> list[float]:
    """Return the accuracy of each seed at the stage, without the seeds that lack this stage."""
    values = (STAGES[stage](seed, name) for seed in seeds)
    return [value for value in values if value is not None]


def claims_in_words(figures: Record) -> str:
    parts = []
    for name, group in figures.items():
        seeds = group["seeds"]
        stages = [
            [stage, *(spread(stage_values(seeds, stage, which)) for which in CLAIMS)]
            for stage in STAGES
            if any(stage_values(seeds, stage, which) for which in CLAIMS)
        ]
        parts += [
            f"## {name}",
            grid(["accuracy on the common test set", *(NAMES[which] for which in CLAIMS)], stages),
            grid(
                [
                    "seed", "edges, pre-trained", "plain average", "fine-tuned from it", "aligned",
                    "start", "fine-tuned", "published", "edges, after",
                ],
                [_claims_row(seed) for seed in seeds],
            ),
            *_verdicts(seeds),
        ]  # fmt: skip
    return "\n\n".join(parts)


def _claims_row(seed: Record) -> list[str]:
    paper, ours = seed["plain_average"], seed["selection"]
    return [
        str(seed["seed"]),
        " ".join(map(figure, seed["edges"])),
        figure(paper["average"]),
        figure(paper["fine_tuned"]),
        figure(ours.get("aligned")),
        f"{figure(ours['start'])} ({ours['start_is'].replace('_', ' ')})",
        figure(ours["fine_tuned"]),
        figure(ours["published"]),
        " ".join(map(figure, ours["edges_after"])),
    ]


VERDICTS: Mapping[str, Callable[[Record], bool]] = {
    "plain average below every edge": lambda seed: seed["plain_average"]["average"] < min(seed["edges"]),
    "the paper's server gains by its fine-tune": lambda seed: (
        seed["plain_average"]["fine_tuned"] > seed["plain_average"]["average"]
    ),
    "the paper's round leaves every edge with a better model": lambda seed: (
        seed["plain_average"]["fine_tuned"] > max(seed["edges"])
    ),
    "with the defaults the server gains by its fine-tune": lambda seed: (
        seed["selection"]["fine_tuned"] > seed["selection"]["start"]
    ),
    "with the defaults the published model beats every edge's own": lambda seed: (
        seed["selection"]["published"] > max(seed["edges"])
    ),
    "with the defaults no edge ends below its own": lambda seed: all(
        after >= before for before, after in zip(seed["edges"], seed["selection"]["edges_after"], strict=True)
    ),
}


def _verdicts(seeds: Sequence[Record]) -> Iterable[str]:
    lines = (
        f"- {what}: on {sum(map(holds, seeds))} of {len(seeds)} seeds" for what, holds in VERDICTS.items()
    )
    return ["\n".join(lines)]


# ---------------------------------------------------------------------- B. what each part adds


def parts(groups: Groups) -> Record:
    """Return the accuracies of the start, the fine-tuned and the published model, by setting and variant.

    A variant has one record for each seed, with the accuracies of the variant's last round.
    """
    return {
        name: {
            "edges": [fmean(each["accuracy"] for each in _local(cell)) for cell in cells],
            "variants": {
                variant: [_part_of(cell, variant) for cell in cells] for variant in cells[0].variants
            },
        }
        for name, cells in groups.items()
    }


def _local(cell: Cell) -> list[Record]:
    records = (_first(cell, name) for name in cell.variants if not VARIANTS[name].is_random)
    return next(records)["local"]  # type: ignore[no-any-return]


def _part_of(cell: Cell, name: str) -> Record:
    last = _last(cell, name)
    start, fine_tuned = (last["models"][key]["accuracy"] for key in (last["start"], "fine_tuned"))
    published = last["start"] if last["published"] == "start" else last["published"]
    return {
        "seed": cell.setting.run.seed,
        "start_is": last["start"],
        "start": start,
        "fine_tuned": fine_tuned,
        "published": last["models"][published]["accuracy"],
        "seconds": _seconds(cell, name),
    }


def parts_in_words(figures: Record) -> str:
    texts = []
    for name, group in figures.items():
        variants = group["variants"]
        base = variants.get("plain_average")
        rows = []
        for variant, seeds in variants.items():
            fine_tuned = [seed["fine_tuned"] for seed in seeds]
            gains = [
                value - seed["fine_tuned"] for value, seed in zip(fine_tuned, base or (), strict=bool(base))
            ]
            starts = Counter(seed["start_is"].replace("_", " ") for seed in seeds)
            rows.append(
                [
                    VARIANTS[variant].label,
                    ", ".join(f"{start} {count}x" for start, count in starts.items()),
                    spread([seed["start"] for seed in seeds]),
                    spread(fine_tuned),
                    spread([seed["published"] for seed in seeds]),
                    spread(gains, sign=True),
                    signed(min(gains)) if gains else "-",
                    f"{fmean(seed['seconds']['all'] for seed in seeds):.0f}",
                ]
            )
        texts += [
            f"## {name}",
            f"Edges, pre-trained: {spread(group['edges'])}.",
            grid(
                [
                    "the cloud's part", "it starts from", "start", "fine-tuned", "published",
                    "fine-tuned, over the plain average", "least", "seconds",
                ],
                rows,
            ),
        ]  # fmt: skip
    return "\n\n".join(texts)


# ---------------------------------------------------------------------- C. negative transfer


def transfer(groups: Groups) -> Record:
    """Return for each setting, seed and agent how the published models compare to the agent's own model."""
    return {
        name: [
            {
                "seed": cell.setting.run.seed,
                "agents": {variant: _last(cell, variant)["edges"] for variant in cell.variants},
                "seconds": {variant: _seconds(cell, variant) for variant in cell.variants},
            }
            for cell in cells
        ]
        for name, cells in groups.items()
    }


def transfer_in_words(figures: Record) -> str:
    some = next(iter(figures.values()))[0]["agents"]
    ways = [
        (variant, is_gated)
        for variant, agents in some.items()
        # The paper's variant has no gate.
        for is_gated in ((False, True) if "gate" in agents[0] else (False,))
    ]
    headings = [
        f"{NAMES.get(variant, VARIANTS[variant].label)}, {'with the gate' if is_gated else 'always applied'}"
        for variant, is_gated in ways
    ]
    gated = [(heading, *way) for heading, way in zip(headings, ways, strict=True) if way[1]]
    return "\n\n".join(
        [
            "## Agents worse after than before",
            "On their own held-out data, by more than the tolerance.",
            grid(
                ["", *headings],
                ([name, *(_worse(seeds, *way) for way in ways)] for name, seeds in figures.items()),
            ),
            "## What the gate makes of the published model",
            "Agents that use it as it is, adapted to their shard, and not at all.",
            grid(
                ["", *(f"{heading}: {takes}" for heading, *_ in gated for takes in TAKES)],
                (
                    [name, *(_share(seeds, variant, takes) for _, variant, _ in gated for takes in TAKES)]
                    for name, seeds in figures.items()
                ),
            ),
            "## Accuracy on their own held-out data",
            "Mean over the agents, of the models that they use.",
            _accuracies(figures, headings, ways, "own"),
            "## Accuracy on the common test set",
            "Mean over the agents, of the models that they use.",
            _accuracies(figures, headings, ways, "test"),
        ]
    )


def left_with(agent: Record, *, is_gated: bool = True) -> Record:
    """Return an agent's `own_after`, `test_after`, and `is_worse`, which means by more than the tolerance.

    Args:
        is_gated: True if the agent's gate decides, where it has one; False if the agent uses the published
            model as it is.
    """
    return agent.get("gate", agent) if is_gated else agent


def _agents(seeds: Sequence[Record], variant: str) -> list[Record]:
    return [agent for seed in seeds for agent in seed["agents"][variant]]


def _worse(seeds: Sequence[Record], variant: str, is_gated: bool) -> str:
    agents = _agents(seeds, variant)
    return _portion(sum(left_with(agent, is_gated=is_gated)["is_worse"] for agent in agents), len(agents))


def _share(seeds: Sequence[Record], variant: str, takes: str) -> str:
    agents = _agents(seeds, variant)
    return _portion(sum(agent["gate"]["takes"] == takes for agent in agents), len(agents))


def _accuracies(
    figures: Record, headings: Sequence[str], ways: Sequence[tuple[str, bool]], where: str
) -> str:
    """Return a table of the accuracies before the round, and after it in each way.

    Args:
        where: "own" for the agents' own held-out data, "test" for the common test set.
    """
    rows = []
    for name, seeds in figures.items():
        before = [fmean(agent[f"{where}_before"] for agent in seed["agents"][ways[0][0]]) for seed in seeds]
        row = [name, spread(before)]
        for variant, is_gated in ways:
            after = [
                fmean(
                    left_with(agent, is_gated=is_gated)[f"{where}_after"] for agent in seed["agents"][variant]
                )
                for seed in seeds
            ]
            least = min(late - early for early, late in zip(before, after, strict=True))
            row.append(f"{spread(after)} (least gain {signed(least)})")
        rows.append(row)
    return grid(["", "before", *headings], rows)


# ---------------------------------------------------------------------- D. what fewer bytes cost


def wire(groups: Groups) -> Record:
    """Return for each setting, variant, wire and seed the accuracies and the bytes of the last round."""
    figures: Record = {}
    for name, cells in groups.items():
        setting, _, encoding = name.rpartition(", ")
        for variant in cells[0].variants:
            rows = figures.setdefault(setting, {}).setdefault(variant, {})
            rows[encoding] = [_sent(cell, variant) for cell in cells]
    return figures


def _sent(cell: Cell, variant: str) -> Record:
    rounds = _rounds(cell, variant)
    return {
        "seed": cell.setting.run.seed,
        "rounds": len(rounds),
        "edges_before": fmean(each["accuracy"] for each in rounds[-1]["local"]),
        "published": rounds[-1]["accuracy"],
        "edges_after": fmean(left_with(edge)["test_after"] for edge in rounds[-1]["edges"]),
        "digest": rounds[-1]["digest"],
        **{way: rounds[-1]["bytes"][way] for way in ("up", "down")},
    }


def wire_in_words(figures: Record) -> str:
    texts = ["Bytes: of one agent's weights to the cloud, and of the published model to one agent."]
    for setting, variants in figures.items():
        for variant, wires in variants.items():
            plain = next(iter(wires.values()))
            rows = [
                [
                    encoding,
                    spread([seed["edges_before"] for seed in seeds]),
                    spread([seed["published"] for seed in seeds]),
                    spread(
                        [
                            seed["published"] - other["published"]
                            for seed, other in zip(seeds, plain, strict=True)
                        ],
                        sign=True,
                    ),
                    spread([seed["edges_after"] for seed in seeds]),
                    *(
                        f"{seeds[0][way]:,.0f} ({seeds[0][way] / plain[0][way]:.3f})"
                        for way in ("up", "down")
                    ),
                ]
                for encoding, seeds in wires.items()
            ]
            texts += [
                f"## {setting}: {VARIANTS[variant].label}, {plain[0]['rounds']} round(s)",
                grid(
                    [
                        "wire", "edges, pre-trained", "published", f"over {next(iter(wires))}",
                        "edges, after", "bytes up", "bytes down",
                    ],
                    rows,
                ),
            ]  # fmt: skip
    return "\n\n".join(texts)


# ---------------------------------------------------------------------- small parts


def _first(cell: Cell, name: str) -> Record:
    return _rounds(cell, name)[0]


def _last(cell: Cell, name: str) -> Record:
    return _rounds(cell, name)[-1]


def _rounds(cell: Cell, name: str) -> list[Record]:
    record = cell.record(name)
    assert record, f"{cell.path} lacks {name}"
    return record["rounds"]  # type: ignore[no-any-return]


def _seconds(cell: Cell, name: str) -> Record:
    """Return the wall seconds of a variant by part; all variants share the agents' pre-training."""
    record = cell.record(name)
    assert record
    seconds: Record = {**record["seconds"]}
    for each in record["rounds"]:
        for part, value in each["seconds"].items():
            seconds[part] = seconds.get(part, 0.0) + value
    return {part: round(value, 2) for part, value in seconds.items()}


def _portion(count: int, total: int) -> str:
    return f"{count} of {total} ({count / total:.1%})"


def figure(accuracy: float | None) -> str:
    return "-" if accuracy is None else f"{accuracy:.4f}"


def signed(difference: float) -> str:
    return f"{difference:+.4f}"


def spread(values: Sequence[float], *, sign: bool = False) -> str:
    """Format the mean ± standard deviation (of the sample) over seeds."""
    if not values:
        return "-"
    text = signed(fmean(values)) if sign else figure(fmean(values))
    return f"{text} ± {stdev(values):.4f}" if len(values) > 1 else text


def grid(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format a Markdown table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
