"""The metrics of what single agents are doing, with their ids as labels."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector


class OneAgent(NamedTuple):
    """An agent as it is now."""

    agent_id: str
    is_here: bool
    # What it is doing; empty: nothing that is known.
    activity: str
    # How much of that is done, 0 to 1; None: nobody knows.
    ratio: float | None


class AgentsProgress(Collector):
    """The metrics of what each agent is doing, for the registry of a server that may show the ids of agents.

    Args:
        agents: returns all agents; called whenever somebody looks at the metrics.
    """

    def __init__(self, agents: Callable[[], Iterable[OneAgent]]) -> None:
        self._agents = agents

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics with their present values."""
        here = GaugeMetricFamily(
            "ecavg_server_agent_connected",
            "1 on agents that are connected, 0 on others.",
            labels=["agent_id"],
        )
        progress = GaugeMetricFamily(
            "ecavg_server_agent_progress_ratio",
            "How much of its activity an agent has done, 0 to 1.",
            labels=["agent_id", "activity"],
        )
        for agent in self._agents():
            here.add_metric([agent.agent_id], agent.is_here)
            if agent.ratio is not None:
                progress.add_metric([agent.agent_id, agent.activity], agent.ratio)
        yield from (here, progress)
