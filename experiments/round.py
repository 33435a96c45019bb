"""A round in this process: the product's own agents and trainer, with files in place of the network.

The functions here call the same parts as `edge_agent/agent.py` and `cloud_server/coordinator.py`, in the same
order.
"""

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ecavg.cloud_server.contribution import Contribution
from ecavg.cloud_server.jobs import Job, JobDirectory, Progress, Result
from ecavg.cloud_server.state_dir import StateDir, blob_path
from ecavg.cloud_server.trainer.group import Group
from ecavg.cloud_server.trainer.pipeline import RoundPipeline, Workplace
from ecavg.cloud_server.trainer.warm_up import WarmUp
from ecavg.cloud_server.trainer.work import run_job
from ecavg.common.checkpoint import CHECKPOINT_SECONDS
from ecavg.common.comparison import Comparison, compare
from ecavg.common.config import CandidateName, RunConfig
from ecavg.common.errors import RunError
from ecavg.common.evaluation import evaluate
from ecavg.common.models import build_model
from ecavg.common.seeds import derive_seed
from ecavg.common.tasks.task import task_of
from ecavg.common.training import StepReport
from ecavg.common.transfer import Blob, blob_of
from ecavg.common.weights import load_into, write_state_dict
from ecavg.common.wire import is_encoded
from ecavg.edge_agent.data import AgentData, load_agent_data
from ecavg.edge_agent.local import LocalModels
from ecavg.edge_agent.partition import Partition
from ecavg.edge_agent.state import AgentState, Report
from experiments import data
from experiments.candidates import Made, make_candidates, make_weighed
from experiments.tasks import Setting

# The arguments are a name for the work, the number of steps done, and the number of all steps.
OnProgress = Callable[[str, int, int], None]


class Received(NamedTuple):
    """The decision of one agent about a published model."""

    report: Report
    # The weights of the model in use in the end. The next decision may overwrite this file.
    weights: Path
    # The accuracy of the model in use in the end, on the agent's own held-out data.
    accuracy: float
    # The comparison of the model in use before with the model in use in the end.
    comparison: Comparison


def agent_ids(count: int) -> list[str]:
    """Return the ids of `count` agents, in the order of their partitions."""
    return [f"edge-{number:02}" for number in range(1, count + 1)]


class Blobs:
    """A folder of files named by their digest, as on the server."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def put(self, source: Path) -> Blob:
        """Store the file as a blob by a hard link; the file must never be written to again."""
        blob = blob_of(source)
        target = self.get(blob.digest)
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            os.link(source, target)
        return blob

    def get(self, digest: str) -> Path:
        return blob_path(self.path, digest)

    def discard_all_but(self, needed: Collection[str]) -> None:
        for path in self.path.glob("*/*"):
            if path.name not in needed:
                path.unlink()


@dataclass(frozen=True)
class Edge:
    """One agent: its data, its state on disk, and the product's code that works on both."""

    run: RunConfig
    data: AgentData
    disk: AgentState
    device: torch.device
    # The number of rounds that the learning-rate schedule of the run is for.
    planned_rounds: int = 1

    @property
    def agent_id(self) -> str:
        return self.disk.agent_id

    @cached_property
    def models(self) -> LocalModels:
        return LocalModels(
            self.run,
            self.data,
            self.disk,
            self.device,
            (),
            CHECKPOINT_SECONDS,
            planned_rounds=self.planned_rounds,
        )

    def share(self, initial: str, blobs: Blobs) -> Contribution:
        """Store the shards as blobs, with the initial weights in place of trained ones, as for a warm-up."""
        return Contribution(
            agent_id=self.agent_id,
            weights_digest=initial,
            shard_digests=tuple(blobs.put(path).digest for path in self.models.shards),
            num_examples=self.models.num_examples,
            initial_digest=initial,
        )

    def contribute(
        self, number: int, initial: str | None, blobs: Blobs, on_progress: OnProgress
    ) -> Contribution:
        """Pre-train, unless that is done already, and store the weights and the shards as blobs."""
        trained = self.disk.progress.trained
        if not trained or (trained.round, trained.initial_weights) != (number, initial):
            what = f"{self.agent_id} pre-trains"

            def show(step: StepReport) -> None:
                on_progress(what, step.step, step.num_steps)

            model = self.models.pretrain(number, blobs.get(initial) if initial else None, show)
            trained = self.models.keep(number, initial, model)
            self.disk.save(self.disk.progress.model_copy(update={"trained": trained}))
            self.disk.discard(self.disk.checkpoint)
        sent = self.disk.local_weights
        if is_encoded(self.run):
            start = blobs.get(initial) if initial else None
            self.models.encode(trained, start, counted_round=number - 1)
            sent = self.disk.encoded
        return Contribution(
            agent_id=self.agent_id,
            weights_digest=blobs.put(sent).digest,
            shard_digests=tuple(blobs.put(path).digest for path in self.models.shards),
            num_examples=self.models.num_examples,
            initial_digest=initial,
        )

    def receive(self, number: int, weights: Path, on_progress: OnProgress) -> Received:
        """Decide about a published model as the run's `apply` says, without using the model yet."""

        def show(step: StepReport) -> None:
            on_progress(f"{self.agent_id} adapts", step.step, step.num_steps)

        report = self.models.measure(number, weights, self.disk.progress.trained, show)
        self.disk.discard(self.disk.checkpoint)
        in_use = weights if report.applied else self.disk.model
        in_use = self.disk.adapted if report.uses_adapted else in_use
        before, after = self._predictions(self.disk.model), self._predictions(in_use)
        return Received(report, in_use, float(after.mean()), compare(before, after))

    def apply(self, weights: Path, received: Received) -> None:
        """Use the model from now on, if the agent has decided so."""
        self.models.apply(weights, received.report, lambda _: None)

    def _predictions(self, weights: Path) -> np.ndarray:
        """Return for each of the agent's held-out examples if these weights are right about it; bool [N]."""
        model = build_model(self.run, seed=0)
        load_into(model, weights)
        images, labels = (torch.from_numpy(array) for array in self.data.held_out)
        found = evaluate(model, images, labels, task=task_of(self.run), device=self.device)
        return np.asarray(found.scores.numpy() == 1)


def round_job(
    run: RunConfig,
    number: int,
    initial: str | None,
    contributions: Sequence[Contribution],
    planned_rounds: int = 1,
) -> Job:
    """Return the trainer's job for a round; round 0 is the warm-up.

    Args:
        planned_rounds: the number of rounds that the learning-rate schedule of the run is for.
        initial: the digest of the weights that the agents started from; None if each agent started from
            weights of its own.
    """
    return Job(
        kind="round" if number else "warm_up",
        name="round",
        round=number,
        run=run,
        device="auto",
        initial_weights=initial,
        contributions=tuple(contributions),
        planned_rounds=planned_rounds,
    )


class AfterWarmUp(RoundPipeline):
    """The work on a round whose initial weights the cloud has trained: they are a candidate in round 1, too.

    The pipeline sees that by itself if the run's table has a warm-up. The table of worth.py has none in round
    1, because there the epochs of the warm-up are taken from the first fine-tune.
    """

    @property
    def _may_keep_start(self) -> bool:
        return True


class Cloud:
    """The server's part of the rounds: the jobs of a run, one after the other."""

    def __init__(self, path: Path, device: torch.device) -> None:
        self._path = path
        self._state_dir = StateDir(path)
        self._device = device
        self.blobs = Blobs(self._state_dir.blobs)

    def initial_weights(self, run: RunConfig) -> str:
        """Make the weights that the agents' first pre-training starts from, and return their digest."""
        directory = JobDirectory(self._state_dir.job("initialise"))
        directory.write_job(
            Job(kind="initialise", name="initialise", round=0, run=run, device="auto", initial_weights=None)
        )
        run_job(directory, blobs_dir=self.blobs.path, device_name=str(self._device), group=Group())
        result = directory.read_result()
        assert result
        if result.error:
            raise RunError(result.error.message)
        digest = self.blobs.put(directory.weights_path).digest
        directory.remove()
        return digest

    def random_weights(self, run: RunConfig) -> str:
        """Make random weights, which nobody has trained, and return their digest."""
        path = self._path / "random.safetensors"
        write_state_dict(build_model(run, seed=derive_seed(run.seed, "random_start")).state_dict(), path)
        digest = self.blobs.put(path).digest
        path.unlink()
        return digest

    def publish(self, job: Job, on_progress: OnProgress, *, is_warmed_up: bool = False) -> Result:
        """Do the round's job, and store the published model as a blob.

        Args:
            is_warmed_up: True if the cloud has trained the weights from which round 1 starts.
        """
        directory = _ShownDirectory(self._round_path, on_progress)
        directory.write_job(job)
        directory.discard_output()
        of_round = AfterWarmUp if is_warmed_up else RoundPipeline
        pipeline = WarmUp if job.kind == "warm_up" else of_round
        result = pipeline(job, Workplace(directory, self.blobs.path, self._device, Group())).run()
        self.blobs.put(directory.weights_path)
        directory.remove()
        return result

    def candidates(self, job: Job, result: Result, names: Sequence[CandidateName]) -> Iterator[Made]:
        """Make these candidates of a finished job again."""
        return make_candidates(job, result, self.blobs.path, self._device, names)

    def weighed(self, job: Job, result: Result) -> Iterator[Made]:
        """Make all candidates of a finished job again, and last its fine-tuned model."""
        precision_path = JobDirectory(self._round_path).precision_path
        return make_weighed(job, result, self.blobs.path, self._device, precision_path)

    @property
    def _round_path(self) -> Path:
        return self._state_dir.job("round")


@dataclass(frozen=True)
class _ShownDirectory(JobDirectory):
    """A job directory whose progress is shown at once."""

    on_progress: OnProgress

    def append_progress(self, progress: Progress) -> None:
        self.on_progress(progress.phase.replace("_", "-"), progress.done, progress.total)


class Network:
    """The agents of a setting and their cloud, with a folder from which a stopped experiment goes on."""

    def __init__(self, setting: Setting, path: Path, device: torch.device, on_progress: OnProgress) -> None:
        data.choose(setting.data, setting.num_examples, setting.num_test, setting.run.seed)
        self.cloud = Cloud(path, device)
        self.edges = [
            Edge(
                setting.run,
                load_agent_data(
                    setting.run,
                    source=data.FACTORY,
                    data_dir=None,
                    partition=Partition(index, setting.num_agents),
                    seed_name=agent_id,
                    allowed_factories={data.FACTORY},
                ),
                AgentState(path / agent_id, agent_id),
                device,
            )
            for index, agent_id in enumerate(agent_ids(setting.num_agents), 1)
        ]
        self._run = setting.run
        self._on_progress = on_progress

    def close(self) -> None:
        for edge in self.edges:
            edge.disk.close()

    def share(self) -> list[Contribution]:
        """Let all agents share their data for the warm-up, and return their contributions."""
        return [edge.share(self._initial_weights, self.cloud.blobs) for edge in self.edges]

    def contribute(
        self, run: RunConfig, number: int, latest: str | None, planned_rounds: int = 1
    ) -> list[Contribution]:
        """Let all agents pre-train for a round, and return their contributions.

        Args:
            latest: the digest of the latest published model; None before the first one.
            planned_rounds: the number of rounds that the learning-rate schedule of the run is for.
        """
        initial = self.start(latest)
        return [
            replace(edge, run=run, planned_rounds=planned_rounds).contribute(
                number, initial, self.cloud.blobs, self._on_progress
            )
            for edge in self.edges
        ]

    def start(self, latest: str | None) -> str | None:
        """Return the digest of the weights that a round starts from; None for each agent's own weights.

        Args:
            latest: the digest of the latest published model; None before the first one.
        """
        return latest or (None if self._run.initial_weights == "independent" else self._initial_weights)

    @cached_property
    def _initial_weights(self) -> str:
        return self.cloud.initial_weights(self._run)
