"""One cell of an experiment: the rounds of one seed and setting, in all variants that are asked for.

Agents pre-train once for all variants. The figures of each variant are kept in a file of their own, so that
an experiment that was stopped goes on after the last finished variant.
"""

import fcntl
import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import nn

from ecavg.cloud_server.contribution import Contribution
from ecavg.cloud_server.jobs import Job, Result
from ecavg.common.config import RunConfig
from ecavg.common.devices import select_device
from ecavg.common.errors import RunError, UsageError
from ecavg.common.evaluation import evaluate
from ecavg.common.files import replacing
from ecavg.common.models import build_model
from ecavg.common.tasks.task import task_of
from ecavg.common.weights import load_into
from ecavg.common.wire import Base, decode
from ecavg.edge_agent.state import Report
from experiments import barrier, data
from experiments.candidates import held_out_scores
from experiments.round import Edge, Network, OnProgress, Received, round_job
from experiments.tasks import DEFAULT, VARIANTS, Setting, Variant

# The content of a JSON file.
Record = dict[str, Any]


class Cell(NamedTuple):
    """The measurements wanted for one setting, and the folder that keeps the figures known so far."""

    setting: Setting
    # Names in VARIANTS.
    variants: Sequence[str]
    path: Path
    device: str = "cpu"
    # The number of rounds of the variants that are split over several rounds.
    num_rounds: int = 2
    with_barrier: bool = False
    # Variants that are asked for later need the pre-trained weights.
    keep_weights: bool = True

    @property
    def missing(self) -> list[str]:
        """Return the variants without a record."""
        return [name for name in self.variants if self.record(name) is None]

    @property
    def is_done(self) -> bool:
        return not self.missing and not self.lacks_barrier

    @property
    def lacks_barrier(self) -> bool:
        return self.with_barrier and self.barrier is None

    @property
    def barrier(self) -> Record | None:
        return read_record(self.path / "barrier.json")

    def record(self, name: str) -> Record | None:
        """Return the record of a variant; None if there is none, or only one with other settings."""
        record = read_record(self.path / f"{name}.json")
        return record if record and record["identity"] == self._identity(name) else None

    def keep(self, name: str, measured: Record) -> None:
        write_record(self.path / f"{name}.json", {**measured, "identity": self._identity(name)})

    def keep_barrier(self, measured: Record) -> None:
        write_record(self.path / "barrier.json", measured)

    def rounds_of(self, name: str) -> int:
        return self.num_rounds if VARIANTS[name].is_split else 1

    def run(self, on_progress: OnProgress) -> None:
        """Measure the variants, and the loss barrier, that are missing in the cell.

        Raises:
            UsageError: there are too few data, or another process is working on this cell.
        """
        if not self.is_done:
            _Run(self, on_progress).run()

    def _identity(self, name: str) -> Record:
        variant = VARIANTS[name]
        run = self.setting.run_of(variant)
        unused = set() if variant.is_received and run.apply == "if-not-worse" else {"adapt_epochs"}
        return {"run": run.model_dump(mode="json", exclude=unused), "rounds": self.rounds_of(name)}


class _Run:
    """The work on one cell, from the pre-training to the records."""

    def __init__(self, cell: Cell, on_progress: OnProgress) -> None:
        self._cell = cell
        self._setting = cell.setting
        self._device = select_device(cell.device)
        self._on_progress = on_progress
        self._weighed_seconds = 0.0
        self._network = Network(self._setting, cell.path / "network", self._device, on_progress)
        self._test = TestSet(cell.setting.run, self._device, cell.path / "measured.json")

    def run(self) -> None:
        with closing(self._network):
            started = time.perf_counter()
            contributions = self._network.contribute(self._setting.run, 1, None)
            self._note_pretrain_seconds(time.perf_counter() - started)
            for name in sorted(self._cell.missing, key=lambda name: name != DEFAULT):
                self._cell.keep(name, self._as_by_default(name) or self._measure(name, contributions))
            if self._cell.lacks_barrier:
                self._cell.keep_barrier(self._measure_barrier())
        if not self._cell.keep_weights:
            shutil.rmtree(self._cell.path / "network")

    def _measure(self, name: str, contributions: Sequence[Contribution]) -> Record:
        """Do a variant's rounds, and return the record."""
        variant, started = VARIANTS[name], time.perf_counter()
        self._weighed_seconds = 0.0
        if variant.is_split:
            rounds = self._several_rounds(variant, self._cell.rounds_of(name))
        else:
            rounds = [self._one_round(variant, contributions)]
        # The time in which all models are made again and measured is not part of the variant's own time.
        seconds = {"all": time.perf_counter() - started - self._weighed_seconds}
        if not variant.is_split:
            seconds["pretrain"] = self._pretrain_seconds
        return {"rounds": rounds, "seconds": seconds}

    def _as_by_default(self, name: str) -> Record | None:
        """Return the default's record, if the default started from this variant's only candidate; else None.

        The rest of the round is the same for both, so that the variant need not be measured.
        """
        variant, default = VARIANTS[name], self._cell.record(DEFAULT)
        if default is None or variant.changes.keys() != {"candidates"} or variant.is_received:
            return None
        (candidate,), (found,) = variant.changes["candidates"], default["rounds"]
        models = found["models"]
        if candidate not in models or models[candidate]["digest"] != models[found["start"]]["digest"]:
            return None
        return {**default, "rounds": [{**found, "start": candidate, "edges": []}], "same_as": DEFAULT}

    def _measure_barrier(self) -> Record:
        ends = [edge.disk.local_weights for edge in self._network.edges[:2]]
        return barrier.measure(self._setting.run, ends, self._setting.data, self._device, self._on_progress)

    # ------------------------------------------------------------------ rounds

    def _one_round(self, variant: Variant, contributions: Sequence[Contribution]) -> Record:
        """Do a round with the agents that have pre-trained for all variants, and return the record."""
        network, pretrained = self._network, contributions
        if variant.is_random:
            random = network.cloud.random_weights(self._setting.run)
            contributions = [replace(item, weights_digest=random) for item in contributions]
        run = self._setting.run_of(variant)
        record, _ = self._publish(variant, run, 1, None, network, contributions)
        needed = {digest for item in pretrained for digest in item.blob_digests}
        # Models are large, so the models of this variant are deleted.
        network.cloud.blobs.discard_all_but(needed | {network.start(None) or ""})
        return record

    def _several_rounds(self, variant: Variant, num_rounds: int) -> list[Record]:
        """Do the rounds with new agents, and return the record of each round.

        The pre-training of a round depends on the rounds before, so the shared pre-training cannot be used.
        """
        rounds, latest = [], None
        folder = self._cell.path / "rounds"
        with new_network(self._setting, folder, self._device, self._on_progress) as network:
            for number in range(1, num_rounds + 1):
                run = self._setting.run_of(variant, number, num_rounds)
                contributions = network.contribute(run, number, latest)
                record, latest = self._publish(variant, run, number, latest, network, contributions)
                rounds.append(record)
        return rounds

    def _publish(
        self,
        variant: Variant,
        run: RunConfig,
        number: int,
        latest: str | None,
        network: Network,
        contributions: Sequence[Contribution],
    ) -> tuple[Record, str]:
        """Do the cloud's part of a round, and the agents' part after it.

        Returns:
            The record of the round, and the digest of the published weights.
        """
        blobs, start = network.cloud.blobs, network.start(latest)
        sent = [blobs.get(item.weights_digest) for item in contributions]
        base = Base(blobs.get(start), start) if start else None
        local = [self._measure_sent(path, base) for path in sent]
        show = prefixed(variant.label, self._on_progress)
        job = round_job(run, number, start, contributions)
        result = network.cloud.publish(job, show)
        if result.weights is None or result.start is None:
            raise RunError(f"round {number} of {variant.label} published nothing")
        published = blobs.get(result.weights.sha256)
        models = self._measure_weighed(network, job, result)
        edges = network.edges if variant.is_received else ()
        record = {
            "local": local,
            "models": models,
            "held_out": held_out_scores(result),
            "start": result.start,
            "soup": result.soup,
            "published": result.published,
            "digest": result.weights.sha256,
            "accuracy": self._test.measure_file(published)["accuracy"],
            "bytes": {
                "up": fmean(path.stat().st_size for path in sent),
                "down": (result.encoded or result.weights).bytes,
            },
            "edges": [
                self._receive(replace(edge, run=run), number, published, is_applied=variant.is_split)
                for edge in edges
            ],
            "seconds": result.seconds,
        }
        return record, result.weights.sha256

    def _measure_weighed(self, network: Network, job: Job, result: Result) -> Record:
        """Measure the candidates and the fine-tuned model on the common test set."""
        started = time.perf_counter()
        models = {name: self._test.measure(model) for name, model in network.cloud.weighed(job, result)}
        self._weighed_seconds += time.perf_counter() - started
        return models

    def _receive(self, edge: Edge, number: int, published: Path, *, is_applied: bool) -> Record:
        """Measure the model that an agent ends up with, without its gate and with its gate.

        Without its gate, the agent always applies the published model.

        Returns:
            A record, in which "gate" has the figures with the agent's gate, if the run has one. Accuracies
            `own_…` are on the agent's own held-out data, accuracies `test_…` on the common test set.
        """
        before = self._test.measure_file(edge.disk.model)
        always = replace(edge, run=edge.run.model_copy(update={"apply": "always"}))
        received = always.receive(number, published, self._on_progress)
        record = {
            "agent_id": edge.agent_id,
            "num_examples": edge.models.num_examples,
            "num_held_out": received.report.num_held_out,
            "own_before": received.report.score_before,
            "test_before": before["accuracy"],
            **self._after(received),
        }
        if edge.run.apply == "if-not-worse":
            received = edge.receive(number, published, self._on_progress)
            record["gate"] = {"takes": _taken(received.report), **self._after(received)}
        if is_applied:
            edge.apply(published, received)
        edge.disk.discard(edge.disk.adapted)
        return record

    def _after(self, received: Received) -> Record:
        """Return the figures of the model that the agent uses in the end."""
        return {
            "own_after": received.accuracy,
            "test_after": self._test.measure_file(received.weights)["accuracy"],
            "tolerance": received.comparison.tolerance,
            "is_worse": received.comparison.is_worse,
        }

    def _measure_sent(self, path: Path, base: Base | None) -> Record:
        """Measure the weights as the cloud decodes them."""
        decoded = self._cell.path / "decoded.safetensors"
        decode(path, decoded, base=base)
        measured = self._test.measure_file(decoded)
        decoded.unlink()
        return measured

    def _note_pretrain_seconds(self, seconds: float) -> None:
        """Note the wall seconds of the pre-training, once.

        When a stopped experiment goes on, the seconds noted before stand, because the pre-training is done.
        """
        path = self._cell.path / "pretrain.json"
        known = read_record(path)
        self._pretrain_seconds = known["seconds"] if known else seconds
        if not known:
            write_record(path, {"seconds": seconds})


@contextmanager
def alone_in(path: Path) -> Iterator[None]:
    """Keep other processes away from a cell's folder, which is made if need be.

    Raises:
        UsageError: another process is at work there.
    """
    path.mkdir(parents=True, exist_ok=True)
    with (path / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"another process is at work in {path}: wait for its end") from None
        yield


@contextmanager
def new_network(
    setting: Setting, path: Path, device: torch.device, on_progress: OnProgress
) -> Iterator[Network]:
    """Open a network of new agents in a folder, which is deleted when its work is done.

    What a command that was stopped has left in the folder is deleted first.
    """
    shutil.rmtree(path, ignore_errors=True)
    with closing(Network(setting, path, device, on_progress)) as network:
        yield network
    shutil.rmtree(path)


class TestSet:
    """The common test set, on which the same weights are measured once, even if an experiment restarts."""

    def __init__(self, run: RunConfig, device: torch.device, path: Path) -> None:
        images, labels = data.examples("test")
        self._examples = torch.from_numpy(images), torch.from_numpy(labels)
        self._run = run
        self._device = device
        self._path = path
        self._known: dict[str, Record] = read_record(path) or {}
        self._model = build_model(run, seed=0)

    def measure(self, model: nn.Module) -> Record:
        """Return a model's accuracy (0 to 1), its loss (mean cross-entropy, nats) and its weights' digest."""
        digest = _digest(model)
        if digest not in self._known:
            found = evaluate(model, *self._examples, task=task_of(self._run), device=self._device)
            self._known[digest] = {"accuracy": found.score, "loss": found.loss, "digest": digest}
            write_record(self._path, self._known)
        return self._known[digest]

    def measure_file(self, path: Path) -> Record:
        load_into(self._model, path)
        return self.measure(self._model)


def _taken(report: Report) -> str:
    if not report.applied:
        return "its own"
    return "adapted" if report.uses_adapted else "as it is"


def _digest(model: nn.Module) -> str:
    """Return the SHA-256 digest of the model's state_dict."""
    hashed = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        hashed.update(name.encode())
        hashed.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return hashed.hexdigest()


def prefixed(what: str, on_progress: OnProgress) -> OnProgress:
    return lambda phase, done, total: on_progress(f"{what}: {phase}", done, total)


def read_record(path: Path) -> Record | None:
    try:
        record: Record = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    return record


def write_record(path: Path, record: Record) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
