"""The models on this device: trained, measured and replaced. All of it blocks, so it runs in a thread.

Whatever is written here is whole or absent, and doing it again gives the same bytes: the progress that the
agent saves afterwards decides what counts as done.
"""

import json
import os
from collections.abc import Collection
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import structlog
import torch
from torch import nn

from ecavg.common.agent_progress import OnExamples, ignore_examples
from ecavg.common.checkpoint import CheckpointFile
from ecavg.common.comparison import compare, objection
from ecavg.common.config import RunConfig, TrainingConfig
from ecavg.common.errors import DivergedError, RunError, UsageError
from ecavg.common.evaluation import Evaluation, evaluate
from ecavg.common.faults import Point, crash_point
from ecavg.common.files import replacing, sync
from ecavg.common.late_targets import KnownShard, read_known_shards
from ecavg.common.models import build_model, errors_of_model, shared_part
from ecavg.common.rehearsal import Probe, check_probe, rehearse
from ecavg.common.schedule import Place, place_of
from ecavg.common.schema import most_file_bytes
from ecavg.common.seeds import derive_seed
from ecavg.common.shards import Shard, gather, has_target
from ecavg.common.tasks import kind_of, published
from ecavg.common.tasks.task import task_of
from ecavg.common.training import Examples, OnStep, Recipe, choose_precision, train
from ecavg.common.transfer import Blob, blob_of
from ecavg.common.weights import StateDict, load_into, write_state_dict
from ecavg.common.wire import Base, encode, wire_of
from ecavg.edge_agent.client import Joined
from ecavg.edge_agent.config import AgentConfig
from ecavg.edge_agent.data import AgentData, choose_shared, load_agent_data
from ecavg.edge_agent.history import History, Source, use_of
from ecavg.edge_agent.own_training import Data, OwnTraining, Purpose, Start, train_as_own
from ecavg.edge_agent.partition import Partition, parse_partition
from ecavg.edge_agent.series import check_shared_fraction
from ecavg.edge_agent.shard_files import keep_late_targets, keep_shards
from ecavg.edge_agent.state import AgentState, Report, Trained

log = structlog.get_logger()


def load_local_models(
    joined: Joined,
    config: AgentConfig,
    disk: AgentState,
    device: torch.device,
    on_read: OnExamples = ignore_examples,
    on_evaluated: OnExamples = ignore_examples,
    own_training: OwnTraining | None = None,
) -> "LocalModels":
    """Rehearse the model, read this agent's data, and make sure that its shard files hold them.

    Args:
        on_read: called now and then while the data are read.
        on_evaluated: called now and then while a model is measured, as long as there is this object.
        own_training: trains in the place of this project's loop.

    Raises:
        UsageError: the model cannot be used here, or is another one than the server's; or the data cannot be
            read, or do not fit the run.
        OSError: a shard file cannot be written.
    """
    check_shared_fraction(joined.run, config.shared_fraction)
    _check_model(joined.run, config.allow_factory, joined.probe)
    data = load_agent_data(
        joined.run,
        source=config.data,
        data_dir=config.data_dir,
        partition=_partition(joined, config),
        seed_name=disk.agent_id,
        # Whoever names code with --data allows it to run.
        allowed_factories={*config.allow_factory, config.data or ""},
        on_read=on_read,
        table=config.table,
    )
    return LocalModels(
        joined.run,
        data,
        disk,
        device,
        config.allow_factory,
        config.checkpoint_seconds,
        shared_fraction=config.shared_fraction,
        planned_rounds=joined.planned_rounds,
        on_evaluated=on_evaluated,
        keep_models=config.keep_models,
        max_file_bytes=config.max_file_bytes,
        own_training=own_training,
    )


@lru_cache(maxsize=1)
def _check_model(run: RunConfig, allowed_factories: tuple[str, ...], probe: Probe) -> None:
    """Rehearse the model, and compare it with the server's; once, however often the data are read.

    Raises:
        UsageError: the model cannot be used here, or is another one than the server's.
    """
    check_probe(run, rehearse(run, allowed_factories), probe)


def _partition(joined: Joined, config: AgentConfig) -> Partition | None:
    """Return the partition asked for, or the server's slot where agents share the run's dataset."""
    if config.partition:
        return parse_partition(config.partition)
    if config.data:
        return None
    slot, count = joined.slot, joined.num_partitions
    if slot > count:
        log.warning("partition_shared", slot=slot, num_partitions=count)
    return Partition((slot - 1) % count + 1, count)


class LocalModels:
    """This agent's data, and the work with models on them.

    One network is built, and given one model's weights after the other: a model is its state_dict. The
    examples that it is trained on are mapped from the shard files, so that only held-out ones stay in memory.

    Args:
        shared_fraction: how much of the examples to train on is uploaded.
        planned_rounds: how many rounds the learning-rate schedule of the run is for.
        on_evaluated: called now and then while a model is measured, in the thread that measures it.
        keep_models: how many of the models that were last in use stay on the disk.
        max_file_bytes: a model in use with more bytes is written as several files as well; None: none is.
        own_training: trains in the place of this project's loop, without checkpoints.

    Raises:
        UsageError: nothing is left to train on.
        OSError: a shard file cannot be written.

    Attributes:
        metric: the name of the figure that models are measured by.
        stamp: the stamp of the data; see edge_agent/data.py.
        not_read: what is not read of an image folder, in a line for the user; empty if all of it is.
        shards: the files of the examples that are shared, in order, those of their late targets, and the
            blobs of both.
        num_shared: how many examples are in them, with those that the cloud holds back of each.
        num_examples: how many have a target, of these and of the examples that are not shared.
        num_without_target: how many have none.
        trained_on: the digests of the files of both.
        has_withdrawn: True if some file is no longer shared, and the server may have it.
    """

    def __init__(
        self,
        run: RunConfig,
        data: AgentData,
        disk: AgentState,
        device: torch.device,
        allowed_factories: Collection[str],
        checkpoint_seconds: float,
        *,
        shared_fraction: float = 1.0,
        planned_rounds: int = 1,
        on_evaluated: OnExamples = ignore_examples,
        keep_models: int = 3,
        max_file_bytes: int | None = None,
        own_training: OwnTraining | None = None,
    ) -> None:
        self._run = run
        self._own_training = own_training
        self._on_evaluated = on_evaluated
        self._history = History(disk.path, keep_models, max_file_bytes)
        self._task = task_of(run, allowed_factories)
        self.metric = self._task.metric
        self._planned_rounds = planned_rounds
        self._held_out = data.held_out
        self._disk = disk
        self._device = device
        self._allowed_factories = allowed_factories
        self._checkpoint_seconds = checkpoint_seconds
        self._network: nn.Module | None = None
        # The file of the model in use and how good it is, once it was measured.
        self._in_use: tuple[os.stat_result, Evaluation] | None = None
        # How good the global model is that was measured last, maybe after adaptation.
        self._arrived: Evaluation | None = None
        self.stamp = data.stamp
        self.not_read = data.not_read
        before = set(disk.shards.glob("*.safetensors"))
        is_shared = choose_shared(data.train.inputs, shared_fraction)
        self.shards = _kept(disk.shards, data.train, is_shared, run)
        private = _kept(disk.private, data.train, ~is_shared, run)
        self.trained_on = tuple(blob.digest for blob in (*self.shards.values(), *private.values()))
        self.has_withdrawn = not before <= self.shards.keys()
        # The shards can be read even when their files are removed.
        self._shared, self._private = (_known(files) for files in (self.shards, private))
        self.num_shared = sum(len(known.sent) for known in self._shared)
        every = [known.shard.targets for known in (*self._shared, *self._private)]
        self.num_examples = sum(int(has_target(each, run.spec.targets).sum()) for each in every)
        self.num_without_target = sum(map(len, every)) - self.num_examples
        self._trained = self._trained_parts()

    def most_weights_bytes(self) -> int:
        """Return how large a file with weights of the run's model may be."""
        model = self._model(None) if self._network is None else self._network
        num_bytes: int = sum(each.nbytes for each in model.state_dict().values())
        return most_file_bytes(num_bytes)

    def pretrain(
        self,
        number: int,
        initial: Path | None,
        on_step: OnStep,
        *,
        rest: Path | None = None,
        has_full_curve: bool = False,
    ) -> nn.Module:
        """Train for a round, from the last checkpoint if there is one.

        Args:
            initial: the file of weights to start from; None: this agent's own weights.
            rest: the file of the parts that do not travel, which `initial` does not have.
            has_full_curve: whether the learning rate takes a full curve in this round after the plan.
        """
        model = self._model(initial, rest)
        place = place_of(self._run, "pretrain", number, self._planned_rounds, has_full_curve=has_full_curve)
        self._train(model, self._run.pretrain, "pretrain", number, on_step, place)
        return model

    def keep(
        self, number: int, initial_weights: str | None, model: nn.Module, *, may_use: bool = True
    ) -> Trained:
        """Write what was pre-trained for a round to a file, and use it unless the model in use is better.

        Args:
            may_use: False where the model in use stays in any case, unless there is none.
        """
        evaluation, path = self._evaluate(model), self._disk.local_weights
        state_dict, shared = model.state_dict(), shared_part(model, self._run)
        write_state_dict({name: state_dict[name] for name in state_dict if name in shared}, path)
        trained = Trained(
            round=number,
            weights=blob_of(path),
            score=evaluation.score,
            initial_weights=initial_weights,
            shards=self.trained_on,
            rest=self._keep_rest(model),
        )
        in_use = self._evaluate_in_use()
        if in_use is None or (may_use and evaluation.score >= in_use.score):
            scores = in_use and in_use.score, evaluation.score
            # The network may have the weights of the model in use by now.
            rest = trained.rest and self._disk.rest(trained.rest.digest)
            whole = self._write_whole(self._model(path, rest)) if rest else path
            self._use(whole, evaluation, number, Source.PRE_TRAINED, scores)
        return trained

    def make_rest(self, blob: Blob) -> bool:
        """Make the cloud's parts that do not travel, if they are those that the model is built with.

        Returns:
            False if they have another digest; nothing is there then.
        """
        model = build_model(self._run, allowed_factories=self._allowed_factories)
        path = self._disk.weights(blob.digest)
        write_state_dict(_rest_of(model, self._run), path)
        if blob_of(path) == blob:
            return True
        self._disk.discard(path)
        return False

    def _keep_rest(self, model: nn.Module) -> Blob | None:
        """Write the parts of a model that do not travel; return None if all do."""
        rest, path = _rest_of(model, self._run), self._disk.work / "rest.safetensors"
        if not rest:
            return None
        write_state_dict(rest, path)
        blob = blob_of(path)
        path.replace(self._disk.rest(blob.digest))
        sync(self._disk.path)
        return blob

    def _write_whole(self, model: nn.Module) -> Path:
        write_state_dict(model.state_dict(), self._disk.whole)
        return self._disk.whole

    def encode(self, trained: Trained, initial: Path | None, counted_round: int) -> Blob:
        """Write the encoded weights, and the rounding residual, to files.

        Args:
            initial: the file of weights that pre-training started from; None: this agent's own weights, which
                the server does not have.
            counted_round: the last round that counted a contribution of this agent; the residual of that
                contribution is added.
        """
        base = Base(initial, trained.initial_weights) if initial and trained.initial_weights else None
        residual = self._disk.residual(counted_round)
        self._disk.discard_residuals_but(residual)
        encode(
            self._disk.local_weights,
            self._disk.encoded,
            wire_of(self._run.wire, base),
            base=base,
            residual=residual if residual.exists() else None,
            next_residual=self._disk.residual(trained.round),
        )
        return blob_of(self._disk.encoded)

    def measure(
        self,
        number: int,
        weights: Path,
        trained: Trained | None,
        on_step: OnStep,
        *,
        rest: Path | None = None,
        must_use: bool = False,
    ) -> Report:
        """Compare a global model with the one in use, on this agent's own held-out data, and decide.

        A model that has learnt from everybody's data may do worse on the few classes of one device than a
        specialist. Trained on this device's data for a little while it mostly does not (local adaptation:
        arXiv 2002.04758, arXiv 1910.10252); so where it does worse it is adapted, and compared again.

        Args:
            trained: what this agent has pre-trained for the round, if it did.
            rest: the file of the parts that do not travel; the models that are compared have all parts.
            must_use: whether the model is to be used as it is, even where it does worse.
        """
        before, after, adapted = self._evaluate_in_use(), self._evaluate(self._model(weights, rest)), None
        reason = "" if must_use else self._objection(before, after)
        if reason and self._run.adapt_epochs:
            try:
                adapted = self._evaluate(self._adapt(number, weights, rest, on_step))
            except DivergedError as error:
                reason += f"; local adaptation: {error}"
            else:
                is_worse = self._objection(before, adapted)
                reason = f"{reason}; {adapted.score:.4f} after local adaptation" if is_worse else ""
        self._arrived = adapted or after
        difference = compare(before.scores.numpy(), self._arrived.scores.numpy()) if before else None
        return Report(
            round=number,
            initial_weights=trained.initial_weights if trained else None,
            score_local=trained.score if trained else None,
            score_before=before.score if before else None,
            score_after=after.score,
            score_adapted=adapted.score if adapted else None,
            num_held_out=after.num_examples,
            applied=not reason,
            reason=reason,
            difference_total=difference and difference.total,
            difference_squares=difference and difference.squares,
        )

    def apply(self, weights: Path, report: Report, on_step: OnStep, *, rest: Path | None = None) -> None:
        """Use a global model from now on if that is what was decided, and write the report for the user.

        Args:
            weights: the file of the model as it is; the adapted model is made again if it is lost.
            rest: the file of the parts that do not travel.
        """
        if report.uses_adapted and not self._disk.adapted.exists():
            self._adapt(report.round, weights, rest, on_step)
        if report.applied:
            self._use_arrived(weights, rest, report)
        self.write_report(report)

    def write_report(self, report: Report) -> None:
        """Write the report for the user."""
        text = json.dumps({"agent_id": self._disk.agent_id, **self._published(report)}, indent=2)
        with replacing(self._disk.report) as partial:
            partial.write_text(text + "\n", "utf-8")

    def _published(self, report: Report) -> dict[str, Any]:
        """Return the report under the names that the task publishes."""
        kind = kind_of(self._run.task)
        metric = {} if kind.field == "accuracy" else {"metric": self.metric}
        return metric | published(kind, report.model_dump())

    def _model(self, weights: Path | None, rest: Path | None = None) -> nn.Module:
        """Return the network with these weights; None: with weights of this agent's own.

        Args:
            rest: the file of what `weights` leaves out.
        """
        if self._network is None or weights is None:
            self._network = build_model(
                self._run,
                seed=derive_seed(self._run.seed, "initial_weights", self._disk.agent_id),
                allowed_factories=self._allowed_factories,
            )
        if weights:
            load_into(self._network, rest, weights)
        return self._network

    def _adapt(self, number: int, weights: Path, rest: Path | None, on_step: OnStep) -> nn.Module:
        """Train the global model of a round further on this agent's data, and write it to a file."""
        model = self._model(weights, rest)
        config = self._run.pretrain.model_copy(update={"epochs": self._run.adapt_epochs})
        self._train(model, config, "adapt", number, on_step)
        write_state_dict(model.state_dict(), self._disk.adapted)
        crash_point(Point.AGENT_ADAPTED)
        return model

    def _train(
        self,
        model: nn.Module,
        config: TrainingConfig,
        stream: Purpose,
        number: int,
        on_step: OnStep,
        place: Place | None = None,
    ) -> None:
        """Train by the user's own loop, if there is one, or by the run's recipe.

        Args:
            stream: names the random stream of this training in round `number`.
            place: the place in the schedule of the run; None: this training has a schedule of its own.
        """
        examples, task, device = self._examples(), self._task, self._device
        seed = derive_seed(self._run.seed, stream, number, self._disk.agent_id)
        if self._own_training:
            start = Start(number, stream, seed, device, config)
            train_as_own(self._own_training, model, Data(examples, task.spec), start, on_step)
            return
        kept_at = self._disk.precision
        precision = choose_precision(model, examples, config, task=task, device=device, kept_at=kept_at)
        with errors_of_model(self._run, RunError):
            train(
                model,
                examples,
                Recipe(config, task, seed, precision, place=place),
                device=device,
                on_step=on_step,
                checkpoint=CheckpointFile(self._disk.checkpoint, self._checkpoint_seconds),
            )

    def _examples(self) -> Examples:
        """Return the examples to train on."""
        return Examples(*map(torch.from_numpy, gather(self._trained, self._run.spec)))

    def _trained_parts(self) -> list[tuple[Shard, np.ndarray]]:
        """Return the shards, each with its examples that the cloud fine-tunes on or never sees.

        All of them have a target. The other ones are those that the cloud chooses and evaluates on.

        Raises:
            UsageError: the cloud holds back all examples that have a target.
        """
        spec = self._run.spec
        fraction = self._run.fine_tune.holdout_fraction
        holdout_seed = derive_seed(self._run.seed, "cloud_holdout", self._disk.agent_id)
        parts = [(known.shard, known.split(spec, fraction, holdout_seed)[0]) for known in self._shared]
        parts += [
            (shard, np.flatnonzero(has_target(shard.targets, spec.targets))) for shard, _ in self._private
        ]
        if not any(len(indices) for _, indices in parts):
            raise UsageError(
                f"{self.num_examples} of the examples to train on have a target, and the cloud holds back as"
                " many: tell the targets of more examples"
            )
        return parts

    def _objection(self, before: Evaluation | None, after: Evaluation) -> str:
        """Return why a model should not take the place of the one in use; empty: it may."""
        if before is None or self._run.apply == "always":
            return ""
        return objection(before, after, self.metric)

    def _use_arrived(self, weights: Path, rest: Path | None, report: Report) -> None:
        if report.uses_adapted:
            weights, source, score = self._disk.adapted, Source.ADAPTED, report.score_adapted
        else:
            weights = self._write_whole(self._model(weights, rest)) if rest else weights
            source, score = Source.PUBLISHED, report.score_after
        self._use(weights, self._arrived, report.round, source, (report.score_before, score))

    def _use(
        self,
        weights: Path,
        evaluation: Evaluation | None,
        number: int,
        source: Source,
        scores: tuple[float | None, float | None],
    ) -> None:
        """Replace the model in use.

        Args:
            evaluation: how good the new one is; None: it was measured in an earlier life of this agent.
            scores: of the model before, and of the new one.
        """
        use = use_of(weights, self._disk.progress.run_id, number, source, scores)
        self._history.take(weights, self._run, use.model_copy(update={"metric": self.metric}))
        self._in_use = (self._disk.model.stat(), evaluation) if evaluation else None

    def _evaluate_in_use(self) -> Evaluation | None:
        """Measure the model in use; None: there is none that fits this run."""
        path = self._disk.model
        if not path.exists():
            return None
        if self._in_use and _is_same(self._in_use[0], path.stat()):
            return self._in_use[1]
        try:
            model = self._model(path)
        except RunError as error:
            # The model is of an earlier run.
            log.warning("model_in_use_ignored", reason=str(error))
            return None
        evaluation = self._evaluate(model)
        self._in_use = path.stat(), evaluation
        return evaluation

    def _evaluate(self, model: nn.Module) -> Evaluation:
        with errors_of_model(self._run, RunError):
            return evaluate(
                model,
                torch.from_numpy(self._held_out.inputs),
                torch.from_numpy(self._held_out.targets),
                task=self._task,
                device=self._device,
                on_examples=self._on_evaluated,
            )


def _kept(folder: Path, train: Shard, is_chosen: np.ndarray, run: RunConfig) -> dict[Path, Blob]:
    """Return the files of the chosen examples and of their late targets, and the blobs of both."""
    chosen = train if is_chosen.all() else Shard(*(array[is_chosen] for array in train))
    described = run.spec.targets
    blobs = {path: blob_of(path) for path in keep_shards(folder, chosen, described)}
    digests = {path: blob.digest for path, blob in blobs.items()}
    return blobs | {path: blob_of(path) for path in keep_late_targets(digests, chosen, described)}


def _known(files: dict[Path, Blob]) -> list[KnownShard]:
    return read_known_shards({blob.digest: path for path, blob in files.items()})


def _rest_of(model: nn.Module, run: RunConfig) -> StateDict:
    """Return the tensors of the model that do not travel."""
    shared = shared_part(model, run)
    return {name: tensor for name, tensor in model.state_dict().items() if name not in shared}


def _is_same(file: os.stat_result, other: os.stat_result) -> bool:
    """Return True if both looks found one file, which was not written to in between."""
    return os.path.samestat(file, other) and file.st_mtime_ns == other.st_mtime_ns
