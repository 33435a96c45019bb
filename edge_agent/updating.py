"""What follows when another model is in use: the export for inference, and the command of the user.

Each model in use is told of at least once. What was done is recorded afterwards, so where the agent is killed
in between, the export is written and the command run again at the next start.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, NamedTuple

import structlog

from ecavg.common.errors import ECAvgError
from ecavg.edge_agent.config import AgentConfig
from ecavg.edge_agent.history import History, Source, Use
from ecavg.edge_agent.metrics import AgentMetrics
from ecavg.edge_agent.running import reason_of_failure
from ecavg.edge_agent.state import AgentState
from ecavg.edge_agent.worker import Worker

FILE_NAMES = {"onnx": "model.onnx", "torch-export": "model.pt2"}
# So much of what the command has written goes to the log, from the end.
MAX_OUTPUT_BYTES = 4096

log = structlog.get_logger()


class Told(NamedTuple):
    """How it went to tell of a model."""

    # Why it failed, in one line; empty: it did not, or there was nothing to tell.
    failure: str = ""
    # True if the model that was in use before is in use again.
    is_rolled_back: bool = False


class Updates:
    """The telling of models that come into use on this device.

    Args:
        say: called with a line for the user.

    Attributes:
        history: the models that were in use.
        is_cut_off: True while a model is told of, and afterwards if that was cancelled.
    """

    def __init__(
        self,
        config: AgentConfig,
        disk: AgentState,
        worker: Worker,
        metrics: AgentMetrics,
        say: Callable[[str], None],
    ) -> None:
        self._config = config
        self._disk = disk
        self._worker = worker
        self._metrics = metrics
        self._say = say
        self.history = History(disk.path, config.keep_models, config.max_file_bytes)
        self.is_cut_off = False

    async def tell(self) -> Told:
        """Export the model in use and run `on_update`, or return how that went before.

        Where that fails, the model before is in use again if the configuration wants so, and is told of.
        """
        self.is_cut_off = True
        told = await self._tell()
        self.is_cut_off = False
        return told

    async def _tell(self) -> Told:
        uses = await self._worker.run(self.history.uses)
        is_asked_for = self._config.on_update or self._config.export != "none"
        if not uses or not is_asked_for:
            return Told()
        if uses[-1].is_told:
            return Told(uses[-1].failure)
        failure = await self._do(uses[-1])
        if not failure:
            self._metrics.updates_total.labels("done").inc()
            await self._worker.run(self.history.mark_told)
            return Told()
        return await self._failed(uses[-1], failure)

    async def _failed(self, use: Use, failure: str) -> Told:
        """Record the failure, and roll back if that is wanted and can be done."""
        log.warning("update_failed", round=use.round, digest=use.digest, reason=failure)
        restored = None
        # A model that came back because another one failed is kept, whatever its own command says.
        if self._config.on_update_failure == "roll-back" and use.source is not Source.ROLLED_BACK:
            restored = await self._worker.run(self.history.roll_back, None, failure)
        if restored is None:
            self._metrics.updates_total.labels("failed").inc()
            self._say(f"round {use.round}: {failure}; the model stays in use")
            await self._worker.run(self.history.mark_told, failure)
            return Told(failure)
        self._metrics.updates_total.labels("rolled_back").inc()
        self._say(f"round {use.round}: {failure}; rolled back to the model of round {restored.round}")
        await self._tell()
        return Told(failure, is_rolled_back=True)

    async def _do(self, use: Use) -> str:
        """Write the export and run the command; return why one of them failed, or an empty text."""
        variables = self._variables(use)
        if self._config.export != "none":
            path = self._disk.path / FILE_NAMES[self._config.export]
            variables["ECAVG_EXPORT"] = str(path.absolute())
            try:
                await self._worker.run(self._export, use, path)
            except ECAvgError as error:
                return str(error)
        return await self._run_command(variables) if self._config.on_update else ""

    def _export(self, use: Use, path: Path) -> None:
        # Imported here, because the commands that only run `on_update` do without PyTorch.
        from ecavg.edge_agent.exporting import export

        assert self._config.export != "none"
        weights, run = self.history.weights(use), self.history.run_of(use)
        export(run, use, weights, self._config.export, path, self._config.allow_factory)

    def _variables(self, use: Use) -> dict[str, str]:
        """Return the variables that tell the command what is in use."""
        variables = {
            "ECAVG_MODEL": str(self._disk.model.absolute()),
            "ECAVG_MODEL_SHA256": use.digest,
            "ECAVG_ROUND": str(use.round),
            "ECAVG_SOURCE": use.source,
        }
        if use.source in (Source.PUBLISHED, Source.ADAPTED):
            variables["ECAVG_REPORT"] = str(self._disk.report.absolute())
        return variables

    async def _run_command(self, variables: dict[str, str]) -> str:
        command, seconds = self._config.on_update, self._config.on_update_seconds
        # A file, because a pipe would stay open in what the command leaves running.
        with tempfile.TemporaryFile() as output:
            reason = await reason_of_failure(command, seconds, environment=variables, output=output)
            log.debug("on_update", reason=reason or None, output=_end_of(output))
        return f"on_update: {reason}" if reason else ""


def _end_of(file: IO[bytes]) -> str:
    size = file.seek(0, 2)
    file.seek(max(0, size - MAX_OUTPUT_BYTES))
    return file.read(MAX_OUTPUT_BYTES).decode("utf-8", "replace")
