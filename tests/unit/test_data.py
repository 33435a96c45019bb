import os
import struct
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from torchvision.datasets import utils as torchvision_utils

from ecavg.common.config import RunConfig
from ecavg.common.dataset import DATASETS
from ecavg.common.errors import UsageError
from ecavg.common.shards import Shard
from ecavg.edge_agent.bundles import BUNDLES
from ecavg.edge_agent.config import AgentConfig
from ecavg.edge_agent.data import AgentData, choose_shared, hold_out
from ecavg.edge_agent.downloads import TORCHVISION
from ecavg.edge_agent.partition import Partition, parse_partition
from ecavg.edge_agent.splits import fit
from tests.recipes import data_of

DIGITS = RunConfig(dataset="digits")
MNIST = RunConfig(dataset="mnist")
PETS = RunConfig(dataset="pets", num_classes=2, image_shape=(3, 4, 4), holdout_fraction=0.25)
RANDOM = np.random.default_rng(0)


def load(run: RunConfig, source: str | None = None, **options: Any) -> AgentData:
    return data_of(run, source, **{"seed_name": "agent-1", **options})


def random_arrays(num: int, *shape: int, num_classes: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """Different images, labels in turn."""
    images = RANDOM.integers(0, 256, (num, *shape), dtype=np.uint8)
    return images, np.arange(num) % num_classes


def as_set(*shards: Shard) -> set[tuple[bytes, int]]:
    return {(i.tobytes(), int(label)) for s in shards for i, label in zip(s.inputs, s.targets, strict=True)}


def write_idx(path: Path, array: np.ndarray) -> None:
    """Write the array in the IDX format of the MNIST files.

    The file has the type 8, which is ubyte, then the big-endian sizes, then the data.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def write_mnist(root: Path, *, folder: str = "MNIST") -> dict[str, tuple[np.ndarray, np.ndarray]]:
    written = {"train": random_arrays(120, 28, 28), "t10k": random_arrays(40, 28, 28)}
    for name, (images, labels) in written.items():
        write_idx(root / folder / "raw" / f"{name}-images-idx3-ubyte", images)
        write_idx(root / folder / "raw" / f"{name}-labels-idx1-ubyte", labels)
    return written


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """Eight different images of each of two classes; no test split."""
    for name in ("cat", "dog"):
        folder = tmp_path / "pets" / "train" / name
        folder.mkdir(parents=True)
        for number, pixels in enumerate(random_arrays(8, 4, 4, 3)[0]):
            Image.fromarray(pixels).save(folder / f"{number}.png")
    return tmp_path / "pets"


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: Any, **__: Any) -> None:
        raise URLError("name resolution failed")

    monkeypatch.setattr(torchvision_utils.urllib.request, "urlopen", no_network)


@pytest.fixture
def factory(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Install what a user's factory returns for each split; gives the factory's name."""

    def install(**splits: Any) -> str:
        module = ModuleType("users_own")
        module.load = lambda split: splits.get(split)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "users_own", module)
        return "users_own:load"

    return install


# --- digits: a source without a test split


def test_digits_are_scaled_to_bytes_and_split_by_the_holdout_fraction() -> None:
    pixels, labels = load_digits(return_X_y=True)
    expected = {
        (bytes(round(value * 255 / 16) for value in image), int(label))
        for image, label in zip(pixels, labels, strict=True)
    }
    loaded = load(DIGITS)
    assert loaded.train.inputs.shape[1:] == (1, 8, 8)
    assert loaded.train.inputs.dtype == np.uint8
    assert loaded.train.targets.dtype == np.int64
    assert abs(len(loaded.held_out.targets) - 0.1 * len(labels)) < 4 * (0.09 * len(labels)) ** 0.5
    assert as_set(loaded.train, loaded.held_out) == expected
    assert loaded.num_skipped == 0


def test_held_out_part_is_not_trained_on() -> None:
    loaded = load(DIGITS)
    assert len(loaded.train.targets) + len(loaded.held_out.targets) == 1797
    assert not as_set(loaded.train) & as_set(loaded.held_out)


@pytest.mark.parametrize("partition_by", ["iid", "dirichlet:0.5", "classes:4"])
def test_agents_share_the_whole_source_between_them(partition_by: str) -> None:
    run = DIGITS.model_copy(update={"partition_by": partition_by})
    agents = [load(run, partition=Partition(index, 3), seed_name=f"agent-{index}") for index in (1, 2, 3)]
    shards = [shard for agent in agents for shard in (agent.train, agent.held_out)]
    assert sum(len(shard.targets) for shard in shards) == 1797
    assert as_set(*shards) == as_set(*load(DIGITS)[:2])


def test_loading_again_gives_the_same_and_another_name_holds_out_others() -> None:
    first, again, other = (load(DIGITS, seed_name=name) for name in ("a", "a", "b"))
    np.testing.assert_array_equal(first.held_out.inputs, again.held_out.inputs)
    assert as_set(first.held_out) != as_set(other.held_out)


def test_an_empty_partition_is_refused_by_name(factory: Any) -> None:
    name = factory(train=random_arrays(12, 1, 8, 8, num_classes=2))
    run = DIGITS.model_copy(update={"partition_by": "dirichlet:1e-6"})  # a class each for two at most
    refusals = {}
    for index in range(1, 7):
        try:
            load(run, name, partition=Partition(index, 6), allowed_factories=[name])
        except UsageError as error:
            refusals[index] = str(error)
    assert len(refusals) >= 4
    for index, message in refusals.items():
        assert message.startswith(f"partition {index}/6 of {name} is empty: partition_by dirichlet:1e-6")
        assert "use fewer partitions" in message


def test_classes_that_no_agent_would_own_are_refused() -> None:
    run = DIGITS.model_copy(update={"partition_by": "classes:2"})
    with pytest.raises(UsageError, match="set at least classes:5"):
        load(run, partition=Partition(1, 2))


# --- MNIST: named, with a test split


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
def test_idx_files_are_read_from_the_data_dir(tmp_path: Path, offline: None, name: str, folder: str) -> None:
    written = write_mnist(tmp_path, folder=folder)
    loaded = load(RunConfig(dataset=name), data_dir=tmp_path)
    for shard, (images, labels) in zip(loaded[:2], written.values(), strict=True):
        np.testing.assert_array_equal(shard.inputs, images[:, None])
        np.testing.assert_array_equal(shard.targets, labels)


def test_held_out_part_is_the_agents_part_of_the_test_split(tmp_path: Path) -> None:
    test_images, test_labels = write_mnist(tmp_path)["t10k"]
    run = MNIST.model_copy(update={"partition_by": "classes:5"})
    agents = [load(run, data_dir=tmp_path, partition=Partition(index, 2)) for index in (1, 2)]
    assert as_set(*(agent.held_out for agent in agents)) == as_set(Shard(test_images[:, None], test_labels))
    for agent in agents:
        assert set(agent.held_out.targets) == set(agent.train.targets)
        assert len(set(agent.train.targets)) == 5


def test_source_overrides_the_runs_dataset(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    assert load(DIGITS, "mnist", data_dir=tmp_path).train.inputs.shape == (120, 1, 8, 8)


def test_a_data_dir_with_train_in_it_is_an_image_folder(pets: Path) -> None:
    run = RunConfig(dataset="cifar10", num_classes=2)
    loaded = load(run, "cifar10", data_dir=pets)
    assert loaded.train.inputs.shape[1:] == (3, 32, 32)
    assert len(loaded.train.targets) + len(loaded.held_out.targets) == 16


def test_every_named_dataset_can_be_opened() -> None:
    assert {*BUNDLES, *TORCHVISION} == set(DATASETS)


def test_a_missing_data_dir_is_refused_and_not_made(tmp_path: Path) -> None:
    missing = tmp_path / "tpyo"
    with pytest.raises(UsageError, match=f"data folder {missing} does not exist: .*--data-dir"):
        load(MNIST, data_dir=missing)
    assert not missing.exists()


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_a_failed_download_is_one_line(tmp_path: Path, offline: None, name: str) -> None:
    with pytest.raises(UsageError, match=f"cannot load {name} from {tmp_path}: .*name resolution") as caught:
        load(RunConfig(dataset=name), data_dir=tmp_path)
    assert "\n" not in str(caught.value)


def test_the_default_data_dir_is_made_for_the_download(
    tmp_path: Path, offline: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UsageError, match=f"cannot load mnist from {tmp_path}/.cache/ecavg"):
        load(MNIST)
    assert (tmp_path / ".cache" / "ecavg").is_dir()


def test_nothing_is_downloaded_into_a_folder_that_is_not_writable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UsageError, match="it is not there, and the folder is not writable"):
        load(MNIST, data_dir=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_broken_dataset_file_is_refused(tmp_path: Path, offline: None) -> None:
    write_mnist(tmp_path)
    (tmp_path / "MNIST/raw/train-images-idx3-ubyte").write_bytes(b"\x00\x00\x08\x03 and so on")
    with pytest.raises(UsageError, match=f"cannot load mnist from {tmp_path}"):
        load(MNIST, data_dir=tmp_path)


def test_labels_that_the_run_does_not_have_are_refused() -> None:
    run = DIGITS.model_copy(update={"num_classes": 5})
    with pytest.raises(
        UsageError, match="digits has the label 5, and the run only 0 to 4, first in example 5: set "
    ):
        load(run)


# --- image folders


def test_an_image_folder_is_read_from_its_path(pets: Path) -> None:
    loaded = load(PETS, str(pets))
    assert np.bincount([*loaded.train.targets, *loaded.held_out.targets]).tolist() == [8, 8]
    assert len(loaded.held_out.targets) >= 1


def test_agents_decode_only_their_own_part(pets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []
    monkeypatch.setattr(
        "ecavg.edge_agent.file_split.decode_image",
        lambda path, shape, _: opened.append(path) or np.zeros(shape),
    )
    load(PETS, str(pets), partition=Partition(1, 4))
    assert len(opened) == 4
    load(PETS, str(pets), partition=Partition(2, 4))
    assert len(set(opened)) == 8


def test_unreadable_images_are_counted(pets: Path) -> None:
    (pets / "train/cat/3.png").write_bytes(b"")
    loaded = load(PETS, str(pets))
    assert loaded.num_skipped == 1
    assert len(loaded.train.targets) + len(loaded.held_out.targets) == 15


def test_what_is_not_read_is_told(pets: Path) -> None:
    assert load(PETS, str(pets)).not_read == ""
    (pets / "train/cat/notes.txt").touch()
    assert load(PETS, str(pets)).not_read == "files not read: 1 (.txt 1), of them 1 in train/cat"


def test_nothing_readable_is_refused(pets: Path) -> None:
    for path in pets.rglob("*.png"):
        path.write_bytes(b"not an image")
    with pytest.raises(UsageError, match=f"data source {pets}: none of its images can be read"):
        load(PETS, str(pets))


def test_a_folder_that_leaves_nothing_to_hold_out_is_refused(pets: Path) -> None:
    with pytest.raises(UsageError, match="1 examples cannot be split"):
        load(PETS, str(pets), partition=Partition(1, 16))


@pytest.mark.parametrize("source", ["no/such/folder", "imagenet", "cifra10"])
def test_an_unknown_source_is_refused_with_the_choices(source: str) -> None:
    with pytest.raises(
        UsageError, match=f"data source '{source}' is neither a folder nor a dataset: .*cifar100"
    ):
        load(DIGITS, source)


def test_a_file_is_no_data_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is neither a folder nor a dataset"):
        load(DIGITS, str(tmp_path / "file"))


def test_a_run_cannot_make_an_agent_read_a_path(pets: Path) -> None:
    run = PETS.model_copy(update={"dataset": str(pets)})
    with pytest.raises(UsageError, match=f"dataset '{pets}' is its own: say .* with --data FOLDER"):
        load(run)


# --- the user's own code


def test_a_factory_gives_train_and_test(factory: Any) -> None:
    train, test = random_arrays(20, 1, 8, 8), random_arrays(10, 1, 8, 8)
    name = factory(train=train, test=test)
    loaded = load(DIGITS, name, allowed_factories=[name])
    np.testing.assert_array_equal(loaded.train.inputs, train[0])
    np.testing.assert_array_equal(loaded.held_out.inputs, test[0])


def test_a_factory_without_test_split_is_split_by_the_holdout_fraction(factory: Any) -> None:
    name = factory(train=random_arrays(20, 1, 8, 8))
    loaded = load(DIGITS, name, allowed_factories=[name])
    assert len(loaded.train.targets) + len(loaded.held_out.targets) == 20
    assert len(loaded.held_out.targets) >= 1


@pytest.mark.parametrize("source", ["users_own:load", None], ids=["by the agent", "by the run"])
def test_a_factory_is_only_imported_where_it_is_allowed(factory: Any, source: str | None) -> None:
    run = RunConfig(dataset=factory(train=random_arrays(20, 1, 8, 8)), num_classes=10, image_shape=(1, 8, 8))
    with pytest.raises(UsageError, match="--allow-factory users_own:load"):
        load(run, source)
    loaded = load(run, source, allowed_factories=["users_own:load"])
    assert len(loaded.train.targets) + len(loaded.held_out.targets) == 20


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (None, "must return"),
        (7, "must return"),
        (
            (np.zeros((2, 1, 8, 8)), np.zeros(2, int)),
            r"inputs of float32 \[1, 8, 8\], and the run wants uint8 \[1, 8, 8\]",
        ),
        (
            (np.zeros((2, 8, 8), np.uint8), np.zeros(2, int)),
            r"inputs of uint8 \[8, 8\], and the run wants uint8",
        ),
        (
            (np.zeros((2, 1, 8, 8), np.uint8), np.zeros(2)),
            r"targets of float32 \[\], and the run wants int64 \[\]: give whole numbers, or ",
        ),
        (
            (np.zeros((2, 1, 8, 8), np.uint8), np.zeros(3, int)),
            r"targets int64 \[3\]; there must be one target for each",
        ),
        ((np.zeros((0, 1, 8, 8), np.uint8), np.zeros(0, int)), "at least one"),
        ((np.zeros((2, 1, 8, 8), np.uint8), np.array([0, -1])), "label -1, and the run only 0 to 9"),
        ((np.zeros((2, 2, 8, 8), np.uint8), np.zeros(2, int)), "2 channels, and the run wants 1"),
    ],
)
def test_what_a_factory_returns_is_checked(factory: Any, train: Any, message: str) -> None:
    name = factory(train=train)
    with pytest.raises(UsageError, match=message):
        load(DIGITS, name, allowed_factories=[name])


def test_labels_of_several_numbers_are_refused_though_classes_are_dealt_out(factory: Any) -> None:
    name = factory(train=(np.zeros((6, 1, 8, 8), np.uint8), np.ones((6, 2), int)))
    run = DIGITS.model_copy(update={"partition_by": "dirichlet:1"})
    with pytest.raises(UsageError, match=r"targets of shape \[2\], and the run one label an example"):
        load(run, name, allowed_factories=[name], partition=Partition(1, 2))


def test_a_factory_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("users_own")
    module.load = lambda split: [][0]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "users_own", module)
    with pytest.raises(UsageError, match="users_own:load failed with IndexError: list index out of range"):
        load(DIGITS, "users_own:load", allowed_factories=["users_own:load"])


# --- what is held out


def test_held_out_are_about_the_fraction_and_chance_is_fair() -> None:
    images = random_arrays(4000, 1, 4, 4)[0]
    for fraction in (0.01, 0.1, 0.5, 0.9):
        rest, held_out = hold_out(images, fraction, 7)
        assert sorted([*rest, *held_out]) == list(range(4000))
        assert (np.diff(rest) > 0).all()
        assert (np.diff(held_out) > 0).all()
        assert abs(len(held_out) - 4000 * fraction) < 4 * (4000 * fraction * (1 - fraction)) ** 0.5
    shares = [len(hold_out(images[:1000], 0.1, seed)[1]) for seed in range(40)]
    assert np.mean(shares) == pytest.approx(100, abs=4 * 90**0.5 / 40**0.5)


def test_an_image_stays_where_it_is_whatever_comes_goes_and_moves() -> None:
    images = random_arrays(300, 1, 4, 4)[0]

    def held_out(chosen: np.ndarray) -> set[bytes]:
        return {image.tobytes() for image in chosen[hold_out(chosen, 0.2, 3)[1]]}

    everything = held_out(images)
    for part in (slice(100), slice(50, 250), slice(None, None, -3)):
        assert held_out(images[part]) == everything & {image.tobytes() for image in images[part]}


def test_copies_of_an_image_stay_together() -> None:
    images = random_arrays(50, 1, 4, 4)[0].repeat(3, axis=0)
    held_out = hold_out(images, 0.3, 3)[1]
    assert set(held_out) == {3 * (index // 3) + copy for index in held_out for copy in range(3)}


@pytest.mark.parametrize("fraction", [1e-9, 0.5, 1 - 1e-9])
@pytest.mark.parametrize("images", [random_arrays(2, 1, 4, 4)[0], np.zeros((3, 1, 4, 4), np.uint8)])
def test_of_few_images_neither_part_is_empty(images: np.ndarray, fraction: float) -> None:
    assert all(len(part) for part in hold_out(images, fraction, 0))


def test_a_folder_that_grows_moves_no_image_out_of_what_was_uploaded(pets: Path) -> None:
    before = load(PETS, str(pets))
    for number, pixels in enumerate(random_arrays(20, 4, 4, 3)[0]):
        Image.fromarray(pixels).save(pets / f"train/cat/0-{number}.png")
    after = load(PETS, str(pets))
    assert as_set(before.train) < as_set(after.train)
    assert as_set(before.held_out) < as_set(after.held_out)
    assert not as_set(after.train) & as_set(after.held_out)


# --- the run's shape


def test_fit_keeps_what_fits() -> None:
    images = random_arrays(3, 3, 4, 5)[0]
    np.testing.assert_array_equal(fit(images, (3, 4, 5)), images)


def test_fit_repeats_grey_and_weights_colour() -> None:
    grey, colour = random_arrays(3, 1, 4, 5)[0], random_arrays(3, 3, 4, 5)[0]
    np.testing.assert_array_equal(fit(grey, (3, 4, 5)), np.repeat(grey, 3, axis=1))
    weighted = np.tensordot(colour.astype(float), [0.299, 0.587, 0.114], axes=(1, 0))
    np.testing.assert_allclose(fit(colour, (1, 4, 5))[:, 0], weighted, atol=1.1)


def test_fit_resizes_to_height_and_width() -> None:
    blocks = random_arrays(2, 1, 2, 3)[0]
    large = blocks.repeat(32, axis=2).repeat(32, axis=3)
    fitted = fit(large, (3, 8, 12))
    assert fitted.shape == (2, 3, 8, 12)
    assert fitted.flags.c_contiguous
    np.testing.assert_allclose(fitted[:, :1, 1::4, 1::4], blocks, atol=1)


# --- the real thing


@pytest.fixture
def real_data() -> Path:
    beside = Path(__file__).parents[3] / "shared" / "data"
    root = Path(os.environ.get("ECAVG_TEST_DATA", beside))
    if not (root / "MNIST" / "raw").is_dir():
        pytest.skip("set ECAVG_TEST_DATA to a folder that holds MNIST/raw")
    return root


@pytest.mark.realdata
def test_real_mnist_is_dealt_out_whole(real_data: Path) -> None:
    agents = [load(MNIST, data_dir=real_data, partition=parse_partition(text)) for text in ("1/2", "2/2")]
    assert [len(agent.train.targets) for agent in agents] == [30_000, 30_000]
    assert [len(agent.held_out.targets) for agent in agents] == [5_000, 5_000]
    counts = sum(np.bincount(agent.train.targets) for agent in agents)
    # The counts of the ten digits in the training set, as its authors publish them.
    assert counts.tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    pixels = np.concatenate([agent.train.inputs for agent in agents]) / np.float32(255)
    assert pixels.mean() == pytest.approx(DATASETS["mnist"].inputs.mean[0], abs=1e-4)
    assert pixels.std() == pytest.approx(DATASETS["mnist"].inputs.std[0], abs=1e-4)


# What is shared


def test_about_the_fraction_is_shared_and_a_smaller_one_shares_some_of_the_same() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2000, 1, 4, 4), np.uint8)
    shared = {fraction: choose_shared(images, fraction) for fraction in (0.0, 0.1, 0.5, 0.9, 1.0)}
    for fraction, chosen in shared.items():
        assert abs(chosen.mean() - fraction) < 0.04
    for less, more in pairwise(shared.values()):
        assert not (less & ~more).any()
    assert not shared[0.0].any()
    assert shared[1.0].all()


def test_image_is_shared_or_not_whatever_else_there_is() -> None:
    images = np.random.default_rng(1).integers(0, 256, (300, 3, 4, 4), np.uint8)
    chosen = choose_shared(images, 0.4)
    order = np.random.default_rng(2).permutation(300)
    np.testing.assert_array_equal(choose_shared(images[order], 0.4), chosen[order])
    np.testing.assert_array_equal(choose_shared(images[:7], 0.4), chosen[:7])
    copies = np.concatenate([images, images])
    np.testing.assert_array_equal(choose_shared(copies, 0.4), np.concatenate([chosen, chosen]))


def test_what_is_held_out_and_what_is_shared_do_not_hang_together() -> None:
    images = np.random.default_rng(3).integers(0, 256, (3000, 1, 4, 4), np.uint8)
    rest, _ = hold_out(images, 0.5, 7)
    assert abs(choose_shared(images[rest], 0.5).mean() - 0.5) < 0.04


@pytest.mark.parametrize(
    ("value", "fraction"), [("all", 1.0), ("none", 0.0), ("0.25", 0.25), (0.25, 0.25), ("1e-3", 0.001)]
)
def test_share_data_is_a_word_or_a_fraction(value: object, fraction: float) -> None:
    config = AgentConfig(server="host:1", share_data=value)  # type: ignore[arg-type]
    assert config.shared_fraction == fraction


@pytest.mark.parametrize("value", ["some", "", 0, 1, "1.0", -0.5, "nan", "inf", True, None])
def test_share_data_that_says_neither_is_refused_with_what_may_be_said(value: object) -> None:
    with pytest.raises(ValueError, match=r'should be "all", "none", or a number between 0 and 1'):
        AgentConfig(server="host:1", share_data=value)  # type: ignore[arg-type]
