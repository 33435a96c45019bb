"""A state_dict on disk, as safetensors: every parameter and buffer, in its own dtype."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ecavg.common.errors import InvalidError, RunError
from ecavg.common.files import replacing
from ecavg.common.schema import Header, TensorSpec, check_parts, check_weights, read_header

StateDict = dict[str, Tensor]

# There is one entry, because the format's writer shuffles several.
_METADATA: Mapping[str, str] = {"format": "pt"}

_DTYPE_NAMES: Mapping[torch.dtype, str] = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.complex64: "C64", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def dtype_name(dtype: torch.dtype) -> str | None:
    """Return the name that safetensors gives a dtype, for example "F32"; None if its files cannot hold it."""
    return _DTYPE_NAMES.get(dtype)


def write_state_dict(
    state_dict: Mapping[str, Tensor], path: Path, *, metadata: Mapping[str, str] = _METADATA
) -> None:
    """Write the tensors, wherever they are; the same tensors give the same bytes.

    Tied tensors are stored once under each of their names, as every reader of the format expects.
    A reader of `path` never sees half a file.

    Raises:
        OSError: the file cannot be written.
    """
    with replacing(path) as partial:
        try:
            save_file(_separate(state_dict), partial, metadata=dict(metadata))
        except SafetensorError as error:
            raise OSError(f"cannot write {path}: {error}") from error


def read_state_dict(path: Path) -> StateDict:
    """Read all tensors of the file, onto the CPU.

    Raises:
        RunError: the file is not a safetensors file.
        OSError: the file cannot be read.
    """
    with _opened(path) as (header, file):
        return {name: file.get_tensor(name) for name in header.schema}


def load_into(model: nn.Module, *paths: Path | None) -> None:
    """Copy the tensors of files into the model's parameters and buffers, one at a time.

    Args:
        model: the model.
        paths: files that have together what the model has, each a part of it; None stands for no file.

    Raises:
        RunError: a file is not a safetensors file, or a name, shape or dtype is not the model's; the
            message names the first. The model is then unchanged.
        OSError: a file cannot be read.
    """
    own, files = model.state_dict(), [path for path in paths if path]
    with ExitStack() as stack:
        parts = [stack.enter_context(_opened(path)) for path in files]
        try:
            check_parts([header for header, _ in parts], _schema(own))
        except InvalidError as error:
            named = " and ".join(map(str, files))
            raise RunError(f"cannot read the weights in {named}: {error}") from error
        for header, file in parts:
            _copy(file.get_tensor, {name: own[name] for name in header.schema})


def copy_into(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Copy the tensors, wherever they are, into the model's parameters and buffers.

    `Module.load_state_dict` would convert dtypes, and fail where a model wants to know which version of
    its class wrote the state_dict: MNASNet refuses a plain dict.

    Raises:
        RunError: a name, shape or dtype is not the model's; the message names the first. The model is
            then unchanged.
    """
    own = model.state_dict()
    try:
        check_weights(Header(_schema(state_dict), metadata={}, data_start=0, offsets={}), _schema(own))
    except InvalidError as error:
        raise RunError(str(error)) from error
    _copy(state_dict.__getitem__, own)


def _copy(source: Callable[[str], Tensor], state_dict: StateDict) -> None:
    with torch.no_grad():
        for name, tensor in state_dict.items():
            tensor.copy_(source(name))


def _schema(state_dict: Mapping[str, Tensor]) -> dict[str, TensorSpec]:
    return {
        name: TensorSpec(_DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
        for name, tensor in state_dict.items()
    }


def _separate(state_dict: Mapping[str, Tensor]) -> StateDict:
    """Return contiguous tensors on the CPU that share no memory; copies only where they have to be."""
    tensors: StateDict = {}
    seen: set[int] = set()
    for name, tensor in state_dict.items():
        separate = tensor.detach().cpu().contiguous()
        memory = separate.untyped_storage().data_ptr()
        tensors[name] = separate.clone() if memory in seen else separate
        seen.add(memory)
    return tensors


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Header, Any]]:
    try:
        header = read_header(path)
        with safe_open(path, framework="pt") as file:
            yield header, file
    except (InvalidError, SafetensorError) as error:
        raise RunError(f"cannot read the weights in {path}: {error}") from error
