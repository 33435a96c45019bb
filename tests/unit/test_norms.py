"""Norms and clipping, against what NumPy computes in float64."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ecavg.cloud_server.trainer.aggregation import PIECE_ELEMENTS
from ecavg.cloud_server.trainer.norms import clip, scales, update_norms
from ecavg.common.errors import RunError
from ecavg.common.weights import StateDict, read_state_dict, write_state_dict

STATISTICS = ("norm.running_mean", "norm.running_var")


def drawn(seed: int, dtype: torch.dtype = torch.float32) -> StateDict:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return {
        "0.weight": normal(3, PIECE_ELEMENTS // 2),  # more than one piece
        "0.bias": normal(7),
        "scalar": normal(),
        "norm.weight": normal(5),
        "norm.running_mean": normal(5) * 1000,
        "norm.running_var": normal(5).abs() * 1000,
        "norm.num_batches_tracked": torch.tensor(seed),
        "mask": torch.tensor([True, False, seed % 2 == 0]),
    }


def written(state_dict: StateDict, path: Path) -> Path:
    write_state_dict(state_dict, path)
    return path


def norm_of(state_dict: StateDict, start: StateDict | None) -> float:
    """Independently: all of it at once, in NumPy."""
    parts = [
        (tensor.double().numpy() - (start[name].double().numpy() if start else 0)).ravel()
        for name, tensor in state_dict.items()
        if tensor.is_floating_point() and name not in STATISTICS
    ]
    return float(np.linalg.norm(np.concatenate(parts)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("has_start", [True, False])
def test_norms_are_those_of_numpy(tmp_path: Path, dtype: torch.dtype, has_start: bool) -> None:
    start = drawn(0, dtype) if has_start else None
    base = written(start, tmp_path / "base") if start else None
    sent = [drawn(seed, dtype) for seed in (1, 2, 3)]
    paths = [written(each, tmp_path / str(index)) for index, each in enumerate(sent)]
    found = update_norms(paths, base)
    assert found == pytest.approx([norm_of(each, start) for each in sent], rel=1e-12)
    assert update_norms(paths, base) == found  # bit by bit


def test_what_was_not_trained_has_the_norm_zero(tmp_path: Path) -> None:
    base = written(drawn(0), tmp_path / "base")
    assert update_norms([base, base], base) == [0.0, 0.0]


def test_other_files_are_no_updates(tmp_path: Path) -> None:
    base = written(drawn(0), tmp_path / "base")
    other = written({"0.bias": torch.ones(7)}, tmp_path / "other")
    with pytest.raises(RunError, match="different names"):
        update_norms([other], base)


@pytest.mark.parametrize(
    ("norms", "ratio", "expected"),
    [
        ([1.0, 2.0, 3.0], 3.0, [1.0, 1.0, 1.0]),
        ([1.0, 2.0, 6.0, 2.0, 2.0], 3.0, [1.0] * 5),  # at the limit
        ([1.0, 2.0, 2000.0], 3.0, [1.0, 1.0, 6.0 / 2000.0]),
        ([1.0, 1.0, 1.0, 500.0, 500.0], 2.0, [1.0, 1.0, 1.0, 2.0 / 500.0, 2.0 / 500.0]),
        ([1.0, 1.0, math.inf], 3.0, [1.0, 1.0, 0.0]),
        ([0.0, 0.0, 5.0], 3.0, [1.0, 1.0, 0.0]),
        ([1.0, 2.0, 2000.0], 0.0, [1.0, 1.0, 1.0]),  # any is allowed
    ],
)
def test_what_is_beyond_a_multiple_of_the_median_is_scaled_down_to_it(
    norms: list[float], ratio: float, expected: list[float]
) -> None:
    assert scales(norms, ratio) == expected


@pytest.mark.parametrize("has_start", [True, False])
def test_clipped_update_has_the_direction_it_had_and_the_norm_it_should_have(
    tmp_path: Path, has_start: bool
) -> None:
    start = drawn(0) if has_start else None
    base = written(start, tmp_path / "base") if start else None
    sent, scale = drawn(1), 0.125
    path = written(sent, tmp_path / "sent")
    clip(path, base, scale, tmp_path / "clipped")
    clipped = read_state_dict(tmp_path / "clipped")
    assert clipped.keys() == sent.keys()
    for name, tensor in sent.items():
        assert (clipped[name].dtype, clipped[name].shape) == (tensor.dtype, tensor.shape)
        if not tensor.is_floating_point():
            assert torch.equal(clipped[name], tensor)
            continue
        origin = start[name].double().numpy() if start else 0.0
        expected = origin + scale * (tensor.double().numpy() - origin)
        np.testing.assert_array_max_ulp(clipped[name].numpy(), expected.astype(np.float32), maxulp=1)
    (norm,) = update_norms([tmp_path / "clipped"], base)
    assert norm == pytest.approx(scale * norm_of(sent, start), rel=1e-6)


@pytest.mark.parametrize("factor", [1e30, 3e38])
def test_float32_at_its_end_is_clipped_to_the_limit(tmp_path: Path, factor: float) -> None:
    base = written(drawn(0), tmp_path / "base")
    honest = [written(drawn(seed), tmp_path / str(seed)) for seed in (1, 2)]
    huge = {
        name: (tensor.sign() * factor if tensor.is_floating_point() else tensor)
        for name, tensor in drawn(3).items()
    }
    path = written(huge, tmp_path / "huge")
    norms = update_norms([*honest, path], base)
    assert norms[2] == pytest.approx(norm_of(huge, None), rel=1e-6)
    scale = scales(norms, 3.0)[2]
    clip(path, base, scale, tmp_path / "clipped")
    clipped = read_state_dict(tmp_path / "clipped")
    assert all(tensor.isfinite().all() for tensor in clipped.values())
    limit = 3 * float(np.median(norms))
    assert update_norms([tmp_path / "clipped"], base)[0] == pytest.approx(limit, rel=1e-6)


def test_float64_at_its_end_is_infinitely_far_and_becomes_the_start(tmp_path: Path) -> None:
    far, opposite = torch.full((100,), 1.7e308, dtype=torch.float64), -1.7e308
    base = written({"weight": torch.full_like(far, opposite)}, tmp_path / "base")
    near = written({"weight": torch.full_like(far, 0.5 * opposite)}, tmp_path / "near")
    path = written({"weight": far}, tmp_path / "far")
    norms = update_norms([near, base, path], base)
    assert norms == [pytest.approx(0.85e308 * 10), 0.0, math.inf]
    clip(path, base, scales([1.0, 1.0, math.inf], 3.0)[2], tmp_path / "clipped")
    assert torch.equal(read_state_dict(tmp_path / "clipped")["weight"], read_state_dict(base)["weight"])
