"""The output of the trainer: the files of a new model, with the weights as agents will decode them."""

from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from torch import nn

from ecavg.cloud_server.jobs import EncodedWeightsFile, JobDirectory, WeightsFile
from ecavg.common.config import Wire
from ecavg.common.errors import RunError
from ecavg.common.faults import Point, crash_point
from ecavg.common.transfer import blob_of
from ecavg.common.weights import load_into, write_state_dict
from ecavg.common.wire import Base, decode, encode


class Written(NamedTuple):
    """The files of a new model."""

    weights: WeightsFile
    encoded: EncodedWeightsFile | None
    # The parts of the model that do not travel; None: all parts do.
    rest: WeightsFile | None


def write_model(
    model: nn.Module, directory: JobDirectory, wire: Wire, base: Base | None, shared: Collection[str]
) -> Written:
    """Write the model's weights, their encoding, and the rest of the model to the job's directory.

    An encoding rounds the weights. The weights are therefore encoded first, and the result of decoding is
    written as the new model, and loaded into `model`.

    The trainer does not add the rounding residual to the next round's weights, as agents do with theirs. An
    agent's weights become a part of a mean, and what rounding has removed is in no other file. The trainer
    sends a whole model. The next round's pre-training and fine-tune start from the rounded weights, and so
    learn again what rounding has removed.

    Args:
        model: the new model.
        directory: the directory of the job; encoding needs its folder for intermediate files.
        wire: the encoding in which the weights travel.
        base: the base of differences, for an encoding that has differences.
        shared: the names of the tensors that travel.

    Raises:
        RunError: a tensor is not finite.
        OSError: a file cannot be written.
    """
    state_dict = model.state_dict()
    for name, tensor in state_dict.items():
        if not tensor.isfinite().all():
            raise RunError(f"tensor {name} of the new model is not finite: lower run.fine_tune.learning_rate")
    travelling = {name: tensor for name, tensor in state_dict.items() if name in shared}
    staying = {name: tensor for name, tensor in state_dict.items() if name not in shared}
    if staying:
        write_state_dict(staying, directory.rest_path)
    write_state_dict(travelling, exact_path(directory, wire))
    written = finish(directory, wire, base)
    if written.encoded:
        load_into(model, directory.rest_path if staying else None, directory.weights_path)
    return written


def exact_path(directory: JobDirectory, wire: Wire) -> Path:
    """Return the path of the weights as they are before encoding rounds them."""
    return directory.weights_path if wire == "float32" else directory.scratch_path / "exact.safetensors"


def finish(directory: JobDirectory, wire: Wire, base: Base | None) -> Written:
    """Encode the weights at `exact_path` if they travel encoded, and return what the directory then holds.

    Raises:
        RunError: a tensor is not finite.
        OSError: a file cannot be written.
    """
    encoded, exact = None, exact_path(directory, wire)
    if wire != "float32":
        encode(exact, directory.encoded_path, wire, base=base)
        exact.unlink()
        decode(directory.encoded_path, directory.weights_path, base=base)
        described = _described(directory.encoded_path)
        encoded = EncodedWeightsFile(**described.model_dump(), base=base.digest if base else None)
    crash_point(Point.TRAINER_WEIGHTS_WRITTEN)
    rest = _described(directory.rest_path) if directory.rest_path.exists() else None
    return Written(_described(directory.weights_path), encoded, rest)


def num_parameters(model: nn.Module) -> int:
    """Return how many parameters a model has."""
    return sum(parameter.numel() for parameter in model.parameters())


def _described(path: Path) -> WeightsFile:
    """Return the digest and the size of a file of weights."""
    digest, size_bytes = blob_of(path)
    return WeightsFile(sha256=digest, bytes=size_bytes)
