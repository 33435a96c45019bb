"""What a model is measured by: evaluation, predictions, and BatchNorm's statistics."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ecavg.common.evaluation import evaluate, predict, recompute_statistics
from ecavg.common.tasks.classification import Classification
from tests.recipes import CPU, SPEC, Recorder, make_data, make_model, normalised


def test_images_that_do_not_fit_are_measured_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = make_data(43)
    measured = []
    for fits in (True, False):
        monkeypatch.setattr("ecavg.common.batches._fits", lambda tensors, device, fits=fits: fits)
        model = make_normalised_model()
        recompute_statistics(model, images, spec=SPEC, device=CPU, seed=2, batch_size=10)
        found = evaluate(model, images, labels, task=Classification(SPEC), device=CPU, batch_size=10)
        measured.append((found.loss, [tensor.tolist() for tensor in model.state_dict().values()]))
    assert measured[0] == measured[1]


@pytest.mark.parametrize("was_training", [True, False])
def test_evaluation_equals_a_plain_loop_over_images(was_training: bool) -> None:
    images, labels = make_data(23)
    model = make_model(batch_norm=True, dropout=0.5).train(was_training)
    model[1].eval()  # the user's own frozen layer
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    found = evaluate(model, images, labels, task=Classification(SPEC), device=CPU, batch_size=10)
    predicted = predict(model, images, task=Classification(SPEC), device=CPU, batch_size=7)

    assert model.training is model[4].training is was_training
    assert not model[1].training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model.eval()
    logits = torch.cat([model(normalised(image)[None]) for image in images]).detach()
    assert torch.equal(found.scores, (logits.argmax(1) == labels).float())
    assert found.score == found.scores.double().mean().item()
    assert found.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert found.num_examples == 23
    torch.testing.assert_close(predicted, logits)
    # More batches than are fetched at once.
    torch.testing.assert_close(
        predict(model, images, task=Classification(SPEC), device=CPU, batch_size=1), logits
    )


def test_evaluation_says_how_far_it_is_whenever_it_has_waited_for_the_device() -> None:
    images, labels = make_data(23)
    told: list[tuple[int, int]] = []
    evaluate(
        make_model(),
        images,
        labels,
        task=Classification(SPEC),
        device=CPU,
        batch_size=1,
        on_examples=lambda *so: told.append(so),
    )
    assert told == [(16, 23), (23, 23)]


def test_predictions_can_be_trained_with() -> None:
    images, _ = make_data(5)
    predicted = predict(make_model(), images, task=Classification(SPEC), device=CPU)
    assert predicted.dtype == torch.float32
    assert not predicted.requires_grad
    scale = torch.ones(3, requires_grad=True)
    (predicted * scale).sum().backward()  # an inference tensor cannot be saved for this
    assert torch.allclose(scale.grad, predicted.sum(0))


def make_normalised_model() -> nn.Module:
    """Chance before a BatchNorm, one BatchNorm after another, and statistics that fit nothing."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.BatchNorm2d(3, momentum=0.3), nn.Flatten(), nn.Dropout(0.5), nn.Linear(192, 6),
        nn.BatchNorm1d(6, momentum=None), nn.Linear(6, 3),
    )  # fmt: skip
    for norm in (model[0], model[4]):
        for tensor in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
            tensor.uniform_(1, 3)
        norm.num_batches_tracked.fill_(77)
    return model


@pytest.mark.parametrize(("batch_size", "num_batches"), [(512, 1), (25, 1), (10, 3), (1, 12)])
def test_recomputed_statistics_are_the_mean_over_equal_batches(batch_size: int, num_batches: int) -> None:
    images, _ = make_data(25)
    model = make_normalised_model()
    given = {name: tensor.double().numpy().copy() for name, tensor in model.state_dict().items()}
    mean, std = (np.array(values).reshape(3, 1, 1) for values in (SPEC.inputs.mean, SPEC.inputs.std))
    x = (images.double().numpy() / 255 - mean) / std
    order = torch.randperm(25, generator=torch.Generator().manual_seed(9)).numpy()
    expected: dict[str, list[Any]] = {"0": [], "4": []}
    for batch in np.array_split(x[order], num_batches):
        hidden = batch.transpose(0, 2, 3, 1).reshape(-1, 3)
        expected["0"].append([hidden.mean(0), hidden.var(0, ddof=1)])
        hidden = (hidden - hidden.mean(0)) / np.sqrt(hidden.var(0) + 1e-5)
        hidden = hidden * given["0.weight"] + given["0.bias"]
        hidden = hidden.reshape(-1, 8, 8, 3).transpose(0, 3, 1, 2).reshape(-1, 192)
        hidden = hidden @ given["3.weight"].T + given["3.bias"]
        expected["4"].append([hidden.mean(0), hidden.var(0, ddof=1)])

    recompute_statistics(model, images, spec=SPEC, device=CPU, seed=9, batch_size=batch_size)

    after = model.state_dict()
    for norm, batches in expected.items():
        running_mean, running_var = np.mean(batches, 0)
        np.testing.assert_allclose(after[f"{norm}.running_mean"], running_mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(after[f"{norm}.running_var"], running_var, rtol=1e-4)
        assert after[f"{norm}.num_batches_tracked"] == num_batches
    parameters = [name for name, _ in model.named_parameters()]
    assert all(np.array_equal(after[name].double().numpy(), given[name]) for name in parameters)


def test_recomputing_statistics_leaves_modes_momenta_and_chance_alone() -> None:
    model = make_normalised_model()
    model[0].eval()
    before = torch.get_rng_state()
    recompute_statistics(model, make_data(25)[0], spec=SPEC, device=CPU, seed=0)
    assert [module.training for module in model] == [False, True, True, True, True, True]
    assert (model[0].momentum, model[4].momentum) == (0.3, None)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(RuntimeError):
        recompute_statistics(model, torch.zeros(2, 3, 9, 9, dtype=torch.uint8), spec=SPEC, device=CPU, seed=0)
    assert (model[0].momentum, model[4].momentum, model.training) == (0.3, None, True)


def test_recomputed_variances_have_what_differs_between_agents() -> None:
    images = torch.zeros(60, 3, 8, 8, dtype=torch.uint8)
    images[30:] = 255  # one agent at night, one by day
    model = make_normalised_model()
    recompute_statistics(model, images, spec=SPEC, device=CPU, seed=0, batch_size=30)
    assert model[0].running_var.numpy() == pytest.approx(0.25 / np.square(SPEC.inputs.std), rel=0.1)


def test_statistics_stay_where_there_is_nothing_to_recompute() -> None:
    images, _ = make_data(10)
    batch_statistics = nn.Sequential(Recorder(), nn.BatchNorm1d(3, track_running_stats=False))
    for model in (nn.Sequential(Recorder()), batch_statistics):
        recompute_statistics(model, images, spec=SPEC, device=CPU, seed=0)
        assert model[0].batches == []
    one = make_normalised_model()
    before = {name: tensor.clone() for name, tensor in one.state_dict().items()}
    recompute_statistics(one, images[:1], spec=SPEC, device=CPU, seed=0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in one.state_dict().items())


class FarDevice(TorchDispatchMode):
    """A device that has shapes but no numbers, and the count of how often the host waited for one.

    PyTorch's "meta" device refuses to give numbers, and with this mode it gives zeros.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if args and isinstance(args[0], Tensor) and args[0].is_meta:
            if func is torch.ops.aten._local_scalar_dense.default:
                self.num_waits += 1
                return 1
            if func is torch.ops.aten._to_copy.default and given.get("device") == CPU:
                self.num_waits += 1
                return torch.zeros(args[0].shape, dtype=given.get("dtype") or args[0].dtype)
        if func is torch.ops.aten.copy_.default and args[1].is_meta and not args[0].is_meta:
            self.num_waits += 1
            return args[0]
        return func(*args, **given)


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    monkeypatch.setattr("ecavg.common.batches._fits", lambda tensors, device: True)
    return torch.device("meta")


@pytest.mark.parametrize(("num_batches", "num_waits"), [(1, 1), (16, 1), (17, 2), (50, 4)])
def test_evaluation_waits_for_the_device_once_in_sixteen_batches(
    far: torch.device, num_batches: int, num_waits: int
) -> None:
    images, labels = make_data(2 * num_batches)
    with FarDevice() as mode:
        evaluate(make_normalised_model(), images, labels, task=Classification(SPEC), device=far, batch_size=2)
    assert mode.num_waits == num_waits


@pytest.mark.parametrize("num_batches", [1, 50])
def test_recomputing_statistics_waits_for_the_device_once_for_each_layer(
    far: torch.device, num_batches: int
) -> None:
    model = make_normalised_model()
    with FarDevice() as mode:
        images, _ = make_data(3 * num_batches)
        recompute_statistics(model, images, spec=SPEC, device=far, seed=0, batch_size=3)
    # The model has two layers of BatchNorm, and its counts are on the device again.
    assert mode.num_waits == 2
    assert {buffer.device for buffer in model.buffers()} == {far}


def test_model_that_fails_in_evaluation_is_back_in_its_mode() -> None:
    model = make_model()
    with pytest.raises(RuntimeError):
        evaluate(
            model,
            torch.zeros(2, 3, 9, 9, dtype=torch.uint8),
            torch.tensor([0, 1]),
            task=Classification(SPEC),
            device=CPU,
        )
    assert model.training
