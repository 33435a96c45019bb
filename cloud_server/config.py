"""The cloud server's own configuration; `[run]` is in common/config.py."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from cloud_server.state_dir import StateDir
from common.config import ProcessConfig, RunConfig

ENV_PREFIX = "ECAVG_SERVER_"
DEFAULT_PRESET = "digits-mlp"

Port = Annotated[int, Field(ge=0, le=65535)]


class ServerConfig(ProcessConfig):
    """Keys at the top of a server's configuration file; each is a flag as well."""

    host: str = Field("0.0.0.0", description="address that agents reach")  # noqa: S104  agents are elsewhere
    port: Port = Field(50051, description="gRPC port; 0 picks a free one and says which")
    http_host: str = Field("127.0.0.1", description="address of the status page and /metrics")
    http_token_file: Path | None = Field(
        None,
        description="bearer token that the status page asks for; made if need be, and beyond loopback always"
        " asked for (default there: http-token in state-dir)",
    )
    http_port: Port = Field(8080, description="port of the status page and /metrics; 0 picks one")
    state_dir: Path = Field(Path("ecavg-server"), description="where everything is kept")
    rounds: int = Field(1, ge=0, description="rounds to run; 0 runs for ever")
    min_agents: int = Field(2, ge=1, le=100_000, description="contributions that a round needs")
    max_agents: int | None = Field(
        None, ge=1, le=100_000, description="contributions that close a round at once (default: min-agents)"
    )
    deadline_seconds: float = Field(
        600, gt=0, description="after this long a round closes with min-agents, and the last reports are in"
    )
    on_too_few: Literal["wait", "fail"] = Field(
        "wait",
        title="wait|fail",
        description="fewer than min-agents at the deadline: wait for more, or fail the round",
    )
    device: str = Field("auto", description="where to train: auto, cpu, cuda, cuda:1")
    max_attempts: int = Field(3, ge=1, le=100, description="tries at a round's training before it fails")
    max_upload_bytes: int = Field(8 * 2**30, ge=1, description="largest data shard taken from an agent")
    max_agent_bytes: int | None = Field(
        None,
        ge=1,
        description="what one agent may have here that no round uses, and half of what it may send in a round"
        " (default: 4 x max-upload-bytes and weights)",
    )
    max_round_bytes: int | None = Field(
        None,
        ge=1,
        description="what all agents together may send in a round (default: 2 x max-agent-bytes for each of"
        " max-agents, 8 at least)",
    )
    max_joined: int | None = Field(
        None, ge=1, description="agents that a run takes (default: 10 x max-agents, 10000 at least)"
    )
    max_connections: int | None = Field(
        None, ge=1, description="connections from agents (default: 2 x max-agents and 128, 256 at least)"
    )
    max_calls_per_second: float = Field(200, gt=0, description="calls of one agent, in the long run")
    keep_rounds: int = Field(10, ge=1, description="rounds over whose models and uploads are kept")
    keep_partial_seconds: float = Field(
        7 * 24 * 3600, gt=0, description="how long uploads are kept that were not finished or not contributed"
    )
    tls_dir: Path | None = Field(
        None, description="CA, certificates, tokens and enrolled agents (default: tls in state-dir)"
    )
    insecure: bool = Field(False, description="plaintext: anybody may join under any name")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least severe shown")
    run: RunConfig = RunConfig()

    @model_validator(mode="after")
    def _max_is_not_below_min(self) -> Self:
        if self.max_agents is not None and self.max_agents < self.min_agents:
            raise ValueError(f"max_agents {self.max_agents} is below min_agents {self.min_agents}")
        return self

    @property
    def tls_folder(self) -> Path:
        return self.tls_dir or StateDir(self.state_dir).tls

    @property
    def http_token_path(self) -> Path:
        """Where the status page's token is, if it asks for one."""
        return self.http_token_file or StateDir(self.state_dir).http_token

    @property
    def connections(self) -> int:
        return self.max_connections or max(256, 2 * self.agents_to_close + 128)

    @property
    def joined(self) -> int:
        return self.max_joined or max(10_000, 10 * self.agents_to_close)

    @property
    def agents_to_close(self) -> int:
        return self.max_agents or self.min_agents
