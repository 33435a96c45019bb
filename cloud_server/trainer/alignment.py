"""Alignment: the permutation of neurons so that corresponding neurons are averaged with each other.

Networks that learned the same function from different initial weights differ above all in the order of their
neurons, and the mean of networks in different orders is not a useful network. Weight matching (Git Re-Basin,
arXiv 2209.04836, algorithm 1) looks for the order of neurons in which one network's weights are nearest to
another's. The algorithm solves a linear assignment for one group after the other, while all other groups stay
as they are, until no group gets better.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ecavg.cloud_server.trainer.permutations import (
    Permutation,
    PermutationGroup,
    Place,
    apply,
    as_matrix,
    permute_in_place,
)
from ecavg.common.seeds import derive_seed
from ecavg.common.weights import StateDict, read_state_dict

# A gain below this part of the largest possible gain of a group is a rounding error of float32.
MIN_GAIN = 1e-6


def align(
    reference: Mapping[str, Tensor],
    other: Mapping[str, Tensor],
    groups: Sequence[PermutationGroup],
    *,
    seed: int,
    start: Sequence[Permutation] | None = None,
) -> list[Permutation]:
    """Return, for each group, the permutation that brings the neurons of `other` into the reference's order.

    The permutations maximise the inner product of all tensors, and so minimise the distance. They are a local
    optimum, because finding the best permutations of all groups together is hard. The search runs from two
    starts, and the nearer result wins. The first start is the order as it is, which suits networks that have
    not moved far from common weights. The second start is matched layer by layer from the inputs on, which
    recovers an order that is unrelated to the reference's. Where both starts are the same order, the search
    runs once.

    Running statistics are permuted, but not compared. They are in the units of activations, or in their
    square, and could outvote all weights; besides, they are computed anew after averaging.

    Args:
        reference: a state_dict with the tensors of the groups, in any floating-point dtype.
        other: a state_dict with the same names and shapes.
        groups: the permutation groups of the model.
        seed: the seed of the order in which the groups are visited.
        start: the permutations to start from, instead of the two starts.
    """
    wanted, given = _compared(groups, reference), _compared(groups, other)
    if start is not None:
        starts = [start]
    else:
        starts = [_as_it_is(groups), _from_the_inputs(groups, wanted, given)]
        if _are_equal(*starts):
            starts.pop()
    found = [_descend(groups, wanted, given, begin, seed) for begin in starts]
    return max(found, key=lambda result: result[1])[0]


def _as_it_is(groups: Sequence[PermutationGroup]) -> list[Permutation]:
    """Return the permutations that move nothing."""
    return [torch.arange(group.size) for group in groups]


def _are_equal(first: Sequence[Permutation], second: Sequence[Permutation]) -> bool:
    """Return True if all permutations of the same groups are equal."""
    return all(map(torch.equal, first, second))


def _descend(
    groups: Sequence[PermutationGroup],
    wanted: StateDict,
    given: StateDict,
    start: Sequence[Permutation],
    seed: int,
) -> tuple[list[Permutation], float]:
    """Improve the groups in random order until none gets better.

    Returns:
        The permutations, one for each group, and the similarity that they give.
    """
    permutations = list(start)
    current = _copy(given)
    for group, permutation in zip(groups, permutations, strict=True):
        _permute(group, permutation, current)
    # For each group, the groups whose costs change with its permutation. A group that is on two axes of one
    # tensor is a neighbour of itself.
    neighbours = [set().union(*crossings) for crossings in _crossings(groups)]
    generator = np.random.default_rng(seed)
    # The groups that may still get better.
    stale = set(range(len(groups)))
    while stale:
        for number in generator.permutation(sorted(stale)).tolist():
            stale.discard(number)
            group = groups[number]
            improvement = _improvement(group, group.places, wanted, current)
            if improvement is None:
                continue
            is_on_two_axes = number in neighbours[number]
            before = _similarity(wanted, current) if is_on_two_axes else 0.0
            _permute(group, improvement, current)
            # The assignment has ignored that this group moves the other axis of the tensor, too. If the step
            # has made the similarity no better, it is taken back.
            if is_on_two_axes and _similarity(wanted, current) - before <= MIN_GAIN * abs(before):
                _permute(group, torch.argsort(improvement), current)
                continue
            permutations[number] = permutations[number][improvement]
            stale |= neighbours[number]
    return permutations, _similarity(wanted, current)


def _from_the_inputs(
    groups: Sequence[PermutationGroup], wanted: StateDict, given: StateDict
) -> list[Permutation]:
    """Return permutations that match the groups in the order of the graph.

    Each group is matched only by the places that no later group permutes.
    """
    permutations: list[Permutation] = []
    current = _copy(given)
    for number, (group, crossings) in enumerate(zip(groups, _crossings(groups), strict=True)):
        settled = [
            place
            for place, others in zip(group.places, crossings, strict=True)
            if all(other < number for other in others)
        ]
        found = _improvement(group, settled, wanted, current)
        permutations.append(torch.arange(group.size) if found is None else found)
        _permute(group, permutations[-1], current)
    return permutations


def align_all(
    contributions: Sequence[Path | Mapping[str, Tensor]],
    coefficients: Sequence[float],
    groups: Sequence[PermutationGroup],
    *,
    seed: int,
) -> list[list[Permutation]]:
    """Return, for each contribution, the permutations that bring its neurons into the order of the first one.

    In the first pass, each contribution is matched to the mean of those before it. In further passes, each is
    matched to the mean of all others, until no permutation changes (MergeMany of Git Re-Basin, algorithm 3,
    in a fixed order). The memory holds at most the compared tensors of the mean, and one contribution.

    Args:
        contributions: state_dicts or safetensors files, in agent-id order.
        coefficients: the coefficients of the contributions in the mean that will be made of them.
        groups: the permutation groups of the model.
        seed: the seed of the order in which the groups are visited.

    Raises:
        RunError: a file does not hold weights.
        OSError: a file cannot be read.
    """
    aligned = [_as_it_is(groups) for _ in contributions]
    total = _scaled(_compared(groups, _load(contributions[0])), coefficients[0])
    is_settled, number_of_pass = False, 0
    while not is_settled:
        # Two contributions are aligned after one pass, because the second is matched to the first only.
        is_settled = number_of_pass > 0 or len(contributions) <= 2
        for index in range(1, len(contributions)):
            state_dict, coefficient = _load(contributions[index]), coefficients[index]
            if number_of_pass > 0:
                _add(total, apply(groups, aligned[index], state_dict), -coefficient)
            seed_here = derive_seed(seed, number_of_pass, index)
            start = aligned[index] if number_of_pass > 0 else None
            found = align(total, state_dict, groups, seed=seed_here, start=start)
            if number_of_pass > 0 and not _are_equal(found, aligned[index]):
                is_settled = False
            aligned[index] = found
            _add(total, apply(groups, found, state_dict), coefficient)
        number_of_pass += 1
    return aligned


def _load(contribution: Path | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return the state_dict of a contribution; a path is read."""
    return read_state_dict(contribution) if isinstance(contribution, Path) else contribution


def _scaled(state_dict: Mapping[str, Tensor], coefficient: float) -> StateDict:
    """Return the tensors, each multiplied by the coefficient."""
    return {name: tensor * coefficient for name, tensor in state_dict.items()}


def _add(total: StateDict, state_dict: Mapping[str, Tensor], coefficient: float) -> None:
    """Add the tensors of the state_dict, multiplied by the coefficient, to those of the total in place."""
    for name, tensor in total.items():
        tensor.add_(state_dict[name], alpha=coefficient)


def _compared(groups: Sequence[PermutationGroup], state_dict: Mapping[str, Tensor]) -> StateDict:
    """Return the tensors that are compared, in float32: those in places of groups, without statistics."""
    places = [place for group in groups for place in group.places if not place.is_statistic]
    return {place.tensor: state_dict[place.tensor].float() for place in places}


def _copy(compared: StateDict) -> StateDict:
    """Return copies of the tensors."""
    return {name: tensor.clone() for name, tensor in compared.items()}


def _permute(group: PermutationGroup, permutation: Permutation, compared: StateDict) -> None:
    """Permute the neurons of the group in the compared tensors, in place."""
    for place in group.places:
        if place.tensor in compared:
            permute_in_place(place, permutation, compared[place.tensor])


def _crossings(groups: Sequence[PermutationGroup]) -> list[list[set[int]]]:
    """Return, for each place of each group, the numbers of the groups that permute the same elements.

    Such a group has a place on another axis of the same tensor.
    """
    by_tensor: dict[str, list[tuple[int, Place]]] = {}
    for number, group in enumerate(groups):
        for place in group.places:
            by_tensor.setdefault(place.tensor, []).append((number, place))
    return [
        [
            {other for other, crossing in by_tensor[place.tensor] if _do_cross(place, crossing)}
            for place in group.places
        ]
        for group in groups
    ]


def _do_cross(first: Place, second: Place) -> bool:
    """Return True if two places of one tensor are on different axes and share elements."""
    if first.axis == second.axis:
        return False
    limited, whole = (first, second) if second.rows is None else (second, first)
    if limited.rows is None or whole.axis != 0:
        return True
    begin, end = limited.rows
    return bool(((whole.indices >= begin) & (whole.indices < end)).any())


def _improvement(
    group: PermutationGroup,
    places: Sequence[Place],
    wanted: StateDict,
    current: StateDict,
) -> Permutation | None:
    """Return the best permutation of the group's neurons while all others stay; None if none is better."""
    similarity = torch.zeros(group.size, group.size)
    for place in places:
        if not place.is_statistic:
            target, found = wanted[place.tensor], current[place.tensor]
            similarity.addmm_(as_matrix(place, target), as_matrix(place, found).t())
    costs = similarity.numpy()
    columns = linear_sum_assignment(costs, maximize=True)[1]
    gain = costs[np.arange(group.size), columns].sum(dtype=np.float64) - costs.trace(dtype=np.float64)
    return torch.from_numpy(columns) if gain > MIN_GAIN * group.size * np.abs(costs).max() else None


def _similarity(first: StateDict, second: StateDict) -> float:
    """Return the inner product of the two state_dicts, summed over tensors in float64."""
    return sum(float(torch.dot(tensor.flatten(), second[name].flatten())) for name, tensor in first.items())
