"""What `make fuzz` starts from, and what it has ever found, without the fuzzer."""

from pathlib import Path

import pytest

from tests.fuzz.targets import TARGETS
from tests.processes import ROOT

CORPUS = ROOT / "tests/fuzz/corpus"
SEEDS = sorted(path for path in CORPUS.glob("*/*") if path.is_file())


@pytest.mark.parametrize("path", SEEDS, ids=lambda path: f"{path.parent.name}-{path.name[:16]}")
def test_seed_passes_or_is_refused(path: Path) -> None:
    TARGETS[path.parent.name](path.read_bytes())


def test_every_target_has_seeds() -> None:
    assert {path.parent.name for path in SEEDS} == set(TARGETS)
    assert sum(path.stat().st_size for path in SEEDS) < 1 << 20
