"""Reads `pip config list` and writes a pip.conf that says the same; prints what a build must mount for it.

The options of the environment win over those of the files, as they do for pip itself.
"""

import ast
import re
import sys
from pathlib import Path


def main(target: Path) -> None:
    options: dict[str, str] = {}
    for line in sorted(sys.stdin, key=lambda line: line.startswith(":env:")):
        key, _, value = line.strip().partition("=")
        options[key.split(".", 1)[1]] = ast.literal_eval(value)
    lines = [f"{key} = {' '.join(value.split())}" for key, value in options.items()]
    target.write_text("\n".join(["[global]", *lines, ""]))

    mounts = {target: Path("/etc/pip.conf")} | {path: path for path in local_paths(options.values())}
    for source, destination in mounts.items():
        print(f"--volume={source}:{destination}:ro")


def local_paths(values) -> set[Path]:
    """Files and folders that options name; of a local index also what is beside it, where its files are."""
    found = set()
    for word in " ".join(values).split():
        if match := re.fullmatch(r"(file://)?(/.+)", word):
            path = Path(match[2])
            found |= {path.parent if match[1] else path}
    return {path for path in found if path.exists()}


main(Path(sys.argv[1]))
