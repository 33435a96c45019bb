"""The harm of poisoned agents to the published model, with clipping, robust aggregation and quarantine.

    python -m experiments.poison --task mnist --data-dir DIR --seeds 3

One of 5 agents is poisoned, or two of 10. Honest agents pre-train once for all variants. The product's own
code does everything in this process. A command that was stopped goes on from there when it is started again.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from ecavg.common.config import RunConfig
from ecavg.common.errors import InvalidError, RunError
from ecavg.common.layers import deep_merge
from ecavg.common.shards import Shard
from ecavg.common.tasks.task import task_of
from experiments import command
from experiments.command import console, write_text
from experiments.tasks import TASKS, Setting

# The number of agents, and the number of poisoned agents among them.
CASES = ((5, 1), (10, 2))
EXAMPLES_PER_AGENT = {"digits": 130, "mnist": 2_000, "cifar10": 1_000}
TEST_EXAMPLES = {"digits": 1_000, "mnist": 10_000, "cifar10": 2_000}
FACTOR = 1_000.0
# A backdoor makes the model predict this class for every image with the patch.
TARGET = 0
# The patch covers 1/PATCH of the image's height and width, in the lower right corner.
PATCH = 8

AGGREGATORS = ("mean", "trimmed_mean", "median", "geometric_median")
DEFENCES: Mapping[str, Mapping[str, Any]] = {
    "none": {"max_norm_ratio": 0.0, "quarantine": "report"},
    "clip": {"quarantine": "report"},
    "quarantine": {"max_norm_ratio": 0.0, "quarantine": "exclude"},
    "both": {"quarantine": "exclude"},
}

# The content of a JSON file.
Record = dict[str, Any]


class Attack(NamedTuple):
    """An attack of poisoned agents, on their data before they train, or on their weights afterwards."""

    label: str
    # The update is multiplied by this factor.
    factor: float = 1.0
    flips_labels: bool = False
    # This share of the images gets the patch and the target's label.
    patched: float = 0.0


ATTACKS: Mapping[str, Attack] = {
    "honest": Attack("honest"),
    "label_flip": Attack("labels flipped", flips_labels=True),
    "sign_flip": Attack("sign flipped", factor=-1.0),
    "scale": Attack(f"update x {FACTOR:g}", factor=FACTOR),
    "nan": Attack("NaN", factor=np.nan),
    "backdoor_half": Attack("backdoor, half of the images", patched=0.5),
    "backdoor_tenth": Attack("backdoor, a tenth of the images", patched=0.1),
}


class Variant(NamedTuple):
    """The attack, aggregator and defence of one round."""

    attack: str
    aggregator: str
    defence: str

    @property
    def name(self) -> str:
        return "/".join(self)


VARIANTS = [Variant(*names) for names in product(ATTACKS, AGGREGATORS, DEFENCES)]


class Cell(NamedTuple):
    """One seed of one case, and the folder that keeps the records known so far."""

    setting: Setting
    num_poisoned: int
    path: Path

    @property
    def known(self) -> dict[str, Record]:
        """Return the records made with the present settings, by the variant's name."""
        try:
            text = (self.path / "records.json").read_text("utf-8")
        except FileNotFoundError:
            return {}
        records: dict[str, Record] = json.loads(text)
        return {name: each for name, each in records.items() if each["run"] == self.run_json(name)}

    @property
    def missing(self) -> list[Variant]:
        known = self.known
        return [variant for variant in VARIANTS if variant.name not in known]

    def keep(self, variant: Variant, record: Record) -> None:
        records = self.known | {variant.name: record | {"run": self.run_json(variant.name)}}
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.path / "records.json", json.dumps(records))

    def run_of(self, variant: Variant) -> RunConfig:
        changes = {"aggregator": variant.aggregator, **DEFENCES[variant.defence]}
        return self.setting.run.model_copy(update=changes)

    def run_json(self, name: str) -> Any:
        return self.run_of(Variant(*name.split("/"))).model_dump(mode="json")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parse(argv)

    def work() -> None:
        cases = _cells(arguments)
        _work([cell for cells in cases.values() for cell in cells])
        _write(arguments, cases)

    return command.exit_code_of("poison", work)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.poison", description=(__doc__ or "").splitlines()[0]
    )
    add = parser.add_argument
    add("--task", choices=EXAMPLES_PER_AGENT, required=True, help="digits needs no data")
    add("--partition-by", default="iid", metavar="P", help="iid, dirichlet:ALPHA or classes:K (default: iid)")
    add("--examples-per-agent", type=int, metavar="N", help="(default: the task's)")
    add("--cases", default="5,10", metavar="K,…", help="of 5 and 10 agents (default: both)")
    command.add_options(parser)
    return parser.parse_args(argv)


def _cells(arguments: argparse.Namespace) -> dict[str, list[Cell]]:
    """Return the cells of each case, one for each seed, by the case's name.

    Raises:
        UsageError: the configuration or the data are not usable.
    """
    from experiments import data

    task, cases = arguments.task, {}
    folder = data.prepare(_run(arguments, 0), arguments.data_dir, arguments.work_dir)
    each = arguments.examples_per_agent or EXAMPLES_PER_AGENT[task]
    for num_agents, num_poisoned in CASES:
        if str(num_agents) not in arguments.cases.split(","):
            continue
        cells = []
        for seed in range(arguments.seeds):
            run, in_all = _run(arguments, seed), num_agents * each
            setting = Setting(task, run, folder, num_agents, in_all, TEST_EXAMPLES[task])
            cells.append(Cell(setting, num_poisoned, arguments.work_dir / "poison" / setting.name))
        cases[f"{num_poisoned} of {num_agents}"] = cells
    return cases


def _run(arguments: argparse.Namespace, seed: int) -> RunConfig:
    run = deep_merge(
        TASKS[arguments.task].run,
        {"seed": seed, "partition_by": arguments.partition_by, "initial_weights": "shared"},
    )
    return command.run_config(run, arguments.set)


# ---------------------------------------------------------------------- measuring


def _work(cells: Sequence[Cell]) -> None:
    with command.progress_bars() as progress:
        whole = progress.add_task("rounds", total=sum(len(cell.missing) for cell in cells))
        part = progress.add_task("")

        def show(what: str, done: int, of: int) -> None:
            progress.update(part, description=what, completed=done, total=of)

        for cell in cells:
            if cell.missing:
                for _ in _do(cell, show):
                    progress.advance(whole)


def _do(cell: Cell, show: Callable[[str, int, int], None]) -> Iterator[Variant]:
    """Measure every variant that is missing, and yield each variant when its record is kept."""
    import torch

    from experiments.round import Network

    network = Network(cell.setting, cell.path / "network", torch.device("cpu"), show)
    with closing(network):
        honest = network.contribute(cell.setting.run, 1, None)
        kept = {digest for item in honest for digest in item.blob_digests} | {network.start(None)}
        poisoned: dict[str, list[Any]] = {}
        for variant in cell.missing:
            if variant.attack not in poisoned:
                poisoned = {variant.attack: _poisoned(cell, network, honest, variant.attack, show)}
            bad = poisoned[variant.attack]
            cell.keep(variant, _measure(cell, network, [*bad, *honest[len(bad) :]], variant, show))
            bad_digests = {digest for item in bad for digest in item.blob_digests}
            network.cloud.blobs.discard_all_but({*filter(None, kept), *bad_digests})
            yield variant


def _poisoned(cell: Cell, network: Any, honest: Sequence[Any], name: str, show: Any) -> list[Any]:
    """Make and return the contributions of the poisoned agents."""
    from ecavg.edge_agent.state import AgentState

    attack, made = ATTACKS[name], []
    for index in range(cell.num_poisoned):
        edge, item = network.edges[index], honest[index]
        if attack.flips_labels or attack.patched:
            train = _poisoned_data(attack, edge.data.train, cell.setting.run.spec.num_classes, index)
            disk = AgentState(cell.path / name / edge.agent_id, edge.agent_id)
            with closing(disk):
                bad = replace(edge, data=edge.data._replace(train=train), disk=disk)
                item = bad.contribute(1, network.start(None), network.cloud.blobs, show)
        if attack.factor != 1:
            item = _with_factor(cell, network, item, attack.factor)
        made.append(item)
    return made


def _poisoned_data(attack: Attack, train: Shard, num_classes: int, index: int) -> Shard:
    images, labels = train.inputs.copy(), train.targets.copy()
    if attack.flips_labels:
        labels = num_classes - 1 - labels
    chosen = np.random.Generator(np.random.PCG64(index)).permutation(len(labels))
    chosen = chosen[: round(attack.patched * len(labels))]
    images[chosen] = _patched(images[chosen])
    labels[chosen] = TARGET
    return Shard(images, labels)


def _patched(images: np.ndarray) -> np.ndarray:
    """Return a copy of the images with a white patch; uint8 [N, C, H, W]."""
    patched = images.copy()
    height, width = images.shape[2:]
    patched[:, :, height - max(2, height // PATCH) :, width - max(2, width // PATCH) :] = 255
    return patched


def _with_factor(cell: Cell, network: Any, item: Any, factor: float) -> Any:
    """Return the contribution with its update multiplied by the factor."""
    from ecavg.common.weights import read_state_dict, write_state_dict

    blobs, path = network.cloud.blobs, cell.path / "new.safetensors"
    start, weights = (
        read_state_dict(blobs.get(digest)) for digest in (network.start(None), item.weights_digest)
    )
    for name, tensor in weights.items():
        if tensor.is_floating_point():
            weights[name] = (start[name] + factor * (tensor - start[name])).to(tensor.dtype)
    write_state_dict(weights, path)
    digest = blobs.put(path).digest
    path.unlink()
    return replace(item, weights_digest=digest)


def _measure(cell: Cell, network: Any, contributions: Sequence[Any], variant: Variant, show: Any) -> Record:
    """Do one round as the server would, without the contributions that the gate refuses, and measure it."""
    import torch

    from ecavg.common.evaluation import predict
    from ecavg.common.models import build_model
    from ecavg.common.schema import check_finite, read_header
    from ecavg.common.weights import load_into
    from experiments import data
    from experiments.round import round_job

    run, blobs = cell.run_of(variant), network.cloud.blobs
    accepted, refused = [], []
    for item in contributions:
        try:
            check_finite(blobs.get(item.weights_digest), read_header(blobs.get(item.weights_digest)))
            accepted.append(item)
        except InvalidError as error:
            refused.append({"agent_id": item.agent_id, "reason": error.reason.value})
    images, labels = data.examples("test")

    def shares(model: Any) -> tuple[float, float]:
        """Return the share of correct predictions, and the share of images on which the patch works.

        The patch is put on the test images of the other classes. It works if the prediction is the target.
        """
        clean, patched = (
            predict(model, torch.from_numpy(each), task=task_of(run), device=torch.device("cpu"))
            .argmax(1)
            .numpy()
            for each in (images, _patched(images[labels != TARGET]))
        )
        return float((clean == labels).mean()), float((patched == TARGET).mean())

    job = round_job(run, 1, network.start(None), accepted)
    result = network.cloud.publish(job, lambda phase, *of: show(f"{variant.name}: {phase}", *of))
    if not result.weights:
        raise RunError(f"{variant.name} published nothing")
    ((average, _),) = (shares(made.model) for made in network.cloud.candidates(job, result, ("average",)))
    model = build_model(run, seed=0)
    load_into(model, blobs.get(result.weights.sha256))
    accuracy, success = shares(model)
    return {
        "accuracy": accuracy,
        "average": average,
        "success": success,
        "start": result.start,
        "refused": refused,
        "clipped": [agent.agent_id for agent in result.audit if agent.scale < 1],
        "flagged": {agent.agent_id: agent.flags for agent in result.audit if agent.flags},
        "left_out": [agent.agent_id for agent in result.audit if agent.left_out],
        "note": result.audit_note,
        "seconds": result.seconds,
    }


# ---------------------------------------------------------------------- writing the tables


def _write(arguments: argparse.Namespace, cases: Mapping[str, Sequence[Cell]]) -> None:
    figures = {name: [cell.known for cell in cells] for name, cells in cases.items()}
    for seeds in figures.values():
        for known in seeds:
            for record in known.values():
                del record["run"]
    num_poisoned = {name: cells[0].num_poisoned for name, cells in cases.items()}
    made_with = _command(arguments)
    cell = next(iter(cases.values()))[0]
    run = cell.setting.run
    each = cell.setting.num_examples // cell.setting.num_agents
    heading = (
        f"# {arguments.task}: poisoned agents\n\n`{made_with}`\n\n{run.model} on {run.dataset}, {each} images"
        f" an agent, {run.partition_by}, shared initial weights, one round. Accuracy on the common test set,"
        " mean ± standard deviation over seeds."
    )
    tables = in_words(figures, num_poisoned)
    stem = "-".join(
        [
            "poison",
            arguments.task,
            *([] if run.partition_by == "iid" else [run.partition_by.replace(":", "")]),
        ]
    )
    arguments.out_dir.mkdir(parents=True, exist_ok=True)
    table = {
        "task": arguments.task,
        "run": run.model_dump(mode="json"),
        "command": made_with,
        "figures": figures,
    }
    write_text(arguments.out_dir / f"{stem}.json", json.dumps(table, indent=1))
    write_text(arguments.out_dir / f"{stem}.md", f"{heading}\n\n{tables}")
    console.print(tables, markup=False, highlight=False, soft_wrap=True)
    console.print(f"written to {arguments.out_dir}/{stem}.*", highlight=False)


def in_words(figures: Mapping[str, Sequence[Mapping[str, Record]]], num_poisoned: Mapping[str, int]) -> str:
    """Return the tables of all cases as Markdown.

    Args:
        figures: for each case and each of its seeds, the records by the variant's name.
        num_poisoned: for each case, the number of poisoned agents.
    """
    parts = []
    for case, seeds in figures.items():
        parts += [f"## {case} agents poisoned"]
        parts += ["### The published model", _grid(seeds, "accuracy", ATTACKS)]
        parts += ["### The candidate `average`, before the fine-tune", _grid(seeds, "average", ATTACKS)]
        backdoors = [name for name, attack in ATTACKS.items() if attack.patched or name == "honest"]
        parts += [
            "### How often the patch works on the published model (test images of other classes)",
            _grid(seeds, "success", backdoors),
        ]
        parts += ["### Who was noticed", _noticed(seeds, num_poisoned[case])]
    return "\n\n".join(parts)


def _grid(seeds: Sequence[Mapping[str, Record]], field: str, attacks: Any) -> str:
    from experiments.tables import grid, spread

    rows = []
    for attack, aggregator in product(attacks, AGGREGATORS):
        cells = [
            spread([seed[Variant(attack, aggregator, defence).name][field] for seed in seeds])
            for defence in DEFENCES
        ]
        rows.append([ATTACKS[attack].label if aggregator == "mean" else "", aggregator, *cells])
    return grid(["agents", "aggregator", *DEFENCES], rows)


def _noticed(seeds: Sequence[Mapping[str, Record]], num_poisoned: int) -> str:
    """Return a table of how many poisoned and honest agents of all seeds were noticed.

    The figures are those of the aggregator "mean" with the defence "both".
    """
    from experiments.round import agent_ids
    from experiments.tables import grid

    bad, rows = set(agent_ids(num_poisoned)), []
    for name, attack in ATTACKS.items():
        records = [seed[Variant(name, "mean", "both").name] for seed in seeds]
        guilty = bad if name != "honest" else set()

        def count(field: str, records: Sequence[Record] = records, guilty: set[str] = guilty) -> str:
            of = [
                {each["agent_id"] if isinstance(each, dict) else each for each in record[field]}
                for record in records
            ]
            return f"{sum(len(ids & guilty) for ids in of)} + {sum(len(ids - guilty) for ids in of)}"

        total = len(guilty) * len(seeds)
        rows.append(
            [attack.label, str(total), *(count(field) for field in ("refused", "clipped", "flagged"))]
        )
    audit = fmean(
        record["seconds"]["audit"]
        for seed in seeds
        for record in seed.values()
        if "audit" in record["seconds"]
    )
    whole = fmean(sum(record["seconds"].values()) for seed in seeds for record in seed.values())
    table = grid(["agents", "poisoned", "refused", "clipped", "flagged"], rows)
    return (
        f"{table}\n\nPoisoned + honest ones, of all seeds. Screening took {audit:.2f} s of a round's"
        f" {whole:.2f} s in the cloud."
    )


def _command(arguments: argparse.Namespace) -> str:
    names = ["task", "seeds", "partition_by", "examples_per_agent", "cases"]
    return command.in_words("experiments.poison", arguments, names, {"partition_by": "iid", "cases": "5,10"})


if __name__ == "__main__":
    sys.exit(main())
