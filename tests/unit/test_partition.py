import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecavg.common.errors import UsageError
from ecavg.edge_agent.partition import Partition, parse_partition, partition_indices

LABELS = np.arange(1000) % 10
SEEDS = st.integers(0, 2**63 - 1)


@st.composite
def deals(draw: st.DrawFn) -> tuple[np.ndarray, int, str]:
    """Labels with gaps in them, a number of agents, and a partition_by that suits both."""
    labels = np.array(draw(st.lists(st.sampled_from([0, 1, 2, 5, 9]), min_size=1, max_size=200)))
    count = draw(st.integers(1, min(12, len(labels))))
    num_classes = len(np.unique(labels))
    alphas = st.floats(1e-3, 1e6).map("dirichlet:{}".format)
    classes = st.integers(-(-num_classes // count), num_classes).map("classes:{}".format)
    return labels, count, draw(st.just("iid") | alphas | classes)


@settings(deadline=None)
@given(deals(), SEEDS)
def test_parts_are_disjoint_complete_and_sorted(deal: tuple[np.ndarray, int, str], seed: int) -> None:
    labels, count, partition_by = deal
    parts = partition_indices(labels, count, partition_by, seed)
    assert len(parts) == count
    assert sorted(np.concatenate(parts)) == list(range(len(labels)))
    assert all(part.dtype == np.int64 and (np.diff(part) > 0).all() for part in parts)


@settings(deadline=None)
@given(deals(), SEEDS)
def test_same_seed_gives_the_same_parts(deal: tuple[np.ndarray, int, str], seed: int) -> None:
    for first, second in zip(partition_indices(*deal, seed), partition_indices(*deal, seed), strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("partition_by", ["iid", "dirichlet:0.5", "classes:4", "classes:10"])
def test_another_seed_gives_other_parts(partition_by: str) -> None:
    first, second = (partition_indices(LABELS, 3, partition_by, seed)[0] for seed in (0, 1))
    assert not np.array_equal(first, second)


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(1, 20), SEEDS)
def test_iid_parts_differ_in_size_by_one_at_most(num_examples: int, count: int, seed: int) -> None:
    count = min(count, num_examples)
    sizes = [len(part) for part in partition_indices(np.zeros(num_examples), count, "iid", seed)]
    assert max(sizes) - min(sizes) <= 1


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.data(), SEEDS)
def test_class_split_gives_everyone_k_classes_and_every_class_even_owners(
    num_classes: int, count: int, data: st.DataObject, seed: int
) -> None:
    per_agent = data.draw(st.integers(-(-num_classes // count), num_classes))
    labels = np.repeat(np.arange(num_classes), 25)
    parts = partition_indices(labels, count, f"classes:{per_agent}", seed)
    counts = np.array([np.bincount(labels[part], minlength=num_classes) for part in parts])
    assert ((counts > 0).sum(axis=1) == per_agent).all()
    owners = (counts > 0).sum(axis=0)
    assert owners.min() >= 1
    assert owners.max() - owners.min() <= 1
    for of_class in counts.T:
        assert np.ptp(of_class[of_class > 0]) <= 1


@pytest.mark.parametrize("partition_by", ["dirichlet:0.1", "dirichlet:1", "classes:3"])
def test_train_and_test_split_have_the_same_proportions(partition_by: str) -> None:
    train, test = np.repeat(np.arange(10), 6000), np.tile(np.arange(10), 1000)
    for of_train, of_test in zip(
        partition_indices(train, 4, partition_by, 7), partition_indices(test, 4, partition_by, 7), strict=True
    ):
        shares_train = np.bincount(train[of_train], minlength=10) / 6000
        shares_test = np.bincount(test[of_test], minlength=10) / 1000
        np.testing.assert_allclose(shares_train, shares_test, atol=2 / 1000)


@pytest.mark.parametrize("partition_by", ["dirichlet:0.3", "classes:3"])
def test_proportions_hold_for_a_test_split_that_lacks_a_class(partition_by: str) -> None:
    without_3 = LABELS[LABELS != 3]
    classes = np.arange(10)
    whole = partition_indices(LABELS, 5, partition_by, 1, classes=classes)
    lacking = partition_indices(without_3, 5, partition_by, 1, classes=classes)
    for of_whole, of_lacking in zip(whole, lacking, strict=True):
        expected = np.bincount(LABELS[of_whole], minlength=10)
        expected[3] = 0
        np.testing.assert_array_equal(np.bincount(without_3[of_lacking], minlength=10), expected)


def test_low_alpha_parts_classes_and_high_alpha_mixes_them() -> None:
    labels = np.repeat(np.arange(10), 1000)

    def largest_share(alpha: float) -> float:
        parts = partition_indices(labels, 2, f"dirichlet:{alpha}", 3)
        return float(np.mean(np.maximum(*(np.bincount(labels[part], minlength=10) for part in parts)) / 1000))

    assert largest_share(0.01) > 0.95
    assert largest_share(1000) < 0.55


def test_dirichlet_shares_have_the_moments_of_the_distribution() -> None:
    labels = np.repeat(np.arange(500), 200)
    count, alpha = 4, 0.5
    parts = partition_indices(labels, count, f"dirichlet:{alpha}", 11)
    shares = np.array([np.bincount(labels[part], minlength=500) for part in parts]) / 200
    np.testing.assert_allclose(shares.mean(axis=1), 1 / count, atol=0.05)
    # Var = (1/n)(1 - 1/n) / (n alpha + 1), for each of n shares.
    np.testing.assert_allclose(
        shares.var(axis=1), (1 / count) * (1 - 1 / count) / (count * alpha + 1), rtol=0.15
    )


@pytest.mark.parametrize("partition_by", ["dirichlet:0.3", "classes:2"])
def test_examples_without_a_label_are_no_class_and_are_dealt_out_evenly(partition_by: str) -> None:
    labels = np.where(np.arange(1000) % 4 == 0, -1, LABELS)
    parts = partition_indices(labels, 5, partition_by, 1)
    assert sorted(np.concatenate(parts)) == list(range(1000))
    assert [int((labels[part] < 0).sum()) for part in parts] == [50] * 5
    if partition_by == "classes:2":
        assert [len(np.unique(labels[part])) for part in parts] == [3] * 5


def test_classes_that_no_agent_would_own_are_refused() -> None:
    with pytest.raises(UsageError, match=r"2 agents with 4 classes each .* set at least classes:5"):
        partition_indices(LABELS, 2, "classes:4", 0)


def test_more_classes_than_there_are_are_refused() -> None:
    with pytest.raises(UsageError, match="classes:11: there are only 10 classes"):
        partition_indices(LABELS, 2, "classes:11", 0)


def test_more_agents_than_examples_are_refused() -> None:
    with pytest.raises(UsageError, match="1000 examples are too few for 999999999 partitions"):
        partition_indices(LABELS, 999_999_999, "iid", 0)


def test_partition_reads_back_what_it_writes() -> None:
    assert parse_partition("2/3") == Partition(index=2, count=3)
    assert str(parse_partition("2/3")) == "2/3"


@pytest.mark.parametrize("text", ["3/2", "0/2", "0/0"])
def test_partition_out_of_range_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=f"partition '{text}': I in I/N counts from 1 to N"):
        parse_partition(text)


@pytest.mark.parametrize(
    "text", ["", "1", "1/", "/2", "-1/2", "1/2/3", "1.0/2", "a/b", " 1/2", "1/2\n", "١/٢", "1/" + "9" * 5000]
)
def test_partition_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="write I/N, for example 1/2"):
        parse_partition(text)
