"""What the run begins with: its model, with the weights that `run.initial_weights` asks for."""

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

from common.config import RunConfig
from common.errors import InvalidError, RunError, UsageError
from common.models import build_model
from common.schema import check_finite, read_header
from common.training import derive_seed
from common.weights import StateDict, load_into

IDLE_SECONDS = 30.0  # a download is given up when nothing has come for so long

# DenseNets were published when names of modules could have a dot: norm.1 is called norm1 now.
_OLD_DENSENET_NAME = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)")

log = structlog.get_logger()


def initial_model(run: RunConfig) -> nn.Module:
    """The run's model on the CPU, with the weights that the run begins with.

    - "shared" and "independent": drawn under the run's seed; of the latter, agents use the schema only.
    - "pretrained": those that torchvision publishes for ImageNet, except in layers of another shape:
      the last one (the run's classes), and the stem where `small_images` makes it smaller. These are
      drawn. Images are normalised by the run's `mean` and `std`, not by ImageNet's.
    - a safetensors file, relative to the working directory, with every tensor of the run's model.

    Raises:
        UsageError: the model cannot be built, or the weights cannot be had or do not fit it.
        RunError: the download is broken.
        OSError: there is no room for the download.
    """
    model = build_model(run, seed=derive_seed(run.seed, "initial_weights"))
    if run.initial_weights == "pretrained":
        _load_published(model, run)
    elif run.initial_weights.endswith(".safetensors"):
        _load_file(model, Path(run.initial_weights), run)
    return model


def _load_file(model: nn.Module, path: Path, run: RunConfig) -> None:
    try:
        check_finite(path, read_header(path))
        load_into(model, path)
    except OSError as error:
        raise UsageError(f"run.initial_weights: cannot read {path}: {error.strerror or error}") from error
    except InvalidError as error:
        raise UsageError(f"run.initial_weights: {path}: {error}") from error
    except RunError as error:
        classes = f"with a last layer for its {run.spec.num_classes} classes"
        raise UsageError(f"run.initial_weights: {error}, {classes}") from error


def _load_published(model: nn.Module, run: RunConfig) -> None:
    """Take what fits; what does not may only be in the last layer and a smaller stem."""
    published = _fetch(_published_for(run.model))
    for name in list(published):
        published[_OLD_DENSENET_NAME.sub(r"\1\2", name)] = published.pop(name)
    own = model.state_dict()
    changed = {
        _layer(name) for name, tensor in own.items() if published.get(name, tensor).shape != tensor.shape
    }
    for name in list(published):
        if _layer(name) in changed:
            del published[name]  # in place: the version of the format is an attribute of the dict

    drawn, ignored = model.load_state_dict(published, strict=False)  # knows the names of older versions
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
    """The module that a tensor belongs to."""
    return name.rpartition(".")[0]


def _published_for(model_name: str) -> Any:
    """The weights that torchvision recommends, a member of its WeightsEnum."""
    import torchvision  # here, for it takes as long as importing PyTorch

    try:
        return torchvision.models.get_model_weights(model_name).DEFAULT
    except (ValueError, RuntimeError, AttributeError) as error:
        raise UsageError(
            f'run.initial_weights: no "pretrained" weights are published for model {model_name!r}:'
            " choose one of torchvision, or give a safetensors file"
        ) from error


def _fetch(weights: Any) -> StateDict:
    """Published weights, downloaded unless they have been before."""
    name = weights.url.rpartition("/")[2]
    path = Path(torch.hub.get_dir(), "checkpoints", name)
    if path.exists():
        _check_digest(path)  # PyTorch does so only when it downloads
    try:
        with _giving_up_when_idle():
            state_dict: StateDict = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, HTTPException) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise  # not for good
        raise UsageError(
            f"run.initial_weights: cannot fetch {weights.url} ({error}): download it into {path.parent},"
            " or give a safetensors file"
        ) from error
    except Exception as error:  # whatever a broken file can do to its reader
        reason = str(error).partition("\n")[0]
        raise RunError(f"cannot load {weights.url}: {reason}") from error
    return state_dict


def _check_digest(path: Path) -> None:
    """Check that a file has the SHA-256 that its name, `resnet50-11ad3fa6.pth`, begins to tell."""
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
    """Have connections that are opened in the meantime fail when they are silent for IDLE_SECONDS."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(IDLE_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
