"""The command `cloud-server models`: which round's model agents are offered, and how to change that.

The command reads and writes records beside a running server, which follows them within a second; a server
that does not run follows them when it is started.
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

from rich.table import Table

from ecavg.cloud_server.config import DEFAULT_PRESET, ENV_PREFIX, ServerConfig
from ecavg.cloud_server.rollout import changes, offers
from ecavg.cloud_server.state_dir import StateDir
from ecavg.cloud_server.store import Store
from ecavg.common import cli
from ecavg.common.errors import ConflictError, NotFoundError, UsageError
from ecavg.common.layers import load

_HINT = "a server that runs tells its agents within a second"


def main(argv: Sequence[str]) -> int:
    """Run one command, and print its result.

    Raises:
        UsageError: there is no such model, it cannot be changed so, or the state directory cannot be used.
        StorageError: the disk takes no data.
        RunError: stdout cannot be written.
    """
    arguments = _parser().parse_args(argv)
    flags = {"state_dir": arguments.state_dir} if hasattr(arguments, "state_dir") else {}
    config = load(
        ServerConfig, env_prefix=ENV_PREFIX, preset=DEFAULT_PRESET, config_file=arguments.config, flags=flags
    )
    try:
        with _store(config) as store:
            arguments.do(store, arguments)
    except (ConflictError, NotFoundError) as error:
        raise UsageError(str(error)) from error
    return 0


def _parser() -> cli.Parser:
    folder_flags = cli.Parser(add_help=False, argument_default=argparse.SUPPRESS)
    folder_flags.add_argument("--state-dir", metavar="DIR", help="the server's")
    folder_flags.add_argument("--config", metavar="FILE", default=None, help="the server's")
    parser = cli.Parser(
        prog="cloud-server models",
        description="Show and change which round's model agents are offered. The server may run meanwhile.",
    )
    commands = parser.add_subparsers(required=True, metavar="list|pin|unpin|withdraw")
    listing = commands.add_parser("list", parents=[folder_flags], help="the published models")
    listing.add_argument("--json", action="store_true", help="all that is known of each, as JSON")
    listing.set_defaults(do=_list)
    pin = commands.add_parser(
        "pin", parents=[folder_flags], help="have all agents use this model, whatever is published later"
    )
    pin.set_defaults(do=_pin)
    unpin = commands.add_parser("unpin", parents=[folder_flags], help="offer the newest model again")
    unpin.set_defaults(do=_unpin)
    withdraw = commands.add_parser(
        "withdraw", parents=[folder_flags], help="have no agent use this model any more, for good"
    )
    withdraw.set_defaults(do=_withdraw)
    for command in (pin, withdraw):
        command.add_argument("round", metavar="ROUND", type=int, help="as `models list` shows it")
    return parser


@contextmanager
def _store(config: ServerConfig) -> Iterator[Store]:
    """Open the records of a server beside it; raise UsageError if there are none."""
    if not StateDir(config.state_dir).database.exists():
        raise UsageError(f"no cloud-server has been in {config.state_dir}: name its --state-dir")
    with closing(Store(config.state_dir, as_guest=True)) as store:
        yield store


def _list(store: Store, arguments: argparse.Namespace) -> None:
    models = _models(store)
    if arguments.json:
        cli.print_result(json.dumps(models, indent=2))
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("round", "state", "agents", "model", "why"):
        table.add_column(heading, overflow="fold")
    for each in models:
        state = f"{each['state']}, pinned" if each["is_pinned"] else each["state"]
        reason = each["reason"] or ""
        table.add_row(str(each["round"]), state, str(each["num_agents"]), each["sha256"][:12], reason)
    cli.print_result(cli.rendered(table, width=160) if models else "no round has published a model yet")


def _models(store: Store) -> list[dict[str, Any]]:
    """Return what is known of each published model, oldest first."""
    known = offers.rollouts(store)
    in_use, offered = Counter(store.rounds_in_use().values()), offers.read(store)
    models = []
    for row in store.rounds():
        if not row.number or row.published_digest is None:
            continue
        rollout = known.get(row.number)
        models.append(
            {
                "round": row.number,
                "sha256": row.published_digest,
                "published_at": row.phase_times["published"],
                "state": rollout.state if rollout else "released",
                "reason": (rollout and rollout.reason) or None,
                "canary": list(rollout.canary) if rollout else [],
                "is_pinned": row.number == offered.pinned,
                "is_offered": row.number == offered.for_all,
                "num_agents": in_use[row.number],
            }
        )
    return models


def _pin(store: Store, arguments: argparse.Namespace) -> None:
    changes.pin(store, arguments.round, time.time())
    cli.print_done(f"the model of round {arguments.round} is pinned; {_HINT}")


def _unpin(store: Store, _: argparse.Namespace) -> None:
    number = changes.unpin(store)
    cli.print_done(f"the model of round {number} is not pinned any more; {_HINT}")


def _withdraw(store: Store, arguments: argparse.Namespace) -> None:
    changes.withdraw(store, arguments.round, time.time())
    cli.print_done(f"the model of round {arguments.round} is withdrawn; {_HINT}")
