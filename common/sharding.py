"""Sharded models: each rank keeps a part of every parameter, with PyTorch's FSDP2.

Nothing but this module knows of DTensors. A whole tensor is on the device only while it is used: a unit's
parameters while the unit runs, and one tensor at a time while a model is loaded or gathered.

To import FSDP2 takes half a second, so nobody does who shards no model.
"""

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, nn

from ecavg.common.errors import UsageError
from ecavg.common.ranks import Ranks

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_LISTS = (nn.Sequential, nn.ModuleList)


def shard(model: nn.Module, ranks: Ranks, device: torch.device) -> nn.Module:
    """Shard the model in place over all ranks, onto their devices, and return it.

    Every rank calls this, in the default process group, with a model on the CPU. Parameters are laid out
    contiguously, because FSDP2 takes no others. Their values stay each rank's own, so that `load` has to
    follow.

    Raises:
        UsageError: FSDP2 cannot shard this model.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    _check(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()
    mesh = init_device_mesh(device.type, (ranks.world_size,))
    for unit in [*units(model), model]:
        # By default the root would keep its parameters whole after a forward without a backward.
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)
    return model


def units(model: nn.Module) -> list[nn.Module]:
    """Return the modules whose parameters are gathered together, besides the model with all the others.

    These are the entries of each ModuleList and Sequential, because that is how models hold their repeated
    blocks; lists within a unit are not looked into. A module that shares a parameter with another one stays
    with the model, because FSDP2 needs a shared parameter in one unit.
    """
    entries = [entry for entry in dict.fromkeys(_entries(model)) if any(True for _ in entry.parameters())]
    return [entry for entry in entries if not _shares(entry, model)]


def _entries(model: nn.Module) -> list[nn.Module]:
    """Return the entries of the outermost lists; those of a list within a list are entries of their own."""
    found = []
    for child in model.children():
        is_entry = isinstance(model, _LISTS) and not isinstance(child, _LISTS)
        found += [child] if is_entry else _entries(child)
    return found


def _shares(unit: nn.Module, model: nn.Module) -> bool:
    """Return True if a parameter of the unit is a parameter of a module outside of it, too."""
    inside, own = set(unit.modules()), {id(each) for each in unit.parameters()}
    outside = [module for module in model.modules() if module not in inside]
    return any(id(each) in own for module in outside for each in module.parameters(recurse=False))


def _check(model: nn.Module) -> None:
    """Raise UsageError if FSDP2 cannot shard this model."""
    reasons = ["it is TorchScript"] if isinstance(model, torch.jit.ScriptModule) else []
    for name, parameter in model.named_parameters():
        if not parameter.dim():
            reasons.append(f"parameter {name} is a single number: give it the shape (1,)")
        if not parameter.is_floating_point():
            reasons.append(f"parameter {name} is {str(parameter.dtype).removeprefix('torch.')}")
    if len({each.dtype for each in model.parameters() if each.requires_grad}) > 1:
        reasons.append("its trainable parameters differ in dtype")
    if reasons:
        raise UsageError(f'run.fine_tune.parallel = "fsdp" cannot shard this model: {reasons[0]}')


def is_sharded(model: nn.Module) -> bool:
    """Return True if `shard` has sharded the model, or made the module a unit of one."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(model, fsdp.FSDPModule)


def _has_parts(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Return True if each rank has a part of the tensor."""
    tensors = sys.modules.get("torch.distributed.tensor")
    return tensors is not None and isinstance(tensor, tensors.DTensor)


def class_of(module: nn.Module) -> type[nn.Module]:
    """Return the class that a module had before it was sharded."""
    return type(module).__mro__[2] if is_sharded(module) else type(module)


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor, in the same memory; a tensor that is not sharded as it is."""
    return tensor._local_tensor if _has_parts(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return the whole tensor, for which all ranks have to call this; one that is not sharded as it is."""
    return tensor.full_tensor() if _has_parts(tensor) else tensor


@torch.no_grad()
def copy_whole(target: Tensor, source: Tensor) -> None:
    """Copy a whole tensor, wherever it is, into one that may be sharded: each rank takes its own part."""
    if _has_parts(target):
        # FSDP2 shards the first dimension, as `chunk` does; the last ranks may have nothing.
        parts, rank = source.chunk(target.device_mesh.size()), target.device_mesh.get_local_rank()
        if rank < len(parts):
            local(target).copy_(parts[rank])
    else:
        target.copy_(source)


def load(model: nn.Module, state_dict: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Copy what rank 0 gives into the model of every rank, one tensor at a time."""
    own = model.state_dict()
    for name, tensor in ranks.share_each(state_dict):
        copy_whole(own[name], tensor)


@torch.no_grad()
def gather(model: nn.Module, target: nn.Module | None) -> None:
    """Copy the whole tensors of a sharded model into `target`, one at a time; None: this rank only helps.

    Buffers are each rank's own, and those of the rank that has a target count.
    """
    own = target.state_dict() if target else {}
    for name, tensor in model.state_dict().items():
        gathered = whole(tensor)
        if name in own:
            own[name].copy_(gathered)
