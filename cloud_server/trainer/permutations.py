"""Permutation groups: neurons of a network that may change places, and the parts of tensors that move too.

The groups are found by one run of the model's graph (torch.fx, in eval mode). Together with each value, two
tensors of the same shape pass through the graph. `units` holds the neuron to which each element belongs, and
`positions` the place of the element within its neuron (pixel, image of the batch). In the whole graph, unit
and position together determine the value. Operations that only move elements (flatten, chunk, cat, permute …)
are applied to all three tensors. Every other operation makes new units and records

- ties: a new unit moves together with the units from which it is computed, channel by channel;
- uses: an operation meets a unit, above all at some index of some tensor.

Tied units form a slot. Slots that are met by the same uses are interchangeable, and make a group. This
checks on every element whether a slot can be swapped with another, and assumes nothing about architectures.
Some units are tied to FIXED, which never moves: the inputs and outputs of an operation that is not known, and
the inputs and outputs of the model.
"""

import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.utils._pytree import tree_leaves, tree_map_only

from ecavg.common.weights import StateDict

# int64 [size]: the neuron in place permutation[i] goes to place i.
Permutation = Tensor

# The unit that never moves.
FIXED = 0


class NotTraceable(Exception):
    """The error that a model's graph cannot be traced, or leaves out a part of the model."""


class Place(NamedTuple):
    """The indices of a group's neurons along one axis of one tensor of the state_dict."""

    tensor: str
    axis: int
    # int64 [repeats, size]; column i has the indices of neuron i. Most places have one row. After the
    # flattening of a convolution's output there are H*W rows. In a concatenation the indices begin at any
    # offset.
    indices: Tensor
    # The part of axis 0 to which the place is limited, for the input channels of one group of a grouped
    # convolution.
    rows: tuple[int, int] | None
    # True for a buffer, whose values follow from the weights.
    is_statistic: bool


class PermutationGroup(NamedTuple):
    """A group of `size` interchangeable neurons or channels, which are permuted in all places at once."""

    size: int
    places: tuple[Place, ...]


def permutation_groups(model: nn.Module, inputs: Tensor) -> list[PermutationGroup]:
    """Return the groups of the model, in the order of its graph.

    No permutation of any group changes the model's outputs. The groups may be incomplete: neurons are left
    out if it is not certain that permuting them is sound.

    Args:
        model: the model, which stays as it is; the values of its tensors do not matter.
        inputs: two inputs of the model, [2, …], whose values do not matter.

    Raises:
        NotTraceable: torch.fx cannot trace the model, or a parameter takes no part in the graph, so that it
            is unknown how the parameter depends on the order of neurons.
    """
    was_training = {module: module.training for module in model.modules()}
    try:
        flow = _FlowThrough(fx.symbolic_trace(model.eval()), model)
        example = next(model.parameters(), torch.empty(0))
        is_real = inputs.is_floating_point()
        inputs = inputs.to(example.device, example.dtype if is_real else inputs.dtype)
        with torch.no_grad():
            flow.run(inputs)
    except Exception as error:
        # Tracing and running a user's model can raise any exception.
        raise NotTraceable(next(iter(str(error).splitlines()), "") or type(error).__name__) from error
    finally:
        for module, training in was_training.items():
            module.training = training
    for name, parameter in model.named_parameters():
        if id(parameter) not in flow.seen:
            raise NotTraceable(f"parameter {name} takes no part in the graph")
    return flow.ledger.groups(flow.names)


def apply(
    groups: Sequence[PermutationGroup], permutations: Sequence[Permutation], state_dict: Mapping[str, Tensor]
) -> StateDict:
    """Return the state_dict with its neurons permuted; tensors that do not change are not copied."""
    moving = {
        place.tensor
        for group, permutation in zip(groups, permutations, strict=True)
        if not torch.equal(permutation, torch.arange(group.size))
        for place in group.places
    }
    permuted = {name: tensor.clone() if name in moving else tensor for name, tensor in state_dict.items()}
    for group, permutation in zip(groups, permutations, strict=True):
        for place in group.places:
            if place.tensor in moving:
                permute_in_place(place, permutation, permuted[place.tensor])
    return permuted


def permute_in_place(place: Place, permutation: Permutation, tensor: Tensor) -> None:
    """Permute the neurons of the place in the tensor, in place; all other elements stay."""
    part = _rows(tensor, place)
    moved = part.index_select(place.axis, place.indices[:, permutation].flatten())
    part.index_copy_(place.axis, place.indices.flatten(), moved)


def as_matrix(place: Place, tensor: Tensor) -> Tensor:
    """Return a copy of the elements of each neuron in the tensor: [size, elements of a neuron]."""
    part = _rows(tensor, place)
    picked = part.index_select(place.axis, place.indices.t().flatten()).movedim(place.axis, 0)
    return picked.reshape(place.indices.shape[1], -1)


def _rows(tensor: Tensor, place: Place) -> Tensor:
    """Return the part of the tensor to which the place is limited, as a view."""
    return tensor if place.rows is None else tensor[place.rows[0] : place.rows[1]]


class _Target(NamedTuple):
    """One axis of one tensor, or of some rows of the tensor, where operations meet units."""

    tensor: str
    axis: int
    rows: tuple[int, int] | None = None
    is_statistic: bool = False


class _Use(NamedTuple):
    """One use of units: an operation meets units[i] at index i of each target.

    Units of different kinds, kinds[i], are treated in different ways, and cannot change places.
    """

    targets: tuple[_Target, ...]
    # int64 [n].
    units: Tensor
    # int64 [n].
    kinds: Tensor


class _Ledger:
    """The record of all units, ties and uses, and the groups that follow from them."""

    def __init__(self) -> None:
        self._num_units = 1
        # The first unit of each block; a block is the units that one operation has made.
        self._block_starts = [0]
        self._ties: list[tuple[Tensor, Tensor]] = []
        self._uses: list[_Use] = []
        self._units_at: dict[_Target, Tensor] = {}
        self._ways: dict[str, object] = {}
        self._frozen: set[str] = set()

    def new_block(self, size: int, targets: Sequence[_Target] = (), kinds: Tensor | None = None) -> Tensor:
        """Return new units, made by an operation whose parameters for these units are the targets."""
        units = torch.arange(self._num_units, self._num_units + size)
        self._block_starts.append(self._num_units)
        self._num_units += size
        self.use(units, targets, kinds)
        return units

    def use(self, units: Tensor, targets: Sequence[_Target] = (), kinds: Tensor | None = None) -> None:
        """Record a use of the units; without `kinds`, all units are of the same kind."""
        self._uses.append(_Use(tuple(targets), units, torch.zeros_like(units) if kinds is None else kinds))
        for target in targets:
            # If a tensor is used twice, both uses must be permuted in the same way.
            self.tie(units, self._units_at.setdefault(target, units))

    def tie(self, units: Tensor, others: Tensor) -> None:
        """Record that units[i] and others[i] move together."""
        self._ties.append((units, others))

    def fix(self, units: Tensor) -> None:
        """Record that the units never move."""
        unique = torch.unique(units)
        self.tie(unique, torch.full_like(unique, FIXED))

    def freeze(self, tensor: str) -> None:
        """Record that the tensor must not be permuted on any axis."""
        self._frozen.add(tensor)

    def used_as(self, tensor: str, way: object) -> None:
        """Record the way in which an operation uses the tensor; freeze a tensor that is used in several ways.

        A tensor that is used in several ways may need a different permutation for each of them.
        """
        if self._ways.setdefault(tensor, way) != way:
            self.freeze(tensor)

    def groups(self, names: Mapping[str, Sequence[str]]) -> list[PermutationGroup]:
        """Return the groups, in which a tensor with several names has a place under each name.

        Args:
            names: all names of each tensor, by its first name.
        """
        if not self._uses:
            # No operation is known, so nothing may move.
            return []
        for use in self._uses:
            if any(target.tensor in self._frozen for target in use.targets):
                self.fix(use.units)
        slots_by_signature: dict[bytes, list[NDArray[np.int64]]] = {}
        signatures: dict[bytes, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}
        for uses, keys, indices in self._slots():
            signature = keys.tobytes()
            signatures[signature] = uses, keys
            slots_by_signature.setdefault(signature, []).append(indices)
        groups = []
        for signature, slots in slots_by_signature.items():
            if len(slots) > 1:
                places = self._places(signatures[signature][0], np.stack(slots, axis=1), names)
                if places:
                    groups.append(PermutationGroup(len(slots), places))
        return groups

    def _slots(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]]:
        """Yield, for every slot that can move, the uses that meet it, their sorted keys and the indices.

        A key identifies the use, the kind, and the block of the unit that is met. A slot that has the same
        key twice is left out, because it is unknown which index of one slot corresponds to which of another.
        """
        slots = self._slot_of_units()
        units = np.concatenate([use.units.numpy() for use in self._uses])
        kinds = np.concatenate([use.kinds.numpy() for use in self._uses])
        indices = np.concatenate([np.arange(len(use.units)) for use in self._uses])
        uses = np.repeat(np.arange(len(self._uses)), [len(use.units) for use in self._uses])
        blocks = np.searchsorted(self._block_starts, units, side="right")
        keys = (uses * (int(kinds.max()) + 1) + kinds) * (len(self._block_starts) + 1) + blocks
        order = np.lexsort((keys, slots[units]))
        order = order[slots[units][order] != slots[FIXED]]
        bounds = np.flatnonzero(np.diff(slots[units][order])) + 1
        found = [piece for piece in np.split(order, bounds) if len(piece)]
        found.sort(key=lambda piece: (int(uses[piece[0]]), int(indices[piece[0]])))
        for piece in found:
            if (np.diff(keys[piece]) > 0).all():
                yield uses[piece], keys[piece], indices[piece]

    def _slot_of_units(self) -> NDArray[np.int64]:
        """Return the number of each unit's slot; a slot is a connected component of the ties."""
        first, second = (torch.cat(ends).numpy() for ends in zip(*self._ties, strict=True))
        shape = (self._num_units, self._num_units)
        graph = coo_array((np.ones(len(first), dtype=np.int8), (first, second)), shape=shape)
        return np.asarray(connected_components(graph, directed=False)[1], dtype=np.int64)

    def _places(
        self, uses: NDArray[np.int64], indices: NDArray[np.int64], names: Mapping[str, Sequence[str]]
    ) -> tuple[Place, ...]:
        """Return the places for the indices [uses, size]; none if neurons overlap in a tensor."""
        found: dict[_Target, dict[bytes, NDArray[np.int64]]] = {}
        for use, row in zip(uses, indices, strict=True):
            for target in self._uses[use].targets:
                found.setdefault(target, {})[row.tobytes()] = row
        places = []
        for target, rows in found.items():
            repeated = torch.from_numpy(np.stack(list(rows.values())))
            if len(torch.unique(repeated)) != repeated.numel():
                return ()
            for name in names[target.tensor]:
                places.append(Place(name, target.axis, repeated, target.rows, target.is_statistic))
        return tuple(places)


@dataclass(frozen=True, eq=False)
class _Flow:
    """A tensor in the graph, with the unit and the position of each element (int64, of the same shape)."""

    value: Tensor
    units: Tensor
    positions: Tensor


class _Reading(NamedTuple):
    """The units along one axis of a flow, and the kind of each.

    Two indices have the same kind if their elements have the same positions. Swapping the units then swaps
    the elements.
    """

    # int64 [size of the axis].
    units: Tensor
    # int64 [size of the axis].
    kinds: Tensor

    @property
    def is_plain(self) -> bool:
        """Return True if all indices are of the same kind."""
        return not self.kinds.any()


def _read(flow: _Flow, axis: int) -> _Reading | None:
    """Return the units along the axis; None if they differ between the indices of the other axes."""
    units = flow.units.movedim(axis, -1).reshape(-1, flow.units.shape[axis])
    if (units != units[:1]).any():
        return None
    moving = units[0] != FIXED
    kinds = torch.zeros_like(units[0])
    positions = flow.positions.movedim(axis, -1).reshape(units.shape)[:, moving]
    if (positions != positions[:, :1]).any():
        kinds[moving] = torch.unique(positions, dim=1, return_inverse=True)[1]
    return _Reading(units[0].clone(), kinds)


def _flow_along(value: Tensor, units: Tensor, axis: int) -> _Flow:
    """Return the flow of a value with units[i] at index i of the axis."""
    axis %= value.ndim
    along = [1] * value.ndim
    along[axis] = -1
    across = [1 if number == axis else size for number, size in enumerate(value.shape)]
    positions = torch.arange(math.prod(across)).view(across)
    return _Flow(value, units.view(along).expand(value.shape), positions.expand(value.shape))


def _fixed(value: Tensor) -> _Flow:
    """Return the flow of a value whose elements never move."""
    zeros = torch.zeros(1, dtype=torch.int64).expand(value.shape)
    return _Flow(value, zeros, zeros)


class _FlowThrough(fx.Interpreter):
    """The interpreter that runs the graph on flows instead of tensors."""

    def __init__(self, graph: fx.GraphModule, model: nn.Module) -> None:
        super().__init__(graph)
        self.ledger = _Ledger()
        self.names: dict[str, list[str]] = {}
        # The ids of the tensors that have taken part in the graph.
        self.seen: set[int] = set()
        self._name_of: dict[int, str] = {}
        self._parameters = {id(parameter) for parameter in model.parameters()}
        for name, tensor in model.state_dict(keep_vars=True).items():
            first = self._name_of.setdefault(id(tensor), name)
            self.names.setdefault(first, []).append(name)

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Return an input of the model, as a flow whose elements never move."""
        value = super().placeholder(target, args, kwargs)
        return _fixed(value) if isinstance(value, Tensor) else value

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Return an attribute; a tensor with one axis longer than 1 has units along this axis."""
        value = super().get_attr(target, args, kwargs)
        if not isinstance(value, Tensor):
            return value
        self.seen.add(id(value))
        axes = [axis for axis, size in enumerate(value.shape) if size > 1]
        if id(value) not in self._name_of or len(axes) != 1:
            self._freeze([value])
            return _fixed(value)
        units = self.ledger.new_block(value.shape[axes[0]], self.targets([value], axes[0]))
        return _flow_along(value, units, axes[0])

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Call a function by the rule for the function."""
        return self._call(_rule_of(target), target, args, kwargs)

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Call a method of a tensor by the rule for the method's name."""

        def method(subject: Any, *args: Any, **kwargs: Any) -> Any:
            return getattr(subject, target)(*args, **kwargs)

        return self._call(_METHODS.get(target), method, args, kwargs)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Call a module by the rule for its type."""
        module: Any = self.fetch_attr(target)
        tensors = [*module.parameters(), *module.buffers()]
        self.seen.update(map(id, tensors))
        # The rule is looked up by the exact type, because a subclass may compute something else. A hook may
        # do so, too.
        rule = _MODULES.get(type(module))
        is_hooked = module._forward_hooks or module._forward_pre_hooks
        if rule is None or is_hooked or any(id(tensor) not in self._name_of for tensor in tensors):
            rule = None
            self._freeze(tensors)
        return self._call(rule, module, args, kwargs)

    def output(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Return the output of the model, and fix its units."""
        self._fix(_flows_in(args))
        return super().output(target, args, kwargs)

    def _call(self, rule: "_Rule | None", function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Return the result of a call by its rule; fix all units that a call without a rule meets."""
        flows = _flows_in((args, kwargs))
        if any(flow.value.shape != flow.units.shape for flow in flows):
            raise NotTraceable("a tensor changes its shape in place")
        call = _Call(self, function, args, kwargs, flows, _run(function, args, kwargs, "value"))
        result = rule(call) if rule and flows else None
        if result is None:
            self._fix(flows)
            result = tree_map_only(Tensor, _fixed, call.value)
        return result

    def _fix(self, flows: Sequence[_Flow]) -> None:
        """Record that the units of the flows never move."""
        for flow in flows:
            self.ledger.fix(flow.units)

    def _freeze(self, tensors: Sequence[Tensor]) -> None:
        """Record that those tensors that are in the state_dict must not be permuted."""
        for tensor in tensors:
            if id(tensor) in self._name_of:
                self.ledger.freeze(self._name_of[id(tensor)])

    def targets(
        self, tensors: Sequence[Tensor | None], axis: int, rows: tuple[int, int] | None = None
    ) -> list[_Target]:
        """Return the targets for one axis of each tensor; None among the tensors is left out."""
        return [
            _Target(self._name_of[id(tensor)], axis, rows, id(tensor) not in self._parameters)
            for tensor in tensors
            if tensor is not None
        ]

    def weight_used_as(self, weight: Tensor, way: object) -> None:
        """Record the way in which an operation uses the weight."""
        self.ledger.used_as(self._name_of[id(weight)], way)


class _Call(NamedTuple):
    """One node of the graph: a call with flows among its arguments, and the value that it returned."""

    run: _FlowThrough
    # The function that is called; for a module, the module itself.
    function: Any
    args: Any
    kwargs: Any
    flows: list[_Flow]
    value: Any


# A function that returns the result of a call with its units. None means that the rule does not cover this
# call, and that all units that the call meets must be fixed.
_Rule = Callable[[_Call], Any]


def _flows_in(tree: Any) -> list[_Flow]:
    """Return the flows among nested arguments."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, _Flow)]


def _run(function: Callable[..., Any], args: Any, kwargs: Any, part: str) -> Any:
    """Call the function with each flow replaced by one of its parts: "value", "units" or "positions"."""
    args, kwargs = tree_map_only(_Flow, lambda flow: getattr(flow, part), (args, kwargs))
    return function(*args, **kwargs)


def _move(call: _Call) -> Any:
    """Apply an operation that moves or drops elements, but does not change them."""
    # If a flow is among the other arguments, then the moves depend on values.
    if _flows_in((call.args[1:], call.kwargs)):
        return None
    args = tree_map_only(_Flow, _contiguous, call.args)
    units = _run(call.function, args, call.kwargs, "units")
    positions = _run(call.function, args, call.kwargs, "positions")
    if isinstance(call.value, Tensor):
        return _Flow(call.value, units, positions)
    if isinstance(call.value, tuple | list) and all(isinstance(item, Tensor) for item in call.value):
        return tuple(map(_Flow, call.value, units, positions))
    # The result is no tensor, but a size, for example.
    return call.value


def _contiguous(flow: _Flow) -> _Flow:
    """Return the flow with contiguous units and positions, of which every view is possible."""
    return _Flow(flow.value, flow.units.contiguous(), flow.positions.contiguous())


def _elementwise(call: _Call) -> _Flow | None:
    """Apply an operation whose result depends, element by element, on the operands after broadcasting."""
    value, flows = call.value, call.flows
    if not isinstance(value, Tensor) or value.ndim == 0:
        return None
    for axis in dict.fromkeys([1 % value.ndim, value.ndim - 1, *range(value.ndim)]):
        readings = _operands_along(axis, value.shape, flows)
        if readings is not None:
            return _channelwise(call, axis, readings)
    if len(flows) == 1 and flows[0].value.shape == value.shape:
        return _renewed(call, flows[0])
    return None


def _operands_along(axis: int, shape: torch.Size, flows: Sequence[_Flow]) -> list[Tensor] | None:
    """Return the units of the operands along the axis; None unless all operands have their units there."""
    vectors = []
    for flow in flows:
        size = ([1] * (len(shape) - flow.value.ndim) + list(flow.value.shape))[axis]
        if size == 1 and not flow.units.any():
            # The operand has one value for the whole axis, which never moves.
            continue
        units, positions = flow.units.broadcast_to(shape), flow.positions.broadcast_to(shape)
        reading = _read(_Flow(flow.value, units, positions), axis)
        if reading is None or not reading.is_plain:
            return None
        vectors.append(reading.units)
    return vectors


def _channelwise(
    call: _Call,
    axis: int,
    operands: Sequence[Tensor],
    parameters: Sequence[Tensor | None] = (),
    kinds: Tensor | None = None,
) -> _Flow:
    """Apply an operation in which each output along the axis depends only on the inputs at the same index.

    Args:
        call: the call of the operation.
        axis: the axis along which the units lie.
        operands: the units along the axis of each operand.
        parameters: the tensors whose axis 0 corresponds to the axis.
        kinds: the kind of each output; outputs of different kinds cannot change places.
    """
    if not any(units.any() for units in operands):
        return _fixed(call.value)
    new = call.run.ledger.new_block(len(operands[0]), call.run.targets(parameters, 0), kinds)
    for units in operands:
        call.run.ledger.use(units, (), kinds)
        call.run.ledger.tie(new, units)
    return _flow_along(call.value, new, axis)


def _renewed(call: _Call, flow: _Flow) -> _Flow:
    """Apply an operation whose outputs depend on one input each, wherever the units lie.

    The units may lie across several axes or indices, as after the flattening of channels.
    """
    old, inverse = torch.unique(flow.units, return_inverse=True)
    new = call.run.ledger.new_block(len(old))
    call.run.ledger.use(old)
    call.run.ledger.tie(new, old)
    return _Flow(call.value, new[inverse], flow.positions)


def _pooling(num_dims: int) -> _Rule:
    """Return the rule for pooling over so many dimensions, in which each channel depends on itself only."""

    def rule(call: _Call) -> _Flow | None:
        if len(call.flows) != 1 or not isinstance(call.value, Tensor) or call.value.ndim != num_dims + 2:
            return None
        reading = _read(call.flows[0], 1)
        if reading is None or not reading.is_plain:
            return None
        return _channelwise(call, 1, [reading.units])

    return rule


def _reduction(call: _Call) -> _Flow | None:
    """Apply a mean, sum or maximum over axes other than the axis of the units."""
    dims = call.kwargs.get("dim", call.args[1] if len(call.args) > 1 else None)
    if len(call.flows) != 1 or dims is None or not isinstance(call.value, Tensor):
        return None
    (flow,) = call.flows
    reduced = {dim % flow.value.ndim for dim in ([dims] if isinstance(dims, int) else dims)}
    for axis in set(range(flow.value.ndim)) - reduced:
        reading = _read(flow, axis)
        if reading is not None and reading.is_plain:
            is_kept = call.value.ndim == flow.value.ndim
            place = axis if is_kept else axis - sum(dim < axis for dim in reduced)
            return _channelwise(call, place, [reading.units])
    return None


def _batch_norm(call: _Call) -> _Flow | None:
    """Apply a BatchNorm, which has parameters and running statistics for each channel."""
    norm = call.function
    return _per_channel(call, 1, [norm.weight, norm.bias, norm.running_mean, norm.running_var])


def _layer_norm(call: _Call) -> _Flow | None:
    """Apply a LayerNorm over the last axis; one over several axes has no rule."""
    norm = call.function
    return _per_channel(call, -1, [norm.weight, norm.bias]) if len(norm.normalized_shape) == 1 else None


def _prelu(call: _Call) -> _Flow | None:
    """Apply a PReLU, which has one parameter for all channels or one for each channel."""
    weight = call.function.weight
    return _elementwise(call) if weight.numel() == 1 else _per_channel(call, 1, [weight])


def _per_channel(call: _Call, axis: int, parameters: Sequence[Tensor | None]) -> _Flow | None:
    """Apply an operation that treats all indices of the axis alike, except for parameters of each index."""
    (flow,) = call.flows
    reading = _read(flow, axis)
    if reading is None:
        return None
    if reading.is_plain:
        return _channelwise(call, axis, [reading.units], parameters)
    marks = torch.stack([flow.units.flatten(), flow.positions.flatten()])
    if torch.unique(marks, dim=1).shape != marks.shape:
        # The copies of one element would have different parameters.
        return None
    call.run.ledger.use(reading.units, call.run.targets(parameters, 0), reading.kinds)
    return _renewed(call, flow)


def _group_norm(call: _Call) -> _Flow | None:
    """Apply a GroupNorm, whose channels may change places within their group.

    Such a permutation does not change the mean and the variance of the group.
    """
    norm, (flow,) = call.function, call.flows
    reading = _read(flow, 1)
    if reading is None or not reading.is_plain:
        return None
    kinds = torch.arange(norm.num_channels) // (norm.num_channels // norm.num_groups)
    return _channelwise(call, 1, [reading.units], [norm.weight, norm.bias], kinds)


def _functional_layer_norm(call: _Call) -> _Flow | None:
    """Apply layer_norm(input, normalized_shape, weight, bias) over the last axis of the input.

    The last axis of the input corresponds to axis 0 of weight and bias.
    """
    if len(call.args) < 2 or len(call.args[1]) != 1:
        return None
    readings = [_read(flow, -1) for flow in call.flows]
    if not all(reading is not None and reading.is_plain for reading in readings):
        return None
    return _channelwise(call, -1, [reading.units for reading in readings if reading is not None])


def _rule_of(function: Any) -> _Rule | None:
    """Return the rule of a function that a traced model calls; None if there is none."""
    name = f"{getattr(function, '__module__', '')}.{getattr(function, '__name__', '')}"
    return _FUNCTIONS.get(function) or _NAMED_FUNCTIONS.get(name)


def _linear(call: _Call) -> _Flow | None:
    """Apply a linear layer, which uses units along the last axis and makes new ones."""
    layer, (flow,) = call.function, call.flows
    reading = _read(flow, -1)
    if reading is None:
        return None
    call.run.weight_used_as(layer.weight, "linear")
    call.run.ledger.use(reading.units, call.run.targets([layer.weight], 1), reading.kinds)
    return _outputs(call, -1, torch.zeros(layer.out_features, dtype=torch.int64))


def _convolution(call: _Call) -> _Flow | None:
    """Apply a convolution, which uses channels and makes new ones; a depthwise one keeps the channels."""
    layer, (flow,) = call.function, call.flows
    reading = _read(flow, 1)
    if reading is None or not reading.is_plain or flow.value.ndim != layer.weight.ndim:
        return None
    run, num_groups = call.run, layer.groups
    run.weight_used_as(layer.weight, ("convolution", num_groups))
    if num_groups == layer.in_channels == layer.out_channels and num_groups > 1:
        return _channelwise(call, 1, [reading.units], [layer.weight, layer.bias])
    # In a grouped convolution, input channels may change places within their group, and so may the outputs.
    group_of_output = torch.arange(layer.out_channels) // (layer.out_channels // num_groups)
    for number, units in enumerate(reading.units.chunk(num_groups)):
        outputs = (group_of_output == number).nonzero().flatten()
        rows = None if num_groups == 1 else (int(outputs[0]), int(outputs[-1]) + 1)
        run.ledger.use(units, run.targets([layer.weight], 1, rows))
    return _outputs(call, 1, group_of_output)


def _gru(call: _Call) -> Any:
    """Apply a single layer of gated recurrent units, which uses units along the last axis and makes new ones.

    Each unit has a row for each of its three gates in every tensor, and a column in the recurrent weight.
    """
    layer, (flow, *_) = call.function, call.flows
    is_plain = layer.num_layers == 1 and not layer.bidirectional and layer.batch_first and not layer.training
    reading = _read(flow, -1)
    if reading is None or not is_plain or len(call.flows) > 1 or flow.value.ndim != 3:
        return None
    run, size = call.run, layer.hidden_size
    weights = [layer.weight_ih_l0, layer.weight_hh_l0]
    biases = [layer.bias_ih_l0, layer.bias_hh_l0] if layer.bias else []
    for weight in weights:
        run.weight_used_as(weight, "gru")
    run.ledger.use(reading.units, run.targets(weights[:1], 1), reading.kinds)
    units = run.ledger.new_block(size, run.targets(weights[1:], 1))
    gates = torch.arange(3).repeat_interleave(size)
    run.ledger.use(units.repeat(3), run.targets([*weights, *biases], 0), gates)
    states, last = call.value
    return _flow_along(states, units, -1), _flow_along(last, units, -1)


def _outputs(call: _Call, axis: int, kinds: Tensor) -> _Flow:
    """Return the output of a layer as new units along the axis, each with its own weights."""
    if len(kinds) == 1:
        return _fixed(call.value)
    targets = call.run.targets([call.function.weight, call.function.bias], 0)
    return _flow_along(call.value, call.run.ledger.new_block(len(kinds), targets, kinds), axis)


_MOVES = (
    "flatten", "permute", "transpose", "swapaxes", "movedim", "reshape", "squeeze", "unsqueeze", "chunk",
    "split", "unbind", "narrow", "roll", "clone",
)  # fmt: skip
_ARITHMETIC = ("add", "sub", "mul")
_UNARY = ("relu", "sigmoid", "tanh")
_REDUCTIONS = ("mean", "sum", "amax")

_FUNCTIONS: dict[Any, _Rule] = {
    **{getattr(torch, name): _move for name in _MOVES},
    **dict.fromkeys([torch.cat, torch.concat, operator.getitem, getattr], _move),
    **{getattr(torch, name): _elementwise for name in (*_ARITHMETIC, *_UNARY, "div", "neg", "clamp")},
    **{getattr(operator, name): _elementwise for name in (*_ARITHMETIC, "truediv", "neg")},
    **{getattr(operator, f"i{name}"): _elementwise for name in _ARITHMETIC},
    **{
        getattr(functional, name): _elementwise
        for name in (
            *_UNARY, "celu", "dropout", "dropout2d", "elu", "gelu", "hardsigmoid", "hardswish", "hardtanh",
            "leaky_relu", "logsigmoid", "mish", "relu6", "selu", "silu", "softplus", "softsign",
        )
    },
    functional.max_pool2d: _pooling(2),
    functional.avg_pool2d: _pooling(2),
    functional.adaptive_avg_pool2d: _pooling(2),
    functional.adaptive_max_pool2d: _pooling(2),
    **{getattr(torch, name): _reduction for name in _REDUCTIONS},
    functional.layer_norm: _functional_layer_norm,
}  # fmt: skip

# The names of functions whose modules are not imported here, because their import takes as long as that of
# PyTorch, and many models do without.
_NAMED_FUNCTIONS: dict[str, _Rule] = {"torchvision.ops.stochastic_depth.stochastic_depth": _elementwise}

_METHODS: dict[str, _Rule] = {
    **dict.fromkeys([*_MOVES, "view", "contiguous", "expand", "size", "dim"], _move),
    **dict.fromkeys([*_ARITHMETIC, *_UNARY, "add_", "mul_", "sub_", "div", "neg", "clamp"], _elementwise),
    **dict.fromkeys(_REDUCTIONS, _reduction),
}

_MODULES: dict[type[nn.Module], _Rule] = {
    nn.Linear: _linear,
    nn.GRU: _gru,
    **dict.fromkeys([nn.Conv1d, nn.Conv2d, nn.Conv3d], _convolution),
    **dict.fromkeys([nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d], _batch_norm),
    nn.LayerNorm: _layer_norm,
    nn.GroupNorm: _group_norm,
    nn.PReLU: _prelu,
    **dict.fromkeys([nn.Flatten, nn.Unflatten, nn.Identity], _move),
    **dict.fromkeys(
        [
            nn.CELU, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.ELU, nn.GELU, nn.Hardsigmoid,
            nn.Hardswish, nn.Hardtanh, nn.LeakyReLU, nn.LogSigmoid, nn.Mish, nn.ReLU, nn.ReLU6, nn.SELU,
            nn.Sigmoid, nn.SiLU, nn.Softplus, nn.Softsign, nn.Tanh,
        ],
        _elementwise,
    ),
    **{
        getattr(nn, f"{pool}Pool{num_dims}d"): _pooling(num_dims)
        for pool in ("Max", "Avg", "AdaptiveAvg", "AdaptiveMax")
        for num_dims in (1, 2, 3)
    },
}  # fmt: skip
