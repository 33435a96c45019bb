"""Initial weights, from real files in torchvision's format, fetched by its own code from file:// URLs."""

import errno
import hashlib
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from structlog.testing import capture_logs
from torch import Tensor, nn

from ecavg.cloud_server.trainer import initial
from ecavg.cloud_server.trainer.initial import initial_model
from ecavg.common.config import RunConfig
from ecavg.common.errors import RunError, UsageError
from ecavg.common.models import build_model
from ecavg.common.seeds import derive_seed
from ecavg.common.weights import write_state_dict

StateDict = dict[str, Tensor]
Publish = Callable[..., Path]


def cifar(model: str, **more: Any) -> RunConfig:
    return RunConfig(model=model, dataset="cifar10", initial_weights="pretrained", seed=7, **more)


def drawn(run: RunConfig) -> StateDict:
    """Return the weights that the run would begin with if no checkpoint were loaded."""
    return build_model(run, seed=derive_seed(run.seed, "initial_weights")).state_dict()


def learnt(name: str, **options: Any) -> StateDict:
    """Return a state_dict of torchvision's own model for ImageNet, in which no two tensors are alike."""
    model: nn.Module = torchvision.models.get_model(name, weights=None, **options)
    state_dict: StateDict = model.state_dict()
    generator = torch.Generator().manual_seed(1)
    for tensor in state_dict.values():
        tensor.copy_(torch.rand(tensor.shape, generator=generator) * 100)
    return state_dict


@pytest.fixture
def checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where torchvision keeps what it has downloaded."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch/hub/checkpoints"


@pytest.fixture
def publish(tmp_path: Path, checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> Publish:
    """Return a function that makes its content the checkpoint which torchvision publishes for a model.

    The function returns the path of the checkpoint's file.
    """

    def publish(model: str, content: Any, name: str = "") -> Path:
        torch.save(content, tmp_path / "new")
        digest = hashlib.sha256((tmp_path / "new").read_bytes()).hexdigest()
        path = (tmp_path / "new").rename(tmp_path / (name or f"{model}-{digest[:8]}.pth"))
        weights = torchvision.models.get_model_weights(model).DEFAULT
        monkeypatch.setattr(weights.value, "url", path.as_uri())
        return path

    return publish


def assert_taken_except(
    names: list[str], found: StateDict, published: StateDict, fresh: StateDict, log: list[Any]
) -> None:
    """All tensors are the published ones, but for those named, which are drawn under the run's seed."""
    for name, tensor in found.items():
        assert torch.equal(tensor, fresh[name] if name in names else published[name]), name
    assert [line["drawn"] for line in log] == [names]
    assert log[0]["num_tensors"] == len(found) - len(names) > 40


def test_pretrained_backbone_is_torchvisions_and_the_head_is_drawn(publish: Publish) -> None:
    run, published = cifar("mobilenet_v2"), learnt("mobilenet_v2")
    file = publish("mobilenet_v2", published)
    with capture_logs() as log:
        model = initial_model(run)
    head = ["classifier.1.weight", "classifier.1.bias"]
    assert_taken_except(head, model.state_dict(), published, drawn(run), log)
    assert log[0]["ignored"] == []
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())

    file.unlink()  # the next time it is there already
    again = initial_model(run).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())


def test_head_is_taken_when_the_run_has_as_many_classes(publish: Publish) -> None:
    run, published = cifar("mobilenet_v2", num_classes=1000), learnt("mobilenet_v2")
    publish("mobilenet_v2", published)
    with capture_logs() as log:
        found = initial_model(run).state_dict()
    assert_taken_except([], found, published, {}, log)


@pytest.mark.parametrize(
    ("model", "names"),
    [
        ("resnet18", ["conv1.weight", "fc.weight", "fc.bias"]),
        # the bias would have fitted, but it was learnt with another kernel
        (
            "squeezenet1_0",
            ["features.0.weight", "features.0.bias", "classifier.1.weight", "classifier.1.bias"],
        ),
    ],
)
def test_stem_for_small_images_is_drawn_as_well(model: str, names: list[str], publish: Publish) -> None:
    run, published = cifar(model, small_images=True), learnt(model)
    publish(model, published)
    with capture_logs() as log:
        found = initial_model(run).state_dict()
    assert found[names[0]].shape[2:] == (3, 3)
    assert_taken_except(names, found, published, drawn(run), log)


def test_auxiliary_heads_are_ignored(publish: Publish) -> None:
    run = cifar("googlenet", image_shape=(3, 64, 64))
    published = learnt("googlenet", aux_logits=True, init_weights=False)
    publish("googlenet", published)
    with capture_logs() as log:
        found = initial_model(run).state_dict()
    assert_taken_except(["fc.weight", "fc.bias"], found, published, drawn(run), log)
    assert log[0]["ignored"] == [name for name in published if name.startswith("aux")]


def test_densenets_old_names_are_understood(publish: Publish) -> None:
    run, published = cifar("densenet121"), learnt("densenet121")
    old = {}
    for name, tensor in published.items():  # as in the file of 2017
        before, layer, after = name.rpartition("denselayer")
        for kind in ("norm", "conv"):
            after = after.replace(f".{kind}1.", f".{kind}.1.").replace(f".{kind}2.", f".{kind}.2.")
        if not name.endswith("num_batches_tracked"):
            old[before + layer + (after if layer else name)] = tensor
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    publish("densenet121", old)
    with capture_logs() as log:
        found = initial_model(run).state_dict()
    published |= {name: torch.tensor(0) for name in published if name.endswith("num_batches_tracked")}
    assert_taken_except(["classifier.weight", "classifier.bias"], found, published, drawn(run), log)


def test_mnasnet_keeps_the_version_that_it_asks_for(publish: Publish) -> None:
    run, published = cifar("mnasnet0_5"), learnt("mnasnet0_5")
    publish("mnasnet0_5", published)
    with capture_logs() as log:
        found = initial_model(run).state_dict()
    assert_taken_except(["classifier.1.weight", "classifier.1.bias"], found, published, drawn(run), log)


def refusal(run: RunConfig) -> str:
    with pytest.raises(UsageError) as caught:
        initial_model(run)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("model", ["mlp", "tests.integration.models:linear"])
def test_models_that_nobody_publishes_are_refused(model: str) -> None:
    assert f"no \"pretrained\" weights are published for model '{model}'" in refusal(cifar(model))


@pytest.mark.parametrize(
    ("published", "tensor"),
    [
        ({}, r"conv1.weight of shape [64, 3, 7, 7]"),
        ({"features.0.weight": torch.zeros(3)}, r"conv1.weight of shape [64, 3, 7, 7]"),
        ({"conv1.weight": torch.zeros(64, 3, 3, 3)}, r"conv1.weight of shape [64, 3, 7, 7]"),
        ({"layer4.1.bn2.weight": torch.zeros(3)}, r"layer4.1.bn2.weight of shape [512]"),
        ({"layer4.1.bn2.weight": None}, r"layer4.1.bn2.weight of shape [512]"),
    ],
    ids=["nothing", "nothing that fits", "another stem", "another layer", "no such layer"],
)
def test_what_differs_in_more_than_head_and_stem_is_refused(
    published: dict[str, Tensor | None], tensor: str, publish: Publish
) -> None:
    rest = learnt("resnet18") if any(name.split(".")[0] in ("conv1", "layer4") for name in published) else {}
    publish("resnet18", {name: t for name, t in {**rest, **published}.items() if t is not None})
    message = refusal(cifar("resnet18"))
    assert "what torchvision publishes for resnet18 does not fit the run's model" in message
    assert f"no tensor {tensor}" in message


def test_corrupt_file_from_an_earlier_download_is_refused(publish: Publish, checkpoints: Path) -> None:
    file = publish("mobilenet_v2", learnt("mobilenet_v2"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    checkpoints.mkdir(parents=True)
    (checkpoints / file.name).write_bytes(content)
    message = refusal(cifar("mobilenet_v2"))
    assert f"{checkpoints / file.name} is not what its name says" in message
    assert "remove it" in message
    (checkpoints / file.name).unlink()
    initial_model(cifar("mobilenet_v2"))


def test_corrupt_download_fails_and_is_not_kept(publish: Publish, checkpoints: Path) -> None:
    file = publish("mobilenet_v2", {}, name="mobilenet_v2-00000000.pth")
    with pytest.raises(RunError, match=r'invalid hash value .expected "0{8}"') as caught:
        initial_model(cifar("mobilenet_v2"))
    assert str(caught.value).startswith(f"cannot load {file.as_uri()}: ")
    assert list(checkpoints.iterdir()) == []


class Attack:
    """Creates a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_published_file_runs_no_code(publish: Publish, tmp_path: Path) -> None:
    publish("mobilenet_v2", {"classifier.1.bias": Attack(tmp_path / "attacked")})
    with pytest.raises(RunError, match=r"cannot load file://\S+: Weights only load failed") as caught:
        initial_model(cifar("mobilenet_v2"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "attacked").exists()


def test_without_network_it_says_what_to_download_and_where_to(publish: Publish, checkpoints: Path) -> None:
    file = publish("mobilenet_v2", {})
    file.unlink()
    message = refusal(cifar("mobilenet_v2"))
    assert f"cannot fetch {file.as_uri()} (<urlopen error" in message
    assert f"download it into {checkpoints}, or give a safetensors file" in message


@pytest.mark.usefixtures("checkpoints")
def test_dead_proxy_of_a_download_is_named_with_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = torchvision.models.get_model_weights("mobilenet_v2").DEFAULT
    url = "http://weights.invalid/mobilenet_v2-00000000.pth"
    monkeypatch.setattr(weights.value, "url", url)
    monkeypatch.setenv("http_proxy", "http://me:secret@127.0.0.1:9")
    message = refusal(cifar("mobilenet_v2"))
    assert f"cannot fetch {url} through the proxy of http_proxy (<urlopen error" in message
    assert "secret" not in message


@pytest.mark.usefixtures("checkpoints")
def test_silent_server_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(initial, "IDLE_SECONDS", 0.1)
    weights = torchvision.models.get_model_weights("mobilenet_v2").DEFAULT
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/mobilenet_v2-00000000.pth"
        monkeypatch.setattr(weights.value, "url", url)
        assert f"cannot fetch {url} (timed out)" in refusal(cifar("mobilenet_v2"))
    assert socket.getdefaulttimeout() is None


def test_full_disk_is_not_the_users_fault(publish: Publish, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: object, **_options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    publish("mobilenet_v2", {})
    monkeypatch.setattr("torch.hub.download_url_to_file", fail)
    with pytest.raises(OSError, match="No space left") as caught:
        initial_model(cifar("mobilenet_v2"))
    assert caught.value.errno == errno.ENOSPC  # the server waits for room


def digits(path: Path) -> RunConfig:
    return RunConfig(initial_weights=str(path), seed=7)


def test_weights_come_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = {name: torch.rand_like(tensor) for name, tensor in drawn(RunConfig()).items()}
    write_state_dict(mine, tmp_path / "mine.safetensors")
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / "mine.safetensors", Path("mine.safetensors")):
        found = initial_model(digits(path)).state_dict()
        assert found.keys() == mine.keys()
        assert all(torch.equal(found[name], mine[name]) for name in mine)


@pytest.mark.parametrize("initial_weights", ["shared", "independent"])
def test_otherwise_they_are_drawn_under_the_seed(initial_weights: str) -> None:
    run = RunConfig(initial_weights=initial_weights, seed=7)
    found, other = initial_model(run).state_dict(), drawn(RunConfig(seed=8))
    assert all(torch.equal(tensor, found[name]) for name, tensor in drawn(run).items())
    assert not torch.equal(found["1.weight"], other["1.weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"3.weight": torch.zeros(5, 128), "3.bias": torch.zeros(5)},
            "tensor 3.weight is F32 [5, 128], the run's model has F32 [10, 128]; send a state_dict of the"
            " run's model, with a last layer for its 10 classes",
        ),
        (
            {"1.bias": torch.zeros(128, dtype=torch.float16)},
            "tensor 1.bias is F16 [128], the run's model has F32",
        ),
        ({"5.bias": torch.zeros(1)}, "tensor 5.bias is F32 [1], the run's model has no such tensor"),
        ({"1.bias": torch.full((128,), torch.nan)}, "tensor 1.bias holds NaN or infinite values"),
    ],
    ids=["classes", "dtype", "extra", "not finite"],
)
def test_file_that_does_not_fit_is_refused(change: StateDict, message: str, tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    write_state_dict({**drawn(RunConfig()), **change}, path)
    found = refusal(digits(path))
    assert found.startswith("run.initial_weights: ")
    assert str(path) in found
    assert message in found


def test_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    assert refusal(digits(path)) == f"run.initial_weights: cannot read {path}: No such file or directory"
    torch.save(drawn(RunConfig()), path)
    assert f"{path}: not a usable safetensors file" in refusal(digits(path))
    path.unlink()
    path.mkdir()
    assert refusal(digits(path)) == f"run.initial_weights: cannot read {path}: Is a directory"


def test_without_a_home_the_published_weights_have_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCH_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "~")
    assert "set HOME or TORCH_HOME" in refusal(cifar("resnet18"))


def test_home_is_filled_in_before_the_name_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert str(tmp_path / "w.safetensors") in refusal(digits(Path("~/w.safetensors")))
