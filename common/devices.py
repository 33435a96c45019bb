"""The device that a process computes on, and what makes its computations repeatable."""

import os

import torch

from ecavg.common.errors import UsageError
from ecavg.common.precision import has_bfloat16


def select_device(name: str) -> torch.device:
    """Return the device called "auto", "cpu", "cuda" or "cuda:1"; auto is the first GPU, or else the CPU.

    Raises:
        UsageError: there is no such device here.
    """
    num_gpus = torch.cuda.device_count()
    gpus = [f"cuda:{index}" for index in range(num_gpus)]
    known = {"auto": gpus[0] if gpus else "cpu", "cpu": "cpu", **({"cuda": gpus[0]} if gpus else {})}
    if name not in known and name not in gpus:
        raise UsageError(f"device {name!r} is not there: choose {', '.join([*known, *gpus])}")
    return torch.device(known.get(name, name))


def describe_device(name: str) -> str:
    """Return what the device of this name is, after a small computation on it.

    Raises:
        UsageError: there is no such device here.
    """
    device = select_device(name)
    torch.ones(2, 2, device=device).sum().item()
    precision = "bfloat16 or float32" if has_bfloat16(device) else "float32"
    what = f"{torch.get_num_threads()} threads"
    if device.type == "cuda":
        what = torch.cuda.get_device_name(device)
    return f"{device} ({what}), which trains in {precision}"


def make_deterministic() -> None:
    """Let this process compute the same bits again and again; call it before the first use of a GPU.

    A few CUDA operations (such as the backward pass of VGG's adaptive pooling) have no deterministic
    form: PyTorch warns of them, and the model still trains.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Filling memory that is about to be written costs time, and we read none before.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    # Otherwise convolutions in float32 compute with the ten bits of TF32, unlike matrix products.
    torch.backends.cudnn.allow_tf32 = False
