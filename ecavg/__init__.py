"""ECAvg as a library: an agent in your own program, with a training loop of your own.

See docs/library.md. What is not in `__all__` may change at any time.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ecavg.agent import Agent
    from ecavg.common.errors import ECAvgError, RunError, UsageError
    from ecavg.edge_agent.own_training import Data, OwnTraining, Report, Start

__all__ = ["Agent", "Data", "ECAvgError", "OwnTraining", "Report", "RunError", "Start", "UsageError"]

_MODULES = {
    "Agent": "ecavg.agent",
    "ECAvgError": "ecavg.common.errors",
    "RunError": "ecavg.common.errors",
    "UsageError": "ecavg.common.errors",
    "Data": "ecavg.edge_agent.own_training",
    "OwnTraining": "ecavg.edge_agent.own_training",
    "Report": "ecavg.edge_agent.own_training",
    "Start": "ecavg.edge_agent.own_training",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562).

    The commands are in this package as well, and the serving process must not import torch.
    """
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value
