import math

import pytest
import torch
import torchvision
from scipy.optimize import linear_sum_assignment
from torch import nn
from torch.func import functional_call
from torch.nn import functional

from ecavg.cloud_server.trainer import alignment
from ecavg.cloud_server.trainer.alignment import align, align_all
from ecavg.cloud_server.trainer.permutations import NotTraceable, apply, permutation_groups
from ecavg.common.config import RunConfig
from ecavg.common.models import build_model
from ecavg.common.weights import write_state_dict
from tests.soak import others_soak

# Groups counted by hand from the papers' tables: layers whose outputs nothing but weights follow, plus one
# for each chain of residual additions.
NUM_GROUPS = {
    "vgg11": 8 + 2,
    "resnet18": 4 + 8,  # chains (the first with the stem), inner layers
    "resnet50": 1 + 4 + 2 * 16,  # stem, chains, inner layers
    "mobilenet_v2": 1 + 16 + 7 + 1,  # stem, expansions, chains, last
    "mobilenet_v3_small": 1 + 10 + 9 + 5 + 2,  # stem, expansions, squeezes, chains, last
    "densenet121": 1 + 2 * 58 + 3,  # stem, layers, transitions
    "convnext_tiny": 4 + 18,
    "efficientnet_b0": 1 + 15 + 16 + 7 + 1,
}
FAMILIES = {
    "alexnet": 7, "efficientnet_v2_s": 75, "googlenet": 57, "inception_v3": 94, "maxvit_t": 51,
    "mnasnet0_5": 25, "regnet_x_400mf": 700, "regnet_y_400mf": 1000, "resnext50_32x4d": 1000,
    "shufflenet_v2_x0_5": 80, "squeezenet1_1": 25, "swin_t": 12, "swin_v2_t": 24, "vit_b_32": 12,
}  # fmt: skip
IMAGE_SIZES = {"inception_v3": 80, "maxvit_t": 224, "vgg11": 32, "resnet50": 32, "densenet121": 32}

# Each of these has neighbours here with the same layers.
TAKE_LONG = ("vgg11", "maxvit_t", "efficientnet_v2_s", "swin_v2_t", "mnasnet0_5")


@pytest.fixture(autouse=True)
def _seed():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        yield


def run_config(**fields) -> RunConfig:
    return RunConfig.model_validate({"dataset": "cifar10", **fields})


def torchvision_model(name: str, image_size: int) -> nn.Module:
    options = {"aux_logits": False, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
    if name.startswith("vit"):
        options["image_size"] = image_size
    return torchvision.models.get_model(name, weights=None, num_classes=10, **options)


def randomise(model: nn.Module, image_shape: tuple[int, ...]) -> nn.Module:
    """Every parameter and statistic random, and the logits alive: float64, in eval mode."""
    model.double().eval()
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1 or not parameter.any():
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
            elif parameter.numel() == parameter.shape[0]:  # layer_scale
                parameter.normal_()
        for norm in norms:
            norm.train().momentum = 1.0
        model(torch.randn(4, *image_shape).double())
        for norm in norms:
            norm.eval()
            norm.running_mean += 0.3 * norm.running_var.sqrt() * torch.randn_like(norm.running_mean)
            norm.running_var *= 0.5 + torch.rand_like(norm.running_var)
    return model


def random_permutations(groups):
    return [torch.randperm(group.size) for group in groups]


def outputs(model, state_dict, images):
    with torch.no_grad():
        return functional_call(model, state_dict, images, tie_weights=False)


def difference(model: nn.Module, state_dict, image_shape) -> float:
    """How far the logits of the state_dict are from the model's, as a part of their scale."""
    images = torch.randn(2, *image_shape).double()
    expected = outputs(model, model.state_dict(), images)
    # Logits that the images hardly reach would be right for any permutation.
    assert expected.std(0).mean() > 1e-4 * expected.abs().max()
    found = outputs(model, state_dict, images)
    return float((found - expected).abs().max() / expected.abs().max())


def check_groups(model: nn.Module, image_shape):
    randomise(model, image_shape)
    groups = permutation_groups(model, torch.zeros(2, *image_shape))
    before = model.state_dict()
    after = apply(groups, random_permutations(groups), before)
    moved = {place.tensor for group in groups if group.size > 8 for place in group.places}
    assert all(not torch.equal(before[name], after[name]) for name in moved)
    assert difference(model, after, image_shape) <= 1e-6
    return groups


@pytest.mark.parametrize("name", others_soak(NUM_GROUPS, NUM_GROUPS.keys() - TAKE_LONG))
def test_any_permutation_leaves_the_logits_unchanged(name):
    shape = (3, IMAGE_SIZES.get(name, 64), IMAGE_SIZES.get(name, 64))
    model = torchvision_model(name, shape[1])

    groups = check_groups(model, shape)

    assert len(groups) == NUM_GROUPS[name]
    # All but the biases of the logits.
    moving = {place.tensor for group in groups for place in group.places}
    stays = [name for name, tensor in model.state_dict().items() if tensor.dim() and name not in moving]
    assert len(stays) == 1
    assert model.state_dict()[stays[0]].shape == (10,)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "densenet121"])
def test_models_for_small_images_have_the_same_groups(name):
    model = build_model(run_config(model=name, small_images=True), seed=0)
    assert len(check_groups(model, (3, 32, 32))) == NUM_GROUPS[name]


@pytest.mark.parametrize("name", others_soak(FAMILIES, FAMILIES.keys() - TAKE_LONG))
def test_every_torchvision_family_can_be_permuted(name):
    shape = (3, IMAGE_SIZES.get(name, 64), IMAGE_SIZES.get(name, 64))
    assert len(check_groups(torchvision_model(name, shape[1]), shape)) >= FAMILIES[name]


def test_float32_logits_stay_within_a_ten_thousandth():
    model = randomise(torchvision_model("resnet18", 32), (3, 32, 32)).float()
    groups = permutation_groups(model, torch.zeros(2, 3, 32, 32))
    images = torch.randn(2, 3, 32, 32)
    found = outputs(model, apply(groups, random_permutations(groups), model.state_dict()), images)
    expected = outputs(model, model.state_dict(), images)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("index", range(6))
def test_leaving_out_one_place_changes_the_logits(index):
    """So the comparison of logits would notice."""
    model = randomise(torchvision_model("resnet18", 32), (3, 32, 32))
    groups = permutation_groups(model, torch.zeros(2, 3, 32, 32))
    group = groups[5]
    incomplete = group._replace(places=group.places[:index] + group.places[index + 1 :])
    after = apply([incomplete], [torch.randperm(group.size)], model.state_dict())
    assert difference(model, after, (3, 32, 32)) > 1e-4


class Net(nn.Module):
    """Layers by name, and a forward that is given as a function."""

    def __init__(self, forward, **layers):
        super().__init__()
        self._forward = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self._forward(self, x)


def conv(inputs, outputs, **options):
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


def head(inputs=12):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))


def crossed_halves(net, x):
    a, b = net.a(x), net.b(x)
    first, second = b.chunk(2, dim=1)
    return net.head(net.c(functional.relu(a + b)) + net.c(a - torch.cat([second, first], 1)))


def half_activated(net, x):
    first, second = net.a(x).chunk(2, dim=1)
    return net.head(net.c(torch.cat([functional.relu(first), second], 1)))


def half_in_place(net, x):
    y = net.a(x)
    torch.relu_(y[:, :6])
    y[:, 3:6].relu_()
    return net.head(net.c(y))


def module_in_place(net, x):
    y = net.a(x)
    net.activation(y[:, :6])
    return net.head(net.c(y))


def mirrored(net, x):
    y = net.a(x)
    return net.head(net.c(y + y.flip(1)))


def softmaxed(net, x):
    return net.head(net.c(torch.softmax(net.a(x), 1) * torch.cumsum(net.b(x), 1)))


def spatially_weighted(net, x):
    y = net.a(x)
    return net.head(y * torch.sigmoid(net.mask(y)))


def doubled(net, x):
    y = net.a(x)
    return net.head(net.c(torch.cat([y, functional.relu(y)], 1)))


def rolled(net, x):
    return net.head(net.c(torch.roll(net.a(x), 1, dims=1)))


def two_dims(net, x):
    return net.last(net.norm(torch.flatten(net.a(x), 1)))


def shuffled(net, x):
    y = net.a(x)
    y = y.view(y.size(0), 3, 4, y.shape[2], 8).transpose(1, 2).flatten(1, 2)
    return net.head(net.c(y) + net.b(x))


def recurrent(net, x):
    y = net.first(torch.flatten(x, 1))
    for _ in range(3):
        y = torch.tanh(y + net.again(y))
    return net.last(y)


def as_tokens(net, x):
    y = net.a(x).flatten(2).transpose(1, 2)
    y = y + net.attention(y, y, y)[0] if hasattr(net, "attention") else y
    return net.last(net.norm(y + net.mlp(y)).mean(1))


def tied(net, x):
    return net.last(functional.relu(functional.linear(net.first(torch.flatten(x, 1)), net.first.weight.t())))


MLP = nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12))
TRICKY = {
    "crossed halves": (crossed_halves, {"a": conv(3, 12), "b": conv(3, 12), "c": conv(12, 12)}, 12, 1),
    "half activated": (half_activated, {"a": conv(3, 12), "c": conv(12, 12)}, 12, 3),
    "half in place": (half_in_place, {"a": conv(3, 12), "c": conv(12, 12)}, 12, 2),
    "module in place": (
        module_in_place,
        {"a": conv(3, 12), "c": conv(12, 12), "activation": nn.ReLU(inplace=True)},
        12,
        3,
    ),
    "mirrored": (mirrored, {"a": conv(3, 12), "c": conv(12, 12)}, 12, 1),
    "softmaxed": (softmaxed, {"a": conv(3, 12), "b": conv(3, 12), "c": conv(12, 12)}, 12, 1),
    "spatially weighted": (spatially_weighted, {"a": conv(3, 12), "mask": conv(12, 1)}, 12, 1),
    "doubled": (doubled, {"a": conv(3, 12), "c": conv(24, 12)}, 12, 2),
    "rolled": (rolled, {"a": conv(3, 12), "c": conv(12, 12)}, 12, 2),
    "norm after flatten": (
        two_dims,
        {"a": conv(3, 12), "norm": nn.BatchNorm1d(12 * 64), "last": nn.Linear(12 * 64, 10)},
        12,
        1,
    ),
    "shuffled": (shuffled, {"a": conv(3, 12), "b": conv(3, 12), "c": conv(12, 12, groups=4)}, 12, 8),
    "recurrent": (
        recurrent,
        {"first": nn.Linear(192, 16), "again": nn.Linear(16, 16), "last": nn.Linear(16, 10)},
        12,
        1,
    ),
    "tokens": (
        as_tokens,
        {"a": conv(3, 12), "norm": nn.LayerNorm(12), "mlp": MLP, "last": nn.Linear(12, 10)},
        12,
        2,
    ),
    "attention": (
        as_tokens,
        {
            "a": conv(3, 12), "norm": nn.LayerNorm(12), "mlp": MLP, "last": nn.Linear(12, 10),
            "attention": nn.MultiheadAttention(12, 2, batch_first=True),
        },
        12,
        1,
    ),
    "tied": (tied, {"first": nn.Linear(192, 16, bias=False), "last": nn.Linear(192, 10)}, 12, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", TRICKY)
def test_tricky_graphs_are_permuted_soundly(name):
    forward, layers, width, num_groups = TRICKY[name]
    if "last" not in layers:
        layers = {**layers, "head": head(width)}
    assert len(check_groups(Net(forward, **layers), (3, 8, 8))) == num_groups


SEQUENTIAL = {
    "grouped": ([conv(3, 12), nn.ReLU(), conv(12, 24, groups=4), conv(24, 12)], 4 + 4 + 1),
    "depthwise": ([conv(3, 12), conv(12, 12, groups=12), nn.PReLU(12)], 1),
    "depthwise that multiplies": ([conv(3, 6), conv(6, 12, groups=6)], 6),
    "group norm": ([conv(3, 12), nn.GroupNorm(3, 12), nn.Hardswish()], 3),
    "one layer norm": ([conv(3, 12), nn.GroupNorm(1, 12), nn.MaxPool2d(2)], 1),
    "layer norm of an image": ([conv(3, 12), nn.LayerNorm([12, 8, 8])], 0),
    "softmax": ([conv(3, 12), nn.Softmax2d(), conv(12, 12)], 1),
    "weight norm": ([nn.utils.parametrizations.weight_norm(conv(3, 12)), conv(12, 12)], 1),
    "spatial pooling of a volume": ([conv(3, 12), nn.Unflatten(1, (1, 12)), nn.AvgPool3d(3, 1, 1),
                                     nn.Flatten(1, 2)], 0),
}  # fmt: skip


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_layers_are_permuted_soundly(name):
    layers, num_groups = SEQUENTIAL[name]
    assert len(check_groups(nn.Sequential(*layers, head()), (3, 8, 8))) == num_groups


def test_a_shared_layer_moves_both_of_its_outputs():
    shared = nn.Linear(16, 16)
    layers = [nn.Flatten(), nn.Linear(192, 16), shared, nn.ReLU(), shared, nn.Tanh(), nn.Linear(16, 10)]
    assert len(check_groups(nn.Sequential(*layers), (3, 8, 8))) == 1


def test_a_tensor_with_two_names_moves_under_both():
    first, second = nn.Linear(16, 16), nn.Linear(16, 16)
    second.weight = first.weight
    layers = [nn.Flatten(), nn.Linear(192, 16), first, nn.ReLU(), second, nn.Linear(16, 10)]
    model = nn.Sequential(*layers)
    randomise(model, (3, 8, 8))
    groups = permutation_groups(model, torch.zeros(2, 3, 8, 8))

    after = apply(groups, random_permutations(groups), model.state_dict())

    assert len(groups) == 1
    assert torch.equal(after["2.weight"], after["4.weight"])


def test_a_hooked_layer_stays_fixed():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 10))
    model[1].register_forward_hook(lambda module, args, output: output.cumsum(1))
    assert permutation_groups(model, torch.zeros(2, 3, 8, 8)) == []


def test_a_model_without_a_fixed_graph_is_not_traceable():
    model = Net(lambda net, x: net.last(x.flatten(1)) if x.sum() > 0 else x, last=nn.Linear(192, 10))
    with pytest.raises(NotTraceable):
        permutation_groups(model, torch.zeros(2, 3, 8, 8))


def test_parameters_outside_the_graph_make_it_not_traceable():
    model = Net(lambda net, x: net.last(x.flatten(1)), last=nn.Linear(192, 10), aux=nn.Linear(192, 10))
    with pytest.raises(NotTraceable, match=r"aux\.weight"):
        permutation_groups(model, torch.zeros(2, 3, 8, 8))


def test_the_model_is_left_as_it_was():
    model = torchvision_model("resnet18", 32).train()
    model.bn1.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    permutation_groups(model, torch.zeros(2, 3, 32, 32))
    assert model.training
    assert model.layer1.training
    assert not model.bn1.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def mlp(seed: int) -> nn.Module:
    return build_model(run_config(model="mlp", hidden_units=64), seed=seed)


def same(first, second) -> bool:
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize("name", ["mlp", "resnet18", "mobilenet_v2", "shufflenet_v2_x0_5"])
def test_align_undoes_a_permutation(name):
    model = build_model(run_config(model=name), seed=0)
    groups = permutation_groups(model, torch.zeros(2, 3, 32, 32))
    original = model.state_dict()
    permuted = apply(groups, random_permutations(groups), original)

    aligned = apply(groups, align(original, permuted, groups, seed=3), permuted)

    assert not same(original, permuted)
    assert same(original, aligned)
    mean = {key: (tensor + aligned[key]) / 2 for key, tensor in original.items()}
    assert same(original, mean)


def test_align_undoes_a_permutation_of_disturbed_weights():
    """As after training from the same weights: not the same, but near."""
    model = randomise(build_model(run_config(model="resnet18"), seed=0), (3, 32, 32)).float()
    groups = permutation_groups(model, torch.zeros(2, 3, 32, 32))
    original = model.state_dict()
    disturbed = {
        name: tensor + 0.5 * tensor.std() * torch.randn_like(tensor) if tensor.dim() > 1 else tensor
        for name, tensor in original.items()
    }
    permutations = random_permutations(groups)
    found = align(original, apply(groups, permutations, disturbed), groups, seed=3)
    for group, permutation, inverse in zip(groups, permutations, found, strict=True):
        assert (permutation[inverse] == torch.arange(group.size)).float().mean() > 0.99


def test_align_brings_a_residual_chain_no_further_away():
    """The group is on both axes of one tensor, where the assignment alone can go wrong."""
    layers = {"first": nn.Linear(192, 16), "again": nn.Linear(16, 16), "last": nn.Linear(16, 10)}
    model = Net(recurrent, **layers)
    groups = permutation_groups(model, torch.zeros(2, 3, 8, 8))
    for seed in range(10):
        first, second = ({key: torch.randn_like(value) for key, value in model.state_dict().items()}
                         for _ in range(2))  # fmt: skip
        aligned = apply(groups, align(first, second, groups, seed=seed), second)
        assert distance(first, aligned) < distance(first, second)


def distance(first, second) -> float:
    return math.sqrt(sum(float((tensor - second[name]).square().sum()) for name, tensor in first.items()))


def test_align_of_the_same_weights_moves_nothing():
    state_dict = mlp(0).state_dict()
    groups = permutation_groups(mlp(0), torch.zeros(2, 3, 32, 32))
    (permutation,) = align(state_dict, state_dict, groups, seed=0)
    assert torch.equal(permutation, torch.arange(64))


def test_the_search_runs_once_where_both_starts_are_the_same_order(monkeypatch):
    solved = []

    def counted(costs, maximize):
        solved.append(costs.shape)
        return linear_sum_assignment(costs, maximize)

    monkeypatch.setattr(alignment, "linear_sum_assignment", counted)
    model = build_model(run_config(model="mobilenet_v2"), seed=0)
    groups = permutation_groups(model, torch.zeros(2, 3, 32, 32))
    original = {name: tensor.float() for name, tensor in model.state_dict().items()}
    near = {name: tensor + 0.003 * torch.randn_like(tensor) for name, tensor in original.items()}
    in_other_order = apply(groups, random_permutations(groups), near)

    align(original, near, groups, seed=3)
    num_of_near = len(solved)
    align(original, in_other_order, groups, seed=3)

    # One assignment for each group from the inputs on, and one in the only visit of the search.
    assert num_of_near == 2 * len(groups)
    assert len(solved) - num_of_near >= 3 * len(groups)


def test_running_statistics_move_but_are_not_compared():
    layers = [conv(3, 12), nn.BatchNorm2d(12), nn.ReLU(), head()]
    model = randomise(nn.Sequential(*layers), (3, 8, 8)).float()
    groups = permutation_groups(model, torch.zeros(2, 3, 8, 8))
    permuted = apply(groups, random_permutations(groups), model.state_dict())
    other = {**permuted, "1.running_var": torch.rand(12) * 1e9, "1.running_mean": torch.rand(12) * 1e9}

    (permutation,) = align(model.state_dict(), other, groups, seed=0)

    aligned = apply(groups, [permutation], other)
    assert torch.equal(aligned["0.weight"], model.state_dict()["0.weight"])
    assert torch.equal(aligned["1.running_var"], other["1.running_var"][permutation])


@pytest.mark.parametrize("as_files", [False, True])
def test_all_agents_are_brought_into_the_order_of_the_first(as_files, tmp_path):
    model = mlp(0)
    groups = permutation_groups(model, torch.zeros(2, 3, 32, 32))
    original = model.state_dict()
    noisy = [{name: tensor + 0.01 * torch.randn_like(tensor) for name, tensor in original.items()}
             for _ in range(4)]  # fmt: skip
    shuffled = [apply(groups, random_permutations(groups), state_dict) for state_dict in noisy[1:]]
    contributions = [noisy[0], *shuffled]
    given = contributions
    if as_files:
        given = [tmp_path / f"{number}.safetensors" for number in range(4)]
        for path, state_dict in zip(given, contributions, strict=True):
            write_state_dict(state_dict, path)

    found = align_all(given, [1.0, 2.0, 3.0, 4.0], groups, seed=0)

    for state_dict, contribution, permutations in zip(noisy, contributions, found, strict=True):
        assert same(state_dict, apply(groups, permutations, contribution))


def test_align_all_of_independent_networks_is_where_no_single_one_can_be_improved():
    contributions = [mlp(seed).state_dict() for seed in range(4)]
    groups = permutation_groups(mlp(0), torch.zeros(2, 3, 32, 32))

    found = align_all(contributions, [1.0] * 4, groups, seed=0)

    aligned = [apply(groups, permutations, state_dict)
               for permutations, state_dict in zip(found, contributions, strict=True)]  # fmt: skip
    for index in range(1, 4):
        others = [state_dict for number, state_dict in enumerate(aligned) if number != index]
        mean = {name: sum(other[name] for other in others) / 3 for name in others[0]}
        (permutation,) = align(mean, aligned[index], groups, seed=7)
        assert torch.equal(permutation, torch.arange(64))
