"""Alignment: the same neurons in the same places, before networks are averaged.

Networks that learned the same from different initial weights differ above all in the order of their
neurons, and the mean of two different orders is neither. Weight matching (Git Re-Basin, arXiv 2209.04836,
algorithm 1) looks for the order in which one network's weights are nearest to another's: group by group, a
linear assignment that takes the other groups as they are, until none of them gets any better.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from cloud_server.trainer.permutations import (
    Permutation,
    PermutationGroup,
    Place,
    apply,
    as_matrix,
    permute_in_place,
)
from common.training import derive_seed
from common.weights import StateDict, read_state_dict

# A gain below this part of what a group could be worth is rounding of float32.
MIN_GAIN = 1e-6


def align(
    reference: Mapping[str, Tensor],
    other: Mapping[str, Tensor],
    groups: Sequence[PermutationGroup],
    *,
    seed: int,
    start: Sequence[Permutation] | None = None,
) -> list[Permutation]:
    """The permutations, one for each group, that bring the neurons of `other` into the reference's order.

    They maximise the inner product of all tensors, which minimises the distance: locally, since finding
    the best for all groups together is hard. Descent begins twice, from the order as it is (right for
    networks that have not moved far from common weights) and from one that is matched layer by layer from
    the inputs on (which recovers an order that has nothing to do with the reference's); the nearer wins.

    Running statistics are permuted, but are not compared: they follow from the weights, are in the units of
    activations (variances in their square), so that large ones would outvote all weights, and are computed
    anew after averaging.

    Args:
        reference, other: with the names and shapes of the groups; any floating-point dtype.
        seed: of the order in which the groups are visited.
        start: where to begin instead.
    """
    wanted, given = _compared(groups, reference), _compared(groups, other)
    if start is not None:
        starts = [start]
    else:
        starts = [[torch.arange(group.size) for group in groups], _from_the_inputs(groups, wanted, given)]
    found = [_descend(groups, wanted, given, begin, seed) for begin in starts]
    return max(found, key=lambda result: result[1])[0]


def _descend(
    groups: Sequence[PermutationGroup],
    wanted: StateDict,
    given: StateDict,
    start: Sequence[Permutation],
    seed: int,
) -> tuple[list[Permutation], float]:
    """Visit the groups in random order until none of them gets any better; also the similarity then."""
    permutations = list(start)
    current = _copy(given)
    for group, permutation in zip(groups, permutations, strict=True):
        _permute(group, permutation, current)
    # The groups whose costs a group's permutation changes: itself where it is on two axes of a tensor.
    neighbours = [set().union(*crossings) for crossings in _crossings(groups)]
    generator = np.random.default_rng(seed)
    stale = set(range(len(groups)))  # may get better
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
            # The costs took the other axis for settled, so that the step may have been a wrong one.
            if is_on_two_axes and _similarity(wanted, current) - before <= MIN_GAIN * abs(before):
                _permute(group, torch.argsort(improvement), current)
                continue
            permutations[number] = permutations[number][improvement]
            stale |= neighbours[number]
    return permutations, _similarity(wanted, current)


def _from_the_inputs(
    groups: Sequence[PermutationGroup], wanted: StateDict, given: StateDict
) -> list[Permutation]:
    """Match the groups in the order of the graph, by what depends on no group that is still to come."""
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
    """For each contribution the permutations that bring all of them into the order of the first.

    Each is matched to the mean of those before it, then, until nothing changes, to the mean of all others
    (MergeMany of Git Re-Basin, algorithm 3, in a fixed order). In memory are at most the compared tensors
    of the mean, and one contribution.

    Args:
        contributions: state_dicts or safetensors files, in agent-id order.
        coefficients: of the mean that will be made of them.

    Raises:
        RunError, OSError: a file cannot be read.
    """
    aligned = [[torch.arange(group.size) for group in groups] for _ in contributions]
    total = _scaled(_compared(groups, _load(contributions[0])), coefficients[0])
    is_settled, number_of_pass = False, 0
    while not is_settled:
        # Two are done after one pass: the first has no other but the second.
        is_settled = number_of_pass > 0 or len(contributions) <= 2
        for index in range(1, len(contributions)):
            state_dict, coefficient = _load(contributions[index]), coefficients[index]
            if number_of_pass > 0:
                _add(total, apply(groups, aligned[index], state_dict), -coefficient)
            seed_here = derive_seed(seed, number_of_pass, index)
            start = aligned[index] if number_of_pass > 0 else None
            found = align(total, state_dict, groups, seed=seed_here, start=start)
            if number_of_pass > 0 and not all(map(torch.equal, found, aligned[index])):
                is_settled = False
            aligned[index] = found
            _add(total, apply(groups, found, state_dict), coefficient)
        number_of_pass += 1
    return aligned


def _load(contribution: Path | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return read_state_dict(contribution) if isinstance(contribution, Path) else contribution


def _scaled(state_dict: Mapping[str, Tensor], coefficient: float) -> StateDict:
    return {name: tensor * coefficient for name, tensor in state_dict.items()}


def _add(total: StateDict, state_dict: Mapping[str, Tensor], coefficient: float) -> None:
    for name, tensor in total.items():
        tensor.add_(state_dict[name], alpha=coefficient)


def _compared(groups: Sequence[PermutationGroup], state_dict: Mapping[str, Tensor]) -> StateDict:
    """The tensors that are compared, in float32."""
    places = [place for group in groups for place in group.places if not place.is_statistic]
    return {place.tensor: state_dict[place.tensor].float() for place in places}


def _copy(compared: StateDict) -> StateDict:
    return {name: tensor.clone() for name, tensor in compared.items()}


def _permute(group: PermutationGroup, permutation: Permutation, compared: StateDict) -> None:
    for place in group.places:
        if place.tensor in compared:
            permute_in_place(place, permutation, compared[place.tensor])


def _crossings(groups: Sequence[PermutationGroup]) -> list[list[set[int]]]:
    """For each place of each group the groups on another axis of its tensor: they change what it holds."""
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
    """The best permutation of the group's neurons while all others stay; None if none is better."""
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
    """The inner product of all tensors, summed over tensors in float64."""
    return sum(float(torch.dot(tensor.flatten(), second[name].flatten())) for name, tensor in first.items())
