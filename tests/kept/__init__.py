"""State directories that releases have left: one archive for each, which every later release must read.

`python -m tests.kept VERSION` makes the one of this version, before it is released. An archive has a folder
for the server, one for each agent, and server.toml, the configuration of the run. It is never made anew.
Its keys and certificates belong to no server that anyone runs.
"""

import tarfile
from pathlib import Path

FOLDER = Path(__file__).parent
AGENTS = ("edge-1", "edge-2")


def archives() -> list[Path]:
    """Return the archives of all releases."""
    return sorted(FOLDER.glob("*.tar.gz"))


def unpack(archive: Path, folder: Path) -> None:
    """Unpack an archive with the modes of its files: keys are for their owner only."""
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
