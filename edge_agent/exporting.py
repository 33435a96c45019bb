"""A model as a file for inference, which takes images as they are and needs nothing of this project.

Shapes: B images of a batch, C channels, H height, W width, K classes.
"""

import json
from collections.abc import Collection
from io import BytesIO
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from common.config import RunConfig
from common.errors import ECAvgError, RunError
from common.evaluation import main_output
from common.files import replacing
from common.models import build_model
from common.weights import load_into
from edge_agent.config import check_exporter
from edge_agent.history import Use

Format = Literal["onnx", "torch-export"]

INPUT, OUTPUT = "images", "logits"
# Logits of another runtime may differ by so much of the largest logit, or of 1 where that is larger.
TOLERANCE = 1e-3


class Deployed(nn.Module):
    """A model in evaluation mode that takes uint8 [B, C, H, W] and returns logits, float32 [B, K].

    Args:
        weights: the file of the model's weights.
        allowed_factories: the user's own factories that may be imported; None allows any factory.

    Raises:
        UsageError: the model cannot be built here.
        RunError: the weights are another model's.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self, run: RunConfig, weights: Path, allowed_factories: Collection[str] | None = None
    ) -> None:
        super().__init__()
        self.network = build_model(run, allowed_factories=allowed_factories)
        load_into(self.network, weights)
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (run.spec.mean, run.spec.std))
        self.register_buffer("scale", 1 / (255 * std))
        self.register_buffer("shift", -mean / std)
        self.eval()
        self.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Normalise the images as the agent does, and return the logits."""
        logits: Tensor = main_output(self.network(torch.addcmul(self.shift, images.float(), self.scale)))
        return logits.float()


def labels_of(run: RunConfig) -> list[str]:
    """Return the names of the classes, label 0 first; their numbers where the run has no names."""
    return list(run.class_names) or [str(number) for number in range(run.spec.num_classes)]


def metadata_of(run: RunConfig, use: Use) -> dict[str, str]:
    """Return what is written into the file beside the graph; lists are JSON."""
    return {
        "model_sha256": use.digest,
        "round": str(use.round),
        "run_id": use.run_id,
        "model": run.model,
        "labels": json.dumps(labels_of(run)),
        "image_shape": json.dumps(run.spec.image_shape),
        "mean": json.dumps(run.spec.mean),
        "std": json.dumps(run.spec.std),
        "input": f"{INPUT}: uint8 [batch, channels, height, width], 0 to 255; mean and std are in the graph",
        "output": f"{OUTPUT}: float32 [batch, classes]; softmax gives probabilities",
    }


def export(
    run: RunConfig, use: Use, weights: Path, file_format: Format, output: Path, allowed: Collection[str]
) -> None:
    """Write a model for inference, after a comparison of its logits with PyTorch's.

    The file is replaced as a whole, or stays as it was.

    Raises:
        UsageError: a package is missing, or the model cannot be built here.
        RunError: the model cannot be exported, or its logits are others.
        OSError: the file cannot be written.
    """
    check_exporter(file_format)
    model = Deployed(run, weights, allowed)
    write = _write_onnx if file_format == "onnx" else _write_program
    with replacing(output) as partial:
        try:
            write(model, run, metadata_of(run, use), partial)
        except (ECAvgError, OSError):
            raise
        # The exporters raise whatever an operation that they do not know led them to.
        except Exception as error:
            text = next(iter(str(error).splitlines()), "") or type(error).__name__
            raise RunError(f"model {run.model!r} cannot be exported as {file_format}: {text}") from error


def _write_onnx(model: Deployed, run: RunConfig, metadata: dict[str, str], path: Path) -> None:
    import onnxruntime

    program = torch.onnx.export(
        _program(model, run), dynamo=True, verbose=False, input_names=[INPUT], output_names=[OUTPUT]
    )
    assert program is not None
    program.model.metadata_props.update(metadata)
    program.save(path, external_data=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for images in _samples(run, (1, 3)):
        (logits,) = session.run([OUTPUT], {INPUT: images.numpy()})
        _compare(model(images), torch.from_numpy(logits))


def _write_program(model: Deployed, run: RunConfig, metadata: dict[str, str], path: Path) -> None:
    program = _program(model, run)
    for images in _samples(run, (1, 3)):
        _compare(model(images), program.module()(images))
    buffer = BytesIO()
    torch.export.save(program, buffer, extra_files={"metadata.json": json.dumps(metadata)})
    path.write_bytes(buffer.getbuffer())


def _program(model: Deployed, run: RunConfig) -> torch.export.ExportedProgram:
    """Return the graph of the model, for a batch of any size."""
    batch = torch.export.Dim("batch", min=1)
    return torch.export.export(model, tuple(_samples(run, (2,))), dynamic_shapes=({0: batch},))


def _samples(run: RunConfig, sizes: Collection[int]) -> list[Tensor]:
    """Return a batch of random images for each size, always the same."""
    generator = torch.Generator().manual_seed(0)
    shape = run.spec.image_shape
    return [torch.randint(256, (size, *shape), dtype=torch.uint8, generator=generator) for size in sizes]


def _compare(expected: Tensor, found: Tensor) -> None:
    """Raise RunError if logits are not PyTorch's."""
    bound = TOLERANCE * max(1.0, float(expected.abs().max()))
    difference = float((expected - found).abs().max())
    # A difference that is no number is refused as well.
    if not difference <= bound:
        raise RunError(f"the exported model is wrong: its logits differ from PyTorch's by {difference:.3g}")
