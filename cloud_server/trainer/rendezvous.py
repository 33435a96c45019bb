"""The rendezvous of training machines, on a machine that does not train.

    python -m ecavg.cloud_server.trainer.rendezvous --port 29400

The machines find each other through a store of PyTorch. By default torchrun keeps the store on the machine
that `--rdzv-endpoint` names, and the group ends with that machine. Where this command keeps the store, for
example beside the server, the group outlives each of its machines.
"""

import signal
import sys
from collections.abc import Sequence

import structlog

from ecavg.common import cli
from ecavg.common.errors import UsageError
from ecavg.common.logs import configure_logging

PORT = 29400

log = structlog.get_logger()


def main(argv: Sequence[str] | None = None) -> int:
    """Keep the store until the process is ended."""
    return cli.enter("rendezvous", lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> int:
    parser = cli.Parser(
        prog="python -m ecavg.cloud_server.trainer.rendezvous",
        description="Keep the rendezvous of training machines, for torchrun's --rdzv-endpoint.",
    )
    parser.add_argument(
        "--port",
        type=int,
        default=PORT,
        help="the TCP port, on all interfaces; whoever reaches it may join; default: %(default)s",
    )
    arguments = parser.parse_args(argv)
    configure_logging()
    # Importing PyTorch takes seconds, and an error in the command line should be reported without that delay.
    from torch.distributed import DistNetworkError, TCPStore  # type: ignore[attr-defined]

    try:
        store = TCPStore("localhost", arguments.port, is_master=True, wait_for_workers=False)
    except DistNetworkError as error:
        raise UsageError(f"cannot listen on port {arguments.port}: choose another --port") from error
    log.info("rendezvous_ready", port=store.port)
    signal.pause()
    return 0


if __name__ == "__main__":
    sys.exit(main())
