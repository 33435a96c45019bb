import math
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from ecavg.common.comparison import Comparison, compare, objection
from ecavg.common.evaluation import Evaluation


def predictions(
    num_right_before: int, num_right_after: int, num_examples: int
) -> tuple[Evaluation, Evaluation]:
    """Two models of which the better one knows all that the other knows."""
    examples = torch.arange(num_examples)
    return evaluation(examples < num_right_before), evaluation(examples < num_right_after)


def evaluation(scores: Tensor) -> Evaluation:
    return Evaluation(scores.float().mean().item(), 0.0, len(scores), scores.float(), {})


def counted(num_examples: int, num_gained: int, num_lost: int) -> Comparison:
    """Return the comparison of models that are right or wrong about an example."""
    return Comparison(num_examples, num_gained - num_lost, num_gained + num_lost)


def test_examples_gained_and_lost_are_counted() -> None:
    before = np.array([True, True, True, False, False, False])
    after = np.array([True, False, False, True, False, False])
    assert compare(before, after) == Comparison(num_examples=6, total=-1, squares=3)


def test_tolerance_is_the_standard_error_by_hand() -> None:
    # Differences -1, -1, -1, 1, 0: mean -2/5; squares about it 3 * 9/25 + 49/25 + 4/25 = 80/25; / 4 / 5.
    assert counted(5, num_gained=1, num_lost=3).tolerance == pytest.approx(math.sqrt(0.16))


@pytest.mark.parametrize(
    ("num_right_before", "num_right_after", "is_worse"),
    [
        (182, 168, True),  # 14 lost: mean -0.07, standard error sqrt(0.0651 / 199) = 0.0181
        (182, 180, True),  # 2 lost: -0.01 against 0.0071
        (182, 181, False),  # 1 lost: exactly one standard error
        (182, 182, False),
        (168, 182, False),
        (200, 0, True),  # all equal: no spread, no tolerance
        (0, 200, False),
    ],
)
def test_model_that_loses_more_than_the_tolerance_is_objected_to(
    num_right_before: int, num_right_after: int, is_worse: bool
) -> None:
    assert bool(objection(*predictions(num_right_before, num_right_after, 200), "accuracy")) is is_worse


def test_gains_widen_the_tolerance() -> None:
    """The same mean, -0.05, with a standard error of 0.021 and of 0.061."""
    assert counted(200, num_gained=4, num_lost=14).is_worse
    assert counted(200, num_gained=70, num_lost=80).is_worse is False


@pytest.mark.parametrize(("before", "after"), list(product([False, True], repeat=2)))
def test_single_example_must_not_be_lost(before: bool, after: bool) -> None:
    comparison = compare(np.array([before]), np.array([after]))
    assert comparison.is_worse is (before and not after)
    assert comparison.tolerance == 0


@pytest.mark.parametrize("num_examples", [2, 3, 7, 12])
def test_rule_is_that_of_the_mean_and_its_standard_error(num_examples: int) -> None:
    """In fractions, so that the boundary is met exactly."""
    for num_gained in range(num_examples + 1):
        for num_lost in range(num_examples + 1 - num_gained):
            comparison = counted(num_examples, num_gained, num_lost)
            rest = num_examples - num_gained - num_lost
            differences = [Fraction(d) for d in [1] * num_gained + [-1] * num_lost + [0] * rest]
            mean = sum(differences) / num_examples
            variance = sum((d - mean) ** 2 for d in differences) / (num_examples - 1) / num_examples
            assert comparison.is_worse is (mean < 0 and mean**2 > variance), comparison
            assert comparison.tolerance == pytest.approx(math.sqrt(variance))


def test_objection_says_what_was_measured() -> None:
    assert objection(*predictions(182, 168, 200), "accuracy") == (
        "accuracy 0.9100 → 0.8400 on 200 held-out examples, worse by more than the tolerance 0.0181"
    )
