"""What a trainer would find on this machine, for `cloud-server doctor`: the device, and the run's model.

The run's configuration comes on stdin, as JSON; the answer is one line on stdout. This process trains nothing
and writes no file.
"""

import math
import sys
from collections.abc import Sequence

from ecavg.cloud_server.trainer.initial import initial_files
from ecavg.cloud_server.trainer.output import num_parameters
from ecavg.common import cli
from ecavg.common.config import RunConfig
from ecavg.common.devices import describe_device
from ecavg.common.models import build_model
from ecavg.common.schema import read_header


def main(argv: Sequence[str]) -> int:
    """Print what the trainer would find on the device that the only argument names.

    Raises:
        UsageError: there is no such device, the model cannot be built, or its files cannot be read.
    """
    run = RunConfig.model_validate_json(sys.stdin.read())
    device = describe_device(argv[0])
    cli.print_result(f"{device}; {_describe_model(run)}")
    return 0


def _describe_model(run: RunConfig) -> str:
    if run.only_averages:
        schemas = [read_header(file).schema for file in initial_files(run, are_read=False)]
        num_values = sum(math.prod(spec.shape) for schema in schemas for spec in schema.values())
        return f"initial weights of {num_values} numbers, which are averaged without the model"
    return f"model {run.model} has {num_parameters(build_model(run))} parameters"


if __name__ == "__main__":
    sys.exit(cli.enter("trainer", lambda: main(sys.argv[1:])))
