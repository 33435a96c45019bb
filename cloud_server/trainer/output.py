"""The files of a model that the trainer has made, as agents will have it."""

from pathlib import Path
from typing import NamedTuple

from torch import nn

from cloud_server.jobs import EncodedWeights, JobDirectory, Weights
from common.config import Wire
from common.errors import RunError
from common.faults import Point, crash_point
from common.transfer import blob_of
from common.weights import load_into, write_state_dict
from common.wire import Base, decode, encode


class Written(NamedTuple):
    """The files of a model."""

    weights: Weights
    encoded: EncodedWeights | None


def write_model(model: nn.Module, directory: JobDirectory, wire: Wire, base: Base | None) -> Written:
    """Write the model's weights, and their encoding, to the job's directory.

    Weights that travel encoded lose something on the way. So they are encoded first, and what decoding gives
    is the model: it is written, and loaded into `model`.

    What rounding takes away is not fed back in the next round, as agents do it with theirs. What they send
    becomes a part of a mean, and what it has lost is nowhere else. Here a whole model is sent, and the next
    round's pre-training and fine-tune begin with the weights that have arrived: what is lost is learned anew.

    Raises:
        RunError: a tensor is not finite.
        OSError: a file cannot be written.
    """
    state_dict = model.state_dict()
    for name, tensor in state_dict.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise RunError(f"tensor {name} of the new model is not finite: lower run.fine_tune.learning_rate")
    if wire == "float32":
        write_state_dict(state_dict, directory.weights_path)
        encoded = None
    else:
        exact_path = directory.scratch_path / "exact.safetensors"
        write_state_dict(state_dict, exact_path)
        encode(exact_path, directory.encoded_path, wire, base=base)
        decode(directory.encoded_path, directory.weights_path, base=base)
        load_into(model, directory.weights_path)
        described = _described(directory.encoded_path)
        encoded = EncodedWeights(**described.model_dump(), base=base.digest if base else None)
    crash_point(Point.TRAINER_WEIGHTS_WRITTEN)
    return Written(_described(directory.weights_path), encoded)


def num_parameters(model: nn.Module) -> int:
    """Return how many parameters a model has."""
    return sum(parameter.numel() for parameter in model.parameters())


def _described(path: Path) -> Weights:
    digest, size_bytes = blob_of(path)
    return Weights(sha256=digest, bytes=size_bytes)
