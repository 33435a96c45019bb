"""What a trainer would find on this machine, for `cloud-server doctor`: the device, and the run's model.

The run's configuration comes on stdin, as JSON; the answer is one line on stdout. This process trains nothing
and writes no file.
"""

import sys
from collections.abc import Sequence

from common import cli
from common.config import RunConfig
from common.devices import describe_device
from common.models import build_model


def main(argv: Sequence[str]) -> int:
    """Print what the trainer would find on the device that the only argument names.

    Raises:
        UsageError: there is no such device, or the model cannot be built.
    """
    run = RunConfig.model_validate_json(sys.stdin.read())
    device = describe_device(argv[0])
    num_parameters = sum(parameter.numel() for parameter in build_model(run).parameters())
    cli.print_result(f"{device}; model {run.model} has {num_parameters} parameters")
    return 0


if __name__ == "__main__":
    sys.exit(cli.enter("trainer", lambda: main(sys.argv[1:])))
