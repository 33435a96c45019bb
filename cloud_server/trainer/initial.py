"""The initial model of a run: the run's network with the weights that `run.initial_weights` asks for."""

import errno
import hashlib
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any

import structlog
import torch
from torch import nn

from ecavg.common.config import INDEX_SUFFIX, RunConfig, expand_home
from ecavg.common.errors import InvalidError, RunError, UsageError
from ecavg.common.models import build_model
from ecavg.common.proxy import route_of_download
from ecavg.common.schema import check_finite, read_header
from ecavg.common.sharded import weight_files
from ecavg.common.weights import StateDict, load_into

# A download fails when no data has arrived for so long.
IDLE_SECONDS = 30.0

# The weights of DenseNets were published when names of modules could have a dot: norm.1 is called norm1 now.
_OLD_DENSENET_NAME = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)")

log = structlog.get_logger()


def initial_model(run: RunConfig) -> nn.Module:
    """Return the run's model on the CPU, with the run's initial weights.

    The values of `run.initial_weights` mean:

    - "shared" and "independent": the weights are drawn at random under the run's seed. With "independent",
      agents use only the schema of these weights.
    - "pretrained": the weights are those that torchvision publishes for ImageNet. Layers of another shape are
      drawn at random: the last layer, for the run's classes, and the stem if `small_images` makes it smaller.
      Images are normalised by the run's `mean` and `std`, not by ImageNet's.
    - a path of a safetensors file, or of the index of several, relative to the working directory: the weights
      are those in the file or files, which must have every tensor of the run's model.

    Raises:
        UsageError: the model cannot be built, or the weights cannot be obtained or do not fit the model.
        RunError: the downloaded file is broken.
        OSError: the disk has no room for the download.
    """
    model = build_model(run)
    if run.initial_weights == "pretrained":
        _load_published(model, run)
    elif run.initial_weights.endswith((".safetensors", INDEX_SUFFIX)):
        try:
            load_into(model, *initial_files(run))
        except RunError as error:
            classes = f"with a last layer for its {run.spec.num_classes} classes"
            raise UsageError(f"run.initial_weights: {error}, {classes}") from error
    return model


def initial_files(run: RunConfig, *, are_read: bool = True) -> list[Path]:
    """Return the files of the initial weights.

    Args:
        run: the configuration of the run.
        are_read: True to check that all values are finite, for which the files are read to their ends.

    Raises:
        UsageError: a file cannot be read, or is not valid.
    """
    try:
        path = expand_home(Path(run.initial_weights))
    except ValueError as error:
        raise UsageError(f"run.initial_weights: {error}") from error
    try:
        files = weight_files(path)
        for file in files if are_read else ():
            check_finite(file, read_header(file))
    except OSError as error:
        unread = error.filename or path
        raise UsageError(f"run.initial_weights: cannot read {unread}: {error.strerror or error}") from error
    except InvalidError as error:
        raise UsageError(f"run.initial_weights: {path}: {error}") from error
    return files


def _load_published(model: nn.Module, run: RunConfig) -> None:
    """Load the published weights into the model, except for layers that have another shape in the run.

    Raises:
        UsageError: a layer does not fit that is neither the last layer nor the stem for small images.
        RunError: the downloaded file is broken.
        OSError: the disk has no room for the download.
    """
    published = _fetch(_published_for(run.model))
    for name in list(published):
        published[_OLD_DENSENET_NAME.sub(r"\1\2", name)] = published.pop(name)
    own = model.state_dict()
    changed = {
        _layer(name) for name, tensor in own.items() if published.get(name, tensor).shape != tensor.shape
    }
    for name in list(published):
        if _layer(name) in changed:
            # The dict is changed in place, because the version of its format is an attribute of the dict.
            del published[name]

    # load_state_dict also knows the names that older versions of PyTorch gave to tensors.
    drawn, ignored = model.load_state_dict(published, strict=False)
    may_be_drawn = {_layer(next(reversed(own)))}
    if run.small_images:
        may_be_drawn.add(_layer(next(iter(own))))
    for name in drawn:
        if _layer(name) not in may_be_drawn:
            raise UsageError(
                f"run.initial_weights: what torchvision publishes for {run.model} does not fit the run's"
                f" model: it has no tensor {name} of shape {list(own[name].shape)}"
            )
    log.info("pretrained_weights_taken", num_tensors=len(own) - len(drawn), drawn=drawn, ignored=ignored)


def _layer(name: str) -> str:
    """Return the name of the module that has the tensor."""
    return name.rpartition(".")[0]


def _published_for(model_name: str) -> Any:
    """Return the weights that torchvision recommends for the model, a member of its WeightsEnum.

    Raises:
        UsageError: torchvision publishes no weights for the model.
    """
    # torchvision is imported only here, because its import takes as long as that of PyTorch.
    import torchvision

    try:
        return torchvision.models.get_model_weights(model_name).DEFAULT
    except (ValueError, RuntimeError, AttributeError) as error:
        raise UsageError(
            f'run.initial_weights: no "pretrained" weights are published for model {model_name!r}:'
            " choose one of torchvision, or give a safetensors file"
        ) from error


def _fetch(weights: Any) -> StateDict:
    """Return the published weights; download the file unless it is there already.

    Raises:
        UsageError: the file cannot be downloaded, or an earlier download has a wrong digest.
        RunError: the downloaded file is broken.
        OSError: the disk has no room for the download.
    """
    name = weights.url.rpartition("/")[2]
    try:
        path = expand_home(Path(torch.hub.get_dir(), "checkpoints", name))
    except ValueError as error:
        raise UsageError(
            "run.initial_weights: there is no folder for the published weights, because this user has no home"
            " folder: set HOME or TORCH_HOME"
        ) from error
    if path.exists():
        # PyTorch checks the digest only when it downloads the file.
        _check_digest(path)
    try:
        with _giving_up_when_idle():
            state_dict: StateDict = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, HTTPException) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            # A full disk is a passing condition, for which the job is tried again.
            raise
        raise UsageError(
            f"run.initial_weights: cannot fetch {route_of_download(weights.url)} ({error}):"
            f" download it into {path.parent}, or give a safetensors file"
        ) from error
    except Exception as error:
        # A broken file can make its reader raise any exception.
        reason = str(error).partition("\n")[0]
        raise RunError(f"cannot load {weights.url}: {reason}") from error
    return state_dict


def _check_digest(path: Path) -> None:
    """Check that a file's SHA-256 begins with the digits in its name, which is like `resnet50-11ad3fa6.pth`.

    Raises:
        UsageError: the file has another SHA-256.
    """
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    told = re.search(r"-([0-9a-f]{8,64})\.", path.name)
    if not told or not digest.startswith(told[1]):
        raise UsageError(
            f"run.initial_weights: {path} is not what its name says, its SHA-256 begins with {digest[:8]}:"
            " remove it, and it is downloaded again"
        )


@contextmanager
def _giving_up_when_idle() -> Iterator[None]:
    """Let connections that are opened during the context fail when no data arrives for IDLE_SECONDS."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(IDLE_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
