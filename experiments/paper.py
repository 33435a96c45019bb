"""The experiments on the paper's three results, on the gain of each part, and on devices that end up worse.

    python -m experiments.paper --task mnist --data-dir DIR --seeds 5 --table claims

The product's own code does everything in this process. With `--networked`, one round is also done with real
processes, and the two are compared. A command that was stopped goes on from there when it is started again.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ecavg.common.config import RunConfig
from ecavg.common.errors import UsageError
from ecavg.common.layers import deep_merge
from experiments import command
from experiments.command import console, write_text
from experiments.tasks import EXAMPLES_FOR_ASYNC, FOR_ASYNC, TASKS, VARIANTS, Setting

if TYPE_CHECKING:
    from experiments import slowest, worth
    from experiments.cell import Cell

    AnyCell = Cell | worth.Cell | slowest.Cell

# This limit on the number of examples means all of them.
ALL = 1_000_000_000


class Defaults(NamedTuple):
    """The values of a table's options that the command line does not give."""

    initial_weights: str
    partition_by: str
    agents: str
    variants: str
    wire: str = "float32"
    rounds: str = "2"


TABLES: Mapping[str, Defaults] = {
    "claims": Defaults("independent", "iid", "2", "plain_average,selection"),
    "parts": Defaults("independent,shared", "iid", "2", ",".join(VARIANTS)),
    "transfer": Defaults("shared", "iid,dirichlet:0.3", "2,5,10", "plain_average,selection"),
    "wire": Defaults("shared", "iid", "2", "selection,rounds", "float32,bfloat16,int8"),
    # These tables have rows of their own in place of variants.
    "worth": Defaults("shared", "iid", "2", "", rounds="1,3,5"),
    "async": Defaults("shared", "dirichlet:0.3", "4", ""),
}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parse(argv)
    return command.exit_code_of("paper", lambda: run_table(arguments))


def run_table(arguments: argparse.Namespace) -> None:
    """Measure the missing figures, then write the table.

    Raises:
        UsageError: an option asks for something impossible, such as more examples than there are.
    """
    from experiments import data, networked
    from experiments.cell import Cell

    groups = _groups(arguments, data.prepare(_run(arguments, {}), arguments.data_dir, arguments.work_dir))
    cells = [cell for group in groups.values() for cell in group]
    _work(cells, arguments.jobs)
    _write(arguments, groups)
    if arguments.networked and isinstance(cells[0], Cell):
        with console.status("starting …") as status:
            text = networked.compare(cells[0], arguments.work_dir / "networked", status.update)
        console.print(text, markup=False, highlight=False, soft_wrap=True)
        write_text(arguments.out_dir / f"{arguments.task}-networked.md", text)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m experiments.paper", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--task", choices=TASKS, required=True, help="digits is there to try things out: no data needed")
    add("--table", choices=TABLES, default="claims", help="what to find out (default: claims)")
    add("--first-seed", type=int, default=0, metavar="S", help="the first of them (default: 0)")
    add("--agents", metavar="K,…", help="one or several numbers (default: the table's)")
    add("--partition-by", metavar="P,…", help="iid, dirichlet:ALPHA or classes:K (default: the table's)")
    add("--initial-weights", metavar="W,…", help="independent, shared, … (default: the table's)")
    add("--wire", metavar="E,…", help="float32, bfloat16 or int8 (default: the table's)")
    add("--examples-per-agent", type=int, metavar="N", help="to train on (default: the task's)")
    add("--examples-in-all", type=int, metavar="N", help="of all agents together, however many there are")
    add("--test-examples", type=int, metavar="N", help="at most (default: all; in transfer the task's)")
    add("--variants", metavar="V,…", help=f"of {', '.join(VARIANTS)} (default: the table's)")
    add(
        "--rounds",
        metavar="R,…",
        help="numbers of shorter rounds, in worth several (default: the table's)",
    )
    add("--device", default="cpu", help="auto, cpu, cuda, cuda:1 (default: cpu)")
    add("--jobs", type=int, default=1, metavar="N", help="processes, each at a seed of its own (default: 1)")
    add("--networked", action="store_true", help="also one round with real processes, and compare")
    command.add_options(parser)
    arguments = parser.parse_args(argv)
    for name, value in TABLES[arguments.table]._asdict().items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    if arguments.table in ("worth", "async"):
        _check_own_rows(parser, arguments)
    elif unknown := set(arguments.variants.split(",")) - set(VARIANTS):
        parser.error(f"unknown variants {', '.join(sorted(unknown))}: choose from {', '.join(VARIANTS)}")
    arguments.round_counts = _round_counts(parser, arguments)
    if arguments.table == "claims" or arguments.networked:
        needed = TABLES["claims"].variants.split(",")
        arguments.variants = ",".join(dict.fromkeys([*needed, *arguments.variants.split(",")]))
    return arguments


def _check_own_rows(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    for name in ("variants", "networked"):
        if getattr(arguments, name):
            parser.error(f"--{name} is not for the table {arguments.table}: leave it out")
    if "," in arguments.wire:
        parser.error(f"--wire takes one encoding in the table {arguments.table}")
    if arguments.table == "async" and arguments.rounds != TABLES["async"].rounds:
        parser.error("--rounds is not for the table async, in which time ends it: leave it out")


def _round_counts(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> list[int]:
    """Return the numbers of `--rounds`: several in the table worth, one in the others."""
    texts = arguments.rounds.split(",")
    if not all(text.isdecimal() and int(text) for text in texts):
        parser.error(f"--rounds {arguments.rounds}: give numbers from 1 on, such as 1 or 1,3,5")
    if len(texts) > 1 and arguments.table != "worth":
        parser.error(f"--rounds {arguments.rounds}: give one number; only the table worth takes several")
    return [int(text) for text in texts]


def _run(arguments: argparse.Namespace, changes: Mapping[str, Any]) -> RunConfig:
    task = TASKS[arguments.task]
    for_table = {"transfer": task.for_transfer, "worth": task.for_worth, "async": FOR_ASYNC}
    run = deep_merge(deep_merge(task.run, for_table.get(arguments.table, {})), changes)
    return command.run_config(run, arguments.set)


def _groups(arguments: argparse.Namespace, folder: Path) -> dict[str, list["AnyCell"]]:
    """Return the cells of each setting, one for each seed, by the setting's name."""
    from experiments import data

    task, is_transfer = TASKS[arguments.task], arguments.table == "transfer"
    num_test = arguments.test_examples or (task.test_examples if is_transfer else ALL)
    available = len(data.read(folder, "train").targets)
    groups: dict[str, list[AnyCell]] = {}
    kinds = (arguments.initial_weights, arguments.partition_by, arguments.agents, arguments.wire)
    for initial, partition_by, agents, wire in product(*(values.split(",") for values in kinds)):
        num_agents = int(agents)
        in_all = num_agents * (arguments.examples_per_agent or task.examples_per_agent)
        if arguments.examples_in_all:
            in_all = arguments.examples_in_all
        elif is_transfer and not arguments.examples_per_agent:
            in_all = task.examples_in_all
        elif arguments.table == "async" and not arguments.examples_per_agent:
            in_all = min(num_agents * EXAMPLES_FOR_ASYNC, available)
        if in_all > available:
            raise UsageError(f"{in_all} examples are wanted, and there are {available}")
        name = f"{initial}, {partition_by}, {num_agents} agents"
        cells = groups.setdefault(f"{name}, {wire}" if arguments.table == "wire" else name, [])
        for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
            run = _run(
                arguments,
                {"seed": seed, "partition_by": partition_by, "initial_weights": initial, "wire": wire},
            )
            setting = Setting(arguments.task, run, folder, num_agents, in_all, num_test)
            cells.append(_cell(arguments, setting))
    return groups


def _cell(arguments: argparse.Namespace, setting: Setting) -> "AnyCell":
    from experiments import slowest, worth
    from experiments.cell import Cell

    if arguments.table == "async":
        slowest.check(setting.num_agents)
        path = arguments.work_dir / "async" / setting.name_of_whole_run
        return slowest.Cell(setting, path, device=arguments.device)
    if arguments.table == "worth":
        worth.check(setting.run, arguments.round_counts)
        path = arguments.work_dir / "worth" / setting.name_of_whole_run
        return worth.Cell(setting, arguments.round_counts, path, device=arguments.device)
    return Cell(
        setting,
        arguments.variants.split(","),
        arguments.work_dir / setting.name,
        device=arguments.device,
        num_rounds=arguments.round_counts[0],
        with_barrier=arguments.table == "claims",
        keep_weights=arguments.table != "transfer",
    )


# ---------------------------------------------------------------------- measuring


def _work(cells: Sequence["AnyCell"], num_jobs: int) -> None:
    todo = [each for each in cells if not each.is_done]
    if not todo:
        return
    with command.progress_bars() as progress:
        whole = progress.add_task("seeds and settings", total=len(todo))

        def finished(each: "AnyCell", seconds: float) -> None:
            progress.advance(whole)
            console.print(f"{each.path.name}: {seconds:.0f} s", highlight=False)

        if num_jobs == 1:
            part = progress.add_task("")
            for each in todo:
                started = time.monotonic()
                each.run(
                    lambda what, done, of: progress.update(part, description=what, completed=done, total=of),
                )
                finished(each, time.monotonic() - started)
            return
        with ProcessPoolExecutor(num_jobs, get_context("spawn"), initializer=command.set_up_process) as pool:
            futures = {pool.submit(_run_cell, each): each for each in todo}
            try:
                for future in as_completed(futures):
                    finished(futures[future], future.result())
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def _run_cell(each: "AnyCell") -> float:
    """Measure the cell, and return the seconds that it took; this runs in a process of its own."""
    started = time.monotonic()
    each.run(lambda *_: None)
    return time.monotonic() - started


# ---------------------------------------------------------------------- writing the table


def _write(arguments: argparse.Namespace, groups: Mapping[str, Sequence[Any]]) -> None:
    from experiments import plots, slowest, tables, worth

    own: Any = {"worth": worth, "async": slowest}.get(arguments.table)
    if own:
        figures = own.figures_of(groups)
        in_words = own.in_words(figures)
    else:
        figures = getattr(tables, arguments.table)(groups)
        in_words = getattr(tables, f"{arguments.table}_in_words")(figures)
    stem = f"{arguments.task}-{arguments.table}"
    run = _run(arguments, {}).model_dump(mode="json")
    arguments.out_dir.mkdir(parents=True, exist_ok=True)
    table = {"task": arguments.task, "run": run, "command": _command(arguments), "figures": figures}
    write_text(arguments.out_dir / f"{stem}.json", json.dumps(table, indent=1))
    heading = f"# {arguments.task}: {arguments.table}\n\n`{_command(arguments)}`\n\n{_describe(arguments)}"
    pictures = {} if arguments.table in ("wire", "async") else getattr(plots, arguments.table)(figures)
    plots.save(pictures, arguments.out_dir, stem)
    images = "\n".join(f"![{stem}{name}]({stem}{name}.svg)" for name in pictures)
    parts = [heading, in_words, *([images] if images else [])]
    write_text(arguments.out_dir / f"{stem}.md", "\n\n".join(parts))
    console.print(in_words, markup=False, highlight=False, soft_wrap=True)
    console.print(f"written to {arguments.out_dir}/{stem}.*", highlight=False)


def _command(arguments: argparse.Namespace) -> str:
    names = [
        "task", "table", "seeds", "first_seed", "agents", "partition_by", "initial_weights",
        "wire", "examples_per_agent", "examples_in_all", "test_examples", "variants", "rounds",
    ]  # fmt: skip
    defaults = {"first_seed": 0, **TABLES[arguments.table]._asdict()}
    return command.in_words("experiments.paper", arguments, names, defaults)


def _describe(arguments: argparse.Namespace) -> str:
    run = _run(arguments, {})
    trainings = (
        f"{what}: {config.epochs} epochs, {config.optimizer}, learning rate {config.learning_rate},"
        f" {config.schedule}, batches of {config.batch_size}"
        for what, config in (("pre-training", run.pretrain), ("fine-tuning", run.fine_tune))
    )
    return f"{run.model} on {run.dataset}; {'; '.join(trainings)}. Mean ± standard deviation over seeds."


if __name__ == "__main__":
    sys.exit(main())
