"""`cloud-server`: the composition root, which builds the parts and runs them."""

import gc
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ecavg.cloud_server.config import DEFAULT_PRESET, ENV_PREFIX, ServerConfig
from ecavg.common import cli, clock
from ecavg.common.addresses import Address, http_url, is_loopback
from ecavg.common.errors import RunError

if TYPE_CHECKING:
    from ecavg.cloud_server.coordinator import Coordinator
    from ecavg.cloud_server.desk import Desk
    from ecavg.cloud_server.door.authority import Authority
    from ecavg.cloud_server.ledger import Ledger
    from ecavg.cloud_server.metrics import ServerMetrics
    from ecavg.cloud_server.showing.reports import Reports
    from ecavg.cloud_server.showing.standing import Standing
    from ecavg.cloud_server.showing.status import Status
    from ecavg.cloud_server.showing.traffic import Traffic
    from ecavg.cloud_server.showing.viewers import Viewers
    from ecavg.cloud_server.store import Store
    from ecavg.cloud_server.tracking.thread import Tracking
    from ecavg.cloud_server.tracking.to_webhook import Receiver
    from ecavg.cloud_server.training.handout import ExternalTrainers
    from ecavg.cloud_server.training.runner import Trainer
    from ecavg.cloud_server.training.supervisor import TrainerProcess
    from ecavg.common.run_state import RunState

# How long the token is valid that a server prints by itself.
FIRST_TOKEN_SECONDS = 24 * 3600.0
# A server whose CA is not valid by its clock looks so often whether either has been put right.
CA_POLL_SECONDS = 2.0
# The garbage collector comes after so many more objects were made than deleted; by default after 700.
COLLECT_AFTER_OBJECTS = 10_000


def main(argv: Sequence[str] | None = None) -> int:
    """Run `cloud-server` with these arguments, and return its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["check"]:
        return cli.enter("cloud-server check", lambda: check(argv[1:]))
    if argv[:1] == ["doctor"]:
        return cli.enter("cloud-server doctor", lambda: examine(argv[1:]))
    if argv[:1] == ["status"]:
        return cli.enter("cloud-server status", lambda: show_status(argv[1:]))
    if argv[:1] == ["models"]:
        return cli.enter("cloud-server models", lambda: manage_models(argv[1:]))
    if argv[:1] in (["token"], ["agents"], ["forget"]):
        return cli.enter("cloud-server", lambda: administer(argv))
    return cli.enter("cloud-server", lambda: start(argv))


def start(argv: Sequence[str]) -> int:
    """Run the server itself."""
    parser = cli.Parser(
        prog="cloud-server",
        description="Average what edge agents pre-trained, fine-tune it on their data, give it back.",
        epilog="`cloud-server check STATE` verifies the state directory of a server that is stopped."
        " `cloud-server token create|list|revoke` and `cloud-server agents list|revoke` say who may come in;"
        " `cloud-server forget AGENT` deletes all that an agent has sent."
        " `cloud-server models list|pin|unpin|withdraw` says which round's model agents use."
        " `cloud-server status` shows how the run is, `cloud-server doctor` whether a server can be started.",
    )
    config = cli.parse_command_line(parser, ServerConfig, ENV_PREFIX, argv, default_preset=DEFAULT_PRESET)
    return cli.run("cloud-server", lambda: serve(config))


def check(argv: Sequence[str]) -> int:
    """Return 0 when all is well in a state directory, 1 when not.

    Raises:
        UsageError: there is nothing to check, or it cannot be checked now.
        RunError: stdout cannot be written.
    """
    from ecavg.cloud_server.commands.check import main as check_state

    return check_state(argv)


def examine(argv: Sequence[str]) -> int:
    """Return 0 if all that a server needs is there, 1 if not.

    Raises:
        UsageError: the configuration is wrong.
        RunError: stdout cannot be written.
    """
    from ecavg.cloud_server.commands.doctor import main as check_surroundings

    return check_surroundings(argv)


def show_status(argv: Sequence[str]) -> int:
    """Show what the status page shows, and return 0.

    Raises:
        UsageError: the server asks for another token.
        RunError: the server does not answer, or stdout cannot be written.
    """
    from ecavg.cloud_server.commands.status import main as show

    return show(argv)


def administer(argv: Sequence[str]) -> int:
    """Run `cloud-server token`, `agents` or `forget`, and return 0.

    Raises:
        ECAvgError: the command cannot be done.
    """
    from ecavg.cloud_server.commands.admin import main as do_command

    return do_command(argv)


def manage_models(argv: Sequence[str]) -> int:
    """Run `cloud-server models`, and return 0.

    Raises:
        ECAvgError: the command cannot be done.
    """
    from ecavg.cloud_server.commands.models import main as do_command

    return do_command(argv)


async def serve(config: ServerConfig) -> int:
    """Run until the run is over.

    Raises:
        UsageError: an address, the state directory or the run's model cannot be used.
        RunError: the last round published no model.
    """
    # Imported here, so that --help and configuration errors are immediate.
    import asyncio

    from ecavg.cloud_server.door.connections import raise_file_limit
    from ecavg.cloud_server.metrics import ServerMetrics
    from ecavg.cloud_server.server import GrpcServer
    from ecavg.cloud_server.showing import page
    from ecavg.cloud_server.showing.feed import Feed
    from ecavg.cloud_server.showing.viewers import Viewers
    from ecavg.cloud_server.store import Store
    from ecavg.cloud_server.tracking.tracker import check_packages
    from ecavg.common import endpoints, logs, tracing
    from ecavg.common.background import beside
    from ecavg.common.progress import progress_display
    from ecavg.common.run_display import RunDisplay

    logs.set_up(config.log_level, config.log_format, quiet=config.quiet)
    tracing.start("ecavg-server")
    check_packages(config.tracking)
    receiver = receiver_of(config)
    store = Store(config.state_dir, place=config.blobs, cache_bytes=config.blob_cache_bytes)
    authority = None if config.insecure else await open_authority(config.tls_folder)
    warn_of_clock(store, authority)
    http_token = endpoints.http_token(config.http_host, config.http_token_file, config.http_token_path)
    metrics = ServerMetrics(agent_labels=config.agent_labels)
    metrics.machine.watch(config.state_dir, (lambda: authority.ends_at) if authority else None)
    trainer = trainer_of(config)
    display = RunDisplay(progress_display(has_bars=config.has_bars), run=config.run)
    server = GrpcServer(
        metrics,
        authority,
        max_connections=min(config.connections, raise_file_limit()),
        calls_per_second=config.max_calls_per_second,
    )
    viewers = Viewers()
    service: Service | None = None
    opened: Service | None = None

    async def status() -> Mapping[str, Any]:
        viewers.note()
        return await service.status.read() if service else {"phase": "starting"}

    feed = Feed(status)
    app = endpoints.make_app(
        metrics.registry,
        ready=lambda: service is not None,
        status=status,
        more=page.endpoints(store, feed),
        token=http_token,
    )
    http = None
    try:
        port = server.bind(config.host, config.port)
        http = await endpoints.serve_http(app, host=config.http_host, port=config.http_port)
        await trainer.start()

        def show(state: "RunState") -> None:
            logs.bind(round=state.round)
            display.show(state)

        opened = await open_service(
            config, store, trainer, metrics, viewers, receiver=receiver, on_change=show
        )
        await server.start(opened.desk)
        service = opened
        spare_collector()
        tell_who_may_come(config, authority)
        if http_token:
            cli.print_status(f"the status page asks for the token in {config.http_token_path}")
        cli.print_status(
            f"cloud-server ready: agents on {Address(config.host, port)},"
            f" status page on {http_url(config.http_host, http.port)}"
        )
        async with beside(server.guard()):
            await opened.coordinator.run()
    finally:
        feed.close()
        service = None
        display.close()
        await server.stop(grace_seconds=1)
        if opened:
            opened.tracking.stop()
            await opened.reports.write_if_possible()
            opened.traffic.record_if_possible(opened.ledger.round.number)
        if http:
            await http.stop()
        await trainer.stop()
        if authority:
            authority.close()
        store.close()
        await asyncio.to_thread(tracing.flush)
    return 0


def receiver_of(config: ServerConfig) -> "Receiver | None":
    """Return who is told of what happens to the run; None: nobody is.

    Raises:
        UsageError: the file with the secret cannot be used.
    """
    from ecavg.cloud_server.tracking.to_webhook import Receiver
    from ecavg.common.endpoints import read_secret

    if config.notify_url is None:
        return None
    path = config.notify_secret_file
    return Receiver(config.notify_url, read_secret(path, "secret") if path else None, config.page_url)


def trainer_of(config: ServerConfig) -> "ExternalTrainers | TrainerProcess":
    """Return the trainer of the server, which is not started yet."""
    if config.trainers == "own":
        from ecavg.cloud_server.training.supervisor import TrainerProcess

        return TrainerProcess(config.state_dir, device=config.device)
    from ecavg.cloud_server.disk.bucket import Bucket
    from ecavg.cloud_server.disk.place import FILES
    from ecavg.cloud_server.training.handout import ExternalTrainers

    bucket = None if config.blobs == FILES else Bucket(config.blobs)
    return ExternalTrainers(config.state_dir, bucket)


async def open_authority(folder: Path) -> "Authority":
    """Return the authority in a folder; wait while its CA is not valid by this machine's clock.

    A machine without a battery gets the right time only after its services have started.
    """
    import asyncio

    from ecavg.cloud_server.door.authority import Authority, CaNotValidError

    told = ""
    while True:
        try:
            return await asyncio.to_thread(Authority, folder)
        except CaNotValidError as error:
            if not told:
                told = str(error)
                cli.warn("cloud-server", f"waiting: {told}")
            await asyncio.sleep(CA_POLL_SECONDS)


def warn_of_clock(store: "Store", authority: "Authority | None") -> None:
    """Warn if this machine's clock is evidently wrong."""
    newest = max(store.newest_record(), authority.newest_record() if authority else 0.0)
    if doubt := clock.doubt(time.time(), newest):
        cli.warn("cloud-server", doubt)


def spare_collector() -> None:
    """Have Python's garbage collector leave alone what is in memory now, and come less often.

    The modules stay for as long as the process. With 300 agents, looking through them again and again took a
    tenth of the server's processor time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(COLLECT_AFTER_OBJECTS)


class Service(NamedTuple):
    """The parts of an opened run that others hold on to."""

    coordinator: "Coordinator"
    desk: "Desk"
    ledger: "Ledger"
    standing: "Standing"
    status: "Status"
    reports: "Reports"
    traffic: "Traffic"
    tracking: "Tracking"


async def open_service(
    config: ServerConfig,
    store: "Store",
    trainer: "Trainer",
    metrics: "ServerMetrics",
    viewers: "Viewers",
    *,
    receiver: "Receiver | None" = None,
    clock: Callable[[], float] = time.time,
    on_change: Callable[["RunState"], None] = lambda _: None,
) -> Service:
    """Find the run in the state directory, or begin it, and build all that serves it.

    Args:
        receiver: who is told of what happens to the run; None: nobody is.
        clock: seconds since the epoch.
        on_change: called after every change, for a progress display.

    Raises:
        UsageError: the directory holds another run, or the run's model cannot be built.
        RunError: the trainer could not make the initial weights.
    """
    import asyncio

    from ecavg.cloud_server import records
    from ecavg.cloud_server.coordinator import Coordinator
    from ecavg.cloud_server.desk import Desk
    from ecavg.cloud_server.disk.failures import when_disk_allows
    from ecavg.cloud_server.intake.turns import Turns
    from ecavg.cloud_server.intake.uploads import Uploads
    from ecavg.cloud_server.ledger import Ledger
    from ecavg.cloud_server.rollout.rule import CanaryRule
    from ecavg.cloud_server.round import Policy, Sampling
    from ecavg.cloud_server.run import open_run
    from ecavg.cloud_server.showing.agent_metrics import AgentsProgress
    from ecavg.cloud_server.showing.presence import Presence
    from ecavg.cloud_server.showing.progress import ProgressBoard
    from ecavg.cloud_server.showing.reports import Reports
    from ecavg.cloud_server.showing.standing import Standing
    from ecavg.cloud_server.showing.status import Status
    from ecavg.cloud_server.showing.traffic import Traffic
    from ecavg.cloud_server.tracking.thread import Tracking
    from ecavg.cloud_server.tracking.to_webhook import webhook_of
    from ecavg.cloud_server.tracking.tracker import trackers_of
    from ecavg.cloud_server.training.runner import JobRunner
    from ecavg.cloud_server.upkeep import provenance
    from ecavg.cloud_server.upkeep.caretaker import Caretaker
    from ecavg.cloud_server.upkeep.eraser import Eraser
    from ecavg.cloud_server.upkeep.rollout import RollOut
    from ecavg.common.wire import contributed_wires

    jobs = JobRunner(store.state_dir.jobs, trainer, config.max_attempts)
    run = await open_run(config, store, jobs, clock)
    eraser = Eraser(store, jobs, clock)
    await eraser.finish()

    policy = Policy(
        min_agents=config.min_agents,
        max_agents=config.agents_to_close,
        deadline_seconds=config.deadline_seconds,
        on_too_few=config.on_too_few,
        sampling=Sampling(run.config.seed, config.agents_to_draw, config.connected_to_draw)
        if config.agents_per_round
        else None,
        max_staleness=config.staleness_allowed,
    )
    current = records.recorded_round(store, run.config, policy)
    slots = {agent.agent_id: agent.slot for agent in store.agents()}
    run_name = config.run_name or run.default_name
    reports = Reports(run.config, store)
    turns = Turns(config.max_concurrent_uploads)
    metrics.watch_uploads(lambda: {"receiving": turns.num_taken, "waiting": turns.num_waiting})
    presence, board = Presence(expected=current.contributions), ProgressBoard()
    standing = Standing(
        current, slots, presence, store=store, board=board, metrics=metrics, on_change=on_change
    )
    status = Status(
        run.run_id,
        run_name,
        standing,
        presence,
        store=store,
        reports=reports,
        board=board,
        upload_places=lambda: turns.places,
        is_trainer_running=lambda: trainer.is_running,
        clock=clock,
    )
    metrics.watch_downloads(lambda: board.num_transfers("model"))
    metrics.watch_trainer(lambda: status.trainer_state)
    if config.agent_labels:
        metrics.registry.register(AgentsProgress(status.each_agent))
    ledger = Ledger(
        run,
        current,
        slots,
        records.recorded_classes(store, run.config),
        store=store,
        standing=standing,
        metrics=metrics,
        max_joined=config.joined,
        clock=clock,
    )
    uploads = Uploads(
        store,
        weights_schema=run.weights_schema,
        wires=contributed_wires(run.config),
        spec=run.config.spec,
        max_data_bytes=config.max_upload_bytes,
        num_agents=config.expected_agents,
        agent_bytes=config.max_agent_bytes,
        round_bytes=config.max_round_bytes,
        turns=turns,
        on_received=metrics.count_received,
    )
    desk = Desk(
        run,
        ledger,
        uploads,
        store=store,
        reports=reports,
        standing=standing,
        board=board,
        metrics=metrics,
        clock=clock,
        num_agents=config.expected_agents,
    )
    caretaker = Caretaker(
        config,
        store,
        ledger,
        uploads=uploads,
        eraser=eraser,
        reports=reports,
        standing=standing,
        presence=presence,
        clock=clock,
    )
    roll_out = RollOut(
        CanaryRule(
            run.config.seed,
            config.canary or 0.0,
            config.canary_level,
            config.canary_seconds,
            config.canary_on_too_few,
        ),
        store,
        ledger,
        reports=reports,
        standing=standing,
        presence=presence,
        metrics=metrics,
        clock=clock,
    )
    traffic = Traffic(store, metrics)
    await when_disk_allows(lambda: asyncio.to_thread(provenance.write, store))
    await caretaker.clean_up()
    trackers = trackers_of(config.tracking)
    if receiver:
        trackers.append(webhook_of(receiver, run_name, store, metrics.count_notification))
    tracking = Tracking(trackers, store, with_agent_ids=config.tracking.agent_ids)
    coordinator = Coordinator(
        config,
        ledger,
        jobs,
        caretaker,
        roll_out,
        store=store,
        uploads=uploads,
        reports=reports,
        standing=standing,
        presence=presence,
        viewers=viewers,
        tracking=tracking,
        metrics=metrics,
        traffic=traffic,
        clock=clock,
    )
    return Service(coordinator, desk, ledger, standing, status, reports, traffic, tracking)


def tell_who_may_come(config: ServerConfig, authority: "Authority | None") -> None:
    """Print the CA's fingerprint, and a join token as long as no agent has enrolled.

    If stdout cannot be written, the log says how to make a token.
    """
    if authority is None:
        if not is_loopback(config.host):
            cli.warn(
                "cloud-server",
                f"--insecure on {config.host}: everything travels in plaintext,"
                " and whoever reaches the port can join under any name",
            )
        return
    cli.print_status(f"CA fingerprint (SHA-256): {authority.fingerprint}")
    if authority.agents():
        return
    uses, hours = config.expected_agents, FIRST_TOKEN_SECONDS / 3600
    try:
        with authority.token_to_show(uses, FIRST_TOKEN_SECONDS) as token:
            cli.print_result(f"join token, for {uses} agents within {hours:g} hours: {token}")
    except RunError as error:
        import structlog

        make_one = f"cloud-server token create --uses {uses} --state-dir {config.state_dir}"
        structlog.get_logger().warning("join_token_not_shown", reason=str(error), make_one=make_one)


if __name__ == "__main__":
    sys.exit(main())
