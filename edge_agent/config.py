"""The edge agent's own configuration; what the run does comes from the server."""

import re
import shutil
from datetime import UTC
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from ecavg.common import addresses
from ecavg.common.config import AGENT_ID_PATTERN, Name, ProcessConfig, UserPath, expand_home
from ecavg.common.cron import CronLine, local_zone, parse_cron
from ecavg.common.dataset import DATASETS
from ecavg.common.errors import UsageError, as_value_error, one_line
from ecavg.edge_agent.hours import parse_hours

if TYPE_CHECKING:
    from ecavg.edge_agent.tables import TableFormat

ENV_PREFIX = "ECAVG_AGENT_"

DEFAULT_DATA_DIR = Path("~/.cache/ecavg")
FACTORY_PATTERN = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")

Port = Annotated[int, Field(ge=0, le=65535)]


class AgentConfig(ProcessConfig):
    """Keys of an agent's configuration file; each is a flag as well."""

    server: str = Field(title="HOST:PORT")
    """Where the cloud-server listens (required)."""

    agent_id: str | None = None
    """This device's name in the run (default: made from the host name, and kept)"""

    data: str | None = Field(None, title="SOURCE")
    """The examples (default: the run's dataset)

    `digits`, `mnist`, `fashion-mnist`, `cifar10`, `cifar100`, `diabetes`, `breast-cancer`, `wine`,
    `sunspots`, an image folder (`DIR/{train,test}/<class>/*`), pictures with masks (`DIR/{images,masks}/*`),
    recordings (`DIR/{train,test}/<class>/*.wav`), arrays (`FILE.npz` or `DIR/{inputs,targets}.npy`), a table
    (`FILE.csv`, `FILE.parquet`) or `package.module:factory`.
    """

    data_inputs: tuple[Name, ...] = ()
    """Column of a table that is an input, in the order of the inputs; repeatable.

    One column with the paths of pictures is possible as well.
    """

    data_target: tuple[Name, ...] = ()
    """Column of a table that is the target; repeatable."""

    data_separator: str | None = Field(None, min_length=1, max_length=8)
    """What stands between the names of classes in a cell of the target column, for several classes an example
    (default: a cell is one)
    """

    data_window: int | None = Field(None, ge=1, le=1_000_000, title="ROWS")
    """Rows of a table, or samples of recordings, that are one input, one after the other (default: each row
    is an input)

    The rows must be in the order of time. Where windows share rows, the server's `[run.inputs]` needs
    `overlap`.
    """

    data_stride: int | None = Field(None, ge=1, le=1_000_000, title="ROWS")
    """From the first row or sample of a window to that of the next (default: 1, of recordings the window)"""

    data_sample_rate: int | None = Field(None, ge=1, le=1_000_000, title="HZ")
    """How many samples a second the windows of recordings have; those of another rate are resampled."""

    data_horizon: int = Field(1, ge=0, le=1_000_000, title="ROWS")
    """How many rows after the last of a window the row of its target is; 0: it is the last."""

    max_bad_rows: float = Field(0.01, ge=0, lt=1, title="FRACTION")
    """Largest part of a table's rows, or of the files that they name, that may be left out because they
    cannot be used.
    """

    data_dir: UserPath | None = None
    """Where named datasets are, or are downloaded to (default: `~/.cache/ecavg`)

    A folder that is given must exist.
    """

    share_data: str = Field("all", title="all|FRACTION|none")
    """How many of the examples to train on are uploaded; what is not shared never leaves the device."""

    partition: str | None = Field(None, title="I/N")
    """Take part I of N of the data (default: by the server's slot)

    With `data`, the default is all of it.
    """

    state_dir: UserPath | None = None
    """Where model, report and progress are kept (default: `ecavg-agent-ID`, or `ecavg-agent` without an id)

    One agent at a time uses the folder (STATE). Without an `agent_id` the next free one of
    `ecavg-agent-2`, … is taken.
    """

    max_file_bytes: int | None = Field(None, ge=1)
    """Write the model in use as several files of so many bytes at most, and an index, if it is larger
    (default: one file)

    They are beside `model.safetensors`, which stays, and are named as tools of Hugging Face expect it.
    """

    device: Name = "auto"
    """Where to train: `auto`, `cpu`, `cuda`, `cuda:1`; `auto` is the first GPU, or the CPU."""

    ready_command: tuple[Name, ...] = ()
    """Program, and one by one its arguments, that says whether this device may take part now; repeatable.

    Exit code 0: it may, for example because it is charging, on Wi-Fi and idle. Otherwise it is not drawn and
    begins no pre-training, but takes the models. The command runs without a shell, for 30 seconds at most.
    """

    ready_seconds: float = Field(60, ge=0.1, le=86_400)
    """Time from one answer of `ready_command` to its next run, and from one look at the data to the next."""

    work_hours: tuple[Name, ...] = ()
    """Hours in which this device takes part, such as `22:00-06:00`, in its local time; repeatable.

    Outside of them it is not drawn and begins no pre-training and no upload, but takes the models. What has
    begun is finished.
    """

    upload_hours: tuple[Name, ...] = ()
    """Hours in which uploads begin, such as `22:00-06:00`, in local time; repeatable (default: at any time)

    Pre-training goes on outside of them, and an upload that has begun is finished.
    """

    pretrain_at: Name | None = Field(None, title="CRON")
    """Times from which this device takes part in one round, as a line of cron, such as `0 2 * * *`

    It is in the local time of the device. Until then it is not drawn and begins no pre-training, but takes
    the models. (default: it takes part at any time)
    """

    min_new_examples: int | None = Field(None, ge=1)
    """So many examples must have come since the last contribution before this device takes part again.

    Counted are pictures, recordings, examples in arrays, or rows of a table (`data`). A label that is told
    later, in `labels.csv` beside them, counts as well.
    """

    max_upload_rate: int | None = Field(None, ge=8192, title="BYTES")
    """Most bytes a second that are uploaded, on average, all uploads together (default: no bound)"""

    max_download_rate: int | None = Field(None, ge=8192, title="BYTES")
    """Most bytes a second that are downloaded (default: no bound)"""

    export: Literal["none", "onnx", "torch-export"] = "none"
    """Write the model in use for inference as well: `onnx`, `torch-export` or `none`.

    The file is `STATE/model.onnx` or `STATE/model.pt2`, and an inference process needs nothing else.
    `onnx` takes the packages of `ecavg[onnx]`.
    """

    on_update: tuple[Name, ...] = ()
    """Program, and one by one its arguments, that is run when another model is in use; repeatable.

    It runs at least once for each, without a shell. Variables `ECAVG_…` tell what changed. See
    docs/model-in-use.md.
    """

    on_update_seconds: float = Field(60, ge=0.1, le=86_400)
    """Time limit of `on_update`; a command that takes longer is killed and has failed."""

    on_update_failure: Literal["keep", "roll-back"] = "keep"
    """When `on_update` or the export fails: `keep` the model, or `roll-back` to the one before."""

    keep_models: int = Field(3, ge=1, le=100)
    """How many of the models that were last in use stay on the disk, with the present one."""

    checkpoint_seconds: float = Field(5, ge=0)
    """Least time between two checkpoints of pre-training, which are taken after an epoch."""

    metrics_host: Name = "127.0.0.1"
    """Address of `/metrics` and the health checks."""

    metrics_token_file: UserPath | None = None
    """Bearer token of `/metrics` (default: `STATE/metrics-token` beyond loopback, none on it)

    The file is made if need be. Beyond loopback a token is always asked for.
    """

    metrics_port: Port | None = None
    """Port of `/metrics`; 0 picks one (default: none, and no HTTP server)"""

    allow_factory: tuple[Name, ...] = ()
    """`package.module:factory` that the server may name as its model; repeatable."""

    join_token_file: UserPath | None = None
    """Join token to enroll with at the start, if this agent has not enrolled."""

    insecure: bool = False
    """Plaintext, with a server that has `insecure` as well."""

    @field_validator("server")
    @classmethod
    def _host_and_port(cls, value: str) -> str:
        return str(addresses.parse(value))

    @field_validator("metrics_host")
    @classmethod
    def _host_alone(cls, value: str) -> str:
        return addresses.parse_host(value)

    @field_validator("agent_id")
    @classmethod
    def _restricted_characters(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(AGENT_ID_PATTERN, value):
            raise ValueError("should be 1 to 64 letters, digits, '.', '_' or '-', first a letter or digit")
        return value

    @field_validator("share_data", mode="before")
    @classmethod
    def _is_part(cls, value: object) -> str:
        text = str(value)
        try:
            if text in ("all", "none") or 0 < float(text) < 1:
                return text
        except ValueError:
            pass
        raise ValueError('should be "all", "none", or a number between 0 and 1')

    @field_validator("partition", "data")
    @classmethod
    def _is_usable(cls, value: str | None, info: ValidationInfo) -> str | None:
        """Check the source and the partition at once, not when the server has been reached.

        A source that is a folder becomes a path without `~`.
        """
        # Imported here, with NumPy, because --help does without.
        from ecavg.edge_agent.partition import parse_partition

        if value is None:
            return None
        with as_value_error():
            if info.field_name == "partition":
                parse_partition(value)
                return value
            source = value if _is_named(value) else str(expand_home(Path(value)))
            check_source(source)
            return source

    @field_validator("ready_command", "on_update")
    @classmethod
    def _can_be_run(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if value and shutil.which(value[0]) is None:
            text = one_line(value[0])
            raise ValueError(f"{text} is no program that can be run: name one, or make the file executable")
        return value

    @field_validator("pretrain_at")
    @classmethod
    def _is_line_of_cron(cls, value: str | None) -> str | None:
        with as_value_error():
            return value and parse_cron(value, UTC).text

    @field_validator("min_new_examples")
    @classmethod
    def _can_be_counted(cls, value: int | None, info: ValidationInfo) -> int | None:
        source = info.data.get("data")
        if value is not None and "data" in info.data and (source is None or _is_named(source)):
            raise ValueError("needs examples that can be counted: name a folder, arrays or a table with data")
        return value

    @field_validator("work_hours", "upload_hours")
    @classmethod
    def _are_hours(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        with as_value_error():
            for text in value:
                parse_hours(text)
        return value

    @field_validator("export")
    @classmethod
    def _can_be_exported(cls, value: str) -> str:
        with as_value_error():
            check_exporter(value)
        return value

    @field_validator("keep_models")
    @classmethod
    def _can_roll_back(cls, value: int, info: ValidationInfo) -> int:
        if value < 2 and info.data.get("on_update_failure") == "roll-back":
            raise ValueError('on_update_failure = "roll-back" needs the model before: make it 2 or more')
        return value

    @field_validator("data_dir")
    @classmethod
    def _exists(cls, value: Path | None) -> Path | None:
        if value is not None and not _is_folder(value):
            text = one_line(str(value))
            raise ValueError(f"data folder {text} does not exist: make it, or name the right one")
        return value

    @property
    def table(self) -> "TableFormat":
        """Return how a table becomes examples."""
        # Imported here, with NumPy, because --help does without.
        from ecavg.edge_agent.tables import TableFormat

        is_sound = self.data_sample_rate is not None
        return TableFormat(
            self.data_inputs,
            self.data_target,
            self.data_window,
            self.data_stride or (self.data_window if is_sound and self.data_window else 1),
            0 if is_sound else self.data_horizon,
            self.max_bad_rows,
            self.data_separator,
            self.data_sample_rate,
        )

    @property
    def countable_source(self) -> Path | None:
        """Return the folder or file of the data whose examples can be counted; None: they cannot."""
        return Path(self.data) if self.data and not _is_named(self.data) else None

    @property
    def pretrain_times(self) -> CronLine | None:
        """Return the times from which this device takes part; None: at any time."""
        return CronLine(self.pretrain_at, local_zone()) if self.pretrain_at else None

    @property
    def shared_fraction(self) -> float:
        """Return the fraction of the examples that is shared, 0 to 1."""
        return float({"all": 1, "none": 0}.get(self.share_data, self.share_data))


class EnrollConfig(AgentConfig):
    """The keys of an agent, and those that only `edge-agent enroll` takes."""

    token: Name | None = None
    """Join token, as the cloud-server printed it."""


class ModelConfig(AgentConfig):
    """The keys of an agent, for commands that only look at its state directory."""

    server: str = Field("", title="HOST:PORT")
    """Where the cloud-server listens; not needed here."""


def check_exporter(file_format: str) -> None:
    """Check that the packages that write this format are installed.

    Raises:
        UsageError: one of them is missing.
    """
    wanted = ("onnxscript", "onnxruntime") if file_format == "onnx" else ()
    if missing := [name for name in wanted if find_spec(name) is None]:
        raise UsageError(f"writing ONNX needs {' and '.join(missing)}: pip install 'ecavg[onnx]'")


def check_source(source: str) -> None:
    """Check that `--data` names something.

    Raises:
        UsageError: it names neither a dataset, nor code of the user's, nor a folder.
    """
    if _is_named(source) or _is_folder(Path(source)) or _is_data_file(Path(source)):
        return
    raise UsageError(
        f"data source {source!r} is neither a folder nor a dataset: give an existing image folder,"
        f" arrays (.npz), a table (.csv, .parquet), {', '.join(DATASETS)}, or package.module:factory"
    )


def _is_data_file(path: Path) -> bool:
    try:
        return path.suffix.lower() in (".npz", ".csv", ".parquet", ".pq") and path.is_file()
    except OSError:
        return False


def _is_named(source: str) -> bool:
    return source in DATASETS or FACTORY_PATTERN.fullmatch(source) is not None


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:
        # The path is too long for a name, or leads through a folder that this user may not enter.
        return False


def data_root(data_dir: Path | None) -> Path:
    """Return the folder of the named datasets: `data_dir`, or the default one in the user's home.

    Raises:
        UsageError: the default is needed, and this user has no home.
    """
    if data_dir:
        return data_dir
    try:
        return expand_home(DEFAULT_DATA_DIR)
    except ValueError as error:
        raise UsageError(
            f"there is no {DEFAULT_DATA_DIR}, because this user has no home folder: name a folder for the"
            " datasets with --data-dir, or set HOME"
        ) from error
