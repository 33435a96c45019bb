"""This device's data and models in a run: read in the background, and again when the data have changed."""

import asyncio
from collections.abc import Callable

from ecavg.common.agent_progress import Activity, AgentProgress
from ecavg.common.config import RunConfig
from ecavg.common.errors import UsageError
from ecavg.common.faults import Point, crash_point
from ecavg.common.progress import ProgressDisplay
from ecavg.edge_agent.config import AgentConfig
from ecavg.edge_agent.local import LocalModels
from ecavg.edge_agent.sources import data_stamp
from ecavg.edge_agent.teller import Teller
from ecavg.edge_agent.worker import Worker


class LocalData:
    """What this device trains with; reading it begins at once.

    Args:
        load: reads the data; called in the worker's thread.
        tasks: the group that reading belongs to; what it raises ends the group.
        on_ready: called when reading has ended.
    """

    def __init__(
        self,
        load: Callable[[], LocalModels],
        run: RunConfig,
        config: AgentConfig,
        agent_id: str,
        worker: Worker,
        display: ProgressDisplay,
        teller: Teller,
        tasks: asyncio.TaskGroup,
        on_ready: Callable[[], None],
    ) -> None:
        self._load_models = load
        self._run = run
        self._config = config
        self._agent_id = agent_id
        self._worker = worker
        self._display = display
        self._teller = teller
        # What was shown last of what is not read, so that it is not shown again in each round.
        self._shown_not_read = ""
        self._loading: asyncio.Future[LocalModels] = tasks.create_task(self._load())
        self._loading.add_done_callback(lambda _: on_ready())

    @property
    def is_ready(self) -> bool:
        """Return True once reading has ended."""
        return self._loading.done()

    async def models(self) -> LocalModels:
        """Return the models and data, as soon as they are read."""
        return await asyncio.shield(self._loading)

    def stop(self) -> None:
        """Read no further."""
        self._loading.cancel()

    async def read_again(self) -> bool:
        """Read what has changed, and return False if it cannot be read.

        An image folder may be another one by the time a round begins.

        While a round lasts the data stay as they are, so this is for the beginning of a round.
        """
        arguments = self._run, self._config.data, self._config.data_dir
        try:
            if await self._worker.run(data_stamp, *arguments) == (await self.models()).stamp:
                return True
            loaded = await self._load()
        except UsageError as error:
            self._display.message(f"the data cannot be read again, so those of before are used: {error}")
            return False
        self._display.message(f"the data have changed: {loaded.num_examples} examples to train on")
        self._loading = asyncio.get_running_loop().create_future()
        self._loading.set_result(loaded)
        return True

    async def _load(self) -> LocalModels:
        async with self._teller.telling(AgentProgress(Activity.READING)):
            models = await self._worker.run(self._load_models)
        crash_point(Point.AGENT_DATA_LOADED)
        if models.not_read and models.not_read != self._shown_not_read:
            self._display.message(models.not_read)
        self._shown_not_read = models.not_read
        self._display.message(_what_is_shared(models, self._run))
        if models.has_withdrawn and self._config.share_data != "all":
            self._display.message(
                f"some {_noun(self._run)}s are no longer shared; where they were sent before, the server's"
                f" operator deletes them with `cloud-server forget {self._agent_id}`"
            )
        return models


def _what_is_shared(models: LocalModels, run: RunConfig) -> str:
    noun, num_unknown = _noun(run), models.num_without_target
    unknown = f"; {num_unknown} have no target yet, and are not trained on" if num_unknown else ""
    if not models.num_shared:
        return f"no {noun} leaves this device, {models.num_examples} are trained on{unknown}"
    kept = {"round": "until their round is over", "run": "beyond their round"}[run.retain_data]
    shared = f"shared are {models.num_shared} of {models.num_examples + num_unknown} {noun}s"
    return f"{shared}, which the server keeps {kept}{unknown}"


def _noun(run: RunConfig) -> str:
    return "image" if run.spec.is_pictures else "example"
