"""The named datasets that come with packages, and the presets that use them."""

from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest

from ecavg.common.config import RunConfig
from ecavg.common.dataset import DATASETS, SUNSPOTS_WINDOW
from ecavg.common.errors import UsageError
from ecavg.common.layers import read_preset
from ecavg.edge_agent.bundles import open_bundle
from ecavg.edge_agent.partition import Partition
from tests.recipes import data_of

needs_series = pytest.mark.skipif(
    find_spec("statsmodels") is None, reason="statsmodels is not installed: pip install 'ecavg[series]'"
)


@pytest.mark.parametrize("preset", ["breast-cancer-mlp", pytest.param("sunspots-gru", marks=needs_series)])
def test_preset_has_examples_for_two_agents(preset: str) -> None:
    run = RunConfig(**read_preset(preset)["run"])
    for number in (1, 2):
        data = data_of(run, source=None, partition=Partition(number, 2))
        assert data.train.inputs.shape[1:] == run.spec.inputs.shape
        assert min(len(data.train.targets), len(data.held_out.targets)) > 20


@needs_series
def test_sunspots_of_11_years_tell_the_next_year() -> None:
    windows, targets = open_bundle("sunspots")
    assert windows.shape == (309 - SUNSPOTS_WINDOW, 1, SUNSPOTS_WINDOW)
    assert targets.shape == (309 - SUNSPOTS_WINDOW, 1)
    np.testing.assert_array_equal(windows[1:, 0, -1], targets[:-1, 0])
    assert DATASETS["sunspots"].inputs.mean == pytest.approx([targets.mean()], rel=0.05)


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(name: str) -> Any:
        return None

    monkeypatch.setattr("ecavg.edge_agent.bundles.find_spec", nothing)
    with pytest.raises(UsageError, match=r"pip install 'ecavg\[series\]'"):
        open_bundle("sunspots")
