"""From what was measured to the figures of a table, and from those to Markdown."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean, stdev

from experiments.cell import Cell, Record
from experiments.tasks import VARIANTS

CLAIMS = ("plain_average", "selection")
PARTS = tuple(VARIANTS)
TRANSFER = ("plain_average", "selection")
NAMES = {"plain_average": "the paper's", "selection": "the defaults"}

Groups = Mapping[str, Sequence[Cell]]  # the seeds of each setting, by its name


# ---------------------------------------------------------------------- A. the paper's claims


def claims(groups: Groups) -> Record:
    """For each setting what each seed gave, stage by stage, and the loss barriers."""
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
        published = fine_tuned if record["published"] == "fine_tuned" else start
        if name == "plain_average":  # the paper publishes what it fine-tuned, and every edge takes it
            published, after = fine_tuned, [fine_tuned for _ in record["edges"]]
        else:
            after = [edge["test_after" if edge["is_applied"] else "test_before"] for edge in record["edges"]]
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
    "published": lambda seed, name: seed[name]["published"],
    "edges, after": lambda seed, name: fmean(seed[name]["edges_after"]),
}


def stage_values(seeds: Sequence[Record], stage: str, name: str) -> list[float]:
    """One for each seed; none where there is no such stage."""
    values = (STAGES[stage](seed, name) for seed in seeds)
    return [value for value in values if value is not None]


def claims_in_words(figures: Record) -> str:
    parts = []
    for name, group in figures.items():
        seeds = group["seeds"]
        stages = [
            [stage, *(spread(stage_values(seeds, stage, which)) for which in CLAIMS)] for stage in STAGES
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
    """For each setting and variant, seed by seed: accuracy of the start, fine-tuned, published."""
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
    return {
        "seed": cell.setting.run.seed,
        "start_is": last["start"],
        "start": start,
        "fine_tuned": fine_tuned,
        "published": fine_tuned if last["published"] == "fine_tuned" else start,
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
    """For each setting, seed and agent: how the published models compare to its own."""
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
    worse_rows, accuracy_rows = [], []
    for name, seeds in figures.items():
        variants = list(seeds[0]["agents"])
        worse, accuracy = [name], [name]
        before = [fmean(agent["test_before"] for agent in seed["agents"][variants[0]]) for seed in seeds]
        accuracy.append(spread(before))
        for variant, is_gated in _ways(variants):
            agents = [agent for seed in seeds for agent in seed["agents"][variant]]
            num_worse = sum(is_worse_after(agent, is_gated=is_gated) for agent in agents)
            worse.append(f"{num_worse} of {len(agents)} ({num_worse / len(agents):.1%})")
            after = [
                fmean(test_after(agent, is_gated=is_gated) for agent in seed["agents"][variant])
                for seed in seeds
            ]
            least = min(late - early for early, late in zip(before, after, strict=True))
            accuracy.append(f"{spread(after)} (least gain {signed(least)})")
        worse_rows.append(worse)
        accuracy_rows.append(accuracy)
    headings = [
        f"{NAMES.get(variant, VARIANTS[variant].label)}, {'with the gate' if is_gated else 'always applied'}"
        for variant, is_gated in _ways(variants)
    ]
    return "\n\n".join(
        [
            "## Agents worse after than before",
            "On their own held-out data, by more than the tolerance.",
            grid(["", *headings], worse_rows),
            "## Accuracy on the common test set",
            "Mean over the agents, of the models that they use.",
            grid(["", "before", *headings], accuracy_rows),
        ]
    )


def _ways(variants: Sequence[str]) -> list[tuple[str, bool]]:
    """A variant and whether its gate is there: the paper's has none."""
    return [
        (variant, is_gated)
        for variant in variants
        for is_gated in (False, True)
        if not (is_gated and VARIANTS[variant].changes.get("apply") == "always")
    ]


def is_worse_after(agent: Record, *, is_gated: bool) -> bool:
    """Whether an agent is left with a model that is worse than its own by more than the tolerance."""
    return bool(agent["is_worse"] and (agent["is_applied"] or not is_gated))


def test_after(agent: Record, *, is_gated: bool) -> float:
    """Accuracy on the common test set of what an agent uses in the end."""
    is_used = agent["is_applied"] or not is_gated
    return float(agent["test_after" if is_used else "test_before"])


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
    """Wall seconds of a variant by part; the agents' pre-training is shared by the variants."""
    record = cell.record(name)
    assert record
    seconds: Record = {**record["seconds"]}
    for each in record["rounds"]:
        for part, value in each["seconds"].items():
            seconds[part] = seconds.get(part, 0.0) + value
    return {part: round(value, 2) for part, value in seconds.items()}


def figure(accuracy: float | None) -> str:
    return "-" if accuracy is None else f"{accuracy:.4f}"


def signed(difference: float) -> str:
    return f"{difference:+.4f}"


def spread(values: Sequence[float], *, sign: bool = False) -> str:
    """Mean ± standard deviation (of the sample) over seeds."""
    if not values:
        return "-"
    text = signed(fmean(values)) if sign else figure(fmean(values))
    return f"{text} ± {stdev(values):.4f}" if len(values) > 1 else text


def grid(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
