"""`cloud-server` whose patience is seconds long, for tests of what happens when it ends."""

import sys

from ecavg.cloud_server import servicer
from ecavg.cloud_server.__main__ import main
from ecavg.common import rpc

KEEPALIVE_SECONDS = 0.5
KEEPALIVE_TIMEOUT_SECONDS = 3.0
IDLE_SECONDS = 1.5

if __name__ == "__main__":
    rpc.KEEPALIVE_SECONDS = KEEPALIVE_SECONDS
    rpc.KEEPALIVE_TIMEOUT_SECONDS = KEEPALIVE_TIMEOUT_SECONDS
    servicer.IDLE_SECONDS = IDLE_SECONDS
    sys.exit(main())
