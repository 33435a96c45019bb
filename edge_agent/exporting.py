"""A model as a file for inference, which takes inputs as they are and needs nothing of this project.

Shapes: B examples of a batch.
"""

import json
from collections.abc import Collection
from io import BytesIO
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from ecavg.common.config import RunConfig
from ecavg.common.dataset import Inputs
from ecavg.common.errors import ECAvgError, RunError
from ecavg.common.files import replacing
from ecavg.common.models import build_model
from ecavg.common.tasks.task import Task, task_of
from ecavg.common.weights import load_into
from ecavg.edge_agent.config import check_exporter
from ecavg.edge_agent.history import Use

Format = Literal["onnx", "torch-export"]

# Outputs of another runtime may differ by so much of the largest output, or of 1 where that is larger.
TOLERANCE = 1e-3


class Deployed(nn.Module):
    """A model in evaluation mode that takes inputs [B, …] of the run's dtype, and returns float32 [B, …].

    It returns logits, or for a regression numbers in the unit of the targets.

    Args:
        weights: the file of the model's weights.
        allowed_factories: the user's own factories that may be imported; None allows any factory.

    Raises:
        UsageError: the model or the task cannot be made here.
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
        self._task: Task = task_of(run, allowed_factories)
        inputs = run.spec.inputs
        self._is_scaled = bool(inputs.mean) and inputs.dtype != "int64"
        along_first = (-1, *(1 for _ in inputs.shape[1:]))
        mean, std = (torch.tensor(values or (1.0,)).view(along_first) for values in (inputs.mean, inputs.std))
        self.register_buffer("scale", 1 / ((255 if inputs.dtype == "uint8" else 1) * std))
        self.register_buffer("shift", -mean / std)
        self.eval()
        self.requires_grad_(False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Normalise the inputs as the agent does, and return what the model says of them."""
        scaled = torch.addcmul(self.shift, inputs.float(), self.scale) if self._is_scaled else inputs
        outputs: Tensor = self._task.outputs(self.network(scaled)).float()
        return self._task.predictions(outputs)


def labels_of(run: RunConfig) -> list[str]:
    """Return the names of the classes, label 0 first; their numbers where the run has no names.

    The list is empty where the targets are numbers.
    """
    return list(run.class_names) or [str(number) for number in range(run.spec.num_classes)]


def metadata_of(run: RunConfig, use: Use) -> dict[str, str]:
    """Return what is written into the file beside the graph; lists are JSON."""
    return {
        "model_sha256": use.digest,
        "round": str(use.round),
        "run_id": use.run_id,
        "model": run.model,
        "labels": json.dumps(labels_of(run)),
        "task": run.task,
        "input_shape": json.dumps(run.spec.inputs.shape),
        "mean": json.dumps(run.spec.inputs.mean),
        "std": json.dumps(run.spec.inputs.std),
        "input": f"{input_name(run)}: {_described(run)}; mean and std are in the graph",
        "output": f"{output_name(run)}: float32; {_MEANINGS.get(run.task, 'the outputs of the model')}",
    }


def input_name(run: RunConfig) -> str:
    """Return the name of the graph's input."""
    return "images" if run.spec.is_pictures else "inputs"


def output_name(run: RunConfig) -> str:
    """Return the name of the graph's output."""
    return "logits" if run.spec.num_classes else "outputs"


_MEANINGS = {
    "classification": "[batch, classes]; softmax gives probabilities",
    "multi-label": "[batch, classes]; the sigmoid gives probabilities",
    "regression": "[batch, ...] in the unit of the targets",
    "segmentation": "[batch, classes, height, width]; softmax over the classes gives probabilities",
}


def _described(run: RunConfig) -> str:
    inputs = run.spec.inputs
    if run.spec.is_pictures:
        return f"uint8 [batch, channels, height, width] with {list(inputs.shape)}, 0 to 255"
    return f"{inputs.dtype} [batch, {', '.join(map(str, inputs.shape))}]"


def export(
    run: RunConfig, use: Use, weights: Path, file_format: Format, output: Path, allowed: Collection[str]
) -> None:
    """Write a model for inference, after a comparison of its outputs with PyTorch's.

    The file is replaced as a whole, or stays as it was.

    Raises:
        UsageError: a package is missing, or the model cannot be built here.
        RunError: the model cannot be exported, or its outputs are others.
        OSError: the file cannot be written.
    """
    check_exporter(file_format)
    model = Deployed(run, weights, allowed)
    # What a task computes when it is first called must not be computed while the graph is recorded.
    model(*_samples(run, (1,)))
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

    name, result = input_name(run), output_name(run)
    program = torch.onnx.export(
        _program(model, run), dynamo=True, verbose=False, input_names=[name], output_names=[result]
    )
    assert program is not None
    program.model.metadata_props.update(metadata)
    program.save(path, external_data=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for inputs in _samples(run, (1, 3)):
        (outputs,) = session.run([result], {name: inputs.numpy()})
        _compare(model(inputs), torch.from_numpy(outputs))


def _write_program(model: Deployed, run: RunConfig, metadata: dict[str, str], path: Path) -> None:
    program = _program(model, run)
    for inputs in _samples(run, (1, 3)):
        _compare(model(inputs), program.module()(inputs))
    buffer = BytesIO()
    torch.export.save(program, buffer, extra_files={"metadata.json": json.dumps(metadata)})
    path.write_bytes(buffer.getbuffer())


def _program(model: Deployed, run: RunConfig) -> torch.export.ExportedProgram:
    """Return the graph of the model, for a batch of any size."""
    batch = torch.export.Dim("batch", min=1)
    return torch.export.export(model, tuple(_samples(run, (2,))), dynamic_shapes=({0: batch},))


def _samples(run: RunConfig, sizes: Collection[int]) -> list[Tensor]:
    """Return a batch of random inputs for each size, always the same."""
    generator = torch.Generator().manual_seed(0)
    return [_sample(run.spec.inputs, size, generator) for size in sizes]


def _sample(inputs: Inputs, size: int, generator: torch.Generator) -> Tensor:
    shape = (size, *inputs.shape)
    if inputs.dtype == "uint8":
        return torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    if inputs.dtype == "int64":
        low, high = int(inputs.low or 0), int(inputs.high if inputs.high is not None else 1)
        return torch.randint(low, high + 1, shape, generator=generator)
    along_first = (-1, *(1 for _ in inputs.shape[1:]))
    mean, std = (
        torch.tensor(values).view(along_first) for values in (inputs.mean or (0.0,), inputs.std or (1.0,))
    )
    return mean + std * torch.randn(shape, generator=generator)


def _compare(expected: Tensor, found: Tensor) -> None:
    """Raise RunError if outputs are not PyTorch's."""
    bound = TOLERANCE * max(1.0, float(expected.abs().max()))
    difference = float((expected - found).abs().max())
    # A difference that is no number is refused as well.
    if not difference <= bound:
        raise RunError(f"the exported model is wrong: its outputs differ from PyTorch's by {difference:.3g}")
