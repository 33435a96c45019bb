"""Contributions that started from older global models: taken, recorded, kept, and merged with less weight."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ecavg.cloud_server import records
from ecavg.cloud_server.config import ServerConfig
from ecavg.cloud_server.contribution import Contribution, Decision
from ecavg.cloud_server.jobs import Job, JobDirectory
from ecavg.cloud_server.round import Policy, Round
from ecavg.cloud_server.state_dir import blob_path
from ecavg.cloud_server.store import Store
from ecavg.cloud_server.trainer import work
from ecavg.cloud_server.trainer.group import Group
from ecavg.cloud_server.trainer.pieces import PIECE_ELEMENTS
from ecavg.cloud_server.trainer.staleness import discount, shift
from ecavg.cloud_server.upkeep.retention import clean_up
from ecavg.common.config import RunConfig, Wire
from ecavg.common.errors import InvalidError, Reason
from ecavg.common.models import build_model
from ecavg.common.run_state import Outcome
from ecavg.common.weights import StateDict, read_state_dict, write_state_dict
from ecavg.common.wire import Base, encode, wire_of
from tests.recipes import put
from tests.unit.states import AGENT, begin, contribute, digest_of, model_of, publish, run_rounds, upload

INITIAL, EARLIER, EARLIEST = "0" * 64, "1" * 64, "2" * 64
POLICY = Policy(min_agents=1, max_agents=2, deadline_seconds=60, max_staleness=2)
ROUND = Round(
    number=3, policy=POLICY, opened_at=0.0, initial_digest=INITIAL, earlier_starts=(EARLIER, EARLIEST)
)
KEPT = {"keep_partial_seconds": 1e9, "now": 100.0}


# What a round takes


@pytest.mark.parametrize(("start", "staleness"), [(INITIAL, 0), (EARLIER, 1), (EARLIEST, 2)])
def test_round_takes_what_started_from_an_earlier_model_and_says_how_old_it_is(
    start: str, staleness: int
) -> None:
    contribution = Contribution("edge-1", "a" * 64, (), 10, start)
    updated, outcome = ROUND.contribute(contribution)
    assert outcome is Outcome.ACCEPTED
    assert updated.contributions["edge-1"].staleness == staleness
    # The agent does not know the staleness, and sends the same again.
    assert updated.contribute(contribution) == (updated, Outcome.ACCEPTED)


@pytest.mark.parametrize("start", ["3" * 64, None])
def test_what_started_from_another_model_is_refused(start: str | None) -> None:
    with pytest.raises(InvalidError, match="pre-training started from") as caught:
        ROUND.contribute(Contribution("edge-1", "a" * 64, (), 10, start))
    assert caught.value.reason is Reason.INITIAL_WEIGHTS


def test_round_without_earlier_starts_refuses_what_is_stale() -> None:
    with pytest.raises(InvalidError):
        replace(ROUND, earlier_starts=()).contribute(Contribution("edge-1", "a" * 64, (), 10, EARLIER))


# What is on record


def starts(store: Store, number: int) -> tuple[str, ...]:
    row = store.last_round()
    assert row
    return records.earlier_starts(store, row, number)


def test_earlier_starts_are_those_of_the_last_rounds_newest_first(store: Store, state_dir: Path) -> None:
    run_rounds(store, state_dir, 3)
    models = [digest_of(model_of(number)) for number in (2, 1)]
    assert starts(store, 2) == tuple(models)
    assert starts(store, 0) == ()
    policy = replace(POLICY, max_staleness=1)
    assert records.recorded_round(store, RunConfig(), policy).earlier_starts == (models[0],)


def test_start_of_a_failed_round_counts_once(store: Store, state_dir: Path) -> None:
    run_rounds(store, state_dir, 1)
    store.set_phase(2, "failed", 2.5, failure="too few agents")
    store.open_round(3, digest_of(model_of(1)), 3.0)
    assert starts(store, 5) == (store.rounds()[0].initial_digest,)


def test_start_that_is_given_up_is_no_start_any_more(store: Store, state_dir: Path) -> None:
    run_rounds(store, state_dir, 4)
    clean_up(store, keep_rounds=2, **KEPT)
    assert starts(store, 10) == (digest_of(model_of(3)), digest_of(model_of(2)))
    assert all(store.blobs.path(digest).exists() for digest in starts(store, 10))


def test_staleness_and_the_start_outlive_the_clean_up(store: Store, state_dir: Path) -> None:
    run_rounds(store, state_dir, 4)
    start = digest_of(model_of(1))
    weights = upload(store, b"stale weights", "weights", 5.1)
    stale = Contribution(AGENT, weights, (), 10, start, staleness=3)
    store.record_contribution(5, Decision(AGENT, Outcome.ACCEPTED, 5.2, stale))
    clean_up(store, keep_rounds=1, **KEPT)
    (decision,) = store.contributions(5)
    assert decision.contribution
    assert decision.contribution.staleness == 3
    assert store.blobs.path(start).exists()
    assert not store.blobs.path(digest_of(model_of(2))).exists()
    publish(store, state_dir, 5)
    for number in (6, 7):
        store.open_round(number, digest_of(model_of(number - 1)), number)
        contribute(store, number)
        publish(store, state_dir, number)
    clean_up(store, keep_rounds=1, **KEPT)
    assert not store.blobs.path(start).exists()


def test_begun_run_has_no_earlier_starts(store: Store, state_dir: Path) -> None:
    begin(store, state_dir)
    assert starts(store, 3) == ()


# What may be configured

ASYNC = RunConfig(mode="async")


def test_keys_of_async_close_a_round_and_bound_the_age() -> None:
    config = ServerConfig(run=ASYNC, min_agents=2, buffer_size=3, max_staleness=4)
    assert (config.agents_to_close, config.staleness_allowed) == (3, 4)
    assert ServerConfig(run=ASYNC, keep_rounds=7).staleness_allowed == 7
    assert ServerConfig(run=ASYNC, max_agents=5).agents_to_close == 5
    assert ServerConfig(keep_rounds=7).staleness_allowed == 0


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"buffer_size": 2}, 'buffer_size is for run.mode = "async"'),
        ({"max_staleness": 2}, 'max_staleness is for run.mode = "async"'),
        ({"run": ASYNC, "agents_per_round": 2}, 'agents_per_round is for run.mode = "sync"'),
        ({"run": ASYNC, "buffer_size": 1}, "buffer_size 1 is below min_agents 2"),
        ({"run": ASYNC, "buffer_size": 4, "max_agents": 3}, "max_agents 3 is below buffer_size 4"),
        ({"run": ASYNC, "max_staleness": 11}, "max_staleness 11 is above keep_rounds 10"),
        ({"run": {"mode": "async", "initial_weights": "independent"}}, "needs a common start"),
    ],
)
def test_combinations_that_cannot_be_are_refused(keys: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ServerConfig.model_validate(keys)


# What the trainer makes of it


def drawn(seed: int) -> StateDict:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "weight": normal(3, 40_000),  # more than one piece
        "half": normal(5).half(),
        "norm.running_var": normal(5).abs(),
        "norm.num_batches_tracked": torch.tensor(seed),
        "mask": torch.tensor([True, seed % 2 == 0]),
    }


def written(state_dict: StateDict, path: Path) -> Path:
    write_state_dict(state_dict, path)
    return path


def test_weight_falls_with_the_root_of_the_staleness() -> None:
    assert [discount(staleness) for staleness in (0, 3, 8)] == [1.0, 0.5, 1 / 3]


def test_shifted_weights_are_the_current_ones_and_what_the_agent_has_changed(tmp_path: Path) -> None:
    own, start, current = (written(drawn(seed), tmp_path / str(seed)) for seed in (1, 2, 3))
    shift(own, start, current, tmp_path / "shifted")
    shifted = read_state_dict(tmp_path / "shifted")
    for name in ("weight", "half"):
        w, s, c = (drawn(seed)[name].double().numpy() for seed in (1, 2, 3))
        assert shifted[name].dtype == drawn(1)[name].dtype
        np.testing.assert_array_equal(
            shifted[name].numpy(), (c + (w - s)).astype(shifted[name].numpy().dtype)
        )
    for name in ("norm.running_var", "norm.num_batches_tracked", "mask"):
        assert torch.equal(shifted[name], drawn(1)[name])


def test_shifted_weights_are_finite_at_the_end_of_the_dtype(tmp_path: Path) -> None:
    own, start, current = (
        written({"weight": torch.tensor([value])}, tmp_path / str(value)) for value in (3e38, -3e38, 2e38)
    )
    shift(own, start, current, tmp_path / "shifted")
    assert read_state_dict(tmp_path / "shifted")["weight"].item() == torch.finfo(torch.float32).max


class Largest(TorchDispatchMode):
    """A record of the bytes of the largest tensor that is made."""

    num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor):
            self.num_bytes = max(self.num_bytes, made.nbytes)
        return made


def test_shifting_holds_a_piece_of_each_model_and_may_take_the_place_of_the_weights(tmp_path: Path) -> None:
    own, start, current = (written(drawn(seed), tmp_path / str(seed)) for seed in (1, 2, 3))
    shift(own, start, current, tmp_path / "shifted")
    with Largest() as largest:
        shift(own, start, current, own)
    # The sum is in float64.
    assert 0 < largest.num_bytes <= 8 * PIECE_ELEMENTS
    assert own.read_bytes() == (tmp_path / "shifted").read_bytes()


@pytest.mark.parametrize("wire", ["float32", "bfloat16", "int8"])
def test_model_is_the_mean_of_updates_by_examples_and_staleness(tmp_path: Path, wire: Wire) -> None:
    """The expected mean is computed here in float64, from what was sent or, encoded, nearly that."""
    run = RunConfig(mode="async", hidden_units=8, candidates=("average",), wire=wire, max_norm_ratio=0)
    blobs_dir, scratch = tmp_path / "blobs", tmp_path / "new"
    models = [build_model(run, seed=seed).state_dict() for seed in range(5)]
    old, current = (put(written(model, scratch), blobs_dir) for model in models[:2])

    def sent(agent: int, start: str) -> str:
        path = written(models[agent], scratch)
        if wire == "float32":
            return put(path, blobs_dir)
        base = Base(blob_path(blobs_dir, start), start)
        encode(path, tmp_path / "encoded", wire_of(wire, base), base=base, residual=None,
               next_residual=tmp_path / "residual")  # fmt: skip
        return put(tmp_path / "encoded", blobs_dir)

    contributions = (
        Contribution("ann", sent(2, current), (), 100, current),
        Contribution("bob", sent(3, old), (), 200, old, staleness=3),
        Contribution("cy", sent(4, old), (), 300, old, staleness=3),
    )
    directory = JobDirectory(tmp_path / "jobs/round-0005")
    directory.write_job(
        Job(kind="round", name="round-0005", round=5, run=run, device="cpu", initial_weights=current,
            contributions=contributions)
    )  # fmt: skip
    work.run_job(directory, blobs_dir=blobs_dir, device_name="cpu", group=Group())
    result = directory.read_result()
    assert result
    assert result.error is None
    published = read_state_dict(directory.weights_path)
    tolerance = {"float32": 1e-7, "bfloat16": 1e-2, "int8": 1e-2}[wire]
    norms = {agent.agent_id: agent.update_norm for agent in result.audit}
    squares = dict.fromkeys(("ann", "bob", "cy"), 0.0)
    for name, tensor in published.items():
        s, c, ann, bob, cy = (model[name].double().numpy() for model in models)
        updates = {"ann": ann - c, "bob": bob - s, "cy": cy - s}
        factors = {"ann": 100.0, "bob": 200 / math.sqrt(4), "cy": 300 / math.sqrt(4)}
        expected = c + sum(factors[who] * updates[who] for who in updates) / sum(factors.values())
        np.testing.assert_allclose(tensor.numpy(), expected, atol=tolerance)
        for who, update in updates.items():
            squares[who] += float((update**2).sum())
    # The audit's norms are those of the agents' own updates, as well.
    for who, square in squares.items():
        assert norms[who] == pytest.approx(math.sqrt(square), rel=2e-2)
