"""The files for inference: their logits are PyTorch's, and they say what an inference process must know."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ecavg.common.batches import DeviceData
from ecavg.common.config import RunConfig
from ecavg.common.errors import RunError, UsageError
from ecavg.common.models import build_model
from ecavg.common.tasks.task import task_of
from ecavg.common.weights import read_state_dict, write_state_dict
from ecavg.edge_agent import config, exporting
from ecavg.edge_agent.exporting import Deployed, Format, export, metadata_of
from ecavg.edge_agent.history import Source, Use, use_of

MLP = RunConfig(hidden_units=8, class_names=tuple(f"class {letter}" for letter in "abcdefghij"))
COLOUR = {"dataset": "own", "num_classes": 3, "image_shape": (3, 16, 16), "mean": (0.5, 0.4, 0.3)}
MOBILE = RunConfig(model="mobilenet_v2", small_images=True, **COLOUR)
RESNET = RunConfig(model="resnet18", small_images=True, **COLOUR)


def in_use(run: RunConfig, folder: Path) -> tuple[Use, Path]:
    """Return a model with statistics that training has moved, as it is in use on a device."""
    model, path = build_model(run, seed=1), folder / "weights.safetensors"
    generator = torch.Generator().manual_seed(0)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.uniform_(-0.1, 0.1, generator=generator)
            layer.running_var.uniform_(0.5, 1.5, generator=generator)
    write_state_dict(model.state_dict(), path)
    return use_of(path, "run", 7, Source.PUBLISHED, (0.5, 0.75)), path


def images_of(run: RunConfig, number: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randint(256, (number, *run.spec.inputs.shape), dtype=torch.uint8, generator=generator)


def expected_logits(run: RunConfig, weights: Path, images: torch.Tensor) -> np.ndarray:
    """Return the logits by the agent's own normalising, without any code of the export."""
    model = build_model(run)
    model.load_state_dict(read_state_dict(weights))
    with torch.no_grad():
        logits = model.eval()(DeviceData(images, run.spec, torch.device("cpu")).normalise(images))
    return logits.numpy()


@pytest.mark.parametrize(
    "run",
    [
        pytest.param(MLP, id="mlp"),
        pytest.param(RESNET, id="resnet18"),
        # The exporter takes ten seconds for its many layers.
        pytest.param(MOBILE, id="mobilenet_v2", marks=pytest.mark.soak),
    ],
)
def test_onnx_runtime_gives_the_logits_of_pytorch_for_batches_of_any_size(
    run: RunConfig, tmp_path: Path
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX needs ecavg[onnx]")
    pytest.importorskip("onnxscript", reason="ONNX needs ecavg[onnx]")
    use, weights = in_use(run, tmp_path)
    export(run, use, weights, "onnx", tmp_path / "model.onnx", ())
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for number in (1, 5):
        images = images_of(run, number)
        (logits,) = session.run(["logits"], {"images": images.numpy()})
        np.testing.assert_allclose(logits, expected_logits(run, weights, images), rtol=1e-4, atol=1e-5)
    assert session.get_modelmeta().custom_metadata_map == metadata_of(run, use)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "weights.safetensors"]


@pytest.mark.parametrize("run", [MLP, RESNET], ids=lambda run: run.model)
def test_exported_program_gives_the_logits_of_pytorch(run: RunConfig, tmp_path: Path) -> None:
    use, weights = in_use(run, tmp_path)
    export(run, use, weights, "torch-export", tmp_path / "model.pt2", ())
    extra = {"metadata.json": ""}
    program = torch.export.load(tmp_path / "model.pt2", extra_files=extra).module()
    for number in (1, 5):
        images = images_of(run, number)
        with torch.no_grad():
            logits = program(images).numpy()
        np.testing.assert_allclose(logits, expected_logits(run, weights, images), rtol=1e-4, atol=1e-5)
    assert json.loads(extra["metadata.json"]) == metadata_of(run, use)


def test_metadata_say_which_weights_they_belong_to_and_how_to_read_the_output(tmp_path: Path) -> None:
    use, _ = in_use(MLP, tmp_path)
    found = metadata_of(MLP, use)
    assert (found["model_sha256"], found["round"]) == (use.digest, "7")
    assert json.loads(found["labels"]) == list(MLP.class_names)
    assert json.loads(metadata_of(MOBILE, use)["labels"]) == ["0", "1", "2"]
    assert json.loads(metadata_of(MOBILE, use)["mean"]) == [0.5, 0.4, 0.3]


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"task": "regression", "dataset": "diabetes"}, "outputs"),
        ({"model": "cnn1d", "dataset": "own", "num_classes": 3, "inputs": {"shape": (2, 16)}}, "logits"),
    ],
    ids=["table of floats", "windows"],
)
@pytest.mark.parametrize("file_format", ["onnx", "torch-export"])
def test_file_of_other_data_gives_what_the_agent_measures(
    settings: dict[str, Any], name: str, file_format: Format, tmp_path: Path
) -> None:
    run = RunConfig(**settings)
    use, weights = in_use(run, tmp_path)
    output = tmp_path / "out"
    # A regression is in the unit of its targets, which are far from 0.
    inputs = 50 * torch.randn(5, *run.spec.inputs.shape, generator=torch.Generator().manual_seed(0))
    expected = task_of(run).predictions(torch.from_numpy(expected_logits(run, weights, inputs))).numpy()
    if file_format == "onnx":
        onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX needs ecavg[onnx]")
        pytest.importorskip("onnxscript", reason="ONNX needs ecavg[onnx]")
        export(run, use, weights, file_format, output, ())
        session = onnxruntime.InferenceSession(output, providers=["CPUExecutionProvider"])
        (found,) = session.run([name], {"inputs": inputs.numpy()})
    else:
        export(run, use, weights, file_format, output, ())
        found = torch.export.load(output).module()(inputs).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_example_of_the_docs_reads_the_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime", reason="ONNX needs ecavg[onnx]")
    pytest.importorskip("onnxscript", reason="ONNX needs ecavg[onnx]")
    text = (Path(__file__).parents[2] / "docs/model-in-use.md").read_text("utf-8")
    example = text.split("```python\n")[1].split("```")[0]
    use, weights = in_use(MLP, tmp_path)
    (tmp_path / "ecavg-agent").mkdir()
    export(MLP, use, weights, "onnx", tmp_path / "ecavg-agent/model.onnx", ())
    monkeypatch.chdir(tmp_path)
    variables: dict[str, Any] = {}
    exec(example, variables)
    assert variables["logits"].shape == (1, 10)


def test_wrong_logits_leave_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use, weights = in_use(MLP, tmp_path)
    output = tmp_path / "model.pt2"
    output.write_text("before")
    program = exporting._program

    def other_program(model: Deployed, run: RunConfig) -> torch.export.ExportedProgram:
        other = Deployed(run, weights)
        other.network[3].bias.data += 1
        return program(other, run)

    monkeypatch.setattr(exporting, "_program", other_program)
    with pytest.raises(RunError, match="its outputs differ from PyTorch's by 1"):
        export(MLP, use, weights, "torch-export", output, ())
    assert output.read_text() == "before"


def test_model_that_cannot_be_exported_is_named_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use, weights = in_use(MLP, tmp_path)
    monkeypatch.setattr(Deployed, "forward", lambda _, images: images if images.sum() > 0 else images + 1)
    with pytest.raises(RunError, match=r"^model 'mlp' cannot be exported as torch-export: .+$"):
        export(MLP, use, weights, "torch-export", tmp_path / "model.pt2", ())


def test_missing_package_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use, weights = in_use(MLP, tmp_path)
    monkeypatch.setattr(config, "find_spec", lambda name: None)
    expected = r"^writing ONNX needs onnxscript and onnxruntime: pip install 'ecavg\[onnx\]'$"
    with pytest.raises(UsageError, match=expected):
        export(MLP, use, weights, "onnx", tmp_path / "model.onnx", ())
    with pytest.raises(ValueError, match="writing ONNX needs onnxscript"):
        config.AgentConfig(server="127.0.0.1:1", export="onnx")
