"""The parts of a model: the shared part, which travels and is averaged, and the rest, which does not.

`share_parameters` of the run divides the names of a model's state_dict. One mechanism serves three methods:
heads that each device keeps (FedPer, arXiv 1912.00818), normalisation that fits the device's own data (FedBN,
arXiv 2102.07623), and adapters of a frozen model (LoRA, arXiv 2106.09685). Every file of weights that travels
holds the shared part; the rest of a model is a file of its own.
"""

from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase

from ecavg.common.config import RunConfig
from ecavg.common.errors import UsageError

# A pattern that begins so says what is not shared.
NOT = "!"
# A message shows so many names.
_MAX_SHOWN = 5


def shared_names(run: RunConfig, names: Collection[str], trainable: Collection[str]) -> frozenset[str]:
    """Return the names of the tensors that travel, of all names in a model's state_dict.

    Args:
        run: the configuration, whose `share_parameters` decides.
        names: the names in the state_dict.
        trainable: the names of the parameters that the model trains.

    Raises:
        UsageError: a pattern matches no name, or nothing would travel.
    """
    if run.share_parameters == "trainable":
        return frozenset(names) & frozenset(trainable)
    patterns = run.share_parameters
    for pattern in patterns:
        if not any(_matches(name, [pattern.removeprefix(NOT)]) for name in names):
            shown = ", ".join(list(names)[:_MAX_SHOWN])
            more = ", …" if len(names) > _MAX_SHOWN else ""
            raise UsageError(
                f"run.share_parameters: {pattern!a} matches no tensor of model {run.model!r},"
                f" which has {shown}{more}"
            )
    excluded = [pattern.removeprefix(NOT) for pattern in patterns if pattern.startswith(NOT)]
    included = [pattern for pattern in patterns if not pattern.startswith(NOT)] or ["*"]
    shared = frozenset(name for name in names if _matches(name, included) and not _matches(name, excluded))
    if not shared:
        raise UsageError(
            f"run.share_parameters: no tensor of model {run.model!r} is left to travel: take out a pattern"
        )
    return shared


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
