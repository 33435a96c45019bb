"""The commands `cloud-server token`, `agents` and `forget`, which also work while the server runs."""

import argparse
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from rich.table import Table

from ecavg.cloud_server.config import DEFAULT_PRESET, ENV_PREFIX, ServerConfig
from ecavg.cloud_server.disk.lock import InUseError
from ecavg.cloud_server.disk.tables import ForgettingRow
from ecavg.cloud_server.door.authority import Authority, EnrolledAgent, TokenRow
from ecavg.cloud_server.state_dir import StateDir
from ecavg.cloud_server.store import Store
from ecavg.cloud_server.upkeep import forgetting, forgotten
from ecavg.common import cli, clock
from ecavg.common.errors import NotFoundError, RunError, UsageError
from ecavg.common.faults import Point, crash_point
from ecavg.common.layers import load

DEFAULT_TTL_SECONDS = 3600.0
# `forget` pauses for this time before it asks again whether a running server has forgotten the agent.
WAIT_SECONDS = 0.1


def main(argv: Sequence[str]) -> int:
    """Run one command, and print its result.

    Raises:
        UsageError: there is no such token or agent, or the state directory cannot be used.
        StorageError: the disk takes no data.
        RunError: stdout cannot be written.
    """
    arguments = _parser().parse_args(argv)
    flags = {name: getattr(arguments, name) for name in ("state_dir", "tls_dir") if hasattr(arguments, name)}
    config = load(
        ServerConfig, env_prefix=ENV_PREFIX, preset=DEFAULT_PRESET, config_file=arguments.config, flags=flags
    )
    try:
        arguments.do(config, arguments)
    except NotFoundError as error:
        raise UsageError(str(error)) from error
    return 0


def _parser() -> cli.Parser:
    folder_flags = cli.Parser(add_help=False, argument_default=argparse.SUPPRESS)
    folder_flags.add_argument("--state-dir", metavar="DIR", help="the server's")
    folder_flags.add_argument("--tls-dir", metavar="DIR", help="the server's")
    folder_flags.add_argument("--config", metavar="FILE", default=None, help="the server's")

    parser = cli.Parser(
        prog="cloud-server", description="Let agents in, and keep them out. The server may run meanwhile."
    )
    nouns = parser.add_subparsers(required=True, metavar="token|agents|forget")
    token = nouns.add_parser("token", help="join tokens").add_subparsers(required=True)
    create = token.add_parser("create", parents=[folder_flags], help="print a new one")
    create.add_argument("--uses", type=_positive_int, default=1, help="devices (default: 1)")
    create.add_argument(
        "--ttl-seconds", type=_positive, default=DEFAULT_TTL_SECONDS, help="lifetime (default: %(default)g)"
    )
    create.set_defaults(do=_create_token)
    token.add_parser("list", parents=[folder_flags], help="all of them").set_defaults(do=_list_tokens)
    revoke = token.add_parser("revoke", parents=[folder_flags], help="nobody enrolls with it any more")
    revoke.add_argument("token_id", metavar="ID", type=_name, help="as `token list` shows it")
    revoke.set_defaults(do=_revoke_token)
    agents = nouns.add_parser("agents", help="enrolled agents").add_subparsers(required=True)
    agents.add_parser("list", parents=[folder_flags], help="all of them").set_defaults(do=_list_agents)
    revoke = agents.add_parser(
        "revoke", parents=[folder_flags], help="cut an agent off, at once and for good"
    )
    revoke.add_argument("agent_id", metavar="AGENT", type=_name, help="its id")
    revoke.set_defaults(do=_revoke_agent)
    forget = nouns.add_parser(
        "forget",
        parents=[folder_flags],
        help="delete an agent's shards, weights and records, and cut it off",
        description="Delete everything an agent has sent, and what is recorded of it; published models stay."
        " It is revoked. Works while the server runs, and when not; once begun it is done to the end.",
    )
    forget.add_argument("agent_id", metavar="AGENT", type=_name, help="its id")
    forget.set_defaults(do=_forget_agent)
    return parser


def _has_authority(config: ServerConfig) -> bool:
    return (config.tls_folder / "authority.sqlite3").exists()


@contextmanager
def _authority(config: ServerConfig, *, make: bool = False) -> Iterator[Authority]:
    """Open the server's authority, and close it at the end.

    Args:
        config: the server's configuration.
        make: True to make an authority if there is none.

    Raises:
        UsageError: there is no authority, or it cannot be used.
    """
    is_new = not _has_authority(config)
    if is_new and not make:
        raise UsageError(
            f"no cloud-server has been in {config.tls_folder}: name its --state-dir or --tls-dir"
        )
    with closing(Authority(config.tls_folder)) as authority:
        if is_new:
            cli.print_note(f"made a CA in {config.tls_folder}")
        yield authority


def _forget_agent(config: ServerConfig, arguments: argparse.Namespace) -> None:
    """Revoke the agent if it is enrolled, and delete its data and records if it has joined.

    A server without TLS has no authority, and no agent of such a server is enrolled. The deletion is
    described in cloud_server/upkeep/forgetting.py.
    """
    agent_id = arguments.agent_id
    is_enrolled = False
    if _has_authority(config):
        with _authority(config) as authority, suppress(NotFoundError):
            authority.revoke_agent(agent_id)
            is_enrolled = True
    if StateDir(config.state_dir).database.exists():
        with suppress(NotFoundError):
            _print_forgotten(agent_id, _forget(config.state_dir, agent_id), is_enrolled=is_enrolled)
            return
    if not is_enrolled:
        raise UsageError(
            f"there is no agent {agent_id!r} in {config.state_dir}: name one, and the server's --state-dir"
        )
    cli.print_done(f"agent {agent_id} is revoked; nothing of it is kept here (any more)")


def _forget(state_dir: Path, agent_id: str) -> ForgettingRow:
    """Record that the agent is to be forgotten, and wait until it is forgotten.

    The server that uses the state directory deletes the agent's data. If there is none, this process does.

    Raises:
        NotFoundError: the agent has never joined.
    """
    pseudonym = ""
    while True:
        try:
            with closing(Store(state_dir)) as store:
                pseudonym = pseudonym or _ask_to_forget(store, agent_id)
                row = forgotten.forgetting_of(store, pseudonym)
                if row.done_at is None:
                    forgetting.forget(store, row, time.time())
                return forgotten.forgetting_of(store, pseudonym)
        except InUseError:
            # A server uses the state directory, or `cloud-server check` does.
            pass
        with closing(Store(state_dir, as_guest=True)) as store:
            pseudonym = pseudonym or _ask_to_forget(store, agent_id)
            if (row := forgotten.forgetting_of(store, pseudonym)).done_at is not None:
                return row
        time.sleep(WAIT_SECONDS)


def _ask_to_forget(store: Store, agent_id: str) -> str:
    """Record that the agent is to be forgotten, and return the pseudonym that replaces its id."""
    pseudonym = forgotten.ask_to_forget(store, agent_id, time.time())
    crash_point(Point.SERVER_FORGETTING_ASKED)
    return pseudonym


def _print_forgotten(agent_id: str, row: ForgettingRow, *, is_enrolled: bool) -> None:
    """Print that the agent is forgotten, and which published models have used its data."""
    how = "and revoked" if is_enrolled else "but was not enrolled: with --insecure anybody may take its name"
    models = ["no published model had used its data"]
    if row.models:
        models = ["published models that had used its data, and stay; later ones come of them:"]
        models += [f"round {number}: {digest}" for number, digest in row.models]
    cli.print_done(
        f"agent {agent_id} is forgotten, {how}; in provenance.jsonl it is {row.pseudonym}", "\n".join(models)
    )


def _create_token(config: ServerConfig, arguments: argparse.Namespace) -> None:
    with _authority(config, make=True) as authority:
        if doubt := clock.doubt(authority.now(), authority.newest_record()):
            cli.warn("cloud-server", doubt)
        try:
            with authority.token_to_show(arguments.uses, arguments.ttl_seconds) as token:
                cli.print_result(token)
        except RunError as error:
            raise RunError(f"{error}; the new token, which nobody has seen, is revoked") from error


def _list_tokens(config: ServerConfig, _: argparse.Namespace) -> None:
    with _authority(config) as authority:
        rows, now = authority.tokens(), authority.now()
    _print_table(
        ["token", "used", "expires", "state"],
        [
            [
                row.token_id,
                f"{row.num_used} of {row.uses}",
                _format_time(row.expires_at),
                _token_state(row, now),
            ]
            for row in rows
        ],
    )


def _revoke_token(config: ServerConfig, arguments: argparse.Namespace) -> None:
    with _authority(config) as authority:
        authority.revoke_token(arguments.token_id)
    cli.print_done(f"token {arguments.token_id} is revoked; agents that enrolled with it stay")


def _list_agents(config: ServerConfig, _: argparse.Namespace) -> None:
    with _authority(config) as authority:
        rows = authority.agents()
    _print_table(
        ["agent", "enrolled", "certificate ends", "token", "state"],
        [
            [
                row.agent_id,
                _format_time(row.enrolled_at),
                _format_time(row.expires_at),
                row.token_id,
                _agent_state(row),
            ]
            for row in rows
        ],
    )


def _revoke_agent(config: ServerConfig, arguments: argparse.Namespace) -> None:
    with _authority(config) as authority:
        authority.revoke_agent(arguments.agent_id)
        agents, tokens, now = authority.agents(), authority.tokens(), authority.now()
    (agent,) = (each for each in agents if each.agent_id == arguments.agent_id)
    (token,) = (each for each in tokens if each.token_id == agent.token_id)
    advice = (
        f"whoever has the token that it enrolled with can still enroll others:"
        f" cloud-server token revoke {token.token_id}"
    )
    is_live = _token_state(token, now) == "live"
    cli.print_done(f"agent {arguments.agent_id} is revoked", advice if is_live else "")


def _token_state(row: TokenRow, now: float) -> str:
    if row.revoked_at is not None:
        return "revoked"
    if not row.holds(now):
        return "expired" if row.expires_at <= now else "made while the clock was ahead"
    return "used up" if row.num_used >= row.uses else "live"


def _agent_state(row: EnrolledAgent) -> str:
    return "enrolled" if row.revoked_at is None else f"revoked {_format_time(row.revoked_at)}"


def _format_time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def _print_table(headings: list[str], rows: list[list[str]]) -> None:
    table = Table(box=None, pad_edge=False)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*row)
    cli.print_result(cli.rendered(table, width=160))


def _name(text: str) -> str:
    if not text.isprintable():
        raise argparse.ArgumentTypeError("should be printable characters")
    return text


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e9:
        raise argparse.ArgumentTypeError("should be above 0")
    return value


def _positive_int(text: str) -> int:
    return int(_positive(str(int(text))))
