"""`python -m tests.fuzz TARGET [options and folders of libFuzzer]`: guided by coverage."""

import sys

import atheris

with atheris.instrument_imports(
    include=["common", "ecavg.cloud_server.config", "ecavg.edge_agent.config", "tomllib"]
):
    from tests.fuzz.targets import TARGETS
from tests.fuzz.mutation import mutated


def mutate(content: bytes, max_size: int, seed: int) -> bytes:
    return mutated(content, max_size, seed, atheris.Mutate)


def main() -> None:
    program, target, *options = sys.argv
    if target not in TARGETS:
        sys.exit(f"choose one of {', '.join(TARGETS)}")
    # By itself libFuzzer seldom hits upon a header whose length and JSON are right.
    mutator = None if target == "config" else mutate
    atheris.Setup([program, *options], TARGETS[target], custom_mutator=mutator)
    atheris.Fuzz()


main()
