"""The work of a cloud that only averages: every tensor passes in pieces, and the model is never built.

This is for models that do not fit the trainer's memory (`RunConfig.only_averages`). The initial weights are
in files, whose names, shapes and dtypes are the run's. What needs the model is left out: the rehearsal, the
audit of labels and models, the accuracies. Norms are compared and clipped as in any round.
"""

from collections.abc import Collection, Sequence
from contextlib import ExitStack
from pathlib import Path

from ecavg.cloud_server.jobs import Job, JobDirectory, Result
from ecavg.cloud_server.trainer.aggregation import aggregate_into
from ecavg.cloud_server.trainer.initial import initial_files
from ecavg.cloud_server.trainer.output import exact_path, finish
from ecavg.cloud_server.trainer.pipeline import RoundPipeline
from ecavg.common.config import RunConfig
from ecavg.common.errors import InvalidError, RunError, UsageError
from ecavg.common.faults import Point, crash_point
from ecavg.common.files import link
from ecavg.common.parts import shared_names
from ecavg.common.schema import Schema, read_header
from ecavg.common.tensor_files import PLAIN, reading, writing
from ecavg.common.wire import wire_of, wire_schema


class Averaging(RoundPipeline):
    """The work on a round in which the cloud only averages."""

    def _make_model(self) -> Result:
        """Do the steps of the round in order; on rank 0, the folder for intermediate files must exist."""
        self._tell("aggregating", 0, 1)
        with self._timed("aggregate"):
            self._make_weights()
        base = self._base_of_published()
        self._screen(None)
        if not self._is_first:
            return Result()
        with self._timed("aggregate"):
            self._average(exact_path(self._directory, wire_of(self._run.wire, base)))
        self._tell("fine_tuning", 1, 1)
        if self._rest:
            link(self._rest, self._directory.rest_path)
        with self._timed("evaluate"):
            written = finish(self._directory, wire_of(self._run.wire, base), base)
        self._tell("evaluating", 1, 1)
        return self._timestamped(
            Result(
                weights=written.weights,
                encoded=written.encoded,
                rest=written.rest,
                start="average",
                published="start",
                audit=self._screening.agents,
                audit_note=self._screening.note,
            )
        )

    def _average(self, target: Path) -> None:
        """Write the aggregate of the members' weights."""

        def on_tensor(done: int, total: int) -> None:
            self._tell("aggregating", done, total)
            crash_point(Point.TRAINER_TENSOR_AVERAGED)

        try:
            aggregate_into(
                target,
                [member.weights_path for member in self._members],
                [member.coefficient for member in self._members],
                self._run,
                on_tensor=on_tensor,
            )
        except InvalidError as error:
            raise RunError(f"the average cannot be used: {error}") from error


def initialise(job: Job, directory: JobDirectory) -> Result:
    """Write the run's initial weights, which are copied from their files in pieces.

    The folder for intermediate files must exist.

    Raises:
        UsageError: the files cannot be used, or `share_parameters` needs the model or matches nothing.
    """
    run = job.run
    files = initial_files(run)
    schema = {name: spec for file in files for name, spec in read_header(file).schema.items()}
    shared, wire = _shared(run, schema), wire_of(run.wire, None)
    # A schema that cannot be encoded is refused here, because after agents have joined it would be too late.
    wire_schema({name: schema[name] for name in shared}, run.wire)
    _copy(files, shared, exact_path(directory, wire))
    if rest := schema.keys() - shared:
        _copy(files, rest, directory.rest_path)
    written = finish(directory, wire, None)
    return Result(weights=written.weights, encoded=written.encoded, rest=written.rest)


def _shared(run: RunConfig, schema: Schema) -> Collection[str]:
    if run.share_parameters == "trainable":
        raise UsageError(
            'run.share_parameters: "trainable" is known by building the model, which this cloud does not do'
            ' (only the average, no fine-tune): name the parameters, as in ["*.lora_*"]'
        )
    return shared_names(run, schema.keys(), ())


def _copy(files: Sequence[Path], names: Collection[str], target: Path) -> None:
    """Write one file with the tensors of these names, which are in several files."""
    schemas = [read_header(file).schema for file in files]
    wanted = {name: spec for schema in schemas for name, spec in schema.items() if name in names}
    with ExitStack() as stack:
        copy = stack.enter_context(writing(target, wanted, PLAIN))
        for file, schema in zip(files, schemas, strict=True):
            source = stack.enter_context(reading(file, schema))
            for name in schema.keys() & wanted.keys():
                source.copy_to(copy, name)
