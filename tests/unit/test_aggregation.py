import subprocess
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import scipy.stats
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.numpy import load_file
from safetensors.torch import save_file

from ecavg.cloud_server.trainer.aggregation import (
    PIECE_ELEMENTS,
    aggregate,
    coefficients,
    geometric_median,
    mean,
    median,
    trimmed_mean,
)
from ecavg.common.config import RunConfig
from ecavg.common.errors import InvalidError, RunError

NUM_EXAMPLES = (600, 150, 1000)
AGGREGATORS = ("mean", "trimmed_mean", "median", "geometric_median")
TRIM_FRACTION = 0.25


def mlp() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 128), torch.nn.Linear(128, 10))


def write(path: Path, state_dict: dict[str, torch.Tensor]) -> Path:
    save_file(state_dict, path)
    return path


def disturbed(model: torch.nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """Return the model's state_dict with every value changed, the integers as well."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: value + torch.randn(value.shape, generator=generator)
        if value.is_floating_point()
        else value + int(torch.randint(1000, (), generator=generator))
        for name, value in model.state_dict().items()
    }


def averaged(tmp_path: Path, values: list[torch.Tensor], counts: list[float]) -> torch.Tensor:
    paths = [write(tmp_path / f"{index}", {"x": value}) for index, value in enumerate(values)]
    return mean(paths, counts)["x"]


@pytest.mark.parametrize(
    ("build", "weights"),
    [
        (mlp, "examples"),
        (mlp, "uniform"),
        (torchvision.models.mobilenet_v2, "examples"),
        (torchvision.models.mobilenet_v2, "uniform"),
        (torchvision.models.resnet50, "examples"),
    ],
)
def test_mean_is_that_of_float64_numpy(build, weights, tmp_path):
    model = build()
    paths = [write(tmp_path / f"{seed}", disturbed(model, seed)) for seed in range(len(NUM_EXAMPLES))]

    found = mean(paths, coefficients(NUM_EXAMPLES, weights))

    files = [load_file(path) for path in paths]
    fractions = np.float64(NUM_EXAMPLES if weights == "examples" else (1, 1, 1))
    assert list(found) == sorted(found, key=list(files[0]).index)
    assert set(found) == set(model.state_dict())
    for name, tensor in found.items():
        expected = np.average([file[name].astype(np.float64) for file in files], axis=0, weights=fractions)
        if files[0][name].dtype == np.int64:
            assert tensor.dtype == torch.int64
            np.testing.assert_array_equal(tensor.numpy(), np.rint(expected).astype(np.int64))
        else:
            assert tensor.dtype == torch.float32
            np.testing.assert_array_max_ulp(tensor.numpy(), expected.astype(np.float32), maxulp=1)


def test_every_float_dtype_is_averaged_in_float64_and_kept(tmp_path):
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        values = [
            torch.tensor([1.0, -3.0, 2.0**-14], dtype=dtype),
            torch.tensor([2.0, 5.0, 0.0], dtype=dtype),
        ]
        found = averaged(tmp_path, values, [1, 3])
        assert found.dtype == dtype
        assert found.tolist() == [1.75, 3.0, 2.0**-16]


def test_large_and_small_values_do_not_cancel(tmp_path):
    values = [torch.tensor([1e8]), torch.tensor([1.0]), torch.tensor([-1e8])]
    assert averaged(tmp_path, values, [1, 1, 1]).item() == np.float32(1 / 3)


@pytest.mark.parametrize(
    ("numbers", "counts", "expected"),
    [
        ((1, 2), (1, 1), 2),  # 1.5
        ((2, 3), (1, 1), 2),  # 2.5
        ((-1, -2), (1, 1), -2),  # -1.5
        ((3, 3, 4, 4, 3, 4), (1,) * 6, 4),  # 3.5, though six times 1/6 is not 1 in floating point
        ((10, 20), (3, 1), 12),  # 12.5
        ((10, 21), (3, 1), 13),  # 12.75
    ],
)
def test_integers_are_rounded_half_to_even(numbers, counts, expected, tmp_path):
    for dtype in (torch.int64, torch.int32, torch.int16, torch.int8):
        found = averaged(tmp_path, [torch.tensor(number, dtype=dtype) for number in numbers], counts)
        assert found.dtype == dtype
        assert found.item() == expected


def test_bools_go_with_the_majority_and_a_tie_is_false(tmp_path):
    values = [torch.tensor([True, True, False]), torch.tensor([True, False, False])]
    assert averaged(tmp_path, values, [1, 1]).tolist() == [True, False, False]
    assert averaged(tmp_path, values, [2, 1]).tolist() == [True, True, False]


def test_equal_contributions_average_to_themselves(tmp_path):
    value = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    assert torch.equal(averaged(tmp_path, [value] * 7, [1, 2, 3, 4, 5, 6, 7]), value)


@pytest.mark.parametrize("aggregator", AGGREGATORS)
def test_shapes_and_piece_borders_are_kept(aggregator, tmp_path):
    for shape in [(), (0,), (3, 0), (1,), (PIECE_ELEMENTS,), (PIECE_ELEMENTS + 1,), (2, PIECE_ELEMENTS)]:
        value = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        paths = [write(tmp_path / f"{factor}", {"x": factor * value}) for factor in (1, 3)]
        found = aggregate(paths, [1, 1], run_with(aggregator), compared=["x"])["x"]
        assert found.shape == value.shape
        assert torch.equal(found, 2 * value)


def test_a_contribution_of_no_examples_counts_for_nothing(tmp_path):
    values = [torch.tensor([1.0]), torch.tensor([100.0])]
    assert averaged(tmp_path, values, coefficients([5, 0], "examples")).item() == 1.0


def test_weights_by_examples_need_examples():
    with pytest.raises(RunError, match="uniform"):
        coefficients([0, 0], "examples")
    assert coefficients([0, 0], "uniform") == [1.0, 1.0]


def test_contributions_that_differ_are_not_averaged(tmp_path):
    paths = [write(tmp_path / "a", {"x": torch.zeros(2)}), write(tmp_path / "b", {"x": torch.zeros(3)})]
    with pytest.raises(RunError, match="different names, shapes or dtypes"):
        mean(paths, [1, 1])


def test_a_file_that_was_cut_off_is_an_error(tmp_path):
    path = write(tmp_path / "a", {"x": torch.zeros(100)})
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(InvalidError):
        mean([path], [1])


def test_progress_counts_every_tensor(tmp_path):
    path = write(tmp_path / "a", mlp().state_dict())
    told = []
    mean([path], [1], on_tensor=lambda done, total: told.append((done, total)))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


def weighted_mean_of(values: np.ndarray, weights: Sequence[int], compared: np.ndarray) -> np.ndarray:
    return np.average(values, axis=0, weights=weights)


def trimmed_mean_of(values: np.ndarray, weights: Sequence[int], compared: np.ndarray) -> np.ndarray:
    num_dropped = len(values) // 4  # TRIM_FRACTION
    return np.sort(values, axis=0)[num_dropped : len(values) - num_dropped].mean(axis=0)


def median_of(values: np.ndarray, weights: Sequence[int], compared: np.ndarray) -> np.ndarray:
    return np.median(values, axis=0)


def geometric_median_of(values: np.ndarray, weights: Sequence[int], compared: np.ndarray) -> np.ndarray:
    """Weiszfeld's algorithm on whole vectors, smoothed by a millionth of the median distance."""
    factors = np.float64(weights)
    for _ in range(1000):
        point = np.average(values, axis=0, weights=factors)
        distances = np.linalg.norm((values - point)[:, compared], axis=1)
        smoothing = 1e-6 * np.sort(np.repeat(distances, weights))[(sum(weights) - 1) // 2]
        previous, factors = factors, weights / np.maximum(distances, smoothing + 1e-150)
        factors /= factors.sum()
        if np.allclose(previous, factors, rtol=1e-12, atol=0):
            break
    return np.average(values, axis=0, weights=factors)


# In float64, from contributions [K, n], coefficients [K], and which elements are compared [n].
ORACLES: dict[str, Callable[[np.ndarray, Sequence[int], np.ndarray], np.ndarray]] = {
    "mean": weighted_mean_of,
    "trimmed_mean": trimmed_mean_of,
    "median": median_of,
    "geometric_median": geometric_median_of,
}


def run_with(aggregator: str, trim_fraction: float = TRIM_FRACTION) -> RunConfig:
    return RunConfig.model_validate({"aggregator": aggregator, "trim_fraction": trim_fraction})


def assert_is_what_the_oracle_says(
    aggregator: str,
    state_dicts: list[dict[str, torch.Tensor]],
    weights: list[int],
    compared: Collection[str],
    folder: Path,
) -> None:
    paths = [write(folder / f"{index}", state_dict) for index, state_dict in enumerate(state_dicts)]
    found = aggregate(paths, weights, run_with(aggregator), compared=compared)

    first = state_dicts[0]
    sizes = [tensor.numel() for tensor in first.values()]
    are_compared = [name in compared and tensor.is_floating_point() for name, tensor in first.items()]
    rows = torch.stack([torch.cat([item[name].double().flatten() for name in first]) for item in state_dicts])
    expected = torch.from_numpy(ORACLES[aggregator](rows.numpy(), weights, np.repeat(are_compared, sizes)))
    assert set(found) == set(first)
    for name, part, row in zip(first, expected.split(sizes), rows.split(sizes, dim=1), strict=True):
        dtype = first[name].dtype
        assert found[name].dtype == dtype
        assert found[name].shape == first[name].shape
        if dtype.is_floating_point:
            ulp = max(torch.finfo(dtype).eps, 1e-10) * row.abs().max()
            assert (found[name].flatten() - part).abs().max() <= ulp
        else:
            assert torch.equal(found[name].flatten(), part.round().to(dtype))


@pytest.mark.parametrize("aggregator", AGGREGATORS)
@pytest.mark.parametrize("num_contributions", [1, 2, 3, 5, 10])
def test_every_aggregator_is_its_float64_oracle_for_every_dtype(aggregator, num_contributions, tmp_path):
    generator = torch.Generator().manual_seed(num_contributions)
    floats = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

    def contribution(index: int) -> dict[str, torch.Tensor]:
        normal = torch.randn(PIECE_ELEMENTS + 3, generator=generator, dtype=torch.float64) * (1 + index)
        return {
            **{str(dtype): normal.to(dtype) for dtype in floats},
            "int64": (normal * 100).long(),
            "bool": normal > 0,
            "scalar": normal[0].float(),
            "not_compared": normal.float() ** 2 * (50 if index == 0 else 1),
        }

    state_dicts = [contribution(index) for index in range(num_contributions)]
    weights = [1 + (index * 7) % 5 for index in range(num_contributions)]
    compared = set(state_dicts[0]) - {"not_compared"}
    assert_is_what_the_oracle_says(aggregator, state_dicts, weights, compared, tmp_path)


def small_mobilenet() -> torch.nn.Module:
    return torchvision.models.mobilenet_v2(width_mult=0.25, num_classes=10)


@pytest.mark.parametrize("build", [mlp, small_mobilenet])
@pytest.mark.parametrize("aggregator", AGGREGATORS)
def test_every_aggregator_takes_state_dicts(aggregator, build, tmp_path):
    model = build()
    state_dicts = [disturbed(model, seed) for seed in range(4)]
    compared = {name for name, _ in model.named_parameters()}
    assert_is_what_the_oracle_says(aggregator, state_dicts, [600, 150, 1000, 300], compared, tmp_path)


def aggregated(
    aggregator: str,
    values: np.ndarray,
    weights: Sequence[float],
    *,
    trim_fraction: float = TRIM_FRACTION,
) -> np.ndarray:
    """Return the aggregate of the rows of a float64 array."""
    with TemporaryDirectory() as folder:
        paths = [
            write(Path(folder, str(index)), {"x": torch.tensor(row)}) for index, row in enumerate(values)
        ]
        run = run_with(aggregator, trim_fraction)
        return aggregate(paths, weights, run, compared=["x"])["x"].numpy()


def contributions_of(min_agents: int, max_agents: int = 7) -> st.SearchStrategy[np.ndarray]:
    """Rows of float64 values; ties, equal rows and rows on a line are likely."""
    shapes = st.tuples(st.integers(min_agents, max_agents), st.integers(1, 4))
    values = st.integers(-3, 3).map(float) | st.floats(-100, 100, allow_subnormal=False)
    return shapes.flatmap(lambda shape: arrays(np.float64, shape, elements=values))


same_every_time = settings(deadline=None, derandomize=True, max_examples=60)


@pytest.mark.parametrize("aggregator", AGGREGATORS)
@same_every_time
@given(contributions_of(1), st.data())
def test_the_order_of_contributions_changes_nothing(aggregator, values, data):
    weights = data.draw(st.lists(st.integers(1, 1000), min_size=len(values), max_size=len(values)))
    order = data.draw(st.permutations(range(len(values))))
    found = aggregated(aggregator, values, weights)
    reordered = aggregated(aggregator, values[order], [weights[index] for index in order])
    np.testing.assert_allclose(reordered, found, rtol=0, atol=1e-12 * np.abs(values).max())


@same_every_time
@given(contributions_of(1))
def test_a_trimmed_mean_that_trims_nothing_is_the_unweighted_mean(values):
    found = aggregated("trimmed_mean", values, [5] * len(values), trim_fraction=0)
    expected = aggregated("mean", values, [1] * len(values))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-15 * np.abs(values).max())


@same_every_time
@given(contributions_of(4), st.integers(0, 3), st.sampled_from([1e6, 1e30]))
def test_one_wild_contribution_moves_all_but_the_mean_by_no_more_than_the_others_differ(values, wild, factor):
    sane = np.delete(values, wild, axis=0)
    values[wild] = factor * (np.abs(values[wild]) + 1)
    weights = [1] * len(values)

    for aggregator in ("trimmed_mean", "median"):
        found = aggregated(aggregator, values, weights)
        assert (found >= sane.min(axis=0) - 1e-12).all()
        assert (found <= sane.max(axis=0) + 1e-12).all()
    # Minsker, "Geometric median and robust estimation in Banach spaces" (arXiv 1308.1334), lemma 2.1.
    centre = sane.mean(axis=0)
    radius = np.linalg.norm(sane - centre, axis=1).max()
    bound = radius * 2 * (len(values) - 1) / (len(values) - 2)
    moved = np.linalg.norm(aggregated("geometric_median", values, weights) - centre)
    assert moved <= bound + 1e-9 * np.abs(sane).max() + 1e-9
    assert (aggregated("mean", values, weights) > factor / 10 - 100).all()


@same_every_time
@given(contributions_of(1), st.data())
def test_no_contribution_is_nearer_to_all_than_their_geometric_median(values, data):
    weights = data.draw(st.lists(st.integers(1, 1000), min_size=len(values), max_size=len(values)))

    def objective(point: np.ndarray) -> float:
        return float(weights @ np.linalg.norm(values - point, axis=1))

    found = objective(aggregated("geometric_median", values, weights))
    others = [objective(point) for point in (*values, np.average(values, axis=0, weights=weights))]
    assert found <= min(others) * (1 + 1e-3) + 1e-9  # 1000 iterations: slowest where two sides nearly tie


@pytest.mark.parametrize("place", range(5))
@pytest.mark.parametrize("factor", [1e6, 1e30])
def test_a_far_outlier_leaves_the_geometric_median_its_digits(place, factor):
    """It pulls in its direction as hard as any other, from however far."""
    generator = np.random.default_rng(1)
    sane, direction = generator.normal(size=(4, 10)), generator.normal(size=10)
    values = np.insert(sane, place, factor * direction, axis=0)
    expected = geometric_median_of(values, [1] * 5, np.full(10, True))
    found = aggregated("geometric_median", values, [1] * 5)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("aggregator", AGGREGATORS)
@pytest.mark.parametrize("num_contributions", [1, 2, 5])
def test_equal_contributions_are_what_every_aggregator_makes_of_them(aggregator, num_contributions):
    value = np.random.default_rng(1).normal(size=1000)
    found = aggregated(aggregator, np.stack([value] * num_contributions), range(1, num_contributions + 1))
    np.testing.assert_array_max_ulp(found, value, maxulp=4)


def test_a_majority_of_equal_contributions_is_the_geometric_median():
    values = np.float64([[1, 2], [1e30, 0], [1, 2], [0, -1e30], [1, 2]])
    np.testing.assert_allclose(aggregated("geometric_median", values, [1] * 5), [1, 2], rtol=1e-9)


def test_of_two_the_geometric_median_is_the_one_with_more_examples():
    values = np.float64([[0, 0], [1, 3]])
    np.testing.assert_allclose(aggregated("geometric_median", values, [1, 2]), [1, 3], rtol=1e-5)
    np.testing.assert_allclose(aggregated("geometric_median", values, [2, 2]), [0.5, 1.5])


def test_distances_beyond_float64_are_an_error():
    with pytest.raises(RunError, match="too large"), np.errstate(all="ignore"):
        aggregated("geometric_median", np.float64([[0], [1e200], [-1e200]]), [1] * 3)


def test_what_is_not_compared_does_not_count_in_the_geometric_median(tmp_path):
    values = [
        {"x": torch.tensor(float(x)), "count": torch.tensor(x), "statistic": torch.tensor(statistic)}
        for x, statistic in [(0, 1e9), (1, 0.0), (10, 0.0)]
    ]
    paths = [write(tmp_path / f"{index}", value) for index, value in enumerate(values)]
    found = geometric_median(paths, [1, 1, 1], compared={"x", "count"})
    assert found["x"].item() == pytest.approx(1, abs=1e-5)
    assert found["count"].item() == 1
    assert torch.equal(geometric_median(paths, [1, 1, 1], compared=())["x"], mean(paths, [1, 1, 1])["x"])


@pytest.mark.parametrize(
    ("trim_fraction", "num_contributions", "num_dropped"),
    [(0.1, 9, 0), (0.1, 10, 1), (0.29, 100, 29), (1e-05, 10, 0), (0.4999999999999999, 10, 4)],
)
def test_as_many_are_trimmed_as_the_fraction_says(trim_fraction, num_contributions, num_dropped):
    values = np.arange(num_contributions, dtype=np.float64)[:, None] ** 2
    found = aggregated("trimmed_mean", values[::-1], [1] * num_contributions, trim_fraction=trim_fraction)
    assert found == values[num_dropped : num_contributions - num_dropped].mean()


@pytest.mark.parametrize("num_contributions", [*range(1, 20), 31, 32, 33, 63, 64, 65, 100])
def test_however_many_contributions_are_sorted(num_contributions):
    generator = np.random.default_rng(num_contributions)
    bits = generator.random((num_contributions, 300)) < generator.random(300)  # they show every mistake
    values = np.concatenate([bits, generator.standard_normal(bits.shape)], axis=1)
    np.testing.assert_allclose(
        aggregated("median", values, [1] * len(values)), np.median(values, axis=0), atol=1e-15
    )
    for trim_fraction in (0.1, 0.3, 0.45):
        found = aggregated("trimmed_mean", values, [1] * len(values), trim_fraction=trim_fraction)
        expected = scipy.stats.trim_mean(values, trim_fraction)
        np.testing.assert_allclose(found, expected, atol=1e-15 * len(values))


def test_trimmed_mean_and_median_round_integers_half_to_even(tmp_path):
    paths = [write(tmp_path / f"{x}", {"x": torch.tensor(x)}) for x in (1, 2, 3, 900)]
    assert median(paths[:2])["x"].item() == 2  # 1.5
    assert median(paths)["x"].item() == 2  # 2.5
    assert trimmed_mean(paths, 0.25)["x"].item() == 2  # 2.5


def test_geometric_median_tells_of_both_its_passes(tmp_path):
    path = write(tmp_path / "a", mlp().state_dict())
    told = []
    compared = {"1.weight", "2.weight"}
    geometric_median([path], [1], compared=compared, on_tensor=lambda done, total: told.append((done, total)))
    assert told == [(done, 6) for done in range(1, 7)]


def test_memory_does_not_grow_with_the_number_of_contributions(tmp_path):
    """Eight contributions of 32 MiB, in a process of its own; the result is as large as one of them."""
    large = write(tmp_path / "large", {"x": torch.arange(8 << 20, dtype=torch.float32)})
    small = write(tmp_path / "small", {"x": torch.zeros(10)})
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from ecavg.cloud_server.trainer.aggregation import aggregate\n"
        "from ecavg.common.config import RunConfig\n"
        "def peak():\n"  # getrusage would give what this process's parent had at the fork
        "    status = Path('/proc/self/status').read_text()\n"
        "    return int(status.partition('VmHWM:')[2].split()[0])\n"
        "large, small = map(Path, sys.argv[1:3])\n"
        "runs = [RunConfig(aggregator=name) for name in sys.argv[3:]]\n"
        "for run in runs:\n"
        "    aggregate([small] * 8, [1] * 8, run, compared=['x'])\n"  # loads what is loaded at the first use
        "before = peak()\n"
        "for run in runs:\n"
        "    aggregate([large] * 8, [1] * 8, run, compared=['x'])\n"
        "    print(peak() - before)\n"
    )
    command = [sys.executable, "-c", program, str(large), str(small), *AGGREGATORS]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    peaks = dict(zip(AGGREGATORS, map(int, output.split()), strict=True))
    assert all(32 * 1024 <= kibibytes < 2 * 32 * 1024 for kibibytes in peaks.values()), peaks
