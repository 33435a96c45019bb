"""The agent as an object of the user's program."""

import asyncio
import os
from typing import Any

from ecavg.common import proxy
from ecavg.common.layers import load
from ecavg.edge_agent.__main__ import take_part
from ecavg.edge_agent.config import ENV_PREFIX, AgentConfig
from ecavg.edge_agent.own_training import OwnTraining


class Agent:
    """An edge agent, as the command `edge-agent` runs one.

    Args:
        server: where the cloud-server listens, HOST:PORT.
        config_file: a TOML file with keys of an agent.
        keys: any keys of an agent, as in docs/configuration.md, such as `agent_id`, `data` and
            `join_token_file`. They win over variables `ECAVG_AGENT_…`, and these over the file.

    Raises:
        UsageError: a key is unknown, or has a wrong value.
    """

    def __init__(self, server: str, *, config_file: str | None = None, **keys: Any) -> None:
        self._config = load(
            AgentConfig,
            env_prefix=ENV_PREFIX,
            config_file=config_file,
            flags={"server": server, **keys},
            environ=os.environ,
        )
        proxy.find(self._config.server)

    def run(self, train: OwnTraining | None = None) -> None:
        """Take part in the server's run until it is over.

        This blocks, and may be called once in a process: the process keeps the agent's state directory until
        it ends. Where an event loop runs already, as in a notebook, call it in a thread.

        Args:
            train: trains for a round; None: this project's own loop does. See `OwnTraining`.

        Raises:
            UsageError: the agent has not enrolled, or the data or the run's model cannot be used here.
            RunError: the agent failed.
            Exception: whatever `train` raises.
        """
        asyncio.run(take_part(self._config, train))
