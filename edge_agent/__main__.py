"""`edge-agent`: the composition root, which builds the parts and runs them."""

import asyncio
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from ecavg.common import addresses, cli
from ecavg.common.addresses import http_url, is_loopback
from ecavg.common.errors import UsageError
from ecavg.edge_agent.config import ENV_PREFIX, AgentConfig, EnrollConfig
from ecavg.edge_agent.join_token import how_to_enroll, read_token
from ecavg.edge_agent.model_commands import MODEL_COMMANDS

if TYPE_CHECKING:
    from ecavg.edge_agent.identity import Identity
    from ecavg.edge_agent.own_training import OwnTraining
    from ecavg.edge_agent.state import AgentState

Config = TypeVar("Config", bound=AgentConfig)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `edge-agent` with these arguments, and return its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["enroll"]:
        return cli.enter("edge-agent enroll", lambda: enroll(argv[1:]))
    if argv[:1] == ["doctor"]:
        return cli.enter("edge-agent doctor", lambda: examine(argv[1:]))
    if argv and argv[0] in MODEL_COMMANDS:
        return cli.enter(f"edge-agent {argv[0]}", lambda: MODEL_COMMANDS[argv[0]](argv[1:]))
    return cli.enter("edge-agent", lambda: start(argv))


def start(argv: Sequence[str]) -> int:
    """Run the agent itself."""
    parser = cli.Parser(
        prog="edge-agent",
        description="Pre-train on this device's data, send weights and data to a cloud-server,"
        " and use the better model that comes back.",
        epilog="`edge-agent enroll` comes first, once: it gives this device its certificate."
        " `edge-agent doctor` says whether all that the agent needs is there. `edge-agent history`,"
        " `predict`, `export` and `roll-back` are about the model in use.",
    )
    config = _configuration(parser, AgentConfig, argv)
    return cli.run("edge-agent", lambda: take_part(config))


def enroll(argv: Sequence[str]) -> int:
    """Run `edge-agent enroll`: get this device its certificate."""
    parser = cli.Parser(
        prog="edge-agent enroll",
        description="Make a key on this device, and have the server certify it. Only the certificate is kept,"
        " the token is not.",
    )
    config = _configuration(parser, EnrollConfig, argv)
    token = config.token or read_token(config.join_token_file)
    return cli.run("edge-agent enroll", lambda: do_enroll(config, token))


def examine(argv: Sequence[str]) -> int:
    """Run `edge-agent doctor`: return 0 if all that the agent needs is there, 1 if not.

    Raises:
        UsageError: the configuration is wrong.
        RunError: stdout cannot be written.
    """
    parser = cli.Parser(
        prog="edge-agent doctor",
        description="Check all that the agent needs with these flags, and change nothing. Each line says ok,"
        " or what is wrong and what to do. Exits with 0 when all is well, 1 when anything is wrong.",
    )
    config = cli.parse_command_line(parser, AgentConfig, ENV_PREFIX, argv)
    # Imported here, so that --help and configuration errors are immediate.
    from ecavg.common.doctor import examine
    from ecavg.edge_agent.doctor import checks

    return examine(checks(config))


def _configuration(parser: cli.Parser, config_class: type[Config], argv: Sequence[str]) -> Config:
    """Return the configuration of an agent; raise UsageError if its way to the server cannot be used."""
    config = cli.parse_command_line(parser, config_class, ENV_PREFIX, argv)
    # Imported here, because --help does without.
    from ecavg.common import proxy

    proxy.find(config.server)
    return config


async def do_enroll(config: AgentConfig, token: str) -> int:
    """Enroll this device, and say until when its certificate holds."""
    from ecavg.edge_agent.state import AgentState

    state = AgentState(config.state_dir, config.agent_id)
    identity = await enrolled(config, state, token, on_wrong_clock=cli.print_status)
    cli.print_done(f"enrolled as {identity.agent_id}, until {identity.ends_at:%Y-%m-%d}; it renews itself")
    return 0


async def enrolled(
    config: AgentConfig,
    state: "AgentState",
    token: str,
    on_wrong_clock: Callable[[str], None] = lambda _: None,
) -> "Identity":
    """Enroll, waiting for the server if need be, and return the identity."""
    from ecavg.common.tls import JoinToken
    from ecavg.edge_agent.enrolment import Enrolment
    from ecavg.edge_agent.enrolment import enroll as enroll_with

    enrolment = await asyncio.to_thread(
        Enrolment, state.tls, state.agent_id, JoinToken.parse(token), config.server
    )
    tell = waiting_teller(config.server, cli.print_status)
    return await enroll_with(enrolment, config.server, tell, on_wrong_clock)


def waiting_teller(server: str, show: Callable[[str], None]) -> Callable[[str], None]:
    """Return what shows why the server is waited for, and with an empty text that it is reached."""
    from ecavg.common.proxy import route

    def tell(trouble: str) -> None:
        show(f"waiting for {route(server)}: {trouble}" if trouble else f"reached {server}")

    return tell


async def who_to_be(config: AgentConfig, state: "AgentState") -> "Identity | str":
    """Return this agent's identity, or with --insecure its name; enroll the agent if it has not enrolled.

    A certificate that seems to have ended is tried: the device's clock may be wrong, and the server decides.

    Raises:
        UsageError: the agent has not enrolled, and has no join token to do so.
    """
    if config.insecure:
        if not is_loopback(addresses.parse(config.server).host):
            cli.warn("edge-agent", f"--insecure: images and weights travel to {config.server} in plaintext")
        return state.agent_id
    from ecavg.edge_agent.identity import find

    return find(state.tls) or await enrolled_by_file(config, state, "this agent has not enrolled")


async def enrolled_by_file(config: AgentConfig, state: "AgentState", why: str) -> "Identity":
    """Enroll the agent with the join token in its file.

    Raises:
        UsageError: there is no such file; the message begins with `why`.
    """
    if not config.join_token_file:
        raise UsageError(f"{why}: {how_to_enroll(config.server, state.path)}")
    token = read_token(config.join_token_file)
    # A server that is being started takes about as long as PyTorch takes to be imported.
    importing = asyncio.create_task(asyncio.to_thread(importlib.import_module, "torch"))
    newcomer = await enrolled(config, state, token)
    await importing
    return newcomer


async def take_part(config: AgentConfig, own_training: "OwnTraining | None" = None) -> int:
    """Take part in the server's run until it is over; enroll anew if the certificate has ended.

    Args:
        own_training: trains in the place of this project's loop.
    """
    from ecavg.common import logs, tracing
    from ecavg.edge_agent.state import AgentState

    logs.set_up(config.log_level, config.log_format, quiet=config.quiet)
    tracing.start("ecavg-agent")
    state = AgentState(config.state_dir, config.agent_id)
    logs.bind(agent_id=state.agent_id)
    caller = await who_to_be(config, state)

    from ecavg.edge_agent.identity import EndedError

    while True:
        try:
            return await take_part_as(caller, config, state, own_training)
        except EndedError as error:
            caller = await enrolled_by_file(config, state, str(error))


async def take_part_as(
    caller: "Identity | str",
    config: AgentConfig,
    state: "AgentState",
    own_training: "OwnTraining | None" = None,
) -> int:
    """Take part in the server's run until it is over, as an agent that has enrolled.

    Raises:
        EndedError: the agent's certificate has ended, and the agent has to enroll anew.
    """
    from ecavg.common import endpoints, tracing

    # Imported here, so that --help and configuration errors are immediate.
    from ecavg.common.background import beside
    from ecavg.common.devices import make_deterministic
    from ecavg.common.progress import progress_display
    from ecavg.edge_agent.agent import EdgeAgent
    from ecavg.edge_agent.client import CloudClient
    from ecavg.edge_agent.hours import UploadHours, parse_hours
    from ecavg.edge_agent.metrics import AgentMetrics
    from ecavg.edge_agent.rate_limit import RateLimit

    make_deterministic()
    metrics = AgentMetrics()
    ends_at = None if isinstance(caller, str) else lambda: caller.ends_at.timestamp()
    metrics.machine.watch(state.path, ends_at)
    display = progress_display(has_bars=config.has_bars)

    tell = waiting_teller(config.server, display.message)
    client = CloudClient(
        config.server,
        caller,
        metrics,
        tell,
        display.message,
        upload_limit=RateLimit(config.max_upload_rate),
        download_limit=RateLimit(config.max_download_rate),
        upload_hours=UploadHours([parse_hours(text) for text in config.upload_hours], display.message),
    )
    http = None
    try:
        agent = EdgeAgent(config, state, client, metrics, display, own_training)
        if config.metrics_port is not None:
            token_path = config.metrics_token_file or state.path / "metrics-token"
            token = endpoints.http_token(config.metrics_host, config.metrics_token_file, token_path)
            app = endpoints.make_app(metrics.registry, ready=agent.is_ready, status=agent.status, token=token)
            http = await endpoints.serve_http(app, host=config.metrics_host, port=config.metrics_port)
            shown = f", with the token in {token_path}" if token else ""
            display.message(f"metrics on {http_url(config.metrics_host, http.port, '/metrics')}{shown}")
        async with beside(client.keep_identity()):
            await agent.run()
        display.message("the run is over")
    finally:
        display.close()
        await client.close()
        if http:
            await http.stop()
        await asyncio.to_thread(tracing.flush)
        # The state directory stays locked until the process is gone: a thread may still write to it.
    return 0


if __name__ == "__main__":
    sys.exit(main())
