"""The command `edge-agent doctor`: is all there that an agent with this configuration needs?"""

import asyncio
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ecavg.common import addresses, doctor, proxy, tls
from ecavg.common.errors import ECAvgError, RunError, UnavailableError, UsageError
from ecavg.edge_agent.config import AgentConfig
from ecavg.edge_agent.identity import (
    PROBE_SECONDS,
    SPEAKS_TLS,
    Identity,
    certificate_of,
    distrust,
    find,
    is_outside,
    wrong_clock,
)
from ecavg.edge_agent.join_token import how_to_enroll, read_token
from ecavg.edge_agent.state import default_directories, user_of

if TYPE_CHECKING:
    import numpy as np

    from ecavg.edge_agent.splits import Split


def checks(config: AgentConfig) -> dict[str, doctor.Check]:
    """Return the checks of an agent by their names, in the order in which they are done."""
    folder = config.state_dir or default_directories(config.agent_id)[0]
    return {
        "versions": doctor.versions,
        "name": lambda: _resolve(config.server),
        "port": lambda: _reach(config.server),
        "identity": lambda: _identify(config, folder),
        "tls": lambda: _trust(config, folder),
        "clock": lambda: _compare_clocks(config),
        "state": lambda: _find_state(folder),
        "disk": lambda: doctor.disk(folder),
        "data": lambda: _look_at_data(config),
        "device": lambda: _look_at_device(config),
    }


def _resolve(server: str) -> str:
    """Return the address of the server, or of the proxy, which resolves the server's name itself."""
    way = proxy.find(server)
    host, port = way.address if way else addresses.parse(server)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise UsageError(
            f"{host} has no address ({error.strerror or error}):"
            f" correct {way.variable if way else '--server'}, or the name service of this device"
        ) from error
    what = f"{way}, which finds {server}," if way else host
    return f"{what} is {found[0][4][0]}"


def _reach(server: str) -> str:
    """Return the way to the server, after a connection by it."""
    route = proxy.route(server)
    try:
        proxy.connect(server, PROBE_SECONDS).close()
    except UnavailableError as error:
        raise UsageError(f"{route}: {error}; correct the proxy, or list the server in no_proxy") from error
    except OSError as error:
        raise RunError(
            f"nobody answers at {route} ({error.strerror or error}): start the cloud-server, correct"
            " --server, or have the firewalls in between let this port through"
        ) from error
    return f"{route} is reached"


def _identify(config: AgentConfig, folder: Path) -> str:
    """Return as whom the agent takes part, and for how long."""
    if config.insecure:
        return "none is needed with --insecure"
    identity = find(folder / "tls")
    if identity is None:
        if config.join_token_file is None:
            raise _not_enrolled(config, folder)
        read_token(config.join_token_file)
        return f"not enrolled yet, the agent enrolls at its start with the token in {config.join_token_file}"
    days = doctor.days_until(identity.ends_at)
    if days < 0:
        raise UsageError(
            f"the certificate of {identity.agent_id} ended on {identity.ends_at:%Y-%m-%d} by this"
            f" device's clock: {how_to_enroll(config.server, folder)}"
        )
    return f"enrolled as {identity.agent_id}, {days} days are left, the agent renews it"


def _not_enrolled(config: AgentConfig, folder: Path) -> UsageError:
    return UsageError(f"this agent has not enrolled: {how_to_enroll(config.server, folder)}")


def _trust(config: AgentConfig, folder: Path) -> str:
    """Return that server and agent take each other's certificates, or both speak plaintext."""
    try:
        if config.insecure:
            return _check_plaintext(config.server)
        identity = find(folder / "tls")
        return _check_tls(config, folder, identity)
    except OSError as error:
        raise RunError(f"not known, the server is not reached ({error.strerror or error})") from error


def _check_plaintext(server: str) -> str:
    try:
        certificate_of(server)
    except UsageError:
        return "server and agent speak plaintext: images and weights can be read on the way"
    raise UsageError(SPEAKS_TLS)


def _check_tls(config: AgentConfig, folder: Path, identity: Identity | None) -> str:
    if identity is None:
        certificate_of(config.server)
        if config.join_token_file is None:
            raise UsageError(f"the server speaks TLS, but {_not_enrolled(config, folder)}")
        return "the server speaks TLS; whether it is the right one is known when the agent has enrolled"
    if reason := distrust(config.server, identity):
        raise UsageError(reason)
    # Imported here, because gRPC may be what is broken.
    from ecavg.edge_agent.client import ask_for_health

    # Whether an agent is revoked is known only when it calls.
    asyncio.run(ask_for_health(config.server, identity.material))
    return "server and agent take each other's certificates, and the server answers the agent's calls"


def _compare_clocks(config: AgentConfig) -> str:
    """Return what this device's clock says, compared with what is certain of the true time."""
    now = doctor.read_clock()
    if config.insecure:
        return now
    try:
        validity = tls.validity(tls.load_certificate(certificate_of(config.server)))
    except (OSError, ValueError, ECAvgError):
        return f"{now}; there is no certificate of the server to compare it with"
    if is_outside(validity):
        raise UsageError(wrong_clock(validity))
    return f"{now}, when the server's certificate is valid"


def _find_state(folder: Path) -> str:
    """Return whether the state directory can be used, and who uses it."""
    if process := user_of(folder):
        return f"{folder} is in use by the edge-agent with process id {process}"
    return doctor.writable(folder)


def _look_at_data(config: AgentConfig) -> str:
    """Return how many images of how many classes there are; a few image files are decoded."""
    if config.data is None:
        return "the run's dataset, which the server names when the agent joins"
    # Imported here, because PyTorch takes seconds, and may be what is broken.
    from ecavg.edge_agent.sources import find_source

    source = find_source(config.data, config.data_dir, table=config.table)
    if source is None:
        return f"{config.data} is not here yet, the agent downloads it at its start"
    splits = [split for split in source if split is not None]
    for split in splits:
        split.check_some()
    return f"{config.data} has {_described(splits)}"


def _described(splits: Sequence["Split"]) -> str:
    """Return how many examples of how many classes there are, and what else a run needs to know of them."""
    from ecavg.edge_agent.arrays import statistics
    from ecavg.edge_agent.splits import ArraySplit

    first, num_examples = splits[0], sum(len(split.targets) for split in splits)
    targets = [_known_targets(split.targets) for split in splits]
    found = f"{num_examples} {first.noun}s"
    if targets[0].dtype.kind == "i" and targets[0].ndim == 1:
        found += f" of {len({label for known in targets for label in known.tolist()})} classes"
    if isinstance(first, ArraySplit) and first.noun == "example":
        found += f"; {statistics(first.inputs)}"
        if targets[0].dtype.kind == "f":
            found += f"; of the targets, {statistics(targets[0])}"
    if num_missing := num_examples - sum(map(len, targets)):
        found += f"; {num_missing} have no target, which takes missing = true in the server's [run.targets]"
    return found


def _known_targets(targets: "np.ndarray") -> "np.ndarray":
    """Return the targets without those that are missing, [N, …]."""
    from ecavg.common.dataset import MISSING, Targets
    from ecavg.common.shards import has_target
    from ecavg.edge_agent.arrays import as_labels

    known = targets[has_target(targets, Targets("float32", missing=True))]
    if targets.dtype.kind == "f":
        # Labels were whole numbers before one was missing.
        return known if len(known) == len(targets) else as_labels(known)
    # Among numbers below it, -1 is a number.
    return known if targets.size and targets.min() == MISSING else targets


def _look_at_device(config: AgentConfig) -> str:
    from ecavg.common.devices import describe_device

    return describe_device(config.device)
