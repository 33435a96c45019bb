"""`make soak`: random SIGKILLs of server, trainer and agents, over and over; every digest must be equal."""

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.faults.runs import AGENTS, SETTINGS, Run
from tests.processes import cluster_in

NUM_ROUNDS = 3
FINISH_SECONDS = 1200.0
PAUSE_SECONDS = (0.2, 5.0)  # between two kills: from in the middle of a restart to a good part of a round


def main() -> int:
    parser = argparse.ArgumentParser(prog="make soak", description=__doc__)
    parser.add_argument("--kills", type=int, default=200, help="how many, over all runs (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="of whom to kill, and when (default: 0)")
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        undisturbed = one_run(Path(folder) / "undisturbed", Killer(chance, 0))
        print(f"undisturbed: {', '.join(undisturbed)}", flush=True)
        kills: Counter[str] = Counter()
        number = 0
        while kills.total() < arguments.kills:
            number += 1
            killer = Killer(chance, arguments.kills - kills.total())
            digests = one_run(Path(folder) / f"run-{number}", killer)
            kills += killer.kills
            is_equal = digests == undisturbed
            print(
                f"run {number}: {killer.kills.total()} kills ({describe(killer.kills)}),"
                f" digests {'equal' if is_equal else f'DIFFER: {digests}'}",
                flush=True,
            )
            if not is_equal:
                return 1
    print(
        f"{kills.total()} kills ({describe(kills)}) in {number} runs of {NUM_ROUNDS} rounds,"
        f" {time.monotonic() - started:.0f} s: every digest equal, the last one {undisturbed[-1]}"
    )
    return 0


class Killer:
    """Kills one of a run's processes now and then."""

    def __init__(self, chance: random.Random, most: int) -> None:
        self.kills: Counter[str] = Counter()
        self._chance = chance
        self._most = most
        self._due = time.monotonic() + chance.uniform(*PAUSE_SECONDS)

    def __call__(self, run: Run) -> None:
        if self.kills.total() >= self._most or time.monotonic() < self._due:
            return
        if not any(run.is_running(name) for name in AGENTS):
            return  # the server is about to leave, and gives agents half a minute to come back each time
        self._due = time.monotonic() + self._chance.uniform(*PAUSE_SECONDS)
        victim = self._chance.choice(("server", "trainer", *AGENTS))
        if run.kill(victim):
            self.kills[victim] += 1


def one_run(folder: Path, killer: Killer) -> list[str]:
    with cluster_in(folder) as cluster:
        run = Run(cluster, (*SETTINGS, "--rounds", NUM_ROUNDS))
        run.start()
        return run.finish(FINISH_SECONDS, killer)


def describe(kills: Counter[str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in sorted(kills.items()))


if __name__ == "__main__":
    sys.exit(main())
