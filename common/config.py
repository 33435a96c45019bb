"""What can be configured: the run (the server decides it, agents receive it), and the keys of both processes.

Where the values come from is in layers.py.
"""

import unicodedata
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    field_validator,
    model_validator,
)

from ecavg.common.dataset import DATASETS, DatasetSpec, InputDtype, Inputs, TargetDtype, Targets, check_spec
from ecavg.common.tasks import KINDS, is_own, kind_of, unpublished

AGENT_ID_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"


MAX_NAME_CHARACTERS = 500


def _printable(text: str) -> str:
    if not text.isprintable() or len(text) > MAX_NAME_CHARACTERS:
        raise ValueError(f"should be at most {MAX_NAME_CHARACTERS} printable characters")
    return text


def class_name(text: str) -> str:
    """Return the name of a class in Unicode's normal form NFC; raise ValueError if it is no name to show."""
    # Some systems write "é" as one character in the name of a folder, and others as two.
    name = unicodedata.normalize("NFC", text)
    if not name:
        raise ValueError("should not be empty")
    return _printable(name)


# A name is shown on terminals, and comes from a server.
Name = Annotated[str, AfterValidator(_printable)]
ClassName = Annotated[str, AfterValidator(class_name)]


def expand_home(path: Path) -> Path:
    """Return the path with the home folder in the place of a leading `~` or `~user`.

    Raises:
        ValueError: the home folder is not known, or the path has a character that no path may have.
    """
    if "\0" in str(path):
        raise ValueError("should be a path, which has no NUL character")
    try:
        expanded = path.expanduser()
    except RuntimeError:
        expanded = path
    # The variable HOME may be a relative path.
    if str(path).startswith("~") and not expanded.is_absolute():
        raise ValueError(f"the home folder in {str(path)!r} is not known: set HOME, or write it without ~")
    return expanded


# A path of a key. The home folder is filled in wherever the path comes from, because a shell does that only
# at the beginning of a word.
UserPath = Annotated[Path, AfterValidator(expand_home)]
# The pixels of an image along one side.
Pixels = Annotated[int, Field(ge=1, le=65_536)]
# The size of an input or target along one axis.
Size = Annotated[int, Field(ge=1, le=64_000_000)]

# The colour behind transparent images.
Background = Literal["white", "black", "grey"]

# Patterns of names in a state_dict, or the word for the parameters that are trained: see common/parts.py.
SharedParameters = Literal["trainable"] | tuple[Name, ...]

# How weights travel: see common/wire.py.
Wire = Literal["float32", "bfloat16", "int8"]

# What the fine-tune may start from; where two do equally well, the first is taken.
CandidateName = Literal["aligned", "average", "best_agent", "greedy_soup", "previous"]
CANDIDATES: tuple[CandidateName, ...] = get_args(CandidateName)

# The name of an index of weights in several files ends so: see common/sharded.py.
INDEX_SUFFIX = ".safetensors.index.json"


class FrozenModel(BaseModel):
    """Base of every value object that crosses a process boundary: immutable, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Scored(FrozenModel):
    """Base of records with scores, which a version before this one has written as accuracies."""

    @model_validator(mode="before")
    @classmethod
    def _read_accuracies(cls, values: Any) -> Any:
        return unpublished(values) if isinstance(values, dict) else values


class DocumentedModel(FrozenModel):
    """Base of every class of configuration keys.

    The docstring below a key is its description. The first paragraph is what `--help` shows, and all of
    it stands in docs/configuration.md. "(default: …)" at the end of the first paragraph says in words
    what a default of None means.
    """

    model_config = ConfigDict(use_attribute_docstrings=True)


class TrainingConfig(DocumentedModel):
    """One training: the agents' pre-training, or the cloud's fine-tuning."""

    epochs: Annotated[int, Field(ge=0, le=100_000)] = 5
    """Passes over the examples; 0 skips the training."""

    batch_size: Annotated[int, Field(ge=1, le=1_000_000)] = 64
    """Examples in one step."""

    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    """The optimizer."""

    learning_rate: Annotated[float, Field(gt=0, le=1e3)] = 0.05
    """The highest learning rate; `schedule` says how it changes."""

    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum of `sgd`; the other optimizers do not use it."""

    nesterov: bool = False
    """Use Nesterov's momentum with `sgd`; it needs a `momentum` above 0."""

    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Weight decay of the optimizer."""

    schedule: Literal["constant", "cosine", "one-cycle"] = "cosine"
    """How the learning rate changes, step by step.

    `"constant"` keeps it, `"cosine"` lowers it to 0, and `"one-cycle"` raises it linearly over the first
    quarter and lowers it linearly after that.
    """

    schedule_over: Literal["round", "run"] = "round"
    """Whether each round has a schedule of its own, or the whole run has one.

    `"run"`: pre-training and fine-tuning of all rounds follow one schedule, in the order in which they
    happen. It is for the rounds that were asked for when the run began (one, where the run has no end). Each
    round after those begins at a fifth of the learning rate and lowers it to 0, until the shared data have
    grown by half: then one round has a full schedule again.
    """

    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of each label that is spread evenly over all classes."""

    augment: tuple[Literal["horizontal_flip", "random_crop"], ...] = ()
    """How images are changed at random while a model is trained on them.

    `"random_crop"` pads by 4 pixels before it crops.
    """

    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """The precision in which a model is trained.

    `"auto"` takes the faster one. A GPU that has bfloat16 uses it. On a CPU that has it, a long training
    times a few steps of each, once. The decision stays in `STATE/precision.json`, so that a training that
    is done again gives the same bytes. Two devices may decide differently, so choose `"float32"` to
    compare digests. Models are always measured in float32.
    """

    graphs: Literal["auto", "off"] = "auto"
    """Whether a training on a GPU replays its steps as CUDA graphs.

    A replay is faster for small images, and gives the same bits: one step is taken both ways and compared.
    Where they differ, or a step cannot be recorded, the training goes on without replays. `"off"` never
    records.
    """

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> Self:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs momentum above 0")
        return self


class FineTuneConfig(TrainingConfig):
    """The cloud's training on the combined data."""

    holdout_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of each uploaded shard on which nobody trains, neither the agent nor the cloud.

    The cloud measures models on these examples.
    """

    class_balanced: bool = False
    """Draw every class equally often."""

    parallel: Literal["ddp", "fsdp"] = "ddp"
    """How several ranks train one model together; with one rank there is no difference.

    `"ddp"`: each rank's GPU has the whole model (DistributedDataParallel). `"fsdp"`: each has a part of
    the parameters, their gradients and the optimizer's state (FSDP2), for a model that does not fit one GPU.
    It is slower where the model fits. `precision = "auto"` is then bfloat16 on GPUs that have it, untried.
    """

    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay, for each step, of an exponential moving average of the weights; 0 keeps none.

    The average is measured as the fine-tuned model is, and published where it is the best. It helps most
    where the learning rate stays high, as with `schedule = "constant"`. `0.95` is about the mean of the last
    20 steps.
    """

    pseudo_label_confidence: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Confidence above which an example without a target gets the start's prediction for one; 0: none does.

    The fine-tune then trains on it, too. It takes `missing` in `[run.targets]` and `task = "classification"`.
    With few labels, `0.8` together with `class_balanced` helped most. A confidence that only few classes
    reach does harm.
    """


class InputsConfig(DocumentedModel):
    """The inputs of a run whose data are not pictures."""

    dtype: InputDtype = "float32"
    """What the values are: `"uint8"`, `"float32"`, or `"int64"`, which a model gets as it is."""

    shape: tuple[Size, ...] = ()
    """The shape of one input, channels or features first: `[30]`, `[6, 128]` (default: the dataset's)"""

    low: FiniteFloat | None = None
    """The least value that an input may have (default: no bound)"""

    high: FiniteFloat | None = None
    """The largest value that an input may have (default: no bound)"""

    overlap: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """How many of the next examples share values with an example (default: the dataset's)

    Windows of a series do. Where it is not 0, examples are in the order of time, all splits are blocks of
    them, and examples between two blocks are left out.
    """


class TargetsConfig(DocumentedModel):
    """The targets of a run; all keys but `missing` are for tasks with numbers for targets, or your own."""

    dtype: TargetDtype = "float32"
    """What the values are: `"float32"`, or for your own task `"int64"`."""

    shape: tuple[Size, ...] = (1,)
    """The shape of one target: `[2]` is two numbers an example; `[]` is for your own task alone."""

    low: FiniteFloat | None = None
    """The least value that a target may have (default: no bound)"""

    high: FiniteFloat | None = None
    """The largest value that a target may have (default: no bound)"""

    mean: tuple[FiniteFloat, ...] | None = None
    """Mean of each number, so that a model learns numbers around 0 (default: the dataset's, or none)"""

    std: tuple[FiniteFloat, ...] | None = None
    """Standard deviation of each number, so that a model learns numbers of size 1 (default: as `mean`)"""

    missing: bool = False
    """Let examples come without a target, which may be told later.

    Nobody trains on such an example or measures by it. A target that is missing is -1 or NaN, an empty cell
    of a table, or that of a picture in the folder `unlabelled`.
    """


class RunConfig(DocumentedModel):
    """What the whole run does: the server's `[run]` table, sent to every agent."""

    task: Name = "classification"
    """What the model learns, or your own `"package.module:Task"`.

    `"classification"`: one class an example. `"multi-label"`: any number of classes an example.
    `"regression"`: numbers. `"segmentation"`: one class a pixel.
    """

    model: Name = "mlp"
    """The model: `"mlp"`, `"cnn1d"`, `"gru"`, a name of `torchvision.models`, or your own.

    `"mlp"` has one hidden layer, and takes inputs of any shape. `"cnn1d"` and `"gru"` are for windows of a
    series, `[channels, steps]`. Of torchvision, the models for classification and segmentation can be used.
    Your own is `"package.module:factory"`.
    """

    hidden_units: Annotated[int, Field(ge=1, le=1_000_000)] = 128
    """Units in the hidden layer of `mlp`, channels of `cnn1d`, units of `gru`."""

    small_images: bool = False
    """Leave out the first two halvings of a torchvision network, which are meant for 224x224 images."""

    dataset: Name = "digits"
    """The dataset: `"digits"`, `"mnist"`, `"fashion-mnist"`, `"cifar10"`, `"cifar100"`, or your own.

    Of tables there are `"breast-cancer"`, `"wine"` and, for `task = "regression"`, `"diabetes"`, and of time
    series `"sunspots"`. Any other name describes your own data, together with `num_classes` and
    `image_shape`, or `[run.inputs]`.
    """

    num_classes: Annotated[int, Field(ge=2, le=1_000_000)] | None = None
    """Number of classes (default: the dataset's)"""

    image_shape: tuple[Pixels, Pixels, Pixels] | None = None
    """`[channels, height, width]` that all images are brought to (default: the dataset's)"""

    class_names: tuple[ClassName, ...] = ()
    """Names of the classes, label 0 first: the folders of an image folder (default: those of the first agent)

    The classes of the first agent that joins with an image folder are the run's: its class folders, in sorted
    order. An agent with other class folders is refused. Where they are listed here, an agent need not have
    them all.
    """

    mean: tuple[FiniteFloat, ...] | None = None
    """Mean of each channel or feature, of pixels scaled to 0..1 (default: the dataset's, or 0.5 of pixels)"""

    std: tuple[FiniteFloat, ...] | None = None
    """Standard deviation of each channel or feature, like `mean` (default: the dataset's, or 0.25 of pixels)

    Values other than pixels stay as they are where there is neither. `edge-agent doctor --data` prints those
    of a device's data.
    """

    background: Background = "white"
    """Colour that shows through transparent images of an image folder: `"white"`, `"black"` or `"grey"`."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """The seed from which everything follows that chance decides."""

    partition_by: Name = "iid"
    """How a shared dataset is dealt out: `"iid"`, `"dirichlet:ALPHA"` or `"classes:K"`.

    `"iid"` makes the parts alike, `"dirichlet:0.5"` draws each part's share of each class at random, and
    `"classes:2"` gives each part two classes.
    """

    num_partitions: Annotated[int, Field(ge=1)] | None = None
    """Number of parts in which a shared dataset is dealt out (default: `max_agents`)"""

    holdout_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """About this share of an agent's examples is held out on the device, if the source has no test split."""

    initial_weights: Name = "shared"
    """The weights that round 1 starts from: `"shared"`, `"independent"`, `"pretrained"`, or a file.

    `"shared"`: the server draws them. `"independent"`: each agent draws its own. `"pretrained"`:
    torchvision's published weights under a new last layer. A file is one of the server's,
    `"my.safetensors"`, or the index of several, `"my.safetensors.index.json"`. Later rounds start from the
    global model.
    """

    warm_up_epochs: Annotated[int, Field(ge=0, le=100_000)] = 0
    """Epochs for which the cloud trains the initial weights on shared examples, before round 1; 0 for none.

    The examples come in a round 0, in which nobody pre-trains; the cloud trains by `[run.fine_tune]`. Models
    that had some training in common can be averaged in round 1 already. There is no warm-up where no agent
    shares examples, and none unless `initial_weights` is `"shared"`.
    """

    mode: Literal["sync", "async"] = "sync"
    """Whether rounds wait for agents that are slow.

    `"sync"`: a round takes what was trained in it. `"async"`: an agent finishes what it has begun and
    contributes to the round that is open then; the older its start, the less it counts.
    """

    aggregator: Literal["mean", "trimmed_mean", "median", "geometric_median"] = "mean"
    """How the values of several agents become one."""

    trim_fraction: Annotated[float, Field(ge=0, lt=0.5)] = 0.2
    """Share of the agents that `trimmed_mean` leaves out at each end.

    The number is rounded down, so 0.2 leaves nobody out where there are fewer than 5 agents.
    """

    weights: Literal["examples", "uniform"] = "examples"
    """How much an agent counts in `mean` and `geometric_median`.

    `"examples"`: by its number of examples. `"uniform"`: all count the same.
    """

    max_norm_ratio: Annotated[float, Field(ge=0, le=1e6)] = 3.0
    """How large an agent's update may be, as a multiple of the round's median.

    The value is 1 or more, or 0 for no limit.
    """

    on_large_update: Literal["clip", "reject"] = "clip"
    """What happens to an update that is too large.

    `"clip"` makes it as large as allowed. `"reject"` leaves the agent's weights and data out of the round.
    """

    quarantine: Literal["report", "exclude"] = "report"
    """What happens to agents that the audit flags.

    `"report"` names them. `"exclude"` also leaves their weights and data out of the round.
    """

    candidates: tuple[CandidateName, ...] = CANDIDATES
    """What the fine-tune may start from; where two do equally well, the first is taken."""

    recompute_statistics: bool = True
    """After any averaging, compute BatchNorm's running statistics anew on the uploaded examples."""

    wire: Wire = "float32"
    """How weights travel, both ways.

    `"float32"`: as they are. `"bfloat16"`: in half the bytes. `"int8"`: in a quarter.
    """

    share_parameters: SharedParameters = ("*",)
    """Which parameters and buffers travel and are averaged: patterns of their names, or `"trainable"`.

    `*` and `?` stand for any characters. What no pattern matches is the rest: it stays on each device, and
    the cloud has a rest of its own. `["features.*"]` leaves each device a head of its own, and
    `["!*.bn*"]`, with a `!`, shares all but what matches. `"trainable"` shares the parameters that the model
    trains (`requires_grad`): adapters, for example, without the frozen model that they adapt.
    """

    retain_data: Literal["round", "run"] = "run"
    """How long the server keeps uploaded data.

    `"round"`: they are deleted as soon as their round is over, published or failed, and sent again for
    the next. `"run"`: they travel once and stay as long as the rounds that used them (`keep_rounds`).
    """

    apply: Literal["if-not-worse", "always"] = "if-not-worse"
    """When an agent uses the global model.

    `"if-not-worse"`: unless it does worse on the agent's held-out examples by more than one standard error.
    """

    adapt_epochs: Annotated[int, Field(ge=0, le=100_000)] = 1
    """Epochs of local adaptation of a global model that does worse; 0 for none.

    With `apply = "if-not-worse"`, a global model that does worse is trained for so many epochs on the
    agent's own examples, by `[run.pretrain]`, and compared again.
    """

    inputs: InputsConfig = InputsConfig()
    targets: TargetsConfig = TargetsConfig()
    pretrain: TrainingConfig = TrainingConfig()
    fine_tune: FineTuneConfig = FineTuneConfig()

    @field_validator("initial_weights")
    @classmethod
    def _known_initial_weights(cls, value: str) -> str:
        is_file = value.endswith((".safetensors", INDEX_SUFFIX))
        if value in ("shared", "independent", "pretrained") or is_file:
            return value
        raise ValueError(
            f'choose "shared", "independent", "pretrained", or a file called ….safetensors or …{INDEX_SUFFIX}'
        )

    @field_validator("share_parameters", mode="before")
    @classmethod
    def _word_or_patterns(cls, value: object) -> object:
        are_patterns = (
            isinstance(value, list | tuple) and value and all(isinstance(one, str) for one in value)
        )
        if value == "trainable" or are_patterns:
            return value
        raise ValueError('choose "trainable", or a list of patterns of names such as ["features.*"]')

    @field_validator("max_norm_ratio")
    @classmethod
    def _median_is_not_large(cls, value: float) -> float:
        if 0 < value < 1:
            raise ValueError("choose 1 or more, or 0 for no limit: below 1, half of the agents are too large")
        return value

    @field_validator("candidates")
    @classmethod
    def _candidates_in_order(cls, value: tuple[CandidateName, ...]) -> tuple[CandidateName, ...]:
        if set(value) <= {"previous"}:
            raise ValueError(f"choose some of {', '.join(CANDIDATES)}; previous alone leaves round 1 none")
        return tuple(name for name in CANDIDATES if name in value)

    @field_validator("partition_by")
    @classmethod
    def _known_partitioning(cls, value: str) -> str:
        scheme, _, parameter = value.partition(":")
        try:
            if value == "iid":
                return value
            if scheme == "dirichlet" and 0 < float(parameter) <= 1e6:
                return value
            if scheme == "classes" and int(parameter) >= 1:
                return value
        except ValueError:
            pass
        raise ValueError('choose "iid", "dirichlet:ALPHA" with 0 < ALPHA <= 1e6, or "classes:K" with K >= 1')

    @field_validator("task")
    @classmethod
    def _known_task(cls, value: str) -> str:
        if value in KINDS or is_own(value):
            return value
        raise ValueError(f'choose {", ".join(KINDS)}, or your own "package.module:Task"')

    @model_validator(mode="after")
    def _known_dataset(self) -> Self:
        known = DATASETS.get(self.dataset)
        if self.image_shape and self.inputs.shape:
            raise ValueError("image_shape and inputs.shape say the same: give image_shape for pictures")
        if known and self._is_other_task(known):
            raise ValueError(f"dataset {self.dataset!r} has other targets than those of task {self.task!r}")
        has_shape = bool(known or self.image_shape or self.inputs.shape)
        if not has_shape or (self._needs_classes and not self.spec.num_classes):
            raise ValueError(
                f"unknown dataset {self.dataset!r}: choose {', '.join(DATASETS)},"
                " or describe your own with num_classes and image_shape, or with [run.inputs]"
            )
        check_spec(self.spec, is_pictures=bool(self.image_shape))
        num_classes = self.spec.num_classes
        if self.class_names and not (len(self.class_names) == len(set(self.class_names)) == num_classes):
            raise ValueError(f"class_names must be {num_classes} different names")
        return self

    @model_validator(mode="after")
    def _keys_suit_the_task(self) -> Self:
        kind = kind_of(self.task)
        if self.partition_by != "iid" and not kind.has_labels:
            raise ValueError(f'partition_by must be "iid": examples of task {self.task!r} have no one class')
        if self.fine_tune.class_balanced and not kind.has_labels:
            raise ValueError(f"class_balanced: examples of task {self.task!r} have no one class")
        if self.pretrain.label_smoothing + self.fine_tune.label_smoothing and not kind.can_smooth:
            raise ValueError(f"label_smoothing: the targets of task {self.task!r} are no labels")
        targets = self.spec.targets
        if self.fine_tune.pseudo_label_confidence and not (kind.has_labels and targets.missing):
            raise ValueError("pseudo_label_confidence: it takes classification, and targets.missing = true")
        if targets.missing and targets.dtype == "int64" and (targets.low is None or targets.low < 0):
            raise ValueError(
                "targets.missing: -1 would stand for a missing target, and this run has it for a value"
            )
        has_masks = len(targets.shape) > 1
        if (self.pretrain.augment or self.fine_tune.augment) and (
            has_masks or len(self.spec.inputs.shape) != 3
        ):
            raise ValueError("augment is for pictures alone, and it would not change their masks")
        return self

    @model_validator(mode="after")
    def _stale_updates_have_a_start(self) -> Self:
        if self.mode == "async" and self.initial_weights == "independent":
            raise ValueError(
                'mode "async" needs a common start: choose initial_weights other than "independent"'
            )
        return self

    @property
    def has_warm_up(self) -> bool:
        """Return True if the run begins with round 0, in which the cloud trains the initial weights."""
        return self.warm_up_epochs > 0 and self.initial_weights == "shared"

    @property
    def only_averages(self) -> bool:
        """Return True if the cloud averages and does nothing else, so that it need not build the model.

        Initial weights that are given by an index are those of a model that may not fit the memory.
        """
        is_large = self.initial_weights.endswith(INDEX_SUFFIX)
        return is_large and self.candidates == ("average",) and self.fine_tune.epochs == 0

    @property
    def first_round(self) -> int:
        """Return the number of the run's first round: 0 for the warm-up, else 1."""
        return 0 if self.has_warm_up else 1

    def fine_tune_of(self, round_number: int) -> FineTuneConfig:
        """Return the configuration of the cloud's training in a round; that of round 0 is the warm-up."""
        if round_number:
            return self.fine_tune
        # The initial weights know nothing of what they would label.
        return self.fine_tune.model_copy(
            update={"epochs": self.warm_up_epochs, "pseudo_label_confidence": 0.0}
        )

    @property
    def spec(self) -> DatasetSpec:
        """Return the dataset as this run sees it: the table's values, overridden by the run's own."""
        known = DATASETS.get(self.dataset)
        num_classes = self.num_classes or (known.num_classes if known else 0)
        inputs = self._inputs(known.inputs if known else None)
        targets = kind_of(self.task).targets
        if targets:
            described = targets(inputs.shape, num_classes)._replace(missing=self.targets.missing)
            return DatasetSpec(inputs, described, num_classes)
        return DatasetSpec(inputs, self._targets(known.targets if known else None), num_classes)

    @property
    def _needs_classes(self) -> bool:
        return kind_of(self.task).targets is not None

    def _is_other_task(self, known: DatasetSpec) -> bool:
        """Return True if the dataset has numbers and the task wants classes, or the other way round."""
        return not is_own(self.task) and self._needs_classes != bool(known.num_classes)

    def _inputs(self, known: Inputs | None) -> Inputs:
        given = self.inputs
        if self.image_shape or not given.shape:
            own = Inputs("uint8", self.image_shape) if self.image_shape else known or Inputs("uint8", ())
        else:
            own = Inputs(given.dtype, given.shape, (), (), given.low, given.high)
        is_alike = known is not None and (known.dtype, known.shape[:1]) == (own.dtype, own.shape[:1])
        if known and is_alike:
            own = own._replace(mean=known.mean, std=known.std)
        elif own.dtype == "uint8":
            own = own._replace(mean=(0.5,) * own.shape[0], std=(0.25,) * own.shape[0])
        return own._replace(
            mean=self.mean or own.mean, std=self.std or own.std, overlap=given.overlap or own.overlap
        )

    def _targets(self, known: Targets | None) -> Targets:
        given = self.targets
        own = Targets(given.dtype, given.shape, given.low, given.high)
        is_described = given != TargetsConfig(mean=given.mean, std=given.std, missing=given.missing)
        if known and not is_described:
            own = known
        return own._replace(mean=given.mean or own.mean, std=given.std or own.std, missing=given.missing)


class ProcessConfig(DocumentedModel):
    """Base of the two processes' configurations."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """The least severe messages that are logged: `debug`, `info`, `warning` or `error`."""

    log_format: Literal["auto", "text", "json"] = Field("auto", title="auto|text|json")
    """How stderr is written: as lines and bars for people (`text`), or one JSON object a line (`json`).

    `auto` is text at a terminal, otherwise JSON.
    """

    quiet: bool = False
    """Log warnings and errors only, and show no progress."""

    @property
    def has_bars(self) -> bool:
        """Return True if progress may be shown as bars, where there is a terminal."""
        return self.log_format != "json" and not self.quiet
