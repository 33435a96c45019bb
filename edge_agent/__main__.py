"""`edge-agent`: puts the parts together and runs them."""

import argparse
import sys
from collections.abc import Sequence

from common import cli
from common.errors import UsageError
from edge_agent.config import ENV_PREFIX, AgentConfig


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="edge-agent",
        description="Pre-train on this device's data, send weights and data to a cloud-server,"
        " and use the better model that comes back.",
    )
    try:
        config = cli.parse_command_line(parser, AgentConfig, ENV_PREFIX, argv)
    except UsageError as error:
        return cli.fail("edge-agent", error)
    return cli.run("edge-agent", lambda: take_part(config))


async def take_part(config: AgentConfig) -> int:
    """Take part in the server's run until it is over."""
    # Imported here, so that --help and configuration errors are immediate.
    from common import telemetry
    from common.training import make_deterministic
    from edge_agent.agent import EdgeAgent
    from edge_agent.client import CloudClient
    from edge_agent.metrics import AgentMetrics
    from edge_agent.state import AgentState

    telemetry.configure_logging(level=config.log_level)
    state = AgentState(config.state_dir, config.agent_id)
    make_deterministic()
    metrics = AgentMetrics()
    display = telemetry.progress_display()

    def tell(trouble: str) -> None:
        display.message(f"waiting for {config.server}: {trouble}" if trouble else f"reached {config.server}")

    client = CloudClient(config.server, state.agent_id, metrics, tell)
    http = None
    try:
        agent = EdgeAgent(config, state, client, metrics, display)
        if config.metrics_port is not None:
            app = telemetry.make_app(metrics.registry, ready=agent.is_ready, status=agent.status, page=None)
            http = await telemetry.serve_http(app, host=config.metrics_host, port=config.metrics_port)
            display.message(f"metrics on http://{config.metrics_host}:{http.port}/metrics")
        await agent.run()
        display.message("the run is over")
    finally:
        display.close()
        await client.close()
        if http:
            await http.stop()
        # The state directory stays locked until the process is gone: a thread may still write to it.
    return 0


if __name__ == "__main__":
    sys.exit(main())
