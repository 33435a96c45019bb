"""The cloud server's own configuration; `[run]` is in common/config.py."""

import math
from datetime import UTC
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from ecavg.cloud_server.state_dir import StateDir
from ecavg.common import addresses
from ecavg.common.config import DocumentedModel, Name, ProcessConfig, RunConfig, UserPath
from ecavg.common.cron import CronLine, parse_cron, parse_zone
from ecavg.common.errors import as_value_error

ENV_PREFIX = "ECAVG_SERVER_"
DEFAULT_PRESET = "digits-mlp"

Port = Annotated[int, Field(ge=0, le=65535)]


class TrackingConfig(DocumentedModel):
    """Where the run is written to as well: the server's `[tracking]` table."""

    tensorboard: UserPath | None = None
    """Folder of event files for TensorBoard; needs `pip install 'ecavg[tensorboard]'`."""

    mlflow: Name | None = None
    """URI of MLflow, like `http://mlflow:5000` or `sqlite:////srv/mlflow.db`

    It needs `pip install 'ecavg[mlflow]'`.
    """

    agent_ids: bool = False
    """Leave agent ids in the reports that are written there

    `cloud-server forget` does not reach them there.
    """


class ServerConfig(ProcessConfig):
    """Keys at the top of a server's configuration file; each is a flag as well."""

    host: Name = "0.0.0.0"  # noqa: S104  agents are elsewhere
    """Address on which agents are answered."""

    port: Port = 50051
    """gRPC port; 0 picks a free one and says which."""

    http_host: Name = "127.0.0.1"
    """Address of the status page and `/metrics`."""

    http_token_file: UserPath | None = None
    """Bearer token of the page and `/metrics` (default: `STATE/http-token` beyond loopback, none on it)

    The file is made if need be. Beyond loopback a token is always asked for.
    """

    http_port: Port = 8080
    """Port of the status page and `/metrics`; 0 picks one."""

    agent_labels: bool = False
    """Show metrics of each agent as well, with its id as a label: for fleets of some hundreds at most."""

    state_dir: UserPath = Path("ecavg-server")
    """Folder (STATE) where everything is kept; one server at a time uses it."""

    run_name: Name | None = Field(None, max_length=100)
    """Name of the run, on the page and at the terminal (default: model, dataset and first day)

    It changes nothing else, and may be another one after a restart.
    """

    notify_url: Name | None = Field(None, title="URL")
    """Where messages are sent: a round is published or has failed, agents are flagged, the run is over

    It begins with `https://`. See docs/webhook.md.
    """

    notify_secret_file: UserPath | None = None
    """File with the secret that signs these messages, so that the receiver can trust them."""

    page_url: Name | None = Field(None, title="URL")
    """Where people find the status page, such as `https://ecavg.example`, for the links in these messages."""

    blobs: Name = Field("files", title="files|s3://BUCKET/PREFIX")
    """Where weights and shards are kept: as files in STATE, or in an S3-compatible bucket.

    Credentials come from the environment alone; see docs/storage.md.
    """

    blob_cache_bytes: int = Field(10 * 2**30, ge=0)
    """How many bytes of the blobs in a bucket are kept in STATE as well; what is in use always is."""

    rounds: int = Field(1, ge=0)
    """Rounds to run, counted from the beginning of the run; 0 runs for ever."""

    min_agents: int = Field(2, ge=1, le=100_000)
    """Contributions that a round needs."""

    max_agents: int | None = Field(None, ge=1, le=100_000)
    """Contributions that close a round at once (default: `min_agents`)"""

    deadline_seconds: float = Field(600, gt=0)
    """After this long a round closes with `min_agents`; also how long the last reports are waited for."""

    on_too_few: Literal["wait", "fail"] = Field("wait", title="wait|fail")
    """Fewer than `min_agents` at the deadline: wait for more, or fail the round."""

    open_round_at: Name | None = Field(None, title="CRON")
    """When the next round opens after one is over, as a line of cron, such as `0 2 * * *` (default: at once)

    The first round opens at once. See docs/rounds.md.
    """

    open_round_when_new_examples: int | None = Field(None, ge=1)
    """The next round opens when the connected agents have so many new examples (default: at once)"""

    time_zone: Name | None = Field(None, title="NAME")
    """Time zone of `open_round_at`, such as `Europe/Berlin` (default: that of this machine)"""

    agents_per_round: int | None = Field(None, ge=1, le=100_000)
    """Draw the agents of each round by lot, and close it at so many contributions (default: all take part)

    The others get the model as well.
    """

    over_selection: float | None = Field(None, ge=1, le=10)
    """Draw so many times `agents_per_round`, in case some of them fail (default: 1)

    The contributions that come last are in vain. With 1 it makes no difference who is faster.
    """

    min_connected: int | None = Field(None, ge=1, le=100_000)
    """Agents that must be connected and ready before a round draws (default: as many as are drawn)

    After half of `deadline_seconds`, `min_agents` are enough.
    """

    buffer_size: int | None = Field(None, ge=1, le=100_000)
    """With `run.mode = "async"`: contributions that close a round at once (default: `max_agents`)"""

    max_staleness: int | None = Field(None, ge=0, le=10_000)
    """With `run.mode = "async"`: a contribution may be so many global models old (default: `keep_rounds`)

    An agent whose contribution is older starts again from the newest model.
    """

    canary: float | None = Field(None, gt=0, le=1)
    """Give a new model to this part of the agents first, at least one, and to the others if it is not worse

    The default is to give it to all at once; see docs/roll-out.md.
    """

    canary_level: float = Field(0.05, gt=0, lt=0.5)
    """With `canary`: the probability at which a model that is as good as the one before is withdrawn."""

    canary_seconds: float = Field(600, gt=0)
    """With `canary`: so long its reports are waited for."""

    canary_on_too_few: Literal["withdraw", "release"] = Field("withdraw", title="withdraw|release")
    """With `canary`: what becomes of the model if fewer than half of the agents have reported by then."""

    device: Name = "auto"
    """Where to train: `auto`, `cpu`, `cuda`, `cuda:1`; `auto` and `cuda` take every GPU."""

    trainers: Literal["own", "external"] = Field("own", title="own|external")
    """Who trains: a process that the server starts, or trainers that are started by hand

    External trainers get jobs through the bucket of the blobs, or share STATE where blobs are files; see
    docs/deployment.md.
    """

    max_attempts: int = Field(3, ge=1, le=100)
    """Tries at a round's training before the round fails.

    After running out of memory the next try has half the batch size.
    """

    max_upload_bytes: int = Field(8 * 2**30, ge=1)
    """Largest data shard (one file) taken from an agent."""

    max_agent_bytes: int | None = Field(None, ge=1)
    """What one agent may have on the server that no kept round uses
    (default: 4 x (`max_upload_bytes` and the weights))

    An agent may send twice that in a round, what it sends again included.
    """

    max_round_bytes: int | None = Field(None, ge=1)
    """What all agents together may send in a round
    (default: 2 x `max_agent_bytes` x `max_agents`, of which at least 8 count)
    """

    max_joined: int | None = Field(None, ge=1)
    """Agents that a run takes (default: 10 x `max_agents`, 10000 at least)"""

    max_connections: int | None = Field(None, ge=1)
    """Connections from agents at once (default: 2 x `max_agents` + 128, 256 at least)

    When half of them are taken, those without a call are ended, the oldest first.
    """

    max_calls_per_second: float = Field(200, gt=0)
    """Calls of one agent, or of all bearers of one join token, in the long run.

    Ten times that may come at once. 16 calls may be open at a time.
    """

    max_concurrent_uploads: int = Field(64, ge=1, le=100_000)
    """Uploads that are taken in at a time; the others wait in the order in which they came.

    An upload takes about 3 MiB of the server's memory. Where many devices have slow links, allow more.
    """

    keep_rounds: int = Field(10, ge=1)
    """Rounds that are over whose models and uploads are kept; their reports are kept for ever."""

    keep_partial_seconds: float = Field(7 * 24 * 3600, gt=0)
    """How long uploads are kept that were not finished, or not contributed."""

    tls_dir: UserPath | None = None
    """CA, certificates, tokens and enrolled agents (default: `STATE/tls`)"""

    insecure: bool = False
    """Plaintext: anybody may join under any name."""

    run: RunConfig = RunConfig()

    tracking: TrackingConfig = TrackingConfig()

    @field_validator("host", "http_host")
    @classmethod
    def _host_alone(cls, value: str) -> str:
        return addresses.parse_host(value)

    @field_validator("blobs")
    @classmethod
    def _place_of_blobs(cls, value: str) -> str:
        parts = urlsplit(value)
        is_plain = value.isprintable() and not {"?", "#", "@", " "} & set(value)
        if value != "files" and not (parts.scheme == "s3" and parts.netloc and is_plain):
            raise ValueError(f"{value!r} is no place for blobs: files, s3://BUCKET or s3://BUCKET/PREFIX")
        return value.rstrip("/")

    @model_validator(mode="after")
    def _messages_are_safe(self) -> Self:
        # A validator of the key would show its value: the address of a webhook is often a secret by itself.
        for name in ("notify_secret_file", "page_url"):
            if getattr(self, name) is not None and self.notify_url is None:
                raise ValueError(f"{name} is for the messages to notify_url: set that as well")
        for name, is_secret in (("notify_url", True), ("page_url", False)):
            value = getattr(self, name)
            if value is not None and (problem := _problem_of_url(value, is_secret=is_secret)):
                raise ValueError(f"{name} should {problem}")
        return self

    @field_validator("time_zone")
    @classmethod
    def _is_time_zone(cls, value: str | None) -> str | None:
        with as_value_error():
            parse_zone(value)
        return value

    @field_validator("open_round_at")
    @classmethod
    def _is_line_of_cron(cls, value: str | None) -> str | None:
        with as_value_error():
            return value and parse_cron(value, UTC).text

    @model_validator(mode="after")
    def _opening_is_possible(self) -> Self:
        if self.open_round_at and self.open_round_when_new_examples:
            raise ValueError("open_round_at and open_round_when_new_examples cannot be combined: choose one")
        if self.time_zone and not self.open_round_at:
            raise ValueError("time_zone is for open_round_at: set that as well")
        return self

    @model_validator(mode="after")
    def _max_is_not_below_min(self) -> Self:
        if self.max_agents is not None and self.max_agents < self.min_agents:
            raise ValueError(f"max_agents {self.max_agents} is below min_agents {self.min_agents}")
        return self

    @model_validator(mode="after")
    def _sample_is_possible(self) -> Self:
        number = self.agents_per_round
        if number is None:
            for name in ("over_selection", "min_connected"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} is for a server with agents_per_round: set that as well")
            return self
        if number < self.min_agents:
            raise ValueError(f"agents_per_round {number} is below min_agents {self.min_agents}")
        if self.max_agents is not None and self.max_agents < number:
            raise ValueError(f"max_agents {self.max_agents} is below agents_per_round {number}")
        if self.connected_to_draw < self.min_agents:
            raise ValueError(f"min_connected {self.min_connected} is below min_agents {self.min_agents}")
        return self

    @model_validator(mode="after")
    def _mode_is_possible(self) -> Self:
        if self.run.mode == "sync":
            for name in ("buffer_size", "max_staleness"):
                if getattr(self, name) is not None:
                    raise ValueError(f'{name} is for run.mode = "async": set that as well')
            return self
        if self.canary is not None:
            raise ValueError('canary is for run.mode = "sync": with "async" no round waits for reports')
        if self.agents_per_round is not None:
            raise ValueError('agents_per_round is for run.mode = "sync": with "async" set buffer_size')
        if self.agents_to_close < self.min_agents:
            raise ValueError(f"buffer_size {self.buffer_size} is below min_agents {self.min_agents}")
        if self.max_agents is not None and self.max_agents < self.agents_to_close:
            raise ValueError(f"max_agents {self.max_agents} is below buffer_size {self.buffer_size}")
        if self.staleness_allowed > self.keep_rounds:
            raise ValueError(f"max_staleness {self.max_staleness} is above keep_rounds {self.keep_rounds}")
        return self

    @property
    def opening_times(self) -> CronLine | None:
        """Return the times at which rounds open; None: at any time."""
        return CronLine(self.open_round_at, parse_zone(self.time_zone)) if self.open_round_at else None

    @property
    def tls_folder(self) -> Path:
        """Return the folder of the authority."""
        return self.tls_dir or StateDir(self.state_dir).tls

    @property
    def http_token_path(self) -> Path:
        """Return where the token of the status page is kept, if the page asks for one."""
        return self.http_token_file or StateDir(self.state_dir).http_token

    @property
    def connections(self) -> int:
        """Return how many connections from agents there may be."""
        return self.max_connections or max(256, 2 * self.expected_agents + 128)

    @property
    def joined(self) -> int:
        """Return how many agents the run takes."""
        return self.max_joined or max(10_000, 10 * self.expected_agents)

    @property
    def agents_to_close(self) -> int:
        """Return how many contributions close a round at once."""
        return self.agents_per_round or self.buffer_size or self.max_agents or self.min_agents

    @property
    def staleness_allowed(self) -> int:
        """Return how many global models old a contribution may be."""
        if self.run.mode == "sync":
            return 0
        return self.keep_rounds if self.max_staleness is None else self.max_staleness

    @property
    def agents_to_draw(self) -> int:
        """Return how many agents a round draws; 0: it draws none."""
        return math.ceil((self.agents_per_round or 0) * (self.over_selection or 1))

    @property
    def connected_to_draw(self) -> int:
        """Return how many agents must be connected and ready before a round draws."""
        return self.min_connected or self.agents_to_draw

    @property
    def expected_agents(self) -> int:
        """Return how many agents limits are for that are not set."""
        taking_part = self.max_agents or self.buffer_size or self.min_agents
        return max(taking_part, self.agents_to_draw, self.connected_to_draw)


def _problem_of_url(text: str, *, is_secret: bool) -> str:
    """Return what the address of a page should be; an empty text if it is that.

    Args:
        is_secret: True if nobody may listen to what is sent there.
    """
    try:
        parts = urlsplit(text)
        is_usable = parts.scheme in ("https", "http") and parts.hostname and parts.port != 0
    except ValueError:
        is_usable = False
    is_plain = text.isascii() and text.isprintable() and not {" ", "#"} & set(text)
    if not is_usable or not is_plain or "@" in parts.netloc:
        return "be an address such as https://hooks.example/ecavg, without name and password"
    if is_secret and parts.scheme == "http" and not addresses.is_loopback(parts.hostname or ""):
        return "begin with https://, unless its host is this machine (127.0.0.1)"
    return ""
