import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from safetensors.numpy import load_file
from safetensors.torch import save_file

from cloud_server.trainer.aggregation import PIECE_ELEMENTS, coefficients, mean
from common.errors import InvalidError, RunError

NUM_EXAMPLES = (600, 150, 1000)


def mlp() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 128), torch.nn.Linear(128, 10))


def write(path: Path, state_dict: dict[str, torch.Tensor]) -> Path:
    save_file(state_dict, path)
    return path


def disturbed(model: torch.nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """The model's state_dict with every value changed, the integers as well."""
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


def test_shapes_and_piece_borders_are_kept(tmp_path):
    for shape in [(), (0,), (3, 0), (1,), (PIECE_ELEMENTS,), (PIECE_ELEMENTS + 1,), (2, PIECE_ELEMENTS)]:
        value = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        found = averaged(tmp_path, [value, 3 * value], [1, 1])
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


def test_memory_does_not_grow_with_the_number_of_contributions(tmp_path):
    """Eight contributions of 32 MiB, in a process of its own; the result is as large as one of them."""
    large = write(tmp_path / "large", {"x": torch.arange(8 << 20, dtype=torch.float32)})
    small = write(tmp_path / "small", {"x": torch.zeros(10)})
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from cloud_server.trainer.aggregation import mean\n"
        "def peak():\n"  # getrusage would give what this process's parent had at the fork
        "    status = Path('/proc/self/status').read_text()\n"
        "    return int(status.partition('VmHWM:')[2].split()[0])\n"
        "large, small = map(Path, sys.argv[1:])\n"
        "mean([small], [1])\n"  # loads whatever is loaded at the first use
        "before = peak()\n"
        "mean([large] * 8, [1] * 8)\n"
        "print(peak() - before)\n"
    )
    command = [sys.executable, "-c", program, str(large), str(small)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert 32 * 1024 <= int(output) < 2 * 32 * 1024
