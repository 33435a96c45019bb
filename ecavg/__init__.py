"""ECAvg as a library: an agent in your own program, with a training loop of your own.

See docs/library.md. What is not in `__all__` may change at any time.
"""

from common.errors import ECAvgError, RunError, UsageError
from ecavg.agent import Agent
from edge_agent.own_training import Data, OwnTraining, Report, Start

__all__ = ["Agent", "Data", "ECAvgError", "OwnTraining", "Report", "RunError", "Start", "UsageError"]
